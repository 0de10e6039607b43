"""A model's weights in the smallest parts that can be brought into the form of a checkpoint alone.

`to_checkpoint` and its inverse on one part at a time: nobody has to hold all weights for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsys.models.checkpoint_names import CheckpointNames, element_places
from rlsys.models.tensor_files import TensorFacts
from rlsys.models.weight_files import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadRange = Callable[[int, int], Tensor]  # start, stop -> those elements, in row-major order


@dataclass(frozen=True, kw_only=True)
class ExportUnit:
    """Weights of a model, and the tensors of a checkpoint that they become."""

    weights: tuple[TensorFacts, ...]  # by the names of the model
    exported: tuple[TensorFacts, ...]  # by the names of the checkpoint
    only_renamed: bool  # one weight that becomes one tensor with the same values

    @property
    def num_bytes(self) -> int:
        """Bytes in a file."""
        return sum(facts.num_bytes for facts in self.exported)


def export_units(model: PreTrainedModel, weights: Sequence[TensorFacts]) -> list[ExportUnit]:
    """Divide weights of `model` into units, in their order; see `CheckpointNames`."""
    given = {facts.name: facts for facts in weights}
    names = CheckpointNames(
        model,
        {
            name: torch.empty(facts.shape, device="meta", dtype=facts.dtype)
            for name, facts in given.items()
        },
    )
    return [
        ExportUnit(
            weights=tuple(given[name] for name in group.names),
            exported=tuple(names.exported[name] for name in group.outputs),
            only_renamed=group.renamed,
        )
        for group in names.groups
    ]


def check_weights(units: Iterable[ExportUnit], files: WeightFiles) -> None:
    """Refuse files that lack a weight.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    for facts in (facts for unit in units for facts in unit.exported):
        found = files.tensors.get(facts.name)
        if found is None or found.shape != facts.shape:
            raise ValueError(
                f"checkpoint: {files.directory} has no weight {facts.name} of shape {facts.shape}, "
                "so it belongs to another model. Resume with the model that it was written with."
            )


def readers(
    model: PreTrainedModel, unit: ExportUnit, files: WeightFiles
) -> Mapping[str, ReadRange]:
    """Return for each weight of a unit, by its name in the model, how to read a part of it.

    The files have passed `check_weights`. Of a weight that was only renamed no more than the part
    is read; others are read with their whole unit, here and now.
    """
    if unit.only_renamed:
        name = unit.exported[0].name
        return {unit.weights[0].name: partial(files.read, name)}
    whole = _converted_back(model, unit, files)
    return {name: partial(_range, tensor.reshape(-1)) for name, tensor in whole.items()}


def _range(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat[start:stop]


def _converted_back(
    model: PreTrainedModel, unit: ExportUnit, files: WeightFiles
) -> dict[str, Tensor]:
    """Return the weights of a unit in the form of the model: `to_checkpoint` inverted.

    transformers can invert a conversion only while it loads a whole model.

    Raises:
        ValueError: a conversion does change values.
    """
    sizes = [facts.numel for facts in unit.weights]
    end = sum(sizes)
    moved = element_places(model, {facts.name: facts.shape for facts in unit.weights})

    flat = torch.empty(end, dtype=files.tensors[unit.exported[0].name].dtype)
    seen = torch.zeros(end, dtype=torch.bool)
    for name in list(moved):
        places = moved.pop(name).reshape(-1)
        flat[places] = files.read(name)
        seen[places] = True
    if not seen.all():
        raise ValueError(
            f"checkpoint: the weights {', '.join(facts.name for facts in unit.weights[:3])} cannot "
            "be told from the tensors in the files, so this model cannot be resumed."
        )

    parts = flat.split(sizes)
    return {
        facts.name: part.reshape(facts.shape)
        for facts, part in zip(unit.weights, parts, strict=True)
    }
