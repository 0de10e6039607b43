"""The settings of the weight sync: what is chosen, refused, and said in the plan."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.run.plan import describe_sync


def config(sync: dict[str, Any], **generation: Any) -> RunConfig:
    return RunConfig.model_validate({"sync": sync, "generation": generation})


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_transports_that_are_not_available_are_refused_by_name(transport: str):
    with pytest.raises(ValidationError, match=f"'{transport}' is not available yet. Use auto"):
        config({"transport": transport})


def test_files_need_a_directory():
    with pytest.raises(ValidationError, match=r"sync\.directory: null, but sync\.transport is"):
        config({"transport": "disk"})
    chosen = config({"transport": "disk", "directory": "/shared/weights"}).sync
    assert chosen.chosen_transport == "disk"


def test_a_directory_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for given, expected in (("w", str(tmp_path / "w")), ("~/w", "/home/me/w"), ("/w", "/w")):
        assert config({"transport": "disk", "directory": given}).sync.directory == expected
        changes = {"sync.transport": "disk", "sync.directory": given}
        assert evolve(config({}), changes).sync.directory == expected


@pytest.mark.parametrize("bad", [{"bucket_mb": 0}, {"transport": "carrier_pigeon"}])
def test_other_values_are_refused(bad: dict[str, Any]):
    with pytest.raises(ValidationError):
        config(bad)
    with pytest.raises(ValidationError):
        config({}, probe_every=0)


@pytest.mark.parametrize(
    ("sync", "generation", "row"),
    [
        ({}, {}, "object_store, 2.00 GiB in buckets of 64 MB; each compared on a probe"),
        (
            {"bucket_mb": 8, "transport": "disk", "directory": "/w"},
            {"probe_every": 5},
            "disk (/w), 2.00 GiB in buckets of 8 MB; one in 5 compared on a probe",
        ),
        (
            {"transport": "object_store"},
            {"logprob_difference_tolerance": 0.0},
            "object_store, 2.00 GiB in buckets of 64 MB; not compared "
            "(generation.logprob_difference_tolerance is 0)",
        ),
    ],
)
def test_the_plan_names_the_transport(sync: dict, generation: dict, row: str):
    assert describe_sync(config(sync, dtype="bfloat16", **generation), 2**30) == row
