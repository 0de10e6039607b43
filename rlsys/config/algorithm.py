"""The mathematics of an update, by name: advantage estimator, objective, aggregation, KL, entropy."""

from typing import Any, Literal

from pydantic import Field

from rlsys.config.section import Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class AdvantageConfig(Section):
    name: str = Field(default="grpo", description="A registered advantage estimator.")
    parameters: dict[str, Any] = Field(
        default={}, description="Keyword parameters of the estimator, checked against its signature."
    )


class ObjectiveConfig(Section):
    ratio: str = Field(default="token", description="Level of the probability ratio: token, sequence, future, prefix or product.")
    weight: str = Field(default="ppo_clip", description="Weight function of the ratio: none, importance, ppo_clip, ...")
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the weight, such as clip_low and clip_high, checked against its signature.",
    )


class KLConfig(Section):
    coefficient: float = Field(
        default=0.0, ge=0, description="Weight of the KL to the reference. 0: the reference model does not run."
    )
    kind: Literal["k1", "k2", "k3"] = Field(default="k3", description="Schulman's estimator of the KL, per token.")
    placement: Literal["loss"] = Field(default="loss", description="Where the KL enters: as a term of the loss.")


class AlgorithmConfig(Section):
    advantage: AdvantageConfig = Field(default=AdvantageConfig(), description="The advantage estimator.")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="The policy objective.")
    aggregation: Aggregation = Field(
        default="sequence_mean",
        description="How token losses become one number: token_mean (DAPO), sequence_mean (GRPO), "
        "sequence_sum, constant (Dr. GRPO).",
    )
    kl: KLConfig = Field(default=KLConfig(), description="KL regularisation to the reference policy.")
    entropy_coefficient: float = Field(default=0.0, ge=0, description="Weight of an entropy bonus. 0: none.")
