"""Remarks on a step, made from its metrics, for the console, metrics.jsonl and the report.

Each rule is a function of the step's metrics. To add a remark, report a metric and add a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlsys.run.reward_failures import failed_functions

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Note:
    """A remark on a step; its `kind` identifies the rule, so that remarks can be counted."""

    kind: str
    text: str
    warning: bool = True


def step_notes(values: Numbers) -> list[Note]:
    """Return all remarks on a step with these metrics, warnings first."""
    notes = [rule(values) for rule in RULES]
    found = [note for note in notes if note is not None]
    return sorted(found, key=lambda note: not note.warning)


def _number(values: Numbers, name: str) -> float:
    """Return a metric, or 0 where it is absent or not finite."""
    value = values.get(name, 0.0)
    return value if math.isfinite(value) else 0.0


def _all_truncated(values: Numbers) -> Note | None:
    if values.get("rollout/truncated_fraction") != 1:
        return None
    text = "every response was truncated at generation.max_tokens"
    if values.get("trained/responses") == 0:
        text += f" and masked out of the loss: {_nothing_but(values)} was trained"
    return Note("all truncated", text)


def _nothing_trained(values: Numbers) -> Note | None:
    if values.get("trained/responses") != 0 or values.get("rollout/truncated_fraction") == 1:
        return None
    return Note(
        "nothing trained", f"no response entered the loss: {_nothing_but(values)} was trained"
    )


def _nothing_but(values: Numbers) -> str:
    return "only the pretraining text" if "policy/ptx_loss" in values else "nothing"


def _nothing_learned(values: Numbers) -> Note | None:
    if values.get("trained/responses") == 0 or values.get("advantage/mean_abs") != 0:
        return None
    reason = "every group has equal rewards, so " if _all_equal(values) else ""
    return Note(
        "advantages 0", f"{reason}all advantages are 0: nothing was learned from the rewards"
    )


def _all_equal(values: Numbers) -> bool:
    return values.get("trained/frac_reward_zero_std") == 1


def _missing_groups(values: Numbers) -> Note | None:
    missing = _number(values, "sampling/missing_groups")
    if not missing:
        return None
    rounds = _number(values, "sampling/rounds")
    return Note(
        "groups missing",
        "groups without a learning signal that fill the batch, "
        f"after {rounds:.0f} rounds of sampling: {missing:.0f}",
    )


def _skipped_updates(values: Numbers) -> Note | None:
    skipped = _number(values, "policy/skipped_updates")
    if not skipped or values.get("trained/responses") == 0:
        return None

    broken = _number(values, "policy/nonfinite_gradients")
    reasons = []
    if broken:
        reasons.append(f"{broken:.0f} with a gradient that is not finite")
    if skipped > broken:
        reasons.append(f"{skipped - broken:.0f} without a trained response")
    tried = skipped + _number(values, "policy/updates")
    return Note(
        "updates skipped",
        f"{skipped:.0f} of {tried:.0f} updates skipped: {', '.join(reasons)}",
    )


def _failed_rewards(values: Numbers) -> Note | None:
    counts = {name: _number(values, f"reward/{name}") for name in ("errors", "timeouts", "crashes")}
    if not any(counts.values()):
        return None
    parts = ", ".join(f"{name} {number:.0f}" for name, number in counts.items() if number)
    functions = failed_functions(values)
    named = f"{functions} ({parts})" if functions else parts
    return Note("rewards failed", f"reward functions failed on responses of this step: {named}")


def _is_broken(name: str, value: float) -> bool:
    """Return whether a value should be finite and is not.

    A diagnostic may be infinite, such as the condition number of equal horizons.
    """
    return math.isnan(value) or (math.isinf(value) and not name.startswith("advantage/"))


def _not_finite(values: Numbers) -> Note | None:
    names = sorted(name for name, value in values.items() if _is_broken(name, value))
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Note("not finite", f"not finite: {', '.join(names[:3])}{more}")


def _trained_fraction(values: Numbers) -> Note | None:
    trained, sampled = values.get("trained/responses"), values.get("rollout/responses")
    if not trained or trained == sampled:
        return None
    text = (
        f"trained on {trained:.0f} of {sampled:.0f} responses: "
        f"reward {_number(values, 'trained/reward_mean'):.3f}"
    )
    if "trained/accuracy" in values:  # absent where the first reward is a model
        text += f", correct {_number(values, 'trained/accuracy'):.1%}"
    return Note("trained on a part", text, warning=False)


RULES: tuple[Callable[[Numbers], Note | None], ...] = (
    _all_truncated,
    _nothing_trained,
    _nothing_learned,
    _missing_groups,
    _skipped_updates,
    _failed_rewards,
    _not_finite,
    _trained_fraction,
)
