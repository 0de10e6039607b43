"""Rollouts with vLLM, in the process of the worker. The only module of the generation group that imports vLLM."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import Prompt, SamplingParameters, StopReason
from rlsys.models.loading import end_token_ids, load_tokenizer
from rlsys.models.weights import WeightManifest, unpack_weights
from workers.generation.engines.engine import SampledGroup, SampledResponse

GREEDY_TEMPERATURE = 1e-5  # below it vLLM takes the likeliest token
# Projections that vLLM keeps in one parameter, and its name.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
CPU_BLOCK_TOKENS = 32  # vLLM's own 128 would cache no prefix of a shorter prompt


def _prepare_environment(config: RunConfig) -> None:
    """vLLM reads these when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # the engine runs here, where weights can be handed over by reference
    )
    os.environ.setdefault(
        "VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.generation.kv_cache_gib)))
    )
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", "nobind"
    )  # trainer and engine take turns on the same cores
    os.environ.setdefault(
        "VLLM_USE_V2_MODEL_RUNNER", "0"
    )  # log-probabilities at the sampling temperature come from the sampler of the first runner
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault(
        "VLLM_ALLOW_INSECURE_SERIALIZATION", "1"
    )  # functions for apply_model; nothing comes from outside


class VLLMEngine:
    """`RolloutEngine` on vLLM: continuous batching, prefix caching, CPU or CUDA.

    Log-probabilities are those of the model's whole distribution at the sampling temperature, which vLLM itself does not offer: `raw_logprobs` leave
    the temperature out, `processed_logprobs` are of the distribution that top_p, top_k and min_tokens cut. See `_report_untruncated_logprobs`.
    """

    def __init__(self, config: RunConfig, model_directory: str) -> None:
        _prepare_environment(config)
        from vllm import EngineArgs, LLMEngine

        generation = config.generation
        assert generation.dtype != "auto"  # which to vLLM means the checkpoint's own
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = (
            {"gpu_memory_utilization": generation.gpu_memory_utilization}
            if on_gpu
            else {"block_size": CPU_BLOCK_TOKENS}
        )
        self._config = config
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model_directory,
                dtype=generation.dtype,
                max_model_len=generation.max_model_tokens
                or config.data.max_prompt_tokens + generation.max_tokens,
                enforce_eager=not generation.compile,
                tensor_parallel_size=generation.tensor_parallel,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                async_scheduling=False,  # so that equal seeds give equal schedules
                seed=config.trainer.seed,
                trust_remote_code=config.model.trust_remote_code,
                hf_overrides=_as_transformers_reads,
                disable_log_stats=True,
                **settings,
            )
        )
        self._engine.collective_rpc(_report_untruncated_logprobs)
        tokenizer = load_tokenizer(
            model_directory, trust_remote_code=config.model.trust_remote_code
        )
        self._end_ids = sorted(end_token_ids(model_directory, tokenizer))
        self._requests = 0

    def generate(
        self, prompts: Sequence[Prompt], positions: Sequence[int], sampling: SamplingParameters
    ) -> Iterator[list[SampledGroup]]:
        """See `RolloutEngine`. The seed is that of torch's global generator: seeds of single requests do not work with chunked prefill on a CPU."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=sampling.samples_per_prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_tokens=min(sampling.min_tokens, sampling.max_tokens),
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop) or None,
            stop_token_ids=self._end_ids,
            ignore_eos=True,  # those above are all: vLLM would add defaults of the config class
            include_stop_str_in_output=True,
            skip_special_tokens=True,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # A warm cache would change how prompts are batched and with it the order in which responses draw their random numbers.
        self._engine.reset_prefix_cache()
        torch.manual_seed(
            np.random.SeedSequence([sampling.seed, *positions[:1]]).generate_state(1)[0].item()
        )
        pending: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            name = f"r{self._requests}"
            self._requests += 1
            self._engine.add_request(name, {"prompt_token_ids": list(prompt.token_ids)}, parameters)
            pending[name] = index
        try:
            while pending:
                finished = [output for output in self._engine.step() if output.finished]
                groups = [
                    self._group(pending.pop(output.request_id), output) for output in finished
                ]
                if groups:
                    yield groups
        finally:
            if pending:
                self._engine.abort_request(list(pending))

    def _group(self, index: int, output: Any) -> SampledGroup:
        return SampledGroup(
            index=index,
            responses=tuple(
                SampledResponse(
                    token_ids=tuple(sample.token_ids),
                    logprobs=tuple(
                        choices[token].logprob
                        for choices, token in zip(sample.logprobs, sample.token_ids, strict=True)
                    ),
                    text=sample.text,
                    stop_reason=StopReason.LENGTH
                    if sample.finish_reason == "length"
                    else StopReason.END,
                )
                for sample in sorted(output.outputs, key=lambda sample: sample.index)
            ),
        )

    def install_weights(
        self, manifest: WeightManifest, shards: Sequence[NDArray[np.uint8]]
    ) -> None:
        """See `RolloutEngine`."""
        # vLLM's loaders may write into what they are given; the shards are shared memory, so each tensor is copied as it is used.
        tensors = ((name, tensor.clone()) for name, tensor in unpack_weights(manifest, shards))
        self._engine.collective_rpc(partial(_reload_weights, tensors=tensors))
        if not torch.cuda.is_available():
            self._engine.apply_model(_refresh_tied_head)
        self._engine.reset_prefix_cache()

    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """See `RolloutEngine`."""
        from vllm import SamplingParams

        self._engine.reset_prefix_cache()  # log-probabilities of a cached prefix are not computed
        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        names = [f"probe{self._requests + i}" for i in range(len(sequences))]
        self._requests += len(names)
        for name, sequence in zip(names, sequences, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": sequence.tolist()}, parameters)
        rows: dict[str, list[float]] = {}
        while len(rows) < len(names):
            finished: list[Any] = [output for output in self._engine.step() if output.finished]
            for output in finished:
                pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
                rows[output.request_id] = [choices[token].logprob for choices, token in pairs]
        return [np.asarray(rows[name], dtype=np.float32) for name in names]

    def weight_checksums(self, names: Sequence[str]) -> dict[tuple[str, ...], float]:
        """See `RolloutEngine`."""
        held = self._engine.apply_model(_sums_of_squares)[0]
        return {parts: held[name] for name, parts in parts_of(names, held).items() if name in held}


def parts_of(names: Sequence[str], held: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the names of a checkpoint by the name under which vLLM holds them, several where fused."""
    parts: dict[str, tuple[str, ...]] = {}
    for name in names:
        own = name
        if own not in held:
            own = ".".join(FUSED.get(part, part) for part in name.split("."))
        parts[own] = (*parts.get(own, ()), name)
    return parts


