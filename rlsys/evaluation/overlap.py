r"""Overlap of evaluation problems with training problems, by n-grams.

**Source**: Brown et al. 2020, Language Models are Few-Shot Learners (arXiv:2005.14165), appendix C,
with 13-grams of lower-case words, of which one is enough.

**Conventions**: in mathematics signs carry the meaning, so, unlike there, they are tokens too:
`What is 7 + 8?` is what, is, 7, +, 8, ?. Set phrases of LaTeX then share 13-grams, so by default
half of a problem's n-grams must occur in the training problems. Letters are compared without case.
A problem of fewer than n tokens has one n-gram, its whole text. Of a conversation all turns count,
with their roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlsys.data.held_out import problem_key
from rlsys.data.problems import Problem

TOKEN = re.compile(r"[^\W_]+|[^\s]")
MOST_SOURCES = 3  # training problems that are named for one problem

Ngram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OverlappingProblem:
    """A problem of the evaluation that shares an n-gram with the training problems."""

    place: int  # in the evaluation problems
    problem_id: str
    problem: str
    fraction: float  # of its n-grams that occur in the training problems
    identical: bool  # a training problem has the same text, up to white space
    shared: str  # the first n-gram that they share
    train_ids: tuple[str, ...]  # of the first training problems that have it


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The overlap of a whole set."""

    ngram: int
    fraction: float  # of a problem's n-grams from which on it overlaps; 0: one
    problems: int  # of the evaluation
    train_problems: int
    sharing: int  # problems that share one n-gram or more
    overlapping: tuple[OverlappingProblem, ...]


def find_overlap(
    problems: Sequence[Problem], train: Sequence[Problem], ngram: int, *, fraction: float = 0.0
) -> Overlap:
    """Return the problems of whose n-grams at least `fraction`, and one, occur in `train`.

    Only the n-grams of the evaluation problems are kept in memory, so the training set may be
    large.
    """
    tokens = [tokens_of(problem) for problem in problems]
    wanted = {gram for text in tokens for gram in _ngrams(text, ngram)}
    lengths = {len(gram) for gram in wanted}  # shorter ones are of short problems
    sources: dict[Ngram, list[str]] = {}
    for row in train:
        text = tokens_of(row)
        for length in lengths:
            for gram in set(_ngrams(text, length, whole=False)) & wanted:
                found = sources.setdefault(gram, [])
                if len(found) < MOST_SOURCES:
                    found.append(row.problem_id)

    train_keys = set(map(problem_key, train))
    sharing = [
        _overlapping(place, problem, text, ngram, sources, problem_key(problem) in train_keys)
        for place, (problem, text) in enumerate(zip(problems, tokens, strict=True))
        if any(gram in sources for gram in _ngrams(text, ngram))
    ]
    return Overlap(
        ngram=ngram,
        fraction=fraction,
        problems=len(problems),
        train_problems=len(train),
        sharing=len(sharing),
        overlapping=tuple(problem for problem in sharing if problem.fraction >= fraction),
    )


def tokens_of(problem: Problem) -> Ngram:
    """Return the words, numbers and signs of a problem."""
    return tuple(TOKEN.findall(problem_text(problem).casefold()))


def problem_text(problem: Problem) -> str:
    """Return the text of a problem, or of all turns of a conversation."""
    if problem.messages:
        return "\n".join(f"{turn.role} {turn.content}" for turn in problem.messages)
    return problem.problem


def _ngrams(tokens: Ngram, length: int, *, whole: bool = True) -> Iterator[Ngram]:
    """Yield all n-grams; of a text that is shorter, itself if `whole`."""
    if len(tokens) < length:
        if whole and tokens:
            yield tokens
        return
    for start in range(len(tokens) - length + 1):
        yield tokens[start : start + length]


def _overlapping(
    place: int,
    problem: Problem,
    tokens: Ngram,
    ngram: int,
    sources: dict[Ngram, list[str]],
    identical: bool,
) -> OverlappingProblem:
    grams = list(_ngrams(tokens, ngram))
    shared = [gram for gram in grams if gram in sources]
    return OverlappingProblem(
        place=place,
        problem_id=problem.problem_id,
        problem=problem.problem,
        fraction=len(shared) / len(grams),
        identical=identical,
        shared=" ".join(shared[0]),
        train_ids=tuple(sources[shared[0]]),
    )
