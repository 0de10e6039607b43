"""Simulated runs against arithmetic: the real loops, with nothing but durations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from rlsys.simulate.__main__ import main
from rlsys.simulate.engine import EngineSpeed
from rlsys.simulate.length_laws import LogNormalLengths, MeasuredLengths, parse_law
from rlsys.simulate.options import parse_options
from rlsys.simulate.run import run_scenario
from rlsys.simulate.scenario import Failures, Scenario, Workload, layouts

# 4 prompts of 2 responses of 10 tokens: 2 engines have 4 sequences each, so a step of an engine
# takes 0.5 s and all are sampled after 5 s.
WORKLOAD = Workload(
    prompts_per_step=4,
    samples_per_prompt=2,
    lengths=MeasuredLengths((10,)),
    reward_s=0.5,
    train_token_s=0.025,  # 2 s for 80 tokens
    train_fixed_s=1.0,
    sync_s=0.25,
)
BY_TURNS = Scenario(
    workload=WORKLOAD,
    engines=2,
    engine=EngineSpeed(step_s=0.1, sequence_s=0.1),
    max_staleness=0,
    steps=6,
)


def test_a_step_by_turns_takes_the_sum_of_its_parts():
    result = run_scenario(BY_TURNS)
    assert result.step_s == pytest.approx(5.0 + 0.5 + 3.0 + 0.25)
    assert result.tokens_per_s == pytest.approx(80 / 8.75)
    assert result.generation_idle == pytest.approx(1 - 5.0 / 8.75)
    assert result.training_idle == pytest.approx(1 - 3.0 / 8.75)
    assert result.staleness_max == 0


def test_training_beside_sampling_takes_as_long_as_the_slower_of_both():
    """Two groups a call are 4 sequences: each engine samples the half of a step in 5 s."""
    result = run_scenario(
        dataclasses.replace(BY_TURNS, max_staleness=1, groups_per_call=2, steps=40)
    )
    assert result.step_s == pytest.approx(5.0, rel=0.01)
    assert result.generation_idle == pytest.approx(0.0, abs=0.01)
    assert 0 < result.staleness_max <= 1

    slow = dataclasses.replace(WORKLOAD, train_fixed_s=10.0)  # the trainer is the slower one
    result = run_scenario(
        dataclasses.replace(BY_TURNS, workload=slow, max_staleness=1, groups_per_call=2, steps=40)
    )
    assert result.step_s == pytest.approx(12.0 + 0.25, rel=0.01)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_the_same_seed_gives_the_same_run_and_the_bound_holds(max_staleness: int):
    lengths = LogNormalLengths(median=50, sigma=1.0, longest=500)
    scenario = dataclasses.replace(
        BY_TURNS,
        workload=dataclasses.replace(WORKLOAD, lengths=lengths),
        max_staleness=max_staleness,
    )

    def values() -> dict[str, float]:
        found = dataclasses.asdict(run_scenario(scenario))
        del found["driver_cpu_s"]
        return found

    assert values() == values()
    assert values()["staleness_max"] <= max_staleness


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_runs_with_failures_end_and_take_longer(max_staleness: int):
    healthy = dataclasses.replace(BY_TURNS, max_staleness=max_staleness, steps=30)
    failing = dataclasses.replace(healthy, failures=Failures(mean_s=20.0, restart_s=15.0))
    slower = run_scenario(failing)
    assert slower.deaths > 0
    assert slower.step_s > run_scenario(healthy).step_s


def test_the_start_and_the_end_of_a_run_do_not_count():
    """The engines are the slower side: they never wait while there are prompts to come."""
    scenario = dataclasses.replace(BY_TURNS, max_staleness=3, groups_per_call=2, steps=1)
    result = run_scenario(scenario)
    assert result.step_s == pytest.approx(5.0, rel=0.01)
    assert result.generation_idle == pytest.approx(0.0, abs=0.01)


def test_laws_of_lengths(tmp_path: Path):
    generator = np.random.default_rng(0)
    drawn = LogNormalLengths(median=100, sigma=1.0, longest=1000).draw(generator, 20_000)
    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    assert drawn.max() == 1000
    assert drawn.min() >= 1

    assert parse_law("constant:7") == MeasuredLengths((7,))
    assert parse_law("lognormal:5,0.5,9") == LogNormalLengths(median=5, sigma=0.5, longest=9)
    file = tmp_path / "step_000001.parquet"
    masks = [[False, True, True], [False], [True]]
    pyarrow.parquet.write_table(pa.table({"response_mask": masks}), file)
    assert parse_law(str(file)) == MeasuredLengths([2, 1])


@pytest.mark.parametrize(
    "text",
    ["constant:0", "constant:x", "lognormal:1,2", "lognormal:0,1,5", "weibull:3", "a.parquet"],
)
def test_other_laws_are_refused(text: str):
    with pytest.raises(ValueError, match=r"lengths: .*Give lognormal"):
        parse_law(text)


def test_layouts_are_all_gpus_by_turns_and_splits():
    all_of_them, *splits = layouts(16, gpus_per_engine=2)
    assert all_of_them.colocated
    assert all_of_them.engines == 8
    for split in splits:
        assert not split.colocated
        assert split.generation_gpus + split.training_gpus == 16
        assert split.generation_gpus == 2 * split.engines
    assert [split.generation_gpus for split in splits] == [2, 4, 6, 8, 10, 12, 14]
    with pytest.raises(ValueError, match="gpus: 3 are fewer"):
        layouts(3, gpus_per_engine=2)


COMMAND = [
    *("--gpus", "4", "--samples", "2", "--steps", "4", "--lengths", "lognormal:20,1,100"),
    *("--staleness", "1", "--groups-per-call", "2"),
]


def test_the_command_prints_a_table_and_draws_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*COMMAND, "--plot", str(tmp_path / "plot.png")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]
    assert len(rows) == 3
    assert "all, by turns" in rows[0]
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_command_prints_json_of_every_split(capsys: pytest.CaptureFixture[str]):
    assert main([*COMMAND, "--json", "--all"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 1 + 3 * 2
    assert {row["max_staleness"] for row in rows} == {0, 1}
    for row in rows:
        assert row["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--engine", "1:100"), "is not SEQUENCES"),
        (("--lengths", "long"), "no law of lengths"),
        (("--staleness", "0"), "at least 1"),
        (("--failures", "5"), "MEAN,RESTART"),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        main([*COMMAND, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--train-tokens 0",
        "--train-tokens nan",
        "--prompts-per-gpu -1",
        "--sync-s -1",
        "--reward-s inf",
        "--engine 1:nan,256:12000",
        "--engine 0:1,256:12000",
        "--engine=-1:-120,256:12000",
    ],
)
def test_numbers_that_no_cluster_has_are_refused(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(words.split())
    assert words.split("=")[0].split()[0] in capsys.readouterr().err
