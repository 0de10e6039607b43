"""Rollouts with vLLM, in the process of the worker.

This is the only module of the generation group that imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import Prompt, SamplingParameters, StopReason
from rlsys.models.loading import end_token_ids, load_tokenizer
from workers.generation.engines.engine import SampledGroup, SampledResponse

# Below this temperature vLLM takes the likeliest token.
GREEDY_TEMPERATURE = 1e-5
# Projections that vLLM fuses into one parameter, with the name of that parameter.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
# Of the weights that travel together to an engine of several processes.
PART_BYTES = 2**26
# vLLM caches whole blocks only: with its default of 128 no shorter prompt would be cached.
CPU_BLOCK_TOKENS = 32


def _prepare_environment(config: RunConfig) -> None:
    """Set the environment variables that vLLM reads when it is imported."""
    # The engine runs in this process, so that weights can be passed by reference and functions need
    # no VLLM_ALLOW_INSECURE_SERIALIZATION.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    cache_gib = max(1, round(config.generation.kv_cache_gib))
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        # Trainer and engine take turns on the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # `_report_untruncated_logprobs` changes the sampler of the first model runner.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def engine_settings(config: RunConfig, model_directory: str) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's `EngineArgs`."""
    generation = config.generation
    assert generation.dtype != "auto"  # to vLLM it means the checkpoint's own dtype
    needed_tokens = config.data.max_prompt_tokens + generation.max_tokens
    settings: dict[str, Any] = {
        "model": model_directory,
        "dtype": generation.dtype,
        "max_model_len": generation.max_model_tokens or needed_tokens,
        "enforce_eager": not generation.compile,
        "tensor_parallel_size": generation.tensor_parallel,
        # Inside of a placement group vLLM would start its processes as Ray actors, which need
        # bundles of one GPU each.
        "distributed_executor_backend": "mp" if generation.tensor_parallel > 1 else None,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        # Equal seeds must give equal schedules.
        "async_scheduling": False,
        "seed": config.trainer.seed,
        "trust_remote_code": config.model.trust_remote_code,
        "hf_overrides": _as_transformers_reads,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = generation.gpu_memory_utilization
    else:
        settings["block_size"] = CPU_BLOCK_TOKENS
    return settings | generation.engine_arguments


class VLLMEngine:
    """`RolloutEngine` on vLLM: continuous batching, prefix caching, CPU or CUDA.

    Log-probabilities are those of the model's whole distribution at the sampling temperature. vLLM
    itself does not offer them: `raw_logprobs` leave the temperature out, and `processed_logprobs`
    are of the distribution that top_p, top_k and min_tokens truncate. See
    `_report_untruncated_logprobs`.
    """

    def __init__(self, config: RunConfig, model_directory: str) -> None:
        _prepare_environment(config)
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**engine_settings(config, model_directory))
        )
        self._engine.collective_rpc(_report_untruncated_logprobs)
        self._in_this_process = config.generation.tensor_parallel == 1

        tokenizer = load_tokenizer(
            model_directory, trust_remote_code=config.model.trust_remote_code
        )
        self._end_ids = sorted(end_token_ids(model_directory, tokenizer))
        self._requests = 0

    def generate(
        self, prompts: Sequence[Prompt], positions: Sequence[int], sampling: SamplingParameters
    ) -> Iterator[list[SampledGroup]]:
        """See `RolloutEngine`."""
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
            # The end tokens above are complete; vLLM would add defaults of the config class.
            ignore_eos=True,
            include_stop_str_in_output=True,
            skip_special_tokens=True,
            logprobs=0,  # that of the sampled token only
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

        # A warm cache would change how prompts are batched, and with it the order in which
        # responses draw their random numbers.
        self._engine.reset_prefix_cache()
        # They come from torch's global generator: seeds of single requests do not work with
        # chunked prefill on a CPU.
        seed = np.random.SeedSequence([sampling.seed, *positions[:1]]).generate_state(1)[0].item()
        self._engine.collective_rpc(partial(_seed_sampling, seed=seed))

        pending: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            name = f"r{self._requests}"
            self._requests += 1
            self._engine.add_request(name, {"prompt_token_ids": list(prompt.token_ids)}, parameters)
            pending[name] = index

        try:
            while pending:
                finished = [output for output in self._engine.step() if output.finished]
                groups = [_group(pending.pop(output.request_id), output) for output in finished]
                if groups:
                    yield groups
        finally:
            # The caller may stop iterating before all prompts have finished.
            if pending:
                self._engine.abort_request(list(pending))

    def install_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `RolloutEngine`."""
        if self._in_this_process:
            # vLLM's loaders may write into their input, which is shared memory, and keep it until a
            # layer is complete. So each tensor is copied when its turn comes.
            tensors = ((name, tensor.clone()) for name, tensor in weights)
            self._engine.collective_rpc(partial(_reload_weights, tensors=tensors))
        else:
            self._send_weights(weights)

        if not torch.cuda.is_available():
            self._engine.apply_model(_refresh_tied_head)
        # The cache holds keys and values of the former weights.
        self._engine.reset_prefix_cache()

    def _send_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Install weights in vLLM's own processes: a call is pickled, so no generator can travel.

        In parts, so that neither side holds all weights of the model as a copy.
        """
        self._engine.collective_rpc(_begin_reload)
        for part in _parts(weights, PART_BYTES):
            self._engine.collective_rpc(partial(_load_part, tensors=part))
            del part  # before the next is collected
        self._engine.collective_rpc(_end_reload)

    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """See `RolloutEngine`."""
        from vllm import SamplingParams

        # vLLM does not compute the log-probabilities of a cached prefix.
        self._engine.reset_prefix_cache()
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
        held = sums_of_all_processes(self._engine.apply_model(_sums_of_squares))
        return {parts: held[name] for name, parts in parts_of(names, held).items() if name in held}


