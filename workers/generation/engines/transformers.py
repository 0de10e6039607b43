"""Rollouts with transformers: small, slow, bit-reproducible. The reference that tests compare other engines with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.config import RunConfig
from rlsys.data.batches import Prompt, SamplingParameters, StopReason
from rlsys.models.checkpoint_names import from_checkpoint, to_checkpoint
from rlsys.models.loading import end_token_ids, load_causal_lm, load_tokenizer
from rlsys.models.weights import WeightManifest, unpack_weights
from workers.generation.engines.engine import SampledGroup, SampledResponse
from workers.generation.response_text import ResponseText

logger = logging.getLogger(__name__)

TRIED_STEPS = 4
# Mean differences of log-probabilities that rounding explains, for log-probabilities about 1 nat apart.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class TransformersEngine:
    """`RolloutEngine` on a plain transformers model: one prompt at a time, all its samples in one batch.

    Each response draws from a generator of its own, seeded by (seed, position of the prompt, number of the sample), so that a response does not
    depend on which others are sampled beside it.
    """

    def __init__(self, config: RunConfig, model_directory: str) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, config.generation.dtype)
        model = load_causal_lm(
            model_directory,
            dtype=dtype,
            attention="sdpa",
            trust_remote_code=config.model.trust_remote_code,
        )
        model.eval()
        torch.nn.Module.to(model, self._device)
        self._model = model
        self._tokenizer = load_tokenizer(
            model_directory, trust_remote_code=config.model.trust_remote_code
        )
        self._end_ids = end_token_ids(model_directory, self._tokenizer)
        takes = signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._uses_cache = self._cache_is_right(config.data.max_prompt_tokens)

    @torch.no_grad()
    def _cache_is_right(self, length: int) -> bool:
        """Return whether decoding with a cache gives the log-probabilities of whole forward passes.

        Some architectures keep no cache under the usual name, and a few caches are wrong. They are
        decoded by whole forward passes, which is slow.
        """
        text = self._model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or length + TRIED_STEPS
        length = max(1, min(length, positions - TRIED_STEPS))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, text.vocab_size, (1, length + TRIED_STEPS), generator=generator)
        tokens = tokens.to(self._device)
        whole = self._model(input_ids=tokens, use_cache=False).logits[0, length - 1 :].float()

        cache, stepwise = None, []
        try:
            for end in range(length, length + TRIED_STEPS + 1):
                part = tokens[:, :length] if cache is None else tokens[:, end - 1 : end]
                logits, cache = self._cached_step(part, cache)
                stepwise.append(logits[0])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # each architecture fails in its own way
            logger.warning("decoding without a cache: %s", error)
            return False

        right, found = whole.log_softmax(-1), torch.stack(stepwise).log_softmax(-1)
        rounding = ROUNDING[self._model.dtype] * max(1.0, float(right.std()))
        difference = float((right - found).abs().mean())
        if difference <= rounding:
            return True
        logger.warning("decoding without a cache: with it log-probs differ by %.2g", difference)
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
        count = len(generators)
        tokens: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        texts = [ResponseText(self._tokenizer, prompt.token_ids) for _ in range(count)]
        reasons: list[StopReason | None] = [None] * count
        inputs = torch.tensor([prompt.token_ids] * count, device=self._device)
        whole, cache = inputs, None
        for generated in range(sampling.max_tokens):
            if self._uses_cache:
                logits, cache = self._cached_step(inputs, cache)
            else:
                output = self._model(input_ids=inputs, use_cache=False, **self._last_logits)
                logits = output.logits[:, -1].float()
            logits = logits / (sampling.temperature or 1.0)
            reported = logits.log_softmax(-1)
            drawn_from = self._log_distribution(logits, sampling, generated)
            chosen = _choose(drawn_from, sampling.temperature, generators)
            for i, token in enumerate(chosen.tolist()):
                if reasons[i] is None:
                    tokens[i].append(token)
                    logprobs[i].append(float(reported[i, token]))
                    reasons[i] = self._stop_reason(tokens[i], texts[i], sampling)
            if None not in reasons:
                break
            inputs = chosen[:, None]
            if not self._uses_cache:
                whole = torch.cat([whole, inputs], dim=1)
                inputs = whole
        return tuple(
            SampledResponse(
                token_ids=tuple(tokens[i]),
                logprobs=tuple(logprobs[i]),
                text=texts[i].text,
                stop_reason=StopReason.LENGTH if (reason := reasons[i]) is None else reason,
            )
            for i in range(count)
        )

    def _log_distribution(
        self, logits: Tensor, sampling: SamplingParameters, generated: int
    ) -> Tensor:
        """Log-probabilities from which the next token is drawn, in vLLM's order: min_tokens, top_k, top_p."""
        if generated < min(sampling.min_tokens, sampling.max_tokens) and self._end_ids:
            logits = logits.index_fill(
                1, torch.tensor(sorted(self._end_ids), device=logits.device), -torch.inf
            )
        if sampling.top_k:
            threshold = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if sampling.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
            logits = logits.masked_fill(
                torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf
            )
        return logits.log_softmax(-1)

    def _stop_reason(
        self, tokens: Sequence[int], text: ResponseText, sampling: SamplingParameters
    ) -> StopReason | None:
        """Why the response ends with the last of `tokens`, which joins the text here; None where it goes on."""
        added = text.append(tokens[-1])
        if tokens[-1] in self._end_ids:
            return StopReason.END
        past_minimum = len(tokens) > min(sampling.min_tokens, sampling.max_tokens)
        if past_minimum and text.cut_behind(sampling.stop, added):
            return StopReason.END
        return StopReason.LENGTH if len(tokens) >= sampling.max_tokens else None

    def install_weights(
        self, manifest: WeightManifest, shards: Sequence[NDArray[np.uint8]]
    ) -> None:
        """See `RolloutEngine`."""
        weights = from_checkpoint(self._model, dict(unpack_weights(manifest, shards)))
        parameters = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in weights.items():
                parameters[name].copy_(tensor)

    @torch.no_grad()
    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """See `RolloutEngine`."""
        return [self._logprobs_of(sequence) for sequence in sequences]

    def _logprobs_of(self, sequence: NDArray[np.int32]) -> NDArray[np.float32]:
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
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def _choose(
    log_distribution: Tensor, temperature: float, generators: Sequence[torch.Generator]
) -> Tensor:
    if not temperature:
        return log_distribution.argmax(-1)
    return torch.cat(
        [
            torch.multinomial(row.exp(), 1, generator=generator)
            for row, generator in zip(log_distribution, generators, strict=True)
        ]
    )


ENGINE = TransformersEngine
