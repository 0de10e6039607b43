"""Fakes of every port of the driver, in this process, with a small policy that really learns.

The policy is a table of logits [problems, positions, vocabulary]. Token t of problem p is drawn
from softmax(logits[p, t]). A response is right when its first token is the problem's answer, so
REINFORCE raises the reward within a few dozen steps. The driver cannot open the handles of large
records.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import (
    LogprobBatch,
    Prompt,
    PromptBatch,
    RewardBatch,
    RewardFailure,
    RolloutBatch,
    SamplingParameters,
    ScoredBatch,
    StopReason,
    TrainBatch,
    ValueBatch,
)
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.hidden_states import HiddenStates, JoinedStates
from rlsys.data.prompt_stream import PromptStream
from rlsys.data.rollout_files import write_rollouts
from rlsys.data.sequences import TokenSequences
from rlsys.driver.background_save import Written
from rlsys.driver.credit_assignment import CreditAssigner, LiveLogprobs, recomputed
from rlsys.driver.ports import (
    ConcurrentGeneration,
    CreditedBatch,
    Handle,
    RolloutPart,
    StepHandles,
    VersionedPart,
    WorkerDiedError,
    Workers,
)
from rlsys.metrics import Metric, maximum, mean, total

T = TypeVar("T")
PROBLEMS, VOCABULARY = 6, 8


class OpenedByDriverError(AssertionError):
    """The driver awaited a record that must stay in the object store."""


class InProcessHandle(Generic[T]):
    """A record that workers open with `open`.

    Awaiting it, as the driver does, is refused unless the record is small.
    """

    def __init__(self, record: T | Coroutine[Any, Any, T], *, small: bool) -> None:
        self._task = asyncio.ensure_future(record) if asyncio.iscoroutine(record) else None
        self._record = None if self._task else record
        self._small = small

    async def open(self) -> T:
        return await self._task if self._task else self._record  # pyright: ignore[reportReturnType]

    def __await__(self) -> Generator[Any, None, T]:
        if not self._small:
            raise OpenedByDriverError(f"the driver opened a {type(self._record).__name__}")
        return self.open().__await__()


async def _open_all(handles: Sequence[Handle]) -> list[Any]:
    own: Sequence[Any] = handles  # all are of `InProcessHandle`
    return [await handle.open() for handle in own]


@dataclass
class Stage:
    """The state that the fakes share.

    It has a journal of calls, the handles that are alive, and hooks with which a test can wait or
    fail at a call.
    """

    journal: list[str] = field(default_factory=list)
    handles: WeakSet[InProcessHandle] = field(default_factory=WeakSet)
    hooks: dict[str, Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=dict)

    def put(self, record: T | Coroutine[Any, Any, T], *, small: bool = False) -> InProcessHandle[T]:
        """Return a handle of `record`, and count it while it is alive."""
        handle = InProcessHandle(record, small=small)
        self.handles.add(handle)
        return handle

    async def enter(self, event: str) -> None:
        """Add `event` to the journal, then run the test's hook for it."""
        self.journal.append(event)
        if event in self.hooks:
            await self.hooks[event]()


def make_prompts(config: RunConfig) -> PromptStream:
    """Return the training stream of PROBLEMS problems, one token each.

    The answer of problem p is token (3 p + 1) mod VOCABULARY.
    """
    return PromptStream(
        _prompts(),
        prompts_per_step=config.trainer.prompts_per_step,
        seed=config.trainer.seed,
        shuffle=True,
    )


def held_out_prompts() -> PromptBatch:
    """Return all problems once."""
    return PromptBatch(
        batch_id=-1, prompts=_prompts(), group_ids=np.arange(PROBLEMS, dtype=np.int64)
    )


