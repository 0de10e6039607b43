"""Files of saved models: new ones, and those inherited from where a model was loaded from."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.models.catalogue import MANIFEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_SUFFIXES = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"),
        *(".npz", ".shard"),
    }
)
# model.safetensors.index.json, pytorch_model.bin.index.fp16.json and the like, and weights beside
# an ONNX graph.
WEIGHT_NAMES = re.compile(r".*\.index\.(\w+\.)?json|.*\.onnx_data.*")
# Written by the model catalogue, or by a checkpoint of another run that the model comes from. With
# a description of adapters transformers would look for them beside the merged weights.
STATE_FILES = frozenset(
    {
        "adapter_config.json",
        "adapter_base.json",
        MANIFEST,
        "manifest.json",
        "trainer_state.json",
        "policy_state.json",
        "critic_state.json",
        "reward_model_state.json",
        "optimizer_shards.json",
    }
)


def save_new_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write a model and its tokenizer into `directory`, as transformers does."""
    # accelerate imports DeepSpeed to recognise its engine, which warns where there is no GPU.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    finally:
        logging.disable(before)


def copy_model_files(source: Path, target: Path) -> None:
    """Copy everything of a model directory but weights.

    That is the config, the tokenizer in any format, Python code, templates, licences and
    subdirectories.

    Conventions: hidden files, compiled Python and the state of other runs are not copied, nor is a
    subdirectory with such a state, the critic of a checkpoint; where `target` lies inside `source`,
    neither is the subdirectory that holds it.
    """
    source = source.absolute()
    target = target.absolute()
    own = target.relative_to(source).parts[0] if target.is_relative_to(source) else None

    for file in _without_other_models(source):
        relative = file.relative_to(source)
        if relative.parts[0] != own and _belongs_to_a_model(relative):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)


def model_files(directory: Path) -> list[Path]:
    """Return the files that loading a model needs: what `copy_model_files` copies, and weights.

    Conventions: where there are safetensors at the top, weights in other formats are left out, as
    transformers leaves them out. The optimizer of a checkpoint is no part of its model.
    """
    files = _without_other_models(directory)
    suffixes = {".safetensors"} if any(directory.glob("*.safetensors")) else {".bin"}
    return [
        file
        for file in files
        if _belongs_to_a_model(file.relative_to(directory)) or _is_weight(file, suffixes)
    ]


def _is_weight(file: Path, suffixes: set[str]) -> bool:
    """Return whether a file has weights of these formats, or is their index."""
    is_index = bool(WEIGHT_NAMES.fullmatch(file.name)) and file.suffix == ".json"
    return file.suffix in suffixes or is_index


def _without_other_models(directory: Path) -> list[Path]:
    """Return the files below a directory without those of a second model, such as a critic."""
    others = {file.parent for file in directory.glob("*/*_state.json") if file.name in STATE_FILES}
    return [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not others & {*file.parents}
    ]


def change_model_config(directory: Path, fields: Mapping[str, Any]) -> None:
    """Set entries of the config.json in `directory`."""
    change_json(directory / "config.json", fields)


def change_json(file: Path, fields: Mapping[str, Any]) -> None:
    """Set entries of a JSON file."""
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | dict(fields), indent=2) + "\n")


def _belongs_to_a_model(relative: Path) -> bool:
    if any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
        return False
    if relative.name in STATE_FILES or WEIGHT_NAMES.fullmatch(relative.name):
        return False
    return relative.suffix not in WEIGHT_SUFFIXES
