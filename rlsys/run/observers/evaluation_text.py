"""The words and numbers in which the console and the page show the results of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rlsys.evaluation.intervals import Estimate
from rlsys.evaluation.measures import Difference
from rlsys.run.evaluation_summary import EvaluationResults, ModelResults

# Measures in tokens, nats or reward units; all others are fractions.
UNITS = ("length", "entropy", "reward")

MEANINGS = {
    "accuracy": "right responses; the mean over prompts, as all numbers here",
    "pass": "chance that at least one of k samples is right (unbiased estimate)",
    "majority": "accuracy of the most frequent answer of k samples",
    "format_rate": "responses with an answer where the reward function looks for one",
    "truncated": "responses that reached generation.max_tokens",
    "failed": "responses on which a reward function failed; they count as wrong",
    "length": "sampled tokens of a response",
    "entropy": "nats per token",
    "reward": "mean reward",
}
METHODS = (
    "The prompts are the independent units: every interval is over prompts, whatever the number of "
    "samples.",
    "Fractions: Wilson's score interval. With several samples per prompt its sample size is the "
    "effective one, P p (1 - p) / s² with the variance s² of the prompts' means.",
    "Length, entropy and reward: interval of Student's t over the prompts' means.",
    "Differences are second minus first model on the same prompts: for fractions Agresti and Min's "
    "adjusted Wald interval, for other means Student's t.",
    "p: exact two-sided sign test of the prompts on which the models differ (up: higher with the "
    "second model); with one sample per "
    "prompt, McNemar's test. It is not corrected for the number of rows.",
    "pass@k: Chen et al. 2021. majority@k: mean over all subsets of k samples; right answers are "
    "one group, wrong ones are grouped by the verifier's equality; ties count as their expected "
    "value, and samples without an answer do not vote.",
)


def meaning_of(name: str) -> str:
    """Return what a measure is, in a few words."""
    return MEANINGS.get(name.partition("@")[0].partition("/")[0], "")


def is_fraction(name: str) -> bool:
    """Return whether a measure is a fraction, to be shown in percent."""
    return not name.startswith(UNITS)


def number(name: str, value: float, *, signed: bool = False) -> str:
    """Return a value of a measure: 12.5 %, 31.4, 0.482."""
    sign = "+" if signed else ""
    if is_fraction(name):
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign}.1f}" if name == "length" else f"{value:{sign}.3f}"


def with_interval(name: str, estimate: Estimate, *, signed: bool = False) -> str:
    """Return an estimate with its interval: 12.5 % [8.1, 18.9]."""
    shown = number(name, estimate.value, signed=signed)
    if estimate.low is None or estimate.high is None:
        return shown
    ends = [number(name, end, signed=signed) for end in (estimate.low, estimate.high)]
    return f"{shown} [{', '.join(end.removesuffix(' %') for end in ends)}]"


def p_value(difference: Difference) -> str:
    """Return the p-value of the sign test, with the prompts behind it."""
    test = difference.test
    p = f"{test.p_value:.3f}" if test.p_value >= 0.001 else f"{test.p_value:.1e}"
    return f"{p} ({test.higher} up, {test.lower} down)"


def title_of(results: EvaluationResults) -> str:
    """Return what was evaluated, in a line."""
    models = results.models
    answered = " and ".join(dict.fromkeys(f"{m.prompts} of {m.prompts_total}" for m in models))
    samples = models[0].samples_per_prompt
    return (
        f"{results.origin}: {answered} prompts, {samples} "
        f"{'response' if samples == 1 else 'responses'} each, "
        f"{results.confidence:.0%} confidence intervals over prompts"
    )


def measure_names(models: Sequence[ModelResults]) -> list[str]:
    """Return the measures that any of the models has, in order."""
    return list(dict.fromkeys(name for model in models for name in model.estimates))


def difference_cells(name: str, differences: Mapping[str, Difference]) -> list[str]:
    difference = differences.get(name)
    if difference is None:
        return ["-", "-"]
    return [with_interval(name, difference.estimate, signed=True), p_value(difference)]


def broken_down(results: EvaluationResults) -> list[str]:
    """Return the measures that the tables by level and subject show: accuracy, widest pass@k."""
    names = measure_names(results.models)
    widest = [name for name in names if name.startswith("pass@")][-1:]
    votes = [name for name in names if name.startswith("majority@")][-1:]
    return ["accuracy", *widest, *votes]


def breakdown_rows(
    results: EvaluationResults, column: str, names: Sequence[str]
) -> Iterator[tuple[str, int, list[str]]]:
    """Yield value, number of prompts and the cells of a row: `names` of each model, difference."""
    values = dict.fromkeys(value for model in results.models for value in model.by.get(column, {}))
    for value in values:
        cells, prompts = [], 0
        for model in results.models:
            found = model.by.get(column, {}).get(value)
            prompts = max(prompts, found.prompts if found else 0)
            for name in names:
                estimate = found.estimates.get(name) if found else None
                cells.append(with_interval(name, estimate) if estimate else "-")
        if results.comparison is not None:
            differences = results.comparison.by.get(column, {}).get(value, {})
            cells += difference_cells("accuracy", differences)
        yield value, prompts, cells


def breakdown_heads(
    results: EvaluationResults, names: Sequence[str], models: Sequence[str]
) -> list[str]:
    """Return the heads of the cells of `breakdown_rows`; `models` are the names of the models."""
    several = len(results.models) > 1
    heads = [f"{name}, {model}" if several else name for model in models for name in names]
    return heads + (["difference of accuracy", "p"] if results.comparison is not None else [])


def overlap_line(results: EvaluationResults) -> str:
    """Return how many problems overlap with the training problems."""
    overlap = results.overlap
    assert overlap is not None
    found = overlap.overlapping
    identical = sum(problem.identical for problem in found)
    of_all = f"at least {overlap.fraction:.0%} of their" if overlap.fraction else "one of their"
    return (
        f"overlap with data.train: {len(found)} of {overlap.problems} problems share {of_all} "
        f"{overlap.ngram}-grams with the {overlap.train_problems} training problems, "
        f"{overlap.sharing} share one or more, {identical} are identical"
    )
