"""The loss of pretraining text in the policy's update."""

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.policy_objectives.ptx import ptx_loss


def example() -> tuple[Tensor, Tensor]:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -7.0, -7.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    return logprobs, mask


def test_it_is_the_coefficient_times_the_mean_over_the_tokens_of_text():
    # 27.8 (2 + 3 + 0.5) / 3
    assert float(ptx_loss(*example(), coefficient=27.8)) == pytest.approx(27.8 * 5.5 / 3, abs=1e-12)


def test_the_example_of_the_documentation():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[False, True, True]])
    loss = ptx_loss(logprobs, mask, coefficient=0.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.25)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, -0.25, -0.25]]


def test_terms_of_microbatches_add_up():
    logprobs, mask = example()
    parts = [
        ptx_loss(logprobs[i : i + 1], mask[i : i + 1], coefficient=2.0, num_tokens=3)
        for i in (0, 1)
    ]
    assert float(sum(parts)) == pytest.approx(2 * 5.5 / 3, abs=1e-12)


def test_a_text_without_tokens_needs_a_denominator():
    logprobs, mask = example()
    with pytest.raises(ValueError, match="no token is learned"):
        ptx_loss(logprobs, torch.zeros_like(mask), coefficient=1.0)
    assert float(ptx_loss(logprobs, torch.zeros_like(mask), coefficient=1.0, num_tokens=4)) == 0.0
