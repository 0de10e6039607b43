"""Load a model and prepare it for sharding by any backend.

load -> compare the packed forward pass with the model's own -> freeze, or add adapters
     -> register the attention kernel

A model that fsdp2 shards over several ranks has no weights until it is sharded: each rank keeps its
own rows (`sharded_loading`).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlsys.models.loading import load_causal_lm
from rlsys.models.value_models import ValueLayout, load_value_model, value_head
from workers.training.backends.backend import TrainedRole
from workers.training.checked_outputs import LOGPROBS, VALUES, CheckedOutput
from workers.training.forward_check import (
    CheckOptions,
    ForwardCheck,
    Lengths,
    check_forward,
    check_forward_on_ranks,
)
from workers.training.lora import Adapters, add_adapters, freeze
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM, PackedModel
from workers.training.packed_value_model import PackedValueModel
from workers.training.process_group import agreed
from workers.training.sharded_loading import (
    OwnRows,
    keep_own_rows,
    runnable,
    tie,
    to_device,
    true_on_all_ranks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlsys.config import ModelRoleConfig, RunConfig, TrainableRoleConfig

PackedT = TypeVar("PackedT", bound=PackedModel)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Kernels of the model's own forward pass where they are not the configured ones: transformers
# compiles flex_attention anew for each shape.
OWN_KERNEL = {"flex_attention": "sdpa"}


def choose_kernel(configured: str, device: torch.device) -> str:
    """Return the attention kernel that `model.attention` means on this device."""
    if configured != "auto":
        return configured
    if device.type != "cuda":
        return "sdpa"

    try:
        import flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]  (GPU extra)
    except ImportError:
        return "sdpa"
    return "flash_attention_2"


@dataclass(frozen=True, kw_only=True)
class ModelKind(Generic[PackedT]):
    """The steps of `prepare_model` in which language models and value models differ."""

    load: Callable[..., PreTrainedModel]
    wrap: Callable[[PreTrainedModel, ModelRoleConfig, bool], PackedT]  # the last: packing
    checked: CheckedOutput
    # Modules that are trained whole beside adapters.
    heads: Callable[[PreTrainedModel], Sequence[nn.Module]] = lambda model: ()


LANGUAGE_MODEL = ModelKind(
    load=load_causal_lm,
    wrap=lambda model, settings, packing: PackedCausalLM(
        model, chunk_tokens=settings.logit_chunk_tokens, packing=packing
    ),
    checked=LOGPROBS,
)


def value_model(
    prefer: ValueLayout = "token", head_seed: int | None = None
) -> ModelKind[PackedValueModel]:
    """Return the kind of critics and reward models; for the arguments see `load_value_model`."""
    return ModelKind(
        load=partial(load_value_model, prefer=prefer, head_seed=head_seed),
        wrap=lambda model, settings, packing: PackedValueModel(model, packing=packing),
        checked=VALUES,
        heads=lambda model: (value_head(model),),
    )


def prepare_model(
    config: RunConfig, settings: ModelRoleConfig, directory: Path, device: torch.device
) -> tuple[PackedCausalLM, ForwardCheck]:
    """Load a language model and find out which forward pass it can run; see `prepare`."""
    return prepare(LANGUAGE_MODEL, config, settings, directory, device)


@dataclass(frozen=True, kw_only=True)
class Role:
    """A trained model in the configuration."""

    section: str  # of its settings
    path: str  # of the model, in the forms of model.path


def prepare(
    kind: ModelKind[PackedT],
    config: RunConfig,
    settings: ModelRoleConfig,
    directory: Path,
    device: torch.device,
    role: Role | None = None,
) -> tuple[PackedT, ForwardCheck]:
    """Load a model and find out which forward pass it can run; collective.

    Trained weights are float32 (the masters), frozen models and the base of adapters are stored in
    the compute dtype. All run in evaluation mode: dropout and router jitter would make the outputs
    of one model differ from pass to pass.

    Args:
        role: of a trained model; None: the policy, from `model.path`.

    Raises:
        UnsupportedModelError: no forward pass gives the right outputs; the parameters to train do
            not fit the model.
    """
    trainable = isinstance(settings, TrainedRole)
    stored = torch.float32 if trainable else DTYPES[settings.compute_dtype]

    kernel = choose_kernel(config.model.attention, device)
    load = partial(
        kind.load,
        directory,
        dtype=stored,
        attention=OWN_KERNEL.get(kernel, kernel),
        trust_remote_code=config.model.trust_remote_code,
    )
    model, rows = load_on_ranks(load, settings, device)
    model.requires_grad_(trainable)
    to_device(model, device)

    options = CheckOptions(
        kernel=kernel,
        lengths=Lengths(
            prompt=config.data.max_prompt_tokens, response=config.generation.max_tokens
        ),
        packing=settings.packing,
        device=device,
        code=directory,
        checked=kind.checked,
    )

    def runs(dtype: torch.dtype) -> PreTrainedModel:
        assert rows is not None
        return runnable(model, rows, decoder_blocks, device=device, dtype=dtype)

    def check() -> ForwardCheck:
        # In bfloat16 rounding would hide the difference that a missing feature makes.
        nn.Module.to(model, torch.float32)
        return check_forward(model, **options)

    verdict = check_forward_on_ranks(model, runs, **options) if rows else agreed(check)
    # Sharding needs a single dtype, and some models keep a few parameters in float32 regardless of
    # the dtype they are loaded with. Buffers stay as they are: rounded frequencies of RoPE would be
    # those of another model.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    adapters = None
    if trainable:
        role = role or Role(section="policy", path=config.model.path)
        trained = cast("TrainableRoleConfig", settings)
        run = partial(runs, torch.float32) if rows else None
        adapters = _choose_trained(kind, model, config, trained, role, run)
    if verdict.packing:
        model.set_attn_implementation(register_packed_attention(kernel))
    packed = kind.wrap(model, settings, verdict.packing)
    packed.adapters = adapters
    if rows:
        packed.own_rows = rows.by_name(packed)
        gc.collect()  # cycles hold the copies that ran
    return packed, verdict


def load_on_ranks(
    load: Callable[[], PreTrainedModel], settings: ModelRoleConfig, device: torch.device
) -> tuple[PreTrainedModel, OwnRows | None]:
    """Return a loaded model and the rows of it that this rank keeps; None: it is whole.

    Collective where `settings` divide the model among several ranks.
    """
    rows = _own_rows(settings, device)
    if rows is None:
        return load(), None
    with keep_own_rows(rows):
        model = load()
    tie(model, rows, true_on_all_ranks)
    return model, rows


def _own_rows(settings: ModelRoleConfig, device: torch.device) -> OwnRows | None:
    """Return where this rank keeps its rows; None where it loads the model whole."""
    ranks = dist.get_world_size()
    if settings.backend != "fsdp2" or ranks == 1:
        return None
    offloads = isinstance(settings, TrainedRole) and settings.offload_optimizer
    kept_on = torch.device("cpu") if offloads else device
    return OwnRows(rank=dist.get_rank(), ranks=ranks, device=kept_on)


def _choose_trained(
    kind: ModelKind[PackedT],
    model: PreTrainedModel,
    config: RunConfig,
    settings: TrainableRoleConfig,
    role: Role,
    run: Callable[[], PreTrainedModel] | None,
) -> Adapters | None:
    """Freeze what is not trained, and add adapters where they are configured.

    Args:
        run: returns a copy that all ranks run together; None: `model` has its weights.
    """
    lora = config.model.lora
    if not lora.rank:
        freeze(model, settings.frozen, field=f"{role.section}.frozen")
        return None

    # The passes cast every weight to the compute dtype, so storing a frozen one in it changes no
    # output.
    heads = kind.heads(model)
    whole = {parameter for head in heads for parameter in head.parameters()}
    for parameter in model.parameters():
        if parameter not in whole:
            parameter.data = parameter.data.to(DTYPES[settings.compute_dtype])
    return add_adapters(
        model,
        decoder_blocks(model),
        lora,
        seed=config.trainer.seed,
        base=role.path,
        heads=heads,
        runs=run() if run else None,
    )


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of the model, the units of sharding and recomputation.

    They are the members of module lists whose class the model names as not to be split. Inner
    blocks come before the blocks that contain them.
    """
    names = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for blocks in lists for block in blocks if type(block).__name__ in names]

    # `modules()` visits outer modules first; `fromkeys` drops a block that stands in two lists.
    return list(dict.fromkeys(reversed(found)))


def recompute_in_backward(block: nn.Module) -> None:
    """Keep only the block's inputs in the forward pass, and recompute it in the backward pass.

    transformers' own switch works in training mode only, which would bring dropout with it.
    """
    forward = block.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = recomputed
