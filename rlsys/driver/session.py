"""Everything of a training loop but its step: clock, observers, evaluation, checkpoints, stopping.

A loop registers the parts of a checkpoint, and lets the session run it:

    session.register("prompts", stream)       # anything with state() and load_state()
    session.register_model(policy)            # a `HasFiles`, which writes files itself
    outcome = await session.run(train)

    async def train():
        while session.goes_on():
            session.begin_step()
            with session.phase("update"):
                metrics = await policy.update(...)
            await session.end_step(values(metrics) | session.measurements())
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlsys.config import LoopConfig, RootConfig
from rlsys.driver.background_save import BackgroundSave, HasFiles
from rlsys.driver.faults import FaultLog
from rlsys.driver.restarts import Restarts
from rlsys.driver.watchdog import Watchdog
from rlsys.metrics import peak_memory_gib
from rlsys.run.checkpoints import Checkpoint, CheckpointStore
from rlsys.run.observers.observer import Observer, Outcome
from rlsys.run.resume import check_resumable, describe_origin, differences, registered_states

T = TypeVar("T")

OWN_STATE = ("step", "evaluated_step", "config", "versions")  # what `Session.save` adds itself

logger = logging.getLogger(__name__)


class HasState(Protocol):
    """A part of a run with a small state; both methods may be coroutines."""

    def state(self) -> Any:
        """Return what `load_state` needs to continue from here, ready for JSON."""
        ...

    def load_state(self, state: Any, /) -> Any:
        """Continue from what `state` returned."""
        ...


class HeldOutEvaluation(Protocol):
    """Anything that measures the current weights on held-out data."""

    async def evaluate(self) -> Mapping[str, float]: ...


class PhaseClock:
    """Seconds spent in each phase of a step."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start

    def values(self) -> dict[str, float]:
        """Return time/<phase>, time/other and time/step."""
        total = self._clock() - self._start
        phases = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        return phases | {"time/other": total - sum(self.seconds.values()), "time/step": total}


