"""The reward worker: it computes rewards in a pool of processes, while generation goes on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from array import array
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray
from ray.exceptions import RayError

from rlsys.config import RewardConfig, RunConfig
from rlsys.data.batches import (
    RewardBatch,
    RewardFailure,
    RolloutBatch,
    ScoreBatch,
    StepRewards,
    StepScoreBatch,
    StopReason,
)
from rlsys.data.response_text import lengths_after_tokens
from rlsys.driver.ports import Handle, ScoreSource
from rlsys.metrics import Metric, combine, maximum, peak_memory_gib
from rlsys.models.loading import load_tokenizer
from rlsys.plugins import load_plugins
from rlsys.rewards import (
    RewardInput,
    has_accuracy,
    pool_functions,
    reward_model_of,
    step_functions,
    with_token_limit,
)
from rlsys.rewards.pool import RewardPool
from rlsys.rewards.scoring import (
    CompletionOutcomes,
    FunctionFailure,
    FunctionReward,
    Outcome,
    outcome_of_score,
    outcome_of_steps,
)
from rlsys.rewards.steps import tokens_at
from workers.supervision import SupervisedActor, supervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Output of reward functions is fetched this often.
OUTPUT_EVERY_S = 1.0
# At the end of a run the last output is waited for at most this long.
LAST_OUTPUT_LIMIT_S = 5.0

UNPLACED = FunctionFailure(
    kind="error",
    message="the ends of its steps have no token: the tokens of the response decode to another "
    "text than the one that was scored",
)

logger = logging.getLogger(__name__)


class RewardWorker:
    """The Ray actor that computes rewards.

    Its methods are async, so that many parts share one pool at the same time.
    """

    def __init__(self, config: RunConfig, model_directory: str | None = None) -> None:
        """Start the pool.

        Args:
            model_directory: of the model whose responses are scored; its tokenizer places the
                rewards of steps at tokens. None: only the rewards of whole responses are wanted.
        """
        # Plugins may register reward functions.
        load_plugins(config.plugins)
        functions = with_token_limit(config.reward.functions, config.generation.max_tokens)
        self._config = config.reward.model_copy(update={"functions": functions})
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if model_directory is not None and step_functions(functions):
            self._tokenizer = load_tokenizer(
                model_directory, trust_remote_code=config.model.trust_remote_code
            )
        # A reward model is computed by ranks of its own; without functions the pool stays empty.
        self._in_pool = pool_functions(functions)
        self._pool = RewardPool(
            self._config.model_copy(update={"functions": self._in_pool}),
            config.plugins,
            terms=len(functions),
        )
        if self._in_pool:
            self._pool.warm_up()

    async def score(self, rollouts: RolloutBatch, scores: Sequence[Any] = ()) -> RewardBatch:
        """Return the rewards of one part, in the order of its responses.

        Args:
            scores: references to the `ScoreBatch` or `StepScoreBatch` of each rank of the reward
                model, if there is one; the functions run while it computes.
        """
        outcomes = await self._outcomes_of_pool(rollouts)
        if self._tokenizer is not None:
            outcomes = await asyncio.to_thread(
                outcomes_in_tokens, rollouts, outcomes, self._tokenizer
            )
        if reward_model_of(self._config.functions) is not None:
            outcomes = join_parts(self._config, outcomes, await asyncio.gather(*scores))

        rewards = reward_batch(rollouts.batch_id, self._config, outcomes)
        if self._tokenizer is None:
            return rewards
        return replace(rewards, step_rewards=step_rewards(self._config, outcomes))

    async def _outcomes_of_pool(self, rollouts: RolloutBatch) -> Sequence[CompletionOutcomes]:
        if not self._in_pool:
            return [CompletionOutcomes(outcomes=())] * len(rollouts)
        futures = [
            asyncio.wrap_future(self._pool.submit(inputs)) for inputs in reward_inputs(rollouts)
        ]
        return await asyncio.gather(*futures)

    async def output(self) -> list[str]:
        """Return the printed lines and failures of reward functions since the last call."""
        return self._pool.output.take()

    async def metrics(self) -> dict[str, Metric]:
        """Return the memory: the peak of this process and the present use of the pool."""
        memory = peak_memory_gib()
        for process in self._pool.process_ids():
            # The process may have ended meanwhile: the pool replaces those that hang.
            with contextlib.suppress(psutil.Error):
                memory += psutil.Process(process).memory_info().rss / 1024**3
        return {"memory/reward": maximum(memory)}

    async def process_deaths(self) -> list[str]:
        """Return how processes of the pool died since the last call, whose work was repeated."""
        return self._pool.take_deaths()

    async def process_ids(self) -> list[int]:
        """Return the ids of this process and, after it, of the pool's processes."""
        return [os.getpid(), *self._pool.process_ids()]

    async def shutdown(self) -> None:
        """Kill the pool."""
        self._pool.shutdown()


