"""Configurations of the runs that train on examples instead of their own samples.

    SupervisedRunConfig     fine-tuning on demonstrations (SFT), or on plain text
    PreferenceRunConfig     direct preference optimization (DPO) on ranked responses
    RewardModelRunConfig    a reward model from ranked responses
    ProcessRewardModelRunConfig   a reward model from labelled steps

Expert iteration, which samples its examples, has its own in `rlsys.config.expert_iteration`. Each
has the options that have an effect in it, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlsys.config.cross_field_rules import contradictions
from rlsys.config.data import DataConfig, FilterValue, SyntheticConfig
from rlsys.config.generation import EngineConfig
from rlsys.config.model import ModelConfig
from rlsys.config.model_role import ModelRoleConfig, ReferenceConfig, TrainableRoleConfig
from rlsys.config.reward import RewardConfig
from rlsys.config.root import CONTRADICTIONS_LATER, ClusterConfig, RootConfig, RunSection
from rlsys.config.run import RunConfig
from rlsys.config.section import Section
from rlsys.config.sync import SyncConfig
from rlsys.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    EvaluationSchedule,
    LoopConfig,
    MaxRestarts,
    PhaseTimeout,
)


class ExampleColumns(Section):
    """Names of the columns of a data file. null: recognized by the usual names."""

    messages: str | None = Field(
        default=None,
        description="Column of whole conversations with the assistant's turns. null: messages.",
    )
    prompt: str | None = Field(
        default=None,
        description="Column of the prompt: its text, or chat messages. null: prompt, problem or "
        "question.",
    )
    response: str | None = Field(
        default=None,
        description="Column of the response to learn. null: completion, response or solution.",
    )
    text: str | None = Field(
        default=None,
        description="Column of plain text, of which every token is learned. null: text.",
    )
    answer: str | None = Field(
        default=None,
        description="Column of the ground-truth answer, for held-out accuracy. null: answer, where "
        "there is one.",
    )
    id: str | None = Field(
        default="id",
        description="Column of a unique id. null, or not in the file: the row number is the id.",
    )


class RankingColumns(Section):
    """Names of the columns of a data file. null: recognized by the usual names."""

    prompt: str | None = Field(
        default=None,
        description="Column of the prompt: its text, or chat messages. null: prompt, problem or "
        "question; where there is none, chosen and rejected are whole conversations.",
    )
    chosen: str | None = Field(
        default=None, description="Column of the better response of a pair. null: chosen."
    )
    rejected: str | None = Field(
        default=None, description="Column of the worse response of a pair. null: rejected."
    )
    responses: str | None = Field(
        default=None,
        description="Column of a list of responses, at least 2. null: responses.",
    )
    ranks: str | None = Field(
        default=None,
        description="Column of the list of their ranks: 0 is best, equal ranks are a tie. null: "
        "ranks, or, where there is none, the responses are listed best first.",
    )
    answer: str | None = Field(
        default=None,
        description="Column of the ground-truth answer, for held-out accuracy. null: answer, where "
        "there is one.",
    )
    id: str | None = Field(
        default="id",
        description="Column of a unique id. null, or not in the file: the row number is the id.",
    )


class StepColumns(Section):
    """Names of the columns of a data file. null: recognized by the usual names."""

    prompt: str | None = Field(
        default=None,
        description="Column of the prompt: its text, or chat messages. null: prompt, problem or "
        "question.",
    )
    steps: str | None = Field(
        default=None,
        description="Column of the list of steps of a response. null: completions or steps.",
    )
    labels: str | None = Field(
        default=None,
        description="Column of the list of their labels: true or 1 is right, false or 0 is wrong. "
        "null: labels.",
    )
    answer: str | None = Field(
        default=None,
        description="Column of the ground-truth answer. null: answer, where there is one.",
    )
    id: str | None = Field(
        default="id",
        description="Column of a unique id. null, or not in the file: the row number is the id.",
    )


class ExampleDataConfig(Section):
    """Sources of training and held-out examples, and their prompts."""

    train: str = Field(
        default="synthetic",
        description="Training examples: `synthetic` (generated), a .parquet, .jsonl, .json, .csv "
        "or .tsv file, or a Hugging Face data set as id or id:split.",
    )
    eval: str = Field(
        default="auto",
        description="Held-out examples: a source as for train; `off` or null (no evaluation); or "
        "`auto` (generated where train is synthetic, else the fraction data.held_out of train, "
        "which is then not trained on).",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="With eval `auto`: the fraction of the distinct prompts of train to hold out, "
        "chosen by a hash of their text; at most eval_limit examples.",
    )
    synthetic: SyntheticConfig = Field(
        default=SyntheticConfig(), description="The embedded generator."
    )
    template: str = Field(
        default="plain",
        description="Prompt template: plain (the prompt as it is), chat_boxed (the model's chat "
        "template, with the instruction to box the answer), chat (the chat template only), r1_zero "
        "(<think> and <answer> tags), few_shot (worked examples), or the path of a Jinja file that "
        "uses {{ problem }}. Whole conversations are rendered by the chat template alone.",
    )
    chat: bool | None = Field(
        default=None,
        description="Wrap prompts in the model's chat template. null: only with the templates chat "
        "and chat_boxed, or where a Jinja file declares it.",
    )
    where: dict[str, tuple[FilterValue, ...]] = Field(
        default={},
        description="Keep only the rows of train and eval whose columns have one of these values: "
        '{level: [1, 2], subject: Algebra}. Numbers are compared by value (3, 3.0 and "3" are '
        "equal). null as a value: do not filter by that column.",
    )
    blank_rows: Literal["drop", "refuse"] = Field(
        default="drop",
        description="Rows in which a text is null or blank. drop: leave them out, and report how "
        "many. refuse: do not start. Other invalid rows are always refused.",
    )
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longest prompt, in tokens.")
    max_response_tokens: int = Field(
        default=512,
        ge=1,
        description="Longest response, in tokens, with its end token. In a conversation: all from "
        "the first turn of the assistant on.",
    )
    overlong: Literal["drop", "refuse"] = Field(
        default="drop",
        description="Examples whose prompt or response is longer than allowed. drop: leave them "
        "out, and report how many. refuse: do not start.",
    )
    shuffle: bool = Field(
        default=True,
        description="Shuffle the training examples in each epoch, with trainer.seed.",
    )
    eval_limit: int = Field(
        default=500,
        ge=0,
        description="Evaluate on the first N held-out examples. 0: on all.",
    )

    _off = field_validator("eval", mode="before")(DataConfig._off.__func__)
    _lists_of_values = field_validator("where", mode="before")(DataConfig._lists_of_values.__func__)
    _some_value = field_validator("where")(DataConfig._some_value.__func__)


class DemonstrationDataConfig(ExampleDataConfig):
    """Demonstrations or plain text, and the problems of held-out accuracy."""

    columns: ExampleColumns = Field(
        default=ExampleColumns(), description="Column names of the files."
    )


class RankingDataConfig(ExampleDataConfig):
    """Prompts with ranked responses."""

    columns: RankingColumns = Field(
        default=RankingColumns(), description="Column names of the files."
    )
    responses: int = Field(
        default=2,
        ge=2,
        le=4,
        description="Responses of each generated ranking, where train is synthetic.",
    )


class StepDataConfig(ExampleDataConfig):
    """Responses in steps, with a label for each step."""

    columns: StepColumns = Field(default=StepColumns(), description="Column names of the files.")
    step_separator: str = Field(
        default="\n\n",
        min_length=1,
        description="Text between the steps of a response. Score responses of a policy with the "
        "separator that it writes.",
    )


class OfflineTrainerConfig(LoopConfig):
    """The training loop."""

    steps: int = Field(default=100, ge=1, description="Training steps, one optimizer step each.")
    examples_per_step: int = Field(
        default=32,
        ge=1,
        description="Examples per step: demonstrations, texts, or prompts with all their ranked "
        "responses.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the data order and of new weights; below 2^32.",
    )
    checkpoints: CheckpointConfig = Field(default=CheckpointConfig(), description="Checkpoints.")
    max_restarts: MaxRestarts = 5
    phase_timeout_s: PhaseTimeout = None


class GeneratingEvaluationConfig(EvaluationConfig):
    """Held-out loss, and accuracy on the held-out examples whose answer is known."""

    problems: int = Field(
        default=64,
        ge=0,
        description="Answer the first N held-out prompts whose answer is known, for the accuracy. "
        "0: compute the loss only, and start no generation worker.",
    )


class GeneratingTrainerConfig(OfflineTrainerConfig):
    """The training loop, with an evaluation that samples."""

    evaluation: GeneratingEvaluationConfig = Field(
        default=GeneratingEvaluationConfig(), description="Held-out evaluation."
    )


class ScoringTrainerConfig(OfflineTrainerConfig):
    """The training loop, with an evaluation that only computes losses."""

    evaluation: EvaluationSchedule = Field(
        default=EvaluationSchedule(), description="Held-out evaluation."
    )


class SupervisedConfig(Section):
    """The loss of demonstrations."""

    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        default="token_mean",
        description="Reduction of the negative log-likelihood. token_mean: all learned tokens of a "
        "step count alike. sequence_mean: all examples of a step count alike.",
    )


class OfflineRunConfig(RootConfig):
    """What all runs on examples have in common."""

    trained_field: ClassVar[str] = "policy"  # the section of the model that is trained

    recipe: str = Field(
        default="sft_math",
        description="Name of the recipe, used in the name of the run's directory.",
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules to import in every process.",
    )
    model: ModelConfig = Field(default=ModelConfig(), description="The language model.")
    # Each kind has sections of its own here.
    data: Any = Field(default=None, description="Examples and prompts.")
    trainer: Any = Field(default=None, description="The training loop.")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="The Ray cluster.")
    run: RunSection = Field(default=RunSection(), description="The run's directory and display.")

    @property
    def trained(self) -> TrainableRoleConfig:
        """The settings of the model that is trained."""
        return getattr(self, self.trained_field)

    @property
    def samples(self) -> bool:
        """Whether an evaluation may sample: whether there are sections generation and reward."""
        return hasattr(self, "generation")

    @property
    def longest_response(self) -> int:
        """The longest response that is trained on, in tokens."""
        return self.data.max_response_tokens

    def reference_role(self) -> ModelRoleConfig | None:
        """Return the role of the frozen reference; None: there is none."""
        return None

    def own_contradictions(self) -> Iterator[str]:
        """Yield the fields that do not fit together by rules that an RL run does not have."""
        yield from _ranks(self)
        yield from _objective(self)

    def online(self, *, longest_response: int | None = None) -> RunConfig:
        """Return the RL run with this run's model, engine, rewards and held-out problems.

        The workers and checks that both kinds of runs share take that. Its fields may contradict
        each other.

        Args:
            longest_response: in tokens; None: that of the sections generation or data.
        """
        data = self.data
        sections: dict[str, Any] = {
            "recipe": self.recipe,
            "plugins": self.plugins,
            "model": self.model.model_dump(),
            "data": {
                "train": data.train,
                "eval": data.eval,
                "template": data.template,
                "chat": data.chat,
                "synthetic": data.synthetic.model_dump(),
                "max_prompt_tokens": data.max_prompt_tokens,
            },
            "policy": self.trained.model_dump(),
            "trainer": self._online_trainer(),
            "cluster": self.cluster.model_dump(),
            "run": self.run.model_dump(),
        }
        if self.samples:
            for name in ("generation", "reward", "sync"):
                sections[name] = getattr(self, name).model_dump()
        else:
            sections["generation"] = {
                "engine": "transformers",
                "dtype": "float32",
                "cpus_per_worker": 0,
                "gpus_per_worker": 0,
                "max_tokens": data.max_response_tokens,
            }
        if hasattr(self, "reference"):
            sections["reference"] = getattr(self, "reference").model_dump()  # noqa: B009
            # By its coefficient above 0 an RL run has a reference.
            sections["algorithm"] = {"kl": {"coefficient": 1.0}}
        if longest_response is not None:
            sections["generation"]["max_tokens"] = longest_response
        return RunConfig.model_validate(sections, context=CONTRADICTIONS_LATER)

    def _online_trainer(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "steps": trainer.steps,
            "seed": trainer.seed,
            # Rules about the prompts of a step do not concern an evaluation.
            "prompts_per_step": 2**16,
            "evaluation": trainer.evaluation.model_dump(exclude={"problems"}),
            "checkpoints": trainer.checkpoints.model_dump(),
        }

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        """Refuse fields that contradict each other, with one line for each contradiction."""
        if info.context == CONTRADICTIONS_LATER:
            return self
        lines = offline_contradictions(self)
        if lines:
            raise PydanticCustomError("mistakes", "{lines}", {"lines": "\n".join(lines)})
        return self


class SupervisedRunConfig(OfflineRunConfig):
    """Fine-tuning on demonstrations or plain text."""

    data: DemonstrationDataConfig = Field(
        default=DemonstrationDataConfig(), description="Examples and prompts."
    )
    objective: SupervisedConfig = Field(
        default=SupervisedConfig(), description="The loss of an update."
    )
    policy: TrainableRoleConfig = Field(
        default=TrainableRoleConfig(), description="The model that is trained."
    )
    trainer: GeneratingTrainerConfig = Field(
        default=GeneratingTrainerConfig(), description="The training loop."
    )
    generation: EngineConfig = Field(
        default=EngineConfig(), description="The generation group of the held-out evaluation."
    )
    sync: SyncConfig = Field(
        default=SyncConfig(),
        description="The transfer of the trained weights to the generation workers.",
    )
    reward: RewardConfig = Field(
        default=RewardConfig(), description="Rewards, which decide held-out accuracy."
    )


class PreferenceConfig(Section):
    """The loss of preference pairs."""

    kind: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description="Loss of a pair. sigmoid: DPO. ipo: squared distance of the log-ratio "
        "difference to 1 / (2 beta).",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the pull to the reference: larger stays closer to it.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Assumed probability that a label is wrong (conservative DPO), below 0.5; for "
        "kind sigmoid. 0: off.",
    )
    length_normalized: bool = Field(
        default=False,
        description="Use the mean log-probability of the tokens of a response instead of the sum.",
    )


class RankingConfig(Section):
    """The loss of a reward model."""

    kind: Literal["pairwise", "plackett_luce"] = Field(
        default="pairwise",
        description="Loss of a ranking. pairwise: the mean over all pairs of a prompt. "
        "plackett_luce: the likelihood of the whole order.",
    )
    margin: float = Field(
        default=0.0,
        ge=0,
        description="Difference that the better reward should have at least; for kind pairwise.",
    )


class PreferenceRunConfig(OfflineRunConfig):
    """Direct preference optimization."""

    data: RankingDataConfig = Field(
        default=RankingDataConfig(), description="Rankings and prompts."
    )
    objective: PreferenceConfig = Field(
        default=PreferenceConfig(), description="The loss of an update."
    )
    policy: TrainableRoleConfig = Field(
        default=TrainableRoleConfig(), description="The model that is trained."
    )
    reference: ReferenceConfig = Field(
        default=ReferenceConfig(), description="The frozen reference."
    )
    trainer: GeneratingTrainerConfig = Field(
        default=GeneratingTrainerConfig(), description="The training loop."
    )
    generation: EngineConfig = Field(
        default=EngineConfig(), description="The generation group of the held-out evaluation."
    )
    sync: SyncConfig = Field(
        default=SyncConfig(),
        description="The transfer of the trained weights to the generation workers.",
    )
    reward: RewardConfig = Field(
        default=RewardConfig(), description="Rewards, which decide held-out accuracy."
    )

    def reference_role(self) -> ModelRoleConfig:
        """See `OfflineRunConfig`."""
        return self.online().reference_role()


class RewardModelRunConfig(OfflineRunConfig):
    """Training of a reward model."""

    trained_field: ClassVar[str] = "reward_model"

    data: RankingDataConfig = Field(
        default=RankingDataConfig(), description="Rankings and prompts."
    )
    objective: RankingConfig = Field(default=RankingConfig(), description="The loss of an update.")
    reward_model: TrainableRoleConfig = Field(
        default=TrainableRoleConfig(), description="The model that is trained."
    )
    trainer: ScoringTrainerConfig = Field(
        default=ScoringTrainerConfig(), description="The training loop."
    )


class ProcessRewardModelRunConfig(OfflineRunConfig):
    """Training of a process reward model."""

    trained_field: ClassVar[str] = "reward_model"

    data: StepDataConfig = Field(
        default=StepDataConfig(), description="Responses in steps with labels, and prompts."
    )
    reward_model: TrainableRoleConfig = Field(
        default=TrainableRoleConfig(), description="The model that is trained."
    )
    trainer: ScoringTrainerConfig = Field(
        default=ScoringTrainerConfig(), description="The training loop."
    )


def offline_contradictions(config: OfflineRunConfig) -> list[str]:
    """Return the fields that do not fit together, a line each: field, value and remedy."""
    return [*_shared_rules(config), *config.own_contradictions()]


def _shared_rules(config: OfflineRunConfig) -> Iterator[str]:
    """Yield what the rules of an RL run find, under the names of this configuration."""
    for line in contradictions(config.online()):
        yield named_as_here(line, config)


def named_as_here(line: str, config: OfflineRunConfig) -> str:
    """Return a message about the RL run of `OfflineRunConfig.online` with the names of `config`."""
    return line.replace("policy.", f"{config.trained_field}.")


def _objective(config: OfflineRunConfig) -> Iterator[str]:
    if isinstance(config, PreferenceRunConfig):
        smoothing = config.objective.label_smoothing
        if config.objective.kind == "ipo" and smoothing:
            yield (
                f"objective.label_smoothing: {smoothing:g} is not defined for kind 'ipo'. Set it "
                "to 0, or choose sigmoid."
            )
    if isinstance(config, RewardModelRunConfig):
        margin = config.objective.margin
        if config.objective.kind != "pairwise" and margin:
            yield (
                f"objective.margin: {margin:g} is for kind 'pairwise', not "
                f"{config.objective.kind!r}. Set it to 0."
            )


def _ranks(config: OfflineRunConfig) -> Iterator[str]:
    trained, trainer = config.trained, config.trainer
    if trainer.examples_per_step < trained.ranks:
        yield (
            f"{config.trained_field}.ranks: {trained.ranks} ranks for the "
            f"{trainer.examples_per_step} examples of a step. Raise trainer.examples_per_step or "
            f"lower {config.trained_field}.ranks."
        )
