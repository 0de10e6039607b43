"""The learner of an estimator's network: it answers before it learns, and it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.baseline_network import (
    BaselineRegression,
    LearnedBaselines,
)
from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    AuxiliaryConfig,
    GenerationConfig,
    ObjectiveConfig,
    RunConfig,
)
from rlsys.data.packing import pack_rows
from tests.support.rollout_examples import random_rollouts
from workers.training.auxiliary import FILE, FORMER_FILE, AuxiliaryLearner
from workers.training.packed_model import PackResult


class Model:
    """A model with hidden states of width 6."""

    hidden_size = 6


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """Start a process group of one rank in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_config(width: int = 8) -> RunConfig:
    advantage = AdvantageConfig(
        name="hierarchical",
        parameters={"solver": "network"},
        recompute=True,
        auxiliary=AuxiliaryConfig(width=width, learning_rate=0.02),
    )
    return RunConfig(
        algorithm=AlgorithmConfig(advantage=advantage, objective=ObjectiveConfig(weight="none")),
        generation=GenerationConfig(max_tokens=16),
    )


@pytest.mark.usefixtures("one_rank")
def test_it_answers_before_it_learns_and_resumes_where_it_was(tmp_path: Path):
    """Answer each mini-batch with the network and the shrinkage of the mini-batches before it."""
    rollouts = random_rollouts(0, groups=4, samples=4)
    (pack,) = pack_rows(
        rollouts.sequences,
        torch.arange(16).numpy(),
        budget=10**6,
        rank=0,
        ranks=1,
        shared_prefix_packing=True,
    )

    tokens = len(rollouts.token_ids)
    generator = torch.Generator().manual_seed(0)
    features = 0.3 + torch.rand(tokens, 2, generator=generator)
    truth = torch.tensor([0.7, -0.4])
    regression = BaselineRegression(features, features @ truth, torch.ones(tokens))

    m = len(pack.targets)
    result = PackResult(*torch.zeros(3, m), hidden=torch.randn(m, 6, generator=generator))

    def train(learner: AuxiliaryLearner, steps: int) -> list[Tensor]:
        answers = []
        for _ in range(steps):
            answers.append(learner.outputs(result, pack))
            learner.accumulate(result, pack, regression.columns().numpy())
            learner.step()
        return answers

    def make(width: int) -> AuxiliaryLearner:
        learner = AuxiliaryLearner.of(run_config(width), Model(), torch.device("cpu"))
        assert learner is not None
        return learner

    learner = make(8)
    answers = train(learner, 60)
    assert (answers[0] == 0).all()  # nothing learned
    assert (answers[1] == 0).all()  # learned, but not yet compared with a batch
    assert (answers[2] != 0).any()
    assert isinstance(learner.auxiliary, LearnedBaselines)
    assert learner.auxiliary.gain.shrinkage > 0.9

    flat = torch.from_numpy(pack.flat_positions)
    predictions = (answers[-1] * features[flat]).sum(1)
    assert (predictions - regression.base[flat]).abs().mean() < 0.05

    (tmp_path / FILE).write_bytes(learner.content())
    resumed = make(8)
    resumed.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(train(learner, 3), train(resumed, 3), strict=True))

    with pytest.raises(ValueError, match=r"the auxiliary network in .* has another size"):
        make(9).load(tmp_path)
    (tmp_path / FILE).rename(tmp_path / FORMER_FILE)
    with pytest.raises(ValueError, match="an earlier version wrote the network"):
        make(8).load(tmp_path)
    (tmp_path / FORMER_FILE).unlink()
    make(8).load(tmp_path)  # a checkpoint of a run without a network


def test_without_a_network_the_width_of_the_model_is_not_read():
    """Build no learner for a model that has no width: some padded ones have another LM head."""

    class Headless:
        @property
        def hidden_size(self) -> int:
            raise AssertionError("it has no linear LM head")

    assert AuxiliaryLearner.of(RunConfig(), Headless(), torch.device("cpu")) is None
