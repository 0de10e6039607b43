"""Reward functions that fail: in the pool, in metrics, in training, and at registration."""

from __future__ import annotations

import functools
import io
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlsys.algorithms.advantages import available_advantage_estimators, estimator_needs
from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    GenerationConfig,
    KLConfig,
    ObjectiveConfig,
    RewardConfig,
    RewardFunctionConfig,
    RunConfig,
)
from rlsys.config.command_line import ConfigError, parse
from rlsys.data.batches import (
    LogprobBatch,
    RewardBatch,
    RewardFailure,
    RolloutBatch,
    TrainBatch,
)
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.driver.credit_assignment import CreditAssigner, LiveLogprobs, recomputed
from rlsys.math_verifier import ground_truth_answer, reads_ground_truth
from rlsys.metrics import values
from rlsys.plugins import load_plugins
from rlsys.rewards import (
    RewardInput,
    check_reward_function,
    ground_truth_notices,
    register_reward_function,
    verify_math,
)
from rlsys.rewards.pool import HOPELESS_AFTER, RewardPool
from rlsys.rewards.scoring import CompletionOutcomes, FunctionFailure, FunctionReward, run_functions
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.console import Progress, print_summary
from rlsys.run.observers.metrics_log import MetricsRecord
from rlsys.run.reward_failures import RewardFailureError, RewardFailureWatch
from tests.support.rollout_examples import rollouts
from workers.reward_worker import reward_batch

PLUGIN_FOLDER = Path(__file__).resolve().parents[1] / "plugin_package"
PLUGIN = "failing_rewards"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN_FOLDER))
    load_plugins((PLUGIN,))


def configured(*names: str, **fields: Any) -> RewardConfig:
    return RewardConfig(
        functions=tuple(RewardFunctionConfig(name=name) for name in names), **fields
    )


@pytest.fixture
def pools() -> Iterator[list[RewardPool]]:
    """Collect the pools of a test, and shut them down after it."""
    made: list[RewardPool] = []
    yield made
    for pool in made:
        pool.shutdown()


# --- in this process ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "ZeroDivisionError: float division by zero"),
        ("gives_nan", "ValueError: it returned nan; a reward must be finite"),
        ("gives_none", "TypeError: it returned None; a reward is one number"),
        ("gives_list", "TypeError: it returned [1.0] (list); a reward is one number"),
        ("gives_text", "TypeError: it returned '1.0' (str); a reward is one number"),
        (
            "gives_huge",
            "OverflowError: it returned -1e+39, which with weight 1 is beyond float32",
        ),
        (
            "returns_coroutine",
            "TypeError: it returned a coroutine; a reward function is a plain function",
        ),
        ("calls_sys_exit", "it called sys.exit('no more')"),
    ],
)
def test_each_function_counts_for_itself(name: str, message: str):
    score = run_functions(
        configured("math", name, "counts_a").functions,
        RewardInput(completion=r"a \boxed{1}", ground_truth="1"),
    )
    assert score.components[0] == score.components[2] == 1.0
    assert math.isnan(score.components[1])
    failure = score.outcomes[1]
    assert isinstance(failure, FunctionFailure)
    assert (failure.kind, failure.message) == ("error", message)


def test_the_traceback_begins_in_the_function():
    (failure,) = run_functions(
        configured("raises").functions, RewardInput(completion="x", ground_truth="1")
    ).outcomes
    assert isinstance(failure, FunctionFailure)
    lines = failure.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "failing_rewards.py" in lines[1]
    assert lines[-1] == "ZeroDivisionError: float division by zero"
    assert "scoring.py" not in failure.traceback


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.int64(1), np.array(1.0)])
def test_what_counts_as_a_number(value: Any):
    register_reward_function("number_for_test")(lambda completion, ground_truth: value)
    assert run_functions(
        configured("number_for_test").functions, RewardInput(completion="", ground_truth="")
    ).components == (1.0,)


