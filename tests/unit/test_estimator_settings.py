"""Settings of estimators and recipes: values that follow the token limit, and refused values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from recipes.dapo_math import dapo_math
from recipes.grpo_math import grpo_math
from recipes.hierarchical_math import hierarchical_math
from recipes.run_recipe import run_recipe
from rlsys.algorithms.advantages import (
    AdvantageInputs,
    AdvantageOutput,
    check_advantage_estimator,
    contract,
    grpo_advantages,
    register_advantage_estimator,
)
from rlsys.config import RunConfig
from rlsys.config.command_line import parse
from rlsys.config.hardware import Hardware
from rlsys.rewards import soft_overlong_reward, with_token_limit
from rlsys.run.required_inputs import estimator_parameters

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
Recipe = Callable[[Hardware], RunConfig]
HIERARCHICAL = ("--algorithm.advantage.name", "hierarchical")
RECOMPUTE = ("--algorithm.advantage.recompute", "true")
WEIGHT_NONE = ("--algorithm.objective.weight", "none")
ONE_SAMPLE = ("--generation.samples_per_prompt", "1")
OPTIMAL = ("--algorithm.advantage.name", "optimal_baseline")
SCOPE = "--algorithm.advantage.parameters.scope"


def configured(recipe: Recipe, *flags: str) -> RunConfig:
    return parse(recipe(CPU), flags).config


def dry_run(
    capsys: pytest.CaptureFixture[str], recipe: Recipe, *flags: str
) -> tuple[object, str, str]:
    """Return exit code, stdout and stderr of a dry run."""
    with pytest.raises(SystemExit) as end:
        run_recipe(recipe, ["--model.path", "tiny", "--dry-run", *flags])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def length_penalty(config: RunConfig, tokens: int) -> float:
    """Return the penalty that the recipe gives to the length of a response, at most 0."""
    math, overlong = with_token_limit(config.reward.functions, config.generation.max_tokens)
    assert (math.name, overlong.name) == ("math", "soft_overlong")
    return overlong.weight * soft_overlong_reward("", "", tokens, **overlong.parameters)


def test_the_length_penalty_of_dapo_follows_the_token_limit():
    # 0 up to three quarters of the limit, then falling to -0.5 at the limit.
    config = configured(dapo_math)
    assert config.generation.max_tokens == 16
    assert [length_penalty(config, n) for n in (12, 14, 16)] == [0.0, -0.25, -0.5]
    config = configured(dapo_math, "--generation.max_tokens", "256")
    assert [length_penalty(config, n) for n in (17, 192, 224, 256)] == [0.0, 0.0, -0.25, -0.5]


def test_a_token_limit_of_its_own_stays():
    flags = (
        "--reward.functions",
        "[{name: math}, {name: soft_overlong, parameters: {max_tokens: 8, buffer_tokens: 2}}]",
    )
    config = configured(dapo_math, *flags)
    assert [length_penalty(config, n) for n in (6, 7, 8, 16)] == [0.0, -0.5, -1.0, -1.0]


def test_dapo_computes_the_advantages_of_the_paper():
    """Compare the paper's rewards, +1 and -1 less a penalty of at most 1, with the recipe's.

    The responses are right and short, right and long, wrong and short, wrong and long.
    """
    config = configured(dapo_math)
    right = torch.tensor([1.0, 1.0, 0.0, 0.0])
    lengths = (8, 16, 8, 16)
    mask = torch.ones(4, 1, dtype=torch.bool)

    def advantages(rewards: torch.Tensor) -> torch.Tensor:
        inputs = AdvantageInputs(
            rewards=rewards, response_mask=mask, group_ids=torch.zeros(4, dtype=torch.int64)
        )
        return grpo_advantages(inputs, eps=0.0).advantages[:, 0]

    ours = right + torch.tensor([length_penalty(config, n) for n in lengths])
    paper = 2 * right - 1 + torch.tensor([0.0, -1.0, 0.0, -1.0])
    torch.testing.assert_close(advantages(ours), advantages(paper))
    assert ours[1] > ours[2]  # a right long answer is better than a wrong short one


@pytest.mark.parametrize("tokens", [8, 16, 200])
def test_hierarchical_horizons_follow_the_token_limit(tokens: int):
    config = configured(hierarchical_math, "--generation.max_tokens", str(tokens))
    assert estimator_parameters(config)["max_tokens"] == tokens


def test_a_dry_run_shows_what_follows_the_token_limit(capsys: pytest.CaptureFixture[str]):
    code, out, _ = dry_run(capsys, hierarchical_math, "--generation.max_tokens", "24")
    assert code == 0
    assert "advantages   hierarchical (max_tokens=24)," in out
    code, out, _ = dry_run(capsys, dapo_math, "--generation.max_tokens", "24")
    assert code == 0
    assert "soft_overlong (max_tokens=24, buffer_tokens=None)" in out


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            hierarchical_math,
            ("--algorithm.advantage.parameters.max_tokens", "8"),
            "algorithm.advantage.parameters.max_tokens: 8 is below generation.max_tokens 16",
        ),
        (
            dapo_math,
            (
                "--reward.functions",
                "[{name: math}, {name: soft_overlong, parameters: {max_tokens: 64}}]",
            ),
            "reward.functions.parameters.max_tokens: 64 of 'soft_overlong' is above "
            "generation.max_tokens 16",
        ),
        (
            hierarchical_math,
            ("--algorithm.rollout_correction.level", "token"),
            "algorithm.rollout_correction.level: 'token' would apply the ratio old / rollout a "
            "second time",
        ),
        (
            hierarchical_math,
            ("--algorithm.rollout_correction.level", "sequence"),
            "algorithm.rollout_correction.level: 'sequence' would apply",
        ),
        (
            grpo_math,
            (*RECOMPUTE, *WEIGHT_NONE),
            "algorithm.advantage.recompute: true takes the live policy as old, so the ratio is "
            "always 1, and neither the objective nor 'grpo'",
        ),
        (
            grpo_math,
            (*HIERARCHICAL, *RECOMPUTE),
            "algorithm.objective.weight: 'ppo_clip' acts on a ratio that "
            "algorithm.advantage.recompute keeps at 1",
        ),
        (
            grpo_math,
            (*OPTIMAL, *ONE_SAMPLE),
            "generation.samples_per_prompt: 1 gives 'optimal_baseline' nothing to compare",
        ),
    ],
)
def test_contradictions_are_refused(
    capsys: pytest.CaptureFixture[str], recipe: Recipe, flags: tuple[str, ...], message: str
):
    code, _, error = dry_run(capsys, recipe, *flags)
    assert code == 2
    assert f"error: {message}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (dapo_math, ()),
        (dapo_math, ("--generation.max_tokens", "256")),
        (hierarchical_math, ()),
        (hierarchical_math, ("--generation.max_tokens", "8")),
        (hierarchical_math, ("--generation.max_tokens", "2", "--generation.min_tokens", "0")),
        (hierarchical_math, ("--generation.max_tokens", "1", "--generation.min_tokens", "0")),
        (hierarchical_math, ("--algorithm.advantage.parameters.max_tokens", "32")),
        (grpo_math, (*HIERARCHICAL, *RECOMPUTE, *WEIGHT_NONE)),
        (grpo_math, ("--algorithm.rollout_correction.level", "token")),
        (grpo_math, (*OPTIMAL, *ONE_SAMPLE, SCOPE, "batch")),
    ],
)
def test_what_goes_together_is_accepted(
    capsys: pytest.CaptureFixture[str], recipe: Recipe, flags: tuple[str, ...]
):
    code, _, error = dry_run(capsys, recipe, *flags)
    assert (code, error) == (0, "")


MINE = "registered_for_a_test"


def _validate(*, eps: float, scale: float) -> None:
    if scale < eps:
        raise ValueError(f"scale {scale:g} is below eps {eps:g}. Raise it.")


@pytest.fixture
def mine() -> Iterator[None]:
    """Register an estimator with a `validate`; the estimator itself fails when it is called."""

    @register_advantage_estimator(MINE, validate=_validate)
    def estimator(
        inputs: AdvantageInputs, *, eps: float = 1e-6, scale: float = 1.0
    ) -> AdvantageOutput:
        raise KeyError("rewards")

    yield
    contract._ESTIMATORS._entries.pop(MINE)


@pytest.mark.usefixtures("mine")
def test_an_estimator_is_not_called_before_the_run(capsys: pytest.CaptureFixture[str]):
    code, _, error = dry_run(capsys, grpo_math, "--algorithm.advantage.name", MINE)
    assert (code, error) == (0, "")


@pytest.mark.usefixtures("mine")
def test_its_validate_refuses_values_and_sees_the_defaults(capsys: pytest.CaptureFixture[str]):
    flags = ("--algorithm.advantage.name", MINE, "--algorithm.advantage.parameters.scale", "1e-9")
    code, _, error = dry_run(capsys, grpo_math, *flags)
    assert code == 2
    assert error == (
        f"error: algorithm.advantage.parameters of {MINE!r}: scale 1e-09 is below eps 1e-06. "
        "Raise it.\n"
    )


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("grpo", {"eps": -1.0}, "eps: -1.0 is negative"),
        ("grpo", {"std_ddof": 2}, "std_ddof: 2 is neither 0"),
        ("grpo_process", {"std_ddof": 2}, "std_ddof: 2 is neither 0"),
        ("token_kl_grpo", {"eps": -1.0}, "eps: -1.0 is negative"),
        ("token_kl_grpo", {"max_tokens": 0}, "max_tokens: 0 must be at least 1"),
        ("gae", {"lam": 1.5}, "lam: 1.5 is outside"),
        ("gae", {"eps": -1.0}, "eps: -1.0 is negative"),
        ("reinforce_plus_plus", {"eps": -1.0}, "eps: -1.0 is negative"),
        ("reinforce_baseline", {"baseline": "median"}, "baseline: unknown 'median'"),
        ("reinforce_baseline", {"decay": 1.0}, "decay: 1.0 is outside"),
        ("optimal_baseline", {"scope": "word"}, "scope: unknown 'word'"),
        ("hierarchical", {"horizons": "some"}, "horizons: 'some' is not one of"),
        ("hierarchical", {"horizons": "blocks", "block_size": 0}, "block_size: 0 must be"),
        ("hierarchical", {"horizons": "all", "max_tokens": 1000}, "horizons: 'all' takes at most"),
        ("hierarchical", {"scope": "some"}, "scope: 'some' is not one of"),
        ("hierarchical", {"ridge": -1.0}, "ridge: -1.0 must be finite"),
        ("hierarchical", {"log_ratio_clip": 0.0}, "log_ratio_clip: 0.0 must be positive"),
    ],
)
def test_values_of_the_right_type_that_are_refused(
    name: str, parameters: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=f"^algorithm.advantage.parameters.{message}"):
        check_advantage_estimator(name, parameters)


def test_an_estimator_that_reads_the_reference_carries_no_kl_unless_it_says_so(
    capsys: pytest.CaptureFixture[str],
):
    @register_advantage_estimator(MINE, needs=("ref_logprobs",))
    def estimator(inputs: AdvantageInputs) -> AdvantageOutput:
        return AdvantageOutput(advantages=torch.zeros_like(inputs.response_mask, dtype=torch.float))

    def error(*flags: str) -> str:
        return dry_run(capsys, grpo_math, "--algorithm.advantage.name", MINE, *flags)[2]

    try:
        kl = ("--algorithm.kl.coefficient", "0.1")
        assert error(*kl) == ""
        assert error().startswith("error: algorithm.kl.coefficient: 0 starts no reference")
        inside = error(*kl, "--algorithm.kl.placement", "advantage")
        refusal = "needs an estimator that carries the KL, and 'registered_for_a_test' does not"
        assert refusal in inside
        assert "Choose token_kl_grpo, or" in inside
    finally:
        contract._ESTIMATORS._entries.pop(MINE)


def test_an_estimator_that_needs_what_no_run_has_is_refused(capsys: pytest.CaptureFixture[str]):
    @register_advantage_estimator(MINE, needs=("values", "token_rewards"))
    def estimator(inputs: AdvantageInputs) -> AdvantageOutput:
        return AdvantageOutput(advantages=torch.zeros(inputs.response_mask.shape))

    try:
        code, _, error = dry_run(capsys, grpo_math, "--algorithm.advantage.name", MINE)
        assert code == 2
        assert f"'{MINE}' needs values, which no part of this run computes" in error

        entropy = ("--algorithm.entropy.temperature", "0.1")
        _, _, error = dry_run(capsys, grpo_math, "--algorithm.advantage.name", MINE, *entropy)
        assert "needs values" in error
        assert "needs token_rewards" not in error
    finally:
        contract._ESTIMATORS._entries.pop(MINE)
