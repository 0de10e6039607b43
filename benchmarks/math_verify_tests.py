"""The verifier on the pairs of ground truth and completion in math-verify's own tests.

The tests are in its source distribution:

    pip download math-verify==0.9.0 --no-deps --no-binary math-verify
    tar xzf math_verify-0.9.0.tar.gz
    python -m benchmarks.math_verify_tests math_verify-0.9.0

Every pair is verified with the extraction `lenient`, because most completions have no box. Printed
are the agreement and each disagreement. Results are recorded in docs/math_verifier.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlsys.math_verifier import verify_math

MODULES = (
    "test_all",
    "test_boxed",
    "test_numina_cases",
    "test_open_thoughts",
    "test_strict",
    "test_yujianll",
)


@dataclass(frozen=True)
class Pair:
    """One case of the suite, and the options of its own that it sets."""

    test: str
    ground_truth: str
    completion: str
    expected: bool
    options: dict[str, Any]


def pairs(folder: Path) -> Iterator[Pair]:
    """Yield the parameters of the tests that compare a `gold` with a `pred`."""
    package = ModuleType("tests")  # the suite imports from tests.test_all
    package.__path__ = [str(folder / "tests")]
    sys.modules["tests"] = package

    for name in MODULES:
        module = importlib.import_module(f"tests.{name}")
        for test, function in vars(module).items():
            if test.startswith("test_") and function.__module__ == module.__name__:
                for mark in getattr(function, "pytestmark", []):
                    yield from _parameters(f"{name}.{test}", mark)


def _parameters(test: str, mark: Any) -> Iterator[Pair]:
    if mark.name != "parametrize":
        return
    names = [name.strip() for name in mark.args[0].split(",")]
    for values in mark.args[1]:
        case = dict(zip(names, values, strict=True))
        truth, completion = case.pop("gold"), case.pop("pred")
        expected = case.pop("expected") if "expected" in case else case.pop("result")
        case.pop("match_types", None)
        yield Pair(test, truth, completion, bool(expected), case)


def main() -> None:
    """Print the agreement and the disagreements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the unpacked source distribution")
    folder = parser.parse_args().folder
    if not (folder / "tests" / "test_all.py").is_file():
        parser.error(f"{folder} has no tests/test_all.py: unpack the source distribution there")

    cases = list(pairs(folder))
    wrong: list[Pair] = []
    for case in cases:
        verdict = verify_math(case.completion, case.ground_truth, extraction="lenient")
        if (verdict.score == 1.0) != case.expected:
            wrong.append(case)

    false_positives = sum(not case.expected for case in wrong)
    print(
        f"{len(cases)} pairs, {len(cases) - len(wrong)} agree ({1 - len(wrong) / len(cases):.1%});"
        f" {false_positives} are equal here alone, {len(wrong) - false_positives} there alone"
    )
    for case in wrong:
        where = "there" if case.expected else "here"
        truth, completion = case.ground_truth[-60:], case.completion[-60:]
        print(f"equal {where} alone: {truth!r}  {completion!r}  {case.test} {case.options or ''}")


if __name__ == "__main__":
    main()
