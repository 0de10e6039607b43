"""The seeded, resumable stream of training prompts, and the fixed set of held-out ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.config import DataConfig, RunConfig
from rlsys.data.batches import Prompt, PromptBatch
from rlsys.data.epoch_order import EpochOrder
from rlsys.data.held_out import hold_out, shared_problems
from rlsys.data.problems import Problem, problems_digest
from rlsys.data.prompt_templates import PromptRenderer, check_template_takes
from rlsys.data.readers import check_sources, read_problems
from rlsys.data.synthetic_problems import generate_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptStream:
    """An endless stream of batches of `prompts_per_step` prompts.

    Each epoch is a new permutation, and a batch may span two epochs. The stream's whole state is
    the number of prompts and of batches taken, since epoch e is always permuted with the seed
    (seed, e). A resumed run may use another batch size.

    A loop that has taken prompts and not trained on them yet can save them as returned: a resumed
    run begins with those.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        digest: str | None = None,
    ) -> None:
        """Create a stream; `digest` is the `problems_digest` of the problems behind the prompts.

        None: it is unknown, and not compared on a resume.
        """
        assert prompts, "an empty stream"
        self._prompts = prompts
        self._size = prompts_per_step
        self._order = EpochOrder(len(prompts), seed=seed, shuffle=shuffle)
        self._digest = digest
        self._batches_taken = 0
        self._prompts_taken = 0
        self._returned: tuple[int, ...] = ()  # positions below `_prompts_taken`, which come first

    def __len__(self) -> int:
        """Return the number of prompts of one epoch."""
        return len(self._prompts)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts of an epoch, in the order of the data."""
        return self._prompts

    @property
    def mean_tokens(self) -> float:
        """Mean length of a prompt."""
        return sum(len(prompt.token_ids) for prompt in self._prompts) / len(self._prompts)

    def next_batch(self) -> PromptBatch:
        """Return the next batch; group ids, the positions in the stream, are unique in a run."""
        batch_id = self._batches_taken
        again, self._returned = self._returned[: self._size], self._returned[self._size :]
        fresh = self._size - len(again)
        positions = [*again, *range(self._prompts_taken, self._prompts_taken + fresh)]
        self._batches_taken += 1
        self._prompts_taken += fresh

        return PromptBatch(
            batch_id=batch_id,
            prompts=tuple(self._prompts[self._order.index(position)] for position in positions),
            group_ids=np.asarray(positions, dtype=np.int64),
        )

    def state(self, returned: Sequence[int] = ()) -> dict[str, Any]:
        """Return the position of the stream, ready for JSON.

        Args:
            returned: group ids that were taken and must come again, first and in this order.
        """
        return {
            "batches_taken": self._batches_taken,
            "prompts_taken": self._prompts_taken,
            "returned": [*returned, *self._returned],
            "prompts": len(self._prompts),
            "problems_digest": self._digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the data have changed since.
        """
        if state["prompts"] != len(self._prompts):
            raise ValueError(
                f"data.train: the checkpoint was written with {state['prompts']} prompts, now "
                f"there are {len(self._prompts)}. Resume with the same data and filters."
            )

        # An earlier version kept none, or one of other fields under another name.
        digest = state.get("problems_digest")
        if digest is not None and self._digest is not None and digest != self._digest:
            raise ValueError(
                f"data.train: the {len(self._prompts)} prompts are not those that the checkpoint "
                "was written with, or in another order. Resume with the same data and filters, or "
                "start a new run from the checkpoint with --model.path."
            )

        self._batches_taken = int(state["batches_taken"])
        self._prompts_taken = int(state["prompts_taken"])
        self._returned = tuple(state.get("returned", ()))  # absent in earlier versions


