"""run.storage on the command line: where a run is, and URIs that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config import ConfigError, RunConfig, RunSection
from rlsys.config.command_line import dump_yaml, parse, places_to_resume
from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.config.expert_grid import ExpertGridConfig, grid_mistakes
from rlsys.config.rlhf import RlhfRunConfig, rlhf_contradictions, with_shared_fields
from rlsys.run.directory import RunDirectory

SECRET = "abc/DEF+ghi"


def read(words: list[str]) -> None:
    """Read a command line as a recipe does."""
    places_to_resume(RunConfig(), words)
    parse(RunConfig(), words)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"s3://AKIAKEY:{SECRET}@bucket/runs/a", "AWS_SECRET_ACCESS_KEY"),
        (f"sftp://user:{SECRET}@host/runs/a", "set the credentials in the environment"),
        (f"abfs://box@account/runs/a?sas_token={SECRET}", "'sas_token' is a secret"),
        (f"s3://bucket/runs/a?secret_key={SECRET}", "'secret_key' is a secret"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(uri: str, message: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"run: {{storage: '{uri}'}}\n")
    for words in (["--run.storage", uri], ["--config", str(tmp_path / "run.yaml")]):
        for switch in ([], ["--resume", "--run.directory", str(tmp_path)]):
            with pytest.raises(ConfigError, match=r"^run\.storage: ") as refusal:
                read([*words, *switch])
            assert message in str(refusal.value)
            assert SECRET not in str(refusal.value)
            assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://bucket?scheme=http"])
def test_a_whole_bucket_is_no_place_of_a_run(uri: str):
    with pytest.raises(ConfigError, match=r"^run\.storage: .* is not the place of one run"):
        parse(RunConfig(), ["--run.storage", uri])


@pytest.mark.parametrize(
    "uri",
    ["s3://b/runs/mine?endpoint_override=http://h:1&scheme=http", "/disk/runs/mine/", "mine"],
)
def test_the_directory_has_the_name_of_the_storage_unless_it_is_given(uri: str):
    config = parse(RunConfig(), ["--run.storage", uri]).config
    assert RunDirectory.named_by(config).path == Path("runs/mine")
    given = parse(RunConfig(), ["--run.storage", uri, "--run.directory", "other"]).config
    assert RunDirectory.named_by(given).path == Path("other")


def test_user_names_without_a_password_are_accepted():
    for uri in ("hdfs://me@host:8020/runs/a", "gs://anonymous@bucket/runs/a"):
        assert parse(RunConfig(), ["--run.storage", uri]).config.run.storage == uri


def test_the_place_to_resume_from_is_given_or_that_of_the_run(tmp_path: Path):
    recipe = RunConfig()
    assert places_to_resume(recipe, ["--run.storage", "s3://b/a"]) is None
    assert places_to_resume(recipe, ["--resume", "--help"]) is None
    assert places_to_resume(recipe, ["--resume", "--run.storage", "s3://b/a"]) == RunSection(
        storage="s3://b/a"
    )

    saved = RunConfig(run=RunSection(storage="s3://b/saved"))
    (tmp_path / "config.yaml").write_text(dump_yaml(saved))
    own = ("--resume", "--run.directory", str(tmp_path))
    place = places_to_resume(recipe, own)
    assert place == RunSection(directory=str(tmp_path), storage="s3://b/saved")
    given = places_to_resume(recipe, [*own, "--run.storage", "s3://b/other"])
    assert given is not None
    assert given.storage == "s3://b/other"
    without = places_to_resume(recipe, [*own, "--run.storage", "null"])
    assert without is not None
    assert without.storage is None


def test_no_run_in_either_place(tmp_path: Path):
    words = ["--resume", "--run.storage", "s3://b/a", "--run.directory", str(tmp_path / "none")]
    with pytest.raises(ConfigError, match=r"run\.storage: 's3://b/a' holds no run .*nor does"):
        parse(RunConfig(), words)


def test_the_directory_of_a_resumed_run_follows_from_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text(dump_yaml(RunConfig()))
    config = parse(RunConfig(), ["--resume", "--run.storage", "s3://b/a"]).config
    assert (config.run.directory, config.run.storage) == ("runs/a", "s3://b/a")


def test_commands_that_store_nothing_refuse_it():
    run = RunSection(storage="s3://b/a")
    pipeline = RlhfRunConfig(run=run)
    lines = [line for line in rlhf_contradictions(pipeline) if line.startswith("run.storage")]
    grid = ExpertGridConfig(run=run)
    lines += [line for line in grid_mistakes(grid, ()) if line.startswith("run.storage")]
    with pytest.raises(ValueError, match=r"run\.storage: 's3://b/a': an evaluation stores nothing"):
        EvaluationRunConfig(run=run)
    assert [line.split(" stores nothing")[0] for line in lines] == [
        "run.storage: 's3://b/a': a pipeline",
        "run.storage: 's3://b/a': a grid",
    ]
    with pytest.raises(ConfigError, match=r"sft\.run\.storage: it has no effect in a pipeline"):
        with_shared_fields(RlhfRunConfig(), {"sft.run.storage"})
