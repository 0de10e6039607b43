"""Names of an earlier version are refused with the new name, and translated in saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.grpo_math import grpo_math
from rlsys.config import ConfigError
from rlsys.config.command_line import all_fields, dump_yaml, evolve, load_yaml, parse
from rlsys.config.fields import field_at
from rlsys.config.hardware import Hardware
from rlsys.config.renamed_fields import RENAMED_FIELDS, new_name, translated
from rlsys.run.checkpoints import Checkpoint
from rlsys.run.resume import check_resumable, describe_origin, differences

RECIPE = grpo_math(Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0))
FIELD = ("policy.updates", "policy.epochs")
SECTION = ("trainer.saves", "trainer.checkpoints")
PARAMETER = ("algorithm.advantage.parameters.ddof", "algorithm.advantage.parameters.std_ddof")


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    for old, new in (FIELD, SECTION, PARAMETER):
        monkeypatch.setitem(RENAMED_FIELDS, old, new)


def test_the_table_leads_from_names_that_are_gone_to_names_that_exist():
    names = [name for name, _ in all_fields()]
    for old, new in RENAMED_FIELDS.items():
        assert old not in names
        if ".parameters." not in new:
            assert field_at(new) is not None, new


def test_names_below_a_renamed_section_are_renamed_with_it():
    assert new_name("trainer.saves.keep") == "trainer.checkpoints.keep"
    assert new_name("trainer.savesx") is None
    assert new_name("trainer.steps") is None


@pytest.mark.parametrize(
    ("flag", "old", "new"),
    [
        ("--policy.updates", *FIELD),
        ("--trainer.saves.keep", "trainer.saves.keep", "trainer.checkpoints.keep"),
        ("--algorithm.advantage.parameters.ddof", *PARAMETER),
    ],
)
def test_an_old_flag_is_refused_with_the_new_name(flag: str, old: str, new: str):
    with pytest.raises(ConfigError) as error:
        parse(RECIPE, [flag, "1"])
    assert str(error.value) == f"--{old}: this field is now called {new}. Write --{new}."


def test_old_names_in_a_file_are_refused_together(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("policy: {updates: 2}\ntrainer: {saves: {keep: 3}}\n")
    for read in (lambda: parse(RECIPE, ["--config", str(file)]), lambda: load_yaml(file)):
        with pytest.raises(ConfigError) as error:
            read()
        assert str(error.value).splitlines() == [
            "policy.updates: this field is now called policy.epochs. Write policy.epochs.",
            "trainer.saves.keep: this field is now called trainer.checkpoints.keep. Write "
            "trainer.checkpoints.keep.",
        ]


def test_a_recipe_that_changes_an_old_name_is_told_the_new_one():
    with pytest.raises(ConfigError, match=r"now called policy\.epochs"):
        evolve(RECIPE, {"policy.updates": 2})


def renamed_back(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration as an earlier version would have saved it."""
    tree["policy"]["updates"] = tree["policy"].pop("epochs")
    tree["trainer"]["saves"] = tree["trainer"].pop("checkpoints")
    parameters = tree["algorithm"]["advantage"]["parameters"]
    parameters["ddof"] = parameters.pop("std_ddof")
    return tree


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path):
    changes = {"policy.epochs": 3, PARAMETER[1]: 1, "trainer.checkpoints.keep": 7}
    before = evolve(RECIPE, changes)
    old = renamed_back(yaml.safe_load(dump_yaml(before)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))

    resumed = parse(RECIPE, ["--resume", "--run.directory", str(tmp_path)])
    assert resumed.config == evolve(before, {"run.directory": str(tmp_path)})

    state = describe_origin(before)
    state["config"] = renamed_back(state["config"])
    checkpoint = Checkpoint(step=1, path=tmp_path, state=state)
    check_resumable(checkpoint, before)
    assert differences(checkpoint, before) == []
    assert differences(checkpoint, evolve(before, {"policy.epochs": 4})) == [
        "policy.epochs: 3 -> 4"
    ]


def test_a_section_that_is_left_empty_goes_and_a_new_name_wins():
    assert translated({"policy": {"updates": 2}}) == {"policy": {"epochs": 2}}
    assert translated({"policy": {"updates": 2, "epochs": 5}}) == {"policy": {"epochs": 5}}
    merged = translated({"trainer": {"saves": {"keep": 3}, "checkpoints": {"every": 9}}})
    assert merged == {"trainer": {"checkpoints": {"keep": 3, "every": 9}}}
    untouched = {"policy": {"ranks": 2}}
    assert translated(untouched) == untouched


def test_a_field_that_is_gone_is_refused_with_what_replaces_it(tmp_path: Path):
    expected = (
        "data.columns.level: this field was removed. Use data.where, which names the column itself."
    )
    with pytest.raises(ConfigError) as error:
        parse(RECIPE, ["--data.columns.level", "grade"])
    assert str(error.value) == f"--{expected}"
    file = tmp_path / "run.yaml"
    file.write_text("data: {columns: {level: grade}}\n")
    with pytest.raises(ConfigError) as error:
        parse(RECIPE, ["--config", str(file)])
    assert str(error.value) == expected


def test_a_saved_run_loses_a_field_that_is_gone_only_where_it_said_nothing(tmp_path: Path):
    saved = yaml.safe_load(dump_yaml(RECIPE))
    saved["data"]["columns"] |= {"level": "level", "subject": "subject"}
    saved["algorithm"]["advantage"]["network"] = saved["algorithm"]["advantage"].pop("auxiliary")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(saved))
    arguments = ["--resume", "--run.directory", str(tmp_path)]
    assert parse(RECIPE, arguments).config == evolve(RECIPE, {"run.directory": str(tmp_path)})

    saved["data"]["columns"]["level"] = "grade"
    file.write_text(yaml.safe_dump(saved))
    with pytest.raises(
        ConfigError, match=r"level is no longer a role: data\.where names the column itself"
    ):
        parse(RECIPE, arguments)
