"""Which files of a user are brought to the nodes of a cluster."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsys.plugins import load_plugins
from rlsys.run.ray_job import JOB_CONFIG
from workers import user_code as module
from workers.user_code import (
    code_mistakes,
    user_code,
    user_code_environment,
)

FILES = {
    "work_plugin.py": "import work_helper\nimport json\nimport numpy\n",
    "work_helper.py": "",
    "work_unused.py": "",
    "work_package/__init__.py": "",
    "work_package/rewards.py": "from work_package import scores\n",
    "work_package/scores.py": "",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write the modules into a folder from which this process imports."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("work_")]:
        del sys.modules[name]


def test_a_module_comes_with_what_it_imports_from_its_folder(folder: Path):
    load_plugins(["work_plugin"])
    expected = [folder / "work_helper.py", folder / "work_plugin.py"]
    assert user_code(["work_plugin"]) == expected
    environment = user_code_environment(["work_plugin"])
    assert environment == {"py_modules": [str(path) for path in expected]}


def test_a_package_comes_whole(folder: Path):
    load_plugins(["work_package.rewards"])
    assert user_code(["work_package.rewards"]) == [folder / "work_package"]


def test_installed_packages_and_no_plugins_bring_nothing(folder: Path):
    assert user_code_environment(["yaml", "json"]) == {}
    assert user_code_environment([]) == {}
    assert user_code(["rlsys.rewards.functions"]) == []  # part of the installation


def test_a_job_brings_its_working_directory_itself(folder: Path, monkeypatch: pytest.MonkeyPatch):
    load_plugins(["work_plugin"])
    job = {"runtime_env": {"working_dir": "gcs://package.zip"}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
    assert user_code_environment(["work_plugin"])["py_modules"]  # from elsewhere

    monkeypatch.chdir(folder)
    assert user_code_environment(["work_plugin"]) == {}

    # Ray refuses two values for one field.
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"py_modules": ["gcs://a.zip"]}}))
    monkeypatch.chdir("/")
    assert user_code_environment(["work_plugin"]) == {}


def test_other_code_on_a_node_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    load_plugins(["work_plugin", "work_package.rewards"])
    names = ["work_helper", "work_package", "work_plugin"]
    same = module._importable(names)
    assert set(same) == set(names)
    nodes = {"id2": "10.0.0.2", "id3": "10.0.0.3"}
    answers = {"id2": same, "id3": same}
    monkeypatch.setattr(module, "call_on_nodes", lambda *_: answers)
    plugins = ["work_plugin", "work_package.rewards"]
    assert list(code_mistakes(plugins, nodes)) == []

    (folder / "work_package" / "scores.py").write_text("changed = True")
    (folder / "work_helper.py").unlink()
    # A process that has imported it remembers its place.
    helper = sys.modules.pop("work_helper")
    importlib.invalidate_caches()
    answers["id3"] = module._importable(names)
    (folder / "work_package" / "scores.py").write_text("")
    (folder / "work_helper.py").write_text("")
    sys.modules["work_helper"] = helper
    missing, other = list(code_mistakes(plugins, nodes))
    assert missing.startswith("plugins: 10.0.0.3 cannot import 'work_helper', which is ")
    assert other.startswith("plugins: 10.0.0.3 imports another 'work_package', ")
