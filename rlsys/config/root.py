"""What the configurations of all kinds of runs have in common."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rlsys.config.section import Section

if TYPE_CHECKING:
    from rlsys.config.model import ModelConfig

# Validation context of the command line, which reports contradictions with all other mistakes.
CONTRADICTIONS_LATER = "contradictions are reported later"


class RunSection(Section):
    """Output directory and display of a run."""

    directory: str | None = Field(
        default=None, description="Output directory. null: runs/<recipe>-<date>-<time>."
    )
    progress: bool = Field(
        default=True, description="Live display on a terminal. false: plain lines, as elsewhere."
    )
    note: str | None = Field(
        default=None, description="Text to print when the run starts. null: none."
    )


class ClusterConfig(Section):
    """The Ray cluster that a run starts or joins."""

    address: str | None = Field(
        default=None,
        description="Ray cluster to join: host:port, ray://host:port, or auto for the one that "
        "runs on this machine. local: start Ray on this machine. null: RAY_ADDRESS where it is "
        "set, else local.",
    )
    object_store_gib: float = Field(
        default=1.0,
        ge=0.1,
        description="Size of Ray's object store where the run starts Ray, in GiB; at least 0.1.",
    )
    recovery_timeout_s: float = Field(
        default=600.0,
        ge=0,
        description="Seconds that a restart of the actors waits for the resources of a node that "
        "died. Then the run goes on with fewer generation workers, or ends where the policy has no "
        "place. 0: it does not wait.",
    )

    @property
    def joined_address(self) -> str | None:
        """The cluster that a run joins: `address`, else RAY_ADDRESS; None where it starts Ray."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        return None if address in (None, "", "local") else address


class UnhealedClusterConfig(ClusterConfig):
    """The Ray cluster of a run without checkpoints, which is never restarted."""

    recovery_timeout_s: ClassVar[float] = 0.0  # pyright: ignore


class RootConfig(Section):
    """The whole configuration of a run of some kind.

    Each kind has a subclass with the options that have an effect in it, and no others. The fields
    below are those that all of them have; each subclass declares them in its own order.
    """

    if TYPE_CHECKING:
        recipe: str
        plugins: tuple[str, ...]
        model: ModelConfig
        trainer: Any = None  # a `LoopConfig`, where the run has a training loop
        cluster: ClusterConfig
        run: RunSection = RunSection()
