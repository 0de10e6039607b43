"""Models of all roles compute with the same numbers."""

from pathlib import Path

import numpy as np
import torch

from rlsys.config import RunConfig
from tests.support.model_families import build_family
from tests.support.rollout_examples import random_rollouts
from workers.training.policy import PolicyWorker
from workers.training.reference import ReferenceWorker


def test_in_bfloat16_a_reference_computes_as_the_policy_does(tmp_path: Path):
    """Only weights are stored in bfloat16: rounded frequencies of RoPE would be another model."""
    build_family("llama", tmp_path)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "generation": {"dtype": "float32"},
            "policy": {"compute_dtype": "bfloat16"},
        }
    )
    rollouts = random_rollouts(0)
    found = []
    for kind in (PolicyWorker, ReferenceWorker):
        worker = kind(config, str(tmp_path), 0, 1)
        try:
            worker.setup(worker.rendezvous())
            found.append(worker.logprobs(rollouts).logprobs)
            buffers = {buffer.dtype for buffer in worker.backend.module.buffers()}
            assert buffers == {torch.float32}
        finally:
            worker.shutdown()
    np.testing.assert_array_equal(*found)
