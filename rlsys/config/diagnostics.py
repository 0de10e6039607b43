"""Measurements that cost too much to be on by default."""

from pydantic import Field

from rlsys.config.section import Section


class DiagnosticsConfig(Section):
    gradient: bool = Field(
        default=False,
        description="Variance of the gradient under several baselines, from the true gradients of the last layer's down projection; "
        "a further forward pass a mini-batch (docs/hierarchical_baselines.md).",
    )
    gradient_every: int = Field(default=1, ge=1, description="Measure it in each so many steps.")
