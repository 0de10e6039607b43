"""pass@k-GRPO against the enumeration of all subsets, and its exact expectation."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch

from recipes.grpo_math import grpo_math
from rlsys.algorithms.advantages import AdvantageInputs, grpo_advantages, grpo_passk_advantages
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.run.directory import RunDirectory
from rlsys.run.preflight import config_mistakes
from tests.support.advantage_examples import inputs


def doubles(rewards: list[float], groups: list[int]) -> AdvantageInputs:
    made = inputs(rewards, groups)
    return dataclasses.replace(made, rewards=torch.tensor(rewards, dtype=torch.float64))


def by_enumeration(rewards: list[float], k: int, baseline: str, eps: float | None) -> list[float]:
    """Return the advantages of one group from all its subsets of k, one after the other."""
    subsets = list(itertools.combinations(range(len(rewards)), k))
    best = [max(rewards[i] for i in subset) for subset in subsets]
    found = []
    for i in range(len(rewards)):
        mine = [index for index, subset in enumerate(subsets) if i in subset]
        if not mine:
            found.append(0.0)
            continue
        if baseline == "subsets":
            value = statistics.fmean(best[index] for index in mine) - statistics.fmean(best)
            found.append(value if eps is None else value / (statistics.pstdev(best) + eps))
            continue
        leads = [best[index] - max(rewards[j] for j in subsets[index] if j != i) for index in mine]
        found.append(statistics.fmean(leads))
    return found


@pytest.mark.parametrize("baseline", ["subsets", "leave_one_out"])
@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 8])
def test_against_all_subsets(k: int, baseline: str, divide_by_std: bool):
    """Random rewards with ties, rewards of 0 and 1, and groups of several sizes in one batch."""
    if baseline == "leave_one_out" and k == 1:
        return
    generator = torch.Generator().manual_seed(k)
    groups = [i % 3 for i in range(20)]  # 7, 7 and 6 responses
    rewards = (torch.randint(-3, 4, (20,), generator=generator) / 2).tolist()
    rewards[1::3] = [float(value > 0) for value in rewards[1::3]]  # group 1: 0 and 1
    made = doubles(rewards, groups)
    found = grpo_passk_advantages(
        made, k=k, baseline=baseline, divide_by_std=divide_by_std, eps=1e-3
    ).advantages
    for group in range(3):
        members = [i for i in range(20) if groups[i] == group]
        wanted = (
            by_enumeration(
                [rewards[i] for i in members], k, baseline, 1e-3 if divide_by_std else None
            )
            if len(members) >= k
            else [0.0] * len(members)
        )
        assert found[members, 0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_golden():
    # k 2 of (1, 0, 0): best of {1,2}, {1,3}, {2,3} = 1, 1, 0; mean 2/3, std sqrt(2/9);
    # subsets with response 1: 1, with 2: (1 + 0) / 2, with 3: the same
    std = math.sqrt(2 / 9)
    out = grpo_passk_advantages(inputs([1.0, 0.0, 0.0], [0, 0, 0]), k=2, eps=0.0)
    assert out.advantages[:, 0].tolist() == pytest.approx([1 / 3 / std, -1 / 6 / std, -1 / 6 / std])
    # the published form for 4 responses, 1 right, k 2: R = 1 - C(3,2)/C(4,2) = 1/2,
    # sigma = sqrt(R (1 - R)) = 1/2, right: (1 - R) / sigma = 1,
    # wrong: (1 - R - C(2,1)/C(3,1)) / sigma = (1/2 - 2/3) / (1/2) = -1/3
    out = grpo_passk_advantages(inputs([0.0, 1.0, 0.0, 0.0], [0] * 4), k=2, eps=0.0)
    assert out.advantages[:, 0].tolist() == pytest.approx([-1 / 3, 1.0, -1 / 3, -1 / 3])


def test_leave_one_out_of_the_whole_group_is_the_lead_of_the_best():
    # verl's numerator: the best response gets max - second, the others 0
    out = grpo_passk_advantages(
        inputs([0.5, 2.0, 1.25, -1.0], [0] * 4), k=4, baseline="leave_one_out"
    )
    assert out.advantages[:, 0].tolist() == pytest.approx([0.0, 0.75, 0.0, 0.0])


def test_k_of_one_is_grpo():
    made = inputs([0.3, 1.0, 0.0, 0.5, 0.2], [0, 0, 0, 1, 1])
    torch.testing.assert_close(
        grpo_passk_advantages(made, k=1).advantages, grpo_advantages(made).advantages
    )


@pytest.mark.parametrize("baseline", ["subsets", "leave_one_out"])
def test_groups_without_a_difference_get_exactly_zero(baseline: str):
    # equal rewards of 0.1, whose mean is not 0.1 in floating point; a group of one; one below k
    made = inputs([0.1] * 3 + [0.7] + [0.2, 0.9], [0, 0, 0, 1, 2, 2])
    out = grpo_passk_advantages(made, k=3, baseline=baseline)
    assert (out.advantages == 0).all()
    if baseline == "subsets":  # every subset of two has a right response
        out = grpo_passk_advantages(inputs([1.0, 1.0, 0.0], [0] * 3), k=2)
        assert (out.advantages == 0).all()


def test_mixed_lengths_and_masks():
    made = inputs([1.0, 0.0, 0.0], [0, 0, 0], [3, 1, 0])
    out = grpo_passk_advantages(made, k=2).advantages
    assert (out[~made.response_mask] == 0).all()
    assert (out[0] == out[0, 0]).all()


def test_large_groups_stay_finite():
    """C(2000, 1000) is beyond a float; the fractions are not."""
    rewards = torch.linspace(0, 1, 2000).tolist()
    out = grpo_passk_advantages(inputs(rewards, [0] * 2000), k=1000).advantages[:, 0]
    assert out.isfinite().all()
    assert out[-1] > 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"k": 0}, r"^algorithm\.advantage\.parameters\.k: 0 must be at least 1"),
        ({"baseline": "mean"}, r"parameters\.baseline: unknown 'mean'. Choose from subsets"),
        ({"k": 1, "baseline": "leave_one_out"}, r"parameters\.k: 1 with baseline leave_one_out"),
        ({"eps": -1.0}, r"eps: -1.0 is negative"),
    ],
)
def test_wrong_values(parameters: dict, message: str):
    with pytest.raises(ValueError, match=message):
        grpo_passk_advantages(inputs([1.0], [0]), **parameters)


@pytest.mark.parametrize(
    ("k", "baseline", "message"),
    [
        (8, "subsets", "k: a group of generation.samples_per_prompt 8 has at most one subset"),
        (9, "leave_one_out", "k: 9 responses are not in a group of generation.samples_per_prompt"),
        (7, "subsets", None),
        (8, "leave_one_out", None),
    ],
)
def test_group_sizes_are_checked_before_a_run(k: int, baseline: str, message: str | None, tmp_path):
    machine = Hardware(cpus=8, memory_gib=32.0, gpus=0, gpu_memory_gib=0.0)
    flags = {
        "model.path": "tiny",
        "generation.engine": "transformers",
        "generation.samples_per_prompt": 8,
        "algorithm.advantage.name": "grpo_passk",
        "algorithm.advantage.parameters": {"k": k, "baseline": baseline},
    }
    config = evolve(grpo_math(machine), flags)
    mistakes = config_mistakes(config, RunDirectory(tmp_path / "run"), machine, resume=False)
    assert [message in line for line in mistakes if message] == [True] * bool(message)
    assert bool(mistakes) == bool(message)
