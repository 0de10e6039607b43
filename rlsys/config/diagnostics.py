"""Measurements that cost too much to be on by default."""

from pydantic import Field

from rlsys.config.section import Section


class DiagnosticsConfig(Section):
    """Measurements that are off by default."""

    gradient: bool = Field(
        default=False,
        description="Measure the variance of the gradient under several baselines, from the true "
        "gradients of the last layer's down projection. Takes one more forward pass per mini-batch "
        "(docs/hierarchical_baselines.md).",
    )
    gradient_every: int = Field(
        default=1, ge=1, description="Measure the variance of the gradient every N steps."
    )
