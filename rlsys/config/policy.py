"""The actor and reference group: parallelism, precision, memory, and the optimizer."""

from typing import Annotated, Literal

from pydantic import Field

from rlsys.config.model import Dtype
from rlsys.config.section import Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(
        default=1e-5, gt=0, le=1, description="Peak learning rate of AdamW, at most 1."
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        default=(0.9, 0.95),
        description="AdamW's decay rates of first and second moments, each from 0 to below 1.",
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of matrices; norms and biases have none. 0: none.",
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Clip the global gradient norm to this. 0: do not clip."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Learning rate after warm-up: constant, or falling to minimum_ratio, which is reached after the last step.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Trainer steps of linear warm-up from 0. 0: none."
    )
    minimum_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Final learning rate as a share of the peak."
    )


class PolicyConfig(Section):
    strategy: Literal["fsdp2"] = Field(
        default="fsdp2", description="How the trainer is distributed."
    )
    ranks: int = Field(
        default=1,
        ge=1,
        description="Policy workers (actors), one GPU or share of the CPU cores each.",
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
        description="Precision of forward and backward, of the policy and of the reference; master weights and "
        "gradient reduction are always float32. auto: as generation.dtype.",
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="AdamW and its schedule."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over each rollout batch.")
    mini_batches: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps an epoch; prompts_per_step must be divisible by it (whole groups stay together).",
    )
    microbatch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Token budget of one packed forward pass on one rank (tokens, prompts shared in a group count once).",
    )
    share_prompts: bool = Field(
        default=True,
        description="Compute a prompt once for all its responses, where the attention kernel can (sdpa, flex_attention).",
    )
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="Run the model on packs of sequences without padding. auto: where a check at set-up finds the packed "
        "log-probabilities equal to the model's own, else the model's own padded forward pass, which is slower. true: refuse "
        "such a model. false: always padded.",
    )
    logit_chunk_tokens: int = Field(
        default=256, ge=1, description="Response positions whose logits exist at the same time."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    offload_optimizer: bool = Field(
        default=False,
        description="Keep master weights and optimizer state in host memory (GPU only).",
    )
