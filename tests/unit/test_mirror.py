"""Each module of the algorithm library has its test, and only the library names an algorithm."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsys.algorithms.advantages import available_advantage_estimators, estimator_spec

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "rlsys" / "algorithms"
MIRROR = ROOT / "tests" / "unit" / "algorithms"
ADVANTAGES = "rlsys.algorithms.advantages"
# Tables of settings, which name the estimators that they choose.
CHOOSING = ("rlsys/config/presets.py", "rlsys/config/algorithm.py", "recipes/")


def library_modules() -> list[str]:
    """Return the paths of the library's modules, relative to the library."""
    files = (file.relative_to(LIBRARY) for file in LIBRARY.rglob("*.py"))
    return sorted(str(file) for file in files if file.name != "__init__.py")


def test_there_are_modules():
    assert len(library_modules()) > 30


@pytest.mark.parametrize("module", library_modules())
def test_a_module_of_the_algorithms_has_a_test(module: str):
    path = Path(module)
    test = MIRROR / path.with_name(f"test_{path.name}")
    assert test.is_file(), f"{module} has no {test.relative_to(ROOT)}"
    assert any(
        isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for node in ast.parse(test.read_text()).body
    )


def product_files() -> list[str]:
    """Return the paths of all modules, relative to the repository."""
    found = []
    for package in ("rlsys", "workers", "recipes"):
        found += [str(file.relative_to(ROOT)) for file in (ROOT / package).rglob("*.py")]
    return sorted(found)


def homes() -> dict[str, str]:
    """Return each estimator of the library, with the file or package that defines it."""
    found: dict[str, str] = {}
    for name in available_advantage_estimators():
        module = estimator_spec(name).function.__module__
        if module.startswith(ADVANTAGES):
            path = Path(*module.split("."))
            is_file = path.parent.name == "advantages"
            found[name] = f"{path}.py" if is_file else f"{path.parent}/"
    return found


def names_in(file: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of the estimators in the strings and imports of a file."""
    known = homes()
    modules = {
        home.removesuffix(".py").removesuffix("/").replace("/", "."): name
        for name, home in known.items()
    }

    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known:
            yield node.lineno, node.value
        if isinstance(node, ast.ImportFrom) and node.module:
            for module, name in modules.items():
                if node.module == module or node.module.startswith(module + "."):
                    yield node.lineno, name


@pytest.mark.parametrize("file", product_files())
def test_nobody_else_knows_an_estimator_by_name(file: str):
    if file.startswith(CHOOSING):
        return
    # Estimators may share what they compute, and the package imports them all.
    if file.startswith("rlsys/algorithms/advantages/"):
        return

    strangers = [f"line {line}: {name}" for line, name in names_in(file)]
    assert not strangers, f"{file} knows estimators by name: {strangers}"


def test_the_contract_imports_no_estimator():
    assert not list(names_in("rlsys/algorithms/advantages/contract.py"))
    assert list(names_in("rlsys/config/presets.py"))  # so the search finds names
