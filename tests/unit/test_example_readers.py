"""The shapes of example files."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlsys.config.offline import ExampleColumns, RankingColumns
from rlsys.data.example_readers import ExampleSource, read_demonstrations, read_rankings
from rlsys.data.examples import Demonstration, PlainText, Ranking
from rlsys.data.problems import ChatMessage

USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}


def source(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> ExampleSource:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleSource(source=str(file), field="data.train", **options)


def demonstration(tmp_path: Path, row: dict[str, Any], **columns: str) -> Any:
    (found,) = read_demonstrations(source(tmp_path, row), ExampleColumns(**columns))
    return found


def ranking(tmp_path: Path, row: dict[str, Any], **columns: str) -> Ranking:
    (found,) = read_rankings(source(tmp_path, row), RankingColumns(**columns))
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 2?", "response": "4"},
        {"question": "2 + 2?", "response": "4"},
        {"problem": "2 + 2?", "solution": "4"},
        {"prompt": "2 + 2?", "completion": [GOOD]},
    ],
)
def test_prompt_and_response(tmp_path: Path, row: dict[str, Any]):
    expected = Demonstration(example_id="0", prompt="2 + 2?", response="4")
    assert demonstration(tmp_path, row) == expected


def test_a_prompt_of_messages_keeps_its_turns(tmp_path: Path):
    found = demonstration(tmp_path, {"prompt": [USER], "completion": [GOOD]})
    assert found.context == (ChatMessage(role="user", content="2 + 2?"),)
    assert (found.prompt, found.response) == ("2 + 2?", "4")


def test_conversations(tmp_path: Path):
    found = demonstration(tmp_path, {"messages": [USER, GOOD], "id": "x"})
    assert [turn.content for turn in found.messages] == ["2 + 2?", "4"]
    assert found.example_id == "x"


def test_math_has_answers(tmp_path: Path):
    row = {"problem": "2 + 2?", "solution": "It is \\boxed{4}.", "answer": 4, "level": 1}
    found = demonstration(tmp_path, row)
    assert (found.prompt, found.response, found.answer) == ("2 + 2?", "It is \\boxed{4}.", "4")


def test_plain_text(tmp_path: Path):
    found = demonstration(tmp_path, {"text": "Once upon a time."})
    assert found == PlainText(example_id="0", text="Once upon a time.")


def test_named_columns_go_first(tmp_path: Path):
    row = {"prompt": "wrong", "q": "2 + 2?", "text": "no", "a": "4"}
    found = demonstration(tmp_path, row, prompt="q", response="a")
    assert (found.prompt, found.response) == ("2 + 2?", "4")


def test_pairs(tmp_path: Path):
    found = ranking(tmp_path, {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    assert found.responses == ("4", "5")
    assert found.ranks == (0, 1)


def test_whole_conversations_are_split_before_the_last_turn(tmp_path: Path):
    found = ranking(tmp_path, {"chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert found.responses == ("4", "5")
    assert found.prompt == "2 + 2?"
    assert found.context == (ChatMessage(role="user", content="2 + 2?"),)


def test_lists_of_responses(tmp_path: Path):
    found = ranking(tmp_path, {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 1]})
    assert found.ranks == (1, 0, 1)
    best_first = ranking(tmp_path, {"prompt": "p", "responses": ["a", "b", "c"]})
    assert best_first.ranks == (0, 1, 2)


def test_parquet_lists(tmp_path: Path):
    file = tmp_path / "data.parquet"
    table = pyarrow.table({"prompt": ["p"], "responses": [["a", "b"]], "ranks": [[1, 0]]})
    pyarrow.parquet.write_table(table, file)
    (found,) = read_rankings(ExampleSource(source=str(file), field="f"), RankingColumns())
    assert (found.responses, found.ranks) == (("a", "b"), (1, 0))


def test_unknown_columns_are_named_with_the_flags_that_map_them(tmp_path: Path):
    with pytest.raises(ValueError, match=r"columns inst, out,.*--data\.columns\.prompt"):
        read_demonstrations(source(tmp_path, {"inst": "a", "out": "b"}), ExampleColumns())
    with pytest.raises(ValueError, match=r"columns a, prompt,.*--data\.columns\.chosen"):
        read_rankings(source(tmp_path, {"prompt": "p", "a": "b"}), RankingColumns())


def test_a_named_column_that_is_missing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.columns\.response: .*'x'.*prompt, response"):
        demonstration(tmp_path, {"prompt": "a", "response": "b"}, response="x")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "responses": ["a"]}, "has 1 response"),
        ({"prompt": "p", "responses": "a"}, "is text"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "has 1 ranks for 2 responses"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, -1]}, "holds a number"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, USER, BAD]}, "begins with a message"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]},
            "differs from the rejected conversation",
        ),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "ends with a message of the user"),
        ({"prompt": "p", "chosen": {"a": 1}, "rejected": "b"}, "is an object"),
    ],
)
def test_rankings_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        ranking(tmp_path, row)


def test_blank_rows_are_dropped_or_refused(tmp_path: Path):
    rows = ({"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": None})
    notices: list[str] = []
    kept = read_demonstrations(source(tmp_path, *rows, on_dropped=notices.append), ExampleColumns())
    assert len(kept) == 1
    assert "lack a prompt or a response" in notices[0]
    with pytest.raises(ValueError, match="'completion' is null"):
        read_demonstrations(source(tmp_path, *rows), ExampleColumns())


def test_filters(tmp_path: Path):
    rows = [{"prompt": "p", "completion": str(level), "level": level} for level in (1, 2, 3)]
    kept = read_demonstrations(source(tmp_path, *rows, where={"level": (2,)}), ExampleColumns())
    assert [example.response for example in kept if isinstance(example, Demonstration)] == ["2"]
    with pytest.raises(ValueError, match=r"data\.where: .*leaves no demonstration"):
        read_demonstrations(source(tmp_path, *rows, where={"level": (9,)}), ExampleColumns())
