"""The mathematics of an update, by name: advantage estimator, objective, aggregation, KL, entropy."""

from typing import Any, Literal

from pydantic import Field

from rlsys.config.section import Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
GroupFilter = Literal["accuracy", "reward"]


class AuxiliaryConfig(Section):
    """The small network on the policy's hidden states that some estimators read and teach."""

    width: int = Field(default=64, ge=1, description="Units of its hidden layer.")
    learning_rate: float = Field(
        default=3e-3, gt=0, description="Of its optimizer; one step per mini-batch."
    )


class AdvantageConfig(Section):
    name: str = Field(default="grpo", description="A registered advantage estimator.")
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the estimator, checked against its signature. A max_tokens that is null follows generation.max_tokens.",
    )
    recompute: bool = Field(
        default=False,
        description="Before each mini-batch, take the live policy's log-probabilities as `old` and estimate its advantages again: only for "
        "estimators that correct for the policy having moved since sampling, with objective.weight none.",
    )
    auxiliary: AuxiliaryConfig = Field(
        default=AuxiliaryConfig(),
        description="The network beside the policy, of estimators that have one.",
    )


class ObjectiveConfig(Section):
    ratio: str = Field(
        default="token",
        description="Level of the probability ratio: token, sequence, future, prefix or product.",
    )
    weight: str = Field(
        default="ppo_clip",
        description="Weight function of the ratio: none, importance, ppo_clip, ...",
    )
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the weight, such as clip_low and clip_high, checked against its signature.",
    )


class KLConfig(Section):
    coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the KL to the reference. 0: the reference model does not run.",
    )
    kind: Literal["k1", "k2", "k3", "k3_k2", "exact"] | None = Field(
        default=None,
        description="Schulman's estimator of the KL. null: k1 in the reward and the advantage, k3 in the loss. Others than k1 in the reward "
        "are refused: they drive the policy away from the reference. In the loss: k2 has the gradient of each position's KL, k3_k2 too "
        "with the value of k3; k3 alone (GRPO's) has that of the forward KL, and that of the KL itself with an importance ratio; k1 needs one. "
        "exact (over the vocabulary) is refused: the reference sends log-probabilities of sampled tokens alone.",
    )
    direction: Literal["reverse", "forward"] = Field(
        default="reverse",
        description="reverse: KL(policy || reference). forward: KL(reference || policy), in the loss with an importance ratio.",
    )
    placement: Literal["loss", "reward", "advantage"] = Field(
        default="loss",
        description="Where the KL enters: a term of the loss; a cost of each token in the reward; or inside the advantage (token_kl_grpo).",
    )
    level: Literal["token", "sequence"] = Field(
        default="token",
        description="In the loss: the KL of each token, or of the whole response, from the sum of its log-ratios.",
    )
    importance_ratio: Literal["none", "token", "prefix", "product"] = Field(
        default="none",
        description="In the loss: multiply the KL term by live / old, of the token, of all tokens up to it, or (level sequence) of the response; "
        "corrects for samples of an older policy, and lets k1, k3 and the forward direction have the gradient that they name. none: do not.",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="KL a token (k3) that the coefficient is adapted to reach. null: the coefficient is fixed.",
    )
    horizon: float = Field(
        default=50.0,
        gt=0,
        description="Steps over which an adaptive coefficient may change by a fifth.",
    )

    @property
    def estimator(self) -> str:
        """The kind, or the one that is right for the placement."""
        if self.kind is not None:
            return self.kind
        return "k3" if self.placement == "loss" else "k1"


class OldKLConfig(Section):
    """KL(old || live) as a penalty: a trust region around the policy that sampled, in place of the clip or beside it."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the KL from the old to the live policy in the loss. 0: none.",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="KL a token that a batch's updates should reach: the coefficient is doubled above 1.5 times it and halved below "
        "it / 1.5, after each batch (one more forward pass). null: the coefficient is fixed.",
    )


class EntropyConfig(Section):
    bonus: float = Field(
        default=0.0, ge=0, description="Weight of an entropy bonus in the loss. 0: none."
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Maximum-entropy RL: each token earns -temperature * log pi in the reward. 0: none.",
    )
    target: float | None = Field(
        default=None,
        ge=0,
        description="Entropy a token, in nats, that the temperature is tuned to reach. null: it is fixed.",
    )
    learning_rate: float = Field(
        default=0.05, gt=0, description="Step of that tuning in log temperature, a trainer step."
    )


class RolloutCorrectionConfig(Section):
    """Importance weights old / rollout, for the mismatch between engine and trainer."""

    level: Literal["none", "token", "sequence"] = Field(
        default="none", description="Level of the ratio. none: no correction."
    )
    cap: float = Field(
        default=2.0, gt=0, description="Largest weight: truncated importance sampling."
    )
    mask_below: float | None = Field(
        default=None, gt=0, description="Drop what has a smaller ratio. null: nothing."
    )
    mask_above: float | None = Field(
        default=None, gt=0, description="Drop what has a larger ratio. null: nothing."
    )


class OverlongConfig(Section):
    """What becomes of responses that reach the token limit; a penalty for coming close to it is the reward `soft_overlong`."""

    mask_truncated: bool = Field(
        default=False,
        description="Leave truncated responses out of the loss. They stay in the statistics of their group.",
    )


class DynamicSamplingConfig(Section):
    """Replace groups that teach nothing by further sampling (DAPO)."""

    max_rounds: int = Field(
        default=1,
        ge=1,
        description="Rounds of sampling a step at most; what is missing then is filled with other groups, which do not enter the loss. 1: off.",
    )
    by: GroupFilter = Field(
        default="accuracy",
        description="Which groups are kept. accuracy: those with a correct and a wrong response by the first reward function (a score of at "
        "least 0.5 is correct; DAPO, equation 11). reward: those whose total rewards are not all equal.",
    )


class AlgorithmConfig(Section):
    advantage: AdvantageConfig = Field(
        default=AdvantageConfig(), description="The advantage estimator."
    )
    objective: ObjectiveConfig = Field(
        default=ObjectiveConfig(), description="The policy objective."
    )
    aggregation: Aggregation = Field(
        default="sequence_mean",
        description="How token losses become one number: token_mean (DAPO), sequence_mean (GRPO), "
        "sequence_sum, constant (Dr. GRPO).",
    )
    kl: KLConfig = Field(
        default=KLConfig(), description="KL regularisation to the reference policy."
    )
    kl_old: OldKLConfig = Field(
        default=OldKLConfig(), description="KL penalty to the old policy (TRPO, PPO's second form)."
    )
    entropy: EntropyConfig = Field(
        default=EntropyConfig(), description="Entropy bonus and maximum-entropy RL."
    )
    rollout_correction: RolloutCorrectionConfig = Field(
        default=RolloutCorrectionConfig(),
        description="Correction of the mismatch between engine and trainer.",
    )
    overlong: OverlongConfig = Field(
        default=OverlongConfig(), description="Responses that reach the token limit."
    )
    dynamic_sampling: DynamicSamplingConfig = Field(
        default=DynamicSamplingConfig(), description="Groups that teach nothing."
    )
