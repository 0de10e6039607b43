"""The chunked KL over the vocabulary against the plain formula, value and gradient."""

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.kl import exact_token_kl
from rlsys.algorithms.token_logprobs import LogitTransform
from rlsys.algorithms.vocabulary_kl import LMHead, vocabulary_kl


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_logits(hidden: Tensor, head: LMHead) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.transform.scale
    cap = head.transform.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_golden():
    # logits (log 3, 0) / 1 and (0, 0): pi (3/4, 1/4), ref (1/2, 1/2):
    # KL = 3/4 log(3/2) + 1/4 log(1/2)
    kl = vocabulary_kl(
        torch.tensor([[3.0]]).log(),
        LMHead(torch.tensor([[1.0], [0.0]])),
        torch.tensor([[0.0, 0.0]]),
        LMHead(torch.eye(2)),
        temperature=1.0,
        chunk_tokens=4,
    )
    assert kl.tolist() == pytest.approx([0.75 * 0.4054651 - 0.25 * 0.6931472], abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(scale=0.5), LogitTransform(softcap=2.0)]
)
def test_value_and_gradient_equal_the_plain_formula(chunk: int, transform: LogitTransform):
    hidden = random(7, 5, seed=1).requires_grad_()
    weight, bias = random(11, 5, seed=2).requires_grad_(), random(11, seed=3).requires_grad_()
    head = LMHead(weight, bias, transform)
    ref_hidden = random(7, 4, seed=4).requires_grad_()
    ref_head = LMHead(random(11, 4, seed=5), None, LogitTransform(scale=2.0))
    factors = random(7, seed=6)

    found = vocabulary_kl(hidden, head, ref_hidden, ref_head, temperature=0.7, chunk_tokens=chunk)
    (found * factors).sum().backward()
    gradients = [tensor.grad for tensor in (hidden, weight, bias)]
    assert ref_hidden.grad is None

    logits, ref_logits = plain_logits(hidden, head), plain_logits(ref_hidden, ref_head)
    plain = exact_token_kl(logits, ref_logits, temperature=0.7)
    expected = torch.autograd.grad((plain * factors).sum(), (hidden, weight, bias))

    torch.testing.assert_close(found, plain)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_in_bfloat16_value_and_gradient_keep_its_precision():
    hidden, weight = random(64, 32, seed=1), random(50, 32, seed=2) / 6
    ref_hidden = hidden + 0.1 * random(64, 32, seed=3)
    low = [tensor.bfloat16() for tensor in (hidden, weight, ref_hidden)]
    low[0].requires_grad_()
    low[1].requires_grad_()

    found = vocabulary_kl(
        low[0], LMHead(low[1]), low[2], LMHead(low[1].detach()), temperature=1.0, chunk_tokens=16
    )
    found.sum().backward()

    exact = [tensor.detach().double() for tensor in low]
    exact[0].requires_grad_()
    plain = exact_token_kl(exact[0] @ exact[1].T, exact[2] @ exact[1].T)
    plain.sum().backward()

    assert found.dtype == torch.float32
    # The logits are rounded to 8 bits, which moves a small KL by a few per cent.
    assert float((found - plain).detach().abs().max()) < 0.1 * float(plain.detach().max())
    assert low[0].grad is not None
    assert exact[0].grad is not None
    error = (low[0].grad - exact[0].grad).norm() / exact[0].grad.norm()
    assert float(error) < 0.05


def test_equal_models_have_no_kl_and_no_gradient():
    hidden = random(3, 5, seed=1).requires_grad_()
    head = LMHead(random(11, 5, seed=2))
    kl = vocabulary_kl(hidden, head, hidden, head, temperature=1.0, chunk_tokens=2)
    kl.sum().backward()
    assert hidden.grad is not None
    assert float(kl.detach().abs().max()) < 1e-12
    assert float(hidden.grad.abs().max()) < 1e-12


def test_other_vocabularies_and_numbers_of_tokens_are_refused():
    head, other = LMHead(torch.zeros(5, 2)), LMHead(torch.zeros(6, 2))
    hidden = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="5 and 6 words"):
        vocabulary_kl(hidden, head, hidden, other, temperature=1.0, chunk_tokens=2)
    with pytest.raises(ValueError, match="3 and 2 tokens"):
        vocabulary_kl(hidden, head, hidden[:2], head, temperature=1.0, chunk_tokens=2)
