"""The configuration of an evaluation without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlsys.config.cross_field_rules import contradictions
from rlsys.config.data import DataConfig, SyntheticConfig
from rlsys.config.generation import EngineConfig
from rlsys.config.model import SampledModelConfig
from rlsys.config.reward import RewardConfig
from rlsys.config.root import CONTRADICTIONS_LATER, RootConfig, RunSection, UnhealedClusterConfig
from rlsys.config.run import RunConfig
from rlsys.config.section import Section
from rlsys.config.storage_uri import unsupported_storage

LOWEST_TEMPERATURE = 0.01  # above 0; vLLM's lower limit


class EvaluatedModelConfig(SampledModelConfig):
    """The model that is evaluated."""

    path: str = Field(
        default="smollm2-135m",
        description="Model to evaluate: a name from the catalogue (smollm2-135m, tiny, "
        "qwen2.5-math-1.5b), a Hugging Face Hub id, a local directory in Hugging Face format such "
        "as a checkpoint, a .gguf file, or the directory of a run, of which the newest complete "
        "checkpoint is evaluated.",
    )
    # There is no trainer.
    attention: ClassVar[str] = "auto"  # pyright: ignore


class EvaluationSyntheticConfig(SyntheticConfig):
    """Embedded generator of arithmetic problems."""

    eval_size: int = Field(default=64, ge=1, description="Problems to generate for data.eval.")
    train_size: int = Field(
        default=1000,
        ge=1,
        description="Problems to generate for data.train, where it is synthetic.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the generator. The held-out problems of a training run are those of "
        "its trainer.seed.",
    )


class EvaluationDataConfig(DataConfig):
    """The problems, their prompts, and optionally the training problems to compare them with."""

    eval: str = Field(
        default="synthetic",
        description="Problems to evaluate on: `synthetic` (generated), a .parquet, .jsonl, .json, "
        ".csv or .tsv file, a Hugging Face data set as id or id:split, or `auto`, the problems of "
        "data.train that a training run with the same data.held_out and data.eval_limit holds out.",
    )
    train: str = Field(
        default="off",
        description="Training problems, in the same forms, to find problems of data.eval that "
        "overlap with them (evaluation.overlap_ngram). off: do not look for any.",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="With eval `auto`: the fraction of the distinct problems of train that is held "
        "out, chosen by a hash of their text.",
    )
    synthetic: EvaluationSyntheticConfig = Field(  # pyright: ignore
        default=EvaluationSyntheticConfig(), description="The embedded problem generator."
    )
    eval_limit: int = Field(
        default=500, ge=0, description="Evaluate on the first N problems of eval. 0: on all."
    )
    # Nothing is trained.
    shuffle: ClassVar[bool] = False  # pyright: ignore

    @field_validator("train", mode="before")
    @classmethod
    def _no_training_problems(cls, value: Any) -> Any:
        """Accept false and null, since YAML reads off as false."""
        return "off" if value is None or value is False else value


class EvaluationGenerationConfig(EngineConfig):
    """Engine, its resources, and sampling."""

    samples_per_prompt: int = Field(
        default=4,
        ge=1,
        le=16384,
        description="Responses sampled per problem; at most 16384, vLLM's limit.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="Sampling temperature, 0 or at least 0.01. 0: greedy, one response each.",
    )
    # There is no trainer to compare log-probabilities with.
    logprob_difference_tolerance: ClassVar[None] = None  # pyright: ignore
    probe_every: ClassVar[int] = 1  # pyright: ignore

    @field_validator("temperature")
    @classmethod
    def _greedy_or_not_too_low(cls, value: float) -> float:
        if 0 < value < LOWEST_TEMPERATURE:
            raise ValueError(f"it should be 0 or at least {LOWEST_TEMPERATURE}")
        return value


class EvaluationOptions(Section):
    """What is computed from the responses."""

    pass_at: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        description="Values of k for pass@k, the chance that one of k samples is right, each from "
        "1 to samples_per_prompt. null: the powers of 2, and samples_per_prompt.",
    )
    majority_at: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        description="Values of k for majority@k, the accuracy of the most frequent answer of k "
        "samples, each from 1 to samples_per_prompt. null: samples_per_prompt, from 3 on.",
    )
    by: tuple[str, ...] | None = Field(
        default=None,
        description="Columns of the data by whose values the results are also given. null: level, "
        "subject and type, where the data have them. []: none.",
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="Confidence level of the intervals."
    )
    overlap_ngram: int = Field(
        default=13,
        ge=1,
        description="Length of the n-grams by which problems of data.eval are compared with "
        "data.train, in words, numbers and signs. A shorter problem is compared whole.",
    )
    overlap_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="A problem overlaps with data.train where at least this fraction of its "
        "n-grams occurs there. 0: where one does.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of sampling; below 2^32. The same command gives the same responses with "
        "the transformers engine.",
    )
    prompts_per_part: int = Field(
        default=64,
        ge=1,
        description="Problems sampled at a time. Each part is a Parquet file, which --resume does "
        "not sample again.",
    )


class EvaluationRunConfig(RootConfig):
    """Everything that an evaluation depends on."""

    if TYPE_CHECKING:
        trainer: Any = None  # nothing is trained

    recipe: str = Field(
        default="evaluate_math",
        description="Name of the recipe, used in the name of the run's directory.",
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules that register reward functions; imported in every process.",
    )
    model: EvaluatedModelConfig = Field(  # pyright: ignore
        default=EvaluatedModelConfig(), description="The model that is evaluated."
    )
    compare: str | None = Field(
        default=None,
        description="Second model, in the same forms as model.path. It answers the same prompts "
        "after the first, and is compared with it problem by problem. null: none.",
    )
    data: EvaluationDataConfig = Field(
        default=EvaluationDataConfig(), description="Problems and prompts."
    )
    generation: EvaluationGenerationConfig = Field(
        default=EvaluationGenerationConfig(), description="The generation group."
    )
    reward: RewardConfig = Field(default=RewardConfig(), description="Rewards.")
    evaluation: EvaluationOptions = Field(
        default=EvaluationOptions(), description="What is computed from the responses."
    )
    cluster: UnhealedClusterConfig = Field(  # pyright: ignore
        default=UnhealedClusterConfig(), description="The Ray cluster."
    )
    run: RunSection = Field(default=RunSection(), description="The run's directory and display.")

    @property
    def model_paths(self) -> tuple[tuple[str, str], ...]:
        """The field and the path of each model, in the order of evaluation."""
        first = ("model.path", self.model.path)
        return (first,) if self.compare is None else (first, ("compare", self.compare))

    def sampling_run(self) -> RunConfig:
        """Return the RL run with this engine, these rewards and these problems.

        Workers and checks that training and evaluation share take that. Its fields may contradict
        each other.
        """
        generation = self.generation.model_dump()
        generation["temperature"] = self.generation.temperature or 1.0  # for greedy: not read
        sections = {
            "recipe": self.recipe,
            "plugins": self.plugins,
            "model": self.model.model_dump(),
            "data": self._training_data(),
            "generation": generation,
            # Its precision would be measured like that of the engine.
            "policy": {"compute_dtype": "float32"},
            "reward": self.reward.model_dump(),
            # Rules about the prompts of a step do not concern an evaluation.
            "trainer": {"seed": self.evaluation.seed, "prompts_per_step": 2**16},
            "cluster": self.cluster.model_dump(),
            "run": self.run.model_dump(),
        }
        return RunConfig.model_validate(sections, context=CONTRADICTIONS_LATER)

    def _training_data(self) -> dict[str, Any]:
        """Return the section `data` of `sampling_run`."""
        data = self.data.model_dump()
        del data["synthetic"]["seed"]
        if self.data.train == "off":
            data["train"] = "synthetic"  # not read
        return data

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        """Refuse fields that contradict each other, with one line for each contradiction."""
        if info.context == CONTRADICTIONS_LATER:
            return self
        lines = evaluation_contradictions(self)
        if lines:
            raise PydanticCustomError("mistakes", "{lines}", {"lines": "\n".join(lines)})
        return self


def evaluation_contradictions(config: EvaluationRunConfig) -> list[str]:
    """Return the fields that do not fit together, a line each: field, value and remedy."""
    return [
        *contradictions(config.sampling_run()),
        *_sampling(config),
        *_values_of_k(config),
        *_sources(config),
        *unsupported_storage(config.run.storage, "an evaluation"),
    ]


def _sampling(config: EvaluationRunConfig) -> Iterator[str]:
    generation = config.generation
    if generation.temperature == 0 and generation.samples_per_prompt > 1:
        yield (
            f"generation.samples_per_prompt: {generation.samples_per_prompt} greedy responses to a "
            "problem are all the same. Set it to 1, or generation.temperature above 0."
        )
    if generation.workers > config.evaluation.prompts_per_part:
        yield (
            f"generation.workers: {generation.workers} workers share the "
            f"{config.evaluation.prompts_per_part} problems of a part "
            "(evaluation.prompts_per_part), so some would never sample. Lower it, or raise "
            "evaluation.prompts_per_part."
        )


def _values_of_k(config: EvaluationRunConfig) -> Iterator[str]:
    samples = config.generation.samples_per_prompt
    for name, values in (
        ("pass", config.evaluation.pass_at),
        ("majority", config.evaluation.majority_at),
    ):
        too_large = [k for k in values or () if k > samples]
        if too_large:
            yield (
                f"evaluation.{name}_at: {name}@{too_large[0]} needs as many samples, and "
                f"generation.samples_per_prompt is {samples}. Raise the samples or drop that k."
            )


def _sources(config: EvaluationRunConfig) -> Iterator[str]:
    data = config.data
    if data.eval == "off":
        yield "data.eval: 'off' leaves nothing to evaluate on. Give a source of problems."
    if data.eval == "auto" and data.train == "off":
        yield (
            "data.eval: 'auto' is the held-out part of data.train, which is off. Give data.train a "
            "source, or data.eval a source of its own."
        )
    if data.train == "auto":
        yield "data.train: 'auto' is a value of data.eval. Give a source of problems, or off."
    if data.where and not reads_files(config):
        yield (
            f"data.where: {', '.join(data.where)} filters the rows of files, and data.eval is "
            "generated. Choose its levels with data.synthetic.levels."
        )


def reads_files(config: EvaluationRunConfig) -> bool:
    """Return whether any problems come from a file or a hub data set."""
    sources = (config.data.train, config.data.eval)
    return any(source not in ("off", "auto", "synthetic") for source in sources)
