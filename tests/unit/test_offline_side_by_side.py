"""The comparison with TRL's trainers: its examples, its checks, and how it reads process use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.offline_side_by_side import (
    KINDS,
    Comparison,
    Run,
    Work,
    check_rows,
    example,
    expected_rows,
    write_examples,
)
from benchmarks.process_use import ProcessUse, Use, use_of
from rlsys.data.synthetic_problems import generate_solved_problems
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer


def work(kind: str, tmp_path: Path, *, steps: int = 2) -> Work:
    examples = 4 // KINDS[kind].responses
    file = tmp_path / f"{kind}.jsonl"
    write_examples(KINDS[kind], examples * steps, 3, file)
    return Work(
        kind=KINDS[kind], steps=steps, examples=examples, model=resolve_model("tiny"), data=file
    )


def run(*, losses: list[float], seconds: float) -> Run:
    ends = [100 + seconds * step for step in range(len(losses))]
    return Run(losses=losses, ends=ends, cpu=3.0, model_gib=1.0, all_gib=2.0)


def test_a_rejected_response_has_other_results_only():
    solved, _ = generate_solved_problems((1,), train_size=3, eval_size=1, seed=0)
    pair = example(KINDS["dpo"], solved)
    assert pair["chosen"] == " " + "\n".join(each.solution for each in solved)
    chosen, rejected = pair["chosen"].splitlines(), pair["rejected"].splitlines()
    assert len(rejected) == 3
    for right, wrong in zip(chosen, rejected, strict=True):
        assert right != wrong
        assert right.rpartition(" = ")[0] == wrong.rpartition(" = ")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_trains_on_the_texts_of_the_file_in_their_order(kind: str, tmp_path: Path):
    done = work(kind, tmp_path)
    tokenizer = load_tokenizer(done.model)
    texts = []
    for line in done.data.read_text().splitlines():
        fields = json.loads(line)
        names = ("completion",) if kind == "sft" else ("chosen", "rejected")
        texts += [fields["prompt"] + fields[name] + tokenizer.eos_token for name in names]

    steps = expected_rows(done, tmp_path / "run")
    assert [len(rows) for rows in steps] == [4, 4]
    assert [tokenizer.decode(ids) for rows in steps for ids, _ in rows] == texts

    for ids, learned in (row for rows in steps for row in rows):
        if kind == "reward_model":
            assert learned is None
            continue
        prompt = learned.index(True)
        assert all(learned[prompt:])
        assert str(tokenizer.decode(ids[prompt:])).startswith(" ")


def test_other_tokens_are_refused_by_step_and_sequence():
    rows = [[[1, 2], [False, True]], [[3, 4], [False, True]]]
    check_rows([rows, rows], [rows, rows])
    with pytest.raises(RuntimeError, match=r"step 2.*sequence 1"):
        check_rows([rows, rows], [rows, [rows[0], [[3, 5], [False, True]]]])
    with pytest.raises(RuntimeError, match="sequence 0"):
        check_rows([rows], [[[[1, 2], [True, True]], rows[1]]])
    with pytest.raises(RuntimeError, match="rlsys has 2 of them, TRL 1"):
        check_rows([rows], [rows[:1]])
    with pytest.raises(RuntimeError, match="2 steps, TRL on 1"):
        check_rows([rows, rows], [rows])


def test_the_first_step_is_not_timed_and_the_largest_difference_counts():
    trl = [run(losses=[3.0, 2.0, 1.0], seconds=6.0), run(losses=[3.0, 2.0, 1.0], seconds=8.0)]
    own = [run(losses=[3.0, 2.5, 1.0], seconds=2.0), run(losses=[3.0, 2.0, 0.75], seconds=2.0)]
    comparison = Comparison(kind="sft", tokens=10, trl=trl, rlsys=own, accumulation=[1, 1])
    assert trl[0].seconds == 6.0
    assert trl[0].cpu_seconds == 1.5  # 3 s in the 2 steps after the first
    assert comparison.difference == 0.5
    assert "**3.50 (3.00 to 4.00)**" in comparison.rows()[1]


def test_cpu_seconds_are_interpolated_and_memory_stops_at_the_last_step():
    samples = [
        Use(time=0.0, gib=1.0, cpu=0.0),
        Use(time=2.0, gib=3.0, cpu=4.0),
        Use(time=4.0, gib=9.0, cpu=4.0),
    ]
    use = ProcessUse(1, samples=samples)
    assert use.cpu_seconds(1.0, 3.0) == 2.0  # from 2 to 4
    assert use.peak_gib(3.0) == 3.0


def test_the_processes_that_a_command_starts_count_too():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = "block = b'x' * (200 << 20); print('ready', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        assert use_of(process.pid).gib > 200 / 1024
        assert use_of(process.pid).cpu > 0
        assert use_of(process.pid).time <= time.time()
    finally:
        process.communicate(os.linesep.encode())
