"""--help shows the keyword parameters of the chosen functions, read from their source."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.dapo_math import dapo_math
from recipes.grpo_math import grpo_math
from rlsys.algorithms.advantages import available_advantage_estimators, get_advantage_estimator
from rlsys.algorithms.policy_objectives import available_ratios, available_weights
from rlsys.algorithms.policy_objectives.weights import WEIGHTS
from rlsys.config.command_line import HelpRequested, parse
from rlsys.config.function_help import function_help
from rlsys.config.hardware import Hardware
from rlsys.registry import default_parameters, keyword_parameters
from rlsys.rewards import available_reward_functions, get_reward_function

ROOT = Path(__file__).parents[3]
CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
LIBRARY = [
    *(("register_advantage_estimator", name) for name in available_advantage_estimators()),
    *(("register_weight", name) for name in available_weights()),
    *(("register_reward_function", name) for name in available_reward_functions()),
]
FIND = {
    "register_advantage_estimator": get_advantage_estimator,
    "register_weight": WEIGHTS.get,
    "register_reward_function": get_reward_function,
}


def in_library(decorator: str, name: str) -> bool:
    return FIND[decorator](name).__module__.startswith("rlsys.")


def help_of(recipe: object, *flags: str) -> str:
    with pytest.raises(HelpRequested) as request:
        parse(recipe(CPU), [*flags, "--help"])  # pyright: ignore[reportCallIssue]
    return " ".join(str(request.value).split())


@pytest.mark.parametrize(("decorator", "name"), LIBRARY)
def test_the_source_says_what_the_signature_says(decorator: str, name: str):
    if not in_library(decorator, name):
        pytest.skip("registered by another test")
    function = FIND[decorator](name)
    found = function_help(decorator, name)
    assert found is not None
    assert found.summary == inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace(
        "\n", " "
    )
    assert [keyword.name for keyword in found.keywords] == list(keyword_parameters(function))
    given = {keyword.name for keyword in found.keywords if keyword.default}
    assert given == set(default_parameters(function))


@pytest.mark.parametrize("name", available_ratios())
def test_ratios_are_found(name: str):
    found = function_help("register_ratio", name)
    assert found is not None
    assert found.keywords == ()
    assert found.summary


def test_help_shows_the_parameters_of_what_the_recipe_chooses():
    text = help_of(dapo_math)
    assert (
        "grpo: Return the reward of a response relative to its group, at every token of it." in text
    )
    assert (
        ".eps float: `eps` is added to the standard deviation, not under the root. [1.0e-06]"
        in text
    )
    assert (
        ".divide_by_std true|false: `divide_by_std` false leaves the division out. [true]" in text
    )
    assert ".clip_high float: `clip_high` is the width of the band above 1. [0.28]" in text
    assert ".extraction boxed|boxes|answer_tag|after_hashes|lenient [boxed]" in text
    assert ".matrix_products true|false or null: `matrix_products` true accepts" in text
    assert ".decimal_comma true|false or null: `decimal_comma` true reads 2,74 as 2.74" in text
    assert ".buffer_tokens int or null: `buffer_tokens` null is a quarter" in text
    assert "token: Return d_t." in text


def test_help_follows_the_other_flags_and_survives_wrong_ones():
    text = help_of(grpo_math, "--algorithm.advantage.name", "gae", "--preset", "sapo")
    assert ".lam float: `lam` is the weight of longer returns, lambda. [1.0]" in text
    assert ".tau_neg float" in text
    assert "grpo: Return the reward of a response" not in text
    assert "grpo: Return the reward of a response" in help_of(grpo_math, "--no.such", "flag")
    unknown = help_of(grpo_math, "--algorithm.advantage.name", "gea")
    assert "gea: its source code was not found." in unknown


def test_a_plug_in_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_mine.py").write_text(
        "raise RuntimeError('imported')\n"
        "@register_advantage_estimator('mine', compares_group=True)\n"
        "def mine(inputs, *, width: float, deep: bool = False):\n"
        "    '''Mine.\n\n    Args:\n        width: How wide it is. More.\n"
        "        deep: Whether it is deep.\n    '''\n"
    )
    text = help_of(grpo_math, "--plugins", "of_mine", "--algorithm.advantage.name", "mine")
    assert "mine: Mine. .width float: How wide it is. (required)" in text
    assert ".deep true|false: Whether it is deep. [false]" in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from recipes.grpo_math import grpo_math\n"
        "from recipes.run_recipe import run_recipe\n"
        "try:\n    run_recipe(grpo_math, ['--help'])\n"
        "finally:\n    print([m for m in ('torch', 'numpy', 'ray', 'vllm') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ".divide_by_std" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
