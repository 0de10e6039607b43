"""What the driver costs with 1,024 generation workers and 100,000 responses in flight.

    python -m benchmarks.driver_scale

The loop is the real one of asynchronous training (`rlsys.driver`). The other side of its ports is
here: a worker sleeps in simulated time, and a response is a number of tokens in a record that the
driver must not open. So the measured seconds are those of the driver alone, without the remote
calls of Ray. Each row is a process of its own; see docs/simulation.md.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlsys.data.batches import PromptBatch, RewardBatch, RolloutBatch, SamplingParameters
from rlsys.driver.asynchronous_loop import AsynchronousLoop
from rlsys.driver.ports import ConcurrentGeneration, Handle, RolloutPart, VersionedPart
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.metrics import Metric, peak_memory_gib
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.observers.observer import Observer
from rlsys.simulate.engine import EngineSpeed
from rlsys.simulate.length_laws import MeasuredLengths
from rlsys.simulate.run import make_config
from rlsys.simulate.scenario import Scenario, Workload
from rlsys.simulate.simulated_ports import Tokens, Versions, build_cluster
from rlsys.simulate.simulated_time import SimulatedLoop, simulate

GROUPS_PER_CALL = 16  # of which about half are unfinished, as a mean
SAMPLES = 14  # 1,024 workers with 7 groups of 14 are 100,352 responses
MAX_STALENESS = 2
WARM_UP = 3  # steps in which the queue fills
STEPS = 4  # that count
TOKEN_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the driver costs at one size."""

    workers: int
    tokens_per_response: int
    in_flight: int  # responses that are being sampled, at the end of a step, as a mean
    groups_per_step: int
    cpu_s: float  # per step
    cpu_us_per_group: float
    memory_mib: float  # of the process, at its peak, beyond that before the run
    growth_mib: float  # between the first and the last step that counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each row in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, help="measure one row here, and print JSON")
    parser.add_argument("--tokens", type=int, default=1000, help="of a response")
    options = parser.parse_args(arguments)
    if options.workers:
        print(json.dumps(dataclasses.asdict(measure(options.workers, options.tokens))))
        return

    names = [field.name for field in dataclasses.fields(Cost)]
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|" + "---|" * len(names))
    for workers, tokens in ((1024, 1000), (1024, 2000), (256, 1000)):
        row = json.loads(_in_a_process(workers, tokens))
        cells = [
            f"{row[name]:.2f}" if isinstance(row[name], float) else f"{row[name]:,}"
            for name in names
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _in_a_process(workers: int, tokens: int) -> str:
    command = [sys.executable, "-m", "benchmarks.driver_scale"]
    command += ["--workers", str(workers), "--tokens", str(tokens)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class SleepingWorker:
    """A `ports.GenerationSlot` that answers one prompt after the other."""

    def __init__(self, versions: Versions, tokens: int) -> None:
        self._versions = versions
        self._tokens = tokens
        self.in_flight = 0  # responses

    is_ready = True

    async def ready(self) -> None:
        """See `ports.GenerationSlot`."""

    async def generate(
        self, prompts: PromptBatch, positions: Sequence[int], sampling: SamplingParameters
    ) -> AsyncIterator[VersionedPart]:
        """See `ports.GenerationSlot`."""
        version = self._versions.newest
        samples = sampling.samples_per_prompt
        self.in_flight = samples * len(positions)
        for group, position in zip(prompts.group_ids, positions, strict=True):
            # Groups take from half to one and a half times the mean, so that some are overtaken.
            await asyncio.sleep(TOKEN_S * self._tokens * (0.5 + int(group) * 0.618 % 1))
            self.in_flight -= samples
            tokens = self._tokens * samples
            part = RolloutPart(
                prompt_index=position, num_response_tokens=tokens, rollouts=Tokens(tokens)
            )
            yield VersionedPart(part=part, weight_version=version)


class SmallRewards:
    """A `ports.RewardScorer` whose rewards have the size of real ones."""

    def score(self, rollouts: Handle[RolloutBatch]) -> Handle[RewardBatch]:
        """See `ports.RewardScorer`."""
        rewards = np.zeros(SAMPLES, dtype=np.float32)
        batch = RewardBatch(
            batch_id=0,
            rewards=rewards,
            accuracies=rewards.copy(),
            components={"math": rewards.copy()},
            reasons=tuple(f"reason {row}" for row in range(SAMPLES)),
            extracted_answers=tuple(f"answer {row}" for row in range(SAMPLES)),
        )
        return asyncio.ensure_future(asyncio.sleep(1.0, batch))

    async def metrics(self) -> dict[str, Metric]:
        return {}


class QuickPublisher:
    """A `ports.WeightPublisher` and `ports.WeightSync` without any transfer."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions

    async def sync(self, version: int) -> dict[str, Metric]:
        """See `ports.WeightSync`."""
        return await (await self.publish(version))

    async def publish(self, version: int) -> Awaitable[dict[str, Metric]]:
        """See `ports.WeightPublisher`."""
        self._versions.newest = version
        return asyncio.ensure_future(asyncio.sleep(0, {}))


class Meter(Observer):
    """Notes seconds of CPU and memory after each step."""

    def __init__(self, workers: Sequence[SleepingWorker]) -> None:
        self._workers = workers
        self.cpu_s: list[float] = []
        self.memory_mib: list[float] = []
        self.in_flight: list[int] = []

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.cpu_s.append(time.process_time())
        self.memory_mib.append(memory_mib())
        self.in_flight.append(sum(worker.in_flight for worker in self._workers))


def memory_mib() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(workers: int, tokens: int) -> Cost:
    """Return what the driver costs in this process."""
    before = memory_mib()
    groups = workers * GROUPS_PER_CALL // 2  # of a step
    meter = simulate(lambda loop: _run(workers, tokens, groups, loop))

    cpu_s = (meter.cpu_s[WARM_UP + STEPS - 1] - meter.cpu_s[WARM_UP - 1]) / STEPS
    counted = slice(WARM_UP, WARM_UP + STEPS)
    return Cost(
        workers=workers,
        tokens_per_response=tokens,
        in_flight=sum(meter.in_flight[counted]) // STEPS,
        groups_per_step=groups,
        cpu_s=cpu_s,
        cpu_us_per_group=cpu_s / groups * 1e6,
        memory_mib=peak_memory_gib() * 1024 - before,
        growth_mib=meter.memory_mib[WARM_UP + STEPS - 1] - meter.memory_mib[WARM_UP],
    )


async def _run(workers: int, tokens: int, groups: int, loop: SimulatedLoop) -> Meter:
    """Run the loop; the trainer takes as long as the workers need for the groups of a step."""
    step_s = TOKEN_S * tokens * groups / workers
    scenario = Scenario(
        workload=Workload(
            prompts_per_step=groups,
            samples_per_prompt=SAMPLES,
            lengths=MeasuredLengths((tokens,)),
            reward_s=1.0,
            train_token_s=0.0,
            train_fixed_s=0.9 * step_s,
            sync_s=0.0,
        ),
        engines=workers,
        engine=EngineSpeed(step_s=TOKEN_S, sequence_s=0.0),
        max_staleness=MAX_STALENESS,
        groups_per_call=GROUPS_PER_CALL,
        steps=STEPS,
    )
    versions = Versions()
    slots = [SleepingWorker(versions, tokens) for _ in range(workers)]
    publisher = QuickPublisher(versions)
    cluster = build_cluster(scenario)
    ports = dataclasses.replace(
        cluster.workers,
        scorer=SmallRewards(),
        weights=publisher,
        concurrent=ConcurrentGeneration(slots=slots, publisher=publisher),
    )
    meter = Meter(slots)
    with tempfile.TemporaryDirectory() as folder:
        # As many further steps as the workers are ahead, so that they have work to the end.
        config = make_config(scenario, WARM_UP + STEPS + MAX_STALENESS + 1)
        sampler = Sampler(config, ports.generator, ports.scorer)
        store = CheckpointStore(Path(folder) / "checkpoints", keep=1)
        session = Session(config, store, [meter], clock=loop.time)
        training = AsynchronousLoop(
            config, ports, cluster.prompts, sampler, session, Path(folder) / "rollouts"
        )
        await training.run()
    return meter


if __name__ == "__main__":
    main()
