"""Direct preference optimization on right and wrong answers to mathematical problems.

On generated problems, on the CPUs or GPUs of this machine:

    python -m recipes.dpo_math

On preference pairs or rankings of your own, from a fine-tuned model:

    python -m recipes.dpo_math --data.train pairs.parquet --model.path runs/sft/...

`recipes.make_rankings` makes such a file from samples of a model. The reference is the model as it
was at the start. Every so many steps the run computes loss, accuracy and margin of the implicit
reward on the held-out pairs, and answers the held-out problems.
"""

from rlsys.config import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    TrainableRoleConfig,
)
from rlsys.config.hardware import Hardware
from rlsys.config.offline import (
    GeneratingEvaluationConfig,
    GeneratingTrainerConfig,
    PreferenceRunConfig,
    RankingDataConfig,
)


def dpo_math(hardware: Hardware) -> PreferenceRunConfig:
    """Return the default configuration for this machine."""
    return on_gpus(hardware) if hardware.gpus else on_cpu(hardware)


def on_cpu(hardware: Hardware) -> PreferenceRunConfig:
    """Return a run of some minutes on two cores."""
    return PreferenceRunConfig(
        recipe="dpo_math",
        model=ModelConfig(path="smollm2-135m"),
        data=RankingDataConfig(max_prompt_tokens=160, max_response_tokens=256),
        policy=TrainableRoleConfig(
            optimizer=OptimizerConfig(learning_rate=2e-5, schedule="linear", warmup_steps=5)
        ),
        generation=EngineConfig(max_tokens=32, cpus_per_worker=1 if hardware.cpus > 1 else 0),
        trainer=GeneratingTrainerConfig(
            steps=40,
            examples_per_step=16,
            evaluation=GeneratingEvaluationConfig(every=10),
            checkpoints=CheckpointConfig(every=20, keep=2),
        ),
    )


def on_gpus(hardware: Hardware) -> PreferenceRunConfig:
    """Return a run on all GPUs, each shared with an engine of the evaluation."""
    return PreferenceRunConfig(
        recipe="dpo_math",
        model=ModelConfig(path="qwen2.5-math-1.5b"),
        data=RankingDataConfig(
            template="chat_boxed", max_prompt_tokens=1024, max_response_tokens=2048
        ),
        policy=TrainableRoleConfig(
            ranks=hardware.gpus,
            gpus_per_rank=0.5,
            microbatch_tokens=16384,
            logit_chunk_tokens=2048,
            gradient_checkpointing=True,
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule="linear", warmup_steps=10),
        ),
        generation=EngineConfig(
            workers=hardware.gpus,
            gpus_per_worker=0.5,
            max_tokens=1024,
            gpu_memory_utilization=0.4,
        ),
        trainer=GeneratingTrainerConfig(
            steps=200,
            examples_per_step=64,
            evaluation=GeneratingEvaluationConfig(every=50, problems=500),
            checkpoints=CheckpointConfig(every=50),
        ),
    )


if __name__ == "__main__":
    from recipes.run_offline import run_offline

    run_offline(dpo_math)
