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
    OldKLConfig,
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


def _kl(coefficient: float, placement: Literal["loss", "reward", "advantage"]) -> KLConfig:
    """With the estimator that is right there: k1 in reward and advantage, k3 in the loss."""
    return KLConfig(coefficient=coefficient, placement=placement)


PRESETS: Mapping[str, AlgorithmConfig] = MappingProxyType(
    {
        # Williams 1992: the score-function gradient of the expected reward, summed over the tokens of a response.
        "reinforce": _preset("reinforce", "none", "sequence_sum"),
        "reinforce_optimal_baseline": _preset(
            "optimal_baseline", "none", "sequence_sum", estimator_parameters={"leave_one_out": True}
        ),
        # Ahmadian et al. 2024: leave-one-out baseline, the KL as a cost in the reward.
        "rloo": _preset("rloo", "none", "sequence_sum", kl=_kl(0.01, "reward")),
        # Schulman et al. 2017 as in RLHF (Ouyang et al. 2022). Without a critic V = 0: whitened returns.
        "ppo": _preset(
            "gae",
            "ppo_clip",
            "token_mean",
            estimator_parameters={"whiten": True},
            kl=_kl(0.01, "reward"),
        ),
        # Schulman et al. 2017, equation 8: KL(old || live) as a penalty with an adaptive coefficient in place of the clip. Needs several updates a
        # batch.
        "ppo_kl_penalty": _preset(
            "gae",
            "importance",
            "token_mean",
            estimator_parameters={"whiten": True},
            kl=_kl(0.01, "reward"),
            kl_old=OldKLConfig(coefficient=1.0, target=0.01),
        ),
        # Shao et al. 2024.
        "grpo": _preset("grpo", "ppo_clip", "sequence_mean", kl=_kl(0.04, "loss")),
        # Guo et al. 2025, equations 1 to 3: the ratio and the KL of whole responses, one term each a response.
        "grpo_response": _preset(
            "grpo",
            "ppo_clip",
            "sequence_sum",
            ratio="product",
            kl=KLConfig(coefficient=0.001, placement="loss", level="sequence"),
        ),
        # GRPO whose rewards are net of the KL, R - beta sum_t log(pi / ref), before the group's mean and deviation. The KL of a prompt itself would
        # cancel in the group's mean, so each response pays for its own.
        "grpo_kl_cost": _preset("grpo", "ppo_clip", "sequence_mean", kl=_kl(0.01, "reward")),
        # Liu et al. 2025: no division by the standard deviation, none by the response's length.
        "dr_grpo": _preset(
            "grpo", "ppo_clip", "constant", estimator_parameters={"divide_by_std": False}
        ),
        # Chu et al. 2025: the plain policy gradient with the group's mean, over the responses that have one; every token counts the same.
        "gpg": _preset("gpg", "none", "token_mean"),
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
        # The same with one gate a response.
        "sapo_sequence": _preset(
            "grpo",
            "sapo_sequence",
            "sequence_mean",
            ratio="sequence",
            weight_parameters={"tau_pos": 1.0, "tau_neg": 1.05},
        ),
        # MiniMax 2025: bounded importance weights on every token.
        "cispo": _preset(
            "grpo", "cispo", "token_mean", weight_parameters={"clip_low": 1.0, "clip_high": 0.28}
        ),
        # Dong et al. 2023: maximum likelihood on the responses that were rewarded (rewards 0 or 1).
        "raft": _preset("reinforce", "none", "sequence_mean"),
        # Xiong et al. 2025, A Minimalist Approach: RAFT with importance sampling and clipping.
        "raft_plus_plus": _preset("reinforce", "ppo_clip", "sequence_mean"),
        # Bai and Zhang 2026: the KL inside the advantage, token by token; one H, so a sum over tokens and not the mean of each response.
        "token_kl_grpo": _preset(
            "token_kl_grpo",
            "ppo_clip",
            "constant",
            ratio="future",
            kl=_kl(0.04, "advantage"),
        ),
        # docs/hierarchical_baselines.md: importance-corrected weights, so the objective has no ratio of its own.
        "hierarchical": AlgorithmConfig(
            advantage=AdvantageConfig(name="hierarchical", recompute=True),
            objective=ObjectiveConfig(weight="none"),
            aggregation="sequence_sum",
        ),
        # Dong 2025, equation 2.10: each reward with the product of ratios up to its own time.
        "reward_time": _preset(
            "gae", "reward_time", "sequence_sum", ratio="prefix", kl=_kl(0.01, "reward")
        ),
        # Bai and Zhang 2026: min(rho A, sqrt(rho) A), an example of their general family.
        "minimum": _preset(
            "grpo",
            "minimum",
            "sequence_mean",
            weight_parameters={"functions": [{"kind": "ratio"}, {"kind": "power", "q": 0.5}]},
        ),
        # Bai and Zhang 2026: rho^q, between no correction and the full one.
        "power": _preset("grpo", "power", "sequence_mean", weight_parameters={"q": 0.5}),
        "adaptive_power": _preset(
            "grpo", "adaptive_power", "sequence_mean", weight_parameters={"target_ess": 0.9}
        ),
    }
)