def test_a_sum_that_float32_cannot_hold_is_a_failure_of_its_largest_term():
    """1e38 fits, 1e38 times 10 does not; nor may two terms of 3e38 add up to infinity."""
    for weight, times in ((10.0, 1), (3.0, 2)):
        functions = tuple(
            RewardFunctionConfig(name="counts_a", weight=weight, parameters={"scale": 1e38})
            for _ in range(times)
        )
        scores = [run_functions(functions, RewardInput(completion="a", ground_truth=""))]
        batch = reward_batch(0, RewardConfig(functions=functions), scores)
        assert np.isfinite(batch.rewards).all()
        assert len(batch.failures) == times
        assert "beyond float32" in batch.failures[0].message


def test_objects_and_partials_are_reward_functions():
    functions = (
        RewardFunctionConfig(name="counts_a", parameters={"scale": 2.0}),
        RewardFunctionConfig(name="is_short"),
    )
    for function in functions:
        check_reward_function(function.name, function.parameters)
    assert run_functions(
        functions, RewardInput(completion="banana", ground_truth="")
    ).components == (6.0, 0.0)
    with pytest.raises(ValueError, match=r"scal: CountsLetter has no such parameter.*scale"):
        check_reward_function("counts_a", {"scal": 2.0})


# --- before a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("is_async", "is an async function. Write it as a plain function"),
        ("is_generator", "is a generator. Write it as a plain function"),
        ("takes_one", "cannot be called: too many positional arguments. A reward function takes"),
        ("takes_swapped", "takes ground_truth and completion in the wrong order"),
        ("takes_batch", "takes a batch; here a reward function gets one completion"),
        ("takes_tokens_by_keyword", "takes completion_tokens by keyword only. Put it third"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=r"^reward\.functions\.name: ") as refusal:
        check_reward_function(name, {})
    assert repr(name) in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "soft_overlong",
            {"max_tokens": 100, "buffer_tokens": 0},
            "reward.functions.parameters.buffer_tokens: 0 must",
        ),
        ("repetition", {"ngram": 0}, "reward.functions.parameters.ngram: 0 must be at least 1"),
        (
            "repetition",
            {"scale": math.nan},
            "reward.functions.parameters.scale: nan is not a number. Give a finite one",
        ),
        (
            "has_length",
            {"shortest": 2000},
            "reward.functions.parameters of 'has_length': shortest 2000 is not below longest.",
        ),
    ],
)
def test_values_of_parameters_are_refused(name: str, parameters: dict, message: str):
    with pytest.raises(ValueError, match=r"^reward\.functions\.parameters") as refusal:
        check_reward_function(name, parameters)
    assert message in str(refusal.value)


def test_a_users_function_is_not_run_before_the_run():
    called: list[str] = []

    def reward(completion: str, ground_truth: str) -> float:
        called.append(completion)
        return 1.0

    register_reward_function("watched_for_test")(reward)
    check_reward_function("watched_for_test", {})
    assert called == []


def test_what_cannot_be_a_reward_is_refused_at_registration():
    class Letters:
        def __call__(self, completion: str, ground_truth: str) -> float:
            return 1.0

    with pytest.raises(
        ValueError, match=r"'letters': Letters is a class\. .* register an instance"
    ):
        register_reward_function("letters")(Letters)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"'number': a float cannot be called"):
        register_reward_function("number")(1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="is not a name"):
        register_reward_function(Letters())  # pyright: ignore[reportArgumentType]
    partial = functools.partial(verify_math)
    with pytest.raises(ValueError, match=r"'counts_a' is already registered by failing_rewards"):
        register_reward_function("counts_a")(partial)  # pyright: ignore[reportArgumentType]


BROKEN_PLUGINS = {
    "missing": ("import no_such_package_anywhere\n", "No module named 'no_such_package_anywhere'"),
    "syntax": ("def f(:\n", "SyntaxError"),
    "raising": ("value = {}['x']\n", "KeyError: 'x', {folder}/raising.py line 1"),
    "leaving": ("import sys\nsys.exit(3)\n", "SystemExit: 3, {folder}/leaving.py line 2"),
    "taken": (
        "from rlsys.rewards import register_reward_function\n"
        "@register_reward_function('math')\n"
        "def mine(completion, ground_truth): return 1.0\n",
        "reward function 'math' is already registered by rlsys.rewards.functions.math_reward",
    ),
    "twice": (
        "from rlsys.rewards import register_reward_function\n"
        "@register_reward_function('twice')\n"
        "def mine(completion, ground_truth): return 1.0\n"
        "@register_reward_function('twice')\n"
        "def mine(completion, ground_truth): return 0.0\n",
        "reward function 'twice' is already registered by twice.mine",
    ),
}


