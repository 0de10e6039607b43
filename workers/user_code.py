"""The modules that a run's plug-ins are made of, so that Ray brings them to every node.

Installed packages are not sent: they belong to the environment of the nodes. Sent is the code of a
user that the driver imports from a folder of its own: a plug-in's package or file, and what it
imports from the same folder. A node may have other code by the same name, since Ray also lets its
processes import from the driver's working folder, if the node has a folder of that path. Therefore
every node is asked what it would import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlsys.run.ray_job import JOB_CONFIG
from workers.placement import call_on_nodes

# Part of the installation, wherever it lies.
OWN_PACKAGES = frozenset({"rlsys", "workers", "recipes"})


def user_code_environment(plugins: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment that brings the code of plug-ins to the nodes.

    The plug-ins are imported already. A job that Ray's job server started brings the code of its
    working directory, or its own `py_modules`.
    """
    job = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    if job.get("py_modules"):
        return {}

    paths = user_code(plugins)
    if job.get("working_dir"):
        here = Path.cwd().resolve()
        paths = [path for path in paths if not path.is_relative_to(here)]
    return {"py_modules": [str(path) for path in paths]} if paths else {}


def user_code(plugins: Sequence[str]) -> list[Path]:
    """Return the packages and files of the imported `plugins`, and what they import beside them."""
    tops = dict.fromkeys(name.partition(".")[0] for name in plugins)
    own = [path for path in (_place(sys.modules.get(top)) for top in tops) if path is not None]
    folders = {path.parent for path in own}
    beside = [
        path
        for name, module in list(sys.modules.items())
        if "." not in name
        and name not in OWN_PACKAGES
        and (path := _place(module)) is not None
        and path.parent in folders
    ]
    return sorted({*own, *beside})


def _place(module: ModuleType | None) -> Path | None:
    """Return the folder of a package or the file of a module; None: it is installed, or has none.

    The module that is run as a script is none that another process could import.
    """
    if module is None or module.__name__ in {"__main__", *OWN_PACKAGES}:
        return None
    # A namespace package has a path and no file.
    paths = list(getattr(module, "__path__", []))
    file = paths[0] if len(paths) == 1 else getattr(module, "__file__", None)
    if not file or not Path(file).exists():
        return None
    path = Path(file).resolve()
    return None if any(path.is_relative_to(place) for place in _installed()) else path


def _installed() -> list[Path]:
    """Return the folders of the standard library and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return [Path(sysconfig.get_path(name)).resolve() for name in names]


@dataclass(frozen=True, kw_only=True)
class FoundCode:
    """A package or file that a process would import by some name."""

    path: str
    digest: str


def code_mistakes(plugins: Sequence[str], nodes: Mapping[str, str]) -> Iterator[str]:
    """Yield the modules of plug-ins that differ between this process and a node, a line each.

    Args:
        nodes: the addresses of the nodes by their ids.
    """
    own = {
        path.stem: FoundCode(path=str(path), digest=_digest(path)) for path in user_code(plugins)
    }
    if not own:
        return
    for node, found in call_on_nodes(sorted(nodes), _importable, sorted(own)).items():
        for name, code in own.items():
            there = found[name]
            if there is None:
                yield (
                    f"plugins: {nodes[node]} cannot import {name!r}, which is {code.path} here. "
                    "Submit the run with a working_dir or py_modules that has it."
                )
            elif there.digest != code.digest:
                yield (
                    f"plugins: {nodes[node]} imports another {name!r}, {there.path}, than this "
                    f"process, {code.path}. Delete it there, or make both the same."
                )


def _importable(names: Sequence[str]) -> dict[str, FoundCode | None]:
    """Return what this process would import by the names, without importing it."""
    return {name: _importable_as(name) for name in names}


def _importable_as(name: str) -> FoundCode | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [spec.origin])
    path = Path(str(places[0]))
    return FoundCode(path=str(path), digest=_digest(path))


def _digest(path: Path) -> str:
    """Return a hash of a Python file, or of those of a package."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path.parent)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
