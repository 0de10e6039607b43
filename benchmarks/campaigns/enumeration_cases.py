"""Cases of the enumeration: one `Case` is one configuration on one small world."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS

Parameters = tuple[tuple[str, Any], ...]
# Many CPUs, so that nothing is refused because there are too few.
MACHINE = Hardware(cpus=64, memory_gib=64.0, gpus=0, gpu_memory_gib=0.0)
KL, BONUS, TEMPERATURE = 0.3, 0.2, 0.4
# Two reward functions whose sum is the reward, for an estimator that reads each of them.
FUNCTIONS = ("math", "format_boxed")
# Estimators of success probabilities.
OF_PROBABILITIES = ("maxrl", "bnpo")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The fields of a configuration that decide about the gradient, and the shape of the world."""

    estimator: str = "reinforce"
    parameters: Parameters = ()
    recompute: bool = False
    ratio: str = "token"
    weight: str = "none"
    weight_parameters: Parameters = ()
    aggregation: str = "sequence_sum"
    kl_placement: str = "none"
    kl_kind: str = "k1"
    kl_direction: str = "reverse"
    kl_level: str = "token"
    kl_ratio: str = "none"  # importance ratio on the KL in the loss
    kl_old: float = 0.0  # coefficient of KL(old || live)
    entropy: str = "none"  # none | bonus | temperature
    correction: str = "none"  # level
    correction_parameters: Parameters = ()
    mask_truncated: bool = False
    preset: str = ""
    # The world.
    staleness: str = "on_policy"  # | live_moved | engine_mismatch | both | far
    lengths: str = "mixed"  # | equal
    rewards: str = "normal"  # | binary
    prompts: int = 1
    group: int = 2
    max_tokens: int = 2
    microbatch_tokens: int = 4096

    @property
    def moved(self) -> bool:
        """Return whether the update is a later one of its batch: the policy is no longer `old`."""
        return self.staleness in ("live_moved", "both", "far")

    @property
    def mismatch(self) -> bool:
        """Return whether another policy than `old` sampled."""
        return self.staleness in ("engine_mismatch", "both")

    def name(self) -> str:
        """Return the differences to the default case."""
        changed = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return " ".join(changed) or "reinforce"

    def flags(self) -> dict[str, Any]:
        """Return the configuration as a user would set it, by dotted name."""
        changes: dict[str, Any] = {
            "model.path": "tiny",
            "generation.engine": "transformers",
            "generation.dtype": "float32",
            "generation.min_tokens": 1,
            "generation.max_tokens": self.max_tokens,
            "generation.samples_per_prompt": self.group,
            "trainer.prompts_per_step": self.prompts,
            "policy.compute_dtype": "float32",
            "policy.microbatch_tokens": self.microbatch_tokens,
            "policy.optimizer.max_grad_norm": 0.0,
            "policy.epochs": 2 if self.moved else 1,
            "data.synthetic.train_size": 4,
            "data.synthetic.eval_size": 4,
        }
        if self.preset:
            preset = PRESETS[self.preset].algorithm.model_dump(mode="json")
            return changes | {f"algorithm.{name}": value for name, value in preset.items()}

        temperature = TEMPERATURE if self.entropy == "temperature" else 0.0
        changes |= {
            "algorithm.advantage.name": self.estimator,
            "algorithm.advantage.parameters": self._estimator_parameters(),
            "algorithm.advantage.recompute": self.recompute,
            "algorithm.objective.ratio": self.ratio,
            "algorithm.objective.weight": self.weight,
            "algorithm.objective.parameters": dict(self.weight_parameters),
            "algorithm.aggregation": self.aggregation,
            "algorithm.kl.coefficient": 0.0 if self.kl_placement == "none" else KL,
            "algorithm.entropy.bonus": BONUS if self.entropy == "bonus" else 0.0,
            "algorithm.entropy.temperature": temperature,
            "algorithm.rollout_correction.level": self.correction,
            "algorithm.overlong.mask_truncated": self.mask_truncated,
        }
        for name, value in self.correction_parameters:
            changes[f"algorithm.rollout_correction.{name}"] = value
        if self.estimator == "gdpo":
            changes["reward.functions"] = list(FUNCTIONS)
        if self.estimator == "grpo_process":  # refused without a function that rewards steps
            changes["reward.functions"] = ["math", "arithmetic_steps"]
        if self.kl_placement != "none":
            changes |= {
                "algorithm.kl.placement": self.kl_placement,
                "algorithm.kl.kind": self.kl_kind,
                "algorithm.kl.direction": self.kl_direction,
                "algorithm.kl.level": self.kl_level,
                "algorithm.kl.importance_ratio": self.kl_ratio,
            }
        if self.kl_old:
            changes["algorithm.kl_old.coefficient"] = self.kl_old
        return changes

    def _estimator_parameters(self) -> dict[str, Any]:
        """Return the parameters, without the diagnostics of the hierarchical fit.

        The diagnostics take most of its time and change no gradient.
        """
        quiet = {"diagnostics": False} if self.estimator == "hierarchical" else {}
        return quiet | dict(self.parameters)

    def config(self) -> RunConfig:
        """Return the whole configuration.

        Raises:
            ConfigError: the configuration's models refuse it.
        """
        return evolve(grpo_math(MACHINE), self.flags())

    def resolved(self) -> Case:
        """Return the case with the preset's fields in place of its name."""
        if not self.preset:
            return self
        preset = PRESETS[self.preset].algorithm
        kl = preset.kl
        entropy = "none"
        if preset.entropy.bonus:
            entropy = "bonus"
        elif preset.entropy.temperature:
            entropy = "temperature"
        return replace(
            self,
            estimator=preset.advantage.name,
            parameters=tuple(preset.advantage.parameters.items()),
            recompute=preset.advantage.recompute,
            ratio=preset.objective.ratio,
            weight=preset.objective.weight,
            weight_parameters=tuple(preset.objective.parameters.items()),
            aggregation=preset.aggregation,
            kl_placement=kl.placement if kl.coefficient else "none",
            kl_kind=kl.estimator,
            kl_direction=kl.direction,
            kl_level=kl.level,
            kl_ratio=kl.importance_ratio,
            kl_old=preset.kl_old.coefficient,
            entropy=entropy,
            correction=preset.rollout_correction.level,
            mask_truncated=preset.overlong.mask_truncated,
        )

    @property
    def resamples(self) -> bool:
        """Return whether groups without a gradient are sampled again.

        They are left out of the loss where they could not be replaced.
        """
        if not self.preset:
            return False
        return PRESETS[self.preset].algorithm.dynamic_sampling.max_rounds > 1

    @property
    def kl_coefficient(self) -> float:
        """Return beta."""
        if self.preset:
            return PRESETS[self.preset].algorithm.kl.coefficient
        return 0.0 if self.kl_placement == "none" else KL


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "{" + ",".join(f"{name}:{item}" for name, item in value) + "}"
    return str(value)


