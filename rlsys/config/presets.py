"""Published algorithms as settings of the pieces: a preset is data, the pieces do the work.

    estimator x (ratio, weight) x aggregation x KL placement, and what the driver adds

`--preset NAME` starts any recipe from one, and so does a recipe itself:
`evolve(grpo_math(hardware), {"preset": "dapo"})`. It replaces the section `algorithm` and
`policy.num_mini_batches`, the number of updates per batch, because a correction by the ratio does
nothing in a single update and a plain score function does not correct a second one. Group size,
epochs and learning rate belong to the recipe. Imports neither torch nor NumPy, as all of
`rlsys.config`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from rlsys.config.algorithm import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    DynamicSamplingConfig,
    KLConfig,
    ObjectiveConfig,
    OldKLConfig,
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published algorithm."""

    description: str  # one line, with the source
    algorithm: AlgorithmConfig
    num_mini_batches: int  # updates per batch


def preset_called(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(PRESETS)}."
        raise ValueError(f"preset: unknown preset {name!r}. {hint}")
    return PRESETS[name]


def _preset(
    description: str,
    estimator: str,
    weight: str,
    aggregation: Aggregation,
    *,
    num_mini_batches: int,
    ratio: str = "token",
    estimator_parameters: Mapping[str, Any] | None = None,
    weight_parameters: Mapping[str, Any] | None = None,
    recompute: bool = False,
    **more: Any,
) -> Preset:
    algorithm = AlgorithmConfig(
        advantage=AdvantageConfig(
            name=estimator, parameters=dict(estimator_parameters or {}), recompute=recompute
        ),
        objective=ObjectiveConfig(
            ratio=ratio, weight=weight, parameters=dict(weight_parameters or {})
        ),
        aggregation=aggregation,
        **more,
    )
    return Preset(description=description, algorithm=algorithm, num_mini_batches=num_mini_batches)


