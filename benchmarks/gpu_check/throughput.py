"""Tokens/s, MFU and peak memory of the phases of a step, on models with random weights.

    generation     the transformers engine, or vLLM in `throughput_vllm`
    log-probs      one forward pass over the batch, as for old or reference log-probs
    update         forward and backward pass over the batch, and one AdamW step
    weight sync    gathering and packing all weights in host memory

Tokens are those of prompts and responses that the model computes, with shared prompts once;
for generation, sampled tokens. Operations are counted by `rlsys.models.flops`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_check.attention import synchronize
from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.examples import Sizes, Work, packs_of, random_sequences
from benchmarks.gpu_check.machine import peak_flops
from benchmarks.gpu_check.policy import (
    LARGE,
    MEDIUM,
    SMALL,
    TINY,
    Optimizer,
    Role,
    Shape,
    backend_of,
    decoder_size,
    join,
    packed,
    random_model,
    save_random_model,
)
from benchmarks.gpu_check.results import Figure, Finding, SkippedError
from benchmarks.gpu_check.update import likelihood_loss, sizes_of
from benchmarks.gpu_check.weight_sync import transformers_engine, vllm_engine
from rlsys.data.batches import Prompt, SamplingParameters
from rlsys.data.packing import Pack
from rlsys.models.flops import (
    DecoderSize,
    forward_flops,
    generation_flops,
    model_flops_utilization,
    training_flops,
)
from rlsys.models.weights import pack_weights
from workers.generation.engines.engine import RolloutEngine
from workers.training.backends.fsdp2 import FSDP2Backend
from workers.training.losses import backward_passes
from workers.training.model_setup import choose_kernel
from workers.training.packed_attention import SHARING_KERNELS
from workers.training.packed_model import PackTensors
from workers.training.process_group import peak_memory_gib

SETTINGS = Optimizer(learning_rate=1e-6)
REPEATS = 3
# Bytes of a parameter while it is trained: master, gradient and two moments in float32, and the
# bfloat16 copy of the largest unit with room for activations.
BYTES_PER_PARAMETER = 16
ACTIVATION_GIB = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """The work that is measured."""

    groups: int
    samples: int
    prompt: int
    response: int
    pack_tokens: int
    sampled: int  # tokens of each response that is generated
    generated: int  # responses of the one prompt that is generated


GPU_LOAD = Load(
    groups=8, samples=8, prompt=256, response=512, pack_tokens=16384, sampled=64, generated=64
)
CPU_LOAD = Load(groups=2, samples=2, prompt=16, response=16, pack_tokens=64, sampled=4, generated=2)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The measurement of one phase."""

    name: str
    seconds: float
    tokens: int
    flops: float  # 0: no products
    peak_gib: float

    def figures(self, peak: float) -> tuple[Figure, ...]:
        """Return the figures of the phase."""
        found = [Figure(name=f"{self.name}: time", value=self.seconds, unit="s")]
        if self.flops:
            share = model_flops_utilization(self.flops, self.seconds, peak)
            rate = self.tokens / self.seconds
            found.append(Figure(name=f"{self.name}: rate", value=rate, unit="tokens/s"))
            found.append(Figure(name=f"{self.name}: MFU", value=100 * share, unit="%"))
        found.append(Figure(name=f"{self.name}: peak memory", value=self.peak_gib, unit="GiB"))
        return tuple(found)


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float]:
    """Run `work` once to warm up and then some times; return the median time and the peak memory.

    On a CPU the peak is that of the process so far.
    """
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(REPEATS):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), peak_memory_gib(device)


def generation_phase(
    engine: RolloutEngine, size: DecoderSize, load: Load, device: torch.device
) -> Phase:
    """Measure sampling: all responses have the same length."""
    prompt = Prompt(
        problem_id="0",
        token_ids=tuple(range(5, 5 + load.prompt)),
        text="",
        problem="",
        ground_truth="",
    )
    sampling = SamplingParameters(
        samples_per_prompt=load.generated,
        temperature=1.0,
        min_tokens=load.sampled,
        max_tokens=load.sampled,
    )

    def sample() -> None:
        for groups in engine.generate([prompt], [0], sampling):
            for group in groups:
                lengths = {len(response.token_ids) for response in group.responses}
                assert lengths == {load.sampled}, "no response ends early"

    seconds, peak = timed(device, sample)
    lengths = [load.sampled] * load.generated
    return Phase(
        name="generation",
        seconds=seconds,
        tokens=sum(lengths),
        flops=generation_flops(size, prompt_length=load.prompt, lengths=lengths),
        peak_gib=peak,
    )


