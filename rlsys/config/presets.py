"""Published algorithms as settings of the pieces: a preset is data, the pieces do the work.

    estimator x (ratio, weight) x aggregation x KL placement, and what the driver adds (dynamic sampling)

A recipe takes one whole (`PRESETS["dapo"]`) or changes a field of it (`model_copy(update=...)`). Group size, mini-batches, epochs
and learning rate belong to the recipe. Imports neither torch nor NumPy, as all of `rlsys.config`;
`rlsys.algorithms.policy_objectives.presets` offers the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from rlsys.config.algorithm import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    DynamicSamplingConfig,
    KLConfig,
    ObjectiveConfig,
)


def _preset(
    estimator: str,
    weight: str,
    aggregation: Aggregation,
    *,
    ratio: str = "token",
    estimator_parameters: Mapping[str, Any] | None = None,
    weight_parameters: Mapping[str, Any] | None = None,
    **more: Any,
) -> AlgorithmConfig:
    return AlgorithmConfig(
        advantage=AdvantageConfig(name=estimator, parameters=dict(estimator_parameters or {})),
        objective=ObjectiveConfig(
            ratio=ratio, weight=weight, parameters=dict(weight_parameters or {})
        ),
        aggregation=aggregation,
        **more,
    )


def _kl(
    coefficient: float,
    placement: Literal["loss", "reward", "advantage"],
    kind: Literal["k1", "k2", "k3"],
) -> KLConfig:
    return KLConfig(coefficient=coefficient, placement=placement, kind=kind)


PRESETS: Mapping[str, AlgorithmConfig] = MappingProxyType(
    {
        # Williams 1992: the score-function gradient of the expected reward, summed over the tokens of a response.
        "reinforce": _preset("reinforce", "none", "sequence_sum"),
        "reinforce_optimal_baseline": _preset(
            "optimal_baseline", "none", "sequence_sum", estimator_parameters={"leave_one_out": True}
        ),
        # Ahmadian et al. 2024: leave-one-out baseline, the KL as a cost in the reward.
        "rloo": _preset("rloo", "none", "sequence_sum", kl=_kl(0.01, "reward", "k1")),
        # Schulman et al. 2017 as in RLHF (Ouyang et al. 2022). Without a critic V = 0: whitened returns.
        "ppo": _preset(
            "gae",
            "ppo_clip",
            "token_mean",
            estimator_parameters={"whiten": True},
            kl=_kl(0.01, "reward", "k1"),
        ),
        # Shao et al. 2024.
        "grpo": _preset("grpo", "ppo_clip", "sequence_mean", kl=_kl(0.04, "loss", "k3")),
        # Liu et al. 2025: no division by the standard deviation, none by the response's length.
        "dr_grpo": _preset(
            "grpo", "ppo_clip", "constant", estimator_parameters={"divide_by_std": False}
        ),
        # Chu et al. 2025: the plain policy gradient with the group's mean; every token counts the same.
        "gpg": _preset("grpo", "none", "token_mean", estimator_parameters={"divide_by_std": False}),
        # Yu et al. 2025: Clip-Higher, token-level loss, dynamic sampling, no KL; the soft overlong punishment is the reward `soft_overlong`.
        "dapo": _preset(
            "grpo",
            "ppo_clip",
            "token_mean",
            weight_parameters={"clip_low": 0.2, "clip_high": 0.28},
            dynamic_sampling=DynamicSamplingConfig(max_rounds=3),
        ),
        # Zheng et al. 2025: the ratio of whole sequences, a geometric mean, in a narrow band.
        "gspo": _preset(
            "grpo",
            "ppo_clip",
            "sequence_mean",
            ratio="sequence",
            weight_parameters={"clip_low": 3e-4, "clip_high": 4e-4},
        ),
        # Gao et al. 2025: a soft gate in place of the clip, narrower for negative advantages.
        "sapo": _preset(
            "grpo", "sapo", "sequence_mean", weight_parameters={"tau_pos": 1.0, "tau_neg": 1.05}
        ),
        # MiniMax 2025: bounded importance weights on every token.
        "cispo": _preset(
            "grpo", "cispo", "token_mean", weight_parameters={"clip_low": 1.0, "clip_high": 0.28}
        ),
        # Dong et al. 2023: maximum likelihood on the responses that were rewarded (rewards 0 or 1).
        "raft": _preset("reinforce", "none", "sequence_mean"),
        # Xiong et al. 2025, A Minimalist Approach: RAFT with importance sampling and clipping.
        "raft_plus_plus": _preset("reinforce", "ppo_clip", "sequence_mean"),
        # Bai and Zhang 2026: the KL inside the advantage, token by token.
        "token_kl_grpo": _preset(
            "token_kl_grpo",
            "ppo_clip",
            "sequence_mean",
            ratio="future",
            kl=_kl(0.04, "advantage", "k1"),
        ),
        # docs/hierarchical_baselines.md: importance-corrected weights, so the objective has no ratio of its own.
        "hierarchical": AlgorithmConfig(
            advantage=AdvantageConfig(name="hierarchical", recompute=True),
            objective=ObjectiveConfig(weight="none"),
            aggregation="sequence_sum",
        ),
        # Bai and Zhang 2026: rho^q, between no correction and the full one.
        "power": _preset("grpo", "power", "sequence_mean", weight_parameters={"q": 0.5}),
        "adaptive_power": _preset(
            "grpo", "adaptive_power", "sequence_mean", weight_parameters={"target_ess": 0.9}
        ),
    }
)
