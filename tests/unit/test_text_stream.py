"""The texts of an RL run: sources, held-out part, pieces, and the resumable stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import RunConfig
from rlsys.data.prompt_templates import beginning_tokens
from rlsys.data.synthetic_texts import PASSAGES, synthetic_texts
from rlsys.data.text_stream import LoadedTexts, load_texts, source_texts
from rlsys.models import resolve_model
from rlsys.models.loading import end_token_ids, load_tokenizer


def config(**ptx: Any) -> RunConfig:
    return RunConfig.model_validate({"ptx": {"coefficient": 0.5, "train": "synthetic", **ptx}})


def load(run: RunConfig) -> LoadedTexts:
    directory = resolve_model("tiny")
    tokenizer = load_tokenizer(directory)
    return load_texts(run, tokenizer, source_texts(run), end_token_ids(directory, tokenizer))


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def letters(count: int, prefix: str = "text") -> list[dict[str, Any]]:
    return [{"text": f"{prefix} number {i} is here"} for i in range(count)]


def test_generated_passages_differ_and_depend_on_the_seed():
    texts = [text.text for text in synthetic_texts(0)]
    assert len(set(texts)) == len(texts) == PASSAGES
    assert texts == [text.text for text in synthetic_texts(0)]
    assert texts != [text.text for text in synthetic_texts(1)]
    assert not any("{" in text or "  " in text for text in texts)


def test_generated_text_is_split_the_same_way_whatever_else_is_configured():
    both = source_texts(config())
    assert (len(both.train), len(both.held_out)) == (900, 100)
    assert not {text.text for text in both.train} & {text.text for text in both.held_out}

    without_training = source_texts(config(coefficient=0.0))
    assert without_training.train == ()
    assert without_training.held_out == both.held_out
    only_evaluated = source_texts(config(coefficient=0.0, train="off", eval="synthetic"))
    assert only_evaluated.held_out == both.held_out
    assert source_texts(config(eval="off")).train == both.train
    assert source_texts(config(eval="off")).held_out == ()


def test_nothing_is_read_where_nothing_is_asked_for():
    assert not RunConfig().reads_text
    texts = source_texts(RunConfig())
    assert not texts.train
    assert not texts.held_out
    loaded = load(RunConfig())
    assert loaded.train is None
    assert loaded.held_out is None


def test_files_are_held_out_by_text_or_read_beside(tmp_path: Path):
    train = written(tmp_path / "train.jsonl", letters(20))
    auto = source_texts(config(train=train, held_out=0.2))
    assert (len(auto.train), len(auto.held_out)) == (16, 4)

    other = written(tmp_path / "eval.jsonl", letters(3, "other"))
    beside = source_texts(config(train=train, eval=other, eval_limit=2))
    assert (len(beside.train), len(beside.held_out)) == (20, 2)
    assert beside.notices == ()

    shared = source_texts(config(train=train, eval=train))
    (notice,) = shared.notices
    assert "WARNING: 20 of its 20 texts are also in ptx.train" in notice


def test_any_column_can_be_the_text(tmp_path: Path):
    rows = [{"problem": "1 + 1?", "solution": f"It is {i}."} for i in range(4)]
    file = written(tmp_path / "math.jsonl", rows)
    texts = source_texts(config(train=file, eval="off", columns={"text": "solution"}))
    assert [text.text for text in texts.train] == [row["solution"] for row in rows]

    with pytest.raises(ValueError, match=r"^ptx\.train: .* problem, solution, .*--ptx\.columns\.t"):
        source_texts(config(train=file))
    with pytest.raises(ValueError, match=r"^ptx\.columns\.text: ptx\.train .* no column 'body'"):
        source_texts(config(train=file, columns={"text": "body"}))


def test_blank_texts_are_dropped_and_a_source_without_any_text_is_refused(tmp_path: Path):
    some = written(tmp_path / "some.jsonl", [*letters(4), {"text": "  "}, {"text": None}])
    texts = source_texts(config(train=some, eval="off"))
    assert len(texts.train) == 4
    assert "ptx.train: 2 of 6 rows" in texts.notices[0]

    blank = written(tmp_path / "blank.jsonl", [{"text": " "}, {"text": ""}])
    with pytest.raises(ValueError, match=r"^ptx\.train: 2 of 2 rows"):
        source_texts(config(train=blank, eval="off"))
    empty = written(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"ptx\.train"):
        source_texts(config(train=empty, eval="off"))
    one = written(tmp_path / "one.jsonl", letters(1))
    with pytest.raises(ValueError, match=r"^ptx\.eval: 'auto' holds texts out of ptx\.train"):
        source_texts(config(train=one))


def test_pieces_of_a_long_text_learn_each_of_its_tokens_once(tmp_path: Path):
    file = written(tmp_path / "long.jsonl", [{"text": "abc " * 50}])
    run = config(train=file, eval="off", max_tokens=16, examples_per_step=1)
    loaded = load(run)
    assert loaded.train is not None
    pieces = len(loaded.train)
    sequences = [loaded.train.next_batch().sequences for _ in range(pieces)]
    assert max(int(part.loss_lengths.max()) for part in sequences) == 16

    tokenizer = load_tokenizer(resolve_model("tiny"))
    own: Any = tokenizer("abc " * 50, add_special_tokens=False)["input_ids"]
    tokens = [*beginning_tokens(tokenizer), *own, tokenizer.eos_token_id]
    learned = [int(token) for part in sequences for token in part.token_ids[part.loss_mask]]
    # All but the first, which nothing precedes.
    assert sorted(learned) == sorted(tokens[1:])


def test_a_restored_stream_goes_on_where_it_was():
    whole = load(config(examples_per_step=8)).train
    assert whole is not None
    for _ in range(200):  # more than an epoch
        whole.next_batch()
    state = json.loads(json.dumps(whole.state()))
    restored = load(config(examples_per_step=8)).train
    assert restored is not None
    restored.load_state(state)
    for _ in range(3):
        expected, found = whole.next_batch(), restored.next_batch()
        assert found.batch_id == expected.batch_id
        np.testing.assert_array_equal(found.sequences.token_ids, expected.sequences.token_ids)


@pytest.mark.parametrize("change", [{"max_tokens": 16}, {"held_out": 0.05}])
def test_other_texts_are_refused_on_a_resume(change: dict[str, Any]):
    state = load(config()).train.state()  # type: ignore[union-attr]
    other = load(config(**change)).train
    assert other is not None
    with pytest.raises(ValueError, match=r"^ptx\.train: the \d+ examples are not the \d+"):
        other.load_state(state)


def test_a_step_with_more_texts_than_there_are_is_reported(tmp_path: Path):
    file = written(tmp_path / "few.jsonl", letters(3))
    loaded = load(config(train=file, eval="off", examples_per_step=8))
    assert any("8 is more than the 3 training texts" in notice for notice in loaded.notices)


def test_off_may_be_written_as_yaml_reads_it():
    for off in (None, False, "off"):
        assert config(train="synthetic", eval=off).ptx.eval == "off"
