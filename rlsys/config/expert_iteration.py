"""The configuration of expert iteration: fine-tuning on the model's own correct responses.

The number of iterations, the problems of each and the responses to each problem are those of an RL
run, under the same names. In the notation of papers and course material:

    n_ei_steps    trainer.steps
    D_b           trainer.prompts_per_step
    G             generation.samples_per_prompt
    epochs        expert.epochs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from rlsys.config.algorithm import WITHOUT_ADVANTAGES
from rlsys.config.data import DataConfig
from rlsys.config.generation import GenerationConfig
from rlsys.config.model_role import TrainableRoleConfig
from rlsys.config.offline import OfflineRunConfig, SupervisedConfig
from rlsys.config.reward import RewardConfig
from rlsys.config.root import CONTRADICTIONS_LATER
from rlsys.config.run import RunConfig
from rlsys.config.section import Section
from rlsys.config.sync import SyncConfig
from rlsys.config.trainer import TrainerConfig


class ExpertConfig(Section):
    """The choice of the responses to learn, and the passes over them."""

    epochs: int = Field(
        default=1, ge=1, description="Passes of fine-tuning over the kept responses of a step."
    )
    examples_per_update: int = Field(
        default=32,
        ge=1,
        description="Responses per optimizer step, at most. In each epoch the kept responses are "
        "shuffled and divided evenly into as few mini-batches of at most this size as possible.",
    )
    deduplicate: bool = Field(
        default=True,
        description="Learn a response once that was sampled several times for one problem in a "
        "step, token by token the same. false: as often as it was sampled.",
    )
    keep_truncated: bool = Field(
        default=True,
        description="Learn correct responses that were truncated at generation.max_tokens, which "
        "have no end token. false: leave them out.",
    )
    max_empty_steps: int = Field(
        default=3,
        ge=0,
        description="End the run with an error after so many steps in a row in which no response "
        "was kept, so that nothing was learned. 0: never.",
    )


class ExpertIterationRunConfig(OfflineRunConfig):
    """Expert iteration on problems with verifiable answers."""

    recipe: str = Field(
        default="expert_iteration_math",
        description="Name of the recipe, used in the name of the run's directory.",
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules that register reward functions; imported in every process.",
    )
    data: DataConfig = Field(default=DataConfig(), description="Problems and prompts.")
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="The generation group."
    )
    sync: SyncConfig = Field(
        default=SyncConfig(),
        description="The transfer of the trained weights to the generation workers.",
    )
    reward: RewardConfig = Field(
        default=RewardConfig(), description="Rewards, which decide what is correct."
    )
    expert: ExpertConfig = Field(
        default=ExpertConfig(), description="The responses to learn, and the passes over them."
    )
    objective: SupervisedConfig = Field(
        default=SupervisedConfig(), description="The loss of an update."
    )
    policy: TrainableRoleConfig = Field(
        default=TrainableRoleConfig(), description="The model that is trained."
    )
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="The training loop.")

    @property
    def longest_response(self) -> int:
        """See `OfflineRunConfig`."""
        return self.generation.max_tokens

    def online(self, *, longest_response: int | None = None) -> RunConfig:
        """See `OfflineRunConfig`; the problems and the training loop are the same too."""
        sections: dict[str, Any] = self.model_dump(include=set(RunConfig.model_fields))
        sections["algorithm"] = WITHOUT_ADVANTAGES.model_dump()
        if longest_response is not None:
            sections["generation"]["max_tokens"] = longest_response
        return RunConfig.model_validate(sections, context=CONTRADICTIONS_LATER)

    def own_contradictions(self) -> Iterator[str]:
        """See `OfflineRunConfig`."""
        size, ranks = self.expert.examples_per_update, self.policy.ranks
        if size < ranks:
            yield (
                f"policy.ranks: {ranks} ranks for the {size} responses of an update. Raise "
                "expert.examples_per_update or lower policy.ranks."
            )
        if self.trainer.max_staleness:
            yield (
                f"trainer.max_staleness: {self.trainer.max_staleness} is for RL runs; expert "
                "iteration samples and learns by turns. Set it to 0."
            )
