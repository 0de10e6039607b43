"""Expert iteration on mathematics: fine-tuning on the model's own correct responses.

On generated problems, on the CPUs or GPUs of this machine:

    python -m recipes.expert_iteration_math

On your own data:

    python -m recipes.expert_iteration_math --data.train train.parquet --data.template chat_boxed

Each step samples responses from the current policy, keeps the correct ones, each once, trains on
them for `expert.epochs` epochs, and goes on with the resulting policy. In the usual notation
n_ei_steps is --trainer.steps, D_b is --trainer.prompts_per_step, and G is
--generation.samples_per_prompt. recipes.expert_iteration_grid runs it over several values of these.

There is no baseline and no ratio: what the policy gets wrong it does not learn from.
"""

from rlsys.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainableRoleConfig,
    TrainerConfig,
)
from rlsys.config.expert_iteration import ExpertConfig, ExpertIterationRunConfig
from rlsys.config.hardware import Hardware


def expert_iteration_math(hardware: Hardware) -> ExpertIterationRunConfig:
    """Return the default configuration for this machine."""
    return on_gpus(hardware) if hardware.gpus else on_cpu(hardware)


def on_cpu(hardware: Hardware) -> ExpertIterationRunConfig:
    """Return a run of some minutes on two cores."""
    return ExpertIterationRunConfig(
        recipe="expert_iteration_math",
        model=ModelConfig(path="smollm2-135m"),
        data=DataConfig(train="synthetic", eval="auto", template="few_shot", max_prompt_tokens=160),
        generation=GenerationConfig(
            samples_per_prompt=4,
            min_tokens=1,
            max_tokens=16,
            cpus_per_worker=1 if hardware.cpus > 1 else 0,  # the policy reserves a single core
        ),
        expert=ExpertConfig(epochs=1, examples_per_update=16),
        policy=TrainableRoleConfig(optimizer=OptimizerConfig(learning_rate=5e-5)),
        trainer=TrainerConfig(
            steps=5,
            prompts_per_step=64,
            evaluation=EvaluationConfig(every=1),
            checkpoints=CheckpointConfig(every=1, keep=2),
        ),
    )


def on_gpus(hardware: Hardware) -> ExpertIterationRunConfig:
    """Return MATH-style training on all GPUs, each shared with an engine."""
    return ExpertIterationRunConfig(
        recipe="expert_iteration_math",
        model=ModelConfig(path="qwen2.5-math-1.5b"),
        data=DataConfig(
            train="synthetic", eval="auto", template="chat_boxed", max_prompt_tokens=1024
        ),
        generation=GenerationConfig(
            workers=hardware.gpus,
            gpus_per_worker=0.5,
            samples_per_prompt=8,
            min_tokens=4,
            max_tokens=1024,
            compile=True,
            gpu_memory_utilization=0.4,
        ),
        expert=ExpertConfig(epochs=2, examples_per_update=64),
        policy=TrainableRoleConfig(
            ranks=hardware.gpus,
            gpus_per_rank=0.5,
            microbatch_tokens=16384,
            logit_chunk_tokens=2048,
            gradient_checkpointing=True,
            optimizer=OptimizerConfig(learning_rate=1e-5),
        ),
        trainer=TrainerConfig(
            steps=5,
            prompts_per_step=512,
            evaluation=EvaluationConfig(every=1),
            checkpoints=CheckpointConfig(every=1, keep=2),
        ),
    )


if __name__ == "__main__":
    from recipes.run_expert_iteration import run_expert_iteration

    run_expert_iteration(expert_iteration_math)
