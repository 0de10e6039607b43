"""The gauges of a run, and the Grafana dashboard that shows them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.generate.metrics import METRICS, documented
from workers import ray_metrics
from workers.ray_metrics import (
    ACTIVE,
    LABELS,
    MAIN_METRICS,
    STEP,
    STEPS,
    RayMetrics,
    gauge_name,
    is_exported,
)

DASHBOARD = Path(__file__).resolve().parents[3] / "docker" / "grafana" / "rlsys.json"
PROMETHEUS_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class FakeGauge:
    """Gauge that keeps what was set, as Ray's exporter sees it."""

    values: dict[str, tuple[float, dict[str, str]]] = {}  # noqa: RUF012  (reset by the fixture)

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert name not in self.values, f"{name} was declared twice"
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values[self.name] = (value, tags)


@pytest.fixture
def _fake_gauges(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeGauge, "values", {})
    monkeypatch.setattr(ray_metrics, "Gauge", FakeGauge)


@pytest.mark.usefixtures("_fake_gauges")
def test_the_main_numbers_of_steps_and_evaluations_are_set_with_labels():
    observer = RayMetrics("my-run", "grpo_math")
    observer.on_start(3, 10)
    observer.on_step(3, {"reward/mean": 0.5, "time/step": 2.0, "reward/reason/no_answer": 7.0})
    observer.on_evaluation(3, {"eval/accuracy": 0.75, "eval/pass@8": 0.9})
    observer.on_step(4, {"reward/mean": 0.25})
    observer.on_end("finished", "")

    values = {name: value for name, (value, _) in FakeGauge.values.items()}
    assert values == {
        ACTIVE: 0.0,
        STEP: 4.0,
        STEPS: 10.0,
        "rlsys_reward_mean": 0.25,
        "rlsys_time_step": 2.0,
        "rlsys_eval_accuracy": 0.75,
    }
    labels = {"run": "my-run", "recipe": "grpo_math"}
    assert all(tags == labels for _, tags in FakeGauge.values.values())


def test_every_main_metric_is_documented_and_has_a_name_of_its_own():
    for metric in MAIN_METRICS:
        assert documented(metric) is not None, metric
    names = [gauge_name(metric) for metric in MAIN_METRICS]
    assert all(PROMETHEUS_NAME.fullmatch(name) for name in names)
    assert len(set(names)) == len(names)


def exported_names() -> set[str]:
    """Return the names under which Prometheus finds the gauges."""
    fixed = [doc.name for doc in METRICS if "<" not in doc.name and is_exported(doc.name)]
    return {f"ray_{name}" for name in (ACTIVE, STEP, STEPS, *map(gauge_name, fixed))}


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text())["panels"]


def test_every_query_of_the_dashboard_reads_a_gauge_that_exists():
    known = exported_names()
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert len(queries) > 10
    for query in queries:
        used = re.findall(r"\bray_rlsys_\w+", query)
        assert used, query
        assert set(used) <= known, query


def test_the_dashboard_selects_by_the_labels_that_the_gauges_have():
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", *LABELS}
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            labels = set(re.findall(r"(\w+)=~", target["expr"]))
            assert labels == set(LABELS), target["expr"]


def test_the_panels_of_the_dashboard_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