@pytest.mark.parametrize("name", BROKEN_PLUGINS)
def test_a_broken_plugin_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, message = BROKEN_PLUGINS[name]
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"^plugins: ") as refusal:
        load_plugins((name,))
    text = str(refusal.value)
    assert repr(name) in text
    assert message.replace("{folder}", str(tmp_path)) in text
    assert "\n" not in text


def test_short_forms_of_the_functions():
    recipe = RunConfig()
    for flag, names in (
        ("math", ["math"]),
        ("math,format_boxed", ["math", "format_boxed"]),
        ("[math, {name: repetition, weight: 0.5}]", ["math", "repetition"]),
        ("{name: repetition, weight: 0.5}", ["repetition"]),
    ):
        config = parse(recipe, ["--reward.functions", flag]).config
        assert [function.name for function in config.reward.functions] == names
        assert config.reward.functions[-1].weight == (0.5 if "weight" in flag else 1.0)
    assert RewardConfig.model_validate({"functions": "math"}) == configured("math")
    both = RewardConfig.model_validate({"functions": ["math", {"name": "repetition"}]})
    assert both == configured("math", "repetition")


@pytest.mark.parametrize("weight", [".nan", ".inf", "-.inf", "1e39"])
def test_weights_that_make_every_reward_meaningless_are_refused(weight: str):
    flag = f"[{{name: math, weight: {weight}}}]"
    with pytest.raises(ConfigError, match=r"^reward\.functions\.0\.weight: .* does not fit"):
        parse(RunConfig(), ["--reward.functions", flag])


# --- ground truths --------------------------------------------------------------------------------

GSM8K = "He sold 48/2 = <<48/2=24>>24 clips.\nThat makes 48+24 = 1,072.\n#### 1,072"


@pytest.mark.parametrize(
    ("ground_truth", "answer"),
    [(GSM8K, "1,072"), ("#### 72", "72"), (r"so \boxed{72}", "72"), ("72", "72"), ("####", "")],
)
def test_answer_of_a_ground_truth(ground_truth: str, answer: str):
    assert ground_truth_answer(ground_truth) == answer


@pytest.mark.parametrize(
    ("completion", "extraction", "score"),
    [
        (r"\boxed{1072}", "boxed", 1.0),
        (r"\boxed{72}", "boxed", 0.0),
        ("so\n#### 1072", "after_hashes", 1.0),
        ("#### 5\n#### 1,072\nthat is all", "after_hashes", 1.0),
        ("so\n#### 1072", "lenient", 1.0),
        ("so\n#### 1072", "boxed", 0.0),  # only a box is accepted
        (r"\boxed{1072}", "after_hashes", 0.0),
        ("####", "after_hashes", 0.0),
    ],
)
def test_hashes_in_ground_truths_and_completions(completion: str, extraction: str, score: float):
    assert verify_math(completion, GSM8K, extraction=extraction).score == score


@pytest.mark.parametrize(
    ("ground_truth", "known"),
    [
        ("72", True),
        (r"\frac{1}{2}", True),
        ("(A)", True),
        ("3:30 pm", True),
        (r"\text{the red one}", True),
        (GSM8K, True),
        ("", False),
        (r"\frac{1", False),
        (r"\begin{picture}1\end{picture}", False),
        (GSM8K.split("####")[0], False),
        ("['4']", False),
    ],
)
def test_ground_truths_that_the_verifier_knows(ground_truth: str, known: bool):
    assert reads_ground_truth(ground_truth) is known


def test_unreadable_ground_truths_are_counted_with_examples():
    truths = ["4", r"\frac{1", "5", r"\frac{1", "", r"\frac{2", r"\frac{3", "x" * 3000]
    functions = configured("math", "counts_a").functions
    (line,) = ground_truth_notices(functions, {"data.train": truths, "data.eval": ["1"]})
    assert line.startswith(
        "data.train: 6 of 8 ground truths cannot be parsed by the verifier of reward 'math', such "
        "as "
        r"'\\frac{1', '', '\\frac{2'. "
    )
    (line,) = ground_truth_notices(functions, {"data.eval": [GSM8K, "1"]})
    assert line.startswith("data.eval: 1 of 2 ground truths hold '####', as in GSM8K")
    assert ground_truth_notices(configured("counts_a").functions, {"data.train": truths}) == []


