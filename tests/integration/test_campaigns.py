"""Small runs of the searches in benchmarks/campaigns.

They find nothing in the code as it is, and they find a defect that is put in.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# A weight that is the square of the ratio.
WRONG_GRADIENTS = """
import sys
from rlsys.algorithms.policy_objectives import weights

def squared(terms):
    return weights._uncut(terms.ratios**2 * terms.advantages)

weights.WEIGHTS._entries["importance"] = squared
from benchmarks.campaigns.enumeration import main
sys.exit(main())
"""
# A preflight that accepts everything.
NO_PREFLIGHT = """
import sys
from rlsys.run import preflight

preflight.config_mistakes = lambda config, directory, hardware, *, resume: []
from benchmarks.campaigns.command_line import main
sys.exit(main())
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on one thread."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_every_small_policy_gets_the_gradient_that_is_stated():
    done = run("-m", "benchmarks.campaigns.enumeration", "--seed", "0", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings: 0" in done.stdout


def test_the_command_line_keeps_its_promises():
    arguments = ("--seed", "0", "--trials", "30", "--small")
    done = run("-m", "benchmarks.campaigns.command_line", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_weight_is_found():
    words = "ratio=product weight=importance staleness=live_moved"
    done = run("-c", WRONG_GRADIENTS, "--processes", "1", "--only", words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "estimator=rloo" in done.stdout


@pytest.mark.long
def test_a_missing_preflight_is_found():
    arguments = ("--processes", "1", "--trials", "0", "--only", "parameter")
    done = run("-c", NO_PREFLIGHT, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "accepts 'no_such_choice'" in done.stdout
