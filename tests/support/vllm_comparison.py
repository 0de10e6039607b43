"""vLLM after a weight sync against the model's own forward pass, for a tiny model of a family.

vLLM starts on random weights, receives others as it does from the trainer (names of the checkpoint,
shards, reload), and returns the log-probabilities of sequences longer than every window.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.config import DataConfig, GenerationConfig, RunConfig
from rlsys.models.checkpoint_names import (
    CheckpointNames,
    names_without_mapping,
    untied_state_dict,
)
from rlsys.models.weights import pack_weights, unpack_weights
from tests.support.model_families import build_family, load_family
from workers.weight_sync.synchronizer import DEFAULT_TOLERANCE

LENGTHS = (9, 40, 70)  # tokens: within the window of 16, beyond it, and beyond it twice over
LIMIT_S = 150
# One process has imported what all need, which takes longer than the comparison; each family gets
# a copy of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vllm", "vllm.v1.engine.llm_engine", __spec__.name])


def compare(family: str, engine: str = "vllm") -> dict[str, float]:
    """Return the largest differences in log-probability between engine and model.

    `max_difference` is that after the sync. `max_difference_of_old_weights` is that to the old
    weights: it shows what a stale engine would look like.

    Raises:
        ValueError: as a run would stop: no way back to the names of the checkpoint, or a probe
            beyond the tolerance.
    """
    from workers.generation.engines import make_engine

    config = RunConfig(
        data=DataConfig(max_prompt_tokens=100),
        generation=GenerationConfig.model_validate(
            {"engine": engine, "dtype": "float32", "max_tokens": 28}
        ),
    )
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        build_family(family, directory)
        old = load_family(directory, seed=1)
        model = load_family(directory, seed=2)
        without = names_without_mapping(model, directory)
        if without:
            raise ValueError(f"transformers has no mapping back for {without[0]}")

        # Computed before vLLM starts: it changes the classes of transformers for models for which
        # it has no code of its own.
        generator = np.random.default_rng(0)
        vocabulary = model.config.get_text_config().vocab_size
        sequences = [
            generator.integers(0, vocabulary, length).astype(np.int32) for length in LENGTHS
        ]
        expected = np.concatenate([forward_logprobs(model, sequence) for sequence in sequences])
        stale = np.concatenate([forward_logprobs(old, sequence) for sequence in sequences])
        rollouts = make_engine(config, scratch)

    weights = as_sent(model)
    sent = pack_weights(weights, version=1, dtype=torch.float32, bucket_bytes=2**16)
    rollouts.install_weights(unpack_weights(*sent))
    found = np.concatenate(rollouts.probe_logprobs(sequences))

    differences = np.abs(found - expected)
    if not differences.mean() <= DEFAULT_TOLERANCE["float32"]:
        raise ValueError(
            f"the probe after the sync: engine and model differ by up to {differences.max():.2f}"
        )
    return {
        "max_difference": float(differences.max()),
        "max_difference_of_old_weights": float(np.abs(found - stale).max()),
    }


def as_sent(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights as a trainer sends them: by the names of the checkpoint, in groups."""
    state = untied_state_dict(model)
    names = CheckpointNames(model, state)
    for group in names.groups:
        yield from names.convert(group, {name: state[name] for name in group.names}).items()


@torch.no_grad()
def forward_logprobs(model: Any, sequence: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of the model's own forward pass, [L - 1]."""
    tokens = torch.from_numpy(sequence.astype(np.int64))
    logs = model(input_ids=tokens[None]).logits[0, :-1].float().log_softmax(-1)
    return logs.gather(1, tokens[1:, None])[:, 0].numpy()


def in_a_process(family: str, engine: str = "vllm") -> dict[str, Any]:
    """Run `compare` where nothing of another family is left over, and a crash is a result."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_answer, args=(family, engine, sender))
    process.start()

    sender.close()  # so that the end of the process is the end of the pipe
    try:
        if receiver.poll(LIMIT_S):
            return receiver.recv()
        return {"refused": f"no answer within {LIMIT_S} s"}
    except EOFError:
        process.join()
        return {"refused": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _answer(family: str, engine: str, sender: Any) -> None:
    try:
        result: dict[str, Any] = dict(compare(family, engine))
    except Exception as error:
        reason = str(error).strip().splitlines() or ["no message"]
        result = {"refused": f"{type(error).__name__}: {reason[0]}"[:300]}
    sender.send(result)
