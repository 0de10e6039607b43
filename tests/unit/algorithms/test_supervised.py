"""The negative log-likelihood of demonstrations."""

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.supervised import negative_log_likelihood


def example() -> tuple[Tensor, Tensor]:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -7.0, -7.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    return logprobs, mask


def test_the_mean_is_over_the_learned_tokens():
    # (2 + 3 + 0.5) / 3
    assert float(negative_log_likelihood(*example())) == pytest.approx(5.5 / 3, abs=1e-12)


def test_a_global_denominator_makes_the_losses_of_parts_add_up():
    logprobs, mask = example()
    parts = [
        negative_log_likelihood(logprobs[i : i + 1], mask[i : i + 1], num_tokens=3) for i in (0, 1)
    ]
    assert float(sum(parts)) == pytest.approx(5.5 / 3, abs=1e-12)


def test_the_gradient_is_minus_one_over_the_tokens_and_zero_where_nothing_is_learned():
    logprobs, mask = example()
    logprobs.requires_grad_()
    negative_log_likelihood(logprobs, mask, num_tokens=4).backward()
    assert logprobs.grad is not None
    expected = torch.tensor([[0, -0.25, -0.25], [-0.25, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected)


def test_it_is_the_cross_entropy_of_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 11, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ignored = torch.where(mask, tokens, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    torch.testing.assert_close(negative_log_likelihood(logprobs, mask), expected)


def test_minus_infinity_outside_of_the_mask_does_not_matter():
    logprobs, mask = example()
    logprobs[0, 0] = -torch.inf
    assert float(negative_log_likelihood(logprobs, mask)) == pytest.approx(5.5 / 3, abs=1e-12)


def test_a_mean_over_nothing_is_refused():
    logprobs, mask = example()
    with pytest.raises(ValueError, match="no token is learned"):
        negative_log_likelihood(logprobs, torch.zeros_like(mask))
    assert float(negative_log_likelihood(logprobs, torch.zeros_like(mask), num_tokens=2)) == 0


def test_shapes_that_differ_are_refused():
    logprobs, mask = example()
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        negative_log_likelihood(logprobs, mask[:, :2])
