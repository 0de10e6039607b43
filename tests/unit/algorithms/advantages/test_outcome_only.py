"""Refusals of estimators that are defined for outcome rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.grpo_math import grpo_math
from rlsys.algorithms.advantages.outcome_only import check_outcome_only, check_reward_range
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.run.directory import RunDirectory
from rlsys.run.preflight import config_mistakes
from tests.support.advantage_examples import OUTCOME_ONLY, inputs

MACHINE = Hardware(cpus=8, memory_gib=32.0, gpus=0, gpu_memory_gib=0.0)


def mistakes(name: str, directory: Path, **flags: object) -> list[str]:
    changes = {
        "model.path": "tiny",
        "generation.engine": "transformers",
        "algorithm.advantage.name": name,
    }
    config = evolve(grpo_math(MACHINE), changes | flags)
    return config_mistakes(config, RunDirectory(directory / "run"), MACHINE, resume=False)


@pytest.mark.parametrize("name", OUTCOME_ONLY)
def test_costs_of_tokens_are_refused_before_a_run(name: str, tmp_path: Path):
    in_reward = {"algorithm.kl.coefficient": 0.1, "algorithm.kl.placement": "reward"}
    (mistake,) = mistakes(name, tmp_path, **in_reward)
    assert mistake.startswith("algorithm.kl.placement: 'reward' adds a cost to every token")
    assert repr(name) in mistake

    (mistake,) = mistakes(name, tmp_path, **{"algorithm.entropy.temperature": 0.1})
    assert mistake.startswith("algorithm.entropy.temperature: 0.1 adds a reward to every token")

    in_loss = {"algorithm.kl.coefficient": 0.1, "algorithm.kl.placement": "loss"}
    assert mistakes(name, tmp_path, **in_loss) == []
    assert mistakes(name, tmp_path, **{"algorithm.entropy.bonus": 0.1}) == []


def test_process_rewards():
    check_outcome_only(inputs([1.0], [0]), "mine")
    with pytest.raises(ValueError, match=r"^token_rewards: 'mine' is defined for outcome rewards"):
        check_outcome_only(inputs([1.0], [0], token_rewards=torch.zeros(1, 2)), "mine")


def test_ranges_with_room_for_the_rounding_of_float32():
    weighted = torch.tensor([0.1, 0.2, 0.7]).sum() * torch.tensor([1.0, 1 + 1e-6])
    check_reward_range(weighted, 0.0, 1.0, "mine", "")
    check_reward_range(torch.tensor([0.0, 1e9]), 0.0, float("inf"), "mine", "")
    with pytest.raises(ValueError, match=r"takes rewards in \[0, 1\], and .* has 1.1\. Do that"):
        check_reward_range(torch.tensor([0.5, 1.1]), 0.0, 1.0, "mine", "Do that.")
