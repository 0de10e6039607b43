"""Supervised fine-tuning on worked answers to mathematical problems.

On generated problems, on the CPUs or GPUs of this machine:

    python -m recipes.sft_math

On the solutions of MATH, on demonstrations of your own, on conversations or on plain text:

    python -m recipes.sft_math --data.train math.parquet --data.template chat_boxed
    python -m recipes.sft_math --data.train conversations.jsonl

On a CPU, SmolLM2-135M learns to add and subtract one-digit numbers, given in symbols or in words,
in a few minutes. Every so many steps the run computes the held-out loss and answers the held-out
problems.
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
    DemonstrationDataConfig,
    GeneratingEvaluationConfig,
    GeneratingTrainerConfig,
    SupervisedRunConfig,
)


def sft_math(hardware: Hardware) -> SupervisedRunConfig:
    """Return the default configuration for this machine."""
    return on_gpus(hardware) if hardware.gpus else on_cpu(hardware)


def on_cpu(hardware: Hardware) -> SupervisedRunConfig:
    """Return a run of some minutes on two cores."""
    return SupervisedRunConfig(
        recipe="sft_math",
        model=ModelConfig(path="smollm2-135m"),
        data=DemonstrationDataConfig(max_prompt_tokens=160, max_response_tokens=256),
        policy=TrainableRoleConfig(
            optimizer=OptimizerConfig(learning_rate=5e-5, schedule="linear", warmup_steps=5)
        ),
        generation=EngineConfig(max_tokens=32, cpus_per_worker=1 if hardware.cpus > 1 else 0),
        trainer=GeneratingTrainerConfig(
            steps=40,
            examples_per_step=32,
            evaluation=GeneratingEvaluationConfig(every=10),
            checkpoints=CheckpointConfig(every=20, keep=2),
        ),
    )


def on_gpus(hardware: Hardware) -> SupervisedRunConfig:
    """Return fine-tuning on all GPUs, each shared with an engine of the evaluation."""
    return SupervisedRunConfig(
        recipe="sft_math",
        model=ModelConfig(path="qwen2.5-math-1.5b"),
        data=DemonstrationDataConfig(
            template="chat_boxed", max_prompt_tokens=1024, max_response_tokens=2048
        ),
        policy=TrainableRoleConfig(
            ranks=hardware.gpus,
            gpus_per_rank=0.5,
            microbatch_tokens=16384,
            logit_chunk_tokens=2048,
            gradient_checkpointing=True,
            optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=10),
        ),
        generation=EngineConfig(
            workers=hardware.gpus,
            gpus_per_worker=0.5,
            max_tokens=1024,
            gpu_memory_utilization=0.4,
        ),
        trainer=GeneratingTrainerConfig(
            steps=200,
            examples_per_step=128,
            evaluation=GeneratingEvaluationConfig(every=50, problems=500),
            checkpoints=CheckpointConfig(every=50),
        ),
    )


if __name__ == "__main__":
    from recipes.run_offline import run_offline

    run_offline(sft_math)
