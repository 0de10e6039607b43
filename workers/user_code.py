"""The modules that a run's plug-ins are made of, so that Ray brings them to every node.

Installed packages are not sent: they belong to the environment of the nodes. Sent is the code of a
user that the driver imports from a folder of its own: a plug-in's package or file, and what it
imports from the same folder.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Part of the installation, wherever it lies.
OWN_PACKAGES = frozenset({"rlsys", "workers", "recipes"})
# Ray's job server passes the job's runtime environment to the driver in it.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def user_code_environment(plugins: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment that brings the code of plug-ins to the nodes.

    The plug-ins are imported already. A job that Ray's job server started brings the code of its
    working directory, or its own `py_modules`.
    """
    job = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
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
