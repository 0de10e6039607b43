"""Commands in the documents can be copied into a shell: each parses and starts what it names."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlsys.config.command_line import HelpRequested, Invocation, parse
from rlsys.config.hardware import detect_hardware
from rlsys.plan.__main__ import configuration
from rlsys.plan.__main__ import parser as plan_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))
SHELL_BLOCK = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ACTIVATION = [".", ".venv/bin/activate"]
DRY_RUNS = 4  # seconds each
# Programs besides `make` and Python that a command may start; their arguments are not checked.
OTHER_PROGRAMS = (
    *("cd", "chmod", "docker", "export", "git", "kubectl", "ray", "sbatch", "ssh", "tensorboard"),
)


@dataclass(frozen=True)
class Command:
    """One command of a page, without the environment variables before it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def blocks_of(page: Path) -> list[str]:
    """Return the shell blocks of a page; of a console, the lines that a person types."""
    blocks = []
    for block in SHELL_BLOCK.findall(page.read_text()):
        typed = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
        blocks.append("\n".join(typed) if typed else block)
    return blocks


def commands_of(page: Path) -> Iterator[Command]:
    """Yield each command in the shell blocks of a page, comments removed, in order."""
    for line in "\n".join(blocks_of(page)).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for is_operator, group in itertools.groupby(lexer, lambda word: set(word) <= set("&|;")):
            words = list(group)
            while words and re.match(r"[A-Za-z_]+=", words[0]):
                words = words[1:]
            if words and not is_operator:
                yield Command(page.name, tuple(words))


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def invocation(module: str, arguments: list[str]) -> Invocation | None:
    """Return the parsed flags of a recipe; None for a request for help.

    Raises:
        ConfigError: the recipe refuses a flag or a value.
    """
    recipe = getattr(importlib.import_module(module), module.removeprefix("recipes."))
    # There is no run to resume here; its directory and the changes are flags like others.
    flags = [
        word
        for word, following in itertools.pairwise([*arguments, ""])
        if word != "--resume" or following == "auto"
    ]
    try:
        return parse(recipe(detect_hardware()), flags)
    except HelpRequested:
        return None


def check_python(module: str, arguments: list[str]) -> None:
    """Check that a module exists and takes the arguments."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"no module {module}"
    assert found.origin is not None

    if module.startswith("recipes."):
        invocation(module, arguments)
    elif module == "rlsys.plan":
        options, fields = plan_parser().parse_known_args(arguments)
        configuration(fields, on_gpu=options.gpu is not None)
    elif module != "pytest":
        check_flags_in_source(Path(found.origin), arguments)


def check_flags_in_source(file: Path, arguments: list[str]) -> None:
    """Check that a module's parser has these flags; it is not started, which would import torch."""
    files = file.parent.glob("*.py") if file.name == "__init__.py" else (file,)
    source = "\n".join(one.read_text() for one in files)
    for word in arguments:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or f'"{flag}"' in source, f"{file.name} has no {flag}"


def check_make(target: str, variables: list[str]) -> None:
    """Check that the Makefile has a target and the variables, and that ARGS means something."""
    targets = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target in targets, f"no target {target}"

    for variable in variables:
        name, _, value = variable.partition("=")
        assert name in ("ARGS", "EXTRA", "PYTHON"), f"no variable {name}"
        if name == "ARGS" and target == "run":
            check_python("recipes.grpo_math", shlex.split(value))
        elif name == "ARGS":
            paths = [word for word in shlex.split(value) if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), value


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_names_what_exists_and_takes_its_flags(command: Command):
    words = list(command.words)
    if words == ACTIVATION:
        return

    if words[0] == "ray" and "--" in words:
        words = words[words.index("--") + 1 :]  # ray job submit ... -- exec python -m ...
        words = words[1:] if words[0] == "exec" else words
        words[0] = words[0].removeprefix("/opt/rlsys/bin/")

    if words[0] == "make":
        check_make(words[1], words[2:])
    elif words[0] == "python" and words[1] == "-m":
        check_python(words[2], words[3:])
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), f"no file {words[1]}"
    else:
        assert words[0] in OTHER_PROGRAMS, f"{words[0]!r} is not installed by `make setup`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_shell_reads_every_block(page: Path):
    shell = shutil.which("bash")
    assert shell is not None
    for block in blocks_of(page):
        done = subprocess.run([shell, "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_environment_is_active_before_the_first_command_that_needs_it(page: Path):
    commands = [list(command.words) for command in commands_of(page)]
    needs = [i for i, words in enumerate(commands) if words[0] in ("python", "ray")]
    if needs:
        hint = f"{page.name}: put `{' '.join(ACTIVATION)}` above its first command"
        assert ACTIVATION in commands[: needs[0]], hint


def self_contained() -> Iterator[list[str]]:
    """Yield the modules and flags of README's training commands that read no file of the user's."""
    for command in COMMANDS:
        words = list(command.words)
        if command.page != "README.md" or "--resume" in words or words[:2] != ["python", "-m"]:
            continue
        if not words[2].startswith("recipes."):
            continue

        parsed = invocation(words[2], words[3:])
        if parsed is None:
            continue
        if parsed.config.data.train == "synthetic" and not parsed.config.plugins:
            yield words[2:]


def test_training_commands_of_readme_pass_the_checks_before_a_start(
    capsys: pytest.CaptureFixture[str],
):
    """Append --dry-run to a few of the commands, and to the recipe alone, which is `make run`."""
    from recipes.run_recipe import run_recipe

    trained = [["recipes.grpo_math"], *self_contained()]
    for module, *flags in trained[:DRY_RUNS]:
        recipe = getattr(importlib.import_module(module), module.removeprefix("recipes."))
        with pytest.raises(SystemExit) as ended:
            run_recipe(recipe, [*flags, "--model.path", "tiny", "--dry-run"])
        assert ended.value.code == 0, capsys.readouterr().err


def test_the_commands_are_found():
    assert len(COMMANDS) > 20
    assert {command.page for command in COMMANDS} >= {"README.md", "CONTRIBUTING.md", "data.md"}
