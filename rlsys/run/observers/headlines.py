"""The results of an evaluation that console, summary and report show, the most telling first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """A metric of an evaluation as it is shown."""

    label: str
    metric: str
    form: str  # of its value

    def text(self, values: Mapping[str, float]) -> str:
        """Return the value as text."""
        return self.form.format(values[self.metric])


HEADLINES = (
    Headline("held-out accuracy", "eval/accuracy", "{:.1%}"),
    Headline("held-out preference accuracy", "eval/preference_accuracy", "{:.1%}"),
    Headline("held-out ranking accuracy", "eval/ranking_accuracy", "{:.1%}"),
    Headline("held-out reward", "eval/reward", "{:.4f}"),
    Headline("held-out step accuracy", "eval/step_accuracy", "{:.1%}"),
    Headline("held-out reward margin", "eval/preference_margin", "{:.4f}"),
    Headline("held-out loss", "eval/loss", "{:.4f}"),
    Headline("held-out text loss", "eval/text_loss", "{:.4f}"),
)


def headline_of(values: Mapping[str, float]) -> Headline | None:
    """Return the most telling result of an evaluation; None where it has none of them."""
    return next((headline for headline in HEADLINES if headline.metric in values), None)


def further_results(values: Mapping[str, float], shown: Headline) -> list[str]:
    """Return the other results of an evaluation, as "held-out loss 0.1234"."""
    return [
        f"{other.label} {other.text(values)}"
        for other in HEADLINES
        if other.metric in values and other is not shown
    ]