def _p(**parameters: Any) -> Parameters:
    return tuple(parameters.items())


ESTIMATORS: tuple[tuple[str, Parameters], ...] = (
    ("reinforce", ()),
    ("reinforce_baseline", ()),
    ("reinforce_baseline", _p(baseline="moving_average")),
    ("rloo", ()),
    ("remax", ()),
    ("gae", ()),
    ("gae", _p(gamma=0.9, lam=0.8)),
    ("gae", _p(whiten=True)),
    ("grpo", ()),
    ("grpo", _p(std_ddof=1)),
    ("grpo", _p(divide_by_std=False)),
    ("grpo_process", ()),
    ("gpg", ()),
    ("opo", ()),
    ("optimal_baseline", ()),
    ("optimal_baseline", _p(leave_one_out=True)),
    ("optimal_baseline", _p(scope="batch")),
    ("optimal_baseline", _p(scope="batch", leave_one_out=True)),
    ("optimal_token_baseline", ()),
    ("optimal_token_baseline", _p(leave_one_out=True)),
    ("reinforce_plus_plus", ()),
    ("reinforce_plus_plus", _p(group_baseline=True)),
    ("token_kl_grpo", ()),
    ("grpo_passk", _p(k=2)),
    ("grpo_passk", _p(k=2, divide_by_std=False)),
    ("grpo_passk", _p(k=2, baseline="leave_one_out")),
    ("maxrl", ()),
    ("bnpo", ()),
    ("rae", ()),
    ("gdpo", ()),
    ("hierarchical", ()),
    ("hierarchical", _p(horizons="all")),
    ("hierarchical", _p(horizons="all", max_tokens=4)),
    ("hierarchical", _p(max_tokens=4)),
    ("hierarchical", _p(horizons="final", ridge=1.0)),
    ("hierarchical", _p(scope="batch", ridge=0.5, horizons="current")),
    ("hierarchical", _p(log_ratio_clip=0.1)),
)
RATIOS = ("token", "sequence", "future", "prefix", "product")
WEIGHTS: tuple[tuple[str, Parameters], ...] = (
    ("none", ()),
    ("importance", ()),
    ("ppo_clip", ()),
    ("dual_clip", ()),
    ("upper_clip", ()),
    ("power", ()),
    ("power", _p(q=1.0)),
    ("adaptive_power", ()),
    ("sapo", ()),
    ("sapo_sequence", ()),
    ("cispo", ()),
    ("minimum", ()),
    ("reward_time", ()),
    ("gmpo", ()),
    ("dppo_tv", ()),
    ("dppo_kl", ()),
    ("vespo", ()),
    ("dro", _p(beta=0.3)),
    ("clip_cov", _p(clip_low=0.2, clip_high=0.2, lowest=0.05)),
    ("kl_cov", _p(fraction=0.5)),
)
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
KL_KINDS = ("k1", "k2", "k3", "k3_k2", "exact")
DIRECTIONS = ("reverse", "forward")
KL_LEVELS = ("token", "sequence")
KL_RATIOS = ("none", "token", "prefix", "product")
STALENESS = ("on_policy", "live_moved", "engine_mismatch", "both")
CORRECTIONS: tuple[tuple[str, Parameters], ...] = (
    ("token", _p(cap=1e6)),
    ("token", ()),
    ("sequence", _p(cap=1e6)),
    ("sequence", _p(mask_below=0.5, mask_above=2.0)),
)
SHAPES = ((1, 2), (1, 3), (2, 2), (3, 1))  # prompts, group


