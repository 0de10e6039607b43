"""Published algorithms as settings of the section `algorithm`.

    estimator x (ratio, weight) x aggregation x KL placement, and dynamic sampling

A recipe starts from a preset with the flag `--preset NAME`, or in its code:
`evolve(grpo_math(hardware), {"preset": "dapo"})`. The preset replaces the section `algorithm`,
`policy.num_mini_batches`, the number of updates per batch, and `critic.enabled`. The number of
updates is part of the algorithm: in a single update every ratio is 1, and a weight that ignores the
ratio does not correct for a second one. Group size, epochs and learning rates belong to the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from rlsys.config.algorithm import (
    AdvantageConfig,
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
    critic: bool = False


def preset_called(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        ValueError: there is none; the message suggests similar names.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(PRESETS)}."
        raise ValueError(f"preset: unknown preset {name!r}. {hint}")
    return PRESETS[name]


def _estimator(name: str, *, recompute: bool = False, **parameters: Any) -> AdvantageConfig:
    return AdvantageConfig(name=name, parameters=parameters, recompute=recompute)


def _objective(weight: str, *, ratio: str = "token", **parameters: Any) -> ObjectiveConfig:
    return ObjectiveConfig(ratio=ratio, weight=weight, parameters=parameters)


def _kl(coefficient: float, placement: Literal["loss", "reward", "advantage"]) -> KLConfig:
    """Return a KL with the estimator that suits its placement: k3 in the loss, else k1."""
    return KLConfig(coefficient=coefficient, placement=placement)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "reinforce": Preset(
            description="Policy gradient without a baseline (Williams 1992).",
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("reinforce"),
                objective=_objective("none"),
                aggregation="sequence_sum",
            ),
        ),
        "reinforce_optimal_baseline": Preset(
            description=(
                "REINFORCE with the constant baseline of least variance (Greensmith et al. 2004)."
            ),
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("optimal_baseline", leave_one_out=True),
                objective=_objective("none"),
                aggregation="sequence_sum",
            ),
        ),
        "rloo": Preset(
            description="Leave-one-out baseline, KL penalty in the reward (Ahmadian et al. 2024).",
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("rloo"),
                objective=_objective("none"),
                aggregation="sequence_sum",
                kl=_kl(0.01, "reward"),
            ),
        ),
        # lam 0.95 is that of Stiennon et al. 2020, on which Ouyang et al. build.
        "ppo": Preset(
            description=(
                "PPO with a critic: clip, GAE, whitened advantages, clipped values, KL penalty in "
                "the reward (Schulman et al. 2017, Ouyang et al. 2022)."
            ),
            num_mini_batches=2,
            critic=True,
            algorithm=AlgorithmConfig(
                advantage=_estimator("gae", lam=0.95, whiten=True),
                objective=_objective("ppo_clip"),
                aggregation="token_mean",
                kl=_kl(0.01, "reward"),
            ),
        ),
        # Without a critic: with V = 0, GAE gives the returns.
        "ppo_kl_penalty": Preset(
            description=(
                "PPO with an adaptive penalty on KL(old || live) instead of the clip, without a "
                "critic (Schulman et al. 2017, equation 8)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("gae", whiten=True),
                objective=_objective("importance"),
                aggregation="token_mean",
                kl=_kl(0.01, "reward"),
                kl_old=OldKLConfig(coefficient=1.0, target=0.01),
            ),
        ),
        # One update per batch, as published.
        "grpo": Preset(
            description=(
                "Group-relative advantages, mean over each response, KL 0.04 in the loss (Shao "
                "et al. 2024). recipes.grpo_math differs: mean over all tokens, no KL."
            ),
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("ppo_clip"),
                aggregation="sequence_mean",
                kl=_kl(0.04, "loss"),
            ),
        ),
        "grpo_response": Preset(
            description=(
                "GRPO with the ratio and the KL of the whole response (Guo et al. 2025, "
                "equations 1 to 3)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("ppo_clip", ratio="product"),
                aggregation="sequence_sum",
                kl=KLConfig(coefficient=0.001, placement="loss", level="sequence"),
            ),
        ),
        # Reward R - beta sum_t log(pi / ref), before it is normalised by the group's mean and
        # standard deviation. A KL that is equal for all responses to a prompt would cancel there.
        "grpo_kl_cost": Preset(
            description="GRPO on rewards minus each response's KL to the reference.",
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("ppo_clip"),
                aggregation="sequence_mean",
                kl=_kl(0.01, "reward"),
            ),
        ),
        "dr_grpo": Preset(
            description=(
                "GRPO without dividing by the standard deviation and the response length (Liu "
                "et al. 2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo", divide_by_std=False),
                objective=_objective("ppo_clip"),
                aggregation="constant",
            ),
        ),
        "gpg": Preset(
            description=(
                "Policy gradient with the group mean as baseline, scaled up for the responses "
                "without a gradient (Chu et al. 2025)."
            ),
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("gpg"),
                objective=_objective("none"),
                aggregation="token_mean",
            ),
        ),
        # The paper's overlong penalty is the reward `soft_overlong`; recipes.dapo_math adds it.
        "dapo": Preset(
            description=(
                "Clip-Higher, token-level loss, dynamic sampling, no KL (Yu et al. 2025). "
                "recipes.dapo_math adds the overlong penalty."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("ppo_clip", clip_low=0.2, clip_high=0.28),
                aggregation="token_mean",
                dynamic_sampling=DynamicSamplingConfig(max_rounds=3),
            ),
        ),
        "gspo": Preset(
            description=(
                "GRPO with one ratio per response, the geometric mean over its tokens, clipped "
                "to a narrow range (Zheng et al. 2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective(
                    "ppo_clip", ratio="sequence", clip_low=0.0003, clip_high=0.0004
                ),
                aggregation="sequence_mean",
            ),
        ),
        "sapo": Preset(
            description=(
                "GRPO with a soft gate instead of the clip, narrower for negative advantages "
                "(Gao et al. 2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("sapo", tau_pos=1.0, tau_neg=1.05),
                aggregation="sequence_mean",
            ),
        ),
        "sapo_sequence": Preset(
            description="SAPO with one gate per response (Gao et al. 2025).",
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("sapo_sequence", ratio="sequence", tau_pos=1.0, tau_neg=1.05),
                aggregation="sequence_mean",
            ),
        ),
        "cispo": Preset(
            description=(
                "GRPO with clipped importance weights, which keep the gradient of every token "
                "(MiniMax 2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("cispo", clip_low=1.0, clip_high=0.28),
                aggregation="token_mean",
            ),
        ),
        "gmpo": Preset(
            description=(
                "GRPO with the geometric mean of each response's ratios, clipped token by token "
                "(Zhao et al. 2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("gmpo", clip_low=0.4, clip_high=0.4),
                aggregation="sequence_mean",
            ),
        ),
        # The sequence ratio's gradient is that of the token times 1/|y|, as GSPO's mean over
        # tokens is; LUSPO multiplies by |y|, which leaves the sum.
        "luspo": Preset(
            description="GSPO with each response's loss times its length (Liu et al. 2026).",
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective(
                    "ppo_clip", ratio="sequence", clip_low=0.002, clip_high=0.0025
                ),
                aggregation="sequence_sum",
            ),
        ),
        "dppo_tv": Preset(
            description=(
                "GRPO with a trust region in total variation instead of the clip (Qi et al. 2026)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("dppo_tv", delta_low=0.15, delta_high=0.15),
                aggregation="token_mean",
            ),
        ),
        "dppo_kl": Preset(
            description=(
                "GRPO with a trust region in KL divergence instead of the clip (Qi et al. 2026)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("dppo_kl", delta_low=0.05, delta_high=0.05),
                aggregation="token_mean",
            ),
        ),
        "vespo": Preset(
            description=(
                "GRPO with a soft gate on the ratio of the whole response (Shen et al. 2026)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective(
                    "vespo",
                    ratio="product",
                    k_pos=2.0,
                    lambda_pos=3.0,
                    k_neg=3.0,
                    lambda_neg=2.0,
                ),
                aggregation="token_mean",
            ),
        ),
        "clip_cov": Preset(
            description=(
                "GRPO without the gradient of some tokens that lower the entropy most (Cui et al. "
                "2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("clip_cov", fraction=0.0002, lowest=1.0, highest=5.0),
                aggregation="token_mean",
            ),
        ),
        "kl_cov": Preset(
            description=(
                "GRPO with a penalty on the drift of the tokens that lower the entropy most (Cui "
                "et al. 2025)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("kl_cov", fraction=0.002, coefficient=1.0),
                aggregation="token_mean",
            ),
        ),
        "raft": Preset(
            description=(
                "Maximum likelihood on the rewarded responses, for rewards of 0 and 1 "
                "(Dong et al. 2023)."
            ),
            num_mini_batches=1,
            algorithm=AlgorithmConfig(
                advantage=_estimator("reinforce"),
                objective=_objective("none"),
                aggregation="sequence_mean",
            ),
        ),
        "raft_plus_plus": Preset(
            description="RAFT with importance sampling and PPO's clip (Xiong et al. 2025).",
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("reinforce"),
                objective=_objective("ppo_clip"),
                aggregation="sequence_mean",
            ),
        ),
        # The paper divides every response by the same length H: a sum over tokens, no mean.
        "token_kl_grpo": Preset(
            description="GRPO with the KL of each token inside the advantage (Bai and Zhang 2026).",
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("token_kl_grpo"),
                objective=_objective("ppo_clip", ratio="future"),
                aggregation="constant",
                kl=_kl(0.04, "advantage"),
            ),
        ),
        # The advantages contain the importance ratios, so the objective has none.
        "hierarchical": Preset(
            description=(
                "Importance-weighted gradient with one baseline per ratio horizon, recomputed "
                "before each mini-batch (docs/hierarchical_baselines.md)."
            ),
            num_mini_batches=4,
            algorithm=AlgorithmConfig(
                advantage=_estimator("hierarchical", recompute=True),
                objective=_objective("none"),
                aggregation="sequence_sum",
            ),
        ),
        "reward_time": Preset(
            description=(
                "Each reward weighted by the product of the ratios up to its own token (Dong "
                "2025, equation 2.10)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("gae"),
                objective=_objective("reward_time", ratio="prefix"),
                aggregation="sequence_sum",
                kl=_kl(0.01, "reward"),
            ),
        ),
        "minimum": Preset(
            description=(
                "Weight min(rho A, sqrt(rho) A), from a family of off-policy corrections (Bai "
                "and Zhang 2026)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective(
                    "minimum", functions=[{"kind": "ratio"}, {"kind": "power", "q": 0.5}]
                ),
                aggregation="sequence_mean",
            ),
        ),
        "power": Preset(
            description=(
                "Weight rho^q, between no correction (q 0) and the importance ratio (q 1) (Bai "
                "and Zhang 2026)."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("power", q=0.5),
                aggregation="sequence_mean",
            ),
        ),
        "adaptive_power": Preset(
            description=(
                "Weight rho^q with the largest q that keeps 90 % of the effective sample size."
            ),
            num_mini_batches=2,
            algorithm=AlgorithmConfig(
                advantage=_estimator("grpo"),
                objective=_objective("adaptive_power", target_ess=0.9),
                aggregation="sequence_mean",
            ),
        ),
    }
)
