"""What the configurations of all kinds of runs have in common."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from rlsys.config.section import Section
from rlsys.config.storage_uri import storage_mistake, stored_name

if TYPE_CHECKING:
    from rlsys.config.model import ModelConfig

# Validation context of the command line, which reports contradictions with all other mistakes.
CONTRADICTIONS_LATER = "contradictions are reported later"


class RunSection(Section):
    """Output directory and display of a run."""

    directory: str | None = Field(
        default=None,
        description="Output directory. null: runs/<recipe>-<date>-<time>, or with `storage` "
        "runs/<last part of it>.",
    )
    storage: str | None = Field(
        default=None,
        description="Second place of the run's files, which the run keeps up to date and from "
        "which --resume continues on another machine: a directory, or a folder in any file system "
        "that pyarrow.fs or fsspec opens (s3://bucket/runs/name, gs://, hdfs://, file://). "
        "Credentials come from the environment. null: none. See docs/storage.md.",
    )
    progress: bool = Field(
        default=True, description="Live display on a terminal. false: plain lines, as elsewhere."
    )
    note: str | None = Field(
        default=None, description="Text to print when the run starts. null: none."
    )

    @property
    def given_directory(self) -> str | None:
        """The output directory that the user named, by itself or by the storage."""
        if self.directory is None and self.storage is not None:
            return f"runs/{stored_name(self.storage)}"
        return self.directory

    @field_validator("storage")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        mistake = None if uri is None else storage_mistake(uri)
        if mistake is not None:  # whole lines, since another message would show the URI
            raise PydanticCustomError("mistakes", "{lines}", {"lines": mistake})
        return uri


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
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK",
        description="How policy ranks and generation workers are placed on the nodes of a joined "
        "cluster, in Ray's words. PACK: on as few nodes as possible; SPREAD: on as many as "
        "possible; STRICT_PACK: on one node; STRICT_SPREAD: each on a node of its own.",
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