def slices() -> Iterator[Case]:
    """Yield each dimension against those that it meets in the pipeline, all else at its default."""
    yield from _estimator_slices()
    yield from _objective_slices()
    yield from _kl_slices()
    yield from _entropy_slices()
    yield from _correction_slices()
    yield from _recompute_slices()
    yield from _hierarchical_slices()
    yield from _preset_slices()


def _placement_of(estimator: str) -> str:
    """Return the KL placement without which an estimator is refused."""
    return "advantage" if estimator == "token_kl_grpo" else "none"


def _rewards_of(estimator: str) -> str:
    """Return the rewards without which an estimator stops."""
    return "binary" if estimator in OF_PROBABILITIES else "normal"


def _estimator_slices() -> Iterator[Case]:
    for (estimator, parameters), aggregation, (prompts, group), lengths in itertools.product(
        ESTIMATORS, AGGREGATIONS, SHAPES, ("mixed", "equal")
    ):
        if lengths == "equal" and prompts > 1:
            continue
        yield Case(
            estimator=estimator,
            parameters=parameters,
            aggregation=aggregation,
            prompts=prompts,
            group=group,
            lengths=lengths,
            kl_placement=_placement_of(estimator),
            rewards=_rewards_of(estimator),
        )


def _objective_slices() -> Iterator[Case]:
    for ratio, (weight, parameters), staleness, estimator in itertools.product(
        RATIOS, WEIGHTS, (*STALENESS, "far"), ("reinforce", "rloo", "hierarchical")
    ):
        if staleness == "far" and estimator != "reinforce":
            continue  # all responses of a group are the same one there
        yield Case(
            estimator=estimator,
            ratio=ratio,
            weight=weight,
            weight_parameters=parameters,
            staleness=staleness,
            max_tokens=3 if estimator == "reinforce" else 2,
        )


def _kl_slices() -> Iterator[Case]:
    for kind, direction, placement, staleness, aggregation in itertools.product(
        KL_KINDS, DIRECTIONS, ("loss", "reward", "advantage"), STALENESS, AGGREGATIONS
    ):
        for estimator in ("reinforce", "grpo", "token_kl_grpo"):
            yield Case(
                estimator=estimator,
                ratio="product",
                weight="importance",
                kl_placement=placement,
                kl_kind=kind,
                kl_direction=direction,
                staleness=staleness,
                aggregation=aggregation,
            )

    for estimator, parameters in ESTIMATORS:
        yield Case(
            estimator=estimator,
            parameters=parameters,
            ratio="product",
            weight="importance",
            kl_placement="reward",
            kl_kind="exact",
        )

    for kind, direction, level, ratio, staleness in itertools.product(
        KL_KINDS, DIRECTIONS, KL_LEVELS, KL_RATIOS, STALENESS
    ):
        for aggregation in ("sequence_sum", "token_mean"):
            yield Case(
                ratio="product",
                weight="importance",
                kl_placement="loss",
                kl_kind=kind,
                kl_direction=direction,
                kl_level=level,
                kl_ratio=ratio,
                staleness=staleness,
                aggregation=aggregation,
            )

    for staleness, aggregation, weight in itertools.product(
        STALENESS, AGGREGATIONS, ("importance", "none", "ppo_clip")
    ):
        yield Case(
            ratio="product",
            weight=weight,
            kl_old=KL,
            staleness=staleness,
            aggregation=aggregation,
        )

    # Responses of a single token.
    for kind, direction in itertools.product(KL_KINDS, DIRECTIONS):
        yield Case(kl_placement="loss", kl_kind=kind, kl_direction=direction, max_tokens=1)


