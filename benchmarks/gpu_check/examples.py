"""Random sequences in groups, and their packs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlsys.data.packing import Pack, pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.models.flops import visible_pairs


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a batch of random tokens."""

    groups: int
    samples: int  # responses of a group
    prompt: int  # tokens
    response: int  # tokens of the longest
    vocabulary: int
    ragged: bool = True  # else all prompts and responses are equally long


def random_sequences(sizes: Sizes, seed: int = 0) -> TokenSequences:
    """Return random prompts with random responses."""
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> list[int]:
        length = int(rng.integers(max(1, longest // 3), longest + 1)) if sizes.ragged else longest
        return rng.integers(0, sizes.vocabulary, length).tolist()

    prompts, responses, group_ids = [], [], []
    for group in range(sizes.groups):
        prompt = tokens(sizes.prompt)
        for _ in range(sizes.samples):
            prompts.append(prompt)
            responses.append(tokens(sizes.response))
            group_ids.append(group)
    return TokenSequences.of(prompts, responses, group_ids=group_ids)


def packs_of(sequences: TokenSequences, *, budget: int, shares: bool) -> list[Pack]:
    """Return the packs of one rank.

    Args:
        budget: tokens of a pack.
        shares: compute the prompt of a group once.
    """
    return pack_rows(
        sequences,
        np.arange(len(sequences)),
        budget=budget,
        rank=0,
        ranks=1,
        shared_prefix_packing=shares,
    )


@dataclass(frozen=True)
class Work:
    """What the operations of some packs depend on."""

    tokens: int
    predicted: int
    pairs: int

    @staticmethod
    def of(packs: list[Pack]) -> Work:
        """Count the tokens and the visible query-key pairs of packs."""
        groups = [group for pack in packs for group in pack.groups]
        return Work(
            tokens=sum(pack.num_tokens for pack in packs),
            predicted=sum(len(pack.targets) for pack in packs),
            pairs=sum(visible_pairs(one.prompt_length, one.response_lengths) for one in groups),
        )
