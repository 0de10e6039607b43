"""Rankings from samples of a model with their rewards, and the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlsys.data.examples import Ranking


def rank_by_reward(
    texts: Sequence[str], rewards: Sequence[float], *, limit: int
) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Return at most `limit` different responses and their ranks, best first.

    Equal rewards are a tie: they have the same rank. A text that was sampled several times counts
    once. Where there are more than `limit`, the best and the worst are taken in turn. None: fewer
    than two responses differ in their reward.

    Example: rewards 0, 1, 0 of the texts a, b, a give (b, a) with the ranks (0, 1).
    """
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    places = sorted(first.values(), key=lambda place: (-rewards[place], place))
    if len({rewards[place] for place in places}) < 2:
        return None

    turns = [places[i // 2] if i % 2 == 0 else places[-1 - i // 2] for i in range(len(places))]
    chosen = sorted(turns[:limit], key=places.index)
    levels = sorted({rewards[place] for place in chosen}, reverse=True)
    return (
        tuple(texts[place] for place in chosen),
        tuple(levels.index(rewards[place]) for place in chosen),
    )


def write_rankings(rankings: Sequence[Ranking], path: Path) -> None:
    """Write rankings as Parquet, with the columns that `read_rankings` recognizes."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "id": [ranking.example_id for ranking in rankings],
        "prompt": [ranking.prompt for ranking in rankings],
        "responses": [list(ranking.responses) for ranking in rankings],
        "ranks": [list(ranking.ranks) for ranking in rankings],
        "answer": [ranking.answer for ranking in rankings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    partial.replace(path)


@dataclass(frozen=True, kw_only=True)
class RankingCounts:
    """What a set of rankings has for a reward model to learn from."""

    rankings: int
    responses: int
    pairs: int  # of two responses to one prompt
    ties: int  # those of the pairs whose responses have the same rank

    @staticmethod
    def of(ranks: Sequence[Sequence[int]]) -> RankingCounts:
        """Count the ranks of each ranking.

        Example: the ranks (0, 1, 1) have 3 pairs, of which one is a tie.
        """
        pairs = [pair for one in ranks for pair in combinations(one, 2)]
        return RankingCounts(
            rankings=len(ranks),
            responses=sum(map(len, ranks)),
            pairs=len(pairs),
            ties=sum(first == second for first, second in pairs),
        )


def read_ranking_rows(path: Path, *, limit: int) -> list[dict[str, Any]]:
    """Return the first rows of a file that `write_rankings` wrote, by column name."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).slice(0, limit).to_pylist()


def count_rankings(path: Path) -> RankingCounts:
    """Return the counts of a file that `write_rankings` wrote."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["ranks"])
    return RankingCounts.of(table["ranks"].to_pylist())
