"""GRPO on the best of k responses (pass@k)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, broadcast_to_tokens, outcome_rewards
from rlsys.algorithms.advantages.returns import check_eps

if TYPE_CHECKING:
    from rlsys.config import RunConfig

FIELD = "algorithm.advantage.parameters"
BASELINES = ("subsets", "leave_one_out")


def _validate(*, k: int, baseline: str, eps: float, **_: object) -> None:
    if k < 1:
        raise ValueError(f"{FIELD}.k: {k} must be at least 1. Give the k of pass@k, such as 4.")
    if baseline not in BASELINES:
        raise ValueError(
            f"{FIELD}.baseline: unknown {baseline!r}. Choose from {', '.join(BASELINES)}."
        )
    if baseline == "leave_one_out" and k == 1:
        raise ValueError(
            f"{FIELD}.k: 1 with baseline leave_one_out leaves no response to compare with. Set k "
            "to 2 or more, or the estimator reinforce, which is the same."
        )
    check_eps(eps)


def _check(config: RunConfig) -> Iterator[str]:
    """Yield the group sizes that have nothing to compare."""
    parameters = config.algorithm.advantage.parameters
    k, samples = parameters.get("k", 4), config.generation.samples_per_prompt
    leaves_one_out = parameters.get("baseline", "subsets") == "leave_one_out"
    if leaves_one_out and k > samples:
        yield (
            f"{FIELD}.k: {k} responses are not in a group of generation.samples_per_prompt "
            f"{samples}. Lower k, or raise generation.samples_per_prompt."
        )
    elif not leaves_one_out and k >= samples:
        yield (
            f"{FIELD}.k: a group of generation.samples_per_prompt {samples} has at most one subset "
            f"of {k} responses, and nothing to compare it with. Lower k, or raise "
            "generation.samples_per_prompt."
        )


@register_advantage_estimator("grpo_passk", compares_group=True, validate=_validate, check=_check)
def grpo_passk_advantages(
    inputs: AdvantageInputs,
    *,
    k: int = 4,
    baseline: str = "subsets",
    divide_by_std: bool = True,
    eps: float = 1e-6,
) -> AdvantageOutput:
    """Return what a response does for the best of k, over all subsets of k of its group.

        subsets         A_i = (mean_{S with i} max(S) - mean_S max(S)) / (std_S max(S) + eps)
        leave_one_out   A_i = mean_{S with i} (max(S) - max(S without i))

    S runs over the subsets of k responses of the group, and max(S) is the highest reward in S. For
    rewards of 0 and 1 mean_S max(S) is the unbiased estimate of pass@k. The means are computed from
    the sorted rewards, not by enumeration. `subsets` with k = 1 is GRPO.

    Source: `subsets`: Chen et al. 2025, Pass@k Training, the analytical derivation
    (arXiv:2508.10751), for rewards of 0 and 1; with any rewards as in Walder and Karkhanis 2025,
    Pass@K Policy Optimization (arXiv:2505.15201), whose leave-one-out-minus-one baseline is
    `leave_one_out`.

    Shapes: rewards [B], response_mask [B, T] -> advantages [B, T].

    Conventions: the gradient is that of the expected best of k rewards, not of the expected reward:
    without the division by the deviation its expectation per response is (1 - k/G) / k (`subsets`)
    or 1 / k (`leave_one_out`) times grad E[max of k]. `divide_by_std` divides by the deviation over
    subsets (ddof 0), and is for `subsets` alone. verl's `grpo_passk` (Tang et al. 2025,
    arXiv:2503.19595) is `leave_one_out` with k the group size, where the best response gets its
    lead over the second one and the others 0, divided by the deviation of the group's rewards.
    `leave_one_out` needs k of at least 2. A group of fewer than k responses, of one, or of equal
    rewards gets exactly 0, and so does with `subsets` one in which every subset has the same best
    reward. Process rewards, where present, are summed into the outcome.

    Example: k 2, rewards (1, 0, 0): best of the subsets 1, 1, 0, mean 2/3, std sqrt(2)/3; subsets
    with the responses: mean 1, 1/2, 1/2; advantages (1/3, -1/6, -1/6) / (sqrt(2)/3).

    Raises:
        ValueError: `k` below 1 (or below 2 with `leave_one_out`), an unknown baseline, or a
            negative `eps`.
    """
    _validate(k=k, baseline=baseline, eps=eps)
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    groups = Groups.of(inputs.group_ids)

    advantages = torch.zeros_like(rewards)
    for group in range(len(groups.counts)):
        members = (groups.index == group).nonzero()[:, 0]
        values = rewards[members].double()
        if baseline == "leave_one_out":
            found = _leave_one_out(values, k)
        else:
            found = _among_subsets(values, k, eps if divide_by_std else None)
        advantages[members] = found.to(rewards.dtype)
    return AdvantageOutput(advantages=broadcast_to_tokens(advantages, inputs.response_mask))


def _among_subsets(values: Tensor, k: int, eps: float | None) -> Tensor:
    """Return [n] the advantages of `subsets`; `eps` None: not divided by the deviation."""
    size = len(values)
    ascending = values.sort().values
    # The worst best reward of a subset is that of the k lowest responses.
    if size <= k or bool(ascending[k - 1] == ascending[-1]):
        return torch.zeros_like(values)

    centred = values - ascending[0]
    ascending = ascending - ascending[0]
    of_best = _fractions(size, k)
    mean = (of_best * ascending).sum()
    advantages = _means_with(centred, k) - mean
    if eps is None:
        return advantages
    deviation = (of_best * (ascending - mean) ** 2).sum().sqrt()
    return advantages / (deviation + eps)


def _leave_one_out(values: Tensor, k: int) -> Tensor:
    """Return [n] the advantages of `leave_one_out`."""
    size = len(values)
    lowest = values.min()
    if size < k or bool(lowest == values.max()):
        return torch.zeros_like(values)

    # Less the lowest, which cancels in max(S) - max(S without i).
    values = values - lowest
    order = values.argsort(stable=True)
    ascending = values[order]
    without = torch.empty_like(values)
    of_best = _fractions(size - 1, k - 1)
    for rank in range(size):
        others = torch.cat([ascending[:rank], ascending[rank + 1 :]])
        without[order[rank]] = (of_best * others).sum()
    return _means_with(values, k) - without


def _means_with(values: Tensor, k: int) -> Tensor:
    """Return [n] the mean of max(S) over the subsets S of k that contain the response."""
    size = len(values)
    order = values.argsort(stable=True)
    ascending = values[order]
    total = math.comb(size - 1, k - 1)

    # The response itself is the best one, or another one that ranks higher.
    own = _ratios([math.comb(rank, k - 1) for rank in range(size)], total)
    higher = [math.comb(rank - 1, k - 2) if rank and k > 1 else 0 for rank in range(size)]
    weighted = _ratios(higher, total) * ascending
    above = weighted.flip(0).cumsum(0).flip(0) - weighted

    means = torch.empty_like(values)
    means[order] = own * ascending + above
    return means


def _fractions(size: int, k: int) -> Tensor:
    """Return [n] the fraction of the subsets of k in which each rank, ascending, is the best."""
    return _ratios([math.comb(rank, k - 1) for rank in range(size)], math.comb(size, k))


def _ratios(counts: list[int], total: int) -> Tensor:
    """Return integers divided by `total`; both may be too large for a float."""
    return torch.tensor([count / total for count in counts], dtype=torch.float64)
