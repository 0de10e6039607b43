"""The seeded, resumable stream of training prompts, and the fixed set of held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys.config import DataConfig, RunConfig
from rlsys.data.batches import Prompt, PromptBatch
from rlsys.data.problems import Problem
from rlsys.data.prompt_templates import PromptRenderer
from rlsys.data.readers import read_problems
from rlsys.data.synthetic_problems import generate_problems


class PromptStream:
    """Batches of `prompts_per_step` prompts for ever: each epoch is a new permutation, a batch may span two epochs.

    The stream's whole state is the number of batches taken, since epoch e is always permuted by the seed (seed, e).
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool
    ) -> None:
        assert prompts, "an empty stream"
        self._prompts = prompts
        self._size = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._batches_taken = 0

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    def next_batch(self) -> PromptBatch:
        """The next batch; group ids are unique within the run."""
        batch_id = self._batches_taken
        positions = range(batch_id * self._size, (batch_id + 1) * self._size)
        self._batches_taken += 1
        return PromptBatch(
            batch_id=batch_id,
            prompts=tuple(self._prompts[self._index(position)] for position in positions),
            group_ids=np.asarray(positions, dtype=np.int64),
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self._prompts))
        return int(self._order(epoch)[place]) if self._shuffle else place

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch, self._cached_order = (
                epoch,
                np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)),
            )
        return self._cached_order

    def state(self) -> dict[str, Any]:
        """JSON-compatible position of the stream."""
        return {"batches_taken": self._batches_taken, "prompts": len(self._prompts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the data have changed since.
        """
        if state["prompts"] != len(self._prompts):
            raise ValueError(
                f"data.train: the checkpoint was written with {state['prompts']} prompts, now there are {len(self._prompts)}. Resume with "
                "the same data and filters."
            )
        self._batches_taken = int(state["batches_taken"])


@dataclass(frozen=True, kw_only=True)
class LoadedProblems:
    """Problems of one run before they are worded."""

    train: list[Problem]
    evaluation: list[Problem]


@dataclass(frozen=True, kw_only=True)
class LoadedPrompts:
    """Prompts of one run, and how many were dropped as too long."""

    train: PromptStream
    evaluation: PromptBatch
    dropped_train: int
    dropped_evaluation: int


def load_problems(config: RunConfig) -> LoadedProblems:
    """Read or generate the problems.

    Raises:
        ValueError: see `read_problems` and `generate_problems`.
    """
    data = config.data
    synthetic_train, synthetic_eval = [], []
    if "synthetic" in (data.train, data.eval):
        synthetic = data.synthetic
        synthetic_train, synthetic_eval = generate_problems(
            synthetic.levels,
            train_size=synthetic.train_size,
            eval_size=synthetic.eval_size,
            seed=config.trainer.seed,
        )
    train = synthetic_train if data.train == "synthetic" else _read(data, data.train, "data.train")
    evaluation = synthetic_eval if data.eval == "synthetic" else _read(data, data.eval, "data.eval")
    return LoadedProblems(train=train, evaluation=evaluation[: data.eval_limit or None])


def _read(data: DataConfig, source: str, field: str) -> list[Problem]:
    return read_problems(
        source, columns=data.columns, field=field, levels=data.levels, subjects=data.subjects
    )


def load_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, problems: LoadedProblems | None = None
) -> LoadedPrompts:
    """Word and tokenize the problems.

    Raises:
        ValueError: as `load_problems`; prompts beyond `data.max_prompt_tokens` where those are refused, or all of them.
    """
    problems = problems or load_problems(config)
    renderer = PromptRenderer(config.data.template, tokenizer)
    train, dropped_train = _encode(problems.train, renderer, config.data, "data.train")
    evaluation, dropped_evaluation = _encode(
        problems.evaluation, renderer, config.data, "data.eval"
    )
    stream = PromptStream(
        train,
        prompts_per_step=config.trainer.prompts_per_step,
        seed=config.trainer.seed,
        shuffle=config.data.shuffle,
    )
    held_out = PromptBatch(
        batch_id=-1, prompts=tuple(evaluation), group_ids=np.arange(len(evaluation), dtype=np.int64)
    )
    return LoadedPrompts(
        train=stream,
        evaluation=held_out,
        dropped_train=dropped_train,
        dropped_evaluation=dropped_evaluation,
    )


def _encode(
    problems: Sequence[Problem], renderer: PromptRenderer, data: DataConfig, field: str
) -> tuple[list[Prompt], int]:
    prompts = [renderer.encode(problem) for problem in problems]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= data.max_prompt_tokens]
    dropped = len(prompts) - len(kept)
    if dropped and (data.overlong_prompts == "refuse" or not kept):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        raise ValueError(
            f"data.max_prompt_tokens: {dropped} of {len(prompts)} prompts of {field} are longer than {data.max_prompt_tokens} tokens (the "
            f"longest, {longest.problem_id!r}, has {len(longest.token_ids)}). Raise the limit"
            + (", or set data.overlong_prompts to drop." if kept else ".")
        )
    return kept, dropped
