"""Chunked log-probabilities against the plain formula, value and gradient."""

import pytest
import torch

from rlsys.algorithms.token_logprobs import (
    LogitTransform,
    TokenLogprobs,
    token_logprobs,
    token_logprobs_of_logits,
)


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 11, (7,), generator=generator)


def test_golden():
    # One feature, two words: logits (2, 0) / 2 = (1, 0); pi = e / (1 + e)
    out = token_logprobs(
        torch.tensor([[2.0]]),
        torch.tensor([[1.0], [0.0]]),
        torch.tensor([0]),
        temperature=2.0,
        chunk_tokens=8,
    )
    p = torch.tensor([1.0, 0.0]).softmax(0)
    assert out.logprobs.item() == pytest.approx(p[0].log().item())
    assert out.entropies.item() == pytest.approx(-(p * p.log()).sum().item())
    assert out.squared_score_norms.item() == pytest.approx(
        (1 - p[0].item()) ** 2 + p[1].item() ** 2
    )


def test_score_norms_are_squared_gradients_with_respect_to_the_scaled_logits():
    hidden, weight, targets = example()
    out = token_logprobs(hidden, weight, targets, temperature=0.7, chunk_tokens=3)
    logits = (hidden @ weight.T / 0.7).detach().requires_grad_()
    logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert logits.grad is not None
    assert torch.allclose(out.squared_score_norms, logits.grad.square().sum(1))
    assert not out.squared_score_norms.requires_grad


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_equal_the_plain_formula(chunk: int, temperature: float):
    hidden, weight, targets = example()
    out = token_logprobs(hidden, weight, targets, temperature=temperature, chunk_tokens=chunk)
    (out.logprobs * torch.arange(7.0) + 0.3 * out.entropies).sum().backward()
    logs = (
        (hidden.detach().requires_grad_() @ weight.detach().requires_grad_().T) / temperature
    ).log_softmax(-1)
    assert torch.allclose(out.logprobs, logs.gather(1, targets[:, None])[:, 0])
    assert torch.allclose(out.entropies, -(logs.exp() * logs).sum(-1))

    plain_hidden, plain_weight = (
        hidden.detach().clone().requires_grad_(),
        weight.detach().clone().requires_grad_(),
    )
    logs = (plain_hidden @ plain_weight.T / temperature).log_softmax(-1)
    chosen, entropy = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    (chosen * torch.arange(7.0) + 0.3 * entropy).sum().backward()
    assert plain_hidden.grad is not None
    assert plain_weight.grad is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    assert torch.allclose(hidden.grad, plain_hidden.grad, atol=1e-12)
    assert torch.allclose(weight.grad, plain_weight.grad, atol=1e-12)


def test_score_norms_of_a_certain_token_are_not_below_zero():
    """1 - 2 pi + sum pi^2 is a small difference of large numbers; rounding can make it negative."""
    hidden = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 3
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * 3
    out = token_logprobs(
        hidden, weight, (hidden @ weight.T).argmax(1), temperature=1.0, chunk_tokens=64
    )
    assert (out.squared_score_norms >= 0).all()
    assert (out.squared_score_norms < 1e-6).any()


def test_finite_differences():
    hidden, weight, targets = example()

    def both(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = token_logprobs(h, w, targets, temperature=1.3, chunk_tokens=2)
        return out.logprobs.sum() + out.entropies.square().sum()

    assert torch.autograd.gradcheck(both, (hidden, weight))


def test_bfloat16_products_float32_results():
    hidden, weight, targets = example(torch.bfloat16)
    out = token_logprobs(hidden, weight, targets, temperature=1.0, chunk_tokens=4)
    assert out.logprobs.dtype == torch.float32
    out.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = (
        (hidden.detach().float() @ weight.detach().float().T)
        .log_softmax(-1)
        .gather(1, targets[:, None])[:, 0]
    )
    assert torch.allclose(out.logprobs, exact, atol=0.05)


def test_logits_of_1e4_stay_finite():
    out = token_logprobs(
        torch.tensor([[1e4]]),
        torch.tensor([[1.0], [-1.0]]),
        torch.tensor([0]),
        temperature=1.0,
        chunk_tokens=1,
    )
    assert out.logprobs.item() == 0.0
    assert out.entropies.item() == 0.0


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(
            torch.zeros(2, 3),
            torch.zeros(5, 4),
            torch.zeros(2, dtype=torch.int64),
            temperature=1.0,
            chunk_tokens=1,
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=1.5, softcap=2.0)],
)
def test_bias_scale_and_softcap_equal_the_plain_formula(
    transform: LogitTransform, temperature: float
):
    hidden, weight, targets = example()
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = (hidden, weight, bias)

    def gradients(out: TokenLogprobs) -> tuple[torch.Tensor, ...]:
        combined = (out.logprobs * torch.arange(7.0) + 0.3 * out.entropies).sum()
        return torch.autograd.grad(combined, inputs)

    chunked = token_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        chunk_tokens=3,
        lm_head_bias=bias,
        transform=transform,
    )
    logits = transform.scale * (hidden @ weight.T + bias)
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    plain = token_logprobs_of_logits(logits, targets, temperature=temperature)

    for found, right in zip(chunked, plain, strict=True):
        assert torch.allclose(found, right)
    for found, right in zip(gradients(chunked), gradients(plain), strict=True):
        assert torch.allclose(found, right)


def test_logits_of_minus_infinity_are_tokens_of_probability_0():
    logits = torch.tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    out = token_logprobs_of_logits(logits, torch.tensor([0]), temperature=1.0)
    p = torch.tensor([1.0, 0.0]).softmax(0)
    assert out.entropies.item() == pytest.approx(-(p * p.log()).sum().item())
    (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropies.sum(), logits)
    assert gradient.isfinite().all()


def test_a_softcap_of_0_is_refused():
    with pytest.raises(ValueError, match="softcap: 0 is not above 0"):
        LogitTransform(softcap=0.0)
