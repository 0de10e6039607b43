"""The engine behind a generation worker.

              prompts                          finished groups
worker ---------------------> RolloutEngine -------------------> worker
              weights, version                 log-probs of a probe
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlsys.data.batches import Prompt, SamplingParameters, StopReason
from rlsys.models.weights import WeightManifest


@dataclass(frozen=True, kw_only=True)
class SampledResponse:
    """One response, exactly as sampled."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # at the sampling temperature, of the untruncated distribution
    text: str  # without special tokens, cut behind the stop string that ended it
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True)
class SampledGroup:
    """All responses to prompt number `index` of the call."""

    index: int
    responses: tuple[SampledResponse, ...]


class RolloutEngine(Protocol):
    """Samples responses with some version of the weights."""

    def generate(
        self, prompts: Sequence[Prompt], positions: Sequence[int], sampling: SamplingParameters
    ) -> Iterator[list[SampledGroup]]:
        """Yield groups as they finish. Equal seeds, prompts, positions and weights give equal responses.

        top_p, top_k and min_tokens say from which tokens is drawn, never which log-probabilities are reported: those are of the model's whole
        distribution at the sampling temperature (at 1 where it is 0), as every other log-probability in rlsys is.

        A response ends with an end token, with a stop string, or after max_tokens. End tokens are forbidden among the first min_tokens tokens, and a
        stop string that is complete within them ends nothing. Tokens stay as sampled; of the token that completes a stop string, the text keeps what
        belongs to the string.

        Args:
            positions: each prompt's place in the whole batch, so that a prompt's randomness need not depend on the worker.
        """
        ...

    def install_weights(
        self, manifest: WeightManifest, shards: Sequence[NDArray[np.uint8]]
    ) -> None:
        """Replace the weights; the next token is sampled with the new ones."""
        ...

    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Sequences of any lengths L -> [L - 1] log-probabilities at temperature 1 of each token but the first."""
        ...

    def weight_checksums(self, names: Sequence[str]) -> dict[tuple[str, ...], float]:
        """Return the sum of squares of each parameter that the engine holds, to find out which differ.

        The key has those of `names`, of the weights as they were sent, that the parameter is made
        of: several where the engine fuses them. Parameters made of none of them are left out.
        """
        ...
