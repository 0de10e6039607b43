"""Loads the modules in which users register estimators, objectives and rewards of their own."""

import importlib
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

ENTRY_POINT_GROUP = "rlsys.plugins"


def load_plugins(modules: Sequence[str]) -> None:
    """Import `modules` and everything published under the entry-point group `rlsys.plugins`. Loading twice is harmless.

    Raises:
        ValueError: a module cannot be imported, whatever it raises; one line that names the module, the error and its place.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        package = entry_point.dist.name if entry_point.dist else "an unknown package"
        _load(
            f"the entry point {entry_point.name!r} of {package}",
            entry_point.load,
            f"Repair or uninstall {package}.",
        )
    for module in modules:
        _load(repr(module), lambda module=module: importlib.import_module(module), "Repair it.")


def _load(what: str, load: Callable[[], object], remedy: str) -> None:
    try:
        load()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"plugins: cannot import {what} ({_one_line(error)}{_place(error)}). Name an importable module: install its package or add "
            "its folder to PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(
            f"plugins: {what} failed while it was imported: {type(error).__name__}: {_one_line(error)}{_place(error)}. {remedy}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or "no message"


def _place(error: BaseException) -> str:
    """ ", file.py line 3": the last line of the plug-in's own folder that ran. Nothing for syntax errors, which say it themselves."""
    if isinstance(error, SyntaxError):
        return ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and not _is_machinery(Path(frame.filename))
    ]
    if not frames:
        return ""
    folder = Path(frames[0].filename).parent
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    return f", {own[-1].filename} line {own[-1].lineno}"


def _is_machinery(file: Path) -> bool:
    """Whether a frame is of the import system or of rlsys' registries."""
    return any(
        file.is_relative_to(Path(module).parent) for module in (importlib.__file__, __file__)
    )
