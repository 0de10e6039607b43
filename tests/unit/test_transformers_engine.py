"""The transformers engine: sampling beyond windows, log-probabilities, and new weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.config import GenerationConfig, RunConfig
from rlsys.data.batches import Prompt, SamplingParameters, StopReason
from rlsys.models.checkpoint_names import to_checkpoint
from rlsys.models.loading import load_causal_lm
from rlsys.models.weights import pack_weights, unpack_weights
from tests.support.architectures import ARCHITECTURES, save_tiny_model
from tests.support.model_families import WINDOW, build_family, load_family
from workers.generation.engines.transformers import TransformersEngine

FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "lfm2", "gpt2")
SAMPLING = SamplingParameters(
    samples_per_prompt=2, temperature=0.7, top_p=0.9, max_tokens=2 * WINDOW, min_tokens=2 * WINDOW
)


@torch.no_grad()
def own_logprobs(model: Any, tokens: list[int], temperature: float) -> np.ndarray:
    """Return log-probabilities by one forward pass without a cache, [L - 1]."""
    ids = torch.tensor(tokens)
    logs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
    return logs.gather(1, ids[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_models_own_after_new_weights(family: str, tmp_path: Path):
    build_family(family, tmp_path)
    generation = GenerationConfig.model_validate({"engine": "transformers", "dtype": "float32"})
    engine = TransformersEngine(RunConfig(generation=generation), str(tmp_path))
    model = load_family(tmp_path, seed=2)
    weights = to_checkpoint(model, model.state_dict())
    sent = pack_weights(weights.items(), version=1, dtype=torch.float32)
    engine.install_weights(unpack_weights(*sent))

    prompt = Prompt(problem_id="", token_ids=(9, 4, 7), text="", problem="", ground_truth="")
    ((group,),) = engine.generate([prompt], [0], SAMPLING)
    for response in group.responses:
        tokens = [*prompt.token_ids, *response.token_ids]
        expected = own_logprobs(model, tokens, SAMPLING.temperature)[-len(response.token_ids) :]
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)

    sequences = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 3 * WINDOW)]
    for sequence, found in zip(sequences, engine.probe_logprobs(sequences), strict=True):
        np.testing.assert_allclose(found, own_logprobs(model, sequence.tolist(), 1.0), atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "mamba, recurrent state",  # keeps its state under another name
        "bamba, recurrent state",  # its cache in transformers gives other log-probabilities
    ],
)
def test_without_a_usable_cache_whole_passes_are_decoded(name: str, tmp_path: Path):
    chosen = next(architecture for architecture in ARCHITECTURES if architecture.name == name)
    save_tiny_model(tmp_path, chosen)
    generation = GenerationConfig.model_validate({"engine": "transformers", "dtype": "float32"})
    engine = TransformersEngine(RunConfig(generation=generation), str(tmp_path))
    model = load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")

    prompt = Prompt(problem_id="", token_ids=(9, 4, 7), text="", problem="", ground_truth="")
    sampling = SamplingParameters(samples_per_prompt=2, temperature=0.7, max_tokens=8, min_tokens=8)
    ((group,),) = engine.generate([prompt], [0], sampling)
    for response in group.responses:
        tokens = [*prompt.token_ids, *response.token_ids]
        expected = own_logprobs(model, tokens, sampling.temperature)[-len(response.token_ids) :]
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)


def test_responses_of_a_group_end_at_their_own_places(tmp_path: Path):
    """Stop each response by itself, whatever the other responses of the group do.

    The reason is END with its end token, and LENGTH after max_tokens.
    """
    build_family("llama", tmp_path)
    generation = GenerationConfig.model_validate({"engine": "transformers", "dtype": "float32"})
    engine = TransformersEngine(RunConfig(generation=generation), str(tmp_path))
    engine._end_ids = frozenset(range(40))  # one in ten tokens ends a response

    sampling = SamplingParameters(
        samples_per_prompt=16, temperature=3.0, max_tokens=12, min_tokens=2
    )
    prompt = Prompt(problem_id="", token_ids=(9, 4, 7), text="", problem="", ground_truth="")
    ((group,),) = engine.generate([prompt], [0], sampling)
    lengths = {len(response.token_ids) for response in group.responses}
    assert len(lengths) > 3
    assert min(lengths) > 2

    for response in group.responses:
        ended = [token < 40 for token in response.token_ids]
        assert not any(ended[:-1])
        assert (response.stop_reason == StopReason.END) == ended[-1]
        assert ended[-1] or len(ended) == 12
        assert len(response.logprobs) == len(ended)
