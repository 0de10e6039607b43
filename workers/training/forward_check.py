"""Check at set-up that a model's packed forward pass gives the same log-probabilities as its own.

Packed attention, the chunked LM head and shared prompts implement the features of most decoders,
not of all. A model with a feature that they lack would silently train on wrong log-probabilities.
So before anything is sharded, a few sequences of random tokens, the longest as long as the run
allows, go through three forward passes:

    alone     the model's own pass on each sequence by itself: the reference values
    packed    all in one pack with shared prompts: if it differs, the model does not run packed
    padded    the model's own pass on padded sequences: if it differs as well, the model is refused

The verdict depends on the model's configuration and code, not on its weights, so it is cached.

A model that no rank holds whole is run by all ranks together, see `check_forward_on_ranks`.

A value model is checked in the same way, by its values under a head of random weights: a new head
is 0, which would hide every difference. Its pass `alone` is that of the class of transformers that
saved models are loaded with, head included.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
import torch.distributed as dist
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from rlsys.data.packing import pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.models.catalogue import cache_directory
from rlsys.models.loading import UnsupportedModelError
from workers.training.checked_outputs import CHUNK_TOKENS, LOGPROBS, CheckedOutput
from workers.training.packed_attention import SHARING_KERNELS, register_packed_attention
from workers.training.packed_model import PackTensors
from workers.training.process_group import agreed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Increase it when packed attention or the LM head changes: cached verdicts are void then.
CHECK_VERSION = 1
# At most so many tokens of each response are compared, since their logits exist at once.
CHECKED_TOKENS = CHUNK_TOKENS
# Kernels that do not compute in float32.
LOW_PRECISION_KERNELS = ("flash_attention_2",)
# Rounding of a log-probability: an absolute part, and a part in proportion to the standard
# deviation of the model's log-probabilities. Missing features make differences 10 to 1,000 times
# larger.
ABSOLUTE_TOLERANCE = 5e-5
RELATIVE_TOLERANCE = 1e-3

# Characters of an error that are repeated in a message.
SHORT_MESSAGE = 120

Packing = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ForwardCheck:
    """The forward pass that a model runs, and its difference from `alone`."""

    packing: bool
    error: float  # largest difference of a log-probability, in nats, or of a value
    reason: str | None  # why it is not packed; None where it is, or packing is false


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The longest sequences of a run."""

    prompt: int
    response: int


class CheckOptions(TypedDict):
    """The keywords of both forms of the check."""

    kernel: str
    lengths: Lengths
    packing: Packing
    device: torch.device
    code: Path
    checked: CheckedOutput


def check_forward(
    model: PreTrainedModel,
    *,
    kernel: str,
    lengths: Lengths,
    packing: Packing,
    device: torch.device,
    code: Path | None = None,
    checked: CheckedOutput = LOGPROBS,
) -> ForwardCheck:
    """Return the forward pass that `model` runs, from the cache where it has been checked before.

    Args:
        model: whole, on `device`, in float32 and in the mode in which it is trained.
        kernel: a value of `model.attention` other than auto.
        code: the model's directory, whose Python files belong to the cache key.
        checked: what is compared: `LOGPROBS` of a language model, or `VALUES`.

    Raises:
        UnsupportedModelError: `packing` is true and the packed pass is wrong, or the model's own
            pass with padding is.
    """
    file = _cache_file(model, kernel, lengths, packing, device, code)
    verdict = _read(file)
    if verdict is None:
        verdict = try_forward(
            model, kernel=kernel, lengths=lengths, packing=packing, device=device, checked=checked
        )
        _write(file, verdict)
    return verdict


