"""What reaches an engine of vLLM that runs in processes of its own: calls that can be pickled."""

import pickle
from collections.abc import Iterator
from functools import partial

import cloudpickle
import pytest
import torch

from rlsys.config import RunConfig
from workers.generation.engines import vllm


def config(tensor_parallel: int) -> RunConfig:
    generation = {"dtype": "float32", "tensor_parallel": tensor_parallel}
    return RunConfig.model_validate({"generation": generation})


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    for number in range(7):
        yield str(number), torch.full((10, 10), float(number))


def test_every_weight_is_in_one_part_and_parts_are_small():
    parts = list(vllm._parts(weights(), 1000))
    assert [[name for name, _ in part] for part in parts] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6"],
    ]
    assert list(vllm._parts(iter(()), 1000)) == []


def test_a_part_can_be_pickled_and_a_generator_could_not():
    for part in vllm._parts(weights(), 1000):
        sent = cloudpickle.dumps(partial(vllm._load_part, tensors=part), pickle.HIGHEST_PROTOCOL)
        found = cloudpickle.loads(sent).keywords["tensors"]
        for (name, tensor), (found_name, received) in zip(part, found, strict=True):
            assert name == found_name
            assert torch.equal(tensor, received)
    with pytest.raises(TypeError, match="generator"):
        cloudpickle.dumps(partial(vllm._reload_weights, tensors=weights()))


def test_several_gpus_have_processes_of_vllm_and_not_actors():
    assert vllm.engine_settings(config(2), "m")["distributed_executor_backend"] == "mp"
    assert vllm.engine_settings(config(1), "m")["distributed_executor_backend"] is None


def test_sums_of_split_weights_add_up_and_those_of_whole_ones_do_not():
    norm, halves = 3.0, (1.5, 2.5)
    found = [{"norm": norm, "down_proj": half} for half in halves]
    assert vllm.sums_of_all_processes(found) == {"norm": 3.0, "down_proj": 4.0}
    assert vllm.sums_of_all_processes(found[:1]) == found[0]
