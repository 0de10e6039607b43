"""The configuration of `recipes.rlhf`: four stages, and what they have in common.

    sft            SupervisedRunConfig     fine-tuning on demonstrations
    rankings       RankingsRunConfig       samples of the fine-tuned model, ranked
    reward_model   RewardModelRunConfig    a reward model from the rankings
    ppo            RunConfig               PPO on the reward of that model, with pretraining text

Each stage has the configuration of its own recipe, with two rules on top:

- a field outside of the stages is filled into all stages that have it (`SHARED`); a stage that sets
  another value is refused;
- a field that is the result of an earlier stage (`RESULTS`) is filled in when that stage is
  complete; nobody sets it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from rlsys.config.command_line import flat
from rlsys.config.errors import ConfigError
from rlsys.config.fields import field_at
from rlsys.config.model import ModelConfig
from rlsys.config.offline import RewardModelRunConfig, SupervisedRunConfig
from rlsys.config.ptx import PtxConfig
from rlsys.config.rankings import RankingsRunConfig
from rlsys.config.root import CONTRADICTIONS_LATER, ClusterConfig, RootConfig, RunSection
from rlsys.config.run import RunConfig
from rlsys.config.section import Section
from rlsys.config.storage_uri import unsupported_storage

RootT = TypeVar("RootT", bound=RootConfig)

STAGES = ("sft", "rankings", "reward_model", "ppo")
COMPARISON = "ppo_without_ptx"  # the last stage again, without pretraining text


class SharedSyntheticConfig(Section):
    """The embedded generator. How many training problems it makes is a matter of each stage."""

    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        default=(1,),
        description="Difficulty levels of the generated problems, from 1 (one-digit numbers) to 5.",
        min_length=1,
    )
    eval_size: int = Field(
        default=64,
        ge=1,
        description="Held-out problems to generate; none of them is a training problem of a stage.",
    )


class SharedDataConfig(Section):
    """What the data of all stages have in common."""

    train: str | None = Field(
        default=None,
        description="Training data of sft, rankings and ppo, one source for all. null: the own "
        "source of each stage (sft.data.train, ...).",
    )
    eval: str | None = Field(
        default=None,
        description="Held-out data of sft and ppo, one source for both. null: the own source of "
        "each stage (sft.data.eval, ...). It may be auto only for generated data.",
    )
    synthetic: SharedSyntheticConfig = Field(
        default=SharedSyntheticConfig(), description="The embedded generator."
    )
    template: str = Field(
        default="plain", description="Prompt template of all stages; plain: the problem itself."
    )
    chat: bool | None = Field(
        default=None,
        description="Wrap prompts in the model's chat template. null: as the template declares.",
    )


class RlhfRunConfig(RootConfig):
    """The pipeline of InstructGPT: SFT, rankings, a reward model, PPO."""

    recipe: str = Field(
        default="rlhf", description="Name of the recipe, used in the name of the run's directory."
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules that register estimators, objectives or reward functions; "
        "imported in every process of every stage.",
    )
    last_stage: Literal["sft", "rankings", "reward_model", "ppo"] = Field(
        default="ppo",
        description="Stop after this stage. A resume with a later one continues from there.",
    )
    compare_without_ptx: bool = Field(
        default=False,
        description="Run the last stage a second time with ptx.coefficient 0 and the same seed, to "
        "show what the pretraining text does to the held-out text loss.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of all stages; below 2^32. With generated data it decides which problems "
        "are held out.",
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="The model that the first stage fine-tunes."
    )
    data: SharedDataConfig = Field(default=SharedDataConfig(), description="Data of all stages.")
    sft: SupervisedRunConfig = Field(
        default=SupervisedRunConfig(), description="Stage 1, as recipes.sft_math."
    )
    rankings: RankingsRunConfig = Field(
        default=RankingsRunConfig(), description="Stage 2, as recipes.make_rankings."
    )
    reward_model: RewardModelRunConfig = Field(
        default=RewardModelRunConfig(), description="Stage 3, as recipes.reward_model_math."
    )
    ppo: RunConfig = Field(default=RunConfig(), description="Stage 4, as recipes.ppo_math.")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="The Ray cluster.")
    run: RunSection = Field(default=RunSection(), description="The run's directory and display.")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages up to the last one to run, in their order."""
        chosen = STAGES[: STAGES.index(self.last_stage) + 1]
        compares = self.compare_without_ptx and self.last_stage == "ppo"
        return (*chosen, COMPARISON) if compares else chosen

    def stage(self, name: str) -> Any:
        """Return the configuration of a stage, of the class of its recipe."""
        if name == COMPARISON:  # where no text is trained on, there is no number of them either
            texts = PtxConfig.model_fields["examples_per_step"].default
            return with_values(self.ppo, {"ptx.coefficient": 0.0, "ptx.examples_per_step": texts})
        return getattr(self, name)


