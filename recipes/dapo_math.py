"""DAPO: Clip-Higher, token-level loss, dynamic sampling and overlong shaping.

    python -m recipes.dapo_math

Source: Yu et al. 2025 (arXiv:2503.14476). The preset `dapo` on `recipes.grpo_math`, and the paper's
length punishment. No KL term. Two mini-batches per batch, so that the second meets ratios other than 1.

The paper's rewards are +1 and -1, less a punishment of at most 1 for length. Here they are 1 and 0,
less half of the punishment: half of the paper's reward plus 1/2, from which the division by the
standard deviation makes the same advantages.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware


def dapo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine; the punishment grows over the last quarter of `generation.max_tokens`."""
    overlong = {
        "name": "soft_overlong",
        "weight": 0.5,
        "parameters": {"max_tokens": None, "buffer_tokens": None},
    }
    return evolve(
        grpo_math(hardware),
        {
            "recipe": "dapo_math",
            "preset": "dapo",
            "reward.functions": [{"name": "math"}, overlong],
        },
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(dapo_math)
