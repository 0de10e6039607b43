"""The seeded, resumable stream of training examples, and the fixed set of held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config.offline import (
    DemonstrationDataConfig,
    ExampleDataConfig,
    OfflineRunConfig,
    RankingDataConfig,
    StepDataConfig,
)
from rlsys.data.batches import PromptBatch
from rlsys.data.epoch_order import EpochOrder
from rlsys.data.example_encoding import (
    EncodedExample,
    ExampleEncoder,
    sequences_of,
    step_labels_of,
)
from rlsys.data.example_readers import (
    ExampleSource,
    read_demonstrations,
    read_rankings,
    read_step_labels,
)
from rlsys.data.examples import (
    Demonstration,
    Example,
    PlainText,
    Ranking,
    StepLabels,
    examples_digest,
    problem_of,
)
from rlsys.data.held_out import hold_out_by
from rlsys.data.prompt_templates import PromptRenderer
from rlsys.data.readers import check_sources
from rlsys.data.sequences import TokenSequences
from rlsys.data.synthetic_problems import SolvedProblem, generate_solved_problems
from rlsys.data.synthetic_rankings import generated_rankings
from rlsys.data.synthetic_steps import generated_step_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ExampleBatch:
    """The examples of one step as tokens: the responses to one prompt are one group, in a row."""

    batch_id: int
    sequences: TokenSequences
    ranks: NDArray[np.int64]  # [B] of each response in its group; 0 is best
    # [N] labels at the ends of steps, elsewhere NO_STEP; None: the responses are not in steps
    step_labels: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        assert self.ranks.shape == (len(self.sequences),)
        assert self.step_labels is None or len(self.step_labels) == len(self.sequences.token_ids)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_examples(self) -> int:
        """Number of prompts, each with all its responses."""
        return len(np.unique(self.sequences.group_ids))

    @staticmethod
    def of(batch_id: int, examples: Sequence[EncodedExample], first_group: int) -> ExampleBatch:
        """Return a batch of examples, with group ids from `first_group` on."""
        groups = range(first_group, first_group + len(examples))
        ranks = [rank for example in examples for rank in example.ranks]
        return ExampleBatch(
            batch_id=batch_id,
            sequences=sequences_of(examples, groups),
            ranks=np.asarray(ranks, dtype=np.int64),
            step_labels=step_labels_of(examples),
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceLogprobs:
    """Log-probabilities of some rows of a batch under the reference, as one rank returns them."""

    rows: NDArray[np.int64]  # [b] indices into the whole batch
    logprobs: NDArray[np.float32]  # [b] sums over the learned tokens

    @staticmethod
    def scatter(parts: Sequence[ReferenceLogprobs], size: int) -> NDArray[np.float32]:
        """Return [B] the values of all ranks in the order of the batch."""
        whole = np.full(size, np.nan, dtype=np.float32)
        for part in parts:
            whole[part.rows] = part.logprobs
        assert not np.isnan(whole).any(), "each row must come from a rank"
        return whole


class ExampleStream:
    """An endless stream of batches of `examples_per_step` examples; see `EpochOrder`.

    A resumed run may use another batch size.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        *,
        examples_per_step: int,
        seed: int,
        shuffle: bool,
        digest: str,
        field: str = "data.train",
    ) -> None:
        """Create a stream.

        Args:
            digest: the `examples_digest` of the examples.
            field: the config field of their source, for messages.
        """
        self._examples = examples
        self._size = examples_per_step
        self._order = EpochOrder(len(examples), seed=seed, shuffle=shuffle)
        self._digest = digest
        self._field = field
        self._taken = 0
        self._batches_taken = 0

    def __len__(self) -> int:
        """Return the number of examples of one epoch."""
        return len(self._examples)

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of an example: its prompt once, and its responses."""
        tokens = sum(
            len(example.prompt) + sum(len(response.token_ids) for response in example.responses)
            for example in self._examples
        )
        return tokens / len(self._examples)

    def next_batch(self) -> ExampleBatch:
        """Return the next batch; group ids are unique within the run."""
        positions = range(self._taken, self._taken + self._size)
        examples = [self._examples[self._order.index(position)] for position in positions]
        batch = ExampleBatch.of(self._batches_taken, examples, self._taken)
        self._taken += self._size
        self._batches_taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Return the position of the stream, ready for JSON."""
        return {
            "taken": self._taken,
            "batches_taken": self._batches_taken,
            "examples": len(self._examples),
            "digest": self._digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the data have changed since.
        """
        if (state["examples"], state["digest"]) != (len(self._examples), self._digest):
            raise ValueError(
                f"{self._field}: the {len(self._examples)} examples are not the "
                f"{state['examples']} "
                "that the checkpoint was written with, or in another order. Resume with the same "
                "data and filters, or start a new run from the checkpoint with --model.path."
            )
        self._taken = int(state["taken"])
        self._batches_taken = int(state["batches_taken"])


@dataclass(frozen=True, kw_only=True)
class SourcedExamples:
    """Examples of one run before they become tokens. No `held_out`: data.eval is off."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    origin: str  # of the held-out examples, for messages
    notices: tuple[str, ...]  # about these data, for the user

    @property
    def kind(self) -> str:
        """What the examples are, for messages."""
        if isinstance(self.train[0], PlainText):
            return "texts"
        if isinstance(self.train[0], StepLabels):
            return "responses in steps"
        return "demonstrations" if isinstance(self.train[0], Demonstration) else "rankings"

    def describe(self) -> str:
        """Return one line: how many examples there are, and which are held out."""
        if not self.held_out:
            return f"{len(self.train)} training {self.kind}, no evaluation ({self.origin})"
        return (
            f"{len(self.train)} training and {len(self.held_out)} held-out {self.kind} "
            f"({self.origin})"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedExamples:
    """The examples of one run as tokens."""

    train: ExampleStream
    held_out: ExampleBatch | None  # None: no evaluation
    problems: PromptBatch  # held-out prompts with known answers, for evaluation by sampling
    notices: tuple[str, ...]  # about these data, for the user


def source_examples(config: OfflineRunConfig) -> SourcedExamples:
    """Read or generate the examples.

    Raises:
        ValueError: see `read_demonstrations`, `read_rankings` and `hold_out_by`.
    """
    data = config.data
    check_sources(data, "examples")
    notices: list[str] = []

    def read(source: str, field: str) -> Sequence[Example]:
        return _read(data, source, field, notices)

    if data.train == "synthetic":
        train, generated = _synthetic(config)
    else:
        train, generated = read(data.train, "data.train"), []

    if data.eval == "off":
        held_out, origin = [], "data.eval is off"
    elif data.train == "synthetic" and data.eval in ("auto", "synthetic"):
        held_out, origin = generated, "synthetic"
    elif data.eval == "auto":
        split = hold_out_by(
            lambda example: example.prompt_key,
            train,
            fraction=data.held_out,
            limit=data.eval_limit,
        )
        train, held_out = split.train, split.held_out
        origin = "held out of data.train by a hash of their prompt, and not trained on"
        if split.copies:
            notices.append(
                f"data.train: {split.copies} further examples with held-out prompts are neither "
                "trained on nor evaluated"
            )
    else:
        held_out, origin = read(data.eval, "data.eval"), data.eval

    held_out = held_out[: data.eval_limit or None]
    train, held_out = (
        _without_ties(train, "data.train", notices),
        _without_ties(held_out, "data.eval", notices),
    )
    notices += _shared_notices(train, held_out)
    return SourcedExamples(train=train, held_out=held_out, origin=origin, notices=tuple(notices))


def _without_ties(examples: Sequence[Example], field: str, notices: list[str]) -> Sequence[Example]:
    """Leave out rankings in which no response is better than another.

    Raises:
        ValueError: none is left.
    """
    tied = [
        example
        for example in examples
        if isinstance(example, Ranking) and len(set(example.ranks)) < 2
    ]
    if not tied:
        return examples
    if len(tied) == len(examples):
        raise ValueError(
            f"{field}: in each of its {len(examples)} rankings all responses are tied, so no pair "
            "is left to learn from. Give rankings in which some response is better than another."
        )
    notices.append(
        f"{field}: {len(tied)} of {len(examples)} rankings have tied responses only and were "
        "dropped"
    )
    left_out = set(map(id, tied))
    return [example for example in examples if id(example) not in left_out]


def _synthetic(config: OfflineRunConfig) -> tuple[Sequence[Example], Sequence[Example]]:
    synthetic = config.data.synthetic
    train, held_out = generate_solved_problems(
        synthetic.levels,
        train_size=synthetic.train_size,
        eval_size=synthetic.eval_size,
        seed=config.trainer.seed,
    )
    if isinstance(config.data, RankingDataConfig):
        size = config.data.responses
        return (
            generated_rankings(train, responses=size, seed=config.trainer.seed),
            generated_rankings(held_out, responses=size, seed=config.trainer.seed),
        )
    if isinstance(config.data, StepDataConfig):
        return (
            generated_step_labels(train, seed=config.trainer.seed),
            generated_step_labels(held_out, seed=config.trainer.seed),
        )
    return [*map(_demonstration, train)], [*map(_demonstration, held_out)]


def _demonstration(solved: SolvedProblem) -> Demonstration:
    problem = solved.problem
    return Demonstration(
        example_id=problem.problem_id,
        prompt=problem.problem,
        response=solved.solution,
        answer=problem.answer,
    )


def _read(
    data: DemonstrationDataConfig | RankingDataConfig | StepDataConfig,
    source: str,
    field: str,
    notices: list[str],
) -> Sequence[Example]:
    described = ExampleSource(
        source=source,
        field=field,
        where=data.where,
        on_dropped=notices.append if data.blank_rows == "drop" else None,
    )
    if isinstance(data, RankingDataConfig):
        return read_rankings(described, data.columns)
    if isinstance(data, StepDataConfig):
        return read_step_labels(described, data.columns)
    return read_demonstrations(described, data.columns)


def _shared_notices(train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[str]:
    trained = {example.prompt_key for example in train}
    shared = sum(example.prompt_key in trained for example in held_out)
    if shared:
        yield (
            f"data.eval: WARNING: {shared} of its {len(held_out)} prompts are also in data.train, "
            "so results on them are not held out. Drop them from one of the two, or set data.eval "
            "to auto"
        )


def load_examples(
    config: OfflineRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: SourcedExamples,
    end_tokens: frozenset[int],
) -> LoadedExamples:
    """Tokenize the examples.

    Raises:
        ValueError: see `ExampleEncoder`; examples that are too long where those are refused, or
            where all are.
    """
    data = config.data
    encoder = ExampleEncoder(data.template, tokenizer, chat=data.chat, end_tokens=end_tokens)
    notices = [*examples.notices]
    train = _encoded(examples.train, encoder, data, "data.train", notices)
    held_out = _encoded(examples.held_out, encoder, data, "data.eval", notices)
    stream = ExampleStream(
        [encoded for _, encoded in train],
        examples_per_step=config.trainer.examples_per_step,
        seed=config.trainer.seed,
        shuffle=data.shuffle,
        digest=examples_digest([example for example, _ in train]),
    )
    batch = ExampleBatch.of(-1, [encoded for _, encoded in held_out], 0) if held_out else None
    problems = _problem_prompts(config, tokenizer, [example for example, _ in held_out])
    return LoadedExamples(train=stream, held_out=batch, problems=problems, notices=tuple(notices))


def _encoded(
    examples: Sequence[Example],
    encoder: ExampleEncoder,
    data: ExampleDataConfig,
    field: str,
    notices: list[str],
) -> list[tuple[Example, EncodedExample]]:
    """Return the examples that are short enough, with their tokens.

    Raises:
        ValueError: there are longer ones and they are refused, or all are longer.
    """
    pairs = [
        (example, encoded) for example in examples for encoded in _encode(example, encoder, data)
    ]
    kept = [(example, encoded) for example, encoded in pairs if _fits(encoded, data)]
    dropped = len(pairs) - len(kept)
    if not dropped:
        return kept

    prompt = max(len(encoded.prompt) for _, encoded in pairs)
    response = max(encoded.longest_response for _, encoded in pairs)
    found = (
        f"{dropped} of {len(pairs)} examples of {field} are longer than data.max_prompt_tokens "
        f"{data.max_prompt_tokens} or data.max_response_tokens {data.max_response_tokens}"
    )
    if data.overlong == "refuse" or not kept:
        remedy = "Raise the limits" + ("." if not kept else ", or set data.overlong to drop.")
        raise ValueError(
            f"data.max_response_tokens: {found} (the longest prompt has {prompt} tokens, the "
            f"longest response {response}). {remedy}"
        )
    notices.append(f"{found} and were dropped")
    return kept


def _encode(
    example: Example, encoder: ExampleEncoder, data: ExampleDataConfig
) -> list[EncodedExample]:
    if isinstance(example, PlainText):
        return encoder.text(example, data.max_response_tokens)
    if isinstance(example, StepLabels):
        assert isinstance(data, StepDataConfig), "only such a run reads responses in steps"
        return [encoder.steps(example, data.step_separator)]
    if isinstance(example, Demonstration):
        return [encoder.demonstration(example)]
    return [encoder.ranking(example)]


def _fits(encoded: EncodedExample, data: ExampleDataConfig) -> bool:
    return (
        len(encoded.prompt) <= data.max_prompt_tokens
        and encoded.longest_response <= data.max_response_tokens
    )


def _problem_prompts(
    config: OfflineRunConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> PromptBatch:
    """Return the prompts of held-out examples whose answer is known."""
    problems = [
        problem
        for example in examples
        if not isinstance(example, PlainText) and (problem := problem_of(example)) is not None
    ]
    limit = getattr(config.trainer.evaluation, "problems", 0) if config.samples else 0
    render: Callable = PromptRenderer(config.data.template, tokenizer, chat=config.data.chat).encode
    prompts = tuple(map(render, problems[:limit]))
    return PromptBatch(
        batch_id=-1, prompts=prompts, group_ids=np.arange(len(prompts), dtype=np.int64)
    )