def section_of(stage: str) -> str:
    """Return the section with the configuration of a stage."""
    return "ppo" if stage == COMPARISON else stage


@dataclass(frozen=True, kw_only=True)
class SharedField:
    """A field of the pipeline, and the fields of the stages that get its value."""

    field: str
    copies: tuple[str, ...]
    optional: bool = False  # null: nothing is filled in

    @staticmethod
    def of(
        field: str, stages: Collection[str] = STAGES, *, own: str = "", optional: bool = False
    ) -> SharedField:
        """Return a field that has the same name in some stages, or there the name `own`."""
        copies = tuple(f"{stage}.{own or field}" for stage in stages)
        return SharedField(field=field, copies=copies, optional=optional)


TRAINING = ("sft", "reward_model", "ppo")
ON_PROBLEMS = ("sft", "rankings", "ppo")

SHARED: tuple[SharedField, ...] = (
    SharedField.of("plugins"),
    SharedField(
        field="seed",
        copies=(*(f"{stage}.trainer.seed" for stage in TRAINING), "rankings.seed"),
    ),
    SharedField.of("model.path", ("sft",)),
    SharedField.of("model.attention"),
    SharedField.of("model.trust_remote_code"),
    SharedField.of("model.lora.rank", TRAINING),
    SharedField.of("model.lora.alpha", TRAINING),
    SharedField.of("model.lora.target_modules", TRAINING),
    SharedField.of("data.train", ON_PROBLEMS, optional=True),
    SharedField.of("data.eval", ("sft", "ppo"), optional=True),
    SharedField.of("data.synthetic.levels", ON_PROBLEMS),
    SharedField.of("data.synthetic.eval_size", ON_PROBLEMS),
    SharedField.of("data.template"),
    SharedField.of("data.chat"),
    SharedField.of("cluster.address"),
    SharedField.of("cluster.object_store_gib"),
    SharedField.of("cluster.recovery_timeout_s", TRAINING),
    SharedField.of("run.progress", TRAINING),
)

# Fields that a stage gets from an earlier one or from the pipeline, with what they are.
RESULTS: Mapping[str, str] = {
    **{f"{stage}.recipe": "the recipe of the stage" for stage in STAGES},
    **{f"{stage}.run.directory": "a directory in run.directory" for stage in TRAINING},
    "rankings.output": "a file in run.directory",
    "rankings.model.path": "the last checkpoint of sft",
    "reward_model.model.path": "the last checkpoint of sft",
    "reward_model.data.train": "the rankings of the stage before",
    "ppo.model.path": "the last checkpoint of sft",
}

# Fields, and sections (with a dot), that mean nothing where the rankings are samples of a model.
UNUSED: Mapping[str, str] = {
    "reward_model.data.responses": "rankings.responses says how many a ranking has",
    "reward_model.data.synthetic.": "the rankings are those of the stage before",
    **{f"{stage}.run.storage": "it stores nothing in a second place" for stage in TRAINING},
}

GENERATED = "synthetic"
REWARD_FUNCTION = "model"  # the reward function that is a reward model


def with_shared_fields(config: RlhfRunConfig, explicit: Collection[str]) -> RlhfRunConfig:
    """Return the configuration with the shared fields filled into all stages.

    Args:
        explicit: dotted names of the fields that flags and files set on purpose.

    Raises:
        ConfigError: a stage sets another value, a field that is a result, or one that has no
            effect; a line for each.
    """
    values = flat_values(config)
    lines = [*_set_results(explicit), *_set_unused(explicit), *_set_copies(values, explicit)]
    if lines:
        raise ConfigError("\n".join(lines))

    changes = {
        copy: values[shared.field]
        for shared in SHARED
        for copy in shared.copies
        if not (shared.optional and values[shared.field] is None)
    }
    return with_values(config, changes)


def with_values(config: RootT, values: Mapping[str, Any]) -> RootT:
    """Return a configuration with some fields changed, by dotted name.

    Its fields may contradict each other; `rlsys.run.preflight` and its like check that.
    """
    tree = config.model_dump(mode="json")
    for name, value in values.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    return type(config).model_validate(tree, context=CONTRADICTIONS_LATER)


def flat_values(config: RootConfig) -> dict[str, Any]:
    """Return the value of every field by its dotted name, as in a file."""
    return flat(config.model_dump(mode="json"))


def _set_results(explicit: Collection[str]) -> Iterator[str]:
    for name, meaning in RESULTS.items():
        if name in explicit:
            yield f"{name}: it is always {meaning}. Leave it out."


