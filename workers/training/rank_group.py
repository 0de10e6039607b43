"""Groups of ranks, as the driver sees them: one call reaches all ranks.

RankGroup              the ranks of any model
ReferenceGroup         the ranks of the frozen reference
OwnReferenceGroup      the ranks of the policy as its own reference, without its adapters
TrainedGroup           the ranks of any model that is trained
TrainedCausalLMGroup   the ranks of a trained model whose weights engines use
PolicyGroup            the ranks of the policy
CriticGroup            the ranks of the critic
ScoringGroup           the ranks of the frozen reward model of RL training
OfflineGroup           the ranks of a model that learns from examples
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from rlsys.data.batches import (
    LogprobBatch,
    RolloutBatch,
    ScoreBatch,
    ScoredBatch,
    StepScoreBatch,
    TrainBatch,
    ValueBatch,
)
from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.data.hidden_states import HiddenStates
from rlsys.driver.background_save import Written, all_of
from rlsys.driver.ports import Handle
from rlsys.metrics import Metric, combine, mean
from rlsys.models.folder_files import all_files
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.weights import StoredWeights
from workers.node_folders import NodeFolders, collect

CLOSING_S = 1.0  # for ranks that are not busy
ASKED_EVERY_S = 0.2  # whether the files of a checkpoint are written


class RankGroup:
    """All ranks of one distributed model. `workers` are actor handles in rank order."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = workers

    @property
    def workers(self) -> Sequence[Any]:
        """The actor handles in rank order."""
        return self._workers

    async def setup(self) -> tuple[str, ...]:
        """Join the ranks and load the model. Return notes about it for the user.

        Raises:
            UnsupportedModelError: the model cannot be trained.
        """
        address = await self._workers[0].rendezvous.remote()
        notes = await self._at_set_up(worker.setup.remote(address) for worker in self._workers)
        return notes[0]

    async def _at_set_up(self, calls: Iterable[Awaitable[Any]]) -> list[Any]:
        """Wait for a call of every rank, and raise its refusal of the model as it is."""
        try:
            return await asyncio.gather(*calls)
        except RayTaskError as error:
            if isinstance(error.cause, UnsupportedModelError):
                # The message is about the user's model; the actor's traceback would not help.
                raise error.cause from None
            raise

    async def metrics(self) -> dict[str, Metric]:
        """Return the peak memory over the ranks."""
        return combine(await asyncio.gather(*(worker.metrics.remote() for worker in self._workers)))


