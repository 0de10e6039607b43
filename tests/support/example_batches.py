"""Batches of random examples, with tokens that the tiny model has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsys.data.example_encoding import NO_STEP, EncodedExample, EncodedResponse
from rlsys.data.example_stream import ExampleBatch

VOCABULARY = 300


def random_steps(count: int, seed: int = 0) -> ExampleBatch:
    """Return prompts with one response each, in which some tokens end a right or wrong step."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(2, 12))
        labels = rng.choice([NO_STEP, NO_STEP, 0, 1], length).astype(np.int8)
        labels[rng.integers(0, length)] = rng.integers(0, 2)
        response = EncodedResponse(
            token_ids=rng.integers(3, VOCABULARY, length).astype(np.int32),
            learned=np.ones(length, dtype=np.bool_),
            step_labels=labels,
        )
        prompt = tuple(rng.integers(3, VOCABULARY, rng.integers(2, 8)).tolist())
        examples.append(EncodedExample(prompt=prompt, responses=(response,), ranks=(0,)))
    return ExampleBatch.of(0, examples, 5)


def random_examples(responses: Sequence[int], seed: int = 0) -> ExampleBatch:
    """Return prompts with so many responses each, of which some tokens are not learned."""
    rng = np.random.default_rng(seed)
    examples = []
    for count in responses:
        encoded = []
        for _ in range(count):
            length = int(rng.integers(2, 12))
            learned = rng.random(length) < 0.8
            learned[-1] = True
            tokens = rng.integers(3, VOCABULARY, length).astype(np.int32)
            encoded.append(EncodedResponse(token_ids=tokens, learned=learned))
        prompt = tuple(rng.integers(3, VOCABULARY, rng.integers(2, 8)).tolist())
        ranks = tuple(rng.permutation(count).tolist())
        examples.append(EncodedExample(prompt=prompt, responses=tuple(encoded), ranks=ranks))
    return ExampleBatch.of(0, examples, 5)
