"""Evaluation of a model on problems with verifiable answers, without training.

The embedded model on generated problems:

    python -m recipes.evaluate_math

A hub model, a local directory, a checkpoint, or the newest checkpoint of a run, on your data; with
a second model, both answer the same prompts and are compared problem by problem:

    python -m recipes.evaluate_math --model.path runs/NAME --data.eval test.parquet
    python -m recipes.evaluate_math --model.path smollm2-135m --compare runs/NAME

Each number has a confidence interval over the problems. An evaluation that was interrupted
continues with --run.directory and --resume.
"""

from rlsys.config.evaluation_run import (
    EvaluatedModelConfig,
    EvaluationDataConfig,
    EvaluationGenerationConfig,
    EvaluationRunConfig,
)
from rlsys.config.hardware import Hardware


def evaluate_math(hardware: Hardware) -> EvaluationRunConfig:
    """Return the default configuration: the held-out problems of `recipes.grpo_math`."""
    return EvaluationRunConfig(
        recipe="evaluate_math",
        model=EvaluatedModelConfig(path="smollm2-135m"),
        data=EvaluationDataConfig(eval="synthetic", template="few_shot", max_prompt_tokens=160),
        generation=EvaluationGenerationConfig(
            samples_per_prompt=4,
            temperature=1.0,
            max_tokens=16,
            gpu_memory_utilization=0.85,  # nothing else uses the GPU
        ),
    )


if __name__ == "__main__":
    from recipes.run_evaluation import run_evaluation

    run_evaluation(evaluate_math)
