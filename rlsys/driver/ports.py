"""The driver's view of the workers, as async Protocols. The loop knows nothing else.

A `Handle[T]` stands for a record that lives elsewhere (in Ray, an ObjectRef; in tests, a finished
future). The driver passes handles on and never opens the large ones; a worker that gets a handle as
an argument receives the record. Methods that start work and return a handle return at once; methods
that are awaited come back when the work is done, with small records only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlsys.data.batches import (
    LogprobBatch,
    PromptBatch,
    RewardBatch,
    RolloutBatch,
    SamplingParameters,
    ScoreBatch,
    ScoredBatch,
    StepScoreBatch,
    TrainBatch,
    ValueBatch,
)
from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.data.hidden_states import HiddenStates
from rlsys.driver.background_save import Written
from rlsys.metrics import MetricMap

T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """A record somewhere in the cluster. Awaiting it fetches the record."""

    def __await__(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class RolloutPart:
    """One whole group of a batch, as soon as its worker has finished it."""

    prompt_index: int  # in the PromptBatch; parts sorted by it are in prompt order
    num_response_tokens: int
    rollouts: Handle[RolloutBatch]


@dataclass(frozen=True, kw_only=True)
class StepHandles:
    """All records of the samples of one step; groups in prompt order.

    An empty sequence of log-probabilities or values means that there are none. Dropped parts were
    sampled and not kept: they are counted in the metrics and get no advantages.
    """

    rollouts: Sequence[Handle[RolloutBatch]]
    rewards: Sequence[Handle[RewardBatch]]
    old: Sequence[Handle[LogprobBatch]] = ()  # one per rank
    ref: Sequence[Handle[LogprobBatch]] = ()
    values: Sequence[Handle[ValueBatch]] = ()  # one per rank
    greedy: Sequence[Handle[RewardBatch]] = ()  # of one greedy response per prompt
    dropped_rollouts: Sequence[Handle[RolloutBatch]] = ()
    dropped_rewards: Sequence[Handle[RewardBatch]] = ()
    weight_version: int | None = None  # of the policy that is trained; None: it is not known

    def all(self) -> list[Handle[Any]]:
        """Return every handle."""
        return [handle for name in self._names() for handle in getattr(self, name)]

    def opened(self, records: Mapping[Handle[Any], Any]) -> StepRecords:
        """Return the records, given that of each handle."""
        opened = {
            name: [records[handle] for handle in getattr(self, name)] for name in self._names()
        }
        return StepRecords(**opened, weight_version=self.weight_version)

    @classmethod
    def _names(cls) -> list[str]:
        """Return the fields that hold handles."""
        return [field.name for field in fields(cls) if field.name != "weight_version"]


@dataclass(frozen=True, kw_only=True)
class StepRecords:
    """The records behind `StepHandles`, where they are used."""

    rollouts: Sequence[RolloutBatch]
    rewards: Sequence[RewardBatch]
    old: Sequence[LogprobBatch] = ()
    ref: Sequence[LogprobBatch] = ()
    values: Sequence[ValueBatch] = ()
    greedy: Sequence[RewardBatch] = ()
    dropped_rollouts: Sequence[RolloutBatch] = ()
    dropped_rewards: Sequence[RewardBatch] = ()
    weight_version: int | None = None


@dataclass(frozen=True, kw_only=True)
class CreditedBatch:
    """A batch in the object store, with metrics of the samples, the trained part and advantages."""

    # A `TrainBatch`; a `ScoredBatch` where the policy's ranks estimate the advantages.
    batch: Handle[ScoredBatch]
    dropped: Handle[ScoredBatch] | None = None  # sampled and not kept; None: everything was kept
    metrics: MetricMap = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VersionedPart:
    """A finished group, with the version of the weights that sampled all of its tokens."""

    part: RolloutPart
    weight_version: int


class WorkerDiedError(RuntimeError):
    """A generation worker died; the prompts that it did not answer may go to another one."""


class GenerationSlot(Protocol):
    """One generation worker, to which the driver itself gives groups."""

    @property
    def is_ready(self) -> bool:
        """Whether `ready` would return at once."""
        ...

    async def ready(self) -> None:
        """Wait until the worker can take prompts: not while it is restarted."""
        ...

    def generate(
        self, prompts: PromptBatch, positions: Sequence[int], sampling: SamplingParameters
    ) -> AsyncIterator[VersionedPart]:
        """Sample responses on this worker, under the weights that were published last.

        Parts come as they finish; their `prompt_index` is among `positions`.

        Args:
            positions: of the prompts in their batch of the stream, which the seeds depend on.

        Raises:
            WorkerDiedError: the prompts without a part have to be sampled again.
        """
        ...


class Generator(Protocol):
    """The generation group."""

    def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        """Sample responses.

        Parts come in the order in which they finish and cover each prompt once.
        """
        ...

    async def metrics(self) -> MetricMap:
        """Return peak memory and the like of the workers."""
        ...


class RewardScorer(Protocol):
    """The reward worker."""

    def score(self, rollouts: Handle[RolloutBatch]) -> Handle[RewardBatch]:
        """Start computing the rewards of one part's responses."""
        ...

    async def metrics(self) -> MetricMap: ...


