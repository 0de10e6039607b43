"""Conversion of a module's weights to those of a Hugging Face checkpoint, and back.

transformers holds some weights under other names, and in other shapes, than its checkpoints: the
experts of a mixture are one tensor in memory, and one tensor per projection and expert on disk.
Everything that leaves the trainer (weight sync, saved models) has the names of the checkpoint,
which vLLM, `from_pretrained` and every other program read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsys.models.tensor_files import TensorFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_checkpoint(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole `weights` of `model` as `save_pretrained` would write them.

    Conventions: the conversions that loading used are reverted. Where it used none (a model built
    from its config, or files with the names of the module), the default ones of the model's type
    are reverted, as vLLM expects.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not getattr(model, "_weight_conversions", None):
        setattr(model, "_weight_conversions", None)  # noqa: B010  ([] would mean: as in the module)
    return revert_weight_conversion(model, dict(weights))


def from_checkpoint(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of `model`: `to_checkpoint` inverted.

    Raises:
        ValueError: the checkpoint lacks weights of the model.
    """
    if set(weights) <= set(model.state_dict()):
        return dict(weights)

    # Only from_pretrained knows the conversions of each type of model, so it loads a copy.
    dtype = next(iter(weights.values())).dtype
    load: Any = type(model).from_pretrained
    converted, report = load(
        None,
        config=model.config,
        state_dict=dict(weights),
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"checkpoint: no weights for {missing}; it belongs to another model")
    return converted.state_dict()


@dataclass(frozen=True, kw_only=True)
class NameGroup:
    """Weights of a model that are converted together."""

    names: tuple[str, ...]  # in the model
    outputs: tuple[str, ...]  # in its checkpoint
    renamed: bool  # one weight, of which only the name changes


