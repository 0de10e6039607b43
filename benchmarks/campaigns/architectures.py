"""Every causal language model of transformers, through the trainer and the transformers engine.

    python -m benchmarks.campaigns.architectures            the listed families and all others
    python -m benchmarks.campaigns.architectures --small    one of each kind

Each model is tiny and has random weights. It is loaded, checked and sharded as in a policy rank.
Three differences to the model's own forward pass on single sequences are measured:

    log-prob     of sampled tokens in the trainer
    gradient     of a random combination of them, relative to the norm of the true one
    sampling     of the log-probabilities that the transformers engine reports while it samples

Exit code 1 where one is too large, or where a family that must be packed is not. Writes
docs/data/architectures.json, from which `docs/models.md` is generated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlsys.config import DataConfig, GenerationConfig, ModelConfig, PolicyConfig, RunConfig
from rlsys.data.batches import Prompt, SamplingParameters
from rlsys.data.packing import pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.models.loading import UnsupportedModelError, load_causal_lm
from tests.support.architectures import (
    ARCHITECTURES,
    PACKED,
    Architecture,
    generic_architectures,
    save_tiny_model,
    tiny_parameters,
)
from workers.generation.engines.transformers import TransformersEngine
from workers.training.backends import build_backend
from workers.training.forward_check import Lengths, check_batch
from workers.training.model_setup import prepare_model
from workers.training.packed_model import PackTensors

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "data" / "architectures.json"
LENGTHS = Lengths(prompt=24, response=40)
SMALL = (
    "llama",
    "mistral, sliding window",
    "gemma2, sliding window, softcaps",
    "granite, scales",
    "phi, LM-head bias, dropout",
    "starcoder2, sliding window, dropout",
    "qwen3_moe, experts",
    "gpt2, dropout",
    "falcon",
    "lfm2, convolution state",
    "bert, not causal",
)
MOST_PARAMETERS = 30_000_000
LIMIT_S = 60
LOGPROB_LIMIT, GRADIENT_LIMIT, SAMPLING_LIMIT = 2e-3, 1e-3, 2e-3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome for one architecture."""

    name: str
    model_type: str
    outcome: str  # packed | padded | refused | not built
    reason: str | None = None
    logprob_error: float | None = None
    gradient_error: float | None = None
    sampling_error: float | None = None

    def fault(self, *, must_pack: bool) -> str | None:
        """Return what is wrong, if anything."""
        if must_pack and self.outcome != "packed":
            return f"must run packed, and is {self.outcome}: {self.reason}"
        for what, value, limit in (
            ("log-prob", self.logprob_error, LOGPROB_LIMIT),
            ("gradient", self.gradient_error, GRADIENT_LIMIT),
            ("sampling", self.sampling_error, SAMPLING_LIMIT),
        ):
            if value is not None and not value <= limit:
                return f"{what} error {value:.2g} above {limit:g}"
        return None


def examine(architecture: Architecture, *, sampling: bool = True) -> Finding:
    """Take one architecture through trainer and engine. The process group exists already."""
    name, kind = architecture.name, architecture.model_type
    with tempfile.TemporaryDirectory() as folder:
        try:
            size = tiny_parameters(architecture)
            if size > MOST_PARAMETERS:
                reason = f"{size / 1e6:.0f} M parameters, as parts of it have fixed sizes"
                return Finding(name=name, model_type=kind, outcome="not built", reason=reason)
            save_tiny_model(Path(folder), architecture)
            own = load_causal_lm(folder, dtype=torch.float32, attention="sdpa")
            own(input_ids=torch.arange(1, 9)[None], use_cache=False)
        except Exception as error:  # sizes that this architecture does not take
            return Finding(name=name, model_type=kind, outcome="not built", reason=_line(error))

        try:
            return _examine(architecture, folder, sampling=sampling)
        except UnsupportedModelError as error:
            return Finding(name=name, model_type=kind, outcome="refused", reason=_line(error))


def _examine(architecture: Architecture, folder: str, *, sampling: bool) -> Finding:
    config = _config(folder)
    cpu = torch.device("cpu")
    packed, verdict = prepare_model(config, config.policy, Path(folder), cpu)
    build_backend(packed, config.policy, cpu, Path(folder))
    own = load_causal_lm(folder, dtype=torch.float32, attention="sdpa")
    own.requires_grad_(True)
    vocabulary = own.config.get_text_config().vocab_size
    batch = check_batch(LENGTHS, vocabulary=vocabulary)
    coefficients = torch.linspace(-1, 1, len(batch.token_ids))

    found = torch.zeros(len(batch.token_ids))
    packs = pack_rows(
        batch,
        torch.arange(len(batch)).numpy(),
        budget=120,
        rank=0,
        ranks=1,
        shared_prefix_packing=verdict.packing,
        padded=not verdict.packing,
    )
    for pack in packs:
        logprobs = packed(PackTensors.of(pack, cpu)).logprobs
        at = torch.from_numpy(pack.flat_positions)
        (logprobs * coefficients[at]).sum().backward()
        found[at] = logprobs.detach()

    right = _own_logprobs(own, batch)
    (right * coefficients).sum().backward()
    error = float((found - right.detach()).abs().max())
    return Finding(
        name=architecture.name,
        model_type=architecture.model_type,
        outcome="packed" if verdict.packing else "padded",
        reason=verdict.reason,
        logprob_error=error,
        gradient_error=_gradient_error(packed.model, own),
        sampling_error=_sampling_error(config, folder, own) if sampling else None,
    )


