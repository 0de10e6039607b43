"""The known biases: which combinations have them, why, and where the documents say so.

A reason counts only while its sentence is in its file: where the text is missing, the cases become
findings. A reason is part of what a method is, or of what it states that it neglects. An error that
no method states (a KL in the reward with another gradient, a ratio taken twice) is not a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.campaigns.enumeration_cases import Case

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/gradients.md"
KL = "rlsys/algorithms/kl.py"
HIERARCHICAL = "rlsys/algorithms/advantages/hierarchical/estimator.py"
BOUNDED = (
    *("ppo_clip", "dual_clip", "upper_clip", "power", "adaptive_power", "sapo", "sapo_sequence"),
    *("cispo", "minimum", "gmpo", "dppo_tv", "dppo_kl", "vespo", "clip_cov"),
)


@dataclass(frozen=True)
class Bias:
    """A reason for a bias: the cases that have it, and a sentence that must be in a file."""

    name: str
    applies: Callable[[Case], bool]
    file: str
    sentence: str

    def is_documented(self) -> bool:
        """Return whether the sentence is in the file, whatever the line breaks."""
        return " ".join(self.sentence.split()) in _words(self.file)


@cache
def _words(file: str) -> str:
    path = ROOT / file
    return " ".join(path.read_text().split()) if path.exists() else ""


def _has(case: Case, name: str, value: object = True) -> bool:
    return dict(case.parameters).get(name) == value


def _divides_by_std(case: Case) -> bool:
    return case.estimator == "grpo_process" or (
        case.estimator == "grpo" and not _has(case, "divide_by_std", False)
    )


def _whitens(case: Case) -> bool:
    return case.estimator == "reinforce_plus_plus" or _has(case, "whiten")


def _weighted_baseline(case: Case) -> bool:
    """Return whether a weighted baseline has seen the response itself, as published."""
    weighted = case.estimator in ("opo", "optimal_baseline", "optimal_token_baseline")
    return weighted and not _has(case, "leave_one_out")


def _discounts(case: Case) -> bool:
    return case.estimator == "gae" and ("gamma", 0.9) in case.parameters


def _partial_length(case: Case) -> bool:
    return case.aggregation in ("token_mean", "sequence_mean") and case.lengths == "mixed"


def _corrects_itself(case: Case) -> bool:
    """Return whether the advantages hold the whole ratio to the live policy."""
    return case.estimator == "hierarchical" and case.recompute


def _full_power(case: Case) -> bool:
    return case.weight == "power" and ("q", 1.0) in case.weight_parameters


def _ratio_of_a_part(case: Case) -> bool:
    weighs = case.weight != "none" and not _corrects_itself(case)
    return case.moved and weighs and case.ratio != "product" and case.weight != "reward_time"


def _bounded_weight(case: Case) -> bool:
    bounded = case.weight in BOUNDED and not _full_power(case)
    return case.moved and bounded and not _corrects_itself(case)


def _no_weight(case: Case) -> bool:
    return case.moved and case.weight == "none" and not _corrects_itself(case)


def _stale_fit(case: Case) -> bool:
    return case.estimator == "hierarchical" and case.moved and not case.recompute


def _uncorrected_engine(case: Case) -> bool:
    return case.mismatch and case.correction == "none" and case.estimator != "hierarchical"


def _partial_correction(case: Case) -> bool:
    bounds = dict(case.correction_parameters)
    whole = case.correction == "sequence" and bounds.get("cap", 2.0) > 1e3
    partial = case.correction != "none" and not whole
    return case.mismatch and partial and case.estimator != "hierarchical"


def _loss_kl(case: Case, *kinds: str, direction: str = "reverse") -> bool:
    """Return whether the loss has a KL of one of these kinds that is not exact."""
    named = case.kl_kind in kinds and case.kl_direction == direction
    return case.kl_placement == "loss" and named and not _is_exact_kl(case)


def _is_exact_kl(case: Case) -> bool:
    if case.kl_kind == "exact":
        return case.max_tokens == 1
    if case.kl_kind in ("k2", "k3_k2"):
        whole = case.kl_level == "sequence" or case.max_tokens == 1
        return whole and (not case.moved or case.kl_ratio != "none")
    if case.kl_level == "sequence" or case.max_tokens == 1:
        return case.kl_ratio != "none"
    return case.kl_ratio == "prefix" and case.kl_direction == "reverse"


def _uncorrected_terms(case: Case) -> bool:
    exact = case.kl_placement == "reward" and case.kl_kind == "exact"
    beside = case.kl_placement == "loss" or exact or case.entropy == "bonus" or case.kl_old > 0
    corrected = case.correction != "none" or case.estimator == "hierarchical"
    return case.mismatch and corrected and beside


def _stale_costs(case: Case) -> bool:
    costs = case.kl_placement in ("reward", "advantage") or case.entropy == "temperature"
    allowed = case.kl_kind in ("k1", "exact") and case.kl_direction == "reverse"
    return case.moved and costs and (allowed or case.kl_placement in ("none", "advantage"))


BIASES: tuple[Bias, ...] = (
    Bias(
        "division by the group's deviation",
        _divides_by_std,
        PAGE,
        "Dividing by the standard deviation of a group that contains the response",
    ),
    Bias(
        "whitening over the batch",
        _whitens,
        PAGE,
        "Whitening over the batch has the same effect",
    ),
    Bias(
        "weighted baseline that contains the response",
        _weighted_baseline,
        PAGE,
        "A weighted baseline that contains the response itself",
    ),
    Bias(
        "discount or lambda below 1",
        _discounts,
        PAGE,
        "A discount or a lambda below 1",
    ),
    Bias(
        "token_kl_grpo: deviation of the position",
        lambda case: case.estimator == "token_kl_grpo",
        PAGE,
        "`token_kl_grpo` divides by the deviation of the responses with a token at the position",
    ),
    Bias(
        "clipped log-ratios",
        lambda case: "log_ratio_clip" in dict(case.parameters),
        HIERARCHICAL,
        "biased towards the sampler's policy",
    ),
    Bias(
        "horizons laid over the longest response",
        lambda case: _has(case, "horizons", "all") and "max_tokens" not in dict(case.parameters),
        HIERARCHICAL,
        "Exactly unbiased only with a number.",
    ),
    Bias(
        "gpg: alpha of the batch",
        lambda case: case.estimator == "gpg" and case.prompts > 1,
        "rlsys/algorithms/advantages/gpg.py",
        "alpha depends on the rewards that it multiplies",
    ),
    Bias(
        "grpo_passk: the best of k",
        lambda case: case.estimator == "grpo_passk",
        PAGE,
        "`grpo_passk` ascends the expected best of k rewards",
    ),
    Bias(
        "maxrl: the log of the success probability",
        lambda case: case.estimator == "maxrl",
        PAGE,
        "`maxrl` ascends the log of the success probability",
    ),
    Bias(
        "bnpo: density of the group's mean",
        lambda case: case.estimator == "bnpo",
        PAGE,
        "`bnpo` divides by a density of the group's mean",
    ),
    Bias(
        "gdpo: deviations of each function",
        lambda case: case.estimator == "gdpo",
        PAGE,
        "`gdpo` divides the reward of each function by its deviation",
    ),
    Bias(
        "divisor that depends on the lengths",
        _partial_length,
        PAGE,
        "divide by lengths that the responses themselves decide",
    ),
    Bias(
        "ratio of a part of the response",
        _ratio_of_a_part,
        PAGE,
        "Every ratio but `product` covers a part of the response",
    ),
    Bias(
        "bounded weight",
        _bounded_weight,
        PAGE,
        "Every weight but `importance`, `kl_cov`, `dro` and `power` with q = 1 is bounded",
    ),
    Bias(
        "clip_cov: tokens without a gradient",
        lambda case: case.weight == "clip_cov",
        PAGE,
        "`clip_cov` takes the gradient of some tokens away",
    ),
    Bias(
        "kl_cov: penalty on the drift of some tokens",
        lambda case: case.moved and case.weight == "kl_cov",
        PAGE,
        "`kl_cov` adds a penalty on the drift of some tokens",
    ),
    Bias(
        "dro: a pull to the old policy",
        lambda case: case.moved and case.weight == "dro",
        PAGE,
        "`dro` has a pull to the old policy instead of a ratio",
    ),
    Bias(
        "no weight after the policy has moved",
        _no_weight,
        PAGE,
        "weight `none` in later updates of a batch does not correct at all",
    ),
    Bias(
        "hierarchical fit of an older policy",
        _stale_fit,
        PAGE,
        "the hierarchical weights are those of the first update",
    ),
    Bias(
        "engine's policy taken for the trainer's",
        _uncorrected_engine,
        PAGE,
        "the engine's policy counts as the trainer's",
    ),
    Bias(
        "truncated or tokenwise correction",
        _partial_correction,
        PAGE,
        "A correction of level `token`, a cap that binds and a mask",
    ),
    Bias(
        "truncated responses masked",
        lambda case: case.mask_truncated and case.lengths == "mixed",
        PAGE,
        "`algorithm.overlong.mask_truncated` leaves out the responses that reach the limit",
    ),
    Bias(
        "entropy bonus in the loss",
        lambda case: case.entropy == "bonus",
        "rlsys/algorithms/entropy.py",
        "unlike an entropy bonus in the loss, it also gives credit to the tokens that lead to "
        "uncertain continuations",
    ),
    Bias(
        "k2 in the loss",
        lambda case: _loss_kl(case, "k2", "k3_k2"),
        KL,
        "A token gets no credit for the KL of later tokens.",
    ),
    Bias(
        "exact KL in the loss alone",
        lambda case: _loss_kl(case, "exact"),
        KL,
        "As a loss it has the gradient of each position's KL given its prefix.",
    ),
    Bias(
        "k3 in the loss without a ratio",
        lambda case: _loss_kl(case, "k3") and case.kl_ratio == "none",
        KL,
        "Without w that of the **forward** KL of each position",
    ),
    Bias(
        "k1 and k3 in the loss with the ratio of a token",
        lambda case: _loss_kl(case, "k1", "k3") and case.kl_ratio != "none",
        KL,
        "`prefix` is right over whole responses",
    ),
    Bias(
        "forward KL of each position",
        lambda case: _loss_kl(case, "k1", "k3", direction="forward"),
        KL,
        "With w that of the forward KL of each position",
    ),
    Bias(
        "KL and entropy in the loss on the engine's samples",
        _uncorrected_terms,
        PAGE,
        "A correction weighs the objective and not the terms beside it",
    ),
    Bias(
        "ratio beyond its cap",
        lambda case: case.staleness == "far" and case.weight != "none",
        "rlsys/algorithms/bounded_ratio.py",
        "with x capped to [-20, 20]",
    ),
    Bias(
        "groups sampled again",
        lambda case: case.resamples,
        PAGE,
        "Dynamic sampling leaves out the groups that are all right or all wrong",
    ),
    Bias(
        "costs of the policy before it moved",
        _stale_costs,
        PAGE,
        "Costs in the reward are those of the policy at the start of the step",
    ),
)


def documented(case: Case) -> tuple[Bias, ...]:
    """Return the reasons that hold for a case and that a document states."""
    return tuple(bias for bias in BIASES if bias.applies(case) and bias.is_documented())


def undocumented() -> list[str]:
    """Return the reasons whose sentence is missing: their cases are findings."""
    return [
        f"no document says {bias.sentence!r} in {bias.file} ({bias.name})"
        for bias in BIASES
        if not bias.is_documented()
    ]