def _entropy_slices() -> Iterator[Case]:
    for (estimator, parameters), entropy, staleness in itertools.product(
        ESTIMATORS, ("bonus", "temperature"), ("on_policy", "live_moved")
    ):
        yield Case(
            estimator=estimator,
            parameters=parameters,
            entropy=entropy,
            staleness=staleness,
            kl_placement=_placement_of(estimator),
            rewards=_rewards_of(estimator),
            ratio="product",
            weight="importance",
        )


def _correction_slices() -> Iterator[Case]:
    for (estimator, parameters), (level, bounds), staleness, weight in itertools.product(
        ESTIMATORS, CORRECTIONS, ("engine_mismatch", "both"), ("none", "importance")
    ):
        yield Case(
            estimator=estimator,
            parameters=parameters,
            correction=level,
            correction_parameters=bounds,
            staleness=staleness,
            kl_placement=_placement_of(estimator),
            rewards=_rewards_of(estimator),
            ratio="product",
            weight=weight,
        )


def _recompute_slices() -> Iterator[Case]:
    for (estimator, parameters), recompute, staleness, weight, masked in itertools.product(
        ESTIMATORS, (False, True), STALENESS, ("none", "ppo_clip"), (False, True)
    ):
        yield Case(
            estimator=estimator,
            parameters=parameters,
            recompute=recompute,
            staleness=staleness,
            weight=weight,
            mask_truncated=masked,
            kl_placement=_placement_of(estimator),
            rewards=_rewards_of(estimator),
            group=3,
        )


def _hierarchical_slices() -> Iterator[Case]:
    """Yield drifted batches of several groups.

    One group's shrinkage coefficient may follow from another's lengths there.
    """
    variants = [parameters for name, parameters in ESTIMATORS if name == "hierarchical"]
    drifts = (("engine_mismatch", False), ("both", True))
    for parameters, (prompts, group), (staleness, recompute), max_tokens in itertools.product(
        variants, ((1, 3), (2, 3)), drifts, (2, 3)
    ):
        if prompts * max_tokens > 4:
            continue  # 400 batches
        yield Case(
            estimator="hierarchical",
            parameters=parameters,
            recompute=recompute,
            staleness=staleness,
            prompts=prompts,
            group=group,
            max_tokens=max_tokens,
        )


def _preset_slices() -> Iterator[Case]:
    for preset, staleness, rewards, (prompts, group) in itertools.product(
        PRESETS, STALENESS, ("normal", "binary"), ((1, 3), (2, 2))
    ):
        yield Case(
            preset=preset,
            staleness=staleness,
            rewards=rewards,
            prompts=prompts,
            group=group,
        )


def _drawn_rewards(draw: random.Random, estimator: str) -> str:
    drawn = draw.choices(("normal", "binary"), (3, 1))[0]
    return "binary" if estimator in OF_PROBABILITIES else drawn


def random_case(draw: random.Random) -> Case:
    """Draw a case from every dimension at once."""
    estimator, parameters = draw.choice(ESTIMATORS)
    weight, weight_parameters = draw.choice(WEIGHTS)
    correction, bounds = draw.choice([("none", ()), ("none", ()), *CORRECTIONS])
    prompts, group = draw.choice(SHAPES)
    lengths, max_tokens = draw.choice((("mixed", 2), ("mixed", 3), ("equal", 2)))
    placements = ("none", "loss", "reward", "advantage")
    return Case(
        estimator=estimator,
        parameters=parameters,
        recompute=draw.random() < 0.15,
        ratio=draw.choice(RATIOS),
        weight=weight,
        weight_parameters=weight_parameters,
        aggregation=draw.choice(AGGREGATIONS),
        kl_placement=draw.choice(placements)
        if estimator != "token_kl_grpo"
        else draw.choices(placements, (1, 1, 1, 6))[0],
        kl_kind=draw.choice(KL_KINDS),
        kl_direction=draw.choices(DIRECTIONS, (3, 1))[0],
        kl_level=draw.choices(KL_LEVELS, (4, 1))[0],
        kl_ratio=draw.choices(KL_RATIOS, (4, 1, 1, 1))[0],
        kl_old=draw.choice((0.0, 0.0, 0.0, KL)),
        entropy=draw.choices(("none", "bonus", "temperature"), (3, 1, 1))[0],
        correction=correction,
        correction_parameters=bounds,
        mask_truncated=draw.random() < 0.2,
        staleness=draw.choice(STALENESS),
        lengths=lengths,
        rewards=_drawn_rewards(draw, estimator),
        prompts=prompts,
        group=group,
        max_tokens=max_tokens,
        microbatch_tokens=draw.choice((4096, 3)),
    )
