"""The parameters that are trained: all, all but some patterns, or low-rank adapters alone (LoRA).

`prepare` in model_setup chooses them between the check of the forward pass and the sharding. With
LoRA, PEFT puts adapters beside the linear layers of the decoder blocks:

    y = W x + alpha / r * B A x        A [r, in] drawn, B [out, r] 0, both float32; W frozen

A new head of a value model is trained whole beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlsys.models.adapters import (
    ADAPTER_WEIGHTS,
    DOWN,
    PREFIX,
    UP,
    AdapterBase,
    is_named,
    weights_digest,
)
from rlsys.models.loading import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlsys.config import LoraConfig

# PEFT's name of the only adapter.
_ADAPTER = "default"
_BASE = ".base_layer."

_digest_of_base = functools.cache(weights_digest)  # it reads every file, and does not change


class TrainedParametersError(UnsupportedModelError):
    """A choice of trained parameters that does not fit the model."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters of a model, which its module holds."""

    config: LoraConfig
    base: str  # path of the base, in the forms of model.path
    layers: Mapping[str, nn.Module]  # PEFT's layers by the names of the linear layers in them
    targets: tuple[str, ...]  # for PEFT: endings of the names of these layers and of no others
    heads: tuple[str, ...]  # names of the modules that are trained whole
    task: str  # PEFT's task_type

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.config.alpha / self.config.rank

    def trained_names(self) -> dict[str, str]:
        """Return the names in PEFT's file of weights by those in the model's state."""
        names = {}
        for layer in self.layers:
            names[_part(layer, "A")] = f"{PREFIX}{layer}{DOWN}"
            names[_part(layer, "B")] = f"{PREFIX}{layer}{UP}"
        return names

    def saved_names(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the names in PEFT's file by those in the model's state, with the heads'."""
        inside = tuple(f"{head}." for head in self.heads)
        heads = {name: PREFIX + name for name in state if inside and name.startswith(inside)}
        return self.trained_names() | heads


def _part(layer: str, letter: str) -> str:
    return f"{layer}.lora_{letter}.{_ADAPTER}.weight"


def freeze(model: PreTrainedModel, patterns: Sequence[str], *, field: str) -> None:
    """Freeze the parameters whose names match one of `patterns`.

    Raises:
        TrainedParametersError: a pattern matches nothing, or all of them match everything.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in named if fnmatchcase(name, pattern)]
        if not matching:
            examples = ", ".join([*named][:2])
            raise TrainedParametersError(
                f"{field}: {pattern!r} matches no parameter of {type(model).__name__}, such as "
                f"{examples} (tied weights have the first name alone). Correct the pattern."
            )
        for name in matching:
            named[name].requires_grad_(False)

    if not any(parameter.requires_grad for parameter in named.values()):
        raise TrainedParametersError(
            f"{field}: {', '.join(patterns)} match all parameters of {type(model).__name__}, so "
            "nothing would be trained. Leave one out."
        )


def add_adapters(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    lora: LoraConfig,
    *,
    seed: int,
    base: str,
    heads: Sequence[nn.Module] = (),
    runs: PreTrainedModel | None = None,
) -> Adapters:
    """Freeze `model` and put adapters beside its linear layers, in place.

    Args:
        blocks: the decoder blocks, whose linear layers may be adapted.
        seed: of A, which is the same on all ranks.
        base: path of the model, in the forms of model.path.
        heads: modules that are trained whole.
        runs: a copy whose forward pass all ranks run together; None: `model` has its weights.

    Raises:
        TrainedParametersError: `target_modules` names no linear layer of the blocks, or the model
            does not call one as a module, so that its adapter would have no effect.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    chosen = _chosen_layers(model, blocks, lora, names)
    _check_called(runs or model, chosen)
    targets = _targets(model, set(chosen))

    model.requires_grad_(False)
    inject_adapter_in_model(
        PeftLoraConfig(r=lora.rank, lora_alpha=_number(lora.alpha), target_modules=[*targets]),
        model,
        _ADAPTER,
    )
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in chosen}
    _draw(layers, seed)
    for head in heads:
        head.requires_grad_(True)

    return Adapters(
        config=lora,
        base=base,
        layers=layers,
        targets=targets,
        heads=tuple(names[head] for head in heads),
        task=_task(model),
    )


