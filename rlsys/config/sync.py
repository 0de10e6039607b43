"""The transfer of the trained weights to the generation workers."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from rlsys.config.section import Section

# Transports that vLLM has on GPUs, and rlsys does not use yet.
NOT_YET = ("nccl", "ipc")
# The file by which a directory of the transport disk is known.
OWNER_FILE = "rlsys_owner"


class SyncConfig(Section):
    """The transfer of the trained weights to the generation workers."""

    transport: Literal["auto", "object_store", "disk"] = Field(
        default="auto",
        description="How weights travel. object_store: through Ray's object store; the workers of "
        "a node read the same memory. disk: as safetensors in sync.directory. auto: object_store, "
        "since all workers are in one Ray cluster.",
    )
    bucket_mb: int = Field(
        default=64,
        ge=1,
        le=65536,
        description="Weights are gathered, sent and loaded in buckets of this size, in units of "
        "2^20 bytes. A larger tensor has a bucket of its own.",
    )
    directory: str | None = Field(
        default=None,
        description="Directory of this run alone, on storage that all nodes with generation "
        "workers share, for the transport disk. It holds one version of the weights, and those "
        "that a worker has still to read (trainer.max_staleness). A relative path starts where "
        "the command does. null: none.",
    )

    @field_validator("transport", mode="before")
    @classmethod
    def _not_available_yet(cls, value: object) -> object:
        if value in NOT_YET:
            message = f"{value!r} is not available yet. Use auto, object_store or disk"
            raise PydanticCustomError("transport", message)  # pyright: ignore[reportArgumentType]
        return value

    @field_validator("directory")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # The ranks that write there do not have the working directory of the command.
        return None if value is None else str(Path(value).expanduser().absolute())

    @property
    def chosen_transport(self) -> Literal["object_store", "disk"]:
        """The transport that is used."""
        return "object_store" if self.transport == "auto" else self.transport

    @property
    def bucket_bytes(self) -> int:
        """The size of a bucket in bytes."""
        return self.bucket_mb * 2**20
