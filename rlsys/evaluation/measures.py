"""What an evaluation reports of a model: one value per prompt and measure, estimates, differences.

    accuracy            fraction of the samples that are right
    pass@k, majority@k  estimators.py
    format_rate         fraction of the samples with an answer where the reward looks for one
    truncated           fraction of the samples that reached generation.max_tokens
    failed              fraction of the samples on which a reward function failed
    length              sampled tokens of a response
    entropy             nats per token: -sum of log-probs / sum of tokens, of a prompt's samples
    reward              weighted sum of the reward functions, where it is not the accuracy
    reward/NAME         unweighted value of one of them, where there are several

The estimate of a measure is the mean over prompts, so that each prompt counts the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.evaluation.answer_groups import group_answers
from rlsys.evaluation.estimators import majority_at_k, pass_at_k
from rlsys.evaluation.intervals import (
    Estimate,
    SignTest,
    fraction_difference,
    fraction_estimate,
    mean_estimate,
    sign_test,
)
from rlsys.evaluation.responses import ModelResponses

LEAST_MAJORITY = 3  # a vote of two is a coin toss where they differ


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number per prompt."""

    name: str
    values: NDArray[np.float64]  # [P] NaN where the prompt has none
    # Independent trials in [0, 1] behind each value; None: the values are no fractions.
    trials: int | None = None

    def estimate(self, confidence: float, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Return the mean over the prompts, or over the `chosen` ones, with its interval.

        Raises:
            ValueError: none of them has a value.
        """
        values = self.values if chosen is None else self.values[chosen]
        values = values[~np.isnan(values)]
        if not len(values):
            raise ValueError(f"{self.name} has no value for any of these prompts")
        if self.trials is None:
            return mean_estimate(values, confidence)
        return fraction_estimate(values, self.trials, confidence)


def measures_of(
    responses: ModelResponses,
    *,
    pass_at: Sequence[int],
    majority_at: Sequence[int],
    with_entropy: bool,
) -> list[Measure]:
    """Return all measures of a model's responses, in the order in which they are shown.

    Args:
        with_entropy: the tokens were drawn from the whole distribution, so that the mean of -log p
            estimates the entropy.
    """
    samples = responses.samples
    measures = [_fraction("accuracy", responses.correct, samples)]
    counts = responses.correct.sum(axis=1)
    for k in pass_at:
        if k == 1:
            continue  # it is the accuracy
        chances = np.array([pass_at_k(samples, int(count), k) for count in counts])
        measures.append(Measure(name=f"pass@{k}", values=chances, trials=samples // k))
    measures += _majorities(responses, majority_at)

    measures.append(_fraction("format_rate", responses.answered, samples))
    measures.append(_fraction("truncated", responses.truncated, samples))
    if responses.failed.any():
        measures.append(_fraction("failed", responses.failed, samples))
    measures.append(Measure(name="length", values=responses.lengths.mean(axis=1)))
    if with_entropy:
        entropy = -responses.log_probs.sum(axis=1) / responses.lengths.sum(axis=1)
        measures.append(Measure(name="entropy", values=entropy))
    return measures + list(_rewards(responses))


def _fraction(name: str, values: NDArray[np.bool_], samples: int) -> Measure:
    return Measure(name=name, values=values.mean(axis=1), trials=samples)


def _majorities(responses: ModelResponses, majority_at: Sequence[int]) -> Iterator[Measure]:
    """Yield the majority votes; none where the reward function extracts no answers to vote with.

    It extracts some where a response has an answer, or is said to have none.
    """
    extracts = not responses.answered.all() or any(map(any, responses.answers))
    if not majority_at or not extracts:
        return
    votes = np.zeros((len(majority_at), len(responses)))
    for prompt, answers in enumerate(responses.answers):
        correct = responses.correct[prompt].tolist()
        groups = group_answers(answers, correct)
        votes[:, prompt] = [majority_at_k(groups, correct, k) for k in majority_at]
    for k, values in zip(majority_at, votes, strict=True):
        yield Measure(name=f"majority@{k}", values=values, trials=responses.samples // k)


def _rewards(responses: ModelResponses) -> Iterator[Measure]:
    """Yield the rewards; a reward that was dropped does not count in its prompt's mean.

    A reward of 1 for right and 0 for wrong responses is the accuracy and is left out.
    """
    is_accuracy = np.array_equal(responses.rewards, responses.correct)
    if not is_accuracy and not np.isnan(responses.rewards).all():
        yield Measure(name="reward", values=_present_means(responses.rewards))
    if len(responses.components) > 1:
        for name, values in responses.components.items():
            if not np.isnan(values).all():
                yield Measure(name=f"reward/{name}", values=_present_means(values))


def _present_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    present = ~np.isnan(values)
    counts = present.sum(axis=1)
    sums = np.where(present, values, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Second model minus first model, over the prompts that both answered."""

    name: str
    prompts: int
    estimate: Estimate
    test: SignTest


def difference_of(
    first: Measure,
    second: Measure,
    confidence: float,
    chosen: NDArray[np.bool_] | None = None,
) -> Difference | None:
    """Compare two models on the same prompts; None where no prompt has a value of both.

    Args:
        first, second: measures of the same name, whose values are of the same prompts.
        chosen: [P] the prompts to compare on; None: all.
    """
    both = ~np.isnan(first.values) & ~np.isnan(second.values)
    if chosen is not None:
        both &= chosen
    if not both.any():
        return None
    a, b = first.values[both], second.values[both]
    if first.trials is None:
        estimate = mean_estimate(b - a, confidence)
    else:
        estimate = fraction_difference(a, b, confidence)
    return Difference(
        name=first.name, prompts=int(both.sum()), estimate=estimate, test=sign_test(b - a)
    )


DEFAULT_COLUMNS = ("level", "subject", "type")


def columns_to_break_down(
    metadata: Sequence[Mapping[str, Any]], by: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the columns by which results are given: `by`, or the usual ones that the data have.

    Raises:
        ValueError: the data have no such column.
    """
    names = {name: None for row in metadata for name in row}
    if by is None:
        return tuple(name for name in DEFAULT_COLUMNS if name in names)
    for name in by:
        if name not in names:
            known = ", ".join(names) or "none besides problem, answer and id"
            raise ValueError(
                f"evaluation.by: the data have no column {name!r}. Their columns are {known}."
            )
    return tuple(by)


MOST_VALUES = 50  # of a column; more are no categories


def prompts_by_value(
    metadata: Sequence[Mapping[str, Any]], column: str
) -> dict[str, NDArray[np.bool_]]:
    """Return [P] the prompts of each value of a column, numbers first and in their order.

    Prompts without a value are under "(none)".

    Raises:
        ValueError: the column has more than 50 values.
    """
    values = [row.get(column) for row in metadata]
    keys = ["(none)" if value is None else str(value) for value in values]
    distinct = sorted(set(keys), key=_in_order)
    if len(distinct) > MOST_VALUES:
        raise ValueError(
            f"evaluation.by: column {column!r} has {len(distinct)} different values, so they are "
            f"no categories; at most {MOST_VALUES} are shown. Leave it out."
        )
    array = np.array(keys, dtype=np.str_)
    return {value: array == value for value in distinct}


def _in_order(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)
