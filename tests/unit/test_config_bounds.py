"""Every field of the configuration refuses values of a wrong type or out of its range."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

from recipes.grpo_math import grpo_math
from rlsys.config import RewardFunctionConfig, RunConfig
from rlsys.config.command_line import ConfigError, all_fields, evolve, parse
from rlsys.config.hardware import Hardware

RECIPE = grpo_math(Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0))
# An empty list that says "none".
MAY_BE_EMPTY = {
    "plugins",
    "generation.stop",
    "model.lora.target_modules",
    "policy.frozen",
    "critic.frozen",
}


def kinds(annotation: Any) -> set[type]:
    """Return the types that a value of the field may have, without null; of lists, the items'."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kinds(parts[0])
    if origin in (Union, types.UnionType, tuple):
        return {kind for part in parts if part is not Ellipsis for kind in kinds(part)}
    return {annotation} if isinstance(annotation, type) else set()


def is_list(annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    return origin is tuple or (origin in (Union, types.UnionType) and any(map(is_list, parts)))


def fields_of(kind: type) -> Iterator[str]:
    return (name for name, field in all_fields(RunConfig) if kind in kinds(field.annotation))


def refuse(name: str, value: Any) -> str:
    with pytest.raises(ConfigError, match=f"^{name}") as error:
        evolve(RECIPE, {name: value})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted({*fields_of(int), *fields_of(float)}))
def test_true_is_no_number(name: str):
    given = [True] if is_list(dict(all_fields())[name].annotation) else True
    if name.endswith("optimizer.betas"):
        given = [True, 0.9]
    refuse(name, given)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e39])
@pytest.mark.parametrize("name", sorted(fields_of(float)))
def test_numbers_are_finite(name: str, value: float):
    given = (value, 0.9) if name.endswith("betas") else value
    assert "does not fit: " in refuse(name, given)


def test_weights_of_rewards_are_finite():
    with pytest.raises(ValueError, match="finite"):
        RewardFunctionConfig(name="math", weight=math.nan)


@pytest.mark.parametrize("name", sorted(fields_of(str)))
def test_text_is_not_empty(name: str):
    field = dict(all_fields())[name]
    given = [""] if is_list(field.annotation) else ""
    assert "at least 1 character" in refuse(name, given)