class Session:
    """The state of one run that does not depend on the kind of its step."""

    def __init__(
        self,
        config: RootConfig,
        checkpoints: CheckpointStore,
        observers: Sequence[Observer] = (),
        evaluator: HeldOutEvaluation | None = None,
        faults: FaultLog | None = None,
        watchdog: Watchdog | None = None,
        restarts: Restarts | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Create the session of a run.

        Args:
            faults: the log that the worker groups write to.
            watchdog: ends a phase that hangs; None: phases may take any time.
            restarts: know whether a failure ends the run; None: every failure does.
            clock: returns seconds; another one for runs in simulated time.
        """
        self._config = config
        self._trainer: LoopConfig = config.trainer
        self._checkpoints = checkpoints
        self._observers = observers
        self._evaluator = evaluator
        self._watchdog = watchdog
        self._restarts = restarts
        self._parts: dict[str, HasState] = {}
        self._models: dict[str, HasFiles] = {}
        self._stop_requested = asyncio.Event()
        self.step = 0  # completed steps, which is also the version of the policy's weights
        self._current_step = 0  # the one in progress; between two steps the completed one
        self._saved_step = 0
        self._background: BackgroundSave | None = None  # the last checkpoint that was begun so
        self._evaluated_step = -1
        self._save_time: dict[str, float] = {}  # goes with the next step, beyond its time/step
        self._place = "start"
        self.now = clock
        self._clock = PhaseClock(clock)
        self.faults = faults or FaultLog()
        self.faults.listen(lambda fault: self._notify(lambda observer: observer.on_fault(fault)))

    # What belongs to a checkpoint

    def register(self, name: str, part: HasState) -> None:
        """Keep the state of `part` in every checkpoint, under `name`."""
        assert name not in self._parts, f"{name!r} is registered already"
        assert name not in OWN_STATE, f"{name!r} is the session's own"
        self._parts[name] = part

    def register_model(self, model: HasFiles, directory: str = "") -> None:
        """Keep the files of `model` in `directory` of every checkpoint.

        Those of the policy are at the top, so that the checkpoint itself is a Hugging Face model.
        """
        assert directory not in self._models, f"{directory!r} is registered already"
        self._models[directory] = model

    async def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written; call it before `run`.

        Fields and versions that have changed since then are named in the log.

        Raises:
            ValueError: the checkpoint is of another model, sharding, data or kind of run.
        """
        check_resumable(checkpoint, self._config)
        for change in differences(checkpoint, self._config):
            logger.warning("changed since checkpoint %s: %s", checkpoint.path, change)

        states = registered_states(checkpoint, self._config, self._parts)
        await self.load_states(states)
        for directory, model in self._models.items():
            await model.load(checkpoint.path / directory)

        self.step = checkpoint.step
        self._current_step = checkpoint.step
        self._saved_step = checkpoint.step
        self._evaluated_step = checkpoint.state["evaluated_step"]

    async def states(self) -> dict[str, Any]:
        """Return the states of all registered parts."""
        return {name: await _settled(part.state()) for name, part in self._parts.items()}

    async def load_states(self, states: Mapping[str, Any]) -> None:
        """Continue from what `states` returned."""
        for name, part in self._parts.items():
            await _settled(part.load_state(states[name]))

    async def save(self) -> None:
        """Write a checkpoint of the completed steps; one that is still being written comes first.

        With `trainer.checkpoints.asynchronous` it returns when the ranks have copied their state,
        as long as there is another step that can be taken meanwhile.
        """
        await self._finish_background()
        in_background = self._trainer.checkpoints.asynchronous and self.goes_on()
        phase = "checkpoint_copy" if in_background else "checkpoint"
        self._enter(phase)
        start = self.now()
        state: dict[str, Any] = {"step": self.step, "evaluated_step": self._evaluated_step}
        state |= await self.states()
        state |= describe_origin(self._config)

        if in_background:
            await self._begin_background(deepcopy(state))
        else:
            path = await self._checkpoints.save(self.step, self._write_models, state)
            self._sealed(self.step, path)
        self._save_time[f"time/{phase}"] = self.now() - start

    def _sealed(self, step: int, path: Path) -> None:
        self._saved_step = step
        self._notify(lambda observer: observer.on_checkpoint(step, str(path)))

    async def _begin_background(self, state: dict[str, Any]) -> None:
        """Let the ranks copy their state; the rest follows while training goes on."""
        step = self.step

        def sealed(path: Path, seconds: float) -> None:
            self._save_time["time/checkpoint_write"] = seconds
            self._sealed(step, path)

        self._background = BackgroundSave(
            step, self._models, self._checkpoints, state, sealed, self.now
        )
        await self._background.copied()
        self._enter("other")

    async def _finish_background(self) -> None:
        """Wait for a checkpoint that is still being written.

        Raises:
            Exception: it could not be written.
        """
        if self._background is None:
            return
        if not self._background.is_done:
            self._enter("checkpoint_write", self._background.step)
            start = self.now()
            await self._background.finish()
            self._save_time["time/checkpoint_wait"] = self.now() - start
        self._raise_background_failure()

    def _raise_background_failure(self) -> None:
        """End the run where a checkpoint could not be written, as where it is saved at once."""
        if self._background is None or not self._background.is_done:
            return
        try:
            self._background.raise_failure()
        except Exception:
            self._enter("checkpoint_write", self._background.step)
            raise

    async def _write_models(self, checkpoint: Path) -> None:
        for directory, model in self._models.items():
            target = checkpoint / directory
            target.mkdir(parents=True, exist_ok=True)
            await model.save(target)

    # The whole run

    async def run(self, train: Callable[[], Awaitable[None]]) -> Outcome:
        """Await `train`, until the last step or until a stop is requested, and save the result.

        Raises:
            Exception: raised by a worker, with a note that names the phase and step, and the
                checkpoint from which to resume.
        """
        first_step = self.step + 1
        steps = self._trainer.steps
        self._notify(lambda observer: observer.on_start(first_step, steps))
        try:
            work = self._train_and_save(train)
            await (self._watchdog.guard(work) if self._watchdog else work)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if self._background:
                self._background.cancel()
            self._end("interrupted", f"left during {self._place}; {self._newest_checkpoint()}")
            raise
        except Exception as error:
            if self._background:
                await self._background.leave(error)
            reason = (str(error).strip().splitlines() or [""])[-1]
            error.add_note(f"This happened during {self._place}; {self._newest_checkpoint()}.")
            message = f"{self._place}: {type(error).__name__}: {reason}"
            ends = self._restarts is None or self._restarts.refusal(error) is not None
            self._end("failed" if ends else "restarting", message)
            raise

        complete = self.step >= steps and not self._evaluation_is_due()
        return self._end("finished" if complete else "interrupted", "")

    async def _train_and_save(self, train: Callable[[], Awaitable[None]]) -> None:
        await train()
        await self._finish_background()
        if self._saved_step < self.step:
            await self.save()

    def request_stop(self) -> None:
        """End after the step in progress, with a checkpoint; a running evaluation is cancelled.

        A signal handler calls it.
        """
        self._stop_requested.set()
        if self._restarts:
            self._restarts.request_stop()

    def goes_on(self) -> bool:
        """Return whether there is another step to take."""
        return self.step < self._trainer.steps and not self._stop_requested.is_set()

    def _end(self, outcome: Outcome, message: str) -> Outcome:
        self._notify(lambda observer: observer.on_end(outcome, message))
        return outcome

    def _newest_checkpoint(self) -> str:
        if not self._saved_step:
            return "there is no checkpoint yet"
        return (
            f"the newest checkpoint is that of step {self._saved_step}, "
            "from which --resume continues"
        )

    # One step

    def begin_step(self) -> int:
        """Start the clock of the next step, and return its number."""
        self._current_step = self.step + 1
        self._clock = PhaseClock(self.now)
        return self._current_step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notify the observers of a phase of the step, and time it."""
        self._enter(name)
        with self._clock.phase(name):
            yield

    def measurements(self) -> dict[str, float]:
        """Return the times of the step so far, the driver's peak memory, and the counts of faults.

        The memory must not grow with the batch: large records stay in the object store.
        """
        memory = {"memory/driver": peak_memory_gib()}
        return self._clock.values() | memory | self.faults.metrics()

    async def end_step(self, values: Mapping[str, float]) -> None:
        """Count the step, report its numbers, and evaluate and save where that is due."""
        self.step = self._current_step
        reported = {**values, **self._save_time}
        self._save_time = {}
        self._notify(lambda observer: observer.on_step(self.step, reported))

        self._raise_background_failure()
        await self.evaluate_if_due()
        every = self._trainer.checkpoints.every
        if every and self.step % every == 0:
            await self.save()

    async def evaluate_if_due(self) -> None:
        """Evaluate the current weights, unless that was done or a stop is requested."""
        if self._evaluator is None or not self._evaluation_is_due():
            return
        if self._stop_requested.is_set():
            return

        self._enter("evaluate")
        start = self.now()
        report = await _unless_stopped(self._evaluator.evaluate(), self._stop_requested)
        if report is None:
            return

        values = {**report, "time/evaluate": self.now() - start}
        self._notify(lambda observer: observer.on_evaluation(self.step, values))
        self._evaluated_step = self.step

    def _evaluation_is_due(self) -> bool:
        return self._evaluator is not None and self._trainer.evaluation_is_due(
            self.step, self._evaluated_step
        )

    def _enter(self, phase: str, step: int | None = None) -> None:
        step = self._current_step if step is None else step
        self._place = f"{phase} of step {step}"
        self.faults.enter(step, phase)
        self._notify(lambda observer: observer.on_phase(step, phase))

    def _notify(self, event: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            event(observer)


async def _settled(result: Any) -> Any:
    """Return the result of a method that may be a coroutine."""
    return await result if inspect.isawaitable(result) else result


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """Return the result of `work`, or None when `stop` was set first; then `work` is cancelled."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopped.cancel()