def test_each_distinct_ground_truth_is_read_once_and_not_too_many(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    register_reward_function(
        "picky_for_test", reads_ground_truth=lambda truth: bool(asked.append(truth))
    )(lambda completion, ground_truth: 1.0)
    functions = configured("picky_for_test").functions
    ground_truth_notices(functions, {"data.train": ["1", "2", "1", "1"]})
    assert asked == ["1", "2"]
    asked.clear()
    monkeypatch.setattr("rlsys.rewards.ground_truths.MAX_DISTINCT", 10)
    (line,) = ground_truth_notices(functions, {"data.train": [str(i) for i in range(95)]})
    assert asked == [str(i) for i in range(0, 95, 10)]
    assert "10 of 10 ground truths (of 95) cannot be parsed" in line


# --- the pool's processes -------------------------------------------------------------------------


def test_a_function_that_ends_or_hangs_its_process_costs_its_own_score_alone(
    pools: list[RewardPool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rlsys.rewards.pool.FIRST_CALL_S", 0.0)
    names = (
        "counts_a",
        "calls_os_exit",
        "math",
        "hangs",
        "calls_sys_exit",
        "is_short",
        "segfaults",
    )
    pool = RewardPool(configured(*names, timeout_s=0.5), (PLUGIN,))
    pools.append(pool)
    outcomes = (
        pool.submit(RewardInput(completion=r"a \boxed{1}", ground_truth="1")).result().outcomes
    )
    told = [
        outcome.reward if isinstance(outcome, FunctionReward) else (outcome.kind, outcome.message)
        for outcome in outcomes
    ]
    assert told == [
        1.0,
        ("crash", "its process ended with exit code 7"),
        1.0,
        ("timeout", "no answer within reward.timeout_s 0.5"),
        ("error", "it called sys.exit('no more')"),
        0.0,
        ("crash", "its process was ended by SIGSEGV"),
    ]
    printed = "\n".join(pool.output.take())
    assert "last words" in printed
    assert "reward 'hangs': timeout, no answer within reward.timeout_s 0.5; on ...'a" in printed


def test_a_process_that_is_killed_costs_nothing(pools: list[RewardPool], tmp_path: Path):
    """The functions before it keep their scores; those from it on run in the next process."""
    pool = RewardPool(configured("counts_a", "is_killed_once", "is_short"), (PLUGIN,))
    pools.append(pool)
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in (*paths, paths[0]):
        result = pool.submit(RewardInput(completion=path, ground_truth="")).result()
        assert result.components[1:] == (1.0, 0.0)
    assert pool.take_deaths() == ["its process was ended by SIGKILL"] * 2
    assert pool.take_deaths() == []


def test_an_idle_process_that_is_killed_costs_nothing(pools: list[RewardPool]):
    pool = RewardPool(configured("counts_a"), (PLUGIN,))
    pools.append(pool)
    pool.warm_up()
    for pid in pool.process_ids():
        os.kill(pid, signal.SIGKILL)
    found = [pool.submit(RewardInput(completion="aa", ground_truth="")) for _ in range(8)]
    assert [one.result().components for one in found] == [(2.0,)] * 8
    assert set(pool.take_deaths()) == {"its process was ended by SIGKILL"}


def test_a_function_that_ends_its_process_is_no_fault(pools: list[RewardPool]):
    pool = RewardPool(configured("calls_os_exit"), (PLUGIN,))
    pools.append(pool)
    (outcome,) = pool.submit(RewardInput(completion="a", ground_truth="")).result().outcomes
    assert isinstance(outcome, FunctionFailure)
    assert pool.take_deaths() == []


def test_a_first_answer_may_take_longer_for_what_it_imports(pools: list[RewardPool]):
    pool = RewardPool(configured("imports_late", timeout_s=0.1), (PLUGIN,))
    pools.append(pool)
    assert [
        pool.submit(RewardInput(completion="a", ground_truth="")).result().components
        for _ in range(2)
    ] == [(1.0,), (1.0,)]


def test_a_sum_with_a_reward_from_elsewhere_cannot_be_infinite(pools: list[RewardPool]):
    """3e38 alone fits into float32; with the score of a reward model beside it two could not."""
    function = RewardFunctionConfig(name="counts_a", parameters={"scale": 3e38})
    config = RewardConfig(functions=(function,))
    for terms, fits in ((None, True), (2, False)):
        pool = RewardPool(config, (PLUGIN,), terms=terms)
        pools.append(pool)
        found = pool.submit(RewardInput(completion="a", ground_truth="")).result()
        assert isinstance(found.outcomes[0], FunctionReward) == fits


def test_what_a_function_prints_is_kept_until_it_is_taken(pools: list[RewardPool]):
    pool = RewardPool(configured("gives_none"), (PLUGIN,))
    pools.append(pool)
    for _ in range(3):
        pool.submit(RewardInput(completion="12345", ground_truth="")).result()
    lines: list[str] = []
    for _ in range(100):  # the lines come by a pipe of their own
        lines += pool.output.take()
        if sum(line.startswith("scored") for line in lines) == 3:
            break
        time.sleep(0.02)
    assert sum(line == "scored a completion of 5 characters" for line in lines) == 3
    assert pool.output.take() == []


def test_a_function_that_never_succeeds_is_not_asked_for_ever(pools: list[RewardPool]):
    """A batch of a thousand timeouts of two seconds each would take half an hour."""
    pool = RewardPool(configured("raises", "counts_a"), (PLUGIN,))
    pools.append(pool)
    scores = [
        pool.submit(RewardInput(completion="a", ground_truth="")).result()
        for _ in range(HOPELESS_AFTER + 2)
    ]
    messages = []
    for score in scores:
        assert isinstance(score.outcomes[0], FunctionFailure)
        messages.append(score.outcomes[0].message)
    assert len(set(messages[:HOPELESS_AFTER])) == 1
    assert set(messages[HOPELESS_AFTER:]) == {
        f"not called: it had failed on all of the first {HOPELESS_AFTER} responses"
    }
    assert {score.components[1] for score in scores} == {1.0}


def test_a_plugin_that_fails_in_the_processes_only_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[RewardPool]
):
    (tmp_path / "only_here.py").write_text(
        "import sys\nif sys.argv[0].endswith('pool.py'): raise RuntimeError('not in a process')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = RewardPool(configured("math"), ("only_here",))
    pools.append(pool)
    with pytest.raises(
        RuntimeError,
        match=r"could not start: plugins: 'only_here' failed .* RuntimeError: not in a process",
    ):
        pool.warm_up()


def test_a_process_that_starts_too_slowly_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[RewardPool]
):
    (tmp_path / "slow_import.py").write_text(
        "import sys, time\nif sys.argv[0].endswith('pool.py'): time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("rlsys.rewards.pool.START_LIMIT_S", 0.01)
    pool = RewardPool(configured("math"), ("slow_import",))
    pools.append(pool)
    with pytest.raises(TimeoutError, match=r"did not start within 0\.01 s: a plug-in"):
        pool.warm_up()


# --- records --------------------------------------------------------------------------------------


def scores(*rows: tuple[float | str, ...]) -> list[CompletionOutcomes]:
    """Return the outcomes of a batch, with a row of numbers and failure kinds for each response."""
    return [CompletionOutcomes(outcomes=tuple(map(outcome, row))) for row in rows]


def outcome(value: float | str) -> FunctionReward | FunctionFailure:
    if not isinstance(value, str):
        return FunctionReward(reward=value)
    kind: Any = value
    return FunctionFailure(kind=kind, message=f"{value}!", traceback="Traceback")


TWO = (
    RewardFunctionConfig(name="math"),
    RewardFunctionConfig(name="format_boxed", weight=0.5),
)
MIXED = scores((1.0, 1.0), ("timeout", 1.0), (0.0, "error"), ("crash", "error"))


def test_a_failed_function_is_missing_and_its_term_is_zero_or_the_response_is_dropped():
    zero = reward_batch(7, RewardConfig(functions=TWO), MIXED)
    assert zero.rewards.tolist() == [1.5, 0.5, 0.0, 0.0]
    assert zero.scored.all()
    np.testing.assert_array_equal(zero.components["math"], [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(zero.components["format_boxed"], [1, 1, np.nan, np.nan])
    assert zero.correct.tolist() == [True, False, False, False]
    assert zero.reasons == ("ok", "timeout", "ok", "crash")
    found = [(failure.row, failure.function, failure.kind) for failure in zero.failures]
    assert found == [
        (1, "math", "timeout"),
        (2, "format_boxed", "error"),
        (3, "math", "crash"),
        (3, "format_boxed", "error"),
    ]
    assert [bool(failure.traceback) for failure in zero.failures] == [True, True, False, False]

    drop = reward_batch(7, RewardConfig(functions=TWO, on_failure="drop"), MIXED)
    np.testing.assert_array_equal(drop.rewards, np.array([1.5, np.nan, np.nan, np.nan]))
    assert drop.scored.tolist() == [True, False, False, False]
    assert drop.correct.tolist() == zero.correct.tolist()
    assert drop.all_equal  # one response has nothing to differ from
    assert not zero.all_equal


def test_failures_keep_their_responses_when_parts_are_joined():
    parts = [reward_batch(7, RewardConfig(functions=TWO), MIXED[:2]) for _ in range(2)]
    joined = RewardBatch.concatenate(parts)
    assert [failure.row for failure in joined.failures] == [1, 3]


def test_failures_in_metrics_and_files(tmp_path: Path):
    made = rollouts([([9], [[1, 2], [1, 2, 3, 4]]), ([8, 8], [[5], [5, 6, 7]])])
    rewards = reward_batch(0, RewardConfig(functions=TWO, on_failure="drop"), MIXED)
    config = RunConfig(algorithm=AlgorithmConfig(advantage=AdvantageConfig(name="reinforce")))
    train, metrics = CreditAssigner(config).assign(made, rewards, [], [])
    numbers = values(batch_metrics(train) | metrics)
    assert numbers["reward/mean"] == 1.5
    assert numbers["reward/accuracy"] == 0.25  # a response that could not be scored is not correct
    assert numbers["reward/component/math"] == 0.5
    assert numbers["reward/component/format_boxed"] == 1.0
    assert (numbers["reward/errors"], numbers["reward/timeouts"], numbers["reward/crashes"]) == (
        2,
        1,
        1,
    )
    assert (numbers["reward/failed/math"], numbers["reward/failed/format_boxed"]) == (2, 2)
    assert numbers["reward/dropped"] == 3
    write_rollouts(train, tmp_path / "step.parquet")
    rows = read_rollouts(tmp_path / "step.parquet")
    assert [math.isnan(row["reward"]) for row in rows] == [False, True, True, True]
    assert [math.isnan(row["reward_math"]) for row in rows] == [False, True, False, True]
    assert [row["failure"] for row in rows] == [
        "",
        "math: timeout, timeout!",
        "format_boxed: error, error!",
        "math: crash, crash!; format_boxed: error, error!",
    ]


# --- what is trained on ---------------------------------------------------------------------------

KEPT = np.array([0, 2, 3, 4, 6, 7])


def groups(rows: np.ndarray | None = None) -> RolloutBatch:
    """Return two groups of four responses of 1 to 4 tokens, or some of them."""
    texts = [
        [[1, 2], [1, 2, 3, 4], [3], [2, 2, 2]],
        [[5, 5, 5], [5], [6, 7], [5, 6]],
    ]
    chosen = np.arange(8) if rows is None else rows
    return rollouts(
        [([9, 9 + g], [texts[g][r - 4 * g] for r in chosen if r // 4 == g]) for g in (0, 1)]
    )


def plain_rewards(array: list[float]) -> RewardBatch:
    numbers = np.asarray(array, dtype=np.float32)
    return RewardBatch(
        batch_id=0,
        rewards=numbers,
        accuracies=numbers,
        components={"math": numbers},
        reasons=("ok",) * len(numbers),
        extracted_answers=("",) * len(numbers),
    )


def noise(made: RolloutBatch, rows: np.ndarray, seed: int) -> np.ndarray:
    """Return a number for each sampled token, which does not depend on the batch."""
    flat = np.zeros(len(made.token_ids), dtype=np.float32)
    for i, row in enumerate(rows):
        first, last = made.sequence_offsets[i], made.sequence_offsets[i + 1]
        length = int(last - first) - 2
        flat[last - length : last] = np.random.default_rng([seed, row]).random(length) - 1.1
    return flat


def responses(made: RolloutBatch, flat: np.ndarray) -> list[list[float]]:
    starts = made.sequence_offsets[:-1] + made.prompt_lengths
    ends = made.sequence_offsets[1:]
    return [flat[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def logprobs(made: RolloutBatch, rows: np.ndarray, seed: int) -> list[LogprobBatch]:
    norms = np.where(made.response_mask, noise(made, rows, seed + 1) + 1.2, 0.0)
    return [
        LogprobBatch(
            batch_id=0,
            rows=np.arange(len(made)),
            logprobs=noise(made, rows, seed),
            squared_score_norms=norms.astype(np.float32),
        )
    ]


BUILT_IN = [name for name in available_advantage_estimators() if not name.startswith("example")]


@pytest.mark.parametrize("estimator", BUILT_IN)
def test_a_dropped_response_is_as_if_it_had_not_been_sampled(estimator: str):
    """The other responses have the advantages of a batch without it, for every estimator."""
    in_advantage = "ref_logprobs" in estimator_needs(estimator)
    config = RunConfig(
        generation=GenerationConfig(max_tokens=4, min_tokens=0),
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(name=estimator),
            kl=KLConfig(coefficient=0.1, placement="advantage" if in_advantage else "loss"),
        ),
    )
    numbers = [1.0, math.nan, 0.0, 0.5, 0.0, math.nan, 1.0, 0.25]
    greedy = plain_rewards([0.5, 0.25]) if "greedy_rewards" in estimator_needs(estimator) else None

    def assigned(rows: np.ndarray, rewards: list[float]):
        made = groups(rows)
        object.__setattr__(made, "rollout_logprobs", noise(made, rows, 5))
        return made, *CreditAssigner(config).assign(
            made, plain_rewards(rewards), logprobs(made, rows, 7), logprobs(made, rows, 9), greedy
        )

    whole, train, metrics = assigned(np.arange(8), numbers)
    less, expected, _ = assigned(KEPT, [number for number in numbers if number == number])
    assert isinstance(train, TrainBatch)
    assert isinstance(expected, TrainBatch)
    found = responses(whole, train.advantages)
    for row, advantages in zip(KEPT, responses(less, expected.advantages), strict=True):
        assert found[row] == pytest.approx(advantages, abs=1e-6), row
    assert not np.any(found[1])
    assert not np.any(found[5])
    assert train.trained is not None
    assert np.flatnonzero(train.trained).tolist() == KEPT.tolist()
    assert expected.trained is None
    assert values(metrics)["reward/dropped"] == 2


def test_recomputed_advantages_leave_dropped_responses_out_too():
    config = RunConfig(
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(name="rloo", recompute=True),
            objective=ObjectiveConfig(weight="none"),
        )
    )
    made = groups()
    rewards = plain_rewards([1.0, math.nan, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    train, _ = CreditAssigner(config).assign(made, rewards, [], [])
    assert not isinstance(train, TrainBatch)
    assert train.trained is not None
    assert not train.trained[1]
    zeros = np.zeros(len(made.token_ids), dtype=np.float32)
    live = LiveLogprobs(logprobs=zeros, squared_score_norms=zeros)
    made_again = recomputed(config, train, np.arange(4), live, {})
    found = responses(made, made_again.batch.advantages)
    assert [row[0] for row in found[:4]] == [1.0, 0.0, -0.5, -0.5]  # of three, not of four


def test_a_group_without_the_greedy_reward_that_it_is_compared_with_is_dropped():
    config = RunConfig(algorithm=AlgorithmConfig(advantage=AdvantageConfig(name="remax")))
    rewards, greedy = plain_rewards([1.0, 0.0] * 4), plain_rewards([math.nan, 0.25])
    train, _ = CreditAssigner(config).assign(groups(), rewards, [], [], greedy)
    assert train.trained is not None
    assert train.trained.tolist() == [False] * 4 + [True] * 4
    assert isinstance(train, TrainBatch)
    assert [row[0] for row in responses(groups(), train.advantages)] == [0] * 4 + [0.75, -0.25] * 2


def test_a_batch_without_any_reward_trains_nothing():
    config = RunConfig(algorithm=AlgorithmConfig(advantage=AdvantageConfig(name="grpo")))
    train, metrics = CreditAssigner(config).assign(groups(), plain_rewards([math.nan] * 8), [], [])
    assert isinstance(train, TrainBatch)
    assert not train.advantages.any()
    assert train.trained is not None
    assert not train.trained.any()
    assert values(metrics)["reward/dropped"] == 8
    assert "reward/mean" not in values(batch_metrics(train))


# --- the run --------------------------------------------------------------------------------------


def failing(rows: int, failed: int, *, function: str = "mine", traceback: str = "") -> RewardBatch:
    """Return a batch of responses, the first of which failed."""
    components = np.ones(rows, dtype=np.float32)
    components[:failed] = np.nan
    return RewardBatch(
        batch_id=0,
        rewards=np.nan_to_num(components),
        accuracies=components,
        components={function: components},
        reasons=("error",) * failed + ("ok",) * (rows - failed),
        extracted_answers=("",) * rows,
        failures=tuple(
            RewardFailure(
                row=i,
                function=function,
                kind="error",
                message="ValueError: no",
                traceback=traceback,
            )
            for i in range(failed)
        ),
    )


def _joined_functions(first: RewardBatch, second: RewardBatch) -> RewardBatch:
    """Return the responses of `first` with the functions of both."""
    return replace(
        first,
        components={**first.components, **second.components},
        failures=(*first.failures, *second.failures),
    )


def test_a_run_whose_rewards_fail_from_the_start_is_stopped(caplog: pytest.LogCaptureFixture):
    shown: list[str] = []
    watch = RewardFailureWatch(shown.append)
    parts = [failing(4, 2), failing(4, 3, traceback="Traceback\n  line 3\nValueError: no\n")]
    with pytest.raises(
        RewardFailureError,
        match=r"reward\.functions: 'mine' failed on 5 of the 8 responses of the first training "
        r"batch; the first failure: error, ValueError: no\.",
    ):
        watch.check(parts, "training")
    assert shown == ["reward 'mine' failed (error): ValueError: no"]  # once
    both = [failing(4, 4), failing(4, 4, function="other")]
    with pytest.raises(RewardFailureError, match=r"'mine' failed on 4 .* So did 'other'\."):
        RewardFailureWatch().check([_joined_functions(*both)], "training")
    assert shown[0] in caplog.text


def test_half_of_the_first_batch_may_fail_and_later_all_of_one():
    shown: list[str] = []
    watch = RewardFailureWatch(shown.append)
    watch.check([failing(4, 2, traceback="Traceback\nValueError: no\n")], "evaluation")
    watch.check([failing(4, 2)], "training")
    watch.check([failing(4, 4)], "training")
    watch.check([failing(4, 4)], "evaluation")
    assert shown == ["reward 'mine' failed (error): ValueError: no\nTraceback\nValueError: no"]
    watch.check([failing(4, 1, function="other")], "training")
    assert len(shown) == 2


def test_failures_are_told_below_the_row_of_their_step(tmp_path: Path):
    stream = io.StringIO()
    progress = Progress(Console(file=stream, width=200), live=False)
    progress.on_start(1, 2)
    progress.on_step(1, {"reward/failed/mine": 3.0, "reward/errors": 3.0, "time/step": 1.0})
    progress.on_step(2, {"reward/failed/mine": 0.0, "reward/failed/math": 0.0, "time/step": 1.0})
    told = [line for line in stream.getvalue().splitlines() if "failed" in line]
    assert told == [
        "        !  reward functions failed on responses of this step: mine 3 (errors 3)"
    ]
    records = [
        MetricsRecord(kind="train", step=step, time=0.0, values={"reward/failed/mine": 3.0 * step})
        for step in (1, 2)
    ]
    print_summary(Console(file=stream, width=200), records, RunDirectory(tmp_path), 1.0)
    assert re.search(r"failed rewards\W+mine 9\b", stream.getvalue())