@pytest.mark.parametrize(
    "name", [name for name, field in all_fields() if is_list(field.annotation)]
)
def test_lists_are_not_empty_where_that_means_nothing(name: str):
    if name in MAY_BE_EMPTY:
        evolve(RECIPE, {name: []})
    elif name.endswith("optimizer.betas"):  # a pair: a line for each that is missing
        with pytest.raises(ConfigError, match=r"betas\.0: .* field required"):
            evolve(RECIPE, {name: []})
    else:
        refuse(name, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.evaluation.pass_at", [0]),
        ("trainer.evaluation.pass_at", [1, -1]),
        ("trainer.evaluation.every", -1),
        ("trainer.evaluation.samples_per_prompt", 0),
        ("trainer.evaluation.temperature", 0.0),
        ("trainer.steps", 0),
        ("trainer.prompts_per_step", 0),
        ("trainer.seed", -1),
        ("trainer.seed", 2**32),  # what NumPy's generator, which vLLM seeds, takes
        ("trainer.checkpoints.keep", 0),
        ("trainer.checkpoints.every", -1),
        ("trainer.save_rollouts_every", -1),
        ("policy.ranks", 0),
        ("policy.epochs", 0),
        ("policy.num_mini_batches", 0),
        ("policy.microbatch_tokens", 0),
        ("policy.logit_chunk_tokens", 0),
        ("policy.cpus_per_rank", 0),
        ("policy.threads_per_rank", -1),
        ("policy.gpus_per_rank", 1.5),  # a rank computes on one
        ("policy.optimizer.betas", [1.5, 0.9]),
        ("policy.optimizer.betas", [0.9, 1.0]),
        ("policy.optimizer.betas", [-0.1, 0.9]),
        ("policy.optimizer.betas", [0.9]),
        ("policy.optimizer.eps", -1.0),
        ("policy.optimizer.eps", 0.0),
        ("policy.optimizer.learning_rate", 0.0),
        ("policy.optimizer.learning_rate", 1.5),
        ("policy.optimizer.weight_decay", -0.1),
        ("policy.optimizer.max_grad_norm", -1.0),
        ("policy.optimizer.warmup_steps", -1),
        ("policy.optimizer.minimum_ratio", 1.5),
        ("generation.workers", 0),
        ("generation.gpus_per_worker", 1.5),
        ("generation.cpus_per_worker", -1),
        ("generation.samples_per_prompt", 0),
        ("generation.samples_per_prompt", 20_000),  # more than vLLM takes
        ("trainer.evaluation.samples_per_prompt", 20_000),
        ("generation.top_k", 2**31),
        ("generation.temperature", 0.0),
        ("generation.temperature", 0.001),  # vLLM would sample at 0.01 instead
        ("generation.top_p", 0.0),
        ("generation.top_p", 1.5),
        ("generation.top_k", -1),
        ("generation.min_tokens", -1),
        ("generation.max_tokens", 0),
        ("generation.max_model_tokens", 0),
        ("generation.kv_cache_gib", 0.0),
        ("generation.gpu_memory_utilization", 1.5),
        ("generation.tensor_parallel", 0),
        ("generation.logprob_difference_tolerance", -1.0),
        ("data.max_prompt_tokens", 0),
        ("data.synthetic.levels", [6]),
        ("data.synthetic.train_size", 0),
        ("data.synthetic.eval_size", 0),
        ("data.eval_limit", -1),
        ("algorithm.kl.coefficient", -1.0),
        ("algorithm.kl.target", 0.0),
        ("algorithm.kl.horizon", 0.0),
        ("algorithm.entropy.bonus", -1.0),
        ("algorithm.entropy.temperature", -1.0),
        ("algorithm.entropy.target", -1.0),
        ("algorithm.entropy.learning_rate", 0.0),
        ("algorithm.rollout_correction.cap", 0.0),
        ("algorithm.rollout_correction.mask_below", 0.0),
        ("algorithm.rollout_correction.mask_above", 0.0),
        ("algorithm.rollout_correction.max_sequence_kl", 0.0),
        ("algorithm.rollout_correction.off_policy_mask", 0.0),
        ("algorithm.dynamic_sampling.max_rounds", 0),
        ("algorithm.advantage.auxiliary.width", 0),
        ("algorithm.advantage.auxiliary.learning_rate", 0.0),
        ("reward.processes", 0),
        ("reward.memory_gb", -1.0),
        ("reward.timeout_s", 0.0),
        ("diagnostics.gradient_every", 0),
        ("cluster.object_store_gib", 0.01),  # Ray's own least is 75 MiB
    ],
)
def test_out_of_range(name: str, value: Any):
    message = refuse(name, value)
    assert "does not fit" in message
    assert message.endswith(")")  # the field's documentation is the remedy


def test_a_number_without_bounds_is_no_oversight():
    """Every int and float field has a bound; a new field without one fails here."""
    unbounded = [
        name
        for name in {*fields_of(int), *fields_of(float)}
        if not _bounds(dict(all_fields())[name])
    ]
    assert sorted(unbounded) == []


def _bounds(field: Any) -> bool:
    metadata = [*field.metadata]
    for part in get_args(field.annotation):
        metadata += getattr(part, "__metadata__", ())
    text = repr(metadata)
    return any(bound in text for bound in ("ge=", "gt=", "le=", "lt="))


def test_flags_reach_the_same_checks():
    with pytest.raises(ConfigError, match=r"^generation\.temperature: inf does not fit"):
        parse(RECIPE, ["--generation.temperature", ".inf"])