def _group(index: int, output: Any) -> SampledGroup:
    """Convert a finished request of vLLM."""
    responses = []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        pairs = zip(sample.logprobs, sample.token_ids, strict=True)
        truncated = sample.finish_reason == "length"
        response = SampledResponse(
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(choices[token].logprob for choices, token in pairs),
            text=sample.text,
            stop_reason=StopReason.LENGTH if truncated else StopReason.END,
        )
        responses.append(response)
    return SampledGroup(index=index, responses=tuple(responses))


def parts_of(names: Sequence[str], held: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return which weights of a checkpoint each parameter of vLLM is made of.

    Args:
        names: of the weights of the checkpoint.
        held: the names of vLLM's parameters.
    """
    parts: dict[str, tuple[str, ...]] = {}
    for name in names:
        parameter = name
        if parameter not in held:
            parameter = ".".join(FUSED.get(part, part) for part in name.split("."))
        parts[parameter] = (*parts.get(parameter, ()), name)
    return parts


def sums_of_all_processes(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of squares of each whole parameter from those in each process.

    A parameter that every process has whole has the same sum everywhere; that of others is split.
    """
    first = found[0]
    return {
        name: sum(sums[name] for sums in found)
        if any(sums[name] != first[name] for sums in found)
        else first[name]
        for name in first
    }


def _as_transformers_reads(config: Any) -> Any:
    """Change the model's config where vLLM and transformers interpret it differently.

    The policy is trained with transformers, so its interpretation counts.
    """
    # vLLM adds one to the window.
    if config.model_type == "cohere2":
        config.sliding_window -= 1
    return config


def _report_untruncated_logprobs(worker: Any) -> None:
    """Make a worker's sampler report log softmax(logits / temperature).

    That is the distribution before min_tokens, top_k and top_p truncate it.

    Raises:
        RuntimeError: the worker has another class of sampler than the one that is changed here.
    """
    from vllm.v1.sample.sampler import Sampler

    class UntruncatedSampler(Sampler):
        """A sampler that reports log-probabilities at the temperature of each request.

        For greedy requests and for the tokens of prompts the temperature is 1.
        """

        temperatures: torch.Tensor | None = None

        def forward(self, logits: Any, sampling_metadata: Any, *rest: Any, **options: Any) -> Any:
            # `compute_logprobs` gets the logits only, and is also called outside of `forward`.
            self.temperatures = sampling_metadata.temperature
            try:
                return super().forward(logits, sampling_metadata, *rest, **options)
            finally:
                self.temperatures = None

        def compute_logprobs(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, logits: torch.Tensor
        ) -> torch.Tensor:
            logits = logits.float()
            if self.temperatures is not None:
                greedy = self.temperatures < GREEDY_TEMPERATURE
                logits = logits / torch.where(greedy, 1.0, self.temperatures)[:, None]
            return logits.log_softmax(-1)

    sampler = getattr(worker.model_runner, "sampler", None)
    if type(sampler) is not Sampler:
        raise RuntimeError(
            f"generation.engine: this vLLM samples with {type(sampler).__name__}, from which rlsys "
            "cannot read log-probabilities at the sampling temperature. Unset "
            "VLLM_USE_V2_MODEL_RUNNER, or use the pinned version of vLLM."
        )
    sampler.__class__ = UntruncatedSampler


def _seed_sampling(worker: Any, seed: int) -> None:
    """Seed the process that samples, alike in all that share a model."""
    torch.manual_seed(seed)


def _reload_weights(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace all weights of a worker.

    Raises:
        RuntimeError: some of the worker's weights are not among `tensors`. vLLM would keep the old
            ones and log a warning.
    """
    model = worker.model_runner.get_model()
    expected = _loadable_parameters(model)

    # `reload_weights` does not return what it has loaded; the model's `load_weights` does.
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

    _check_loaded(model, expected, loaded)


def _begin_reload(worker: Any) -> None:
    """Let a worker take weights in parts; `vllm.model_executor.model_loader.reload.inplace`."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    model = worker.model_runner.get_model()
    worker.rlsys_expected = _loadable_parameters(model)
    worker.rlsys_loaded = set()
    if not torch.cuda.is_available():
        _forget_expert_kernels(model)
    with set_current_vllm_config(worker.vllm_config):
        layerwise.initialize_layerwise_reload(model)


def _load_part(worker: Any, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load some of the weights, between `_begin_reload` and `_end_reload`."""
    from vllm.config import set_current_vllm_config

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        found = model.load_weights(iter(tensors))
    worker.rlsys_loaded |= worker.rlsys_expected if found is None else set(found)


def _end_reload(worker: Any) -> None:
    """Make the weights of all parts those of the model.

    Raises:
        RuntimeError: some of the worker's weights were in no part.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    runner = worker.model_runner
    model = runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        layerwise.finalize_layerwise_reload(model, worker.vllm_config.model_config)
    runner.reset_lora_state()
    runner.reset_encoder_cache()
    runner.reset_mm_cache()
    _check_loaded(model, worker.rlsys_expected, worker.rlsys_loaded)


def _parts(
    weights: Iterable[tuple[str, torch.Tensor]], part_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the weights in lists of about `part_bytes`; they are views."""
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        part.append((name, tensor))
        size += tensor.nbytes
        if size >= part_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _check_loaded(model: torch.nn.Module, expected: Collection[str], loaded: set[str]) -> None:
    missing = sorted(set(expected) - loaded)
    if missing:
        raise RuntimeError(
            f"generation.engine: the trainer sends no weights for {', '.join(missing[:3])} "
            f"({len(missing)} of {len(expected)} parameters of vLLM's {type(model).__name__}), so "
            "the engine would keep the old ones. Use --generation.engine transformers."
        )


def _loadable_parameters(model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that are loaded from a checkpoint.

    vLLM derives others from them after loading (in DeepSeek's latent attention).
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    loadable = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in get_layerwise_info(module).restore_metadata[0]
    }
    return loadable & {name for name, _ in model.named_parameters()}


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Make the next reload pack the experts of a CPU engine again.

    Where vLLM has a kernel already, it would leave the new weights unpacked, and the kernel would
    read them as packed ones.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _refresh_tied_head(model: torch.nn.Module) -> None:
    """Pack the LM head of a model with tied embeddings again.

    On a CPU its matrix product reads a packed copy, which a reload leaves stale.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _sums_of_squares(model: torch.nn.Module) -> dict[str, float]:
    """Return the sum of squares of each parameter.

    Parameters that a CPU engine has packed into a layout of its own are empty and left out.
    """
    parameters = model.named_parameters()
    return {
        name: float(parameter.detach().float().square().sum())
        for name, parameter in parameters
        if parameter.numel()
    }


ENGINE = VLLMEngine
