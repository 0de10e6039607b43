"""Verdicts from the command line.

One verdict, and the rule that decided:

    python -m rlsys.math_verifier "so it is \\boxed{0.5}" "\\frac{1}{2}"

A file of {"completion": ..., "ground_truth": ...}:

    python -m rlsys.math_verifier --file pairs.jsonl --out verdicts.parquet

The rows on which two runs disagree:

    python -m rlsys.math_verifier --compare before.parquet after.parquet

Other columns of a file (an id, an expected score) are carried along. Files may also be Parquet,
such as the rollouts of a run (`--completion-column response`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsys.math_verifier import EXTRACTIONS, verify_math


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0 is success; 1: a single completion is wrong, or two runs disagree; 2: bad input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rlsys.math_verifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("completion", nargs="?", help="text with the answer")
    parser.add_argument("ground_truth", nargs="?", help="the right answer")
    parser.add_argument(
        "--extraction",
        choices=EXTRACTIONS,
        default="boxed",
        help="where the answer stands (default: boxed)",
    )
    parser.add_argument(
        "--decimal-comma",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="read 2,74 as 2.74 too (default: with --extraction lenient only)",
    )
    parser.add_argument(
        "--matrix-products",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="accept uncomputed products of matrices (default: with --extraction lenient only)",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="JSONL or Parquet with a completion and a ground truth in each row",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Parquet to write (default: the file's name with .verdicts.parquet)",
    )
    parser.add_argument("--completion-column", default="completion", help="default: completion")
    parser.add_argument(
        "--ground-truth-column", default="ground_truth", help="default: ground_truth"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="two files written by --file",
    )
    options = parser.parse_args(arguments)

    try:
        if options.compare:
            return compare(*options.compare)
        if options.file:
            return score_file(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    if options.completion is None or options.ground_truth is None:
        parser.error("give a completion and a ground truth, --file, or --compare")

    verdict = verify_math(
        options.completion,
        options.ground_truth,
        extraction=options.extraction,
        decimal_comma=options.decimal_comma,
        matrix_products=options.matrix_products,
    )
    for name, value in asdict(verdict).items():
        print(f"{name.replace('_', ' '):12} {_printable(str(value))}")
    return 0 if verdict.score == 1.0 else 1


def _printable(text: str) -> str:
    """Return a text with escapes for what would act on a terminal."""
    return "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in text)


def score_file(options: argparse.Namespace) -> int:
    """Score every row with a progress bar; write Parquet; print the counts of reasons and rules."""
    import pyarrow
    import pyarrow.parquet
    from rich.progress import track

    rows = read_rows(options.file, (options.completion_column, options.ground_truth_column))
    scored: list[dict[str, Any]] = []
    for row in track(rows, description="scoring", disable=not sys.stderr.isatty()):
        completion = str(row[options.completion_column])
        truth = str(row[options.ground_truth_column])
        verdict = verify_math(
            completion,
            truth,
            extraction=options.extraction,
            decimal_comma=options.decimal_comma,
            matrix_products=options.matrix_products,
        )
        scored.append(row | {"extraction": options.extraction} | asdict(verdict))

    out = options.out or options.file.with_suffix(".verdicts.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(scored), out)

    right = sum(row["score"] for row in scored) / max(len(scored), 1)
    print(f"{len(scored)} completions, {right:.2%} right, written to {out}")
    for column in ("reason", "rule"):
        counts = Counter(row[column] for row in scored)
        print(f"{column}s: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    return 0


def read_rows(path: Path, needed: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of a JSONL or Parquet file.

    Raises:
        ValueError: there is no such file; a row lacks a needed column or is not valid JSON. The
            message has the row's number.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}. Name a JSONL or Parquet file with a completion and a"
            " ground truth in each row."
        )

    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        rows = _read_json_lines(path)

    for number, row in enumerate(rows, start=1):
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            columns = ", ".join(row) if isinstance(row, dict) else "no columns"
            raise ValueError(
                f"{path}, row {number}: no column {missing[0]!r} among {columns}. Name it with"
                " --completion-column or --ground-truth-column."
            )
    return rows


def _read_json_lines(path: Path) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error}). Write one object per line."
            ) from None
    return rows


def compare(before: Path, after: Path) -> int:
    """Print the rows, joined by position, on which two runs disagree.

    Returns 1 where they disagree, else 0.
    """
    from rich.console import Console
    from rich.table import Table

    first = read_rows(before, ("score",))
    second = read_rows(after, ("score",))
    if len(first) != len(second):
        raise ValueError(
            f"{before} has {len(first)} rows and {after} {len(second)}: compare runs over the"
            " same file."
        )

    for number, (old, new) in enumerate(zip(first, second, strict=True), start=1):
        old_truth, new_truth = old.get("ground_truth"), new.get("ground_truth")
        if old_truth != new_truth:
            raise ValueError(
                f"row {number}: the ground truths differ ({old_truth!r} and {new_truth!r})."
                " Compare runs over the same file."
            )

    table = Table(
        "row", "answer", "ground truth", "before", "after", title=f"{before.name} and {after.name}"
    )
    different = [
        (i, a, b)
        for i, (a, b) in enumerate(zip(first, second, strict=True))
        if a["score"] != b["score"]
    ]

    for i, old, new in different:
        cells = [str(i), str(new.get("answer")), str(new.get("ground_truth"))]
        cells += [f"{row['score']:g} {row.get('rule')}: {row.get('reason')}" for row in (old, new)]
        table.add_row(*map(_printable, cells))

    if different:
        Console(markup=False, emoji=False).print(table)
    gained = sum(new["score"] > old["score"] for _, old, new in different)
    lost = len(different) - gained
    print(
        f"{len(first)} rows, {len(different)} disagreements: {gained} now right, {lost} now wrong"
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