class ReferenceGroup(RankGroup):
    """The ranks of the frozen reference."""

    async def logprobs(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> Sequence[Handle[LogprobBatch]]:
        """See `ports.LogprobSource`."""
        # The ranks put their results into the object store, so that only references come here.
        return await asyncio.gather(
            *(worker.put_logprobs.remote(*rollouts) for worker in self._workers)
        )

    async def logprobs_and_hidden(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> tuple[Sequence[Handle[LogprobBatch]], Sequence[Handle[HiddenStates | None]]]:
        """See `ports.Reference`."""
        pairs = await asyncio.gather(
            *(worker.put_logprobs_and_hidden.remote(*rollouts) for worker in self._workers)
        )
        return [logprobs for logprobs, _ in pairs], [hidden for _, hidden in pairs]


class OwnReferenceGroup:
    """The ranks of a policy as its own reference, with their adapters off.

    `workers` are those of a `PolicyGroup`, which sets them up.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = workers

    async def logprobs(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> Sequence[Handle[LogprobBatch]]:
        """See `ports.LogprobSource`."""
        return await asyncio.gather(
            *(worker.put_reference_logprobs.remote(*rollouts) for worker in self._workers)
        )

    async def logprobs_and_hidden(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> tuple[Sequence[Handle[LogprobBatch]], Sequence[Handle[HiddenStates | None]]]:
        """See `ports.Reference`."""
        pairs = await asyncio.gather(
            *(
                worker.put_reference_logprobs_and_hidden.remote(*rollouts)
                for worker in self._workers
            )
        )
        return [logprobs for logprobs, _ in pairs], [hidden for _, hidden in pairs]


class OwnExampleReferenceGroup:
    """The ranks of a policy as the reference of its preference pairs, with their adapters off."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = workers

    async def logprobs(self, batch: Handle[ExampleBatch]) -> Sequence[Handle[ReferenceLogprobs]]:
        """See `ports.ExampleReference`."""
        return await asyncio.gather(
            *(worker.put_reference_example_logprobs.remote(batch) for worker in self._workers)
        )


class TrainedGroup(RankGroup):
    """The ranks of a model that is trained."""

    async def save(self, directory: Path) -> None:
        """See `ports.Trained`; what ranks on other machines write is brought to this one."""
        directory = directory.absolute()
        elsewhere = await self._without(directory)
        try:
            paths = await self._open_outboxes(directory, elsewhere)
            await asyncio.gather(*(worker.save.remote(path) for worker, path in paths.items()))
            for worker in elsewhere:
                await collect(worker, directory)
        finally:
            await _close_outboxes(elsewhere)

    async def copy_state(self, directory: Path) -> Written:
        """See `ports.Trained`; files on other machines are brought here between two tasks."""
        directory = directory.absolute()
        elsewhere = await self._without(directory)
        try:
            paths = await self._open_outboxes(directory, elsewhere)
            copies = (worker.copy_state.remote(path) for worker, path in paths.items())
            await asyncio.gather(*copies)
        except BaseException:
            await _begin_to_close(elsewhere)
            raise
        return lambda: self._written(directory, elsewhere)

    async def _written(self, directory: Path, elsewhere: Sequence[Any]) -> None:
        """Wait until all ranks have written their files, and bring them here."""
        try:
            await all_of(_until_written(worker) for worker in self._workers)
            for worker in elsewhere:
                await collect(worker, directory)
        finally:
            await _begin_to_close(elsewhere)

    async def _open_outboxes(self, directory: Path, elsewhere: Sequence[Any]) -> dict[Any, str]:
        """Return where each rank writes; those elsewhere into a folder of their machine."""
        paths = dict.fromkeys(self._workers, str(directory))
        for worker in elsewhere:
            paths[worker] = await worker.open_outbox.remote()
        return paths

    async def load(self, directory: Path) -> None:
        """See `ports.Trained`; ranks on other machines get a copy of the files."""
        directory = directory.absolute()
        nodes = await asyncio.gather(*(worker.node.remote() for worker in self._workers))
        folders, files = NodeFolders(), all_files(directory)
        await asyncio.to_thread(folders.deliver, directory, files, nodes, keep=False)
        paths = [folders.on(directory, node) for node in nodes]
        calls = list(zip(self._workers, paths, strict=True))
        await asyncio.gather(*(worker.load.remote(path) for worker, path in calls))
        await asyncio.gather(*(worker.forget.remote(path) for worker, path in calls))

    async def _without(self, directory: Path) -> list[Any]:
        """Return the ranks that do not see a directory of this machine."""
        with tempfile.NamedTemporaryFile(prefix=".seen-", dir=directory) as mark:
            seen = await asyncio.gather(
                *(worker.sees.remote(mark.name) for worker in self._workers)
            )
        return [worker for worker, sees in zip(self._workers, seen, strict=True) if not sees]


async def _close_outboxes(workers: Sequence[Any]) -> None:
    await asyncio.gather(*(worker.close_outbox.remote() for worker in workers))


async def _begin_to_close(workers: Sequence[Any]) -> None:
    """Close outboxes; ranks that are busy or dead are not waited for."""
    if workers:
        await asyncio.wait((asyncio.ensure_future(_close_outboxes(workers)),), timeout=CLOSING_S)


async def _until_written(worker: Any) -> None:
    """Wait until a rank has written its files.

    A call that waited on the rank would hold up its next task; so it is asked, and answers between
    two tasks.
    """
    while await worker.seconds_of_files.remote() is None:
        await asyncio.sleep(ASKED_EVERY_S)


class TrainedCausalLMGroup(TrainedGroup):
    """The ranks of a trained model whose weights engines use."""

    async def export_weights(
        self, version: int, keep: Sequence[StoredWeights] = ()
    ) -> StoredWeights:
        """Store the present weights; return their manifest and where they are.

        Args:
            keep: older weights that are still read, where they are files.
        """
        exports = await asyncio.gather(
            *(worker.export_weights.remote(version, keep) for worker in self._workers)
        )
        return exports[0]

    async def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Return [L - 1] log-probabilities for each sequence of L tokens; the first has none."""
        # Every rank computes all of them, since each holds only a shard of the model.
        results = await asyncio.gather(
            *(worker.probe_logprobs.remote(sequences, temperature) for worker in self._workers)
        )
        return results[0]


class PolicyGroup(TrainedCausalLMGroup):
    """The ranks of the policy."""

    async def load_reference_head(self, directories: Sequence[str]) -> None:
        """Load the reference's LM head on every rank, for the KL over the vocabulary.

        Args:
            directories: of the reference, as each rank sees it.

        Raises:
            UnsupportedModelError: the models do not allow it.
        """
        calls = zip(self._workers, directories, strict=True)
        await self._at_set_up(worker.load_reference_head.remote(path) for worker, path in calls)

    async def logprobs(
        self,
        rollouts: Sequence[Handle[RolloutBatch]],
        ref_hidden: Sequence[Handle[HiddenStates | None]] = (),
    ) -> Sequence[Handle[LogprobBatch]]:
        """See `ports.Policy`."""
        return await asyncio.gather(
            *(
                worker.put_logprobs.remote(*rollouts, ref_hidden=list(ref_hidden))
                for worker in self._workers
            )
        )

    async def update(
        self,
        batch: Handle[ScoredBatch],
        ref_hidden: Sequence[Handle[HiddenStates | None]] = (),
        texts: Handle[ExampleBatch] | None = None,
    ) -> dict[str, Metric]:
        """See `ports.Policy`."""
        hidden = list(ref_hidden)
        reports = (worker.update.remote(batch, hidden, texts) for worker in self._workers)
        metrics = combine(await asyncio.gather(*reports))

        # The effective sample size, (sum rho)^2 / (n sum rho^2), is not a mean of those of the
        # ranks, so it is computed here from the means over all ranks.
        if "policy/ratio_square" in metrics:
            square = metrics.pop("policy/ratio_square")
            first = metrics["policy/ratio_mean"]
            fraction = first.value**2 / max(square.value, 1e-30)
            metrics["policy/effective_sample_size"] = mean(fraction, first.count)
        return metrics

    async def text_loss(self, texts: Handle[ExampleBatch]) -> dict[str, Metric]:
        """See `ports.Policy`."""
        reports = (worker.text_loss.remote(texts) for worker in self._workers)
        return combine(await asyncio.gather(*reports))

    async def estimated_advantages(self) -> Handle[NDArray[np.float32]] | None:
        """See `ports.Policy`."""
        return await self._workers[0].put_estimated_advantages.remote()


class CriticGroup(TrainedGroup):
    """The ranks of the critic."""

    async def values(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> Sequence[Handle[ValueBatch]]:
        """See `ports.Critic`."""
        return await asyncio.gather(
            *(worker.put_values.remote(*rollouts) for worker in self._workers)
        )

    async def update(self, batch: Handle[TrainBatch]) -> dict[str, Metric]:
        """See `ports.Critic`."""
        return combine(
            await asyncio.gather(*(worker.update.remote(batch) for worker in self._workers))
        )


class ScoringGroup(RankGroup):
    """The ranks of the frozen reward model of RL training."""

    def scores(
        self, rollouts: Handle[RolloutBatch]
    ) -> Sequence[Handle[ScoreBatch]] | Sequence[Handle[StepScoreBatch]]:
        """See `ports.ScoreSource`."""
        # The ranks compute together. Each works in the order of the calls, which all of them get.
        return [worker.scores.remote(rollouts) for worker in self._workers]


class ExampleReferenceGroup(RankGroup):
    """The ranks of the frozen reference of preference pairs."""

    async def logprobs(self, batch: Handle[ExampleBatch]) -> Sequence[Handle[ReferenceLogprobs]]:
        """See `ports.ExampleReference`."""
        return await asyncio.gather(
            *(worker.put_example_logprobs.remote(batch) for worker in self._workers)
        )


class OfflineGroup(TrainedCausalLMGroup):
    """The ranks of a model that learns from examples."""

    async def update(
        self, batch: Handle[ExampleBatch], reference: Sequence[Handle[ReferenceLogprobs]] = ()
    ) -> dict[str, Metric]:
        """See `ports.ExampleLearner`."""
        reports = (worker.update.remote(batch, *reference) for worker in self._workers)
        return combine(await asyncio.gather(*reports))

    async def evaluate(
        self, batch: Handle[ExampleBatch], reference: Sequence[Handle[ReferenceLogprobs]] = ()
    ) -> dict[str, Metric]:
        """See `ports.ExampleLearner`."""
        reports = (worker.evaluate.remote(batch, *reference) for worker in self._workers)
        return combine(await asyncio.gather(*reports))


class RewardModelGroup(OfflineGroup):
    """The ranks of a reward model."""

    async def update(
        self, batch: Handle[ExampleBatch], reference: Sequence[Handle[ReferenceLogprobs]] = ()
    ) -> dict[str, Metric]:
        """See `ports.ExampleLearner`."""
        return _with_deviation(await super().update(batch, reference), "reward_model")

    async def evaluate(
        self, batch: Handle[ExampleBatch], reference: Sequence[Handle[ReferenceLogprobs]] = ()
    ) -> dict[str, Metric]:
        """See `ports.ExampleLearner`; the ranks keep the mean reward for their checkpoints."""
        report = _with_deviation(await super().evaluate(batch, reference), "eval")
        report |= _calibration_error(report)
        mean_reward = report["eval/reward_mean"].value
        await asyncio.gather(
            *(worker.keep_reward_mean.remote(mean_reward) for worker in self._workers)
        )
        return report


def _calibration_error(report: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the mean over all pairs of |predicted - observed fraction| of their bin."""
    predicted = "eval/calibration/predicted_at_"
    bins = [
        (metric, report[name.replace("predicted", "observed")])
        for name, metric in report.items()
        if name.startswith(predicted)
    ]
    pairs = sum(metric.count for metric, _ in bins)
    errors = sum(metric.count * abs(metric.value - observed.value) for metric, observed in bins)
    return {"eval/calibration_error": mean(errors / max(pairs, 1.0), pairs)}


def _with_deviation(report: dict[str, Metric], prefix: str) -> dict[str, Metric]:
    """Replace the mean square of the rewards by their standard deviation.

    It is not a mean of those of the ranks, so it is computed here from the means over all ranks.
    """
    square = report.pop(f"{prefix}/reward_square")
    average = report[f"{prefix}/reward_mean"]
    variance = max(square.value - average.value**2, 0.0)
    return report | {f"{prefix}/reward_std": mean(variance**0.5, average.count)}
