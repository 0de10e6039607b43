"""A reward model from rankings of answers to mathematical problems.

On generated problems, on the CPUs or GPUs of this machine:

    python -m recipes.reward_model_math
    python -m recipes.reward_model_math --data.responses 4

On preference pairs or rankings of your own, from a fine-tuned model:

    python -m recipes.reward_model_math --data.train rankings.parquet --model.path runs/sft/...

Each checkpoint is a Hugging Face model for sequence classification with one label, the reward.
`reward_mean` in its config.json is the mean over the held-out responses, which a reader subtracts.
"""

from rlsys.config import (
    CheckpointConfig,
    EvaluationSchedule,
    ModelConfig,
    OptimizerConfig,
    TrainableRoleConfig,
)
from rlsys.config.hardware import Hardware
from rlsys.config.offline import (
    RankingDataConfig,
    RewardModelRunConfig,
    ScoringTrainerConfig,
)


def reward_model_math(hardware: Hardware) -> RewardModelRunConfig:
    """Return the default configuration for this machine."""
    return on_gpus(hardware) if hardware.gpus else on_cpu(hardware)


def on_cpu(hardware: Hardware) -> RewardModelRunConfig:
    """Return a run of some minutes on two cores."""
    return RewardModelRunConfig(
        recipe="reward_model_math",
        model=ModelConfig(path="smollm2-135m"),
        data=RankingDataConfig(max_prompt_tokens=160, max_response_tokens=256),
        reward_model=TrainableRoleConfig(
            optimizer=OptimizerConfig(learning_rate=1e-4, schedule="linear", warmup_steps=5)
        ),
        trainer=ScoringTrainerConfig(
            steps=80,
            examples_per_step=32,
            evaluation=EvaluationSchedule(every=10),
            checkpoints=CheckpointConfig(every=20, keep=2),
        ),
    )


def on_gpus(hardware: Hardware) -> RewardModelRunConfig:
    """Return a run on all GPUs."""
    return RewardModelRunConfig(
        recipe="reward_model_math",
        model=ModelConfig(path="qwen2.5-math-1.5b"),
        data=RankingDataConfig(
            template="chat_boxed", max_prompt_tokens=1024, max_response_tokens=2048
        ),
        reward_model=TrainableRoleConfig(
            ranks=hardware.gpus,
            microbatch_tokens=16384,
            gradient_checkpointing=True,
            optimizer=OptimizerConfig(learning_rate=1e-5, schedule="linear", warmup_steps=10),
        ),
        trainer=ScoringTrainerConfig(
            steps=200,
            examples_per_step=64,
            evaluation=EvaluationSchedule(every=50),
            checkpoints=CheckpointConfig(every=50),
        ),
    )


if __name__ == "__main__":
    from recipes.run_offline import run_offline

    run_offline(reward_model_math)