def check_forward_on_ranks(
    model: PreTrainedModel,
    runs: Callable[[torch.dtype], PreTrainedModel],
    *,
    kernel: str,
    lengths: Lengths,
    packing: Packing,
    device: torch.device,
    code: Path | None = None,
    checked: CheckedOutput = LOGPROBS,
) -> ForwardCheck:
    """Return the verdict of `check_forward` on a model that no rank holds whole; collective.

    Args:
        model: of which only the configuration and the class are read.
        runs: returns a copy in a dtype whose forward pass all ranks run together.
    """
    file = _cache_file(model, kernel, lengths, packing, device, code)
    (verdict,) = agreed(lambda: (_read(file),))
    if verdict is None:
        verdict = try_forward(
            runs(torch.float32),
            kernel=kernel,
            lengths=lengths,
            packing=packing,
            device=device,
            checked=checked,
            runs=runs,
        )
        if dist.get_rank() == 0:
            _write(file, verdict)
    return verdict


def try_forward(
    model: PreTrainedModel,
    *,
    kernel: str,
    lengths: Lengths,
    packing: Packing,
    device: torch.device,
    checked: CheckedOutput = LOGPROBS,
    runs: Callable[[torch.dtype], PreTrainedModel] | None = None,
) -> ForwardCheck:
    """Run the check of `check_forward`, without the cache.

    Args:
        runs: see `check_forward_on_ranks`; None: this process runs `model` alone.
    """
    batch = check_batch(lengths, vocabulary=model.config.get_text_config().vocab_size)
    passes = _Passes(model=model, batch=batch, checked=checked, device=device, runs=runs)
    with checked.weights(model):
        return _compare(passes, kernel, packing)


def _compare(passes: _Passes, kernel: str, packing: Packing) -> ForwardCheck:
    """Run the passes, the fastest first, until one gives the model's own outputs."""
    name, noun = passes.name, passes.checked.noun
    alone = passes.own(together=False)
    _check_causal(passes, alone)
    tolerance = _tolerance(passes.model, alone)

    reason = None
    if packing is not False:
        error, reason = _try_packed(passes, kernel, alone, tolerance)
        if reason is None:
            return ForwardCheck(packing=True, error=error, reason=None)
        if packing is True:
            raise UnsupportedModelError(
                f"policy.packing: true, but {name} cannot be run packed: {reason}. "
                "Set it to auto or false."
            )

    error = _largest(passes.own(together=True), alone)
    if not error <= tolerance.limit:
        raise UnsupportedModelError(
            f"model.path: the {noun} of {name} change by up to {error:.2g}{passes.checked.unit} "
            "with the padding behind a sequence, so it cannot be trained in batches. Choose "
            "another model."
        )
    return ForwardCheck(packing=False, error=error, reason=reason)


