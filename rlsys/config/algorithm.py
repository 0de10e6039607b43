"""The mathematics of an update: advantage estimator, objective, aggregation, KL, entropy."""

from typing import Any, Literal

from pydantic import Field

from rlsys.config.section import Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
GroupFilter = Literal["accuracy", "reward"]


class AuxiliaryConfig(Section):
    """A small network on the policy's hidden states that some estimators read and train."""

    width: int = Field(default=64, ge=1, description="Hidden units of the auxiliary network.")
    learning_rate: float = Field(
        default=3e-3,
        gt=0,
        description="Learning rate of the auxiliary network, which takes one optimizer step per "
        "mini-batch.",
    )


class AdvantageConfig(Section):
    """The advantage estimator and its parameters."""

    name: str = Field(
        default="grpo",
        description="Advantage estimator: grpo, rloo, gae, ...; docs/algorithms.md lists them, and "
        "a plug-in may register more.",
    )
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the estimator. Where it has a max_tokens, null means "
        "generation.max_tokens.",
    )
    recompute: bool = Field(
        default=False,
        description="Before each mini-batch, compute the log-probabilities of the live policy, "
        "take them as the old ones, and estimate the advantages again. Only for estimators that "
        "correct for the policy having moved since sampling, and only with objective.weight none.",
    )
    auxiliary: AuxiliaryConfig = Field(
        default=AuxiliaryConfig(),
        description="Auxiliary network beside the policy, for estimators that train one.",
    )


class ObjectiveConfig(Section):
    """The policy objective: a ratio, and the function of it that weights the advantage."""

    ratio: str = Field(
        default="token",
        description="Probability ratio live / old of: token (one token, as in PPO), sequence "
        "(geometric mean over the response, as in GSPO), future (geometric mean from the token to "
        "the end), prefix (product up to the token) or product (product over the response).",
    )
    weight: str = Field(
        default="ppo_clip",
        description="Function of the ratio that weights the advantage: none, importance, ppo_clip, "
        "...; docs/algorithms.md lists them.",
    )
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the weight function, such as clip_low and clip_high.",
    )


class KLConfig(Section):
    """KL regularisation to the frozen reference."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the KL to the reference. 0: no KL, and no reference model "
        "runs.",
    )
    kind: Literal["k1", "k2", "k3", "k3_k2", "exact"] | None = Field(
        default=None,
        description="Estimator of the KL (Schulman). null: k3 in the loss, k1 in the reward and "
        "in the advantage. In the loss, k2 and k3_k2 (value of k3, gradient of k2) have the "
        "gradient of the reverse KL at each token; k3 (GRPO) has that of the forward KL, unless "
        "importance_ratio is set; k1 requires importance_ratio. In the reward, only k1 is "
        "accepted of these: the others drive the policy away from the reference. exact: the KL "
        "over the whole vocabulary at each position, without sampling noise; the reference sends "
        "its hidden states (2 or 4 bytes x width for each token). In the loss, it has the gradient "
        "at each position; in the reward, that of the KL of whole responses.",
    )
    direction: Literal["reverse", "forward"] = Field(
        default="reverse",
        description="reverse: KL(policy || reference). forward: KL(reference || policy), which is "
        "for the loss only and requires importance_ratio.",
    )
    placement: Literal["loss", "reward", "advantage"] = Field(
        default="loss",
        description="Where the KL enters. loss: as a term of the loss. reward: as a penalty on the "
        "reward of each token. advantage: inside the advantage, with the estimator token_kl_grpo.",
    )
    level: Literal["token", "sequence"] = Field(
        default="token",
        description="For the KL in the loss. token: estimate the KL of each token. sequence: "
        "estimate that of the whole response, from the sum of its log-ratios.",
    )
    importance_ratio: Literal["none", "token", "prefix", "product"] = Field(
        default="none",
        description="For the KL in the loss: multiply it by the ratio live / old of the token, of "
        "the prefix (all tokens up to it), or of the response (product, with level sequence). This "
        "corrects for samples of an older policy, and gives k1, k3 and the forward direction the "
        "right gradient. none: no ratio.",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="Target KL per token (k3): the coefficient is adapted to reach it. null: the "
        "coefficient is fixed.",
    )
    horizon: float = Field(
        default=50.0,
        gt=0,
        description="With a target: the training steps in which the coefficient can change by "
        "20 %.",
    )

    @property
    def estimator(self) -> str:
        """The configured kind, or where it is null the one that suits the placement."""
        if self.kind is not None:
            return self.kind
        return "k3" if self.placement == "loss" else "k1"


class OldKLConfig(Section):
    """KL(old || live) as a penalty: a trust region, in place of the clip or beside it."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of KL(old || live) in the loss. 0: no such term.",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="Target KL(old || live) per token after the updates on a batch. The "
        "coefficient is doubled where the KL is above 1.5 times the target, and halved where it "
        "is below the target / 1.5; measuring it takes one more forward pass per batch. null: the "
        "coefficient is fixed.",
    )


