"""From ragged sequences to packed forward passes.

A `Segment group` is a prompt followed by some of its responses; responses see the prompt and themselves, never one another:

    tokens      p0 p1 p2 | a0 a1 | b0 b1 b2 | c0         a prompt of 3 and the responses a, b, c without their last tokens
    positions   0  1  2  | 3  4  | 3  4  5  | 3
    predicts             a0 -> a1     b0 -> b1 ...       and p2 -> a0, b0 and c0 at once

The prompt is computed once for all its responses (`shared_prefix_packing`), or once for each. A response's last token predicts nothing and is left out.
**The next-token shift happens here and nowhere else**: `predict_positions[k]` is the packed position whose hidden state predicts the token
`targets[k]`, which lies at `flat_positions[k]` of the sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.data.sequences import TokenSequences


@dataclass(frozen=True)
class SegmentGroup:
    """One prompt with responses, inside a pack: where it begins, and the lengths of its parts in packed tokens."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt_length + sum(self.response_lengths)


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
    is_padding: bool = (
        False  # computed only so that every rank has equally many passes; contributes nothing
    )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class _Unit:
    """Some responses of one group: the smallest thing that is moved between ranks and packs."""

    rows: tuple[int, ...]
    num_tokens: int


def _units(
    sequences: TokenSequences, rows: NDArray[np.int64], budget: int, shared_prefix_packing: bool
) -> list[_Unit]:
    """Whole groups where they fit the budget, parts of them where not, single responses without sharing."""
    lengths = sequences.lengths
    units: list[_Unit] = []
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(int(sequences.group_ids[row]), []).append(int(row))
    for group_rows in members.values():
        prompt = int(sequences.prompt_lengths[group_rows[0]])
        current: list[int] = []
        size = prompt
        for row in group_rows:
            extra = max(int(lengths[row]) - prompt - 1, 0)
            if current and (not shared_prefix_packing or size + extra > budget):
                units.append(_Unit(tuple(current), size))
                current, size = [], prompt
            current.append(row)
            size += extra
        units.append(_Unit(tuple(current), size))
    return units


def _balance(units: Sequence[_Unit], ranks: int) -> list[list[_Unit]]:
    """Longest first, each to the rank with the fewest tokens so far; ties go to the lower rank, so all ranks agree."""
    shares: list[list[_Unit]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for unit in sorted(units, key=lambda unit: (-unit.num_tokens, unit.rows)):
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += unit.num_tokens
    return shares


def _bins(units: Sequence[_Unit], budget: int, *, padded: bool) -> list[list[_Unit]]:
    """First-fit decreasing: `units` come longest first, so the first of a bin is as wide as its padding."""
    bins: list[list[_Unit]] = []
    loads: list[int] = []
    for unit in units:
        costs = [content[0].num_tokens if padded else unit.num_tokens for content in bins]
        fits = (load + cost <= budget for load, cost in zip(loads, costs, strict=True))
        place = next((i for i, fit in enumerate(fits) if fit), None)
        if place is None:
            bins.append([unit])
            loads.append(unit.num_tokens)
        else:
            bins[place].append(unit)
            loads[place] += costs[place]
    return bins


def pack_rows(
    sequences: TokenSequences,
    rows: NDArray[np.int64],
    *,
    budget: int,
    rank: int,
    ranks: int,
    shared_prefix_packing: bool,
    padded: bool = False,
) -> list[Pack]:
    """The packs of one rank for the responses `rows`; every rank gets equally many, the last ones perhaps padding packs.

    A sequence longer than `budget` tokens travels alone. Every rank computes the same plan from the same batch.
    `padded` counts each sequence of a pack as long as its longest one; prompts cannot be shared then.
    """
    assert not (padded and shared_prefix_packing), "a padded row has a prompt of its own"
    shares = _balance(_units(sequences, rows, budget, shared_prefix_packing), ranks)
    bins = [_bins(share, budget, padded=padded) for share in shares]
    passes = max(map(len, bins))
    packs = [_pack(sequences, content, is_padding=False) for content in bins[rank]]
    smallest = min((unit for share in shares for unit in share), key=lambda unit: unit.num_tokens)
    return packs + [_pack(sequences, [smallest], is_padding=True)] * (passes - len(packs))


def _pack(sequences: TokenSequences, units: Sequence[_Unit], *, is_padding: bool) -> Pack:
    tokens: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    groups: list[SegmentGroup] = []
    predict: list[NDArray[np.int64]] = []
    flat: list[NDArray[np.int64]] = []
    index: list[NDArray[np.int64]] = []
    within: list[NDArray[np.int64]] = []
    rows = [row for unit in units for row in unit.rows]
    start = 0
    for unit in units:
        prompt = int(sequences.prompt_lengths[unit.rows[0]])
        first = int(sequences.offsets[unit.rows[0]])
        tokens.append(sequences.token_ids[first : first + prompt])
        positions.append(np.arange(prompt))
        lengths = []
        place = start + prompt
        for row in unit.rows:
            begin, end = (
                int(sequences.offsets[row]) + prompt,
                int(sequences.offsets[row + 1]),
            )
            span = np.arange(end - begin)
            sampled = span[sequences.loss_mask[begin:end]]
            packed = max(end - begin - 1, 0)
            tokens.append(sequences.token_ids[begin : begin + packed])
            positions.append(prompt + span[:packed])
            # Token s of the response is predicted by its predecessor: the prompt's last token for s = 0.
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
    """The rows of each mini-batch of each epoch: whole groups, equally many in each, in an order given by (seed, batch, epoch).

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
