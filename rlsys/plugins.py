"""Import of the modules in which users register estimators, objectives and reward functions."""

import importlib
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

ENTRY_POINT_GROUP = "rlsys.plugins"


def load_plugins(modules: Sequence[str]) -> None:
    """Import `modules`, and all modules published under the entry-point group `rlsys.plugins`.

    Importing them twice is harmless.

    Raises:
        ValueError: a module raised any error; one line has the module, the error and its place.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        package = entry_point.dist.name if entry_point.dist else "an unknown package"
        _load(
            f"the entry point {entry_point.name!r} of {package}",
            entry_point.load,
            f"Fix or uninstall {package}.",
        )
    for module in modules:
        _load(repr(module), lambda module=module: importlib.import_module(module), "Fix it.")


def _load(name: str, load: Callable[[], object], remedy: str) -> None:
    try:
        load()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"plugins: cannot import {name} ({_one_line(error)}{_place(error)}). Name an "
            "importable module: install its package or add its folder to PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(
            f"plugins: {name} failed while it was imported: {type(error).__name__}: "
            f"{_one_line(error)}{_place(error)}. {remedy}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or "no message"


def _place(error: BaseException) -> str:
    """Return ", file.py line 3", the last line that ran in the plug-in's own folder.

    It is "" for syntax errors, whose messages have the place already.
    """
    if isinstance(error, SyntaxError):
        return ""
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith("<frozen") and not _is_machinery(Path(frame.filename)):
            frames.append(frame)
    if not frames:
        return ""

    folder = Path(frames[0].filename).parent
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    return f", {own[-1].filename} line {own[-1].lineno}"


def _is_machinery(file: Path) -> bool:
    """Return whether a file belongs to the import system or to rlsys."""
    folders = (Path(importlib.__file__).parent, Path(__file__).parent)
    return any(file.is_relative_to(folder) for folder in folders)
