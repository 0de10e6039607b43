"""REINFORCE: the return times the score, without a baseline.

    python -m recipes.reinforce_math

Source: Williams 1992. Everything else is that of `recipes.grpo_math`. One update a rollout batch: the score-function gradient has
no ratio to correct a second one with.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def reinforce_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    return grpo_math(hardware).model_copy(
        update={"recipe": "reinforce_math", "algorithm": PRESETS["reinforce"]}
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(reinforce_math)