class EntropyConfig(Section):
    """Entropy bonus in the loss, and maximum-entropy RL."""

    bonus: float = Field(
        default=0.0, ge=0, description="Coefficient of the entropy bonus in the loss. 0: no bonus."
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Maximum-entropy RL: add -temperature * log pi to the reward of each token. "
        "0: off.",
    )
    target: float | None = Field(
        default=None,
        ge=0,
        description="Target entropy per token, in nats: the entropy temperature is adapted to "
        "reach it. null: the temperature is fixed.",
    )
    learning_rate: float = Field(
        default=0.05,
        gt=0,
        description="With a target: step size of the log of the temperature, once per training "
        "step.",
    )


class RolloutCorrectionConfig(Section):
    """Corrections for tokens that another policy sampled than the one that is trained.

    The engine's kernels differ from the trainer's, and in asynchronous training its weights are
    older.
    """

    level: Literal["none", "token", "sequence", "geometric"] = Field(
        default="none",
        description="Correct for the log-prob mismatch between engine and trainer by the "
        "importance ratio old / rollout of each token, of the whole sequence, or its geometric "
        "mean over the sequence. none: no correction.",
    )
    cap: float = Field(
        default=2.0,
        gt=0,
        description="Upper bound of that ratio (truncated importance sampling).",
    )
    mask_below: float | None = Field(
        default=None,
        gt=0,
        description="Mask tokens (level token) or responses (other levels) with a ratio below "
        "this out of the objective. null: none.",
    )
    mask_above: float | None = Field(
        default=None,
        gt=0,
        description="Mask tokens (level token) or responses (other levels) with a ratio above "
        "this out of the objective. null: none.",
    )
    max_sequence_kl: float | None = Field(
        default=None,
        gt=0,
        description="Mask responses whose estimated KL(rollout || old) per token is above this out "
        "of the objective, at any level. null: none.",
    )
    sequence_kl: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="Estimator of that KL."
    )
    off_policy_mask: float | None = Field(
        default=None,
        gt=0,
        description="Mask tokens with a negative advantage out of the objective where the live "
        "policy has moved away from the response by more than this, as the mean of log rollout - "
        "log live over its tokens (DeepSeek-V3.2). null: none.",
    )


class OverlongConfig(Section):
    """Treatment of responses that reach the token limit.

    A penalty for coming close to the limit is the reward function `soft_overlong`.
    """

    mask_truncated: bool = Field(
        default=False,
        description="Mask truncated responses out of the loss. Their rewards still count in the "
        "statistics of their group.",
    )


class DynamicSamplingConfig(Section):
    """Replacement of groups without a learning signal by further sampling (DAPO)."""

    max_rounds: int = Field(
        default=1,
        ge=1,
        description="Largest number of sampling rounds per step. If groups are still missing then, "
        "groups without a learning signal fill the batch and are masked out of the loss. 1: off.",
    )
    by: GroupFilter = Field(
        default="accuracy",
        description="Which groups to keep. accuracy (DAPO, equation 11): those with both correct "
        "and wrong responses, where a response is correct if the first reward function gives at "
        "least 0.5. reward: those whose total rewards are not all equal.",
    )


class AlgorithmConfig(Section):
    """Everything that decides the gradient of an update."""

    advantage: AdvantageConfig = Field(
        default=AdvantageConfig(), description="The advantage estimator."
    )
    objective: ObjectiveConfig = Field(
        default=ObjectiveConfig(), description="The policy objective."
    )
    aggregation: Aggregation = Field(
        default="sequence_mean",
        description="How to reduce the token losses of a batch: token_mean (mean over all tokens, "
        "DAPO), sequence_mean (mean over the tokens of each response, then over responses, GRPO), "
        "sequence_sum (sum over tokens, mean over responses) or constant (sequence_sum divided by "
        "generation.max_tokens, Dr. GRPO).",
    )
    kl: KLConfig = Field(
        default=KLConfig(), description="KL regularisation to the reference policy."
    )
    kl_old: OldKLConfig = Field(
        default=OldKLConfig(), description="KL penalty to the old policy (PPO with a KL penalty)."
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
        default=DynamicSamplingConfig(),
        description="Replacement of groups without a learning signal (DAPO).",
    )


# The algorithm of runs that read rewards but no advantages: it does not compare responses.
WITHOUT_ADVANTAGES = AlgorithmConfig(advantage=AdvantageConfig(name="reinforce"))