def _chosen_layers(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    lora: LoraConfig,
    names: Mapping[nn.Module, str],
) -> dict[str, nn.Linear]:
    """Return the linear layers that get adapters, by name."""
    inside = dict.fromkeys(module for block in blocks for module in block.modules())
    linear = {names[m]: m for m in inside if isinstance(m, nn.Linear)}
    if not linear:
        raise TrainedParametersError(
            f"model.lora.rank: {lora.rank} needs linear layers (torch.nn.Linear) in the decoder "
            f"blocks of {type(model).__name__}, which has none. Set it to 0, or choose another "
            "model."
        )
    if not lora.target_modules:
        return linear

    for target in lora.target_modules:
        if not any(is_named(name, [target]) for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise TrainedParametersError(
                f"model.lora.target_modules: {target!r} names no linear layer in the decoder "
                f"blocks of {type(model).__name__}. Choose of {known}."
            )
    return {name: m for name, m in linear.items() if is_named(name, lora.target_modules)}


def _targets(model: PreTrainedModel, chosen: set[str]) -> tuple[str, ...]:
    """Return endings of names that PEFT finds in the chosen layers alone; else whole names."""
    endings = tuple(dict.fromkeys(name.rpartition(".")[2] for name in sorted(chosen)))
    found = {name for name, _ in model.named_modules() if is_named(name, endings)}
    return endings if found == chosen else tuple(sorted(chosen))


@torch.no_grad()
def _check_called(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse layers whose weights the model reads without calling them: adapters would do nothing.

    Conventions: of layers whose names differ in numbers only, such as experts, one call is enough.
    """
    called: set[str] = set()

    def remember(name: str) -> Callable[..., None]:
        return lambda *_: called.add(_without_numbers(name))

    layers = {name: model.get_submodule(name) for name in names}
    hooks = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()]
    try:
        tokens = torch.arange(1, 9, device=model.device)[None]
        model.get_decoder()(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    silent = [name for name in layers if _without_numbers(name) not in called]
    if silent:
        ending = silent[0].rpartition(".")[2]
        raise TrainedParametersError(
            f"model.lora.target_modules: {type(model).__name__} reads the weight of {silent[0]} "
            f"without calling the layer, so an adapter would have no effect. Leave out {ending!r}."
        )


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@torch.no_grad()
def _draw(layers: Mapping[str, nn.Module], seed: int) -> None:
    """Draw A as PEFT does, U(-1/sqrt(in), 1/sqrt(in)), and set B to 0; both in float32."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        parts = dict(layer.named_parameters())
        down, up = (parts[_part(name, letter).removeprefix(f"{name}.")] for letter in "AB")
        bound = down.shape[1] ** -0.5
        drawn = torch.empty(down.shape).uniform_(-bound, bound, generator=generator)
        # Beside a weight without storage PEFT leaves them without one; sharding moves them then.
        device = torch.device("cpu") if down.is_meta else down.device
        values = {"A": drawn.to(device), "B": torch.zeros(up.shape, device=device)}
        for letter, value in values.items():
            part = layer.get_submodule(f"lora_{letter}.{_ADAPTER}")
            part.weight = nn.Parameter(value)


def _task(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "TOKEN_CLS" if name.endswith("ForTokenClassification") else "CAUSAL_LM"


def _number(alpha: float) -> Any:
    """Return a whole number as an int, which is PEFT's type of alpha."""
    return int(alpha) if alpha == int(alpha) else alpha


@contextmanager
def adapters_off(adapters: Adapters | None) -> Iterator[None]:
    """Compute with the base alone, inside of the context."""
    assert adapters is not None, "a policy without adapters has a reference model of its own"
    # PEFT's `enable_adapters` would also change `requires_grad`, of parameters that are sharded.
    for layer in adapters.layers.values():
        setattr(layer, "_disable_adapters", True)  # noqa: B010  (an attribute of PEFT's layer)
    try:
        yield
    finally:
        for layer in adapters.layers.values():
            setattr(layer, "_disable_adapters", False)  # noqa: B010


@dataclass(frozen=True, kw_only=True)
class AdapterParts:
    """The adapter of one layer; sharded, where its model is."""

    down: Tensor  # A [r, in]
    up: Tensor  # B [out, r]
    scale: float


@dataclass(frozen=True, kw_only=True)
class ExportedWeight:
    """A weight that leaves the trainer: the model's own, and what is merged into it."""

    stored: Tensor
    adapter: AdapterParts | None


def exported_weights(
    state: Mapping[str, Tensor], adapters: Adapters | None
) -> dict[str, ExportedWeight]:
    """Return a model's weights by their names without adapters.

    Args:
        state: of the model, which may have adapters; tied tensors once.
    """
    if adapters is None:
        return {name: ExportedWeight(stored=one, adapter=None) for name, one in state.items()}

    parts = adapters.trained_names()
    found: dict[str, ExportedWeight] = {}
    for name, stored in state.items():
        if name in parts:
            continue
        layer, _, kind = name.rpartition(_BASE)
        is_adapted = layer in adapters.layers
        adapter = None
        if is_adapted and kind == "weight":
            down, up = (state[_part(layer, letter)] for letter in "AB")
            adapter = AdapterParts(down=down, up=up, scale=adapters.scale)
        plain = f"{layer}.{kind}" if is_adapted else name
        found[plain] = ExportedWeight(stored=stored, adapter=adapter)
    return found


def write_adapters(
    adapters: Adapters, weights: Mapping[str, Tensor], source: Path, target: Path
) -> None:
    """Write adapters in PEFT's layout.

    Args:
        weights: whole, by the names of `Adapters.saved_names`.
        source: the directory of the base.
        target: the directory to write to.
    """
    from peft import LoraConfig as PeftLoraConfig
    from safetensors.torch import save_file

    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, target / ADAPTER_WEIGHTS, {"format": "pt"})
    PeftLoraConfig(
        task_type=adapters.task,
        base_model_name_or_path=str(source),
        inference_mode=True,
        r=adapters.config.rank,
        lora_alpha=_number(adapters.config.alpha),
        target_modules=[*adapters.targets],
        modules_to_save=[*adapters.heads] or None,
    ).save_pretrained(str(target))
    AdapterBase(path=adapters.base, weights=_digest_of_base(source)).write(target)


def saved_adapters(
    adapters: Adapters, state: Mapping[str, Tensor], directory: Path
) -> dict[str, Tensor]:
    """Return what `write_adapters` wrote, by the names of the model's state.

    Raises:
        ValueError: the checkpoint has no adapters, or those of other layers or another rank.
    """
    from safetensors.torch import load_file

    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ValueError(
            f"model.lora.rank: {adapters.config.rank}, but {directory} holds a whole model and no "
            f"adapters. Resume with --model.lora.rank 0, or start a new run with --model.path "
            f"{directory}."
        )
    saved = load_file(file)
    names = adapters.saved_names(state)
    if set(saved) != set(names.values()):
        other = sorted(set(saved) ^ set(names.values()))[0]
        raise ValueError(
            f"model.lora: the adapters in {directory} are those of other layers (such as {other}). "
            "Resume with the settings that they were written with."
        )
    for name, called in names.items():
        shape, expected = tuple(saved[called].shape), tuple(state[name].shape)
        if shape != expected:
            raise ValueError(
                f"model.lora.rank: {name} in {directory} has the shape {shape} instead of "
                f"{expected}. Resume with the rank that it was written with."
            )
    return {name: saved[called] for name, called in names.items()}


def describe_trained(model: nn.Module, adapters: Adapters | None) -> list[str]:
    """Return a note on the parameters that are trained; none where all are."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    if trained == total:
        return []
    of = f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters are trained"
    if adapters is None:
        return [of]
    heads = f", and {', '.join(adapters.heads)}" if adapters.heads else ""
    layers = len(adapters.layers)
    return [f"{of}: adapters of rank {adapters.config.rank} on {layers} layers{heads}"]
