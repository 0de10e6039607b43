"""The operations between a model's last hidden state and its logits, from its configuration.

The packed forward pass implements the operations that are read here and no others. The check in
`forward_check` detects a model that has others; such a model runs its own padded forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rlsys.algorithms.token_logprobs import LogitTransform
from rlsys.algorithms.vocabulary_kl import LMHead
from rlsys.models.loading import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Names under which configurations keep a factor of the logits, and True where it divides them.
_SCALES = (
    ("logits_scaling", True),  # Granite
    ("logit_scale", False),  # Cohere
    ("lm_head_multiplier", False),  # Falcon-H1
)
_SOFTCAPS = (
    "final_logit_softcapping",  # Gemma 2 and 3, nanochat
    "logits_soft_cap",  # RecurrentGemma
)


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Return scale and softcap of the logits; most models have neither."""
    text = config.get_text_config()

    scale = 1.0
    for name, divides in _SCALES:
        value = getattr(text, name, None)
        if value is not None:
            scale = 1 / value if divides else value

    softcap = None
    for name in _SOFTCAPS:
        value = getattr(text, name, None)
        if value:
            softcap = value
            break
    return LogitTransform(scale=scale, softcap=softcap)


def check_packed_for_exact_kl(role: str, *, packing: bool) -> None:
    """Refuse an exact KL of a model that runs padded: its head may do more than `LMHead` does.

    Raises:
        UnsupportedModelError: names the field, the role and the remedy.
    """
    if not packing:
        raise UnsupportedModelError(
            "algorithm.kl.kind: 'exact' needs the packed forward pass, and the model of the "
            f"{role} runs padded. Choose another kind."
        )


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """Return the LM head of a whole model, with its own weights and without gradient."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), "a causal language model has an LM head"
    bias = None if head.bias is None else head.bias.detach()
    return LMHead(head.weight.detach(), bias, logit_transform(model.config))
