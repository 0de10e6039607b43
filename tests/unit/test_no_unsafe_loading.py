"""Nothing in the tree loads a file that may run code, unless it says so here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("rlsys", "workers", "recipes", "benchmarks", "docs")
FILES = sorted(file for tree in TREES for file in (ROOT / tree).rglob("*.py"))
# The reward pool exchanges messages with processes that it started itself, through a socket pair.
PICKLING = {"rlsys/rewards/pool.py"}
PICKLE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call with the name of what is called, such as torch.load."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    """Return the source of a keyword of a call; None without it."""
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def unsafe(name: str, call: ast.Call) -> str | None:
    """Return what is wrong with a call."""
    if name == "torch.load" and keyword(call, "weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, "False"):
        return "np.load with pickles"
    if name in ("yaml.load", "yaml.load_all") and ast.unparse(call.args[1]) != "_Loader":
        return f"{name} with another loader than the safe one"
    if name.startswith(("yaml.unsafe", "yaml.full")):
        return name
    if name in ("eval", "exec"):
        return name
    if keyword(call, "trust_remote_code") == "True":
        return "trust_remote_code=True"
    if keyword(call, "shell") == "True":
        return "shell=True"
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_loads_no_file_that_may_run_code(file: Path):
    found = [
        f"line {call.lineno}: {unsafe(name, call)}"
        for name, call in calls(file)
        if unsafe(name, call)
    ]
    assert found == []


def test_only_the_reward_pool_pickles():
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if PICKLE_MODULES & {name.partition(".")[0] for name in names}:
                found.add(str(file.relative_to(ROOT)))
    assert found == PICKLING


def test_vllm_is_never_told_to_unpickle():
    """The engine runs in the process that calls it, so that functions need no transport."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            value = node.value if isinstance(node, ast.Constant) else None
            assert value != "VLLM_ALLOW_INSECURE_SERIALIZATION", file


def test_the_loader_of_configurations_is_safe():
    import yaml

    from rlsys.config.command_line import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.system ['true']", _Loader)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("yaml.load(text, yaml.Loader)", True),
        ("yaml.load(text, _Loader)", False),
        ("model.from_pretrained(path, trust_remote_code=True)", True),
    ],
)
def test_the_check_itself(source: str, wrong: bool):
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert (unsafe(ast.unparse(call.func), call) is not None) == wrong
