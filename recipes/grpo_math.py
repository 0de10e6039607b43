"""GRPO on mathematics with verifiable answers.

    python -m recipes.grpo_math                                      the embedded problems, on whatever this machine has
    python -m recipes.grpo_math --data.train train.parquet --data.eval test.parquet --data.template chat_boxed
    python -m recipes.grpo_math --preset gspo                        another published algorithm; --help lists them

Differs from the preset `grpo`, the algorithm as published: the loss is the mean over all tokens, so
that long responses count by their length (DAPO), and there is no KL, so no reference model runs.

On a CPU: SmolLM2-135M learns to answer one-digit sums and differences told in symbols and in words. On a GPU: Qwen2.5-Math-1.5B.
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
    TrainerConfig,
)
from rlsys.config.hardware import Hardware


def grpo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    return on_gpus(hardware) if hardware.gpus else on_cpu(hardware)


def on_cpu(hardware: Hardware) -> RunConfig:
    """A run of a few minutes on two cores: short answers, groups of 8, one update a batch, no reference."""
    return RunConfig(
        recipe="grpo_math",
        model=ModelConfig(path="smollm2-135m"),
        data=DataConfig(train="synthetic", eval="auto", template="few_shot", max_prompt_tokens=160),
        generation=GenerationConfig(dtype="bfloat16", samples_per_prompt=8, max_tokens=16),
        policy=PolicyConfig(
            compute_dtype="bfloat16", optimizer=OptimizerConfig(learning_rate=1e-5)
        ),
        algorithm=AlgorithmConfig(aggregation="token_mean"),
        trainer=TrainerConfig(
            steps=60,
            prompts_per_step=8,
            evaluation=EvaluationConfig(every=20),
            checkpoints=CheckpointConfig(every=20, keep=2),
        ),
    )


def on_gpus(hardware: Hardware) -> RunConfig:
    """MATH-style training: half of the GPUs generate, half train; one GPU is shared."""
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
            dtype="bfloat16",
            samples_per_prompt=8,
            max_tokens=1024,
            compile=True,
            gpu_memory_utilization=0.4 if shared else 0.85,
        ),
        policy=PolicyConfig(
            ranks=ranks,
            gpus_per_rank=0.5 if shared else 1.0,
            compute_dtype="bfloat16",
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