def _set_unused(explicit: Collection[str]) -> Iterator[str]:
    for name in sorted(explicit):
        for unused, reason in UNUSED.items():
            if name == unused or (unused.endswith(".") and name.startswith(unused)):
                yield f"{name}: it has no effect in a pipeline: {reason}. Leave it out."


def _set_copies(values: Mapping[str, Any], explicit: Collection[str]) -> Iterator[str]:
    for shared in SHARED:
        value = values[shared.field]
        if shared.optional and value is None:
            continue
        for copy in shared.copies:
            if copy not in explicit or values[copy] == value:
                continue
            remedy = f"Set --{shared.field} alone."
            if shared.optional:
                remedy = f"Leave out one of them; without {shared.field} each stage has its own."
            yield (
                f"{copy}: {values[copy]!r}, but {shared.field} is {value!r} for all stages. "
                f"{remedy}"
            )


def rlhf_contradictions(config: RlhfRunConfig) -> list[str]:
    """Return the fields of different stages that do not fit together, a line each.

    What concerns one stage alone is checked with that stage.
    """
    storage = unsupported_storage(config.run.storage, "a pipeline")
    return [*_held_out(config), *_model_reward(config), *_comparison(config), *storage]


def _held_out(config: RlhfRunConfig) -> Iterator[str]:
    """Refuse to hold problems out of the data of one stage, on which others could train."""
    for stage in ("sft", "ppo"):
        data = config.stage(stage).data
        if data.eval == "auto" and data.train != GENERATED:
            yield (
                f"{stage}.data.eval: 'auto' holds problems out of {data.train!r} in this stage, "
                "and the other stages could train on them. Name a source of held-out problems, or "
                "set it to off."
            )


def _model_reward(config: RlhfRunConfig) -> Iterator[str]:
    functions = {function.name: function for function in config.ppo.reward.functions}
    reward = functions.get(REWARD_FUNCTION)
    if reward is None:
        yield (
            f"ppo.reward.functions: {', '.join(functions)} leaves out the reward model that the "
            "stage before trains. Add model."
        )
    elif reward.weight == 0:
        yield (
            "ppo.reward.functions: the weight of model is 0, so the reward model would be trained "
            "for nothing. Give it a weight."
        )
    elif reward.parameters.get("path") is not None:
        yield (
            f"ppo.reward.functions: the path of model is {reward.parameters['path']!r}, and it is "
            "always the reward model of the stage before. Leave it out."
        )


def _comparison(config: RlhfRunConfig) -> Iterator[str]:
    if not config.compare_without_ptx:
        return
    if config.last_stage != "ppo":
        yield (
            f"compare_without_ptx: true compares two runs of ppo, and last_stage is "
            f"{config.last_stage!r}. Set it to false, or last_stage to ppo."
        )
    if config.ppo.ptx.coefficient == 0:
        yield (
            "compare_without_ptx: true compares nothing, since ppo.ptx.coefficient is 0. Set the "
            "coefficient, or compare_without_ptx to false."
        )
    elif not config.ppo.evaluates_text:
        yield (
            "compare_without_ptx: true has nothing to compare, since no evaluation of ppo measures "
            "the loss of text. Set ppo.ptx.eval and ppo.trainer.evaluation.every."
        )


FIELD = re.compile(r"(?<![\w./'\"])[a-z][a-z_]*(?:\.[a-z_][a-z0-9_]*)+")


def named_in_pipeline(line: str, config: RlhfRunConfig, stage: str) -> str:
    """Return a message of a stage with the names that its fields have in the pipeline.

    Example: of sft, "trainer.steps: ..." becomes "sft.trainer.steps: ...", and "model.path: ..."
    stays as it is, since that field is a shared one.
    """
    stage = section_of(stage)
    kind = type(config.stage(stage))
    values = flat_values(config)
    shared = {
        copy: one.field
        for one in SHARED
        for copy in one.copies
        if not (one.optional and values[one.field] is None)
    }

    def renamed(found: re.Match[str]) -> str:
        if not _is_field(found[0], kind):
            return found[0]
        # A result has no name that a user could set; model.path stands for all of them.
        name = f"{stage}.{found[0]}"
        return shared.get(name) or ("model.path" if found[0] == "model.path" else name)

    return FIELD.sub(renamed, line)


def _is_field(name: str, kind: type[RootConfig]) -> bool:
    """Return whether a dotted name is a field, a section, or a part of the value of a field."""
    parts = name.split(".")
    return any(field_at(".".join(parts[:n]), kind) is not None for n in range(2, len(parts) + 1))
