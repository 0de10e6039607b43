"""Conversion of a module's weights to those of a Hugging Face checkpoint, and back.

transformers holds some weights under other names, and in other shapes, than its checkpoints: the
experts of a mixture are one tensor in memory, and one tensor per projection and expert on disk.
Everything that leaves the trainer (weight sync, saved models) has the names of the checkpoint,
which vLLM, `from_pretrained` and every other program read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
