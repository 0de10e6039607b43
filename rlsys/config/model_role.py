"""How the model of one role is distributed, run and optimized."""

from typing import Literal

from pydantic import Field

from rlsys.config.model import Dtype
from rlsys.config.optimizer import OptimizerConfig
from rlsys.config.section import Section

Packing = bool | Literal["auto"]


class ModelRoleConfig(Section):
    """What the models of all roles have in common."""

    backend: Literal["fsdp2"] = Field(
        default="fsdp2", description="What distributes the model over its ranks."
    )
    ranks: int = Field(
        default=1,
        ge=1,
        description="Ranks (actors), one GPU or a part of the CPU cores each.",
    )
    gpus_per_rank: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="GPUs that each rank reserves when the cluster has GPUs; a rank computes on one.",
    )
    cpus_per_rank: int = Field(default=1, ge=1, description="CPU cores that each rank reserves.")
    threads_per_rank: int = Field(
        default=0,
        ge=0,
        description="Torch threads of each rank on a CPU. 0: all cores over all ranks of a node.",
    )
    compute_dtype: Dtype = Field(
        default="auto",
        description="Precision of forward and backward; master weights and gradient reduction are "
        "always float32. auto: as generation.dtype.",
    )
    microbatch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Token budget of one packed forward pass on one rank (tokens, prompts shared in "
        "a group count once).",
    )
    shared_prefix_packing: bool = Field(
        default=True,
        description="Compute a prompt once for all its responses, where the attention kernel can "
        "(sdpa, flex_attention).",
    )
    packing: Packing = Field(
        default="auto",
        description="Run the model on packs of sequences without padding. auto: where a check at "
        "set-up finds the packed log-probabilities equal to the model's own, else the model's own "
        "padded forward pass, which is slower. true: refuse such a model. false: always padded.",
    )
    logit_chunk_tokens: int = Field(
        default=256, ge=1, description="Response positions whose logits exist at the same time."
    )


class TrainableRoleConfig(ModelRoleConfig):
    """A model that is trained."""

    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="AdamW and its schedule."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    offload_optimizer: bool = Field(
        default=False,
        description="Keep master weights and optimizer state in host memory (GPU only).",
    )


class ReferenceConfig(Section):
    """The frozen reference: what differs from the policy. null: as the policy."""

    path: str | None = Field(
        default=None,
        description="The frozen reference of the KL term, in the same forms as model.path. null: the "
        "initial weights of model.path.",
    )
    ranks: int | None = Field(
        default=None,
        ge=1,
        description="Ranks of the reference, each beside a rank of the policy. null: policy.ranks, "
        "which is also the most.",
    )
    compute_dtype: Dtype | None = Field(
        default=None,
        description="Precision of its weights and arithmetic. null: as the policy.",
    )
    microbatch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Token budget of one packed forward pass on one rank. null: as the policy.",
    )
