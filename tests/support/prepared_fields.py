"""The fields of a `Prepared` run that a test of its training has no use for."""

from __future__ import annotations

from typing import Any


def without_notes() -> dict[str, Any]:
    """Return the fields of a new run that has nothing to say before it starts."""
    return {
        "resume": False,
        "checkpoint": None,
        "plan": "",
        "changes": (),
        "notices": (),
        "reasons": (),
        "warnings": (),
        "speed": None,
        "estimate": None,
    }
