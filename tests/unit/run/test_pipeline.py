"""The order of the stages of a pipeline, what a resume does, and what the page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from recipes.rlhf import rlhf
from rlsys.config.command_line import parse
from rlsys.config.hardware import Hardware
from rlsys.config.rlhf import RlhfRunConfig, with_shared_fields
from rlsys.data.examples import Ranking
from rlsys.data.ranking_files import RankingCounts, write_rankings
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog
from rlsys.run.observers.pipeline_report import render_pipeline
from rlsys.run.observers.run_status import StatusWriter
from rlsys.run.pipeline import (
    refused_changes,
    results_of_earlier_stages,
    run_stages,
    stage_state,
)
from rlsys.run.pipeline_directory import PipelineDirectory, StageState, training_state
from rlsys.run.pipeline_summary import summarize_pipeline

STAGES = ("sft", "rankings", "reward_model", "ppo")
RECIPE = rlhf(Hardware(cpus=2, memory_gib=16, gpus=0, gpu_memory_gib=0))


def configured(*flags: str) -> RlhfRunConfig:
    invocation = parse(RECIPE, flags)
    return with_shared_fields(invocation.config, invocation.explicit)


@pytest.fixture
def pipeline(tmp_path: Path) -> PipelineDirectory:
    (tmp_path / "run").mkdir()
    return PipelineDirectory(RunDirectory(tmp_path / "run"))


class FakeRunner:
    """Runner that notes what it is asked to do, and ends with the codes that it was given."""

    def __init__(self, codes: Mapping[str, int] | None = None) -> None:
        self.calls: list[tuple[str, bool]] = []
        self._codes = codes or {}

    def run(self, stage: str, *, resume: bool) -> int:
        self.calls.append((stage, resume))
        return self._codes.get(stage, 0)


def run(
    runner: FakeRunner, pipeline: PipelineDirectory, states: Mapping[str, StageState]
) -> tuple[int, str | None, list[tuple[str, StageState]]]:
    seen: list[tuple[str, StageState]] = []
    result = run_stages(
        STAGES,
        runner,
        pipeline,
        state_of=lambda stage: states.get(stage, "new"),
        on_start=lambda stage, state: seen.append((stage, state)),
    )
    return result.code, result.stage, seen


def test_all_stages_run_in_their_order(pipeline: PipelineDirectory):
    runner = FakeRunner()
    assert run(runner, pipeline, {})[:2] == (0, None)
    assert runner.calls == [(stage, False) for stage in STAGES]
    assert set(pipeline.seconds()) == set(STAGES)


def test_a_resume_begins_inside_of_the_first_stage_that_is_not_complete(
    pipeline: PipelineDirectory,
):
    runner = FakeRunner()
    states: dict[str, StageState] = {
        "sft": "complete",
        "rankings": "complete",
        "reward_model": "begun",
    }
    _, _, seen = run(runner, pipeline, states)
    assert runner.calls == [("reward_model", True), ("ppo", False)]
    assert seen[0] == ("sft", "complete")
    assert set(pipeline.seconds()) == {"reward_model", "ppo"}


@pytest.mark.parametrize("code", [1, 2, 130])
def test_nothing_runs_after_a_stage_that_did_not_complete(pipeline: PipelineDirectory, code: int):
    runner = FakeRunner({"rankings": code})
    assert run(runner, pipeline, {})[:2] == (code, "rankings")
    assert [stage for stage, _ in runner.calls] == ["sft", "rankings"]


def test_the_times_of_several_starts_add_up(pipeline: PipelineDirectory):
    pipeline.add_seconds("sft", 3.0)
    pipeline.add_seconds("ppo", 1.0)
    pipeline.add_seconds("sft", 4.5)
    assert pipeline.seconds() == {"sft": 7.5, "ppo": 1.0}


async def write_nothing(directory: Path) -> None:
    """Write a checkpoint without a model."""


async def finished_stage(directory: RunDirectory, steps: int) -> None:
    """Write what a stage leaves behind that ended after so many steps."""
    directory.create(RECIPE.sft)
    await CheckpointStore(directory.checkpoints, keep=1).save(steps, write_nothing, {"step": steps})
    status = StatusWriter(directory)
    status.on_start(1, steps)
    status.on_step(steps, {})
    status.on_end("finished", "")


async def test_the_state_of_a_training_stage(pipeline: PipelineDirectory):
    directory = pipeline.stage("sft")
    assert training_state(directory, 4) == "new"
    await finished_stage(directory, 4)
    assert training_state(directory, 4) == "complete"
    assert training_state(directory, 5) == "begun"  # more steps were asked for since

    StatusWriter(directory).on_end("interrupted", "")
    assert training_state(directory, 4) == "begun"


async def test_a_finished_stage_without_its_checkpoint_is_not_complete(
    pipeline: PipelineDirectory,
):
    directory = pipeline.stage("sft")
    await finished_stage(directory, 4)
    (directory.checkpoints / "step_000004" / "manifest.json").write_text("{")
    assert training_state(directory, 4) == "begun"
    assert training_state(directory, 4, checksums=False) == "complete"


def test_the_stage_of_rankings_is_complete_with_its_file(pipeline: PipelineDirectory):
    config = configured()
    assert stage_state(config, "rankings", pipeline) == "new"
    pipeline.rankings.parent.mkdir()
    pipeline.rankings.touch()
    assert stage_state(config, "rankings", pipeline) == "complete"


def test_what_a_stage_gets_from_earlier_ones(pipeline: PipelineDirectory):
    config = configured("--sft.trainer.steps", "7", "--reward_model.trainer.steps", "11")
    root = pipeline.path
    sft = str(root / "sft" / "checkpoints" / "step_000007")
    reward_model = str(root / "reward_model" / "checkpoints" / "step_000011")
    rankings = str(root / "rankings" / "rankings.parquet")
    found = {stage: results_of_earlier_stages(config, stage, pipeline) for stage in STAGES}

    assert found["sft"] == {"run.directory": str(root / "sft")}
    assert found["rankings"] == {"model.path": sft, "output": rankings}
    assert found["reward_model"] == {
        "run.directory": str(root / "reward_model"),
        "model.path": sft,
        "data.train": rankings,
    }
    ppo = found["ppo"]
    assert (ppo["model.path"], ppo["critic.path"]) == (sft, reward_model)
    assert [(one["name"], one["weight"]) for one in ppo["reward.functions"]] == [
        ("math", 0.0),
        ("model", 1.0),
    ]
    assert ppo["reward.functions"][1]["parameters"] == {"path": reward_model}


def test_both_runs_of_the_comparison_start_from_the_same_models(pipeline: PipelineDirectory):
    config = configured("--compare_without_ptx", "true")
    ppo = results_of_earlier_stages(config, "ppo", pipeline)
    without = results_of_earlier_stages(config, "ppo_without_ptx", pipeline)
    assert without.pop("run.directory") == str(pipeline.path / "ppo_without_ptx")
    assert ppo.pop("run.directory") == str(pipeline.path / "ppo")
    assert ppo == without


def test_a_critic_of_the_user_and_no_critic_are_left_alone(pipeline: PipelineDirectory):
    own = configured("--ppo.critic.path", "tiny")
    assert "critic.path" not in results_of_earlier_stages(own, "ppo", pipeline)
    without = configured("--ppo.preset", "rloo")
    assert "critic.path" not in results_of_earlier_stages(without, "ppo", pipeline)


NEW: dict[str, StageState] = dict.fromkeys((*STAGES, "ppo_without_ptx"), "new")


@pytest.mark.parametrize(
    ("flags", "states", "message"),
    [
        (["--seed", "1"], {}, "seed: 1, but the pipeline was started with 0"),
        (["--data.template", "few_shot"], {}, "data.template: 'few_shot', but the pipeline"),
        (
            ["--sft.trainer.steps", "99"],
            {"sft": "complete", "rankings": "complete"},
            "sft.trainer.steps: 99, but stage rankings was begun",
        ),
        (
            ["--sft.policy.optimizer.learning_rate", "0.5"],
            {"sft": "complete"},
            "stage sft is complete",
        ),
        (["--ppo.trainer.steps", "99"], {"ppo_without_ptx": "begun"}, "stage ppo_without_ptx was"),
        (["--compare_without_ptx", "true"], {"ppo": "complete"}, None),
        (["--sft.trainer.steps", "99"], {"sft": "begun"}, None),
        (["--ppo.trainer.steps", "99"], {"sft": "complete", "rankings": "complete"}, None),
        (["--run.progress", "false", "--cluster.object_store_gib", "2"], {"ppo": "begun"}, None),
        (["--last_stage", "sft"], {"ppo": "begun"}, None),
    ],
)
def test_a_resume_may_change_what_no_later_stage_depends_on(
    flags: list[str], states: dict[str, StageState], message: str | None
):
    saved = configured().model_dump(mode="json")
    lines = refused_changes(saved, configured(*flags), NEW | states)
    if message is None:
        assert lines == []
    else:
        assert any(message in line for line in lines), lines


def test_a_refused_change_of_a_shared_field_is_one_line():
    saved = configured().model_dump(mode="json")
    assert len(refused_changes(saved, configured("--seed", "1"), NEW)) == 1


def test_pairs_and_ties_are_counted():
    """(0, 1, 1) has the pairs 01, 01 and 11, of which one is a tie; (0, 1) has one pair."""
    counts = RankingCounts.of([(0, 1, 1), (0, 1)])
    assert counts == RankingCounts(rankings=2, responses=5, pairs=4, ties=1)


async def test_the_summary_and_the_page_show_what_each_stage_did(pipeline: PipelineDirectory):
    config = configured("--sft.trainer.steps", "4", "--last_stage", "reward_model")
    directory = pipeline.stage("sft")
    await finished_stage(directory, 4)
    directory.report.write_text("")
    log = MetricsLog(directory)
    log.on_evaluation(0, {"eval/loss": 1.5, "eval/accuracy": 0.25})
    log.on_step(4, {"policy/loss": 0.5})
    log.on_evaluation(4, {"eval/loss": 0.125, "eval/accuracy": 0.5})
    log.on_end("finished", "")
    ranking = Ranking(
        example_id="x", prompt="1 + 1 <?", responses=("2", "3", "4"), ranks=(0, 1, 1), answer="2"
    )
    write_rankings([ranking], pipeline.rankings)
    pipeline.add_seconds("sft", 61.0)

    sft, rankings, reward_model = summarize_pipeline(config, pipeline)
    assert (sft.state, rankings.state, reward_model.state) == ("complete", "complete", "new")
    assert [(one.label, one.before, one.after) for one in sft.figures] == [
        ("held-out accuracy", "25.0%", "50.0%"),
        ("held-out loss", "1.5000", "0.1250"),
    ]
    assert [(one.label, one.after) for one in rankings.figures] == [
        ("problems with a ranking", "1"),
        ("pairs of responses", "3"),
        ("of these ties", "33%"),
    ]
    assert (sft.seconds, reward_model.seconds, reward_model.figures) == (61.0, None, ())

    page = render_pipeline(config, pipeline)
    assert "2 of 3 stages are complete, in 1 m 01 s" in page
    assert '<a href="sft/report.html">' in page
    assert "1 + 1 &lt;?" in page
    assert page.count("<figure") == 2  # loss and accuracy of the first stage
    assert json.loads(pipeline.times.read_text()) == {"sft": 61.0}
