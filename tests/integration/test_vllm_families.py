"""vLLM gives the log-probabilities of the trained model after a weight sync.

Four families with different features that a sync can get wrong. `python -m
benchmarks.campaigns.vllm_families` compares all; its last result is docs/data/vllm_families.json.
"""

import json
import math
from pathlib import Path

import pytest

from tests.support.model_families import FAMILIES
from tests.support.vllm_comparison import in_a_process

TABLE = Path(__file__).resolve().parents[2] / "docs" / "data" / "vllm_families.json"
CASES = ("qwen3_moe", "mistral", "gemma2", "qwen2")  # experts, window, softcaps, tied embeddings


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_vllm_follows_the_trainer(family: str):
    found = in_a_process(family)
    assert found.get("max_difference", math.inf) < 1e-3, found
    assert found["max_difference_of_old_weights"] > 1  # so old weights would have been seen


def test_no_family_of_the_table_is_silently_wrong():
    """Check that each family agrees, or is refused with a reason."""
    table = json.loads(TABLE.read_text())
    assert set(table) == set(FAMILIES)
    for family, found in table.items():
        assert found.get("refused") or found["max_difference"] < 5e-3, family
