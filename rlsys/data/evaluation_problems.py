"""The problems of an evaluation without training, and their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.data.batches import PromptBatch
from rlsys.data.problems import Problem
from rlsys.data.prompt_stream import (
    dropped_notices,
    encode_problems,
    load_problems,
    read_source,
)
from rlsys.data.prompt_templates import PromptRenderer, check_template_takes
from rlsys.data.synthetic_problems import generate_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class EvaluationProblems:
    """The problems to evaluate on, and the training problems to compare them with."""

    problems: list[Problem]
    train: list[Problem] | None  # None: data.train is off
    origin: str
    notices: tuple[str, ...]  # about these data, for the user


def load_evaluation_problems(config: EvaluationRunConfig) -> EvaluationProblems:
    """Read or generate the problems, with all other columns of the data.

    Raises:
        ValueError: see `load_problems`.
    """
    data = config.data
    sampling_run = config.sampling_run()
    if data.train == "off" and data.eval != "synthetic":
        notices: list[str] = []
        problems = read_source(sampling_run.data, data.eval, "data.eval", notices, metadata=True)
        problems = problems[: data.eval_limit or None]
        check_template_takes(problems, sampling_run.data, "data.eval")
        return EvaluationProblems(
            problems=problems, train=None, origin=data.eval, notices=tuple(notices)
        )

    if data.train in ("off", "synthetic") and data.eval in ("synthetic", "auto"):
        return _generated(config)
    trainer = sampling_run.trainer.model_copy(update={"seed": data.synthetic.seed})
    run = sampling_run.model_copy(update={"trainer": trainer})  # its seed is that of the generator
    loaded = load_problems(run, metadata=True)
    return EvaluationProblems(
        problems=loaded.evaluation,
        train=loaded.train,
        origin="held out of data.train" if data.eval == "auto" else loaded.origin,
        notices=loaded.notices,
    )


def _generated(config: EvaluationRunConfig) -> EvaluationProblems:
    """Generate the problems; those for training only where they are compared with."""
    synthetic = config.data.synthetic
    train, held_out = generate_problems(
        synthetic.levels,
        train_size=synthetic.train_size,
        eval_size=synthetic.eval_size,
        seed=synthetic.seed,
    )
    return EvaluationProblems(
        problems=held_out[: config.data.eval_limit or None],
        train=None if config.data.train == "off" else train,
        origin="synthetic",
        notices=(),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompts:
    """The prompts of one model."""

    prompts: PromptBatch  # group ids are places in the data
    dropped: int  # longer than data.max_prompt_tokens
    notices: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of the tokens and the ground truths, which a resume compares."""
        digest = hashlib.sha256()
        for prompt in self.prompts.prompts:
            digest.update(repr((prompt.token_ids, prompt.ground_truth)).encode())
        return digest.hexdigest()


def evaluation_prompts(
    config: EvaluationRunConfig,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
) -> EvaluationPrompts:
    """Render and tokenize the problems with the tokenizer of one model.

    Raises:
        ValueError: longer prompts than `data.max_prompt_tokens` where those are refused, or where
            all are longer.
    """
    data = config.data
    renderer = PromptRenderer(data.template, tokenizer, chat=data.chat)
    kept = encode_problems(problems, renderer, data, "data.eval")
    places = {id(problem): place for place, problem in enumerate(problems)}
    batch = PromptBatch(
        batch_id=0,
        prompts=tuple(prompt for _, prompt in kept),
        group_ids=np.array([places[id(problem)] for problem, _ in kept], dtype=np.int64),
    )
    dropped = len(problems) - len(kept)
    return EvaluationPrompts(
        prompts=batch,
        dropped=dropped,
        notices=tuple(dropped_notices("data.eval", dropped, len(problems), data.max_prompt_tokens)),
    )
