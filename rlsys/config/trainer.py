"""The loop: how many steps, how often to evaluate and to save."""

from typing import Annotated

from pydantic import Field

from rlsys.config.section import Section


class EvaluationConfig(Section):
    every: int = Field(
        default=20,
        ge=0,
        description="Evaluate after each so many steps, and before the first and after the last. 0: never.",
    )
    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        le=16384,
        description="Sampled responses a problem for mean@k and pass@k. 1: greedy accuracy only.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.01,
        description="Temperature of those samples, at least 0.01; greedy accuracy is always measured too.",
    )
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,),
        min_length=1,
        description="Each k of pass@k, from 1 to samples_per_prompt.",
    )


class CheckpointConfig(Section):
    every: int = Field(
        default=20,
        ge=0,
        description="Save after each so many steps, and after the last. 0: after the last only.",
    )
    keep: int = Field(default=2, ge=1, description="Newest checkpoints kept.")


class TrainerConfig(Section):
    steps: int = Field(default=60, ge=1, description="Training steps: rollout batches.")
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts (groups) of one step.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of data order, sampling and initial weights; below 2^32.",
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Held-out evaluation."
    )
    checkpoints: CheckpointConfig = Field(default=CheckpointConfig(), description="Checkpoints.")
    save_rollouts_every: int = Field(
        default=1,
        ge=0,
        description="Write the rollouts of each so many steps as Parquet. 0: first and last only.",
    )

    def evaluation_is_due(self, step: int, evaluated_step: int) -> bool:
        """Return whether an evaluation belongs after `step`: before the first step, every N steps and after the last.

        An evaluation that was abandoned is still due after a resume.
        """
        every = self.evaluation.every
        if not every or evaluated_step == step:
            return False
        return step % every == 0 or step == self.steps
