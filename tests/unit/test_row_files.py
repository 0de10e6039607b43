"""Files of every kind, read whole or refused with the place of the mistake."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.row_files import Table, read_table

# Characters that end a line for str.splitlines, but not in JSON.
SEPARATORS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(SEPARATORS), max_size=8)


def table(path: Path, *needed: str) -> Table:
    return read_table(str(path), needed=needed, field="data.train")


def places(read: Table) -> list[tuple[str, Any]]:
    return [(row.place, row.defect or dict(row.values)) for row in read.rows]


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^data\.train: ") as error:
        table(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(st.lists(st.dictionaries(TEXT, TEXT, max_size=3), min_size=1, max_size=4))
def test_jsonl_gives_back_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
        assert [dict(row.values) for row in table(path).rows] == rows


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_csv_gives_back_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]):
    import csv

    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    assert [tuple(row.values.values()) for row in table(path).rows] == rows


@pytest.mark.parametrize("separator", [*SEPARATORS[:3]])
def test_a_line_of_jsonl_ends_with_a_line_feed_only(tmp_path: Path, separator: str):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "x' + separator + 'y"}\n{"a": "z"}\n', encoding="utf-8")
    assert places(table(path)) == [("line 1", {"a": f"x{separator}y"}), ("line 2", {"a": "z"})]


def test_jsonl_with_windows_line_ends_a_byte_order_mark_and_blank_lines(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\r\n{"a": "é"}\r\n'.encode())
    assert places(table(path)) == [("line 1", {"a": 1}), ("line 3", {"a": "é"})]


def test_unusable_lines_of_jsonl_are_all_named(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a"\n[1]\n"text"\n{"a": 1, "b": 2, "a": 3}\n' + "[" * 100_000)
    assert [defect for _, defect in places(table(path))[1:]] == [
        "is not valid JSON (Expecting ':' delimiter at column 5)",
        "is not a JSON object but an array",
        "is not a JSON object but text",
        "is not valid JSON (the key 'a' twice in one object)",
        "is not valid JSON (nested too deeply)",
    ]


def test_numbers_of_json_keep_their_digits(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 3.14159265358979323846, "b": 4.0, "c": 1e400, "d": 7}\n')
    assert dict(table(path).rows[0].values) == {
        "a": Decimal("3.14159265358979323846"),
        "b": Decimal("4.0"),
        "c": Decimal("1e400"),
        "d": 7,
    }


def test_columns_are_those_of_all_rows(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"b": 1}\n{"a": 1, "b": 2}\n')
    assert table(path).columns == ("b", "a")


def test_json_is_an_array_of_objects_or_jsonl(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('\ufeff[{"a": 1},\n {"a": 2}, 3]', encoding="utf-8")
    assert places(table(path)) == [
        ("row 0", {"a": 1}),
        ("row 1", {"a": 2}),
        ("row 2", "is not a JSON object but a number"),
    ]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert places(table(path)) == [("line 1", {"a": 1}), ("line 2", {"a": 2})]


def test_csv_cells_are_text_and_a_place_is_the_first_line_of_a_row(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text(
        '\ufeffa,b\r\n1,4.0\r\n"two\r\nlines, ""quoted""",NaN\r\n\r\n3\r\n', "utf-8", newline=""
    )
    assert places(table(path)) == [
        ("line 2", {"a": "1", "b": "4.0"}),
        ("line 3", {"a": 'two\r\nlines, "quoted"', "b": "NaN"}),
        ("line 6", "has 1 cells where the header has 2"),
    ]


def test_tsv_and_cells_beyond_the_default_limit_of_the_csv_module(tmp_path: Path):
    path = tmp_path / "x.TSV"
    path.write_text("a\tb\n1,5\t" + "x" * 200_000 + "\n")
    assert dict(table(path).rows[0].values) == {"a": "1,5", "b": "x" * 200_000}


def test_parquet_rows_are_counted_from_0_and_floats_keep_their_own_precision(tmp_path: Path):
    path = tmp_path / "x.parquet"
    columns = {
        "single": pa.array([0.1, None], pa.float32()),
        "half": pa.array([0.1, 4.0], pa.float16()),
        "nested": pa.array([{"x": 0.1}, None], pa.struct([("x", pa.float32())])),
        "double": pa.array([0.1, 2.0]),
        "unused": pa.array([b"1", b"2"]),
    }
    pyarrow.parquet.write_table(pa.table(columns), path)
    read = table(path, "single", "half", "nested.x", "double")
    assert places(read) == [
        (
            "row 0",
            {
                "single": Decimal("0.1"),
                "half": Decimal("0.1"),
                "nested": {"x": Decimal("0.1")},
                "double": 0.1,
            },
        ),
        ("row 1", {"single": None, "half": Decimal("4.0"), "nested": None, "double": 2.0}),
    ]
    assert read.columns == ("single", "half", "nested", "double", "unused")


def test_a_hub_data_set_is_read_like_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"a": [{"role": "user"}], "b": 0.5, "c": "x"}] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = read_table("owner/name:test", needed=("a", "b"), field="data.train")
    assert places(read)[1] == ("row 1", {"a": [{"role": "user"}], "b": 0.5})
    assert read.columns == ("a", "b", "c")
    assert read_table("owner/name", needed=("z",), field="data.train").columns == ("a", "b", "c")
    assert asked == [("owner/name", "test"), ("owner/name", "train")]


def test_a_hub_data_set_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load(name: str, split: str) -> Any:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = (
        r"data\.eval: the data set 'a/b:c' could not be loaded \(ConnectionError: no network\)"
    )
    with pytest.raises(ValueError, match=message):
        read_table("a/b:c", needed=(), field="data.eval")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\xef\xbb\xbf \r\n\n", "is empty"),
        ("x.json", b"", "is empty"),
        ("x.csv", b"", "is empty"),
        ("x.json", b"[]", "holds no rows"),
        ("x.csv", b"problem,answer\n", "holds no rows"),
        ("x.jsonl", b'{"a": "1"}\n{"a": "\xff"}\n', "line 2 of .* is not UTF-8 .byte 0xff.. Save"),
        ("x.csv", b"a\n1\n\xe9\n", "line 3 of .* is not UTF-8 .byte 0xe9.. Save"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        ("x.jsonl", b'[{"a": 1},\n {"a": 2}]', "looks like one array.* Name it .json"),
        ("x.json", b'{"a": 1}', "holds an object, not an array of objects. Write"),
        ("x.json", b'[{"a": 1}\n {"a"]', "is not valid JSON .line 2, Expecting ',' delimiter"),
        ("x.json", b'[{"a": 1, "a": 2}]', "the key 'a' twice"),
        ("x.csv", b"a,b,a\n1,2,3\n", "more than one column 'a'. Rename"),
        ("x.csv", b'a,b\n1,2\n"1,2\n3,4\n', "row that begins on line 3 .*unexpected end"),
        ("x.jsonl.gz", b"", "is compressed. Unpack"),
        ("x.txt", b"", "is not one of .parquet, .jsonl, .json, .csv, .tsv. Convert"),
        ("x.parquet", b"PAR1", "as Parquet"),
    ],
)
def test_unusable_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
):
    import re

    (tmp_path / name).write_bytes(content)
    assert re.search(message, refusal(tmp_path / name))


def test_directories_absent_files_and_repeated_columns_of_parquet(tmp_path: Path):
    assert "is a directory" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.csv")
    path = tmp_path / "twice.parquet"
    pyarrow.parquet.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    assert "more than one column 'a'" in refusal(path)
