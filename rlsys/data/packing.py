"""Packing of ragged sequences into forward passes.

A `SegmentGroup` is a prompt followed by some of its responses; responses see the prompt and
themselves, never one another. Here a prompt of 3 tokens with the responses a, b and c, each without
its last token:

    tokens      p0 p1 p2 | a0 a1 | b0 b1 b2 | c0
    positions   0  1  2  | 3  4  | 3  4  5  | 3
    predicts             a0 -> a1     b0 -> b1 ...       and p2 -> a0, b0 and c0 at once

The prompt is computed once for all its responses (`shared_prefix_packing`), or once for each. A
response's last token predicts nothing and is left out. **The next-token shift happens here and
nowhere else**: `predict_positions[k]` is the packed position whose hidden state predicts the token
`targets[k]`, which lies at `flat_positions[k]` of the sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsys.data.sequences import TokenSequences


@dataclass(frozen=True)
class SegmentGroup:
    """One prompt with responses, inside a pack; lengths are in packed tokens."""

    start: int  # position of its first token in the pack
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt_length + sum(self.response_lengths)

    @property
    def visible_products(self) -> int:
        """Query-key products without those between responses; causality is not counted."""
        prompt = self.prompt_length
        return prompt**2 + sum(length * (prompt + length) for length in self.response_lengths)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The input of one forward pass: n packed tokens, m predicted tokens, b responses."""

    token_ids: NDArray[np.int64]  # [n]
    position_ids: NDArray[np.int64]  # [n]
    groups: tuple[SegmentGroup, ...]
    predict_positions: NDArray[np.int64]  # [m] into the packed tokens
    targets: NDArray[np.int64]  # [m] token ids
    flat_positions: NDArray[np.int64]  # [m] into TokenSequences.token_ids
    rows: NDArray[np.int64]  # [b] into the batch's sequences
    response_index: NDArray[np.int64]  # [m] which of the b responses
    response_positions: NDArray[np.int64]  # [m] index within the response's span
    # Computed only so that every rank has equally many passes; contributes nothing.
    is_padding: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class _PackingUnit:
    """Some responses of one group, which stay together: they go to one rank and into one pack."""

    rows: tuple[int, ...]
    num_tokens: int
    width: int  # tokens of its longest row, with the prompt
    shares_prompt: bool  # else each row has a copy of its own

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """The rows after each copy of the prompt."""
        return (self.rows,) if self.shares_prompt else tuple((row,) for row in self.rows)


def _units(
    sequences: TokenSequences,
    rows: NDArray[np.int64],
    budget: int,
    *,
    shared_prefix_packing: bool,
    whole_groups: bool,
) -> list[_PackingUnit]:
    """Split the responses `rows` into units within the budget.

    With shared-prefix packing a unit is a whole group, or a part of one that does not fit; without
    it each response is a unit. With `whole_groups` a unit is always a whole group.
    """
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(int(sequences.group_ids[row]), []).append(int(row))

    lengths = sequences.lengths
    units: list[_PackingUnit] = []
    for group_rows in members.values():
        prompt = int(sequences.prompt_lengths[group_rows[0]])

        def unit(rows: Sequence[int], prompt: int = prompt) -> _PackingUnit:
            extras = [max(int(lengths[row]) - prompt - 1, 0) for row in rows]
            copies = 1 if shared_prefix_packing else len(rows)
            return _PackingUnit(
                rows=tuple(rows),
                num_tokens=copies * prompt + sum(extras),
                width=prompt + max(extras),
                shares_prompt=shared_prefix_packing,
            )

        if whole_groups:
            units.append(unit(group_rows))
            continue

        current: list[int] = []
        size = prompt
        for row in group_rows:
            extra = max(int(lengths[row]) - prompt - 1, 0)
            if current and (not shared_prefix_packing or size + extra > budget):
                units.append(unit(current))
                current = []
                size = prompt
            current.append(row)
            size += extra
        units.append(unit(current))
    return units