def check_batch(lengths: Lengths, *, vocabulary: int) -> TokenSequences:
    """Return two groups of random sequences, one as long as the run allows and a short one.

    The second response of the long group is the first half of its first response, so that a model
    that looks ahead is detected. At most `CHECKED_TOKENS` of a response count as sampled, the last
    token always among them.
    """
    rng = np.random.default_rng(0)

    def tokens(count: int) -> NDArray[np.int32]:
        return rng.integers(0, vocabulary, count, dtype=np.int32)

    long_prompt = tokens(lengths.prompt)
    long_response = tokens(lengths.response)
    half = long_response[: (lengths.response + 1) // 2]
    short_prompt = tokens(min(3, lengths.prompt))
    sequences = [
        (long_prompt, long_response, 0),
        (long_prompt, half, 0),
        (short_prompt, tokens(min(7, lengths.response)), 1),
        (short_prompt, tokens(1), 1),
    ]

    batch = TokenSequences.of(
        [prompt for prompt, _, _ in sequences],
        [response for _, response, _ in sequences],
        group_ids=[group for _, _, group in sequences],
    )
    masks = [_checked(len(prompt), len(response)) for prompt, response, _ in sequences]
    return replace(batch, loss_mask=np.concatenate(masks))


def _checked(prompt: int, response: int) -> NDArray[np.bool_]:
    """Return the mask of the tokens that are compared, evenly spaced over the response."""
    checked = np.zeros(response, dtype=np.bool_)
    stride = -(-response // CHECKED_TOKENS)
    checked[::stride] = True
    checked[-1] = True
    return np.concatenate([np.zeros(prompt, dtype=np.bool_), checked])


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """Forward passes of one model on the batch of the check; each returns [N], 0 where unread."""

    model: PreTrainedModel
    batch: TokenSequences
    checked: CheckedOutput
    device: torch.device
    runs: Callable[[torch.dtype], PreTrainedModel] | None = None  # None: one process runs it

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def own(self, *, together: bool) -> Tensor:
        """Run the model's own pass, on each sequence by itself or on all of them, padded.

        Raises:
            UnsupportedModelError: the forward pass fails.
        """
        try:
            if together:
                return self._run(lambda pack: self.checked.outputs(self.model, pack, False))
            return self._run(lambda pack: self.checked.alone(self.model, pack), together=False)
        except (torch.OutOfMemoryError, MemoryError):
            raise  # about the machine, not the model
        except Exception as error:  # each architecture fails in its own way
            raise UnsupportedModelError(
                f"model.path: the forward pass of {self.name} on token ids fails "
                f"({_short(error)}). Choose another model."
            ) from error

    def in_bfloat16(self) -> _Passes:
        """Return the passes of the model with rounded weights."""
        if self.runs is not None:
            return replace(self, model=self.runs(torch.bfloat16))

        model = copy.deepcopy(self.model)
        nn.Module.to(model, torch.bfloat16)
        return replace(self, model=model)

    def packed(self, *, shared_prefix_packing: bool) -> Tensor:
        """Run all sequences in one pack."""
        return self._run(
            lambda pack: self.checked.outputs(self.model, pack, True),
            shared_prefix_packing=shared_prefix_packing,
        )

    @torch.no_grad()
    def _run(
        self,
        outputs: Callable[[PackTensors], Tensor],
        *,
        together: bool = True,
        shared_prefix_packing: bool = False,
    ) -> Tensor:
        rows = np.arange(len(self.batch))
        parts = [rows] if together else np.split(rows, len(rows))

        flat = torch.zeros(len(self.batch.token_ids))
        for part in parts:
            packs = pack_rows(
                self.batch,
                part,
                budget=1 << 40,
                rank=0,
                ranks=1,
                shared_prefix_packing=shared_prefix_packing,
            )
            for pack in packs:
                # A rounded copy is another model, whose weights have not been set yet.
                with self.checked.weights(self.model):
                    result = outputs(PackTensors.of(pack, self.device))
                flat[torch.from_numpy(pack.flat_positions)] = result.float().cpu()
        if self.runs is not None:
            # All ranks decide by the same numbers, and so run the same passes.
            dist.broadcast(flat, src=0)
        return flat


def _try_packed(
    passes: _Passes, kernel: str, alone: Tensor, tolerance: _Tolerance
) -> tuple[float, str | None]:
    """Return the largest difference of the packed pass, and the reason if it cannot be used."""
    noise = 0.0
    if kernel in LOW_PRECISION_KERNELS:
        # The noise is the rounding of the model's own pass in the same precision.
        passes = passes.in_bfloat16()
        noise = _largest(passes.own(together=False), alone)

    shares = kernel in SHARING_KERNELS
    # Twice, since a model may keep state from one pass to the next.
    try:
        with packed_attention(passes.model, kernel):
            found = [passes.packed(shared_prefix_packing=shares) for _ in range(2)]
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each architecture fails in its own way
        return float("nan"), _short(error)

    noun, unit = passes.checked.noun, passes.checked.unit
    error = max(_largest(outputs, alone) for outputs in found)
    spread = _largest(*found)
    if not spread <= tolerance.limit + noise:
        return error, f"two passes over the same tokens differ by up to {spread:.2g}{unit}"
    if not tolerance.holds(found, alone, noise):
        return error, f"packed {noun} differ from the model's own by up to {error:.2g}{unit}"
    return error, None


def _short(error: Exception) -> str:
    """Return the beginning of the error's message, on one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:SHORT_MESSAGE]}"


@contextmanager
def packed_attention(model: PreTrainedModel, kernel: str) -> Iterator[None]:
    """Run the model with packed attention inside the context."""
    own = model.config._attn_implementation or "eager"
    model.set_attn_implementation(register_packed_attention(kernel))
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@dataclass(frozen=True)
class _Tolerance:
    """The differences that count as rounding."""

    limit: float  # of the largest difference
    routed: bool  # a mixture of experts: the router chooses experts by comparing numbers

    def holds(self, passes: list[Tensor], alone: Tensor, noise: float) -> bool:
        """Return True if every pass equals `alone` up to rounding.

        Rounding can change the choice of an expert, which changes a token's log-probability by much
        more. So in a mixture of experts 2 % of the tokens may lie outside the limit.
        """
        limit = self.limit + 3 * noise
        sampled = int((alone != 0).sum())
        allowed = sampled // 50 if self.routed else 0
        for found in passes:
            # Written so that NaN is outside.
            outside = ~((found - alone).abs() <= limit)
            if int(outside.sum()) > allowed:
                return False
        return True


def _tolerance(model: PreTrainedModel, alone: Tensor) -> _Tolerance:
    """Return the tolerance for a model whose log-probabilities are `alone`."""
    spread = float(alone[alone != 0].std())
    text = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    routed = any((getattr(text, name, None) or 0) > 1 for name in names)
    return _Tolerance(ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * spread, routed)


def _largest(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference; NaN where one is NaN."""
    return float((one - other).abs().max())


def _check_causal(passes: _Passes, alone: Tensor) -> None:
    """Refuse a model whose output at a token depends on later tokens.

    Raises:
        UnsupportedModelError: it has no causal mask.
    """
    # Row 1 is the beginning of row 0, so their outputs must be the same.
    first, second, third = passes.batch.offsets[:3]
    common = int(third - second)
    whole = alone[first : first + common]
    beginning = alone[second:third]
    both = (whole != 0) & (beginning != 0)
    difference = (whole - beginning)[both].abs()

    spread = float(alone[alone != 0].std())
    if not bool((difference <= ABSOLUTE_TOLERANCE + 0.01 * spread).all()):
        noun, unit = passes.checked.noun, passes.checked.unit
        raise UnsupportedModelError(
            f"model.path: {passes.name} is not a causal language model as configured: its "
            f"{noun} of a token change by up to {float(difference.max()):.2g}{unit} with the "
            "tokens after it. Choose a decoder (for BERT-like models `is_decoder` is not set)."
        )


def _cache_file(
    model: PreTrainedModel,
    kernel: str,
    lengths: Lengths,
    packing: Packing,
    device: torch.device,
    code: Path | None,
) -> Path:
    """Return the file of the verdict, whose name is a digest of all that it depends on."""
    config = model.config.to_dict()
    # Entries that do not change the forward pass.
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    sources = sorted(code.rglob("*.py")) if code else []

    facts = {
        "check": CHECK_VERSION,
        "config": config,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sources],
        "class": type(model).__name__,
        "versions": [torch.__version__, transformers.__version__],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kernel": kernel,
        "lengths": asdict(lengths),
        "packing": packing,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_directory() / "forward_checks" / f"{digest}.json"


def _read(file: Path) -> ForwardCheck | None:
    """Return the cached verdict; None if there is none that can be read."""
    try:
        return ForwardCheck(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, verdict: ForwardCheck) -> None:
    """Cache a verdict; a failure to write is only logged."""
    # Written under another name and renamed, since several runs may write the same file.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial:
            json.dump(asdict(verdict), partial)
        os.replace(partial.name, file)
    except OSError as error:
        logger.warning("could not cache the check of the forward pass: %s", error)
