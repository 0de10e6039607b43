"""Hierarchical token-level baselines, off-policy.

    python -m recipes.hierarchical_math

A rollout batch is split into four mini-batches. Before each of them, ratios and baselines are
computed again with the live policy. The weight of a token's score is the reward times the
importance ratio, minus a baseline for each horizon of that ratio. The loss is the plain policy
gradient with these weights. Everything else is as in `recipes.grpo_math`.

Source: docs/hierarchical_baselines.md.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware


def hierarchical_math(hardware: Hardware) -> RunConfig:
    """Return `grpo_math` for this machine with the preset `hierarchical`."""
    return evolve(grpo_math(hardware), {"recipe": "hierarchical_math", "preset": "hierarchical"})


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(hierarchical_math)