def _balance(units: Sequence[_PackingUnit], ranks: int) -> list[list[_PackingUnit]]:
    """Assign units to ranks: longest first, each to the rank with the fewest tokens so far.

    Ties go to the lower rank, so that all ranks compute the same plan.
    """
    assigned: list[list[_PackingUnit]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for unit in sorted(units, key=lambda unit: (-unit.num_tokens, unit.rows)):
        rank = loads.index(min(loads))
        assigned[rank].append(unit)
        loads[rank] += unit.num_tokens
    return assigned


def _bins(units: Sequence[_PackingUnit], budget: int, *, padded: bool) -> list[list[_PackingUnit]]:
    """Fill bins by first-fit decreasing; `units` come longest first."""
    bins: list[list[_PackingUnit]] = []
    loads: list[_Load] = []
    for unit in units:
        grown = [load.with_unit(unit) for load in loads]
        fits = (load.size(padded=padded) <= budget for load in grown)
        place = next((i for i, fit in enumerate(fits) if fit), None)
        if place is None:
            bins.append([unit])
            loads.append(_Load(0, 0, 0).with_unit(unit))
        else:
            bins[place].append(unit)
            loads[place] = grown[place]
    return bins


class _Load(NamedTuple):
    """What a bin holds so far."""

    num_tokens: int
    num_rows: int
    width: int  # of its longest row

    def with_unit(self, unit: _PackingUnit) -> _Load:
        return _Load(
            self.num_tokens + unit.num_tokens,
            self.num_rows + len(unit.rows),
            max(self.width, unit.width),
        )

    def size(self, *, padded: bool) -> int:
        """Return the tokens of the forward pass; `padded` fills a rectangle."""
        return self.num_rows * self.width if padded else self.num_tokens


def pack_rows(
    sequences: TokenSequences,
    rows: NDArray[np.int64],
    *,
    budget: int,
    rank: int,
    ranks: int,
    shared_prefix_packing: bool,
    padded: bool = False,
    whole_groups: bool = False,
) -> list[Pack]:
    """Return the packs of one rank for the responses `rows`.

    Every rank gets equally many; the last ones may be padding packs. A sequence longer than
    `budget` tokens has a pack of its own. Every rank computes the same plan from the same batch.
    `padded` counts each sequence of a pack as long as its longest one; prompts cannot be shared
    then. `whole_groups` keeps all responses of a group in one pack, which then may be larger than
    `budget`: for losses that compare responses.
    """
    assert not (padded and shared_prefix_packing), "a padded row has a prompt of its own"
    units = _units(
        sequences,
        rows,
        budget,
        shared_prefix_packing=shared_prefix_packing,
        whole_groups=whole_groups,
    )
    assigned = _balance(units, ranks)
    bins = [_bins(own, budget, padded=padded) for own in assigned]
    packs = [_pack(sequences, content, is_padding=False) for content in bins[rank]]

    # Passes contain collective calls, so all ranks need the same number of them.
    passes = max(map(len, bins))
    in_rank_order = [unit for own in assigned for unit in own]
    smallest = min(in_rank_order, key=lambda unit: unit.num_tokens)
    return packs + [_pack(sequences, [smallest], is_padding=True)] * (passes - len(packs))


def _pack(sequences: TokenSequences, units: Sequence[_PackingUnit], *, is_padding: bool) -> Pack:
    """Lay out the prompts and responses of `units` as one forward pass."""
    tokens: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    groups: list[SegmentGroup] = []
    predict: list[NDArray[np.int64]] = []
    flat: list[NDArray[np.int64]] = []
    index: list[NDArray[np.int64]] = []
    within: list[NDArray[np.int64]] = []
    rows = [row for unit in units for row in unit.rows]

    start = 0
    for segment in (segment for unit in units for segment in unit.segments):
        prompt = int(sequences.prompt_lengths[segment[0]])
        first = int(sequences.offsets[segment[0]])
        tokens.append(sequences.token_ids[first : first + prompt])
        positions.append(np.arange(prompt))

        lengths = []
        place = start + prompt
        for row in segment:
            begin = int(sequences.offsets[row]) + prompt
            end = int(sequences.offsets[row + 1])
            span = np.arange(end - begin)
            sampled = span[sequences.loss_mask[begin:end]]

            # All tokens of the response but the last, which predicts nothing.
            packed = max(end - begin - 1, 0)
            tokens.append(sequences.token_ids[begin : begin + packed])
            positions.append(prompt + span[:packed])

            # Token s of the response is predicted by its predecessor; token 0 by the last token of
            # the prompt, which other responses may separate from it.
            predict.append(np.where(sampled == 0, start + prompt - 1, place + sampled - 1))
            flat.append(begin + sampled)
            within.append(sampled)
            index.append(np.full(len(sampled), len(index)))

            lengths.append(packed)
            place += packed
        groups.append(SegmentGroup(start, prompt, tuple(lengths)))
        start = place

    flat_positions = np.concatenate(flat)
    return Pack(
        token_ids=np.concatenate(tokens).astype(np.int64),
        position_ids=np.concatenate(positions),
        groups=tuple(groups),
        predict_positions=np.concatenate(predict),
        targets=sequences.token_ids[flat_positions].astype(np.int64),
        flat_positions=flat_positions,
        rows=np.asarray(rows, dtype=np.int64),
        response_index=np.concatenate(index),
        response_positions=np.concatenate(within),
        is_padding=is_padding,
    )


def mini_batch_rows(
    sequences: TokenSequences, *, num_mini_batches: int, epochs: int, seed: int, batch_id: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each mini-batch of each epoch.

    A mini-batch consists of whole groups, equally many in each. Their order depends on seed, batch
    and epoch alone.

    Raises:
        ValueError: the groups cannot be split evenly.
    """
    groups = np.unique(sequences.group_ids)
    if len(groups) % num_mini_batches:
        raise ValueError(
            f"policy.num_mini_batches: {num_mini_batches} does not divide the {len(groups)} groups "
            "of a batch. Choose a divisor of trainer.prompts_per_step."
        )
    for epoch in range(epochs):
        order = groups
        if num_mini_batches > 1:
            order = np.random.default_rng([seed, batch_id & 0x7FFFFFFF, epoch]).permutation(groups)
        for chosen in np.split(order, num_mini_batches):
            yield np.flatnonzero(np.isin(sequences.group_ids, chosen))
