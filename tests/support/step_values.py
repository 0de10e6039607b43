"""Metrics of a step, as observers receive them."""

from __future__ import annotations

STEP = {
    "reward/mean": 0.25,
    "reward/accuracy": 0.5,
    "rollout/tokens": 100.0,
    "policy/grad_norm": 1.5,
    "time/generate": 2.0,
    "time/update": 5.0,
    "time/step": 8.0,
    "memory/policy": 3.0,
}

PARTLY = {
    "rollout/responses": 96.0,
    "trained/responses": 32.0,
    "trained/reward_mean": 0.5,
    "trained/accuracy": 0.5,
}