def _as_transformers_reads(config: Any) -> Any:
    """The model's config, changed where vLLM reads it differently from transformers, by which the model is trained."""
    if config.model_type == "cohere2":  # vLLM adds one to the window
        config.sliding_window -= 1
    return config


def _report_untruncated_logprobs(worker: Any) -> None:
    """Let a worker's sampler report log softmax(logits / temperature), before min_tokens, top_k and top_p cut anything off.

    Raises:
        RuntimeError: the worker samples with something else than the sampler that this changes.
    """
    from vllm.v1.sample.sampler import Sampler

    class UntruncatedSampler(Sampler):
        """Reports at the temperature of each request; a greedy one, and the tokens of prompts, at 1."""

        temperatures: torch.Tensor | None = None

        def forward(self, logits: Any, sampling_metadata: Any, *rest: Any, **options: Any) -> Any:
            self.temperatures = sampling_metadata.temperature
            try:
                return super().forward(logits, sampling_metadata, *rest, **options)
            finally:
                self.temperatures = None

        def compute_logprobs(self, logits: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            logits = logits.float()
            if self.temperatures is not None:
                greedy = self.temperatures < GREEDY_TEMPERATURE
                logits = logits / torch.where(greedy, 1.0, self.temperatures)[:, None]
            return logits.log_softmax(-1)

    sampler = getattr(worker.model_runner, "sampler", None)
    if type(sampler) is not Sampler:
        raise RuntimeError(
            f"generation.engine: this vLLM samples with {type(sampler).__name__}, for which rlsys cannot read log-probabilities at the sampling "
            "temperature. Unset VLLM_USE_V2_MODEL_RUNNER, or use the pinned version of vLLM."
        )
    sampler.__class__ = UntruncatedSampler


def _reload_weights(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Let a worker take new weights, all of them.

    Raises:
        RuntimeError: some of the worker's weights are not among `tensors`, where vLLM would keep the old ones and log a warning.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.model_runner.get_model()
    # Parameters that vLLM derives from others after loading (of DeepSeek's latent attention) are in no checkpoint.
    expected = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in get_layerwise_info(module).restore_metadata[0]
    } & {name for name, _ in model.named_parameters()}
    loaded: set[str] = expected
    load_weights = model.load_weights

    def record(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded
        found = load_weights(*args, **kwargs)
        loaded = expected if found is None else set(found)
        return found

    model.load_weights = record
    if not torch.cuda.is_available():
        _forget_expert_kernels(model)
    try:
        worker.reload_weights(weights_iterator=tensors)
    finally:
        del model.load_weights
    if missing := sorted(expected - loaded):
        raise RuntimeError(
            f"generation.engine: the trainer sends no weights for {', '.join(missing[:3])} ({len(missing)} of {len(expected)} parameters of vLLM's "
            f"{type(model).__name__}), so the engine would keep the old ones. Use --generation.engine transformers."
        )


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Have a CPU engine's experts packed again by the next reload: where there is a kernel already, vLLM would leave the new ones as they come, and the
    kernel reads them as packed."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _refresh_tied_head(model: torch.nn.Module) -> None:
    """Pack the LM head again: on a CPU its matrix product reads a packed copy that a reload of tied embeddings leaves stale."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _sums_of_squares(model: torch.nn.Module) -> dict[str, float]:
    """Parameters that a CPU engine has packed away into its own layout are empty and say nothing."""
    parameters = model.named_parameters()
    return {
        name: float(parameter.detach().float().square().sum())
        for name, parameter in parameters
        if parameter.numel()
    }


ENGINE = VLLMEngine
