"""Collection of responses part by part, on workers in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.evaluation_run import (
    EvaluationGenerationConfig,
    EvaluationOptions,
    EvaluationRunConfig,
)
from rlsys.data.batches import PromptBatch, RewardBatch, RewardFailure, SamplingParameters
from rlsys.data.response_files import ResponseFiles
from rlsys.driver.ports import RolloutPart
from rlsys.driver.response_collection import CollectionEvents, ResponseCollector
from rlsys.run.reward_failures import RewardFailureError
from tests.support.in_process_fakes import held_out_prompts
from tests.support.rollout_examples import rewards_of, rollouts

PROMPTS = held_out_prompts()  # six


class Ready:
    """A handle of a record that is there."""

    def __init__(self, record: Any) -> None:
        self.record = record

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.sleep(0, self.record).__await__()


class Engine:
    """A `ports.Generator` whose responses tell seed and position; the last prompt comes first."""

    def __init__(self, *, blocks_at: int | None = None) -> None:
        self.requests: list[tuple[list[int], SamplingParameters]] = []
        self._blocks_at = blocks_at  # a place at which it never answers

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        places = prompts.group_ids.tolist()
        self.requests.append((places, sampling))
        for index in reversed(range(len(places))):
            if places[index] == self._blocks_at:
                await asyncio.Event().wait()
            token = sampling.seed % 97
            samples = [[token, index]] * sampling.samples_per_prompt
            batch = rollouts([([1, 2], samples)], first_group=places[index])
            yield RolloutPart(prompt_index=index, num_response_tokens=2, rollouts=Ready(batch))

    async def metrics(self) -> dict[str, Any]:
        return {}


class Scorer:
    """A `ports.RewardScorer`."""

    def __init__(self, *, fails: bool = False) -> None:
        self._fails = fails

    def score(self, rollouts: Any) -> Any:
        rewards = rewards_of(rollouts.record)
        if self._fails:
            rewards = RewardBatch(
                **{
                    **vars(rewards),
                    "failures": tuple(
                        RewardFailure(row=i, function="math", kind="error", message="broken")
                        for i in range(len(rewards))
                    ),
                }
            )
        return Ready(rewards)

    async def metrics(self) -> dict[str, Any]:
        return {}


class Collected:
    """A collector with a journal of its events."""

    def __init__(self, part: int = 4) -> None:
        config = EvaluationRunConfig(
            generation=EvaluationGenerationConfig(samples_per_prompt=2, max_tokens=9),
            evaluation=EvaluationOptions(prompts_per_part=part, seed=7),
        )
        self.kept: list[int] = []
        self.finished: list[int] = []
        self.collector = ResponseCollector(
            config,
            CollectionEvents(
                kept=self.kept.append,
                finished=lambda group: self.finished.append(group.place),
                notice=lambda text: None,
            ),
        )


def tokens_by_place(files: ResponseFiles) -> dict[int, list[list[int]]]:
    table = files.read()
    assert table is not None
    found: dict[int, list[list[int]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["group_id"], []).append(row["token_ids"])
    return found


async def test_parts_are_sampled_in_order_with_seeds_of_their_own(tmp_path: Path):
    files, engine, one = ResponseFiles(tmp_path), Engine(), Collected()
    assert not one.collector.is_complete(PROMPTS, files)
    assert await one.collector.collect(engine, Scorer(), PROMPTS, files)
    assert one.collector.is_complete(PROMPTS, files)

    assert [places for places, _ in engine.requests] == [[0, 1, 2, 3], [4, 5]]
    first, second = (sampling for _, sampling in engine.requests)
    assert first.seed != second.seed
    assert (first.samples_per_prompt, first.max_tokens, first.temperature) == (2, 9, 1.0)
    assert sorted(one.finished) == list(range(6))
    assert list(tokens_by_place(files)) == list(range(6))  # in the order of the prompts


async def test_a_resume_samples_only_what_is_missing_and_the_same(tmp_path: Path):
    whole, one = ResponseFiles(tmp_path / "whole"), Collected()
    whole.create({})
    await one.collector.collect(Engine(), Scorer(), PROMPTS, whole)

    files, interrupted = ResponseFiles(tmp_path / "parts"), Collected()
    files.create({})
    task = asyncio.create_task(
        interrupted.collector.collect(Engine(blocks_at=4), Scorer(), PROMPTS, files)
    )
    while len(interrupted.finished) < 5:
        await asyncio.sleep(0)
    interrupted.collector.request_stop()
    assert not await asyncio.wait_for(task, 5)
    assert sorted(tokens_by_place(files)) == [0, 1, 2, 3, 5]  # the complete prompts are written

    engine, resumed = Engine(), Collected()
    assert await resumed.collector.collect(engine, Scorer(), PROMPTS, files)
    assert [places for places, _ in engine.requests] == [[4, 5]]
    assert resumed.kept == [4]
    assert tokens_by_place(files) == tokens_by_place(whole)


async def test_a_stop_before_the_first_part_samples_nothing(tmp_path: Path):
    files, engine, one = ResponseFiles(tmp_path), Engine(), Collected()
    one.collector.request_stop()
    assert not await one.collector.collect(engine, Scorer(), PROMPTS, files)
    assert engine.requests == []
    assert files.read() is None


async def test_a_reward_that_fails_everywhere_ends_the_evaluation(tmp_path: Path):
    files, engine, one = ResponseFiles(tmp_path), Engine(), Collected()
    with pytest.raises(RewardFailureError, match="'math' failed on 8 of the 8 responses"):
        await one.collector.collect(engine, Scorer(fails=True), PROMPTS, files)
    assert len(engine.requests) == 1


async def test_an_error_of_a_worker_is_raised_as_it_is(tmp_path: Path):
    class Broken(Engine):
        async def generate(
            self, prompts: PromptBatch, sampling: SamplingParameters
        ) -> AsyncIterator[RolloutPart]:
            async for part in super().generate(prompts, sampling):
                yield part
                raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        await Collected().collector.collect(Broken(), Scorer(), PROMPTS, ResponseFiles(tmp_path))


async def test_group_ids_need_not_be_consecutive(tmp_path: Path):
    """Problems whose prompts are too long for a model leave gaps."""
    gaps = PromptBatch(
        batch_id=0, prompts=PROMPTS.prompts[:3], group_ids=np.array([1, 4, 9], dtype=np.int64)
    )
    files = ResponseFiles(tmp_path)
    assert await Collected(part=2).collector.collect(Engine(), Scorer(), gaps, files)
    assert list(tokens_by_place(files)) == [1, 4, 9]
