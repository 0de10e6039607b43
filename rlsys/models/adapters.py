"""Low-rank adapters on disk: the layout of PEFT, and their merge into the weights of their base.

    adapter_config.json           PEFT's own: rank, alpha, the layers
    adapter_model.safetensors     A [r, in] and B [out, r] of every layer; heads trained whole
    adapter_base.json             the base: the path that the run was given, a hash of its weights

The merged weight of a layer is W + alpha / r * B A.

**Source**: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1; the layout is that of
`peft.PeftModel.save_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.models.folder_files import FolderFacts
from rlsys.models.saving import copy_model_files

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BASE = "adapter_base.json"

# PEFT's name of the model inside of its wrapper, before every name in the file of weights.
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

# Entries of adapter_config.json that change the formula of the merged weight, where they are set.
_VARIANTS = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Values of init_lora_weights that leave the base as it is; others, such as pissa, change it.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Endings of the names of the two weights that may be tied.
_EMBEDDINGS, _LM_HEAD = ("embed_tokens.weight", "wte.weight"), "lm_head.weight"
_WITH_A_HEAD_OF_ITS_OWN = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The model that adapters belong to."""

    path: str  # in the forms of model.path
    weights: str  # `weights_digest` of its directory

    def write(self, directory: Path) -> None:
        """Write the record beside the adapters."""
        (directory / ADAPTER_BASE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def holds_adapters(directory: Path | str) -> bool:
    """Return whether a directory holds adapters instead of a whole model."""
    return (Path(directory) / ADAPTER_CONFIG).is_file()


def base_path(directory: Path) -> str:
    """Return the path of the base of adapters, in the forms of model.path.

    Raises:
        ValueError: neither we nor PEFT have written one.
    """
    record = _base_record(directory)
    named = record.path if record else _facts(directory).get("base_model_name_or_path")
    if not named:
        raise ValueError(
            f"model.path: {ADAPTER_CONFIG} in {str(directory)!r} names no base model "
            "(base_model_name_or_path). Put its path there, or merge the adapters with PEFT."
        )
    return named


def weights_digest(directory: Path) -> str:
    """Return a short hash of the files with the weights of a model; 1 GB takes about a second."""
    return FolderFacts.of(directory, _weight_files(directory)).digest


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A in float32.

    **Shapes**: weight [out, in], down (A) [r, in], up (B) [out, r].
    """
    return weight.float() + (up.float() @ down.float()) * scale


def merge_adapters(adapters: Path, base: Path, target: Path) -> None:
    """Write the merged model of `adapters` and `base` into the directory `target`.

    Each merged weight is computed in float32 and has the dtype of the base's file; one file of the
    base is in memory at a time. Config and tokenizer are those beside the adapters.

    Raises:
        ValueError: adapters of another kind than plain LoRA, or another base than theirs.
    """
    from safetensors.torch import load_file, save_file

    scale = _scale(adapters)
    check_base(adapters, base)
    saved = load_file(adapters / ADAPTER_WEIGHTS)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}
    layers = {name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)}
    whole = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    if other := sorted(n for n in {*weights} - {*whole} if not n.endswith((DOWN, UP))):
        raise ValueError(
            f"model.path: {other[0]} in {str(adapters)!r} is no adapter of a linear layer. Merge "
            "them with PEFT (merge_and_unload), and give the result."
        )
    replaces_head = _facts(adapters).get("task_type") in _WITH_A_HEAD_OF_ITS_OWN

    target.mkdir(parents=True, exist_ok=True)
    copy_model_files(adapters, target)
    files = _model_weight_files(base)
    if not replaces_head:
        _check_tied(adapters, whole, files)
    places: dict[str, str] = {}
    merged: set[str] = set()
    for number, file in enumerate(files, start=1):
        tensors: dict[str, Tensor] = {}
        for name, tensor in _tensors(file):
            if name in whole or (whole and replaces_head and name.startswith("lm_head.")):
                continue  # what was trained whole replaces that of the base
            layer = _layer_of(name, layers)
            if layer is not None:
                down, up = weights[layer + DOWN], weights[layer + UP]
                tensor = merged_weight(tensor, down, up, scale).to(tensor.dtype)
                merged.add(layer)
            tensors[name] = tensor
        if number == len(files):
            tensors |= whole

        called = "model.safetensors"
        if len(files) > 1:
            called = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, target / called, {"format": "pt"})
        places |= dict.fromkeys(tensors, called)

    missing = sorted(layers - merged)
    if missing:
        raise ValueError(
            f"model.path: the base {str(base)!r} has no weight for the adapters of {missing[0]} in "
            f"{str(adapters)!r}. Merge them with PEFT (merge_and_unload), and give the result."
        )
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def adapter_parameters(directory: Path, lora: LoraConfig) -> int:
    """Estimate the number of parameters of adapters by the shapes in the safetensors headers.

    Conventions: every matrix of a numbered layer counts as a linear layer.
    """
    from safetensors import safe_open

    count = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and _may_be_adapted(name, lora.target_modules):
                    count += lora.rank * sum(shape)
    return count


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Return whether a module's name ends in one of `targets`, as PEFT reads target_modules."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _may_be_adapted(name: str, targets: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    in_a_block = any(part.isdigit() for part in module.split("."))
    return in_a_block and (not targets or is_named(module, targets))


def _facts(adapters: Path) -> dict[str, Any]:
    return json.loads((adapters / ADAPTER_CONFIG).read_text())


def _base_record(adapters: Path) -> AdapterBase | None:
    file = adapters / ADAPTER_BASE
    return AdapterBase(**json.loads(file.read_text())) if file.is_file() else None


def _scale(adapters: Path) -> float:
    """Return alpha / r of plain LoRA; refuse every variant of it."""
    facts = _facts(adapters)
    kind = facts.get("peft_type")
    found = [f"{name}: {facts[name]}" for name in _VARIANTS if facts.get(name)]
    if facts.get("bias", "none") != "none":
        found.append(f"bias: {facts['bias']}")
    if facts.get("init_lora_weights") not in _PLAIN_STARTS:
        found.append(f"init_lora_weights: {facts['init_lora_weights']}")
    if kind != "LORA" or found:
        raise ValueError(
            f"model.path: the adapters in {str(adapters)!r} are not plain LoRA "
            f"({', '.join(found) or kind}). Merge them with PEFT (merge_and_unload), and give the "
            "result."
        )
    return facts["lora_alpha"] / facts["r"]


def check_base(adapters: Path, base: Path) -> None:
    """Refuse a base whose weights are not those that the adapters were trained on.

    Raises:
        ValueError: they differ, by the hash beside the adapters.
    """
    record = _base_record(adapters)
    if record is not None and weights_digest(base) != record.weights:
        raise ValueError(
            f"model.path: the adapters in {str(adapters)!r} were trained on other weights than "
            f"those in {str(base)!r} ({record.path!r} has changed since). Restore that model."
        )


def _check_tied(adapters: Path, whole: Mapping[str, Tensor], base: Sequence[Path]) -> None:
    """Refuse a trained copy of one of two tied weights: the merged model would tie them again.

    Conventions: they are tied where the base has no weight of an LM head.
    """
    trained = [name for name in whole if name.endswith((*_EMBEDDINGS, _LM_HEAD))]
    if not trained or _facts(adapters).get("ensure_weight_tying"):
        return
    if any(name == _LM_HEAD for file in base for name, _ in _tensors(file)):
        return
    first, *others = (whole[name] for name in trained)
    if not others or not all(first.equal(other) for other in others):
        raise ValueError(
            f"model.path: {trained[0]} in {str(adapters)!r} was trained apart from the weight that "
            "it is tied to in the base. Merge them with PEFT (merge_and_unload), untie them in its "
            "config.json (tie_word_embeddings), and give the result."
        )


def _layer_of(name: str, layers: set[str]) -> str | None:
    """Return the adapted layer of a weight in a file of the base; None: it is not adapted.

    Conventions: some files leave out the name of the decoder in front (`h.0` for
    `transformer.h.0`).
    """
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    if module in layers:
        return module
    found = [layer for layer in layers if layer.partition(".")[2] == module]
    return found[0] if len(found) == 1 else None


def _weight_files(directory: Path) -> list[Path]:
    found = sorted(directory.glob("*.safetensors"))
    return found or sorted(directory.glob("pytorch_model*.bin"))


def _model_weight_files(directory: Path) -> list[Path]:
    """Return the files of a model's weights, without other copies of them beside them.

    Repositories of Mistral have consolidated.safetensors beside the files that the index names.
    """
    from rlsys.models.weight_files import INDEX, SINGLE, weight_paths

    if any((directory / name).is_file() for name in (SINGLE, INDEX)):
        return weight_paths(directory)
    return _weight_files(directory)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file of weights."""
    import torch
    from safetensors import safe_open

    if file.suffix == ".bin":
        state: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        yield from ((name, tensor.contiguous()) for name, tensor in state.items())
        return
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
            yield name, tensors.get_tensor(name)
