"""Hierarchical token-level baselines, off-policy: four mini-batches a rollout batch, ratios and baselines recomputed before each.

    python -m recipes.hierarchical_math

Source: docs/hierarchical_baselines.md. The policy-gradient weight of each token corrects for the policy having moved since it
sampled, less a baseline for each horizon of that correction; the loss is the plain score function. Everything else is that of
`recipes.grpo_math`.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware


def hierarchical_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    return evolve(grpo_math(hardware), {"recipe": "hierarchical_math", "preset": "hierarchical"})


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(hierarchical_math)
