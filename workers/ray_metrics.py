"""The main numbers of a run as gauges of Ray, which Prometheus collects from every node.

`reward/mean` becomes `rlsys_reward_mean`, which Ray exports as `ray_rlsys_reward_mean`, with the
labels `run` (name of the run's directory) and `recipe`. docker/grafana/rlsys.json shows them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import ray.util.client
from ray.util.metrics import Gauge

from rlsys.run.observers.observer import Observer, Outcome

MAIN_METRICS = (
    *("reward/mean", "reward/std", "reward/accuracy", "reward/format_rate"),
    *("reward/errors", "reward/timeouts", "reward/crashes"),
    *("rollout/responses", "rollout/tokens", "rollout/response_length"),
    *("rollout/truncated_fraction", "rollout/frac_reward_zero_std", "rollout/entropy"),
    *("policy/loss", "policy/entropy", "policy/clip_fraction", "policy/ratio_max"),
    *("policy/kl_ref_k1", "policy/kl_ref_k3", "policy/grad_norm", "policy/learning_rate"),
    *("policy/nonfinite_gradients", "policy/skipped_updates"),
    *("policy/logprob_difference_mean", "sync/logprob_difference_mean", "sync/bytes"),
    *("critic/loss", "critic/explained_variance"),
    *("reward_model/loss", "reward_model/ranking_accuracy"),
    *("eval/accuracy", "eval/reward", "eval/loss", "eval/text_loss", "eval/response_length"),
    *("eval/preference_accuracy", "eval/ranking_accuracy", "eval/step_accuracy"),
)
# Groups of which every metric is exported: seconds of phases, tokens per second, GiB, and faults.
MAIN_GROUPS = ("time/", "throughput/", "memory/", "faults/")

# Gauges of the run itself.
ACTIVE, STEP, STEPS = "rlsys_run_active", "rlsys_run_step", "rlsys_run_steps"
LABELS = ("run", "recipe")
REPEAT_S = 1.0  # Ray's shortest interval

logger = logging.getLogger(__name__)


def is_exported(metric: str) -> bool:
    """Return whether a metric is one of the main numbers."""
    return metric in MAIN_METRICS or metric.startswith(MAIN_GROUPS)


def gauge_name(metric: str) -> str:
    """Return the name of a metric's gauge; Ray puts `ray_` before it."""
    return "rlsys_" + metric.replace("/", "_")


class RayMetrics(Observer):
    """Observer that sets the gauges.

    They are exported by the node of the driver until the run ends. Ray forgets a gauge that was
    not set for two of its intervals, and a step takes longer: a thread sets them again. A process
    that joined through ray:// is not part of the cluster and exports nothing, which the log says.
    """

    def __init__(self, run: str, recipe: str) -> None:
        self._labels = {"run": run, "recipe": recipe}
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._repeating = threading.Thread(target=self._repeat, daemon=True, name="ray-metrics")

    def _set(self, name: str, description: str, value: float) -> None:
        with self._lock:
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=description, tag_keys=LABELS)
            self._values[name] = float(value)
            self._gauges[name].set(self._values[name], tags=self._labels)

    def _repeat(self) -> None:
        while not self._ended.wait(REPEAT_S):
            with self._lock:
                for name, value in self._values.items():
                    self._gauges[name].set(value, tags=self._labels)

    def on_start(self, first_step: int, total_steps: int) -> None:
        if ray.util.client.ray.is_connected():
            logger.warning("the run's numbers are not in Ray's metrics: it joined through ray://")
        self._set(ACTIVE, "1 while the run's loop runs.", 1.0)
        self._set(STEP, "Completed training steps.", first_step - 1)
        self._set(STEPS, "Training steps of the whole run.", total_steps)
        self._repeating.start()

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._set(STEP, "Completed training steps.", step)
        self._export(values)

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._export(values)

    def _export(self, values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            if is_exported(metric):
                self._set(gauge_name(metric), f"{metric} of the newest step.", value)

    def on_end(self, outcome: Outcome, message: str) -> None:
        self._ended.set()
        if self._repeating.ident is not None:  # a run may end before it starts
            self._repeating.join()  # before Ray ends
        self._set(ACTIVE, "1 while the run's loop runs.", 0.0)