def reward_inputs(rollouts: RolloutBatch) -> Iterator[RewardInput]:
    """Yield the inputs of the reward functions for each response, in plain values.

    Plain values pickle fast, and the processes of the pool need no NumPy.
    """
    prompts = dict(zip(rollouts.prompts.group_ids.tolist(), rollouts.prompts.prompts, strict=True))
    starts = rollouts.sequence_offsets[:-1] + rollouts.prompt_lengths
    lengths = rollouts.response_lengths

    pairs = zip(rollouts.response_texts, rollouts.group_ids.tolist(), strict=True)
    for row, (text, group) in enumerate(pairs):
        prompt = prompts[group]
        tokens = rollouts.token_ids[starts[row] : rollouts.sequence_offsets[row + 1]]
        yield RewardInput(
            completion=text,
            ground_truth=prompt.ground_truth,
            prompt=prompt.text,
            problem=prompt.problem,
            metadata=prompt.metadata,
            token_ids=array("i", tokens.tobytes()),
            num_tokens=int(lengths[row]),
            truncated=bool(rollouts.stop_reasons[row] == StopReason.LENGTH),
        )


def join_scores(
    config: RewardConfig, outcomes: Sequence[CompletionOutcomes], scores: NDArray[np.float32]
) -> list[CompletionOutcomes]:
    """Return the outcomes with that of the reward model at its place among the functions.

    Args:
        outcomes: the results of the other functions for each response.
        scores: [B] of the reward model.
    """
    model = reward_model_of(config.functions)
    assert model is not None, "no reward is a model"
    terms = len(config.functions)
    own = [outcome_of_score(score, model, terms=terms) for score in scores.tolist()]
    return _joined(config.functions.index(model), outcomes, own)


def join_step_scores(
    config: RewardConfig, outcomes: Sequence[CompletionOutcomes], parts: Sequence[StepScoreBatch]
) -> list[CompletionOutcomes]:
    """Return the outcomes with that of the process reward model at its place among the functions.

    Args:
        outcomes: the results of the other functions for each response.
        parts: of all ranks of the process reward model.
    """
    model = reward_model_of(config.functions)
    assert model is not None, "no reward is a model"
    terms = len(config.functions)
    own = [
        outcome_of_steps(steps, model, terms=terms)
        for steps in StepScoreBatch.gather(parts, len(outcomes))
    ]
    for row in parts[0].unplaced:
        own[row] = UNPLACED
    return _joined(config.functions.index(model), outcomes, own)


def join_parts(
    config: RewardConfig, outcomes: Sequence[CompletionOutcomes], parts: Sequence[Any]
) -> list[CompletionOutcomes]:
    """Return the outcomes with that of the reward model, from the parts of its ranks."""
    if isinstance(parts[0], StepScoreBatch):
        return join_step_scores(config, outcomes, parts)
    return join_scores(config, outcomes, ScoreBatch.scatter(parts, len(outcomes)))


def _joined(
    place: int, outcomes: Sequence[CompletionOutcomes], own: Sequence[Outcome]
) -> list[CompletionOutcomes]:
    """Return the outcomes with one more for each response, at `place` among the functions."""
    return [
        CompletionOutcomes(outcomes=(*others.outcomes[:place], one, *others.outcomes[place:]))
        for others, one in zip(outcomes, own, strict=True)
    ]


