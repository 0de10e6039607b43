"""GRPO on mathematics with verifiable answers.

On generated problems, on the CPUs or GPUs of this machine:

    python -m recipes.grpo_math

On your own data, or with another published algorithm (--help lists them):

    python -m recipes.grpo_math --data.train train.parquet --data.template chat_boxed
    python -m recipes.grpo_math --preset gspo

This differs from the preset `grpo`, the algorithm as published: the loss is the mean over all
tokens, so that long responses count by their length (DAPO), and there is no KL, so no reference
model runs.

On a CPU, SmolLM2-135M learns to add and subtract one-digit numbers, given in symbols or in words,
in 60 steps. A step takes three to five times as long on fewer than 8 cores without bfloat16
instructions; the default there is 24 steps, in which most of the learning happens. On a GPU, the
model is Qwen2.5-Math-1.5B.
"""

from rlsys.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RunConfig,
    RunSection,
    TrainerConfig,
)
from rlsys.config.hardware import Hardware


def grpo_math(hardware: Hardware) -> RunConfig:
    """Return the default configuration for this machine."""
    return on_gpus(hardware) if hardware.gpus else on_cpu(hardware)


ENOUGH_CPUS = 8  # for the full number of steps in float32


def on_cpu(hardware: Hardware) -> RunConfig:
    """Return a run of some minutes on two cores: short answers, groups of 8, one update."""
    fast = bool(hardware.bfloat16_instructions) or hardware.cpus >= ENOUGH_CPUS
    steps, every = (60, 20) if fast else (24, 8)
    shortened = (
        f"24 steps instead of 60: {hardware.cpus} CPUs without bfloat16 instructions take several "
        "times as long for each. --trainer.steps 60 trains longer."
    )
    return RunConfig(
        recipe="grpo_math",
        model=ModelConfig(path="smollm2-135m"),
        data=DataConfig(train="synthetic", eval="auto", template="few_shot", max_prompt_tokens=160),
        generation=GenerationConfig(
            samples_per_prompt=8,
            max_tokens=16,
            cpus_per_worker=1 if hardware.cpus > 1 else 0,  # the policy reserves a single core
        ),
        policy=PolicyConfig(optimizer=OptimizerConfig(learning_rate=1e-5)),
        algorithm=AlgorithmConfig(aggregation="token_mean"),
        trainer=TrainerConfig(
            steps=steps,
            prompts_per_step=8,
            evaluation=EvaluationConfig(every=every),
            checkpoints=CheckpointConfig(every=every, keep=2),
        ),
        run=RunSection(note=None if fast else shortened),
    )


def on_gpus(hardware: Hardware) -> RunConfig:
    """Return MATH-style training: half of the GPUs generate, half train; one GPU is shared."""
    shared = hardware.gpus == 1
    ranks = max(1, hardware.gpus // 2)
    return RunConfig(
        recipe="grpo_math",
        model=ModelConfig(path="qwen2.5-math-1.5b"),
        data=DataConfig(
            train="synthetic", eval="auto", template="chat_boxed", max_prompt_tokens=1024
        ),
        generation=GenerationConfig(
            workers=max(1, hardware.gpus - ranks),
            gpus_per_worker=0.5 if shared else 1.0,
            samples_per_prompt=8,
            max_tokens=1024,
            compile=True,
            gpu_memory_utilization=0.4 if shared else 0.85,
        ),
        policy=PolicyConfig(
            ranks=ranks,
            gpus_per_rank=0.5 if shared else 1.0,
            microbatch_tokens=16384,
            logit_chunk_tokens=2048,
            gradient_checkpointing=True,
            optimizer=OptimizerConfig(learning_rate=1e-6),
        ),
        algorithm=AlgorithmConfig(aggregation="token_mean"),
        trainer=TrainerConfig(
            steps=200, prompts_per_step=128, evaluation=EvaluationConfig(every=20)
        ),
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(grpo_math)
