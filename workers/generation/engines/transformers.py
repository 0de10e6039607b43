"""Rollouts with transformers: small, slow, bit-reproducible.

Tests compare the other engines with this one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.data.batches import Prompt, SamplingParameters, StopReason
from rlsys.data.response_text import ResponseText
from rlsys.models.checkpoint_names import CheckpointNames, to_checkpoint, untied_state_dict
from rlsys.models.loading import end_token_ids, load_causal_lm, load_tokenizer
from workers.generation.engines.engine import SampledGroup, SampledResponse

logger = logging.getLogger(__name__)

# Tokens that the check of the cache decodes one by one.
TRIED_STEPS = 4
# Mean log-prob differences that are due to rounding, where the standard deviation of the
# log-probabilities is 1 nat.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class _Generation(Protocol):
    @property
    def dtype(self) -> str: ...


class _Data(Protocol):
    @property
    def max_prompt_tokens(self) -> int: ...


class _Model(Protocol):
    @property
    def trust_remote_code(self) -> bool: ...


class EngineSettings(Protocol):
    """What this engine reads of a `RunConfig`; so it needs neither pydantic nor Ray."""

    @property
    def generation(self) -> _Generation: ...
    @property
    def data(self) -> _Data: ...
    @property
    def model(self) -> _Model: ...


@dataclass
class _Sample:
    """A response while it is sampled."""

    text: ResponseText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None

    def finished(self) -> SampledResponse:
        """Return the response; without a stop reason it has reached the token limit."""
        reason = StopReason.LENGTH if self.stop_reason is None else self.stop_reason
        return SampledResponse(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            text=self.text.text,
            stop_reason=reason,
        )


class TransformersEngine:
    """`RolloutEngine` on a plain transformers model: a prompt at a time, its samples in one batch.

    Each response draws from a generator of its own, seeded by (seed, position of the prompt, number
    of the sample). So a response does not depend on the other responses of the batch.
    """

    def __init__(self, config: EngineSettings, model_directory: str) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, config.generation.dtype)
        model = load_causal_lm(
            model_directory,
            dtype=dtype,
            attention="sdpa",
            trust_remote_code=config.model.trust_remote_code,
        )
        # Dropout would make the engine sample from another distribution than the policy's.
        model.eval()
        torch.nn.Module.to(model, self._device)
        self._model = model
        self._names: CheckpointNames | None = None  # planned at the first sync
        self._tokenizer = load_tokenizer(
            model_directory, trust_remote_code=config.model.trust_remote_code
        )
        self._end_ids = end_token_ids(model_directory, self._tokenizer)

        # Most models can leave out all logits but those of the last token.
        keywords = signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in keywords else {}
        self._uses_cache = self._cache_is_right(config.data.max_prompt_tokens)

    @torch.no_grad()
    def _cache_is_right(self, length: int) -> bool:
        """Return True if decoding with a cache gives the log-probabilities of full forward passes.

        Some architectures keep no cache under the usual name, and a few caches are wrong. Those
        models are decoded by full forward passes, which is slow.
        """
        text = self._model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or length + TRIED_STEPS
        length = max(1, min(length, positions - TRIED_STEPS))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, text.vocab_size, (1, length + TRIED_STEPS), generator=generator)
        tokens = tokens.to(self._device)
        full = self._model(input_ids=tokens, use_cache=False).logits[0, length - 1 :].float()

        cache = None
        stepwise = []
        try:
            for end in range(length, length + TRIED_STEPS + 1):
                # Where a model returns no cache the prompt is repeated, and the check fails.
                part = tokens[:, :length] if cache is None else tokens[:, end - 1 : end]
                logits, cache = self._cached_step(part, cache)
                stepwise.append(logits[0])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # each architecture fails in its own way
            logger.warning("decoding without a cache: %s", error)
            return False

        expected = full.log_softmax(-1)
        found = torch.stack(stepwise).log_softmax(-1)
        rounding = ROUNDING[self._model.dtype] * max(1.0, float(expected.std()))
        difference = float((expected - found).abs().mean())
        if difference <= rounding:
            return True

        logger.warning(
            "decoding without a cache, since it changes log-probs by %.2g on average", difference
        )
        return False

    def _cached_step(self, inputs: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return [b, V] float32 logits of the next token, and the cache with `inputs` in it."""
        output = self._model(
            input_ids=inputs, past_key_values=cache, use_cache=True, **self._last_logits
        )
        return output.logits[:, -1].float(), output.past_key_values

    def generate(
        self, prompts: Sequence[Prompt], positions: Sequence[int], sampling: SamplingParameters
    ) -> Iterator[list[SampledGroup]]:
        """See `RolloutEngine`."""
        for index, (prompt, position) in enumerate(zip(prompts, positions, strict=True)):
            generators = [
                torch.Generator(self._device).manual_seed(_seed(sampling.seed, position, sample))
                for sample in range(sampling.samples_per_prompt)
            ]
            yield [SampledGroup(index=index, responses=self._sample(prompt, sampling, generators))]

    @torch.no_grad()
    def _sample(
        self, prompt: Prompt, sampling: SamplingParameters, generators: Sequence[torch.Generator]
    ) -> tuple[SampledResponse, ...]:
        """Return the responses to one prompt, one per generator."""
        samples = [_Sample(ResponseText(self._tokenizer, prompt.token_ids)) for _ in generators]
        sequences = torch.tensor([prompt.token_ids] * len(samples), device=self._device)
        inputs = sequences
        cache = None
        for generated in range(sampling.max_tokens):
            if self._uses_cache:
                logits, cache = self._cached_step(inputs, cache)
            else:
                output = self._model(input_ids=inputs, use_cache=False, **self._last_logits)
                logits = output.logits[:, -1].float()

            # Reported log-probabilities are those of the untruncated distribution.
            logits = logits / (sampling.temperature or 1.0)
            reported = logits.log_softmax(-1)
            drawn_from = self._log_distribution(logits, sampling, generated)
            chosen = _choose(drawn_from, sampling.temperature, generators)

            # Finished responses stay in the batch, so that the computation of the other responses
            # does not change.
            for sample, logprobs, token in zip(samples, reported, chosen.tolist(), strict=True):
                if sample.stop_reason is None:
                    sample.token_ids.append(token)
                    sample.logprobs.append(float(logprobs[token]))
                    sample.stop_reason = self._stop_reason(sample, sampling)
            if all(sample.stop_reason is not None for sample in samples):
                break

            inputs = chosen[:, None]
            if not self._uses_cache:
                sequences = torch.cat([sequences, inputs], dim=1)
                inputs = sequences
        return tuple(sample.finished() for sample in samples)

    def _log_distribution(
        self, logits: Tensor, sampling: SamplingParameters, generated: int
    ) -> Tensor:
        """Return the log-probabilities from which the next token is drawn.

        The order of the truncations is vLLM's: min_tokens, top_k, top_p.
        """
        if generated < min(sampling.min_tokens, sampling.max_tokens) and self._end_ids:
            end_ids = torch.tensor(sorted(self._end_ids), device=logits.device)
            logits = logits.index_fill(1, end_ids, -torch.inf)

        if sampling.top_k:
            threshold = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)

        if sampling.top_p < 1:
            # A token is dropped if those before it reach top_p, so the first one always stays.
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
            dropped = torch.zeros_like(dropped).scatter(1, order, dropped)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits.log_softmax(-1)

    def _stop_reason(self, sample: _Sample, sampling: SamplingParameters) -> StopReason | None:
        """Add the last token to the text; return the reason if the response ends with it."""
        token = sample.token_ids[-1]
        count = len(sample.token_ids)
        added = sample.text.append(token)
        if token in self._end_ids:
            return StopReason.END

        past_minimum = count > min(sampling.min_tokens, sampling.max_tokens)
        if past_minimum and sample.text.cut_behind(sampling.stop, added):
            return StopReason.END
        return StopReason.LENGTH if count >= sampling.max_tokens else None

    def install_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine`."""
        if self._names is None:
            self._names = CheckpointNames(self._model, untied_state_dict(self._model))
        self._names.load(weights)

    @torch.no_grad()
    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """See `RolloutEngine`."""
        return [self._logprobs_of(sequence) for sequence in sequences]

    def _logprobs_of(self, sequence: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return [L - 1] log-probabilities of a sequence of L tokens."""
        tokens = torch.from_numpy(sequence.astype(np.int64)).to(self._device)
        logprobs = self._model(input_ids=tokens[None]).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, tokens[1:, None])[:, 0].cpu().numpy()

    def weight_checksums(self, names: Sequence[str]) -> dict[tuple[str, ...], float]:
        """See `RolloutEngine`."""
        held = to_checkpoint(self._model, dict(self._model.named_parameters()))
        return {
            (name,): float(tensor.detach().float().square().sum())
            for name, tensor in held.items()
            if name in names
        }


def _seed(*entropy: int) -> int:
    """Return a seed of 63 bits, which torch accepts, that mixes all of `entropy`."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def _choose(
    log_distribution: Tensor, temperature: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return [b] the next tokens: drawn, or the likeliest where the temperature is 0."""
    if not temperature:
        return log_distribution.argmax(-1)

    drawn = [
        torch.multinomial(row.exp(), 1, generator=generator)
        for row, generator in zip(log_distribution, generators, strict=True)
    ]
    return torch.cat(drawn)


ENGINE = TransformersEngine
