"""The training loop: number of steps, evaluation and checkpoints."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsys.config.section import Section

OnStale = Literal["drop", "resample", "train"]


class EvaluationSchedule(Section):
    """When to evaluate on held-out data."""

    every: int = Field(
        default=20,
        ge=0,
        description="Evaluate every N steps, and always before the first and after the last step. "
        "0: never.",
    )


class EvaluationConfig(EvaluationSchedule):
    """Evaluation on held-out problems."""

    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        le=16384,
        description="Sampled responses per problem, for mean@k and pass@k. 1: greedy accuracy "
        "only.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.01,
        description="Sampling temperature for mean@k and pass@k, at least 0.01. Greedy accuracy is "
        "always measured too.",
    )
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,),
        min_length=1,
        description="Values of k for pass@k, each from 1 to samples_per_prompt.",
    )


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every: int = Field(
        default=20,
        ge=0,
        description="Save a checkpoint every N steps, and always after the last step. 0: after the "
        "last step only.",
    )
    keep: int = Field(
        default=2, ge=1, description="Number of checkpoints to keep, the newest ones."
    )
    asynchronous: bool = Field(
        default=False,
        description="Write files while training goes on: each rank copies its state into host "
        "memory, which needs as much of it again, and a thread writes from there. The last "
        "checkpoint of a run is written at once. Not with the backend deepspeed "
        "(docs/checkpoints.md).",
    )


MaxRestarts = Annotated[
    int,
    Field(
        ge=0,
        description="Restarts of all actors from the newest checkpoint after the death of one, a "
        "failed process group, exhausted memory or a hang; counted anew at each new checkpoint. "
        "The third failure of one kind at the same step and phase ends the run in any case. 0: the "
        "first failure does.",
    ),
]

PhaseTimeout = Annotated[
    float | None,
    Field(
        gt=0,
        description="Seconds after which a phase of a step counts as hung. null: 10 times the "
        "longest time that it took so far, at least 600; 10800 where it was never measured.",
    ),
]


class AsynchronousConfig(Section):
    """Sampling beside training."""

    on_stale: OnStale = Field(
        default="drop",
        description="What happens to a group that is older than trainer.max_staleness when it is "
        "finished or would be trained, because others were finished before it. drop: it is not "
        "trained, and another prompt takes its place. resample: it is not trained, and its prompt "
        "is sampled again. train: it is trained.",
    )
    update: Literal["drain", "interrupt"] = Field(
        default="drain",
        description="How new weights reach a generation worker. drain: it finishes the groups that "
        "it has under the old weights, and samples the next ones under the new. interrupt, where "
        "responses go on under the new weights, is refused: no engine reports yet which weights "
        "sampled which token.",
    )
    groups_per_call: int = Field(
        default=1,
        ge=1,
        description="Prompts that a worker samples together; it gets others when all are "
        "finished. More of them use an engine that batches better, and delay new weights.",
    )


class LoopConfig(Section):
    """What the training loops of all kinds of runs have in common.

    Each subclass declares these fields in its own order and words.
    """

    if TYPE_CHECKING:
        steps: int
        seed: int
        evaluation: Any  # an `EvaluationSchedule`
        checkpoints: CheckpointConfig
        max_restarts: int
        phase_timeout_s: float | None

    def evaluation_is_due(self, step: int, evaluated_step: int) -> bool:
        """Return whether to evaluate after `step`: before the first, every N steps, after the last.

        An evaluation that was interrupted is still due after a resume.
        """
        every = self.evaluation.every
        if not every or evaluated_step == step:
            return False
        return step % every == 0 or step == self.steps


class TrainerConfig(LoopConfig):
    """The training loop."""

    steps: int = Field(
        default=60,
        ge=1,
        description="Training steps; each samples one rollout batch and trains on it.",
    )
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts per step.")
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Number of weight versions (steps) by which the trained policy may be ahead "
        "of the weights that sampled a group. 0: sampling and training take turns. Above 0 they "
        "run at the same time, on samples that may be stale (docs/asynchronous.md).",
    )
    asynchronous: AsynchronousConfig = Field(
        default=AsynchronousConfig(),
        description="Sampling beside training, for max_staleness above 0.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the data order, of sampling and of new weights; below 2^32.",
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Held-out evaluation."
    )
    checkpoints: CheckpointConfig = Field(default=CheckpointConfig(), description="Checkpoints.")
    save_rollouts_every: int = Field(
        default=1,
        ge=0,
        description="Write the rollouts to Parquet every N steps, and always of the first and the "
        "last step. 0: of these two only.",
    )
    max_restarts: MaxRestarts = 5
    phase_timeout_s: PhaseTimeout = None