def training_phases(backend: FSDP2Backend, packs: list[Pack], size: DecoderSize) -> list[Phase]:
    """Measure log-probs, update and the export of the weights."""
    device, work = backend.device, Work.of(packs)
    counts = {"tokens": work.tokens, "predicted": work.predicted, "pairs": work.pairs}

    @torch.no_grad()
    def logprobs() -> None:
        for pack in packs:
            backend.forward(PackTensors.of(pack, device)).logprobs.cpu()

    def update() -> None:
        for _ in backward_passes(backend, packs, likelihood_loss, sizes_of(packs)):
            pass
        backend.step(SETTINGS.learning_rate)

    def export() -> None:
        pack_weights(backend.weights(), version=1, dtype=torch.bfloat16)

    phases = []
    for name, function, flops in (
        ("log-probs", logprobs, forward_flops(size, **counts)),
        ("update", update, training_flops(size, **counts)),
        ("weight sync", export, 0),
    ):
        seconds, peak = timed(device, function)
        phases.append(
            Phase(name=name, seconds=seconds, tokens=work.tokens, flops=flops, peak_gib=peak)
        )
    return phases


def check_room(size: DecoderSize, device: torch.device) -> None:
    """Skip a model that does not fit the GPU.

    Raises:
        SkippedError: it does not.
    """
    if device.type != "cuda":
        return
    needed = size.parameters * BYTES_PER_PARAMETER / 2**30 + ACTIVATION_GIB
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if needed > free:
        raise SkippedError(f"needs about {needed:.0f} GiB of GPU memory, {free:.0f} are free")


def measure(place: Place, shape: Shape) -> Finding:
    """Measure all phases of a model."""
    device, load = join(), CPU_LOAD if place.small else GPU_LOAD
    peak, source = peak_flops(device)
    size = decoder_size(random_model(shape, torch.device("meta")))
    check_room(size, device)

    directory = place.folder / "model"
    directory.mkdir()
    save_random_model(shape, directory, device)
    engine = transformers_engine(directory, "bfloat16")
    phases = [generation_phase(engine, size, load, device)]
    del engine
    release(device)

    kernel = choose_kernel("auto", device)
    shares = kernel in SHARING_KERNELS
    module = packed(random_model(shape, device), kernel)
    role = Role(compute_dtype="bfloat16", optimizer=SETTINGS, gradient_checkpointing=True)
    backend = backend_of(module, role, device, directory)
    phases += training_phases(backend, batch(load, shape, shares=shares), size)

    figures = [figure for phase in phases for figure in phase.figures(peak)]
    figures.insert(0, Figure(name="parameters", value=size.parameters / 1e9, unit="B"))
    facts = {
        "engine": "transformers",
        "attention of the trainer": kernel + (", shared prompts" if shares else ""),
        "batch": f"{load.groups} prompts of {load.prompt} tokens x {load.samples} responses of "
        f"{load.response}, packs of {load.pack_tokens}, activations recomputed",
        "generated": f"{load.generated} responses of {load.sampled} tokens to one prompt",
        "peak": source,
    }
    return Finding(figures=tuple(figures), facts=facts)


def batch(load: Load, shape: Shape, *, shares: bool) -> list[Pack]:
    """Return the packs of the measured batch."""
    sizes = Sizes(
        groups=load.groups,
        samples=load.samples,
        prompt=load.prompt,
        response=load.response,
        vocabulary=shape.vocabulary,
        ragged=False,
    )
    return packs_of(random_sequences(sizes), budget=load.pack_tokens, shares=shares)


def release(device: torch.device) -> None:
    """Give the memory of deleted tensors back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def tiny_model(place: Place) -> Finding:
    """Measure the model of the tests."""
    return measure(place, TINY)


def small_model(place: Place) -> Finding:
    """Measure 0.1 B parameters."""
    return measure(place, SMALL)


def medium_model(place: Place) -> Finding:
    """Measure 0.5 B parameters."""
    return measure(place, MEDIUM)


def large_model(place: Place) -> Finding:
    """Measure 1.5 B parameters."""
    return measure(place, LARGE)


def vllm(place: Place) -> Finding:
    """Measure vLLM's sampling, 0.5 B parameters."""
    shape = TINY if place.small else MEDIUM
    load = CPU_LOAD if place.small else GPU_LOAD
    peak, source = peak_flops(place.device)
    size = decoder_size(random_model(shape, torch.device("meta")))
    directory: Path = place.folder / "model"
    directory.mkdir()
    save_random_model(shape, directory, place.device)

    engine = vllm_engine(directory, "bfloat16", longest=2 * (load.prompt + load.sampled))
    phase = generation_phase(engine, size, load, place.device)
    facts = {"engine": "vLLM without CUDA graphs", "peak": source}
    return Finding(figures=phase.figures(peak), facts=facts)
