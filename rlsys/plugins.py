"""Loads the modules in which users register estimators, objectives and rewards of their own."""

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "rlsys.plugins"


def load_plugins(modules: Sequence[str]) -> None:
    """Import `modules` and everything published under the entry-point group `rlsys.plugins`. Loading twice is harmless.

    Raises:
        ValueError: a module cannot be imported.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"plugins: cannot import {module!r} ({error}). Name an importable module: install its package or add its folder "
                "to PYTHONPATH."
            ) from error