def _prompts() -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            problem_id=str(i),
            token_ids=(i,),
            text=f"{i}?",
            problem=f"{i}?",
            ground_truth=str((3 * i + 1) % VOCABULARY),
        )
        for i in range(PROBLEMS)
    )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class TablePolicy:
    """A `ports.Policy` and `ports.Reference`: policy gradient with momentum on a table of logits.

    `prefix` is "old" or "ref", for the journal. A token's hidden state is its row of
    log-probabilities.
    """

    def __init__(self, stage: Stage, config: RunConfig, *, prefix: str = "old") -> None:
        self._stage = stage
        self._config = config
        self._prefix = prefix
        self.logits = np.zeros((PROBLEMS, config.generation.max_tokens, VOCABULARY))
        self.momentum = np.zeros_like(self.logits)
        self.updates = 0
        self.texts: list[ExampleBatch] = []  # of all updates
        self._estimated: NDArray[np.float32] | None = None

    async def logprobs(
        self,
        rollouts: Sequence[Handle[RolloutBatch]],
        ref_hidden: Sequence[Handle[HiddenStates | None]] = (),
    ) -> Sequence[Handle[LogprobBatch]]:
        await self._stage.enter(f"logprobs:{self._prefix}")
        batch = RolloutBatch.concatenate(await _open_all(rollouts))
        flat, norms = self._flat_logprobs(batch)
        exact_kl = None
        if ref_hidden:
            exact_kl = self._exact_kl(batch, await _open_all(ref_hidden))

        # Two parts, as from two ranks.
        parts = []
        for rows in (np.arange(0, len(batch), 2), np.arange(1, len(batch), 2)):
            part = LogprobBatch(
                batch_id=batch.batch_id,
                rows=rows,
                logprobs=_rows_of(flat, rows, batch),
                squared_score_norms=_rows_of(norms, rows, batch),
                exact_kl=None if exact_kl is None else _rows_of(exact_kl, rows, batch),
            )
            parts.append(self._stage.put(part))
        return parts

    async def logprobs_and_hidden(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> tuple[Sequence[Handle[LogprobBatch]], Sequence[Handle[HiddenStates | None]]]:
        logprobs = await self.logprobs(rollouts)
        batch = RolloutBatch.concatenate(await _open_all(rollouts))
        problems, positions, _ = _coordinates(batch)
        states = torch.from_numpy(_log_softmax(self.logits)[problems, positions])
        flat_positions = np.flatnonzero(batch.response_mask)
        hidden = HiddenStates.of(batch.batch_id, flat_positions, states)
        return logprobs, [self._stage.put(hidden), self._stage.put(None)]

    def _exact_kl(
        self, batch: RolloutBatch, ref_hidden: Sequence[HiddenStates | None]
    ) -> NDArray[np.float32]:
        problems, positions, _ = _coordinates(batch)
        logprobs = _log_softmax(self.logits)[problems, positions]
        states = JoinedStates(ref_hidden, len(batch.token_ids))
        ref = states.take(np.flatnonzero(batch.response_mask)).numpy()
        flat = np.zeros(len(batch.token_ids), dtype=np.float32)
        flat[batch.response_mask] = (np.exp(logprobs) * (logprobs - ref)).sum(axis=-1)
        return flat

    def _flat_logprobs(self, batch: RolloutBatch) -> NDArray[np.float32]:
        """Return [2, N] log-probabilities and squared score norms under the current table."""
        problems, positions, tokens = _coordinates(batch)
        logprobs = _log_softmax(self.logits)[problems, positions]

        # The score in the space of logits is onehot(y) - p, of squared length 1 - 2 p_y + sum p^2.
        chosen = logprobs[np.arange(len(tokens)), tokens]
        norms = 1 - 2 * np.exp(chosen) + np.exp(2 * logprobs).sum(axis=-1)

        flat = np.zeros((2, len(batch.token_ids)), dtype=np.float32)
        flat[:, batch.response_mask] = chosen, norms
        return flat

    async def update(
        self,
        batch: Handle[ScoredBatch],
        ref_hidden: Sequence[Handle[HiddenStates | None]] = (),
        texts: Handle[ExampleBatch] | None = None,
    ) -> dict[str, Metric]:
        await self._stage.enter("update")
        (train,) = await _open_all([batch])
        if texts is not None:
            self.texts += await _open_all([texts])
        advantages = self._advantages(train)[train.rollouts.response_mask].astype(np.float64)
        if train.trained is not None and not train.trained.any():
            return {"policy/updates": total(0), "policy/skipped_updates": total(1)}

        problems, positions, tokens = _coordinates(train.rollouts)
        if train.trained is not None:
            advantages *= np.repeat(train.trained, train.rollouts.response_lengths)

        # grad log pi of the logits is onehot(token) - softmax(logits).
        logprobs = _log_softmax(self.logits)[problems, positions]
        scores = -np.exp(logprobs)
        scores[np.arange(len(tokens)), tokens] += 1
        gradient = np.zeros_like(self.logits)
        weighted = scores * advantages[:, None] / len(train.rollouts)
        np.add.at(gradient, (problems, positions), weighted)

        self.momentum = 0.9 * self.momentum + gradient
        self.logits = self.logits + 2.0 * self.momentum
        self.updates += 1

        entropy = float(-(np.exp(logprobs) * logprobs).sum(axis=-1).mean())
        return {
            "policy/grad_norm": mean(float(np.linalg.norm(gradient))),
            "policy/entropy": mean(entropy, len(tokens)),
            "policy/tokens": total(len(tokens)),
            "policy/updates": total(1),
            "policy/skipped_updates": total(0),
        }

    def _advantages(self, train: ScoredBatch) -> NDArray[np.float32]:
        """Return the batch's advantages, or estimate them for `algorithm.advantage.recompute`."""
        self._estimated = None
        if isinstance(train, TrainBatch):
            return train.advantages

        rollouts = train.rollouts
        flat, norms = self._flat_logprobs(rollouts)
        live = LiveLogprobs(logprobs=flat, squared_score_norms=norms)
        result = recomputed(self._config, train, np.arange(len(rollouts)), live, {})
        self._estimated = result.batch.advantages
        return self._estimated

    async def text_loss(self, texts: Handle[ExampleBatch]) -> dict[str, Metric]:
        await self._stage.enter("text_loss")
        (batch,) = await _open_all([texts])
        tokens = batch.sequences.num_loss_tokens
        return {"eval/text_loss": mean(float(np.log(VOCABULARY)), tokens)}

    async def estimated_advantages(self) -> Handle[NDArray[np.float32]] | None:
        return None if self._estimated is None else self._stage.put(self._estimated)

    async def save(self, directory: Path) -> None:
        await self._stage.enter("save")
        self._write(directory, self.logits, self.momentum, self.updates)

    async def copy_state(self, directory: Path) -> Written:
        await self._stage.enter("copy")
        copies = self.logits.copy(), self.momentum.copy(), self.updates

        async def written() -> None:
            await self._stage.enter("write")
            self._write(directory, *copies)

        return written

    def _write(self, directory: Path, logits: NDArray, momentum: NDArray, updates: int) -> None:
        np.savez(directory / "policy.npz", logits=logits, momentum=momentum)
        (directory / "policy_state.json").write_text(json.dumps({"updates": updates}))

    async def load(self, directory: Path) -> None:
        await self._stage.enter("load")
        with np.load(directory / "policy.npz") as saved:
            self.logits, self.momentum = saved["logits"], saved["momentum"]
        self.updates = json.loads((directory / "policy_state.json").read_text())["updates"]


def _rows_of(
    flat: NDArray[np.float32], rows: NDArray[np.int64], batch: RolloutBatch
) -> NDArray[np.float32]:
    offsets = batch.sequence_offsets
    return np.concatenate([flat[offsets[row] : offsets[row + 1]] for row in rows])


def _coordinates(
    batch: RolloutBatch,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Return problem, position and token id of every sampled token."""
    lengths = batch.response_lengths
    prompts = batch.token_ids[batch.sequence_offsets[:-1]].astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return np.repeat(prompts, lengths), positions, batch.token_ids[batch.response_mask]


class TableGenerator:
    """A `ports.Generator` with its own copy of the logits; the last prompt comes first."""

    def __init__(self, stage: Stage, config: RunConfig) -> None:
        self._stage = stage
        shape = (PROBLEMS, config.generation.max_tokens, VOCABULARY)
        self.logits = np.full(shape, np.nan)  # until the first sync
        self.version = -1
        self.requests: list[SamplingParameters] = []
        self.slots: list[TableSlot] = []

    def add_slots(
        self, count: int, seconds: Callable[[int], float] = lambda group: 0.0
    ) -> list[TableSlot]:
        """Add workers for asynchronous training; a group takes `seconds(group id)`."""
        self.slots += [TableSlot(self, self._stage, seconds) for _ in range(count)]
        return self.slots

    def install(self, logits: NDArray[np.float64], version: int) -> None:
        """Take new weights, under which everything is sampled that begins after this."""
        self.logits, self.version = logits, version

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        self.requests.append(sampling)
        await self._stage.enter("generate:greedy" if sampling.temperature == 0 else "generate")
        for index in reversed(range(len(prompts))):
            await self._stage.enter("part:last" if index == 0 else "part")
            part = PromptBatch(
                batch_id=prompts.batch_id,
                prompts=prompts.prompts[index : index + 1],
                group_ids=prompts.group_ids[index : index + 1],
            )
            rollouts = self.sample(part, sampling)
            yield RolloutPart(
                prompt_index=index,
                num_response_tokens=rollouts.num_response_tokens,
                rollouts=self._stage.put(rollouts),
            )

    def sample(
        self,
        prompts: PromptBatch,
        sampling: SamplingParameters,
        weights: tuple[NDArray[np.float64], int] | None = None,
    ) -> RolloutBatch:
        """Return responses under some weights with their version; None: under the newest."""
        logits, version = weights or (self.logits, self.version)
        responses: list[list[int]] = []
        logprobs: list[float] = []
        texts: list[str] = []
        greedy = sampling.temperature == 0
        temperature = sampling.temperature or 1.0
        samples = sampling.samples_per_prompt

        for prompt, group in zip(prompts.prompts, prompts.group_ids, strict=True):
            generator = np.random.default_rng([sampling.seed, int(group)])
            table = _log_softmax(logits[prompt.token_ids[0]] / temperature)
            for _ in range(samples):
                # The maximum of logits with Gumbel noise is a sample of their softmax.
                noise = 0.0 if greedy else generator.gumbel(size=table.shape)
                response = (table + noise).argmax(axis=-1)
                chosen = table[np.arange(sampling.max_tokens), response]
                responses.append(response.tolist())
                logprobs += [0.0, *chosen.tolist()]
                texts.append(" ".join(map(str, response)))

        count = len(texts)
        return RolloutBatch(
            prompts=prompts,
            sequences=TokenSequences.of(
                [prompt.token_ids for prompt in prompts.prompts for _ in range(samples)],
                responses,
                group_ids=np.repeat(prompts.group_ids, samples),
            ),
            rollout_logprobs=np.asarray(logprobs, dtype=np.float32),
            oldest_weight_version=np.full(count, version, dtype=np.int32),
            newest_weight_version=np.full(count, version, dtype=np.int32),
            stop_reasons=np.full(count, StopReason.LENGTH, dtype=np.int8),
            response_texts=tuple(texts),
            temperature=temperature,
        )

    async def metrics(self) -> dict[str, Metric]:
        return {"memory/generation": maximum(0.0)}


class TableSlot:
    """A `ports.GenerationSlot`: one worker, which takes time and may die.

    Like an actor it does one thing after the other: weights that are published while it samples
    are installed when it has finished.
    """

    def __init__(
        self, generator: TableGenerator, stage: Stage, seconds: Callable[[int], float]
    ) -> None:
        self._generator = generator
        self._stage = stage
        self._seconds = seconds
        self._idle = asyncio.Event()
        self._idle.set()
        self.deaths: set[int] = set()  # ids of groups at which it dies once
        self.groups: list[int] = []  # that it has sampled
        self.working = asyncio.Event()  # not set while it is restarted
        self.working.set()

    @property
    def is_ready(self) -> bool:
        return self.working.is_set()

    async def ready(self) -> None:
        await self.working.wait()

    async def wait_until_idle(self) -> None:
        """Wait until it has finished what it is sampling."""
        await self._idle.wait()

    async def generate(
        self, prompts: PromptBatch, positions: Sequence[int], sampling: SamplingParameters
    ) -> AsyncIterator[VersionedPart]:
        await self.working.wait()
        assert self._idle.is_set(), "a worker gets groups when it is free"
        self._idle.clear()
        weights = self._generator.logits, self._generator.version
        try:
            for index, position in enumerate(positions):
                group = int(prompts.group_ids[index])
                await self._stage.enter("group")
                await asyncio.sleep(self._seconds(group))
                if group in self.deaths:
                    self.deaths.discard(group)
                    raise WorkerDiedError("on request")
                self.groups.append(group)
                one = PromptBatch(
                    batch_id=prompts.batch_id,
                    prompts=prompts.prompts[index : index + 1],
                    group_ids=prompts.group_ids[index : index + 1],
                )
                rollouts = self._generator.sample(one, sampling, weights)
                part = RolloutPart(
                    prompt_index=position,
                    num_response_tokens=rollouts.num_response_tokens,
                    rollouts=self._stage.put(rollouts),
                )
                yield VersionedPart(part=part, weight_version=weights[1])
        finally:
            self._idle.set()


class FirstTokenScorer:
    """A `ports.RewardScorer`: 1 where the first token is the answer.

    On the next `failures` responses it fails.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.failures = 0

    def score(self, rollouts: Handle[RolloutBatch]) -> Handle[RewardBatch]:
        self._stage.journal.append("score")
        return self._stage.put(self._score(rollouts), small=True)

    async def _score(self, rollouts: Handle[RolloutBatch]) -> RewardBatch:
        await self._stage.enter("scoring")
        (batch,) = await _open_all([rollouts])
        truths = dict(zip(batch.prompts.group_ids.tolist(), batch.prompts.prompts, strict=True))
        answers = tuple(text.split()[0] for text in batch.response_texts)
        right = [
            answer == truths[group].ground_truth
            for answer, group in zip(answers, batch.group_ids.tolist(), strict=True)
        ]

        failed = min(self.failures, len(right))
        self.failures -= failed
        rewards = np.asarray([False] * failed + right[failed:], dtype=np.float32)
        self._stage.journal.append("scored")

        return RewardBatch(
            batch_id=batch.batch_id,
            rewards=rewards,
            accuracies=rewards,
            components={"first_token": rewards},
            reasons=("error",) * failed + ("ok",) * (len(right) - failed),
            extracted_answers=answers,
            failures=tuple(
                RewardFailure(row=row, function="first_token", kind="error", message="on request")
                for row in range(failed)
            ),
        )

    async def metrics(self) -> dict[str, Metric]:
        return {"memory/reward": maximum(0.0)}


class TableCritic:
    """A `ports.Critic`: gradient descent on a table of values [problems, positions]."""

    def __init__(self, stage: Stage, config: RunConfig) -> None:
        self._stage = stage
        self.table = np.zeros((PROBLEMS, config.generation.max_tokens))
        self.updates = 0

    async def values(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> Sequence[Handle[ValueBatch]]:
        await self._stage.enter("values")
        batch = RolloutBatch.concatenate(await _open_all(rollouts))
        problems, positions, _ = _coordinates(batch)
        flat = np.zeros(len(batch.token_ids), dtype=np.float32)
        flat[batch.response_mask] = self.table[problems, positions]

        # Two parts, as from two ranks.
        parts = []
        for rows in (np.arange(1, len(batch), 2), np.arange(0, len(batch), 2)):
            own = _rows_of(flat, rows, batch)
            part = ValueBatch(batch_id=batch.batch_id, rows=rows, values=own)
            parts.append(self._stage.put(part))
        return parts

    async def update(self, batch: Handle[TrainBatch]) -> dict[str, Metric]:
        await self._stage.enter("update:critic")
        (train,) = await _open_all([batch])
        problems, positions, tokens = _coordinates(train.rollouts)
        errors = self.table[problems, positions] - train.returns[train.rollouts.response_mask]
        gradient = np.zeros_like(self.table)
        np.add.at(gradient, (problems, positions), errors / len(tokens))
        self.table = self.table - 2.0 * gradient
        self.updates += 1
        return {"critic/loss": mean(float((errors**2).mean() / 2)), "critic/updates": total(1)}

    async def save(self, directory: Path) -> None:
        await self._stage.enter("save:critic")
        self._write(directory, self.table, self.updates)

    async def copy_state(self, directory: Path) -> Written:
        await self._stage.enter("copy:critic")
        copies = self.table.copy(), self.updates

        async def written() -> None:
            await self._stage.enter("write:critic")
            self._write(directory, *copies)

        return written

    def _write(self, directory: Path, table: NDArray, updates: int) -> None:
        np.save(directory / "critic.npy", table)
        (directory / "critic_state.json").write_text(json.dumps({"updates": updates}))

    async def load(self, directory: Path) -> None:
        await self._stage.enter("load:critic")
        self.table = np.load(directory / "critic.npy")
        self.updates = json.loads((directory / "critic_state.json").read_text())["updates"]


class InProcessAdvantages:
    """A `ports.AdvantageComputer` with the real controller's arithmetic."""

    def __init__(self, stage: Stage, config: RunConfig) -> None:
        self._stage = stage
        self._assigner = CreditAssigner(config)
        self.batches: list[Mapping[str, Any]] = []  # a few facts about each train batch

    async def credit(self, step: StepHandles) -> CreditedBatch:
        await self._stage.enter("credit")
        handles = step.all()
        records = dict(zip(handles, await _open_all(handles), strict=True))
        credited = self._assigner.credit(step.opened(records))
        train = credited.batch
        dropped = credited.dropped

        self.batches.append(
            {
                "versions": set(train.rollouts.newest_weight_version.tolist()),
                "group_ids": train.rollouts.prompts.group_ids.tolist(),
                "old_difference": _largest_difference(train.old_logprobs, train.rollouts),
                "ref_difference": _largest_difference(train.ref_logprobs, train.rollouts),
                "values": None if train.values is None else train.values.copy(),
            }
        )
        return CreditedBatch(
            batch=self._stage.put(train),
            dropped=None if dropped is None else self._stage.put(dropped),
            metrics=credited.metrics,
        )

    async def state(self) -> dict[str, Any]:
        return self._assigner.state()

    async def load_state(self, state: dict[str, Any]) -> None:
        self._assigner.load_state(state)

    async def write_rollouts(
        self,
        batch: Handle[ScoredBatch],
        path: Path,
        *,
        dropped: Handle[ScoredBatch] | None = None,
        advantages: Handle[NDArray[np.float32]] | None = None,
    ) -> None:
        await self._stage.enter("write_rollouts")
        (train,) = await _open_all([batch])
        rest = (await _open_all([dropped]))[0] if dropped is not None else None
        estimated = (await _open_all([advantages]))[0] if advantages is not None else None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(train, path, dropped=rest, advantages=estimated)

    async def metrics(self) -> dict[str, Metric]:
        return {"memory/advantage": maximum(0.0)}


def _largest_difference(
    logprobs: NDArray[np.float32] | None, rollouts: RolloutBatch
) -> float | None:
    """Return the largest log-prob difference to the engine over the sampled tokens."""
    if logprobs is None:
        return None
    differences = np.abs(logprobs - rollouts.rollout_logprobs)
    return float(differences[rollouts.response_mask].max())


class TableSync:
    """A `ports.WeightSync` and `ports.WeightPublisher` that copies the table."""

    def __init__(self, stage: Stage, policy: TablePolicy, generator: TableGenerator) -> None:
        self._stage = stage
        self._policy = policy
        self._generator = generator

    async def sync(self, version: int) -> dict[str, Metric]:
        return await (await self.publish(version))

    async def publish(self, version: int) -> asyncio.Task[dict[str, Metric]]:
        await self._stage.enter("sync")
        # As with actors, what is busy now installs these weights later; what is given to a worker
        # from now on is sampled under them.
        self._generator.install(self._policy.logits.copy(), version)
        busy = [slot.wait_until_idle() for slot in self._generator.slots]
        return asyncio.create_task(self._installed(busy))

    async def _installed(self, busy: Sequence[Coroutine[Any, Any, None]]) -> dict[str, Metric]:
        await asyncio.gather(*busy)
        return {"sync/bytes": total(self._policy.logits.nbytes)}


def in_process_workers(stage: Stage, config: RunConfig) -> Workers:
    """Return new workers; a reference only where a KL term is configured."""
    policy = TablePolicy(stage, config)
    generator = TableGenerator(stage, config)
    scorer = FirstTokenScorer(stage)
    advantages = InProcessAdvantages(stage, config)
    reference = None
    if config.algorithm.kl.coefficient:
        reference = TablePolicy(stage, config, prefix="ref")

    critic = TableCritic(stage, config) if config.critic.enabled else None

    sync = TableSync(stage, policy, generator)
    return Workers(
        generator=generator,
        scorer=scorer,
        policy=policy,
        reference=reference,
        critic=critic,
        advantages=advantages,
        weights=sync,
        concurrent=ConcurrentGeneration(slots=generator.slots, publisher=sync),
        put=stage.put,
        reporting=(generator, scorer, advantages),
    )
