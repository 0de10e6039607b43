"""Moved to `tests.support.enumerable_policy`; kept until nothing imports it from here."""

from tests.support.enumerable_policy import Context, Enumerated, ResponseSpace

__all__ = ["Context", "Enumerated", "ResponseSpace"]
