"""PPO with a critic on mathematics with verifiable answers.

    python -m recipes.ppo_math

Source: Schulman et al. 2017 (arXiv:1707.06347), Ouyang et al. 2022 (arXiv:2203.02155). This is the
preset `ppo` on `recipes.grpo_math`: clip, GAE with lambda 0.95, whitened advantages, clipped
values, and the KL to the initial model in the reward of each token. docs/ppo.md compares it with
the estimators that need no critic.

It differs from Ouyang et al. in two ways: the critic starts from the policy's model with a new head
instead of from a reward model, and so it is trained alone for the first steps; and there is one
epoch per batch, since a step here samples anew in less time than an update takes.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware


def ppo_math(hardware: Hardware) -> RunConfig:
    """Return `grpo_math` for this machine with the preset `ppo`.

    The critic learns faster than the policy: its targets are plain regression targets, and the
    policy's advantages are only as good as its values.
    """
    grpo = grpo_math(hardware)
    rate = grpo.policy.optimizer.learning_rate
    return evolve(
        grpo,
        {
            "recipe": "ppo_math",
            "preset": "ppo",
            "critic.optimizer.learning_rate": 5 * rate,
            "critic.warmup_steps": 5,
            "trainer.steps": grpo.trainer.steps + 5,
        },
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(ppo_math)
