"""What a model does between its last hidden state and its logits, read from its configuration.

Only what is read here is implemented by the packed forward pass. A model that does anything else is
found out by the check in `forward_check` and runs its own padded forward pass.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from rlsys.algorithms.token_logprobs import LogitTransform

# Names under which configurations keep a factor of the logits, and whether it divides them.
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
    """Return scale and softcap of the logits; without either for most models."""
    text = config.get_text_config()
    scale = 1.0
    for name, divides in _SCALES:
        value = getattr(text, name, None)
        if value is not None:
            scale = 1 / value if divides else value

    softcap = next((value for name in _SOFTCAPS if (value := getattr(text, name, None))), None)
    return LogitTransform(scale=scale, softcap=softcap)
