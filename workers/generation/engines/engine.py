"""The interface of the engine behind a generation worker.

          prompts                          finished groups
worker -----------------> RolloutEngine -------------------> worker
          weights, version                 log-probs of a probe
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlsys.data.batches import Prompt, SamplingParameters, StopReason


@dataclass(frozen=True, kw_only=True)
class SampledResponse:
    """One response, exactly as sampled."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # at the sampling temperature, of the untruncated distribution
    text: str  # without special tokens, cut after the stop string that ended it
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True)
class SampledGroup:
    """All responses to prompt number `index` of the call."""

    index: int
    responses: tuple[SampledResponse, ...]


class RolloutEngine(Protocol):
    """A model that samples responses with some version of the policy's weights."""

    def generate(
        self, prompts: Sequence[Prompt], positions: Sequence[int], sampling: SamplingParameters
    ) -> Iterator[list[SampledGroup]]:
        """Yield groups as they finish.

        The same seed, prompts, positions and weights give the same responses.

        top_p, top_k and min_tokens restrict the tokens that are drawn, but not the reported
        log-probabilities. Those are of the model's whole distribution at the sampling temperature
        (at 1 where it is 0), as all log-probabilities in rlsys.

        A response ends with an end token, with a stop string, or after max_tokens. End tokens are
        not drawn among the first min_tokens tokens, and a stop string that is complete within them
        does not end the response. Tokens stay as sampled; the text ends with the stop string, even
        in the middle of a token.

        Args:
            positions: each prompt's place in the whole batch, so that its random numbers need not
                depend on the worker.
        """
        ...

    def install_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights; the next token is sampled with the new ones.

        Args:
            weights: by their names in the checkpoint. They may be shared memory: read them, never
                write, and keep none of them, so that each can be freed when the next is read.
        """
        ...

    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Return [L - 1] log-probabilities for each sequence of L tokens; the first has none.

        The temperature is 1.
        """
        ...

    def weight_checksums(self, names: Sequence[str]) -> dict[tuple[str, ...], float]:
        """Return the sum of squares of each parameter of the engine, to find those that differ.

        A key has the names of the weights that the parameter is made of; an engine may fuse
        several. Parameters that are made of none of `names` are left out.

        Args:
            names: of the weights as they were sent.
        """
        ...
