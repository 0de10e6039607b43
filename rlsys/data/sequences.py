"""Ragged token sequences: the part of a batch that packing needs, and nothing else.

A sequence is a prompt followed by a response. The tokens of all sequences lie one after the other,
and `offsets` holds the beginning of each:

    token_ids   p0 p1 a0 a1 a2 | p0 p1 b0
    offsets     0                5        8
    loss_mask   0  0  1  1  1  | 0  0  1

Arrays are NumPy, so Ray shares them zero-copy and read-only. Nothing is padded here, and no mask is
inferred from a pad id.

B sequences, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class TokenSequences:
    """B prompts with their responses; equal `group_ids` share a prompt, token by token."""

    token_ids: NDArray[np.int32]  # [N] exactly as sampled, or tokenized once
    offsets: NDArray[np.int64]  # [B + 1]
    prompt_lengths: NDArray[np.int32]  # [B] at least 1
    loss_mask: NDArray[np.bool_]  # [N] True for the response tokens that enter the loss
    group_ids: NDArray[np.int64]  # [B]

    def __post_init__(self) -> None:
        tokens, sequences = len(self.token_ids), len(self.offsets) - 1
        assert self.token_ids.shape == self.loss_mask.shape == (tokens,)
        assert self.prompt_lengths.shape == self.group_ids.shape == (sequences,)
        assert self.loss_mask.dtype == np.bool_

        assert self.offsets[0] == 0, "the first sequence begins at token 0"
        assert self.offsets[-1] == tokens, "the last sequence ends with the last token"
        assert (self.prompt_lengths >= 1).all(), "a first token has no predecessor to predict it"
        assert (self.prompt_lengths <= self.lengths).all(), "a prompt is longer than its sequence"

        before = _counts_before(self.loss_mask)
        starts = self.offsets[:-1]
        in_prompts = before[starts + self.prompt_lengths] - before[starts]
        assert not in_prompts.any(), "the loss mask is False on prompts"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[B] tokens of prompt and response."""
        return np.diff(self.offsets)

    @property
    def loss_lengths(self) -> NDArray[np.int64]:
        """[B] tokens that enter the loss."""
        return np.diff(_counts_before(self.loss_mask)[self.offsets])

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that enter the loss, of all sequences."""
        return int(self.loss_mask.sum())

    @staticmethod
    def of(
        prompts: Sequence[ArrayLike],
        responses: Sequence[ArrayLike],
        *,
        group_ids: ArrayLike,
    ) -> TokenSequences:
        """Return one sequence for each prompt and response; all response tokens enter the loss."""
        prompt_lengths = np.asarray([np.size(prompt) for prompt in prompts], dtype=np.int32)
        lengths = np.asarray([np.size(response) for response in responses]) + prompt_lengths
        parts = [
            np.asarray(part, dtype=np.int32)
            for pair in zip(prompts, responses, strict=True)
            for part in pair
        ]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

        # A token enters the loss iff it lies beyond the prompt of its own sequence.
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return TokenSequences(
            token_ids=np.concatenate(parts),
            offsets=offsets,
            prompt_lengths=prompt_lengths,
            loss_mask=place >= np.repeat(prompt_lengths, lengths),
            group_ids=np.asarray(group_ids, dtype=np.int64),
        )

    @staticmethod
    def of_texts(texts: Sequence[NDArray[np.int32]]) -> TokenSequences:
        """Return each text as a sequence of its own group; all tokens but the first count."""
        return TokenSequences.of(
            [text[:1] for text in texts],
            [text[1:] for text in texts],
            group_ids=np.arange(len(texts)),
        )

    @staticmethod
    def concatenate(parts: Sequence[TokenSequences]) -> TokenSequences:
        """Join the parts, in the order given."""
        assert parts, "nothing to concatenate"
        starts = np.cumsum([0] + [len(part.token_ids) for part in parts[:-1]])
        ends = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
        return TokenSequences(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            offsets=np.concatenate([[0], *ends]).astype(np.int64),
            prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
            loss_mask=np.concatenate([part.loss_mask for part in parts]),
            group_ids=np.concatenate([part.group_ids for part in parts]),
        )

    def take(self, rows: NDArray[np.int64]) -> TokenSequences:
        """Return the sequences at `rows`, in that order; there may be none."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # The place of each token in its own sequence, moved to where that sequence begins.
        places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[rows], lengths)
        return TokenSequences(
            token_ids=self.token_ids[places],
            offsets=offsets,
            prompt_lengths=self.prompt_lengths[rows],
            loss_mask=self.loss_mask[places],
            group_ids=self.group_ids[rows],
        )

    def marked_after(self, marks: NDArray[np.bool_]) -> TokenSequences:
        """Return sequences on which a value model reads the value after each token in `marks` [N].

        A value is read where a token is predicted: before it. So each sequence gets one more
        token, and the loss mask is `marks`, moved by one token. No model sees the new token, since
        the last one of a response is left out of every forward pass.

        Example: the reward of a response is the value after its last token, so mark that one. For
        a reward of each step, mark the last token of each step.

        Raises:
            ValueError: a mark inside a prompt, before its last token.
        """
        repeated_prompts = np.repeat(self.prompt_lengths, self.lengths)
        place = np.arange(len(self.token_ids)) - np.repeat(self.offsets[:-1], self.lengths)
        if (marks & (place < repeated_prompts - 1)).any():
            raise ValueError(
                "marks: the value after a token inside a prompt is not computed. Mark the prompt's "
                "last token or tokens of the response."
            )

        starts, ends = self.offsets[:-1], self.offsets[1:]
        return replace(
            self,
            token_ids=np.insert(self.token_ids, ends, self.token_ids[ends - 1]),
            offsets=self.offsets + np.arange(len(self.offsets)),
            loss_mask=np.insert(marks, starts, False),
        )


def _counts_before(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return [N + 1] the number of True values before each place of the [N] in `mask`."""
    return np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