def _kl(coefficient: float, placement: Literal["loss", "reward", "advantage"]) -> KLConfig:
    """Return a KL with the estimator that is right there: k3 in the loss, else k1."""
    return KLConfig(coefficient=coefficient, placement=placement)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "reinforce": _preset(
            "The score-function gradient of the expected reward, no baseline (Williams 1992).",
            "reinforce",
            "none",
            "sequence_sum",
            num_mini_batches=1,
        ),
        "reinforce_optimal_baseline": _preset(
            "REINFORCE with the constant baseline of least variance (Greensmith et al. 2004).",
            "optimal_baseline",
            "none",
            "sequence_sum",
            num_mini_batches=1,
            estimator_parameters={"leave_one_out": True},
        ),
        "rloo": _preset(
            "Leave-one-out baseline, the KL as a cost in the reward (Ahmadian et al. 2024).",
            "rloo",
            "none",
            "sequence_sum",
            num_mini_batches=1,
            kl=_kl(0.01, "reward"),
        ),
        # Without a critic V = 0: whitened returns.
        "ppo": _preset(
            "PPO's clip, the KL in the reward; no critic yet, so whitened returns "
            "(Schulman et al. 2017, Ouyang et al. 2022).",
            "gae",
            "ppo_clip",
            "token_mean",
            num_mini_batches=2,
            estimator_parameters={"whiten": True},
            kl=_kl(0.01, "reward"),
        ),
        "ppo_kl_penalty": _preset(
            "PPO with an adaptive penalty on KL(old || live) in place of the clip "
            "(Schulman et al. 2017, equation 8).",
            "gae",
            "importance",
            "token_mean",
            num_mini_batches=2,
            estimator_parameters={"whiten": True},
            kl=_kl(0.01, "reward"),
            kl_old=OldKLConfig(coefficient=1.0, target=0.01),
        ),
        # One update per batch, as published.
        "grpo": _preset(
            "Group-relative advantages, mean over each response, KL 0.04 in the loss "
            "(Shao et al. 2024). recipes.grpo_math differs: mean over all tokens, no KL.",
            "grpo",
            "ppo_clip",
            "sequence_mean",
            num_mini_batches=1,
            kl=_kl(0.04, "loss"),
        ),
        "grpo_response": _preset(
            "GRPO with the ratio and the KL of whole responses, one term each "
            "(Guo et al. 2025, equations 1 to 3).",
            "grpo",
            "ppo_clip",
            "sequence_sum",
            num_mini_batches=2,
            ratio="product",
            kl=KLConfig(coefficient=0.001, placement="loss", level="sequence"),
        ),
        # R - beta sum_t log(pi / ref), before the group's mean and deviation. The KL of a prompt
        # itself would cancel in the group's mean, so each response pays for its own.
        "grpo_kl_cost": _preset(
            "GRPO on rewards net of each response's KL to the reference.",
            "grpo",
            "ppo_clip",
            "sequence_mean",
            num_mini_batches=1,
            kl=_kl(0.01, "reward"),
        ),
        "dr_grpo": _preset(
            "GRPO without the division by the standard deviation and by the response's length "
            "(Liu et al. 2025).",
            "grpo",
            "ppo_clip",
            "constant",
            num_mini_batches=2,
            estimator_parameters={"divide_by_std": False},
        ),
        "gpg": _preset(
            "The plain policy gradient with the group's mean, over the responses that have one "
            "(Chu et al. 2025).",
            "gpg",
            "none",
            "token_mean",
            num_mini_batches=1,
        ),
        # The soft overlong punishment is the reward `soft_overlong`; recipes.dapo_math adds it.
        "dapo": _preset(
            "Clip-Higher, token-level loss, dynamic sampling, no KL (Yu et al. 2025). "
            "recipes.dapo_math adds its length punishment.",
            "grpo",
            "ppo_clip",
            "token_mean",
            num_mini_batches=2,
            weight_parameters={"clip_low": 0.2, "clip_high": 0.28},
            dynamic_sampling=DynamicSamplingConfig(max_rounds=3),
        ),
        "gspo": _preset(
            "One ratio per response, a geometric mean, clipped in a narrow band "
            "(Zheng et al. 2025).",
            "grpo",
            "ppo_clip",
            "sequence_mean",
            num_mini_batches=2,
            ratio="sequence",
            weight_parameters={"clip_low": 3e-4, "clip_high": 4e-4},
        ),
        "sapo": _preset(
            "A soft gate in place of the clip, narrower for negative advantages (Gao et al. 2025).",
            "grpo",
            "sapo",
            "sequence_mean",
            num_mini_batches=2,
            weight_parameters={"tau_pos": 1.0, "tau_neg": 1.05},
        ),
        "sapo_sequence": _preset(
            "SAPO with one gate per response (Gao et al. 2025).",
            "grpo",
            "sapo_sequence",
            "sequence_mean",
            num_mini_batches=2,
            ratio="sequence",
            weight_parameters={"tau_pos": 1.0, "tau_neg": 1.05},
        ),
        "cispo": _preset(
            "Bounded importance weights that leave every token a gradient (MiniMax 2025).",
            "grpo",
            "cispo",
            "token_mean",
            num_mini_batches=2,
            weight_parameters={"clip_low": 1.0, "clip_high": 0.28},
        ),
        "raft": _preset(
            "Maximum likelihood on the rewarded responses, for rewards of 0 and 1 "
            "(Dong et al. 2023).",
            "reinforce",
            "none",
            "sequence_mean",
            num_mini_batches=1,
        ),
        "raft_plus_plus": _preset(
            "RAFT with importance sampling and PPO's clip (Xiong et al. 2025).",
            "reinforce",
            "ppo_clip",
            "sequence_mean",
            num_mini_batches=2,
        ),
        # One H, so a sum over tokens and not the mean of each response.
        "token_kl_grpo": _preset(
            "GRPO with the KL inside the advantage, token by token (Bai and Zhang 2026).",
            "token_kl_grpo",
            "ppo_clip",
            "constant",
            num_mini_batches=2,
            ratio="future",
            kl=_kl(0.04, "advantage"),
        ),
        # Importance-corrected weights, so the objective has no ratio of its own.
        "hierarchical": _preset(
            "Importance-corrected weights less a baseline per horizon of the ratio, estimated "
            "again before each mini-batch (docs/hierarchical_baselines.md).",
            "hierarchical",
            "none",
            "sequence_sum",
            num_mini_batches=4,
            recompute=True,
        ),
        "reward_time": _preset(
            "Each reward with the product of ratios up to its own time (Dong 2025, equation 2.10).",
            "gae",
            "reward_time",
            "sequence_sum",
            num_mini_batches=2,
            ratio="prefix",
            kl=_kl(0.01, "reward"),
        ),
        "minimum": _preset(
            "min(rho A, sqrt(rho) A), of the general family of corrections (Bai and Zhang 2026).",
            "grpo",
            "minimum",
            "sequence_mean",
            num_mini_batches=2,
            weight_parameters={"functions": [{"kind": "ratio"}, {"kind": "power", "q": 0.5}]},
        ),
        "power": _preset(
            "rho^q, between no correction and the full one (Bai and Zhang 2026).",
            "grpo",
            "power",
            "sequence_mean",
            num_mini_batches=2,
            weight_parameters={"q": 0.5},
        ),
        "adaptive_power": _preset(
            "rho^q with the largest q that keeps 90 % of the effective sample size.",
            "grpo",
            "adaptive_power",
            "sequence_mean",
            num_mini_batches=2,
            weight_parameters={"target_ess": 0.9},
        ),
    }
)
