"""docs/configuration.md, made from the config models: `python -m docs.generate.configuration docs/configuration.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic_core import PydanticUndefined

from rlsys.config.command_line import SWITCHES
from rlsys.config.fields import all_fields, type_name
from rlsys.config.presets import PRESETS
from rlsys.config.resume_rules import VERDICTS, resume_table

INTRODUCTION = """# Configuration

Generated from the models in `rlsys/config` by `make docs`; a test keeps it current. Each field is a flag (`--trainer.steps 50`) and a place in a
YAML file (`trainer: {steps: 50}`, given with `--config`). A recipe sets its own values; the defaults here hold where it does not. Later wins:
recipe, preset, file, other flags.

Values are YAML; lists may be written `a,b`. Parameters of estimators, objectives and rewards are set one by one,
`--algorithm.advantage.parameters.std_ddof 1`, and checked against the function's signature before anything starts.
"""


PRESETS_OF = """
## Presets

`--preset NAME` starts any recipe from a published algorithm: it replaces the section `algorithm`, and
`policy.num_mini_batches`, the number of updates per batch. `--config` and the other flags change fields of
it. Their settings side by side are in docs/algorithms.md.

| preset | updates per batch | algorithm |
|---|---|---|
"""


RESUMING = """
## Resuming

`--run.directory runs/NAME --resume` goes on from the newest complete checkpoint with the run's own `config.yaml`; nothing falls back to the
recipe's values. Flags and `--config` change fields of it. Each change is printed ("trainer.steps: 60 -> 80"), and the first rule that fits decides:
"""


def reference() -> str:
    """The page."""
    lines = [INTRODUCTION, "## Switches\n", "| flag | meaning |", "|---|---|"]
    lines += [f"| `{flag}` | {doc} |" for flag, doc in SWITCHES.items()]
    section = None
    for name, field in all_fields():
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines += [
                "",
                f"## {section}\n",
                "| field | type | default | meaning |",
                "|---|---|---|---|",
            ]
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else _plain(default)
        lines.append(
            f"| `{name}` | {type_name(field.annotation).replace('|', ', ')} | `{shown}` | "
            f"{(field.description or '').replace('|', ', ')} |"
        )
    lines += [PRESETS_OF + "\n".join(_preset_rows())]
    lines += [RESUMING, *resume_table(), ""]
    lines += [f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()]
    return "\n".join(lines) + "\n"


def _preset_rows() -> Iterator[str]:
    for name, preset in PRESETS.items():
        description = preset.description.replace("|", "\\|")
        yield f"| `{name}` | {preset.num_mini_batches} | {description} |"


def _plain(value: object) -> str:
    """A default as YAML on one line."""
    if isinstance(value, tuple):
        value = [
            item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in value
        ]  # pyright: ignore[reportAttributeAccessIssue]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
