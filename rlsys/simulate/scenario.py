"""What is simulated: a cluster, a workload and a schedule."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.config.trainer import OnStale
from rlsys.simulate.engine import EngineSpeed
from rlsys.simulate.length_laws import LengthLaw


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Deaths of generation workers."""

    mean_s: float  # between two deaths of one worker
    restart_s: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a step computes, and how long its parts take."""

    prompts_per_step: int
    samples_per_prompt: int
    lengths: LengthLaw
    reward_s: float  # of one response; all are scored at the same time
    train_token_s: float  # of the whole training group, for each response token
    train_fixed_s: float  # of an update, whatever the tokens
    sync_s: float  # of the transfer of the weights


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run."""

    workload: Workload
    engines: int
    engine: EngineSpeed
    max_staleness: int  # 0: sampling and training take turns
    steps: int  # that count
    groups_per_call: int = 1
    on_stale: OnStale = "drop"
    failures: Failures | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the GPUs of a cluster are used."""

    gpus: int
    generation_gpus: int  # equal to `gpus` where all of them sample and train in turn
    training_gpus: int
    gpus_per_engine: int

    @property
    def colocated(self) -> bool:
        """Whether the same GPUs sample and train."""
        return self.generation_gpus + self.training_gpus > self.gpus

    @property
    def engines(self) -> int:
        """The number of engines."""
        return self.generation_gpus // self.gpus_per_engine


def layouts(gpus: int, gpus_per_engine: int) -> list[Layout]:
    """Return the ways to use a cluster: all GPUs for both, and splits by eighths.

    Raises:
        ValueError: there are fewer GPUs than an engine and a trainer need.
    """
    if gpus < 2 * gpus_per_engine:
        raise ValueError(
            f"gpus: {gpus} are fewer than two engines of {gpus_per_engine} GPUs need, and a split "
            "needs room for an engine and the trainer"
        )
    found = [
        Layout(gpus=gpus, generation_gpus=gpus, training_gpus=gpus, gpus_per_engine=gpus_per_engine)
    ]
    for eighths in range(1, 8):
        engines = max(1, round(gpus * eighths / 8 / gpus_per_engine))
        generation = engines * gpus_per_engine
        if generation >= gpus or generation in [one.generation_gpus for one in found]:
            continue
        found.append(
            Layout(
                gpus=gpus,
                generation_gpus=generation,
                training_gpus=gpus - generation,
                gpus_per_engine=gpus_per_engine,
            )
        )
    return found
