"""The contract of estimators: inputs, outputs, declarations and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    AdvantageOutput,
    available_advantage_estimators,
    compares_group,
    contract,
    estimator_needs,
    get_advantage_estimator,
    is_importance_corrected,
    register_advantage_estimator,
    run_estimator,
)
from rlsys.registry import follow_token_limit
from tests.support.advantage_examples import (
    RAGGED,
    RAGGED_GROUPS,
    RAGGED_REWARDS,
    accepted_by,
    full_inputs,
    inputs,
    made,
)


def test_needs_are_declared():
    assert estimator_needs("grpo") == frozenset()
    assert estimator_needs("token_kl_grpo") == {"old_logprobs", "ref_logprobs"}
    for name in available_advantage_estimators():
        for need in estimator_needs(name):
            whole = accepted_by(name, full_inputs(RAGGED_REWARDS, RAGGED_GROUPS, RAGGED))
            made = dataclasses.replace(whole, **{need: None})
            with pytest.raises(ValueError, match=f"'{name}' needs {need}"):
                run_estimator(name, made, {})
            with pytest.raises(AssertionError, match=need):
                get_advantage_estimator(name)(made)


@pytest.mark.parametrize("name", ["optimal_baseline", "optimal_token_baseline"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_norms_that_are_not_finite_are_refused(name: str, value: float):
    """They would have made the plain mean of it, silently."""
    norms = torch.tensor([[1.0, value], [1.0, 3.0]])
    with pytest.raises(
        ValueError, match=rf"'{name}' needs squared_score_norms, of which 1 of 4 are not finite"
    ):
        run_estimator(name, inputs([1.0, 0.0], [0, 0], squared_score_norms=norms), {})
    outside = inputs(
        [1.0, 0.0], [0, 0], [1, 2], squared_score_norms=norms
    )  # where there is no token
    assert run_estimator(name, outside, {}).advantages.isfinite().all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"rewards must have shape \[2\]"):
        inputs([1.0], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="old_logprobs must have the shape"):
        inputs([1.0], [0], old_logprobs=torch.zeros(1, 9))


def test_unknown_name_offers_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"algorithm\.advantage\.name: unknown advantage estimator 'gpro'\. Did you mean grpo",
    ):
        get_advantage_estimator("gpro")


NAME = "mine_for_a_test"


ZEROS = torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    contract._ESTIMATORS._entries.pop(NAME, None)


def returning(value: Any, **declared: Any) -> Callable[..., Any]:
    """Register an estimator that returns `value`."""

    @register_advantage_estimator(NAME, **declared)
    def estimator(inputs: AdvantageInputs) -> Any:
        return value

    return estimator


def run(value: Any) -> AdvantageOutput:
    returning(value)
    return run_estimator(NAME, made(), {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            None,
            r"returned a NoneType\. Return an AdvantageOutput, with advantages of shape \[2, 3\]",
        ),
        (
            ZEROS,
            r"returned a tensor of torch\.float32 and shape \[2, 3\]\. Return an AdvantageOutput",
        ),
        (
            AdvantageOutput(advantages=torch.zeros(2)),
            r"returned advantages of shape \[2\]\. Return the shape of response_mask, \[2, 3\]",
        ),
        (
            AdvantageOutput(advantages=torch.zeros(3, 2)),
            r"returned advantages of shape \[3, 2\]\. Return the shape",
        ),
        (
            AdvantageOutput(advantages=torch.zeros(2, 3, dtype=torch.int64)),
            r"returned advantages as a tensor of torch\.int64 .* Return a floating-point tensor",
        ),
        (
            AdvantageOutput(advantages=[[0.0]]),  # pyright: ignore[reportArgumentType]
            r"returned advantages as a list\. Return a floating-point tensor of shape \[2, 3\]",
        ),
        (
            AdvantageOutput(advantages=ZEROS / 0),
            r"returned advantages of which 4 of 4 inside the response mask are not finite",
        ),
        (
            AdvantageOutput(advantages=ZEROS, returns=torch.zeros(2, 1)),
            r"returned returns of shape \[2, 1\]",
        ),
        (
            AdvantageOutput(
                advantages=ZEROS,
                diagnostics={"x": ZEROS},  # pyright: ignore[reportArgumentType]
            ),
            r"returned the diagnostic 'x' as a tensor .* Return a number",
        ),
        (
            AdvantageOutput(
                advantages=ZEROS,
                diagnostics=[1.0],  # pyright: ignore[reportArgumentType]
            ),
            r"returned diagnostics as a list",
        ),
        (
            AdvantageOutput(advantages=ZEROS, state={"mean": ZEROS}),
            r"returned a state that cannot be saved as JSON",
        ),
    ],
)
def test_what_is_no_result_is_named_with_what_was_expected(value: Any, message: str):
    with pytest.raises(ValueError, match=rf"algorithm\.advantage\.name: '{NAME}' {message}"):
        run(value)


def test_what_lies_outside_the_mask_does_not_matter():
    """Return a reward at every column, infinity after the response, with a gradient."""
    values = torch.tensor([[1.0, 1.0, 1.0], [2.0, torch.inf, torch.nan]], requires_grad=True)
    output = run(AdvantageOutput(advantages=values))
    assert output.advantages.tolist() == [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]
    assert not output.advantages.requires_grad


def test_whether_a_group_is_compared_may_depend_on_the_parameters():
    def in_groups(parameters: Mapping[str, Any]) -> bool:
        return parameters.get("scope") != "batch"

    returning(None, compares_group=in_groups)
    assert compares_group(NAME)
    assert compares_group(NAME, {"scope": "group"})
    assert not compares_group(NAME, {"scope": "batch"})
    assert compares_group("optimal_baseline", {"scope": "group"})
    assert not compares_group("optimal_baseline", {"scope": "batch"})


def test_only_hierarchical_carries_the_ratio_to_the_rollout_policy():
    names = [name for name in available_advantage_estimators() if is_importance_corrected(name)]
    assert names == ["hierarchical"]


def test_a_token_limit_that_is_null_or_left_out_follows_the_run():
    def takes(inputs: Tensor, *, max_tokens: int | None = None) -> None: ...

    def takes_none(inputs: Tensor, *, eps: float = 0.1) -> None: ...

    assert follow_token_limit(takes, {}, 7) == {"max_tokens": 7}
    assert follow_token_limit(takes, {"max_tokens": None}, 7) == {"max_tokens": 7}
    assert follow_token_limit(takes, {"max_tokens": 3}, 7) == {"max_tokens": 3}
    assert follow_token_limit(takes_none, {"eps": 1.0}, 7) == {"eps": 1.0}