def reward_batch(
    batch_id: int, config: RewardConfig, outcomes: Sequence[CompletionOutcomes]
) -> RewardBatch:
    """Return the reward batch of some responses, in the order of `outcomes`.

        reward = sum over functions of weight * the function's reward

    The term of a failed function is 0; with `on_failure: drop` the whole reward is NaN. There is no
    accuracy where the first reward is a model.

    Args:
        outcomes: the results of all functions for each response.
    """
    functions = config.functions
    # Without responses NumPy would not know the number of columns.
    shape = (len(outcomes), len(functions))
    components = np.asarray([response.components for response in outcomes], dtype=np.float64)
    components = components.reshape(shape)

    weights = np.asarray([function.weight for function in functions], dtype=np.float64)
    terms = components if config.on_failure == "drop" else np.nan_to_num(components, nan=0.0)
    decides = has_accuracy(functions)
    accuracies = components[:, 0].clip(0, 1) if decides else np.full(len(outcomes), np.nan)
    return RewardBatch(
        batch_id=batch_id,
        rewards=(terms @ weights).astype(np.float32),
        accuracies=accuracies.astype(np.float32),
        components={
            function.name: components[:, i].astype(np.float32)
            for i, function in enumerate(functions)
        },
        reasons=tuple(response.reason for response in outcomes),
        extracted_answers=tuple(response.answer for response in outcomes),
        failures=_failures(config, outcomes),
        has_accuracy=decides,
    )


def step_rewards(
    config: RewardConfig, outcomes: Sequence[CompletionOutcomes]
) -> dict[str, StepRewards]:
    """Return the rewards of steps of each function that gives them.

    Args:
        outcomes: with the ends of steps as tokens, see `outcomes_in_tokens`.
    """
    names = [function.name for function in config.functions]
    return {
        name: _steps_of([response.outcomes[names.index(name)] for response in outcomes])
        for name in step_functions(config.functions)
    }


def _steps_of(given: Sequence[Outcome]) -> StepRewards:
    """Return the steps of one function; it gave none where it failed."""
    return StepRewards.of(
        [one.step_ends if isinstance(one, FunctionReward) else () for one in given],
        [one.step_rewards if isinstance(one, FunctionReward) else () for one in given],
    )


def outcomes_in_tokens(
    rollouts: RolloutBatch,
    outcomes: Sequence[CompletionOutcomes],
    tokenizer: PreTrainedTokenizerBase,
) -> list[CompletionOutcomes]:
    """Return the outcomes with the ends of steps as tokens of the response, instead of characters.

    A function whose steps cannot be placed has failed on that response: its tokens do not decode to
    the text that the function saw.
    """
    return [_in_tokens(rollouts, row, response, tokenizer) for row, response in enumerate(outcomes)]


def _in_tokens(
    rollouts: RolloutBatch,
    row: int,
    response: CompletionOutcomes,
    tokenizer: PreTrainedTokenizerBase,
) -> CompletionOutcomes:
    if not any(isinstance(one, FunctionReward) and one.step_ends for one in response.outcomes):
        return response

    lengths = lengths_after_tokens(rollouts, row, tokenizer)
    if lengths is not None:
        return CompletionOutcomes(
            outcomes=tuple(_placed(one, lengths) for one in response.outcomes)
        )

    return CompletionOutcomes(
        outcomes=tuple(
            UNPLACED if isinstance(one, FunctionReward) and one.step_ends else one
            for one in response.outcomes
        )
    )


def _placed(outcome: Outcome, lengths: Sequence[int]) -> Outcome:
    if isinstance(outcome, FunctionFailure):
        return outcome
    return replace(outcome, step_ends=tuple(tokens_at(outcome.step_ends, lengths)))


def _failures(
    config: RewardConfig, outcomes: Sequence[CompletionOutcomes]
) -> tuple[RewardFailure, ...]:
    """Return the failures in the order of the responses.

    Only the first failure of each function has a traceback, so that a batch in which all responses
    fail stays small.
    """
    failures: list[RewardFailure] = []
    shown: set[str] = set()
    for row, response in enumerate(outcomes):
        for function, outcome in zip(config.functions, response.outcomes, strict=True):
            if not isinstance(outcome, FunctionFailure):
                continue
            failure = RewardFailure(
                row=row,
                function=function.name,
                kind=outcome.kind,
                message=outcome.message,
                traceback="" if function.name in shown else outcome.traceback,
            )
            failures.append(failure)
            shown.add(function.name)
    return tuple(failures)


