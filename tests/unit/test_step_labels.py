"""Responses in steps with a label for each: files, the generator, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlsys.config.offline import StepColumns
from rlsys.data.example_encoding import (
    NO_STEP,
    EncodedExample,
    ExampleEncoder,
    sequences_of,
    step_labels_of,
)
from rlsys.data.example_readers import ExampleSource, read_step_labels
from rlsys.data.examples import StepLabels
from rlsys.data.problems import ChatMessage
from rlsys.data.synthetic_problems import generate_solved_problems
from rlsys.data.synthetic_steps import generated_step_labels
from rlsys.math_verifier import verify_math
from rlsys.models import resolve_model
from rlsys.models.loading import end_token_ids, load_tokenizer
from rlsys.rewards import split_steps
from rlsys.rewards.arithmetic import equations

TOKENIZER: Any = load_tokenizer(resolve_model("tiny"))


def encoder(template: str = "plain") -> ExampleEncoder:
    ends = end_token_ids(resolve_model("tiny"), TOKENIZER)
    return ExampleEncoder(template, TOKENIZER, chat=None, end_tokens=ends)


def source(tmp_path: Path, *rows: dict[str, Any], **more: Any) -> ExampleSource:
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleSource(source=str(file), field="data.train", **more)


def read(tmp_path: Path, row: dict[str, Any], **columns: str) -> StepLabels:
    (found,) = read_step_labels(source(tmp_path, row), StepColumns(**columns))
    return found


# --- files ---


def test_the_shape_of_stepwise_supervision(tmp_path: Path):
    row = {"prompt": "2 + 2?", "completions": ["It is 4.", "No, 5."], "labels": [True, False]}
    found = read(tmp_path, row)
    assert (found.prompt, found.steps) == ("2 + 2?", ("It is 4.", "No, 5."))
    assert found.labels == (True, False)
    assert found.answer is None


def test_labels_as_numbers_other_columns_and_chat_prompts(tmp_path: Path):
    user = {"role": "user", "content": "2 + 2?"}
    row = {"q": [user], "s": ["a", "b"], "ok": [1, 0], "answer": 4, "id": "x"}
    found = read(tmp_path, row, prompt="q", steps="s", labels="ok")
    assert found.labels == (True, False)
    assert all(isinstance(label, bool) for label in found.labels)
    assert found.context == (ChatMessage(role="user", content="2 + 2?"),)
    assert (found.example_id, found.answer) == ("x", "4")


def test_parquet_lists_of_labels(tmp_path: Path):
    file = tmp_path / "steps.parquet"
    table = pyarrow.table({"prompt": ["p"], "completions": [["a", "b"]], "labels": [[True, False]]})
    pyarrow.parquet.write_table(table, file)
    (found,) = read_step_labels(ExampleSource(source=str(file), field="f"), StepColumns())
    assert found.labels == (True, False)


def test_missing_columns_are_named_with_the_flags_that_map_them(tmp_path: Path):
    rows = source(tmp_path, {"prompt": "p", "parts": ["a"], "labels": [True]})
    with pytest.raises(ValueError, match=r"columns labels, parts, prompt.*--data\.columns\.steps"):
        read_step_labels(rows, StepColumns())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [True]}, "has 1 labels for 2 steps"),
        ({"labels": [True, -1]}, "holds a number.*PRM800K"),
        ({"labels": [True, 0.5]}, "holds a number"),
        ({"labels": [True, None]}, "holds null"),
        ({"labels": ["+", "-"]}, "holds text"),
        ({"labels": "+-"}, "is text"),
        ({"completions": "a b"}, "is text.*list of the texts"),
        ({"completions": [], "labels": []}, "list of the texts"),
        ({"completions": ["a", " "]}, "is blank"),
        ({"completions": None}, "is null"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], reason: str):
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]} | change
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, row)


# --- the generator ---


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_generated_labels_are_true_up_to_the_first_wrong_step(level: int):
    """Every equation is checked by the verifier: those after the wrong step go on from it."""
    solved, _ = generate_solved_problems([level], train_size=100, eval_size=10, seed=0)
    examples = generated_step_labels(solved, seed=3)
    assert 30 < sum(all(example.labels) for example in examples) < 70  # of 100, p = 1/2

    firsts = set()
    for example, worked in zip(examples, solved, strict=True):
        assert list(example.labels) == sorted(example.labels, reverse=True)
        right_answer = verify_math(example.steps[-1], worked.problem.answer).score == 1
        assert right_answer == all(example.labels)

        texts = [*example.steps]
        right = [pair_is_right(text) for text in texts[:-1]]
        last_value = texts[-2].rpartition(" = ")[2]
        right.append(texts[-1] == f"\\boxed{{{last_value}}}")
        if all(example.labels):
            assert all(right)
        else:
            wrong = example.labels.index(False)
            firsts.add(wrong)
            assert [place for place, fine in enumerate(right) if not fine] == [wrong]
    assert firsts == set(range(len(examples[0].steps))) or level == 3  # which has two lengths


def pair_is_right(text: str) -> bool:
    ((left, right),) = equations(text)
    return eval(left) == eval(right)


def test_generated_labels_depend_on_seed_and_problem_alone():
    solved, _ = generate_solved_problems([1, 5], train_size=40, eval_size=10, seed=0)
    assert (
        generated_step_labels(solved[10:20], seed=1) == generated_step_labels(solved, seed=1)[10:20]
    )
    assert generated_step_labels(solved, seed=1) != generated_step_labels(solved, seed=2)


# --- tokens ---


def labelled_prefixes(example: EncodedExample) -> list[tuple[str, int]]:
    """Return the text up to and with each labelled token, and its label."""
    (response,) = example.responses
    assert response.step_labels is not None
    return [
        (str(TOKENIZER.decode(response.token_ids[: place + 1])), int(response.step_labels[place]))
        for place in np.flatnonzero(response.step_labels != NO_STEP)
    ]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_each_step_has_its_label_at_its_last_token(template: str):
    steps = ("Größe: 3 €.", "Dann 2 * 3 = 6 €", "🙂")
    made = StepLabels(example_id="0", prompt="2 + 2?", steps=steps, labels=(True, True, False))
    found = labelled_prefixes(encoder(template).steps(made, "\n\n"))
    assert [label for _, label in found] == [1, 1, 0]
    for (text, _), number in zip(found, (1, 2, 3), strict=True):
        # A token may hold the first characters of what follows the step.
        assert text.lstrip().rstrip("\n") == "\n\n".join(steps[:number])


def test_labels_are_where_split_steps_ends_the_steps_of_the_whole_text():
    steps = ("1 + 1 = 2. ", "b\n", "c d")
    made = StepLabels(example_id="0", prompt="p", steps=steps, labels=(False, True, False))
    found = labelled_prefixes(encoder().steps(made, "\n\n"))
    text = "\n\n".join(steps)
    ends = [step.end for step in split_steps(text)]
    assert [text[:end] for end in ends] == [prefix.strip() for prefix, _ in found]
    assert [label for _, label in found] == [0, 1, 0]


def test_labels_lie_flat_beside_the_tokens_of_a_batch():
    examples = [
        encoder().steps(
            StepLabels(example_id=str(n), prompt="p" * n, steps=("ab",) * n, labels=(True,) * n),
            "\n",
        )
        for n in (1, 3)
    ]
    labels = step_labels_of(examples)
    sequences = sequences_of(examples, [0, 1])
    assert labels is not None
    assert labels.shape == sequences.token_ids.shape
    counts = np.add.reduceat(labels != NO_STEP, sequences.offsets[:-1])
    assert counts.tolist() == [1, 3]
    assert not (labels != NO_STEP)[~sequences.loss_mask].any()