@dataclass(frozen=True, kw_only=True)
class LoadedProblems:
    """Problems of one run before they become prompts. No `evaluation`: data.eval is off."""

    train: list[Problem]
    evaluation: list[Problem]
    origin: str  # of the held-out problems, for messages
    notices: tuple[str, ...]  # about these data, for the user

    def describe(self) -> str:
        """Return one line: how many problems there are, and which are evaluated."""
        if not self.evaluation:
            return f"{len(self.train)} training problems, no evaluation ({self.origin})"
        return (
            f"{len(self.train)} training and {len(self.evaluation)} held-out problems "
            f"({self.origin})"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedPrompts:
    """Prompts of one run, and how many were dropped as too long."""

    train: PromptStream
    evaluation: PromptBatch
    dropped_train: int
    dropped_evaluation: int
    notices: tuple[str, ...]  # about these data, for the user

    @property
    def samples(self) -> Sequence[Prompt]:
        """Prompts for comparing engine and trainer: the held-out ones, else those of training."""
        return self.evaluation.prompts or self.train.prompts


def load_problems(config: RunConfig, *, metadata: bool = False) -> LoadedProblems:
    """Read or generate the problems, with the other columns of the data where `metadata` is set.

    Raises:
        ValueError: see `read_problems`, `generate_problems` and `hold_out`; conversations under a
            template that has no place for turns.
    """
    data = config.data
    notices: list[str] = []
    check_sources(data, "problems")

    if data.train == "synthetic":
        train, held_out = _synthetic(config)
    else:
        train, held_out = read_source(data, data.train, "data.train", notices, metadata), []

    if data.eval == "off":
        evaluation, origin = [], "data.eval is off"
    elif data.train == "synthetic" and data.eval in ("auto", "synthetic"):
        evaluation, origin = held_out, "synthetic"
    elif data.eval == "auto":
        split = hold_out(train, fraction=data.held_out, limit=data.eval_limit)
        train, evaluation = split.train, split.held_out
        origin = "held out of data.train by a hash of their text, and not trained on"
        notices += _copies_notices(split.copies)
    else:
        evaluation, origin = read_source(data, data.eval, "data.eval", notices, metadata), data.eval

    evaluation = evaluation[: data.eval_limit or None]
    notices += _shared_notices(train, evaluation)

    check_template_takes(train, data, "data.train")
    check_template_takes(evaluation, data, "data.eval")
    return LoadedProblems(train=train, evaluation=evaluation, origin=origin, notices=tuple(notices))


def _synthetic(config: RunConfig) -> tuple[list[Problem], list[Problem]]:
    synthetic = config.data.synthetic
    return generate_problems(
        synthetic.levels,
        train_size=synthetic.train_size,
        eval_size=synthetic.eval_size,
        seed=config.trainer.seed,
    )


def read_source(
    data: DataConfig, source: str, field: str, notices: list[str], metadata: bool
) -> list[Problem]:
    """Return the problems of a file or a hub data set, and append a notice of dropped rows.

    Raises:
        ValueError: see `read_problems`.
    """
    return read_problems(
        source,
        columns=data.columns,
        field=field,
        where=data.where,
        metadata=metadata,
        on_dropped=notices.append if data.blank_rows == "drop" else None,
    )


def _copies_notices(copies: int) -> Iterator[str]:
    if copies:
        yield (
            f"data.train: {copies} further copies of held-out problems are neither trained on nor "
            "evaluated"
        )


def _shared_notices(train: Sequence[Problem], evaluation: Sequence[Problem]) -> Iterator[str]:
    shared = shared_problems(train, evaluation)
    if shared:
        yield (
            f"data.eval: WARNING: {shared} of its {len(evaluation)} problems are also in "
            "data.train, so accuracy on them is not held out. Drop them from one of the two, or "
            "set data.eval to auto"
        )


def load_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, problems: LoadedProblems | None = None
) -> LoadedPrompts:
    """Render and tokenize the problems as prompts.

    Raises:
        ValueError: as `load_problems`; prompts longer than `data.max_prompt_tokens` where those are
            refused, or where all are longer.
    """
    problems = problems or load_problems(config)
    renderer = PromptRenderer(config.data.template, tokenizer, chat=config.data.chat)
    train = encode_problems(problems.train, renderer, config.data, "data.train")
    evaluation = encode_problems(
        problems.evaluation, renderer, config.data, f"data.eval ({problems.origin})"
    )
    dropped_train = len(problems.train) - len(train)
    dropped_evaluation = len(problems.evaluation) - len(evaluation)

    stream = PromptStream(
        [prompt for _, prompt in train],
        prompts_per_step=config.trainer.prompts_per_step,
        seed=config.trainer.seed,
        shuffle=config.data.shuffle,
        digest=problems_digest([problem for problem, _ in train]),
    )
    held_out = PromptBatch(
        batch_id=-1,
        prompts=tuple(prompt for _, prompt in evaluation),
        group_ids=np.arange(len(evaluation), dtype=np.int64),
    )
    limit = config.data.max_prompt_tokens
    notices = (
        *problems.notices,
        *dropped_notices("data.train", dropped_train, len(problems.train), limit),
        *dropped_notices("data.eval", dropped_evaluation, len(problems.evaluation), limit),
        *_few_notices(len(train), config.trainer.prompts_per_step),
    )
    return LoadedPrompts(
        train=stream,
        evaluation=held_out,
        dropped_train=dropped_train,
        dropped_evaluation=dropped_evaluation,
        notices=notices,
    )


def dropped_notices(field: str, dropped: int, count: int, limit: int) -> Iterator[str]:
    """Yield a line about prompts that were dropped as too long, if there are any."""
    if dropped:
        yield (
            f"{field}: {dropped} of {count} prompts are longer than data.max_prompt_tokens {limit} "
            "and were dropped"
        )


def _few_notices(prompts: int, prompts_per_step: int) -> Iterator[str]:
    if prompts_per_step > prompts:
        yield (
            f"trainer.prompts_per_step: WARNING: {prompts_per_step} is more than the {prompts} "
            "training prompts, so each step holds the same prompt several times, in groups of "
            "their own. Lower it, or raise generation.samples_per_prompt"
        )


def encode_problems(
    problems: Sequence[Problem], renderer: PromptRenderer, data: DataConfig, field: str
) -> list[tuple[Problem, Prompt]]:
    """Return the problems whose prompts are short enough, with those prompts.

    Raises:
        ValueError: there are longer ones and they are refused, or all are longer.
    """
    prompts = [renderer.encode(problem) for problem in problems]
    kept = [
        (problem, prompt)
        for problem, prompt in zip(problems, prompts, strict=True)
        if len(prompt.token_ids) <= data.max_prompt_tokens
    ]
    dropped = len(prompts) - len(kept)
    if dropped and (data.overlong_prompts == "refuse" or not kept):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        remedy = "Raise the limit, or set data.overlong_prompts to drop."
        if not kept:
            remedy = "Raise the limit."
        raise ValueError(
            f"data.max_prompt_tokens: {dropped} of {len(prompts)} prompts of {field} are longer "
            f"than {data.max_prompt_tokens} tokens (the longest, {longest.problem_id!r}, has "
            f"{len(longest.token_ids)}). {remedy}"
        )
    return kept
