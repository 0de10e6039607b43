"""Which options may change when a run is resumed: one table, for the check, the messages and docs/configuration.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["refused", "same problems", "accepted", "silent"]

VERDICTS: dict[Verdict, str] = {
    "refused": "The run does not go on with another value.",
    "same problems": "May change as long as the training problems stay the same; a hash of them tells.",
    "accepted": "May change. The change is printed and takes effect from the next step.",
    "silent": "May change, and has no effect on the result.",
}


@dataclass(frozen=True, kw_only=True)
class ResumeRule:
    """What holds for a field, or for all fields of a section (a name that ends in a dot)."""

    field: str
    verdict: Verdict
    reason: str


def _rule(field: str, verdict: Verdict, reason: str) -> ResumeRule:
    return ResumeRule(field=field, verdict=verdict, reason=reason)


_SAME_ORDER = "It orders the data: some prompts would come again and others never."

# The first that fits holds.
RULES: tuple[ResumeRule, ...] = (
    _rule("recipe", "refused", "It names the run's origin; the run's own configuration is used."),
    _rule(
        "preset", "accepted", "It replaces the fields of algorithm, and policy.num_mini_batches."
    ),
    _rule("model.path", "refused", "The checkpoint holds the weights of that model."),
    _rule("model.", "accepted", ""),
    _rule("policy.backend", "refused", "The optimizer's state is laid out by it."),
    _rule("policy.ranks", "refused", "The optimizer's state is saved rank by rank."),
    _rule("reference.", "accepted", ""),
    _rule("policy.", "accepted", "The optimizer keeps its moments."),
    _rule("trainer.seed", "refused", _SAME_ORDER),
    _rule("trainer.", "accepted", "The position in the data is counted in prompts."),
    _rule("data.shuffle", "refused", _SAME_ORDER),
    _rule("data.train", "same problems", "The file may move; what it holds may not change."),
    _rule("data.template", "same problems", "Wording may change which prompts are too long."),
    _rule("data.chat", "same problems", "Wording may change which prompts are too long."),
    _rule("data.eval", "same problems", "What is held out of the file is not trained on."),
    _rule(
        "data.",
        "same problems",
        "It decides which problems there are, and the position in the data belongs to them.",
    ),
    _rule(
        "algorithm.advantage.auxiliary.width",
        "refused",
        "The checkpoint holds a network that wide.",
    ),
    _rule(
        "algorithm.",
        "accepted",
        "A new KL coefficient or entropy temperature replaces an adapted one; another estimator starts without what the old one kept.",
    ),
    _rule("generation.", "accepted", ""),
    _rule("reward.", "accepted", "Rewards before and after may not compare."),
    _rule("diagnostics.", "accepted", ""),
    _rule("plugins", "accepted", ""),
    _rule("cluster.", "silent", "Where it runs."),
    _rule("run.", "silent", "Where it is written and shown."),
)


def rule_of(name: str) -> ResumeRule:
    """The rule of a field, by its dotted name."""
    return next(rule for rule in RULES if _covers(rule.field, name))


def _covers(field: str, name: str) -> bool:
    return name.startswith(field) if field.endswith(".") else name == field


def resume_table() -> list[str]:
    """The table in Markdown."""
    lines = ["| field | on a resume | why |", "|---|---|---|"]
    lines += [
        f"| `{rule.field}{'*' if rule.field.endswith('.') else ''}` | {rule.verdict} | {rule.reason} |"
        for rule in RULES
    ]
    return lines
