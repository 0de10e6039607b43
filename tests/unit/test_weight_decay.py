"""Weight decay acts on matrices."""

import pytest
import torch
from torch import nn

from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm
from workers.training.weight_decay import decays, parameter_groups


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.model.layers.0.self_attn.q_proj.weight", (4, 4), True),
        ("model.model.embed_tokens.weight", (9, 4), True),
        ("model.model.layers.0.mlp.experts.gate_up_proj", (2, 4, 8), True),
        ("model.model.layers.0.self_attn.q_proj.bias", (4,), False),
        ("model.model.layers.0.input_layernorm.weight", (4,), False),
        ("model.model.layers.0.self_attn.q_norm.weight", (2, 4), False),  # one scale per head
        (
            "model.model.layers.0.mlp.experts.gate_up_proj_bias",
            (2, 8),
            False,
        ),  # one bias per expert
    ],
)
def test_matrices_decay_and_norms_and_biases_do_not(
    name: str, shape: tuple[int, ...], expected: bool
):
    assert decays(name, torch.zeros(shape)) is expected


def test_a_step_without_a_gradient_shrinks_matrices_alone():
    """Take a step of AdamW: matrices shrink by rate 0.1 times decay 0.5, vectors do not."""
    model = nn.ModuleDict({"proj": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), 0.5), lr=0.1, fused=True
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    for name, parameter in model.named_parameters():
        factor = 0.95 if name == "proj.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_every_parameter_of_a_model_is_in_one_group():
    model = load_causal_lm(
        resolve_model("tiny"), dtype=torch.float32, attention="sdpa", trust_remote_code=False
    )
    decaying, constant = parameter_groups(model.named_parameters(), 0.1)
    with_decay, without = decaying["params"], constant["params"]

    grouped = {id(p) for p in with_decay} | {id(p) for p in without}
    assert grouped == {id(p) for p in model.parameters()}
    assert len(with_decay) + len(without) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in with_decay)
    assert all(p.ndim == 1 for p in without)