class RewardHandle:
    """The rewards of one part, which are computed again where the reward worker dies.

    Ray passes it on as the reference of the rewards.
    """

    def __init__(self, actor: SupervisedActor, rollouts: Any, scores: Sequence[Any]) -> None:
        """Start to compute the rewards.

        Args:
            scores: of the ranks of the reward model, if there is one.
        """
        self._arguments = (rollouts, scores) if scores else (rollouts,)
        # At once, so that the worker begins before this process waits for something else.
        self._reference = self._start(actor.present)
        self._task = asyncio.ensure_future(self._watch(actor))
        # Where nobody waits for the rewards, an error must not be logged as forgotten.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _start(self, actor: Any) -> Any:
        return actor.score.remote(*self._arguments)

    async def _watch(self, supervised_actor: SupervisedActor) -> RewardBatch:
        """Return the rewards, a small record; after a death, start again."""
        started_on = supervised_actor.present

        async def attempt(actor: Any) -> RewardBatch:
            nonlocal started_on
            if actor is not started_on:
                self._reference, started_on = self._start(actor), actor
            return await self._reference

        return await supervised_actor.run(attempt)

    def __await__(self) -> Generator[Any, None, RewardBatch]:
        return asyncio.shield(self._task).__await__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._reference,)


def _same(reference: Any) -> Any:
    return reference


class RewardWorkerClient:
    """The `ports.RewardScorer` over actors, which take turns with the parts.

    Where an actor dies, its parts in flight are scored again by its successor.
    """

    def __init__(
        self, actors: Sequence[SupervisedActor | Any], model: ScoreSource | None = None
    ) -> None:
        """`model` computes the reward that is a model, where one is configured."""
        self._actors = [supervised(actor, "the reward worker") for actor in actors]
        self._turns = itertools.cycle(self._actors)
        self._model = model

    def score(self, rollouts: Handle[RolloutBatch]) -> Handle[RewardBatch]:
        """See `ports.RewardScorer`."""
        scores = self._model.scores(rollouts) if self._model else ()
        return RewardHandle(next(self._turns), rollouts, scores)

    async def metrics(self) -> dict[str, Metric]:
        """Return the largest memory of a reward worker with its pool.

        The processes that have died are recorded, too.
        """
        for actor in self._actors:
            for reason in await actor.call("process_deaths"):
                actor.faults.record(
                    "reward_process",
                    "a reward process died",
                    reason,
                    "what it was computing is computed again in another one",
                )
        return combine(await asyncio.gather(*(actor.call("metrics") for actor in self._actors)))


class RewardOutput:
    """The output of reward functions, copied to this process's log (run.log) during a run."""

    def __init__(self) -> None:
        self._actors: Sequence[SupervisedActor] = ()
        self._task: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    def follow(self, actors: Sequence[SupervisedActor | Any]) -> None:
        """Begin to copy the output of reward workers, and of their successors."""
        if not actors:
            return
        self._actors = [supervised(actor) for actor in actors]
        self._task = asyncio.create_task(self._write_until_the_end())

    async def finish(self) -> None:
        """Write the last lines; call it before the actor is killed."""
        if self._task is None:
            return

        # Not cancelled at once: lines that an actor is about to return would be lost.
        self._ending.set()
        await asyncio.wait((self._task,), timeout=LAST_OUTPUT_LIMIT_S)
        self._task.cancel()

    async def _write_until_the_end(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ending.is_set()
            # If the actor dies, whoever needs its rewards restarts it.
            with contextlib.suppress(RayError):
                await self._write()
            if not is_last:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), OUTPUT_EVERY_S)

    async def _write(self) -> None:
        """Write the lines that have come since the last call; a dead worker has none.

        Raises:
            RayError: of a worker that did not answer, after the lines of the others.
        """
        calls = (_output_of(actor) for actor in self._actors)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            for line in answer if isinstance(answer, list) else ():
                logger.info("%s", line)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer


async def _output_of(actor: SupervisedActor) -> list[str]:
    return await actor.present.output.remote()
