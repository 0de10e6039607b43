"""docs/metrics.md documents every metric that a run writes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from docs.generate.metrics import METRICS, documented
from rlsys.algorithms.advantages import (
    AdvantageInputs,
    available_advantage_estimators,
    get_advantage_estimator,
)
from rlsys.driver.batch_metrics import batch_metrics
from tests.support.rollout_examples import random_rollouts, train_batch
from workers.training.optimizer_steps import UpdateCounts
from workers.training.policy_loss import PackLoss
from workers.training.update_metrics import loss_metrics

ROOT = Path(__file__).resolve().parents[3]
NAMESPACES = sorted({doc.name.split("/")[0] for doc in METRICS})
NAME = re.compile(rf"({'|'.join(NAMESPACES)})/[\w@<>/]+")


def names_in(path: Path) -> Iterator[str]:
    """Yield the strings of a source file that look like metrics.

    A replacement field of a format string becomes <x>.
    """
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            inside |= set(node.values)
            parts = [p.value if isinstance(p, ast.Constant) else "<x>" for p in node.values]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            text = node.value
        else:
            continue
        if NAME.fullmatch(text) and not text.endswith(("/", "_", "@")):
            yield text


def sources() -> list[Path]:
    own = [path for root in ("rlsys", "workers", "recipes") for path in (ROOT / root).rglob("*.py")]
    return [path for path in own if path.name != "renamed_metrics.py"]


def fits(name: str) -> bool:
    """Return whether a documented metric can have this name."""
    if "<x>" not in name:
        # The rank group consumes policy/ratio_square, so that no run writes it.
        return name == "policy/ratio_square" or documented(name) is not None
    pattern = re.compile(re.escape(name).replace("<x>", ".+"))
    return any(pattern.fullmatch(doc.name) for doc in METRICS)


def test_every_metric_that_the_source_names_is_documented():
    found = {(name, path.relative_to(ROOT)) for path in sources() for name in names_in(path)}
    assert len(found) > 80
    assert [item for item in sorted(found) if not fits(item[0])] == []


def test_no_name_is_documented_twice():
    assert len({doc.name for doc in METRICS}) == len(METRICS)


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_diagnostics_of_estimators_are_documented(name: str):
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(6, 4)
    inputs = AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0]),
        response_mask=zeros == 0,
        group_ids=torch.tensor([0, 0, 0, 1, 1, 1]),
        rollout_logprobs=zeros - 1,
        old_logprobs=zeros - 1 + 0.1 * torch.randn(6, 4, generator=generator),
        ref_logprobs=zeros - 1,
        squared_score_norms=zeros + 1,
        greedy_rewards=zeros[:, 0],
        reward_components=torch.tensor([[0.0], [1.0], [1.0], [0.0], [0.0], [1.0]]),
        problem_ids=["a"] * 3 + ["b"] * 3,
    )
    for diagnostic in get_advantage_estimator(name)(inputs).diagnostics:
        row = documented(f"advantage/{diagnostic}")
        assert row is not None, diagnostic
        assert row.reduction == "mean"


def test_metrics_add_up_as_documented():
    loss = PackLoss(
        loss=torch.zeros(()),
        sums=dict.fromkeys(
            ("entropy", "ratio", "ratio_square", "clipped", "difference", "kl_ref_k1"), 1.0
        ),
        maxima={"ratio": 1.0, "difference": 1.0},
    )
    reports = [
        batch_metrics(train_batch(random_rollouts(0))),
        loss_metrics([loss], 3, 1, drifted=False),
        loss_metrics([loss], 3, 1, drifted=True),
        UpdateCounts().metrics("policy"),
    ]
    for name, metric in ((n, m) for report in reports for n, m in report.items()):
        if name != "policy/ratio_square":
            row = documented(name)
            assert row is not None, name
            assert metric.reduction == row.reduction, name
