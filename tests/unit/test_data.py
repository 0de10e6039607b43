"""Problems, readers, templates, the prompt stream."""

import json
from pathlib import Path

import pytest

from rlsys.config import ColumnNames, DataConfig, RunConfig, TrainerConfig
from rlsys.data.problems import Problem
from rlsys.data.prompt_stream import PromptStream, load_prompts
from rlsys.data.prompt_templates import PromptRenderer, stop_strings, template_source
from rlsys.data.readers import read_problems
from rlsys.data.synthetic_problems import generate_problems
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer

MATH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "math"
COLUMNS = ColumnNames()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model("tiny"))


@pytest.mark.parametrize("levels", [(1,), (2,), (3,), (4,), (5,), (1, 3)])
def test_synthetic_problems_are_right_disjoint_and_reproducible(levels: tuple[int, ...]):
    train, held_out = generate_problems(levels, train_size=200, eval_size=40, seed=3)
    assert (len(train), len(held_out)) == (200, 40)
    assert len({p.problem for p in train}) == 200
    assert generate_problems(levels, train_size=200, eval_size=40, seed=3) == (train, held_out)
    assert generate_problems(levels, train_size=200, eval_size=40, seed=4)[0] != train

    def expression(problem: Problem) -> str:
        return problem.problem_id.split("-", 2)[2].rsplit("-", 1)[0]

    assert not {expression(p) for p in train} & {
        expression(p) for p in held_out
    }  # not even in another wording
    for problem in train + held_out:
        assert eval(expression(problem)) == int(problem.answer)


def test_too_many_problems_are_refused():
    with pytest.raises(
        ValueError,
        match=r"data\.synthetic\.train_size: 10000000 problems were asked for, the levels hold \d+",
    ):
        generate_problems((1,), train_size=10**7, eval_size=1, seed=0)
    with pytest.raises(ValueError, match=r"data\.synthetic\.levels: unknown level 9"):
        generate_problems((9,), train_size=1, eval_size=1, seed=0)


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_jsonl_with_a_column_mapping_and_filters(tmp_path: Path):
    rows = [
        {"q": f"q{i}", "a": i, "level": f"Level {i}", "subject": "Algebra" if i % 2 else "Geometry"}
        for i in range(5)
    ]
    source = jsonl(tmp_path / "x.jsonl", rows)
    columns = ColumnNames(problem="q", answer="a")
    problems = read_problems(
        source, columns=columns, field="data.train", levels=(1, 2, 3), subjects=("Algebra",)
    )
    assert [(p.problem, p.answer, p.level) for p in problems] == [("q1", "1", 1), ("q3", "3", 3)]
    assert problems[0].problem_id == "1"  # no id column: the row number


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such.parquet", r"data\.train: no such file '/no/such\.parquet'\. Give the path"),
        ("{dir}/broken.parquet", r"data\.train: cannot read .*broken\.parquet' as Parquet"),
        ("{dir}/broken.jsonl", r"line 2 of .*broken\.jsonl' is no JSON"),
        (
            "{dir}/columns.jsonl",
            r"has no column 'problem'\. Its columns are answer, question; name the right one in data\.columns\.problem",
        ),
        ("{dir}/notes.txt", r"is neither a \.parquet nor a \.jsonl file"),
        ("{dir}/empty.jsonl", "has no column|no problem"),
    ],
)
def test_unusable_files_get_one_clear_message(tmp_path: Path, source: str, message: str):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "broken.jsonl").write_text('{"problem": "1", "answer": "1"}\n{"problem"')
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.jsonl").write_text("")
    jsonl(tmp_path / "columns.jsonl", [{"question": "1", "answer": "1"}])
    with pytest.raises(ValueError, match=message) as error:
        read_problems(source.format(dir=tmp_path), columns=COLUMNS, field="data.train")
    assert "\n" not in str(error.value)


def test_nothing_left_after_filters_says_what_there_is(tmp_path: Path):
    source = jsonl(
        tmp_path / "x.jsonl", [{"problem": "1", "answer": "1", "level": 2, "subject": "Algebra"}]
    )
    with pytest.raises(
        ValueError,
        match=r"1 rows read, filters data\.levels=\[5\]; the file has levels \[2\] and subjects \['Algebra'\]",
    ):
        read_problems(source, columns=COLUMNS, field="data.train", levels=(5,))


@pytest.mark.skipif(not MATH.exists(), reason="the MATH files are not beside the project")
def test_math_files_work_without_options():
    train = read_problems(str(MATH / "train.parquet"), columns=COLUMNS, field="data.train")
    assert len(train) == 7500
    hard = read_problems(
        str(MATH / "math500.parquet"), columns=COLUMNS, field="data.eval", levels=(5,)
    )
    assert 0 < len(hard) < 500
    assert {p.level for p in hard} == {5}


