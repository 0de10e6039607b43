"""RLHF from a pretrained model: the pipeline of InstructGPT in one command.

    python -m recipes.rlhf

Source: Ouyang et al. 2022 (arXiv:2203.02155), section 3. Four stages, each with the recipe that
also runs alone:

    sft            recipes.sft_math            fine-tune on demonstrations
    rankings       recipes.make_rankings       rank samples of the fine-tuned model
    reward_model   recipes.reward_model_math   learn a reward from the rankings
    ppo            recipes.ppo_math            PPO-ptx on that reward, with a KL to the tuned model

It differs from Ouyang et al. in two ways: the rankings come from the verifier instead of from
people, so that the whole runs unattended and the result can be checked; and each prompt is sampled
twice.

Flags of a stage begin with its name: --sft.trainer.steps 20 --ppo.algorithm.kl.coefficient 0.02.
Fields without it are those of all stages: --model.path, --data.train, --seed. An interrupted
pipeline continues with --run.directory runs/NAME --resume. docs/rlhf.md has the details.
"""

from recipes.make_rankings import make_rankings
from recipes.ppo_math import ppo_math
from recipes.reward_model_math import reward_model_math
from recipes.sft_math import sft_math
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.config.offline import RewardModelRunConfig, SupervisedRunConfig
from rlsys.config.rankings import RankingsRunConfig
from rlsys.config.rlhf import RlhfRunConfig, SharedDataConfig
from rlsys.config.run import RunConfig


def rlhf(hardware: Hardware) -> RlhfRunConfig:
    """Return the default configuration for this machine."""
    sft = sft_math(hardware)
    return RlhfRunConfig(
        recipe="rlhf",
        model=sft.model,
        data=SharedDataConfig(template=sft.data.template),
        sft=_sft(hardware),
        rankings=_rankings(hardware),
        reward_model=_reward_model(hardware),
        ppo=_ppo(hardware),
    )


def _sft(hardware: Hardware) -> SupervisedRunConfig:
    """Return a short fine-tuning: a model that is always right has no mistakes to rank.

    On the generated problems the format is learned in 6 to 8 steps, and most sums a little later.
    """
    sft = sft_math(hardware)
    if hardware.gpus:
        return sft
    return evolve(
        sft,
        {
            "policy.optimizer.warmup_steps": 2,
            "trainer.steps": 8,
            "trainer.evaluation.every": 8,
            "trainer.checkpoints.every": 4,
        },
    )


def _rankings(hardware: Hardware) -> RankingsRunConfig:
    """Return 4 samples of each problem, as K = 4 to 9 in Ouyang et al."""
    problems = 1000 if hardware.gpus else 320
    return evolve(
        make_rankings(hardware),
        {
            "data.synthetic.train_size": problems,
            "generation.samples_per_prompt": 4,
            "responses": 4,
        },
    )


def _reward_model(hardware: Hardware) -> RewardModelRunConfig:
    """Return some epochs over the rankings, of which a fifth is held out."""
    reward_model = evolve(reward_model_math(hardware), {"data.held_out": 0.2})
    if hardware.gpus:
        return reward_model
    return evolve(
        reward_model,
        {
            "reward_model.optimizer.learning_rate": 1e-4,
            "reward_model.optimizer.warmup_steps": 3,
            "trainer.steps": 30,
            "trainer.examples_per_step": 16,
            "trainer.evaluation.every": 15,
            "trainer.checkpoints.every": 15,
        },
    )


def _ppo(hardware: Hardware) -> RunConfig:
    """Return PPO with few samples of many prompts: its advantages need no groups.

    The critic starts from the reward model, so that it needs a shorter warm-up than a new head.
    """
    rewards = [{"name": "math", "weight": 0.0}, {"name": "model", "weight": 1.0}]
    ppo = evolve(
        ppo_math(hardware),
        {
            "reward.functions": rewards,
            "critic.warmup_steps": 2,
            "ptx.coefficient": 1.0,
            "ptx.train": "synthetic",
            "run.note": None,
        },
    )
    if hardware.gpus:
        return evolve(ppo, {"generation.samples_per_prompt": 2})
    return evolve(
        ppo,
        {
            "generation.samples_per_prompt": 2,
            "generation.max_tokens": 32,
            "ptx.examples_per_step": 8,
            "ptx.eval_limit": 50,
            "trainer.prompts_per_step": 16,
            "trainer.steps": 16,
            "trainer.evaluation.every": 8,
            "trainer.checkpoints.every": 8,
        },
    )


if __name__ == "__main__":
    from recipes.run_rlhf import run_rlhf

    run_rlhf(rlhf)
