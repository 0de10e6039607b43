"""Rankings from samples and their rewards."""

from pathlib import Path

import pytest

from rlsys.config.offline import RankingColumns
from rlsys.data.example_readers import ExampleSource, read_rankings
from rlsys.data.examples import Ranking
from rlsys.data.ranking_files import rank_by_reward, write_rankings


@pytest.mark.parametrize(
    ("texts", "rewards", "limit", "expected"),
    [
        (["a", "b", "a"], [0.0, 1.0, 0.0], 4, (("b", "a"), (0, 1))),
        (["a", "b", "c"], [0.0, 1.0, 0.0], 4, (("b", "a", "c"), (0, 1, 1))),
        (["a", "b", "c"], [0.5, 1.0, 0.0], 4, (("b", "a", "c"), (0, 1, 2))),
        # The best and the worst are kept.
        (["a", "b", "c", "d"], [3.0, 2.0, 1.0, 0.0], 2, (("a", "d"), (0, 1))),
        (["a", "b", "c", "d"], [3.0, 2.0, 1.0, 0.0], 3, (("a", "b", "d"), (0, 1, 2))),
        (["a", "b", "c", "d"], [1.0, 1.0, 1.0, 0.0], 2, (("a", "d"), (0, 1))),
        (["a", "b"], [1.0, 1.0], 4, None),
        (["a", "a"], [1.0, 1.0], 4, None),
        ([], [], 4, None),
    ],
)
def test_ranks(texts: list[str], rewards: list[float], limit: int, expected: object):
    assert rank_by_reward(texts, rewards, limit=limit) == expected


def test_a_written_file_is_read_back(tmp_path: Path):
    rankings = [
        Ranking(
            example_id="x", prompt="1 + 1?", responses=("2", "3", "4"), ranks=(0, 1, 1), answer="2"
        ),
        Ranking(example_id="y", prompt="p", responses=("a", "b"), ranks=(0, 1), answer="a"),
    ]
    file = tmp_path / "folder" / "rankings.parquet"
    write_rankings(rankings, file)
    assert read_rankings(ExampleSource(source=str(file), field="f"), RankingColumns()) == rankings
    assert [path.name for path in file.parent.iterdir()] == ["rankings.parquet"]
