"""The configuration of `recipes.make_rankings`."""

from typing import Any

from pydantic import Field

from rlsys.config.data import ColumnNames, SyntheticConfig
from rlsys.config.generation import GenerationConfig
from rlsys.config.model import SampledModelConfig
from rlsys.config.reward import RewardConfig
from rlsys.config.root import CONTRADICTIONS_LATER, RootConfig, UnhealedClusterConfig
from rlsys.config.run import RunConfig
from rlsys.config.section import Section


class ProblemSourceConfig(Section):
    """The problems that the model answers."""

    train: str = Field(
        default="synthetic",
        description="Problems: `synthetic` (generated), a .parquet, .jsonl, .json, .csv or .tsv "
        "file, or a Hugging Face data set as id or id:split.",
    )
    columns: ColumnNames = Field(default=ColumnNames(), description="Column names of the files.")
    synthetic: SyntheticConfig = Field(
        default=SyntheticConfig(), description="The embedded problem generator."
    )
    template: str = Field(
        default="plain", description="Prompt template, as in an RL run; plain: the problem itself."
    )
    chat: bool | None = Field(
        default=None,
        description="Wrap prompts in the model's chat template. null: as the template declares.",
    )
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longest prompt, in tokens.")


class RankingsRunConfig(RootConfig):
    """Samples of a model, ranked by their rewards."""

    recipe: str = Field(default="make_rankings", description="Name of the recipe.")
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules that register reward functions; imported in every process.",
    )
    output: str = Field(
        default="rankings.parquet", description="Parquet file to write; it may not exist yet."
    )
    model: SampledModelConfig = Field(  # pyright: ignore
        default=SampledModelConfig(), description="The model that is sampled from."
    )
    data: ProblemSourceConfig = Field(default=ProblemSourceConfig(), description="Problems.")
    responses: int = Field(
        default=4,
        ge=2,
        description="Most responses of a ranking. Of more different samples the best and the worst "
        "are taken in turn.",
    )
    batch: int = Field(default=64, ge=1, description="Problems that are sampled at a time.")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the problems and of sampling; below 2^32."
    )
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="The generation group."
    )
    reward: RewardConfig = Field(default=RewardConfig(), description="Rewards.")
    cluster: UnhealedClusterConfig = Field(  # pyright: ignore
        default=UnhealedClusterConfig(), description="The Ray cluster."
    )

    def online(self) -> RunConfig:
        """Return the RL run with this run's model, engine, rewards and problems."""
        sections: dict[str, Any] = {
            "recipe": self.recipe,
            "plugins": self.plugins,
            "model": self.model.model_dump(),
            "data": {**self.data.model_dump(), "eval": "off"},
            "policy": {"gpus_per_rank": 0, "compute_dtype": "float32"},
            "generation": self.generation.model_dump(),
            "reward": self.reward.model_dump(),
            "trainer": {"seed": self.seed, "prompts_per_step": self.batch},
            "cluster": self.cluster.model_dump(),
        }
        return RunConfig.model_validate(sections, context=CONTRADICTIONS_LATER)
