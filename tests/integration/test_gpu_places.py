"""The reference computes on the GPU of its policy rank. Ray is told of GPUs that do not exist."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("gpus_per_rank", [1.0, 0.5])
def test_a_reference_rank_sees_the_gpu_of_its_policy_rank(gpus_per_rank: float):
    command = [sys.executable, "-m", "tests.support.gpu_places", str(gpus_per_rank)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    seen = json.loads(output.stdout.splitlines()[-1])

    assert seen["reference-0"] == seen["policy-0"]
    assert seen["reference-1"] == seen["policy-1"]
    assert all(gpus.isdecimal() for gpus in seen.values())
    if gpus_per_rank == 1.0:
        assert len({seen["policy-0"], seen["policy-1"], seen["generation-0"]}) == 3
