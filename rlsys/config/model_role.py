"""Distribution, precision and optimizer of the model of one role."""

from typing import Literal

from pydantic import Field

from rlsys.config.model import Dtype
from rlsys.config.node_label import NodeLabel
from rlsys.config.optimizer import OptimizerConfig
from rlsys.config.section import Section

Packing = bool | Literal["auto"]


class DeepSpeedConfig(Section):
    """Settings of the backend deepspeed."""

    zero_stage: Literal[1, 2, 3] = Field(
        default=3,
        description="What is sharded over the ranks. 1: the optimizer state, with the master "
        "weights. 2: the gradients as well. 3: the weights as well, which are gathered layer by "
        "layer. Lower stages communicate less and hold more on each rank.",
    )
    offload_weights: bool = Field(
        default=False,
        description="Keep the weights in host memory between their uses; zero_stage 3 on GPUs "
        "only.",
    )


class ModelRoleConfig(Section):
    """Settings that the models of all roles have in common."""

    backend: Literal["fsdp2", "deepspeed"] = Field(
        default="fsdp2",
        description="Training backend, which shards the model over the ranks: PyTorch's FSDP2, or "
        "DeepSpeed's ZeRO.",
    )
    deepspeed: DeepSpeedConfig = Field(
        default=DeepSpeedConfig(), description="Settings of the backend deepspeed."
    )
    ranks: int = Field(
        default=1,
        ge=1,
        description="Number of ranks (Ray actors), each on one GPU or on some CPU cores.",
    )
    gpus_per_rank: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="GPUs that each rank reserves where the cluster has GPUs. A rank computes on "
        "one GPU; set it below 1 to share that GPU with generation.",
    )
    cpus_per_rank: int = Field(default=1, ge=1, description="CPU cores that each rank reserves.")
    threads_per_rank: int = Field(
        default=0,
        ge=0,
        description="PyTorch threads of each rank on a CPU. 0: the cores of a node divided by its "
        "ranks.",
    )
    node_label: NodeLabel | None = Field(
        default=None,
        description="Place the ranks only on nodes of a joined cluster with this label, as "
        "name=value (`ray start --labels name=value`). null: on any node.",
    )
    compute_dtype: Dtype = Field(
        default="auto",
        description="Precision of forward and backward pass; master weights and gradient reduction "
        "are always float32. auto: chosen as for generation.dtype.",
    )
    microbatch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Largest number of tokens in one forward pass (microbatch) of a rank. With "
        "shared_prefix_packing, the prompt of a group counts once.",
    )
    shared_prefix_packing: bool = Field(
        default=True,
        description="Compute a prompt once for all its responses, where the attention kernel "
        "allows it (sdpa, flex_attention).",
    )
    packing: Packing = Field(
        default="auto",
        description="Pack sequences without padding. auto: if a check at set-up finds that packing "
        "does not change the model's log-probabilities, else pad, which is slower. true: refuse a "
        "model that fails the check. false: always pad.",
    )
    logit_chunk_tokens: int = Field(
        default=256,
        ge=1,
        description="Response tokens whose logits are computed at a time; smaller needs less "
        "memory.",
    )


class TrainableRoleConfig(ModelRoleConfig):
    """A model that is trained."""

    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="AdamW and its schedule."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass, to save memory."
    )
    offload_optimizer: bool = Field(
        default=False,
        description="Keep master weights and optimizer state in host memory (GPU only).",
    )
    frozen: tuple[str, ...] = Field(
        default=(),
        description="Parameters that are not trained: patterns of their names in transformers, "
        "such as [model.embed_tokens.*, model.layers.0.*]. []: all are trained.",
    )


class ReferenceConfig(Section):
    """Settings of the frozen reference that differ from the policy. null: as the policy."""

    path: str | None = Field(
        default=None,
        description="Frozen reference model of the KL, in the same forms as model.path. null: the "
        "initial weights of model.path.",
    )
    ranks: int | None = Field(
        default=None,
        ge=1,
        description="Number of reference ranks, each on the resources of a policy rank; at most "
        "policy.ranks. null: policy.ranks.",
    )
    compute_dtype: Dtype | None = Field(
        default=None,
        description="Precision of the reference's weights and arithmetic. null: as the policy.",
    )
    microbatch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of tokens in one forward pass of a reference rank. null: as "
        "the policy.",
    )
