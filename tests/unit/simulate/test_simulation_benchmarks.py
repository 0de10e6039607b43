"""The benchmarks of the simulator, in what they compute themselves."""

from __future__ import annotations

import cProfile

import pytest

from benchmarks.driver_scale import GROUPS_PER_CALL, SAMPLES, measure
from benchmarks.simulated_clusters import Found, climb
from benchmarks.simulation_check import FEW, MANY, Case, fit, predict
from rlsys.simulate.run import SimulatedRun
from rlsys.simulate.scenario import layouts

STEP_S, SEQUENCE_S = 0.01, 0.002  # of an engine
TOKEN_S, FIXED_S, SYNC_S, REWARD_S = 0.0005, 0.3, 0.2, 0.1  # of all else


def seconds_of(case: Case) -> dict[str, float]:
    """Return the metrics of a run whose constants are known."""
    prompt_s = case.tokens * (STEP_S + case.samples * SEQUENCE_S)
    return {
        "time/generate": prompt_s * case.prompts / case.workers,
        "time/reward": REWARD_S,
        "time/logprobs": 0.1,
        "time/advantages": 0.05,
        "time/update": FIXED_S - 0.2 + TOKEN_S * case.batch_tokens,
        "time/other": 0.05,
        "time/sync": SYNC_S,
    }


@pytest.mark.parametrize("case", [FEW, MANY, Case(workers=2, prompts=8, samples=8, tokens=32)])
def test_predictions_are_those_of_the_law_behind_the_calibration(case: Case) -> None:
    constants = fit(seconds_of(FEW), seconds_of(MANY))
    assert constants.engine.step_s == pytest.approx(STEP_S)
    assert constants.engine.sequence_s == pytest.approx(SEQUENCE_S)
    assert constants.train_token_s == pytest.approx(TOKEN_S)
    assert predict(case, constants) == pytest.approx(sum(seconds_of(case).values()))


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("peak", range(7))
def test_the_way_up_leads_to_the_best_split(first: int, peak: int) -> None:
    splits = layouts(8, gpus_per_engine=1)[1:]

    def run(index: int) -> Found:
        result = SimulatedRun(
            step_s=1.0,
            tokens_per_s=-abs(index - peak),
            engine_use=1.0,
            generation_idle=0.0,
            training_idle=0.0,
            staleness_mean=0.0,
            staleness_max=0.0,
            dropped_fraction=0.0,
            deaths=0,
            driver_cpu_s=0.0,
        )
        return Found(setting="", layout=splits[index], max_staleness=1, result=result)

    assert climb(run, first, len(splits)).layout == splits[peak]


def test_the_driver_opens_no_record_and_workers_have_work() -> None:
    """A handle of responses raises where the driver opens it."""
    cost = measure(workers=4, tokens=100)
    assert cost.in_flight == pytest.approx(4 * GROUPS_PER_CALL / 2 * SAMPLES, rel=0.5)
    assert cost.cpu_s > 0


def test_the_work_of_the_driver_does_not_depend_on_the_tokens() -> None:
    """It makes as many function calls with four times the tokens."""

    def calls(tokens: int) -> int:
        profile = cProfile.Profile()
        profile.runcall(measure, workers=4, tokens=tokens)
        return sum(entry.callcount for entry in profile.getstats())

    calls(1000)  # what is done once
    assert calls(4000) == pytest.approx(calls(1000), rel=0.03)
