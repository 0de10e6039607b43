"""Loading a model of which each rank keeps its own rows, so that no rank ever holds it whole.

transformers reads, converts and sets one weight after the other. Inside of `keep_own_rows`, each
weight that it has set gives way to a parameter of the same shape on the meta device, and only the
rows that FSDP2 gives to this rank are kept:

    rows = OwnRows(rank=rank, ranks=ranks, device=device)
    with keep_own_rows(rows):
        model = load_causal_lm(...)          # parameters without storage; buffers as always
    ...                                      # adapters, frozen parameters
    pending = rows.by_name(module)
    fully_shard(module, mesh=mesh)
    fill(module, pending)                    # the shards get their values

A weight that no file has, such as a new head, stays whole until it is sharded. The values are those
of a model that is loaded whole, bit by bit: transformers converts the same files in both ways.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.modules.module import register_module_parameter_registration_hook

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

# The driver imports this module too. FSDP and DTensor, which are slow to import, are imported where
# they are used.

# transformers marks each weight that it has read; a weight without the mark is drawn later.
_MARK = "_is_hf_initialized"
# By itself transformers reads weights ahead in threads, without limit.
_ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """The rows of one rank, by the parameters on the meta device that stand for whole weights."""

    rank: int
    ranks: int
    device: torch.device  # of the rows
    rows: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def keep(self, whole: nn.Parameter) -> nn.Parameter:
        """Keep the rows of this rank; return a parameter without storage."""
        # FSDP2 gives every rank ceil(rows / ranks) rows, and the last ranks what is left.
        per_rank = -(-len(whole) // self.ranks)
        own = whole.detach()[self.rank * per_rank : (self.rank + 1) * per_rank]

        empty = nn.Parameter(torch.empty_like(whole, device="meta"), whole.requires_grad)
        setattr(empty, _MARK, True)
        self.rows[empty] = own.to(self.device, copy=True, memory_format=torch.contiguous_format)
        return empty

    def by_name(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the rows by the names of the parameters in `module`; tied ones once."""
        named = module.named_parameters()
        return {name: self.rows[one] for name, one in named if one in self.rows}


@contextmanager
def keep_own_rows(rows: OwnRows) -> Iterator[None]:
    """Keep the rows of this rank of each weight that transformers loads inside the context."""

    # torch takes what it returns for the parameter; None leaves it. Its stub says None only.
    def replace(_: nn.Module, __: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or not parameter.ndim:
            return None
        return rows.keep(parameter) if getattr(parameter, _MARK, False) else None

    before = os.environ.get(_ONE_AT_A_TIME)
    os.environ[_ONE_AT_A_TIME] = "1"
    hook = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        hook.remove()
        os.environ.pop(_ONE_AT_A_TIME)
        if before is not None:
            os.environ[_ONE_AT_A_TIME] = before


def tie(model: PreTrainedModel, rows: OwnRows, everywhere: Callable[[bool], bool]) -> None:
    """Tie weights of which the files have two equal copies, as transformers does with whole ones.

    Args:
        everywhere: returns whether its argument is true on all ranks; collective.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(tied.items()):
        one, other = model.get_parameter(source), model.get_parameter(target)
        if one is other or one not in rows.rows or other not in rows.rows:
            continue
        if everywhere(torch.equal(rows.rows[one], rows.rows[other])):
            parent, _, name = target.rpartition(".")
            setattr(model.get_submodule(parent), name, one)
            del rows.rows[other]
        else:
            del tied[target]


def true_on_all_ranks(value: bool) -> bool:
    """Return whether `value` is true on all ranks; collective."""
    values: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(values)


@torch.no_grad()
def fill(module: nn.Module, pending: dict[str, Tensor], *, shares: bool = False) -> None:
    """Give a module that FSDP2 has sharded its rows, in the dtype of its parameters.

    Args:
        pending: the rows by name; empty afterwards, so that they are freed one by one.
        shares: do not copy rows that have the right dtype.
    """
    from torch.distributed.tensor import DTensor

    names: dict[Tensor, str] = {
        one: name for name, one in module.named_parameters() if name in pending
    }

    def filled(tensor: Tensor) -> Tensor:
        name = names.pop(tensor, None) if tensor.is_meta else None
        if name is None:
            return tensor
        assert isinstance(tensor, DTensor), f"{name} is not sharded"
        own = pending.pop(name)
        if shares:
            return _sharded(own, tensor, tensor.device_mesh, tensor.dtype)
        # Of a mesh of GPUs, too, the shards may be in host memory, where `from_local` moves them.
        placed: Any = torch.empty_like(tensor, device=own.device)
        placed.to_local().copy_(own)
        return placed

    # What `to_empty` of a sharded module calls, but buffers and other parameters stay.
    module._apply(filled)
    assert not pending, f"never sharded: {list(pending)[:3]}"


def _sharded(own: Tensor, like: Tensor, mesh: DeviceMesh, dtype: torch.dtype) -> DTensor:
    """Return the sharded tensor of which this rank has the rows `own`."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        own.to(dtype),
        mesh,
        (Shard(0),),
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move what has storage to `device`."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


@torch.no_grad()
def runnable(
    model: PreTrainedModel,
    rows: OwnRows,
    blocks: Callable[[PreTrainedModel], Iterable[nn.Module]],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Return a copy of a loaded model whose forward pass all ranks run together; collective.

    Its `blocks` are sharded, and gathered one at a time; what is beside them, the embeddings and
    the head, is whole. Any module in it can be called, where FSDP2 needs calls of the root.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    copied: Any = copy.deepcopy(model)
    nn.Module.to(copied, dtype)
    pending = {name: own.to(device) for name, own in rows.by_name(model).items()}
    mesh = init_device_mesh(device.type, (rows.ranks,))
    for block in blocks(copied):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)

    beside = {
        one: _sharded(pending.pop(name), one, mesh, dtype).full_tensor()
        for name, one in copied.named_parameters()
        if name in pending and not isinstance(one, DTensor)
    }
    _replace(copied, beside)
    fill(copied, pending, shares=True)
    return copied


@torch.no_grad()
def gather(module: nn.Module, rows: OwnRows, device: torch.device) -> None:
    """Give all parameters of a loaded module their whole values, on every rank; collective."""
    mesh = init_device_mesh(device.type, (rows.ranks,))
    whole: dict[Tensor, Tensor] = {
        one: _sharded(rows.rows[one].to(device), one, mesh, one.dtype).full_tensor()
        for one in module.parameters()
        if one in rows.rows
    }
    _replace(module, whole)


def _replace(module: nn.Module, values: Mapping[Tensor, Tensor]) -> None:
    """Replace parameters on the meta device, also where they are tied."""
    module._apply(lambda tensor: values.get(tensor, tensor))
