"""The reward worker on real Ray and real processes: limits, crashes, plug-ins."""

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rlsys.config import RewardConfig, RewardFunctionConfig, RunConfig
from rlsys.data.batches import RolloutBatch
from rlsys.metrics import values
from tests.support.rollout_examples import rollouts
from workers.reward_worker import RewardOutput, RewardWorker, RewardWorkerClient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
PLUGIN = "rlsys_example_plugin"


@pytest.fixture(autouse=True)
def plugin_path(monkeypatch: pytest.MonkeyPatch):
    folder = str(Path(__file__).parents[1] / "plugin_package")
    monkeypatch.setenv("PYTHONPATH", folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def worker(
    plugin_path: str, *functions: RewardFunctionConfig, processes: int = 2, timeout_s: float = 2.0
) -> Any:
    """Start a reward worker with these functions."""
    config = RunConfig(
        plugins=(PLUGIN,),
        reward=RewardConfig(functions=functions, processes=processes, timeout_s=timeout_s),
    )
    remote_class: Any = ray.remote(RewardWorker)
    environment = {"env_vars": {"PYTHONPATH": plugin_path}}
    options = {"num_cpus": 0, "max_concurrency": 100, "runtime_env": environment}
    return remote_class.options(**options).remote(config)


def with_texts(texts: list[str], first_group: int = 0) -> RolloutBatch:
    """Return groups of one response each; the ground truth of group i is str(i)."""
    batch = rollouts([([1], [[2]]) for _ in texts], first_group=first_group)
    return replace(batch, response_texts=tuple(texts))


async def test_weighted_sum_reasons_and_answers(plugin_path: str):
    actor = worker(
        plugin_path,
        RewardFunctionConfig(name="math"),
        RewardFunctionConfig(name="format_boxed", weight=0.1),
    )
    batch = with_texts([r"\boxed{0}", r"\boxed{7}", "none", r"\boxed{3} and \boxed{3}"])
    rewards = await RewardWorkerClient([actor]).score(ray.put(batch))
    assert rewards.rewards.tolist() == pytest.approx([1.1, 0.1, 0.0, 1.0])
    assert rewards.accuracies.tolist() == [1, 0, 0, 1]
    assert rewards.reasons == ("correct", "wrong", "no_answer", "correct")
    assert rewards.extracted_answers == ("0", "7", "", "3")
    ray.kill(actor)


async def test_hanging_crashing_and_failing_functions_cost_one_answer_each(plugin_path: str):
    actor = worker(plugin_path, RewardFunctionConfig(name="example_trouble"), timeout_s=1.0)
    client = RewardWorkerClient([actor])
    texts = ["fine", "hang", "fine", "hang in c", "crash", "raise", "ignore signals", "fine"]
    rewards = await client.score(ray.put(with_texts(texts)))
    assert rewards.reasons == ("ok", "timeout", "ok", "timeout", "crash", "error", "timeout", "ok")
    assert rewards.rewards.tolist() == [1, 0, 1, 0, 0, 0, 0, 1]

    messages = {(failure.row, failure.kind): failure.message for failure in rewards.failures}
    assert messages == {
        (1, "timeout"): "no answer within reward.timeout_s 1",
        (3, "timeout"): "no answer within reward.timeout_s 1",
        (4, "crash"): "its process ended with exit code 3",
        (5, "error"): "RuntimeError: as requested",
        (6, "timeout"): "no answer within reward.timeout_s 1",
    }

    again = await client.score(ray.put(with_texts(["fine"])))
    assert again.failures == ()  # each failure belongs to the batch in which it happened
    assert set(values(await client.metrics())) == {"memory/reward"}
    ray.kill(actor)


async def test_what_functions_print_reaches_the_log_of_the_driver(
    plugin_path: str, caplog: pytest.LogCaptureFixture
):
    actor = worker(plugin_path, RewardFunctionConfig(name="example_trouble"), processes=1)
    output = RewardOutput()
    output.follow([actor])
    with caplog.at_level("INFO", logger="workers.reward_worker"):
        await RewardWorkerClient([actor]).score(ray.put(with_texts(["print", "crash"])))
        await output.finish()
    assert "printed as requested" in caplog.messages
    assert (
        "reward 'example_trouble': crash, its process ended with exit code 3; on ...'crash'"
        in caplog.messages
    )
    ray.kill(actor)


async def test_many_parts_at_once_each_in_its_order(plugin_path: str):
    actor = worker(plugin_path, RewardFunctionConfig(name="math"))
    client = RewardWorkerClient([actor])
    # Response i of part `number` is right (its ground truth is i) where number + i is even.
    parts = [
        with_texts([f"\\boxed{{{i if (number + i) % 2 == 0 else -1}}}" for i in range(4)])
        for number in range(10)
    ]
    scored = await asyncio.gather(*(client.score(ray.put(part)) for part in parts))
    for number, rewards in enumerate(scored):
        assert rewards.rewards.tolist() == [float((number + i) % 2 == 0) for i in range(4)]
    ray.kill(actor)


async def test_the_token_limit_of_the_run_reaches_the_functions(plugin_path: str):
    """Score with soft_overlong, which takes its max_tokens from generation.max_tokens, 64 here.

    The reward is 0 up to 48 tokens, and falls to -1 at 64.
    """
    actor = worker(plugin_path, RewardFunctionConfig(name="soft_overlong"))
    batch = rollouts([([1], [[2] * 48, [2] * 56, [2] * 64])])
    rewards = await RewardWorkerClient([actor]).score(ray.put(batch))
    assert rewards.rewards.tolist() == [0.0, -0.5, -1.0]
    ray.kill(actor)


async def test_the_pool_dies_with_its_actor(plugin_path: str):
    actor = worker(plugin_path, RewardFunctionConfig(name="math"))
    own, *pool = await actor.process_ids.remote()
    processes = [psutil.Process(pid) for pid in pool]
    assert len(processes) == 2
    os.kill(own, signal.SIGKILL)

    # Where this process adopts orphans, they stay as zombies until it ends.
    end = time.monotonic() + 30
    while any(_lives(process) for process in processes):
        assert time.monotonic() < end, processes
        await asyncio.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
