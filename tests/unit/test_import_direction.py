"""Imports point downward only, and what must start fast stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.config.engines import ENGINES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rlsys", "workers", "recipes")
LIBRARY = (
    "rlsys.config",
    "rlsys.registry",
    "rlsys.algorithms",
    "rlsys.models",
    "rlsys.data",
    "rlsys.rewards",
    "rlsys.evaluation",
)
# The packages of this project that each package may import, besides itself.
ALLOWED = {
    "rlsys.config": ("rlsys.config_error",),
    "rlsys.config_error": (),
    "rlsys.math_verifier": (),
    "rlsys.metrics": (),
    "rlsys.registry": (),
    "rlsys.plugins": (),
    "rlsys.algorithms": ("rlsys.config", "rlsys.registry"),
    "rlsys.models": ("rlsys.config", "rlsys.config_error"),
    "rlsys.data": ("rlsys.config", "rlsys.models"),
    "rlsys.rewards": (
        "rlsys.config",
        "rlsys.registry",
        "rlsys.plugins",
        "rlsys.data",
        "rlsys.math_verifier",
    ),
    "rlsys.evaluation": ("rlsys.data", "rlsys.math_verifier"),
    "rlsys.run": (*LIBRARY, "rlsys.metrics", "rlsys.plugins", "rlsys.plan"),
    "rlsys.export": ("rlsys.config", "rlsys.models", "rlsys.run"),
    "rlsys.plan": ("rlsys.config", "rlsys.models", "rlsys.rewards"),
    "rlsys.doctor": ("rlsys.config", "rlsys.models", "rlsys.run"),
    "rlsys.driver": (*LIBRARY, "rlsys.metrics", "rlsys.run"),
    "rlsys.simulate": (*LIBRARY, "rlsys.metrics", "rlsys.run", "rlsys.driver"),
    "workers": ("rlsys",),
    "recipes": ("rlsys", "workers"),
}
# Parts of workers/ meet in recipes/run_recipe.py only.
PARTS = (
    "workers.generation",
    "workers.training",
    "workers.weight_sync",
    "workers.reward_worker",
    "workers.advantage_controller",
    "workers.cluster",
)
# Any of the parts may use them.
BELOW_PARTS = (
    "workers.local_ray",
    "workers.node_folders",
    "workers.placement",
    "workers.stack_dumps",
    "workers.supervision",
    "workers.user_code",
    "workers.weight_sync.transports",
)


def modules() -> list[tuple[str, Path]]:
    """Return the name and the file of every module."""
    found = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), file))
    return found


def imports(file: Path) -> set[str]:
    """Return the modules named in import statements anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative imports hide the direction"
            found.add(node.module)
    return found


def within(name: str, package: str) -> bool:
    """Return whether a module is a package or in it."""
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_a_module_imports_downward_only(name: str, file: Path):
    used = imports(file)
    own = {module for module in used if any(within(module, package) for package in PACKAGES)}
    package = next((package for package in ALLOWED if within(name, package)), None)
    if package is None:
        assert own == set(), f"{name} belongs to no package of the table"
        return

    allowed = (package, *ALLOWED[package])
    wrong = [module for module in own if not any(within(module, one) for one in allowed)]
    assert not wrong, f"{name} must not import {wrong}"


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_a_module_imports_only_the_other_projects_that_it_may(name: str, file: Path):
    projects = {module.split(".")[0] for module in imports(file)}
    if within(name, "rlsys"):
        assert not {"ray", "vllm", "deepspeed"} & projects
    if within(name, "rlsys.config"):
        assert not {"torch", "numpy"} & projects

    for engine, traits in ENGINES.items():
        if projects & set(traits.packages):
            assert name == f"workers.generation.engines.{engine}"


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_a_part_of_the_workers_imports_no_other_part(name: str, file: Path):
    part = next((part for part in PARTS if within(name, part)), None)
    if part is None:
        return

    workers = {module for module in imports(file) if within(module, "workers")}
    others = [
        module for module in workers if not within(module, part) and module not in BELOW_PARTS
    ]
    assert not others, f"{name} must not import {others}"


@pytest.mark.parametrize(
    "statement",
    [
        "import rlsys.config.command_line",
        "import recipes.grpo_math, recipes.run_recipe",
        "import rlsys.plan.__main__",
    ],
)
def test_the_command_line_loads_nothing_heavy(statement: str):
    heavy = ("torch", "numpy", "ray", "vllm", "transformers", "pyarrow")
    script = f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("workers.reward_worker", ("torch", "transformers")),
        ("workers.advantage_controller", ("transformers", "torch._dynamo")),
        ("workers.generation.worker", ("transformers", "torch._dynamo")),
        ("recipes.wiring", ("transformers.modeling_utils", "torch._dynamo", "sympy")),
    ],
)
def test_a_process_loads_only_what_it_works_with(module: str, heavy: tuple[str, ...]):
    """Each actor and the driver import for themselves: most of the time of their start."""
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