def test_few_shot_golden(tokenizer):
    prompt = PromptRenderer("few_shot", tokenizer).encode(
        Problem(problem_id="1", problem="What is 1 + 1?", answer="2")
    )
    assert prompt.text.endswith("Answer: \\boxed{12}\n\nProblem: What is 1 + 1?\nAnswer:")
    assert tokenizer.decode(list(prompt.token_ids)) == prompt.text


def test_chat_template_is_tokenized_once_with_its_special_tokens(tokenizer):
    prompt = PromptRenderer("chat_boxed", tokenizer).encode(
        Problem(problem_id="1", problem="What is 1 + 1?", answer="2")
    )
    expected = tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": "What is 1 + 1?\n\nReason step by step, and put the final answer in \\boxed{}.",
            }
        ],
        add_generation_prompt=True,
    )["input_ids"]
    assert list(prompt.token_ids) == expected


def test_r1_zero_opens_the_first_tag_and_stops_at_the_last(tokenizer):
    prompt = PromptRenderer("r1_zero", tokenizer).encode(
        Problem(problem_id="1", problem="P", answer="2")
    )
    assert prompt.text.endswith("User: P\nAssistant: <think>")
    assert stop_strings("r1_zero", ()) == ("</answer>",)
    assert stop_strings("r1_zero", ("END",)) == ("END",)


def test_a_users_template_file(tmp_path: Path, tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text("Q: {{ problem }}\nA:\n")
    prompt = PromptRenderer(str(path), tokenizer).encode(
        Problem(problem_id="1", problem="x", answer="2")
    )
    assert prompt.text == "Q: x\nA:\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no variable", "never uses"),
        ("{{ problem }} {{ other }}", "no usable Jinja template"),
        ("{{ problem", "no usable Jinja template"),
    ],
)
def test_unusable_templates(tmp_path: Path, text: str, message: str):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ValueError, match=message):
        template_source(str(tmp_path / "t.jinja"))


def test_unknown_template_offers_the_nearest():
    with pytest.raises(
        ValueError, match=r"data\.template: 'few_shots' is neither .*Did you mean few_shot\?"
    ):
        template_source("few_shots")


def config(**data: object) -> RunConfig:
    return RunConfig(
        data=DataConfig.model_validate(data), trainer=TrainerConfig(prompts_per_step=7, seed=1)
    )


def stream(tokenizer) -> PromptStream:
    return load_prompts(config(synthetic={"train_size": 20, "eval_size": 4}), tokenizer).train


def test_the_stream_visits_each_prompt_once_an_epoch_with_fresh_group_ids(tokenizer):
    source = stream(tokenizer)
    batches = [source.next_batch() for _ in range(20)]  # 140 prompts: 7 epochs of 20
    ids = [prompt.problem_id for batch in batches for prompt in batch.prompts]
    for epoch in range(7):
        assert len(set(ids[20 * epoch : 20 * (epoch + 1)])) == 20
    assert ids[:20] != ids[20:40]  # shuffled anew
    groups = [int(group) for batch in batches for group in batch.group_ids]
    assert groups == list(range(140))


def test_the_stream_continues_exactly_in_the_middle_of_an_epoch(tokenizer):
    straight, first = stream(tokenizer), stream(tokenizer)
    expected = [straight.next_batch() for _ in range(6)]
    for _ in range(4):
        first.next_batch()
    resumed = stream(tokenizer)
    resumed.load_state(json.loads(json.dumps(first.state())))
    for batch in expected[4:]:
        again = resumed.next_batch()
        assert again.prompts == batch.prompts
        assert again.batch_id == batch.batch_id


def test_resuming_with_other_data_is_refused(tokenizer):
    with pytest.raises(
        ValueError,
        match=r"data\.train: the checkpoint was written with 99 prompts, now there are 20",
    ):
        stream(tokenizer).load_state({"batches_taken": 1, "prompts": 99})


def test_long_prompts_are_dropped_and_counted_or_refused(tokenizer, tmp_path: Path):
    rows = [{"problem": "x" * n, "answer": "1"} for n in (1, 2, 400)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    template = tmp_path / "t.jinja"
    template.write_text("{{ problem }}")
    loaded = load_prompts(
        config(train=source, eval=source, template=str(template), max_prompt_tokens=100), tokenizer
    )
    assert (len(loaded.train), loaded.dropped_train, loaded.dropped_evaluation) == (2, 1, 1)
    with pytest.raises(
        ValueError,
        match=r"data\.max_prompt_tokens: 1 of 3 prompts of data\.train are longer than 100 tokens .*'2', has \d+",
    ):
        load_prompts(
            config(
                train=source,
                eval=source,
                template=str(template),
                max_prompt_tokens=100,
                overlong_prompts="refuse",
            ),
            tokenizer,
        )
