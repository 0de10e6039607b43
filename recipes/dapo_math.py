"""DAPO: Clip-Higher, token-level loss, dynamic sampling and overlong shaping.

    python -m recipes.dapo_math

Source: Yu et al. 2025 (arXiv:2503.14476). This is the preset `dapo` on `recipes.grpo_math`, with
the paper's overlong penalty. There is no KL term. A batch has two mini-batches, so that the ratios
of the second differ from 1.

The paper's rewards are +1 and -1, minus a penalty of at most 1 for length. Here they are 1 and 0,
minus half of the penalty. That is half of the paper's reward plus 1/2, which gives the same
advantages after the division by the standard deviation.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware


def dapo_math(hardware: Hardware) -> RunConfig:
    """Return `grpo_math` for this machine with the preset `dapo` and the overlong penalty.

    The penalty grows over the last quarter of `generation.max_tokens`.
    """
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