class ScoreSource(Protocol):
    """The actor group of a reward model, behind the reward scorer."""

    def scores(
        self, rollouts: Handle[RolloutBatch]
    ) -> Sequence[Handle[ScoreBatch]] | Sequence[Handle[StepScoreBatch]]:
        """Start to score one part's responses; return one handle per rank."""
        ...


class LogprobSource(Protocol):
    """A model that computes log-probabilities of sampled tokens.

    The policy computes `old`, the reference `ref`.
    """

    async def logprobs(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> Sequence[Handle[LogprobBatch]]:
        """Compute the log-probabilities of a batch, given as its parts in prompt order.

        Return one handle per rank.
        """
        ...


class Reference(LogprobSource, Protocol):
    """The actor group of the frozen reference."""

    async def logprobs_and_hidden(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> tuple[Sequence[Handle[LogprobBatch]], Sequence[Handle[HiddenStates | None]]]:
        """Compute log-probabilities, and the hidden states for a KL over the vocabulary.

        Return one handle of each per rank; a rank without rows has no hidden states.
        """
        ...


class Trained(Protocol):
    """The actor group of a model that is trained."""

    async def save(self, directory: Path) -> None:
        """Write weights (Hugging Face layout), optimizer, schedule and RNG below `directory`.

        The directory exists and is empty.
        """
        ...

    async def copy_state(self, directory: Path) -> Written:
        """Copy what `save` writes into host memory, and begin to write the same files from there.

        Training may go on when it returns. The result waits until the files are complete, and
        raises what went wrong with them.
        """
        ...

    async def load(self, directory: Path) -> None:
        """Continue from the files that `save` wrote."""
        ...


class Policy(Trained, Protocol):
    """The actor group of the policy that is trained."""

    async def logprobs(
        self,
        rollouts: Sequence[Handle[RolloutBatch]],
        ref_hidden: Sequence[Handle[HiddenStates | None]] = (),
    ) -> Sequence[Handle[LogprobBatch]]:
        """See `LogprobSource`. With `ref_hidden` the result has the exact KL to the reference."""
        ...

    async def update(
        self,
        batch: Handle[ScoredBatch],
        ref_hidden: Sequence[Handle[HiddenStates | None]] = (),
        texts: Handle[ExampleBatch] | None = None,
    ) -> MetricMap:
        """Train all epochs and mini-batches of one batch; return metrics merged over ranks.

        The batch is a `TrainBatch`; with `advantage.recompute` a `ScoredBatch`, whose advantages
        the ranks estimate. `ref_hidden` is for a loss with the exact KL to the reference. `texts`
        are divided among the optimizer steps, each of which gets their gradient too.
        """
        ...

    async def text_loss(self, texts: Handle[ExampleBatch]) -> MetricMap:
        """Return eval/text_loss: the negative log-likelihood per token of held-out text."""
        ...

    async def estimated_advantages(self) -> Handle[NDArray[np.float32]] | None:
        """Return [N] the advantages that the last `update` estimated itself.

        For `advantage.recompute`: NaN where it estimated none, and with several epochs those of the
        last one. None: it used those of the batch.
        """
        ...


class Critic(Trained, Protocol):
    """The actor group of the value function."""

    async def values(
        self, rollouts: Sequence[Handle[RolloutBatch]]
    ) -> Sequence[Handle[ValueBatch]]:
        """Compute the value before each sampled token of a batch, given as parts in prompt order.

        Return one handle per rank.
        """
        ...

    async def update(self, batch: Handle[TrainBatch]) -> MetricMap:
        """Train on the `returns` of one batch, starting from its `values`.

        All epochs and mini-batches; return metrics merged over ranks.
        """
        ...


class AdvantageComputer(Protocol):
    """The advantage controller."""

    async def credit(self, step: StepHandles) -> CreditedBatch:
        """Join a step's parts, compute advantages, leave the result in the object store."""
        ...

    async def state(self) -> dict[str, Any]:
        """Return what outlives a batch (adaptive coefficients, moving averages), ready for JSON.

        It is saved in checkpoints.
        """
        ...

    async def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        ...

    async def write_rollouts(
        self,
        batch: Handle[ScoredBatch],
        path: Path,
        *,
        dropped: Handle[ScoredBatch] | None = None,
        advantages: Handle[NDArray[np.float32]] | None = None,
    ) -> None:
        """Write everything that was sampled in one step as Parquet.

        `advantages` are `Policy.estimated_advantages`, for a batch that has none.
        """
        ...

    async def metrics(self) -> MetricMap:
        """Return the peak memory."""
        ...


class WeightSync(Protocol):
    """The transfer of the policy's weights into the generation group."""

    async def sync(self, version: int) -> MetricMap:
        """Install the policy's current weights as `version` everywhere, and verify it with a probe.

        Raises:
            WeightSyncError: engine and trainer disagree by more than the tolerance.
        """
        ...


class WeightPublisher(Protocol):
    """The transfer of the policy's weights while the generation group goes on."""

    async def publish(self, version: int) -> Awaitable[MetricMap]:
        """Give the policy's present weights to all workers as `version`.

        When this returns, the policy may be updated again, and everything that a worker is given
        from now on is sampled under these weights: it installs them between the groups that it has
        and those that it gets. The result ends when all workers have installed and verified them.

        Raises:
            WeightSyncError: see `WeightSync`; raised by the result.
        """
        ...


class WeightSyncError(RuntimeError):
    """A disagreement of engine and trainer after a weight sync.

    The message names the parameter groups that differ.
    """


class PromptSource(Protocol):
    """The seeded, resumable stream of training prompts."""

    def next_batch(self) -> PromptBatch: ...

    def state(self, returned: Sequence[int] = ()) -> dict[str, Any]:
        """Return the position; the group ids `returned` were taken and have to come again."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class HasMetrics(Protocol):
    """A worker that reports its peak memory and the like."""

    async def metrics(self) -> MetricMap: ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """All workers of a run: the other side of the ports."""

    generator: Generator
    scorer: RewardScorer
    policy: Policy
    reference: Reference | None  # None where no KL term is configured
    advantages: AdvantageComputer
    weights: WeightSync
    critic: Critic | None = None  # None where critic.enabled is false
    # Into the object store; None is enough where no pretraining text is read.
    put: Callable[[ExampleBatch], Handle[ExampleBatch]] | None = None
    reporting: Sequence[HasMetrics] = ()
    # None is enough where sampling and training take turns.
    concurrent: ConcurrentGeneration | None = None


@dataclass(frozen=True, kw_only=True)
class ConcurrentGeneration:
    """The generation group as asynchronous training uses it, beside its other methods."""

    slots: Sequence[GenerationSlot]
    publisher: WeightPublisher


class ExampleLearner(Trained, Protocol):
    """The actor group of a model that learns from examples."""

    async def update(
        self, batch: Handle[ExampleBatch], reference: Sequence[Handle[ReferenceLogprobs]] = ()
    ) -> MetricMap:
        """Take one optimizer step on a batch; return metrics merged over ranks."""
        ...

    async def evaluate(
        self, batch: Handle[ExampleBatch], reference: Sequence[Handle[ReferenceLogprobs]] = ()
    ) -> MetricMap:
        """Return the loss and other metrics of held-out examples, as eval/<name>."""
        ...


class ExampleReference(Protocol):
    """The frozen model with which preferences are compared."""

    async def logprobs(self, batch: Handle[ExampleBatch]) -> Sequence[Handle[ReferenceLogprobs]]:
        """Compute the log-probability of each response; return one handle per rank."""
        ...


class ExampleSource(Protocol):
    """The seeded, resumable stream of training examples."""

    def next_batch(self) -> ExampleBatch: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationWorkers:
    """The workers that answer held-out prompts with the weights of the trained model."""

    generator: Generator
    scorer: RewardScorer
    weights: WeightSync


@dataclass(frozen=True, kw_only=True)
class OfflineWorkers:
    """All workers of a run on examples."""

    trained: ExampleLearner
    put: Callable[[ExampleBatch], Handle[ExampleBatch]]  # into the object store
    reference: ExampleReference | None = None  # None: the objective has no reference
    evaluation: EvaluationWorkers | None = None  # None: nothing is sampled
    reporting: Sequence[HasMetrics] = ()


class ExpertLearner(Trained, Protocol):
    """The actor group of a policy that learns its own correct responses."""

    async def update(self, batch: Handle[ExampleBatch]) -> MetricMap:
        """Train all epochs and mini-batches of the kept responses of a step, of which may be none.

        Return metrics merged over ranks.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class KeptResponses:
    """The responses of a step that are learned, and all that were sampled."""

    responses: int  # that are learned; may be 0
    batch: Handle[ExampleBatch]  # of these
    sampled: Handle[ScoredBatch]  # `trained` is True where a response is learned
    metrics: MetricMap


class ResponseFilter(Protocol):
    """The worker that chooses the responses to learn; the driver does not open them."""

    async def choose(
        self, rollouts: Sequence[Handle[RolloutBatch]], rewards: Sequence[Handle[RewardBatch]]
    ) -> KeptResponses:
        """Choose among the responses of a step, given as its parts in prompt order."""
        ...

    async def write_rollouts(self, sampled: Handle[ScoredBatch], path: Path) -> None:
        """Write everything that was sampled in one step as Parquet."""
        ...

    async def metrics(self) -> MetricMap:
        """Return the peak memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExpertIterationWorkers:
    """All workers of expert iteration."""

    generator: Generator
    scorer: RewardScorer
    filter: ResponseFilter
    policy: ExpertLearner
    weights: WeightSync
    reporting: Sequence[HasMetrics] = ()