class CheckpointNames:
    """`to_checkpoint`, a few weights at a time.

    Most weights only change their name. The others are converted in the smallest groups that give
    what the whole model gives: alone, or all of a layer, or all together. Names and shapes decide
    that; tensors without storage suffice to find out.
    """

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
        """Plan the conversion of `weights`, of which only shapes and dtypes are read."""
        self._model = model
        shapes = {
            name: torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)
            for name, tensor in weights.items()
        }
        whole = to_checkpoint(model, shapes)

        # What comes out as the same object has only been renamed.
        names = {id(tensor): name for name, tensor in shapes.items()}
        renamed = {names[id(out)]: new for new, out in whole.items() if id(out) in names}
        groups = [
            NameGroup(names=(name,), outputs=(new,), renamed=True) for name, new in renamed.items()
        ]
        others = {name: shapes[name] for name in shapes if name not in renamed}
        made = {name: tensor for name, tensor in whole.items() if id(tensor) not in names}
        groups += _smallest_groups(model, others, made)

        self.exported = {name: TensorFacts.of(name, tensor) for name, tensor in whole.items()}
        place = {name: position for position, name in enumerate(shapes)}
        self.groups = tuple(sorted(groups, key=lambda group: place[group.names[0]]))

    def convert(self, group: NameGroup, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of one group under the names of the checkpoint."""
        if group.renamed:
            return {group.outputs[0]: weights[group.names[0]]}
        return to_checkpoint(self._model, weights)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy all weights of a checkpoint into the model, one at a time.

        `convert` inverted: every conversion moves elements and changes none, so that their places
        say where each element of a weight belongs.

        Raises:
            ValueError: the checkpoint lacks weights of the model, or has others.
        """
        state = self._model.state_dict()
        own = {group.outputs[0]: group.names[0] for group in self.groups if group.renamed}
        part_of = {
            name: group for group in self.groups if not group.renamed for name in group.outputs
        }
        left = {name for group in self.groups for name in group.outputs}
        open_groups: dict[NameGroup, dict[str, Tensor]] = {}

        with torch.no_grad():
            for name, tensor in weights:
                if name in own:
                    state[own[name]].copy_(tensor)
                elif group := part_of.get(name):
                    places = open_groups.pop(group, None) or self._places(group, state)
                    _put(state, group.names, places.pop(name), tensor)
                    if places:
                        open_groups[group] = places
                elif name in state:  # the weight of a tied LM head
                    state[name].copy_(tensor)
                else:
                    raise ValueError(
                        f"checkpoint: {name} is no weight of the model; it belongs to another model"
                    )
                left.discard(name)
        if left:
            missing = ", ".join(sorted(left)[:3])
            raise ValueError(f"checkpoint: no weights for {missing}; it belongs to another model")

    def _places(self, group: NameGroup, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for each output of a group, where its elements are in the group's weights.

        Places count through the elements of all weights of the group, one after the other.
        """
        places = element_places(self._model, {name: state[name].shape for name in group.names})
        found = torch.cat([place.flatten() for place in places.values()])
        size = sum(state[name].numel() for name in group.names)
        assert torch.equal(found.sort().values, torch.arange(size)), f"{group.names}: not a move"
        return places


def element_places(
    model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return for each tensor of the checkpoint which elements of the weights it consists of.

    Places count through the elements of all weights, one weight after the other. Conversions move
    elements and do not change them, so `to_checkpoint` of numbered elements shows where each goes.

    Args:
        shapes: of weights that can be converted without others, by their names in the model.
    """
    start, numbered = 0, {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        numbered[name] = torch.arange(start, start + size).view(tuple(shape))
        start += size
    return to_checkpoint(model, numbered)


def _smallest_groups(
    model: PreTrainedModel, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[NameGroup]:
    """Return the groups of `weights` that, converted separately, give what is expected."""
    if not weights:
        return []
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layers.setdefault(_layer_of(name), {})[name] = tensor

    by_layer = _converted(model, list(layers.values()))
    if by_layer is None or not _agree(by_layer, expected):
        return [NameGroup(names=tuple(weights), outputs=tuple(expected), renamed=False)]

    groups: list[NameGroup] = []
    for layer, whole in zip(layers.values(), by_layer, strict=True):
        single = [{name: tensor} for name, tensor in layer.items()]
        alone = _converted(model, single)
        parts, outputs = [layer], [whole]
        if alone is not None and _agree(alone, whole):
            parts, outputs = single, alone
        groups += [
            NameGroup(names=tuple(part), outputs=tuple(output), renamed=False)
            for part, output in zip(parts, outputs, strict=True)
        ]
    return groups


def _converted(
    model: PreTrainedModel, parts: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]] | None:
    """Return the conversion of each part; None where one cannot be converted without the others."""
    try:
        return [to_checkpoint(model, part) for part in parts]
    except Exception:  # each conversion refuses an incomplete set in its own way
        return None


def _agree(parts: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> bool:
    """Return whether the parts together have the names and shapes of the whole, each once."""
    shapes = {name: tensor.shape for part in parts for name, tensor in part.items()}
    count = sum(map(len, parts))
    return count == len(whole) and shapes == {name: out.shape for name, out in whole.items()}


def _layer_of(name: str) -> str:
    """Return the name up to its first number, "model.layers.3."; the name itself if it has none."""
    found = re.match(r"(?:.*?\.)?\d+\.", name)
    return found.group() if found else name


def _put(state: Mapping[str, Tensor], names: Sequence[str], places: Tensor, values: Tensor) -> None:
    """Copy `values` to their `places` in the weights `names`; see `CheckpointNames._places`."""
    places, values = places.flatten(), values.flatten()
    start = 0
    for name in names:
        target = state[name].view(-1)
        end = start + len(target)
        inside = (places >= start) & (places < end)
        chosen = values if inside.all() else values[inside]
        index = (places[inside] - start).to(target.device)
        target[index] = chosen.to(target.device, target.dtype)
        start = end


def tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the LM head's weight if it is the embedding's, else nothing."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return frozenset()
    return frozenset(name + ".weight" for name, module in model.named_modules() if module is head)


def untied_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights by the model's names, tied tensors once; of a sharded model, its shards.

    No tensor is copied.
    """
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def buffer_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the saved buffers in the checkpoint, such as the biases of a router."""
    saved = model.state_dict()
    shapes = {
        name: torch.empty(buffer.shape, device="meta", dtype=buffer.dtype)
        for name, buffer in model.named_buffers()
        if name in saved
    }
    return frozenset(to_checkpoint(model, shapes) if shapes else ())


def names_without_mapping(model: PreTrainedModel, directory: Path | str) -> list[str]:
    """Return the stacked weights that `to_checkpoint` exports under names that no file has.

    Stacked weights have three or more dimensions; the files are those of `directory`. Empty where
    it has no safetensors to compare with.
    """
    on_disk = _names_on_disk(Path(directory))
    if not on_disk:
        return []

    # Names do not depend on values: tensors without storage suffice. DeepSpeed's ZeRO 3 leaves
    # empty parameters behind, with the whole shape as an attribute.
    shapes = {
        name: torch.empty(
            getattr(tensor, "ds_shape", tensor.shape), device="meta", dtype=tensor.dtype
        )
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    exported = to_checkpoint(model, shapes)
    return sorted(
        name for name, tensor in exported.items() if tensor.ndim >= 3 and name not in on_disk
    )


def _names_on_disk(directory: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names
