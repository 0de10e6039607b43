"""Batches of random texts, with tokens that the tiny model has."""

from __future__ import annotations

import numpy as np

from rlsys.data.example_encoding import EncodedExample, EncodedResponse
from rlsys.data.example_stream import ExampleBatch, ExampleStream

VOCABULARY = 300


def random_texts(count: int, *, seed: int = 0, longest: int = 20) -> ExampleBatch:
    """Return texts of 2 to `longest` tokens, of which all but the first are learned."""
    return ExampleBatch.of(seed, _encoded(count, seed, longest), 0)


def text_stream(examples_per_step: int) -> ExampleStream:
    """Return a stream of 10 random texts."""
    return ExampleStream(
        _encoded(10, 0, 8),
        examples_per_step=examples_per_step,
        seed=1,
        shuffle=True,
        digest="random",
        field="ptx.train",
    )


def _encoded(count: int, seed: int, longest: int) -> list[EncodedExample]:
    rng = np.random.default_rng([7, seed])
    examples = []
    for _ in range(count):
        tokens = rng.integers(3, VOCABULARY, int(rng.integers(2, longest + 1))).astype(np.int32)
        learned = np.ones(len(tokens) - 1, dtype=np.bool_)
        response = EncodedResponse(token_ids=tokens[1:], learned=learned)
        examples.append(EncodedExample(prompt=(int(tokens[0]),), responses=(response,), ranks=(0,)))
    return examples
