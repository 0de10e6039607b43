"""Models with a scalar head per token: critics and reward models, in the layout of transformers.

Such a model is a decoder with a linear head of one output. On disk it is an
`AutoModelForTokenClassification` or `AutoModelForSequenceClassification` with one label. Both
apply the head to every position; they differ in what their own forward pass returns (the values of
all positions, or that of the last one) and in the bias of the head.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rlsys.models.loading import (
    UnsupportedModelError,
    end_token_ids,
    load_tokenizer,
    load_with_attention,
)
from rlsys.models.saving import change_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ValueLayout = Literal["token", "sequence"]
ValueRole = Literal["critic", "reward_model", "process_reward_model"]

# The entry of config.json that tells what the values of a model are. The layout alone does not: a
# model that starts from another keeps its layout, and some types of models have only one.
VALUE_ROLE = "value_role"

_SUFFIXES: Mapping[ValueLayout, str] = {
    "token": "ForTokenClassification",
    "sequence": "ForSequenceClassification",
}


def saved_value_layout(directory: Path | str) -> ValueLayout | None:
    """Return the layout of a model that has a scalar head; None for one without, a language model.

    Raises:
        UnsupportedModelError: its head has several outputs.
    """
    facts = _facts(directory)
    architecture = _architecture(facts)
    for layout, suffix in _SUFFIXES.items():
        if architecture.endswith(suffix):
            _check_one_label(facts, architecture)
            return layout
    return None


def _has_class(kind: str | None, layout: ValueLayout) -> bool:
    """Return whether transformers has a class of this layout for a type of model."""
    from transformers.models.auto import modeling_auto

    kinds: Mapping[ValueLayout, Mapping[str, Any]] = {
        "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    return kind in kinds[layout]


def _facts(directory: Path | str) -> dict[str, Any]:
    return json.loads((Path(directory) / "config.json").read_text())


def _architecture(facts: Mapping[str, Any]) -> str:
    return (facts.get("architectures") or [""])[0]


def _check_one_label(facts: Mapping[str, Any], architecture: str) -> None:
    # Without the entry transformers assumes two labels.
    labels = facts.get("num_labels") or len(facts.get("id2label") or ("", ""))
    if labels != 1:
        raise UnsupportedModelError(
            f"{architecture} has {labels} labels, and a value is one number. Choose a reward "
            "model with one label, or a language model, which gets a new head."
        )


def value_layout(directory: Path | str, *, prefer: ValueLayout = "token") -> ValueLayout:
    """Return the layout in which the model of `directory` is loaded as a value model.

    A model with a head keeps its layout. A new head is of the layout `prefer`, or of the other one
    where transformers has no class of that layout for this type of model.

    Raises:
        UnsupportedModelError: transformers has neither, or the head has several outputs.
    """
    saved = saved_value_layout(directory)
    if saved is not None:
        return saved

    kind = _facts(directory).get("model_type")
    other: ValueLayout = "sequence" if prefer == "token" else "token"
    for layout in (prefer, other):
        if _has_class(kind, layout):
            return layout
    raise UnsupportedModelError(
        f"transformers has no model of type {kind!r} with a head for values (neither "
        "ForTokenClassification nor ForSequenceClassification). Choose another type of model, "
        "such as Llama or Qwen."
    )


def check_reward_head(directory: Path | str) -> None:
    """Refuse a model that is no reward model with one label.

    Raises:
        UnsupportedModelError: it is a language model, a critic, a process reward model, or its head
            has several outputs.
    """
    saved = saved_value_layout(directory)
    if saved is None:
        raise UnsupportedModelError(
            "it is a reward model without a head. Give one that is saved as "
            "ForSequenceClassification with one label, as recipes.reward_model_math trains it."
        )
    facts = _facts(directory)
    role = facts.get(VALUE_ROLE)
    if role == "process_reward_model":
        raise UnsupportedModelError(
            "it is a process reward model, whose values judge the steps of a response and not the "
            "whole. Name the reward process_model, or give a reward model of whole responses, as "
            "recipes.reward_model_math trains it."
        )
    if role == "critic":
        raise UnsupportedModelError(
            "it is a critic, whose values are no rewards. Give a reward model, as "
            "recipes.reward_model_math trains it."
        )
    if saved == "token" and _has_class(facts.get("model_type"), "sequence"):
        raise UnsupportedModelError(
            "it is saved as ForTokenClassification, as a critic is, whose values are no rewards. "
            "Give a model that is saved as ForSequenceClassification with one label, or name the "
            "reward process_model where the values judge steps."
        )


def check_process_reward_head(directory: Path | str) -> None:
    """Refuse a model that is no process reward model with one label.

    Raises:
        UnsupportedModelError: it is a language model, a critic, a reward model of whole responses,
            or its head has several outputs.
    """
    remedy = "Give a process reward model, as recipes.process_reward_model_math trains it."
    whole = f"Name the reward 'model' where the response is to be scored as a whole. {remedy}"
    saved = saved_value_layout(directory)
    if saved is None:
        raise UnsupportedModelError(
            "it is a process reward model without a head. Give one that is saved as "
            "ForTokenClassification with one label, as recipes.process_reward_model_math trains it."
        )
    facts = _facts(directory)
    role = facts.get(VALUE_ROLE)
    if role == "critic":
        raise UnsupportedModelError(f"it is a critic, whose values are no rewards. {remedy}")
    if role == "reward_model":
        raise UnsupportedModelError(
            f"it is a reward model, whose value judges a whole response and not its steps. {whole}"
        )
    if saved == "sequence" and _has_class(facts.get("model_type"), "token"):
        raise UnsupportedModelError(
            "it is saved as ForSequenceClassification, as a reward model of whole responses is. "
            f"{whole}"
        )


def check_layout_to_train(directory: Path | str, layout: ValueLayout) -> None:
    """Refuse to start from a model with a head of the other layout, which it would keep.

    Raises:
        UnsupportedModelError: it has one, and its type of model could have `layout`; its head has
            several outputs.
    """
    saved = saved_value_layout(directory)
    kind = _facts(directory).get("model_type")
    if saved is not None and saved != layout and _has_class(kind, layout):
        raise UnsupportedModelError(
            f"it is saved as {_SUFFIXES[saved]}, and this recipe trains a model that is saved as "
            f"{_SUFFIXES[layout]}. Start from a language model, or from a model of that kind."
        )


def check_has_lm_head(directory: Path | str) -> None:
    """Refuse a model with a head for values instead of one for tokens.

    transformers would load its decoder and draw a new head for tokens.

    Raises:
        UnsupportedModelError: it has a head for values.
    """
    architecture = _architecture(_facts(directory))
    if architecture.endswith(tuple(_SUFFIXES.values())):
        raise UnsupportedModelError(
            f"it is saved as {architecture}, as reward models and critics are, and has no head for "
            "tokens. Give a language model."
        )


def load_value_model(
    directory: Path | str,
    *,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    prefer: ValueLayout = "token",
    head_seed: int | None = None,
) -> PreTrainedModel:
    """Load a model with a scalar head onto the CPU, in evaluation mode.

    The directory holds such a model, or a language model, whose LM head is left out.

    Args:
        attention: see `load_causal_lm`.
        prefer: the layout of a new head.
        head_seed: seed of a new head's weights, the same on every rank; None: they are 0, and so
            is every value before the first update.

    Raises:
        UnsupportedModelError: the weights are of another model, or see `value_layout`.
    """
    import transformers

    layout = value_layout(directory, prefer=prefer)
    classes: Mapping[ValueLayout, Any] = {
        "token": transformers.AutoModelForTokenClassification,
        "sequence": transformers.AutoModelForSequenceClassification,
    }
    has_head = saved_value_layout(directory) is not None
    config = transformers.AutoConfig.from_pretrained(
        directory, num_labels=1, trust_remote_code=trust_remote_code
    )

    def load(kernel: str) -> PreTrainedModel:
        with _quiet_transformers():
            model, report = classes[layout].from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation=kernel,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        if _has_new_head(model, report["missing_keys"], has_head=has_head):
            _fill_head(value_head(model), head_seed)
        return model.eval()

    return load_with_attention(load, config, attention)


def _has_new_head(model: PreTrainedModel, missing: Any, *, has_head: bool) -> bool:
    """Return whether the checkpoint lacks the head; refuse one that lacks any other weight."""
    head = value_head(model)
    own = {name for name, module in model.named_modules() if module is head}
    new = {name for name in missing if name.rpartition(".")[0] in own}
    absent = sorted(missing if has_head else set(missing) - new)
    if absent:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the checkpoint has no weights for {', '.join(absent[:3])}. "
            "Choose a complete model."
        )
    return bool(new)


def _fill_head(head: nn.Linear, seed: int | None) -> None:
    """Set a new head to 0, or draw its weights.

    Drawn weights are normal with variance 1 / (width + 1), as in Stiennon et al. 2020
    (arXiv:2009.01325). Unlike a head of 0 they give the decoder a gradient from the first update
    on.
    """
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    if seed is None:
        return

    generator = torch.Generator().manual_seed(seed)
    deviation = (head.in_features + 1) ** -0.5
    weights = torch.randn(head.weight.shape, generator=generator) * deviation
    with torch.no_grad():
        head.weight.copy_(weights)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Leave out the report that the head is new and the LM head not used: both are intended."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def value_head(model: PreTrainedModel) -> nn.Linear:
    """Return the head of a value model: the linear layer of one output beside its decoder.

    Raises:
        UnsupportedModelError: there is none, or the model has other layers beside its decoder.
    """
    found = [module for _, module in model.named_children() if isinstance(module, nn.Linear)]
    if len(found) != 1 or found[0].out_features != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear head of one output on its last hidden state. "
            "Choose another type of model."
        )
    return found[0]


def value_config_fields(model: PreTrainedModel) -> dict[str, Any]:
    """Return the entries of config.json by which transformers finds a head of one output."""
    return {
        "architectures": [type(model).__name__],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def separate_padding(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Give a saved sequence classifier a padding token that is not an end token.

    transformers reads such a model at the last token that is not padding. Where the padding token
    is an end token, as in many language models, that would be the token before the end of the
    response, and the reward would be another one.

    Conventions: the first special token that ends no response becomes the padding token of model
    and tokenizer. Where there is none, the model has no padding token, and transformers takes
    single sequences only.
    """
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    ends = end_token_ids(directory, tokenizer)
    facts = _facts(directory)
    if facts.get("pad_token_id") not in ends | {None}:
        return

    special = sorted(
        (number, token.content)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number not in ends
    )
    number, text = special[0] if special else (None, None)
    change_json(directory / "config.json", {"pad_token_id": number})
    change_json(directory / "tokenizer_config.json", {"pad_token": text})
    older = directory / "special_tokens_map.json"
    if older.exists():
        change_json(older, {"pad_token": text})
