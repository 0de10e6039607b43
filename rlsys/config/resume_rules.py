"""Rules about the options that may change when a run is resumed.

The check, its messages and docs/configuration.md are made from one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["refused", "same problems", "accepted", "silent"]

VERDICTS: dict[Verdict, str] = {
    "refused": "The run cannot continue with another value.",
    "same problems": (
        "May change if the training problems stay the same, which is checked by a hash of them."
    ),
    "accepted": "May change. The change is printed and takes effect from the next step.",
    "silent": "May change without an effect on the results.",
}


@dataclass(frozen=True, kw_only=True)
class ResumeRule:
    """The rule for a field, or for all fields of a section (a name that ends in a dot)."""

    field: str
    verdict: Verdict
    reason: str


def _rule(field: str, verdict: Verdict, reason: str) -> ResumeRule:
    return ResumeRule(field=field, verdict=verdict, reason=reason)


_SAME_ORDER = "It decides the order of the data: some prompts would repeat, others never come."
_PARTS = "Each rank reads its part of the checkpoint. With the backend deepspeed it is refused."
_MOMENTS = "The optimizer state is that of the trained parameters."

# The first rule that matches a field applies.
RULES: tuple[ResumeRule, ...] = (
    _rule(
        "recipe", "refused", "The run was started by that recipe; its own configuration is used."
    ),
    _rule(
        "preset",
        "accepted",
        "It replaces the section algorithm, policy.num_mini_batches and critic.enabled.",
    ),
    _rule("model.path", "refused", "The checkpoint holds the weights of that model."),
    _rule("model.lora.", "refused", "The checkpoint holds adapters of that form, or none."),
    _rule("model.", "accepted", ""),
    _rule("policy.frozen", "refused", _MOMENTS),
    _rule("critic.frozen", "refused", _MOMENTS),
    _rule("reward_model.frozen", "refused", _MOMENTS),
    _rule("policy.backend", "refused", "The format of the optimizer state depends on it."),
    _rule(
        "policy.deepspeed.zero_stage", "refused", "The optimizer state is saved as it is sharded."
    ),
    _rule("policy.ranks", "accepted", _PARTS),
    _rule("critic.enabled", "refused", "The checkpoint has a critic, or has none."),
    _rule("critic.path", "refused", "The checkpoint holds the weights of that critic."),
    _rule("critic.ranks", "accepted", _PARTS),
    _rule("critic.", "accepted", "The optimizer keeps its moments."),
    _rule("reward_model.backend", "refused", "The format of the optimizer state depends on it."),
    _rule(
        "reward_model.deepspeed.zero_stage",
        "refused",
        "The optimizer state is saved as it is sharded.",
    ),
    _rule("reward_model.ranks", "accepted", _PARTS),
    _rule("reward_model.", "accepted", "The optimizer keeps its moments."),
    _rule("reference.", "accepted", ""),
    _rule("policy.", "accepted", "The optimizer keeps its moments."),
    _rule(
        "ptx.coefficient",
        "accepted",
        "From 0 it cannot be raised: the checkpoint holds no position in the texts.",
    ),
    _rule("ptx.examples_per_step", "accepted", "The position is counted in texts."),
    _rule("ptx.", "same problems", "The position in the texts is valid for the same texts only."),
    _rule("objective.", "accepted", ""),
    _rule("expert.", "accepted", "The next step chooses and learns by the new values."),
    _rule("trainer.seed", "refused", _SAME_ORDER),
    _rule(
        "trainer.checkpoints.asynchronous",
        "silent",
        "It decides when the files of a checkpoint are written, not what is in them.",
    ),
    _rule("trainer.", "accepted", "The position in the data is counted in prompts."),
    _rule("data.shuffle", "refused", _SAME_ORDER),
    _rule("data.train", "same problems", "The file may be moved, but its content may not change."),
    _rule("data.template", "same problems", "It may change which prompts are too long."),
    _rule("data.chat", "same problems", "It may change which prompts are too long."),
    _rule("data.eval", "same problems", "Problems that are held out are not trained on."),
    _rule(
        "data.",
        "same problems",
        "The position in the data is valid for the same problems only.",
    ),
    _rule(
        "algorithm.advantage.auxiliary.width",
        "refused",
        "The checkpoint has a network of that width.",
    ),
    _rule(
        "algorithm.",
        "accepted",
        "A new KL coefficient or entropy temperature replaces an adapted one; another estimator "
        "starts without the state of the old one.",
    ),
    _rule("generation.", "accepted", ""),
    _rule("sync.", "silent", "It decides how weights travel."),
    _rule(
        "reward.functions",
        "accepted",
        "Rewards before and after may not be comparable. A reward model must have the same files, "
        "which is checked by a hash; they may be moved.",
    ),
    _rule("reward.", "accepted", "Rewards before and after may not be comparable."),
    _rule("diagnostics.", "accepted", ""),
    _rule("plugins", "accepted", ""),
    _rule("cluster.", "silent", "It decides where the run computes."),
    _rule("run.", "silent", "It decides where the run is written and shown."),
)


def rule_of(name: str) -> ResumeRule:
    """Return the rule for a field, by its dotted name."""
    return next(rule for rule in RULES if _covers(rule.field, name))


def _covers(field: str, name: str) -> bool:
    return name.startswith(field) if field.endswith(".") else name == field


def resume_table() -> list[str]:
    """Return the rules as a table in Markdown."""
    lines = ["| field | on a resume | why |", "|---|---|---|"]
    for rule in RULES:
        star = "*" if rule.field.endswith(".") else ""
        lines.append(f"| `{rule.field}{star}` | {rule.verdict} | {rule.reason} |")
    return lines
