"""docs/configuration.md, made from the configuration models.

python -m docs.generate.configuration docs/configuration.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsys.config import RootConfig, RunConfig
from rlsys.config.command_line import SWITCHES
from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.config.expert_grid import ExpertGridConfig
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.fields import all_fields, type_name
from rlsys.config.offline import (
    PreferenceRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from rlsys.config.presets import PRESETS
from rlsys.config.resume_rules import VERDICTS, resume_table
from rlsys.config.rlhf import STAGES, RlhfRunConfig

INTRODUCTION = """# Configuration

Generated from the models in `rlsys/config` by `make docs`; a test checks that it is current. Each
field is a flag (`--trainer.steps 50`) and an entry of a YAML file (`trainer: {steps: 50}`, given
with `--config`). The defaults here apply where the recipe does not set a value of its own. Later
overrides earlier: recipe, preset, file, other flags.

Values are YAML; lists may be written `a,b`. Parameters of estimators, objectives and rewards are
set one by one, `--algorithm.advantage.parameters.std_ddof 1`, and are checked against the
function's signature before anything starts.
"""

PRESETS_INTRODUCTION = """
## Presets

`--preset NAME` starts any recipe from a published algorithm: it replaces the section `algorithm`,
`policy.num_mini_batches`, the number of updates per batch, and `critic.enabled`. `--config` and the
other flags change fields of it. docs/algorithms.md compares the settings of all presets.

| preset | updates per batch | algorithm |
|---|---|---|
"""

# Sections that have the same fields as those of an RL run.
SHARED_SECTIONS = (
    *("recipe", "plugins", "model", "cluster", "run", "policy", "reward_model", "reference"),
    *("generation", "sync", "reward"),
)
OTHER_KINDS: dict[type[RootConfig], str] = {
    SupervisedRunConfig: """
## Runs on examples

`recipes.sft_math`, `recipes.dpo_math`, `recipes.reward_model_math` and
`recipes.process_reward_model_math` have configurations of their own. The sections that are not
listed here have the fields of an RL run: `model`, `policy` (in a run of a reward model
`reward_model`) without `epochs` and `num_mini_batches`, `reference`, `generation` without
`samples_per_prompt` and `temperature`, `sync`, `reward`, `cluster` and `run`.
""",
    PreferenceRunConfig: "",
    RewardModelRunConfig: "",
    ProcessRewardModelRunConfig: "",
}

EXPERT_ITERATION = """
## Expert iteration

`recipes.expert_iteration_math` has the sections `model`, `data`, `generation`, `sync`, `reward`,
`trainer`, `cluster` and `run` of an RL run, `policy` without `epochs` and `num_mini_batches`, and
those below.
`recipes.expert_iteration_grid` has the section `grid` too ([how to](expert_iteration.md)).
"""
OWN_SECTIONS = ("expert", "objective", "grid")

RESUMING = """
## Resuming

`--run.directory runs/NAME --resume` continues from the newest complete checkpoint, with the run's
own `config.yaml`; the values of the recipe are not used. Flags and `--config` change fields of it.
Each change is printed ("trainer.steps: 60 -> 80"). The first rule that matches a field applies:
"""

EVALUATION = """
## Evaluation without training

`recipes.evaluate_math` has the options above that have an effect without training, and these, which
are its own or mean something else there ([evaluation](evaluation.md)):

| field | type | default | meaning |
|---|---|---|---|
"""

PIPELINE = """
## A pipeline

`recipes.rlhf` has a section for each of its stages, with the options of the recipe of that stage
(`--sft.trainer.steps 20`), and these for all of them ([RLHF](rlhf.md)):

| field | type | default | meaning |
|---|---|---|---|
"""


def reference() -> str:
    """Return the page."""
    lines = [INTRODUCTION, "## Switches\n", "| flag | meaning |", "|---|---|"]
    lines += [f"| `{flag}` | {doc} |" for flag, doc in SWITCHES.items()]
    lines += _field_tables(RunConfig)
    lines += [PRESETS_INTRODUCTION + "\n".join(_preset_rows())]
    for kind, text in OTHER_KINDS.items():
        lines += [text, *_field_tables(kind, heading="###", without=SHARED_SECTIONS)]
    others = tuple({name.split(".")[0] for name, _ in all_fields(ExpertGridConfig)})
    without = tuple(name for name in others if name not in OWN_SECTIONS)
    of_grid = tuple(name for name in others if name != "grid")
    lines += [EXPERT_ITERATION]
    lines += _field_tables(ExpertIterationRunConfig, heading="###", without=without)
    lines += _field_tables(ExpertGridConfig, heading="###", without=of_grid)
    lines += [RESUMING, *resume_table(), ""]
    lines += [f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()]
    lines += [EVALUATION + "\n".join(_evaluation_rows())]
    lines += [PIPELINE + "\n".join(_pipeline_rows())]
    return "\n".join(lines) + "\n"


def _field_tables(
    kind: type[RootConfig], *, heading: str = "##", without: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the lines of a table for each section of a kind of run."""
    previous = None
    for name, field in all_fields(kind):
        section = name.split(".")[0]
        if section in without:
            continue
        if section != previous:
            yield from (
                "",
                f"{heading} {kind.__name__}: {section}\n" if without else f"{heading} {section}\n",
            )
            yield from ("| field | type | default | meaning |", "|---|---|---|---|")
        previous = section
        yield _field_row(name, field)


def _evaluation_rows() -> Iterator[str]:
    """Yield a row for each field that a training run lacks or describes differently."""
    of_runs = {name: field.description for name, field in all_fields()}
    for name, field in all_fields(EvaluationRunConfig):
        if of_runs.get(name) != field.description:
            yield _field_row(name, field)


def _pipeline_rows() -> Iterator[str]:
    """Yield a row for each field of a pipeline that is not of one stage or of every run."""
    shared = (*STAGES, "recipe", "plugins", "model", "cluster", "run")
    for name, field in all_fields(RlhfRunConfig):
        if name.split(".")[0] not in shared:
            yield _field_row(name, field)


def _field_row(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "required" if default is PydanticUndefined else _as_yaml(default)
    kind = type_name(field.annotation).replace("|", ", ")
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {kind} | `{shown}` | {meaning} |"


def _preset_rows() -> Iterator[str]:
    for name, preset in PRESETS.items():
        description = preset.description.replace("|", "\\|")
        yield f"| `{name}` | {preset.num_mini_batches} | {description} |"


def _as_yaml(value: object) -> str:
    """Return a default as YAML on one line."""
    if isinstance(value, tuple):
        value = [_plain(item) for item in value]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _plain(item: object) -> object:
    return item.model_dump(mode="json") if isinstance(item, BaseModel) else item


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
