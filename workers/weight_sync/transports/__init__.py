"""Transports of weights; `rlsys.config.sync` has their names and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.weight_sync.transports.transport import WeightTransport

if TYPE_CHECKING:
    from rlsys.config import SyncConfig

__all__ = ["WeightTransport", "make_transport"]


def make_transport(settings: SyncConfig) -> WeightTransport:
    """Return the transport that the settings choose, for either end."""
    # A module is imported only where it is used.
    if settings.chosen_transport == "disk":
        from workers.weight_sync.transports.disk import DiskTransport

        assert settings.directory is not None, "a transport by disk without sync.directory"
        return DiskTransport(settings.directory)

    from workers.weight_sync.transports.object_store import ObjectStoreTransport

    return ObjectStoreTransport()
