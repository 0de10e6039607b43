"""Small reward models, and the scores that transformers itself computes with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rlsys.models import resolve_model
from rlsys.models.saving import change_model_config, copy_model_files

HEAD_SCALE = 0.5


def build_reward_model(directory: Path, *, mean: float | None = None, seed: int = 0) -> Path:
    """Write the tiny model with a random head of one output, and its mean reward."""
    _build(AutoModelForSequenceClassification, directory, seed)
    if mean is not None:
        change_model_config(directory, {"reward_mean": mean})
    return directory


def build_process_reward_model(directory: Path, *, seed: int = 0) -> Path:
    """Write the tiny model with a random head of one output for each token."""
    _build(AutoModelForTokenClassification, directory, seed)
    return directory


def _build(kind: Any, directory: Path, seed: int) -> None:
    tiny = resolve_model("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = kind.from_pretrained(tiny, num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=HEAD_SCALE)
    directory.mkdir(parents=True)
    copy_model_files(tiny, directory)
    model.save_pretrained(directory)


def plain_scores(directory: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Return the scores of whole sequences, one at a time through transformers' own class.

    A sequence without an end token gets one. The mean reward is subtracted.
    """
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    end = AutoTokenizer.from_pretrained(directory).eos_token_id
    mean = json.loads((directory / "config.json").read_text()).get("reward_mean", 0.0)

    scores = []
    for tokens in sequences:
        ended = list(tokens) if tokens[-1] == end else [*tokens, end]
        with torch.no_grad():
            scores.append(float(model(input_ids=torch.tensor([ended])).logits[0, 0]) - mean)
    return scores


def plain_step_scores(
    directory: Path, sequences: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return the sigmoid of transformers' own logits at the tokens `ends` of each sequence."""
    model: Any = AutoModelForTokenClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    scores = []
    for tokens, places in zip(sequences, ends, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(tokens)])).logits[0, :, 0]
        scores.append([float(torch.sigmoid(logits[place])) for place in places])
    return scores