def _config(folder: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=folder),
        data=DataConfig(max_prompt_tokens=LENGTHS.prompt),
        generation=GenerationConfig(
            engine="transformers", dtype="float32", max_tokens=LENGTHS.response
        ),
        policy=PolicyConfig(compute_dtype="float32", gradient_checkpointing=True),
    )


def _own_logprobs(model: torch.nn.Module, batch: TokenSequences) -> Tensor:
    """Return [N] log-probabilities, each sequence by itself, all logits, the shift written out."""
    parts = []
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        tokens = torch.from_numpy(batch.token_ids[start:end]).long()
        logs = model(input_ids=tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
        chosen = logs[:-1].gather(1, tokens[1:, None])[:, 0]
        sampled = torch.from_numpy(batch.loss_mask[start + 1 : end])
        parts.append(torch.cat([torch.zeros(1), chosen * sampled]))
    return torch.cat(parts)


def _gradient_error(sharded: torch.nn.Module, own: torch.nn.Module) -> float:
    """Return |g - g_true| / |g_true| over all parameters."""
    right = {name: p.grad for name, p in own.named_parameters()}
    difference = norm = 0.0
    for name, parameter in sharded.named_parameters():
        true = right[name]
        got = parameter.grad
        if true is None and got is None:
            continue
        if got is None:
            got = torch.zeros(parameter.shape)
        elif isinstance(got, DTensor):
            got = got.full_tensor()
        if true is None:
            true = torch.zeros_like(got)
        difference += float((got - true).double().square().sum())
        norm += float(true.double().square().sum())
    return (difference / norm) ** 0.5


def _sampling_error(config: RunConfig, folder: str, own: torch.nn.Module) -> float:
    """Return the largest difference between the engine's log-probabilities and the model's own."""
    engine = TransformersEngine(config, folder)
    prompts = tuple(
        Prompt(problem_id=str(i), token_ids=tokens, text="", problem="", ground_truth="")
        for i, tokens in enumerate([tuple(range(3, 23)), (5, 6)])
    )
    sampling = SamplingParameters(
        samples_per_prompt=4,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=LENGTHS.response,
        stop=(),
        seed=0,
    )
    worst = 0.0
    for groups in engine.generate(prompts, range(len(prompts)), sampling):
        for group in groups:
            prompt = prompts[group.index].token_ids
            for response in group.responses:
                worst = max(
                    worst, _response_error(own, prompt, response.token_ids, response.logprobs)
                )
    return worst


@torch.no_grad()
def _response_error(
    own: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], reported: Sequence[float]
) -> float:
    tokens = torch.tensor([*prompt, *response])
    logits = own(input_ids=tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    right = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
    return float((right - torch.tensor(reported)).abs().max())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class TooLongError(BaseException):
    """A time limit; not an `Exception`, which the forward check takes for a failing model."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` where the block takes longer.

    Some architectures are slow without their own kernels.
    """

    def interrupt(*_: object) -> None:
        raise TooLongError(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def single_rank() -> Iterator[None]:
    """Provide a process group of this process alone, and an empty cache of verdicts."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as cache:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        os.environ["RLSYS_CACHE"] = cache
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def main() -> int:
    """Measure the chosen architectures; exit code 1 where one has a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="one architecture of each kind")
    parser.add_argument("--only", nargs="*", help="model types")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    chosen: tuple[Architecture, ...] = ARCHITECTURES + generic_architectures()
    if arguments.small:
        chosen = tuple(a for a in ARCHITECTURES if a.name in SMALL)
    if arguments.only:
        chosen = tuple(a for a in chosen if a.model_type in arguments.only)

    faults = 0
    findings = []
    with single_rank():
        for architecture in chosen:
            try:
                with time_limit(LIMIT_S):
                    finding = examine(architecture)
                fault = finding.fault(must_pack=architecture in PACKED)
            except TooLongError as error:
                finding = Finding(
                    name=architecture.name,
                    model_type=architecture.model_type,
                    outcome="not built",
                    reason=str(error),
                )
                fault = None
            except Exception as error:  # the search goes on
                finding = Finding(
                    name=architecture.name,
                    model_type=architecture.model_type,
                    outcome="failed",
                    reason=_line(error),
                )
                fault = finding.reason
            findings.append(finding)
            faults += fault is not None
            print(_row(finding), f"  <-- {fault}" if fault else "", flush=True)

    if not arguments.small and not arguments.only:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    print(f"{len(findings)} architectures, {faults} findings")
    return 1 if faults else 0


def _row(finding: Finding) -> str:
    numbers = [
        "-" if value is None else f"{value:.1e}"
        for value in (finding.logprob_error, finding.gradient_error, finding.sampling_error)
    ]
    return f"{finding.name:45} {finding.outcome:10} {' '.join(numbers)}  {finding.reason or ''}"


if __name__ == "__main__":
    sys.exit(main())
