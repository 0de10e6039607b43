"""Run a scenario: the real training loops in simulated time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.config import GenerationConfig, RunConfig, TrainerConfig
from rlsys.config.trainer import AsynchronousConfig, CheckpointConfig, EvaluationConfig
from rlsys.driver.asynchronous_loop import AsynchronousLoop
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.observers.observer import Observer
from rlsys.simulate.scenario import Scenario
from rlsys.simulate.simulated_ports import SimulatedCluster, build_cluster
from rlsys.simulate.simulated_time import SimulatedLoop, simulate


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """What a scenario achieves, over the steps that count."""

    step_s: float  # seconds of a step, simulated
    tokens_per_s: float  # response tokens that were trained
    engine_use: float  # sampled tokens, as a fraction of what full engines would have sampled
    generation_idle: float  # fraction of the engines' time in which they had no sequence
    training_idle: float  # fraction of the trainer's time in which there was no update
    staleness_mean: float  # weight versions
    staleness_max: float
    dropped_fraction: float  # of the finished groups: too old
    deaths: int  # of workers
    driver_cpu_s: float  # per step, real: the driver, and the simulation of all else


@dataclass
class _Recorder(Observer):
    """Keeps the metrics of the steps, and the state of the cluster after each."""

    cluster: SimulatedCluster
    loop: SimulatedLoop

    def __post_init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []
        self.moments: list[_Moment] = []

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(values)
        self.moments.append(_Moment.of(self.cluster, self.loop))


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """Totals since the start of the run."""

    now: float
    engines_busy_s: float
    sampled_tokens: float
    trainer_busy_s: float
    trained_tokens: int
    cpu_s: float

    @staticmethod
    def of(cluster: SimulatedCluster, loop: SimulatedLoop) -> _Moment:
        engines = [worker.engine.totals() for worker in cluster.engines]
        return _Moment(
            now=loop.now,
            engines_busy_s=sum(engine.busy_s for engine in engines),
            sampled_tokens=sum(engine.tokens for engine in engines),
            trainer_busy_s=cluster.policy.busy_s,
            trained_tokens=cluster.policy.tokens,
            cpu_s=time.process_time(),
        )


def run_scenario(scenario: Scenario) -> SimulatedRun:
    """Simulate a run, with further steps before and after those that count.

    In the first ones the queue fills, and in the last ones there is less and less left to sample.
    """
    first = scenario.max_staleness + 1
    steps = first + scenario.steps + scenario.max_staleness

    async def work(loop: SimulatedLoop) -> SimulatedRun:
        cluster = build_cluster(scenario)
        recorder = _Recorder(cluster, loop)
        with tempfile.TemporaryDirectory() as folder:
            await _train(scenario, steps, cluster, recorder, loop, Path(folder))
        for worker in cluster.engines:
            worker.end()
        return _result(scenario, recorder, first)

    return simulate(work)


async def _train(
    scenario: Scenario,
    steps: int,
    cluster: SimulatedCluster,
    recorder: _Recorder,
    loop: SimulatedLoop,
    folder: Path,
) -> None:
    """Run the loop that the scenario asks for."""
    config = make_config(scenario, steps)
    sampler = Sampler(config, cluster.workers.generator, cluster.workers.scorer)
    store = CheckpointStore(folder / "checkpoints", keep=1)
    session = Session(config, store, [recorder], clock=loop.time)
    make_loop = AsynchronousLoop if scenario.max_staleness else SynchronousLoop
    training = make_loop(
        config, cluster.workers, cluster.prompts, sampler, session, folder / "rollouts"
    )
    await training.run()


def make_config(scenario: Scenario, steps: int) -> RunConfig:
    """Return the configuration of the loop. No model is ever loaded."""
    workload = scenario.workload
    trainer = TrainerConfig(
        steps=steps,
        prompts_per_step=workload.prompts_per_step,
        max_staleness=scenario.max_staleness,
        asynchronous=AsynchronousConfig(
            on_stale=scenario.on_stale, groups_per_call=scenario.groups_per_call
        ),
        seed=scenario.seed,
        evaluation=EvaluationConfig(every=0),
        checkpoints=CheckpointConfig(every=0, keep=1),
    )
    generation = GenerationConfig(
        samples_per_prompt=workload.samples_per_prompt, workers=scenario.engines
    )
    return RunConfig(trainer=trainer, generation=generation)


def _result(scenario: Scenario, recorder: _Recorder, skipped: int) -> SimulatedRun:
    """Return the averages of the steps that count, which follow those that are skipped."""
    end = skipped + scenario.steps
    first, last = recorder.moments[skipped - 1], recorder.moments[end - 1]
    steps = recorder.steps[skipped:end]
    seconds = last.now - first.now
    engine_s = seconds * scenario.engines
    most = engine_s * scenario.engine.most_tokens_per_s

    trained = scenario.workload.prompts_per_step * len(steps)
    dropped = sum(step.get("staleness/dropped_groups", 0.0) for step in steps)
    return SimulatedRun(
        step_s=seconds / len(steps),
        tokens_per_s=(last.trained_tokens - first.trained_tokens) / seconds,
        engine_use=(last.sampled_tokens - first.sampled_tokens) / most,
        generation_idle=max(0.0, 1 - (last.engines_busy_s - first.engines_busy_s) / engine_s),
        training_idle=1 - (last.trainer_busy_s - first.trainer_busy_s) / seconds,
        staleness_mean=sum(step.get("staleness/mean", 0.0) for step in steps) / len(steps),
        staleness_max=max(step.get("staleness/max", 0.0) for step in steps),
        dropped_fraction=dropped / (dropped + trained),
        deaths=sum(worker.deaths for worker in recorder.cluster.engines),
        driver_cpu_s=(last.cpu_s - first.cpu_s) / len(steps),
    )
