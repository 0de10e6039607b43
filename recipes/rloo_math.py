"""RLOO: leave-one-out baseline, score-function gradient, the KL as a cost in the reward.

    python -m recipes.rloo_math

Source: Ahmadian et al. 2024 (arXiv:2402.14740). Everything else is that of `recipes.grpo_math`. One update a rollout batch: the
score-function gradient has no ratio to correct a second one with.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def rloo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    return grpo_math(hardware).model_copy(
        update={"recipe": "rloo_math", "algorithm": PRESETS["rloo"]}
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(rloo_math)
