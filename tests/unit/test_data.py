"""Problems, readers, templates, the prompt stream."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from rlsys.config import ColumnNames, ConfigError, DataConfig, RunConfig, TrainerConfig
from rlsys.config.command_line import parse
from rlsys.config.renamed_fields import translated
from rlsys.data.problems import ChatMessage, Problem
from rlsys.data.prompt_stream import PromptStream, load_problems, load_prompts
from rlsys.data.prompt_templates import PromptRenderer, load_template, stop_strings
from rlsys.data.readers import read_problems
from rlsys.data.synthetic_problems import generate_problems
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer

MATH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "math"
COLUMNS = ColumnNames()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model("tiny"))


LARGE = pytest.mark.slow  # tens of thousands of wordings


@pytest.mark.parametrize(
    "levels",
    [(1,), pytest.param((2,), marks=LARGE), (3,), (4,), pytest.param((5,), marks=LARGE), (1, 3)],
)
def test_synthetic_problems_are_right_disjoint_and_reproducible(levels: tuple[int, ...]):
    train, held_out = generate_problems(levels, train_size=200, eval_size=40, seed=3)
    assert (len(train), len(held_out)) == (200, 40)
    assert len({p.problem for p in train}) == 200
    assert generate_problems(levels, train_size=200, eval_size=40, seed=3) == (train, held_out)
    assert generate_problems(levels, train_size=200, eval_size=40, seed=4)[0] != train

    def expression(problem: Problem) -> str:
        return problem.problem_id.split("-", 2)[2].rsplit("-", 1)[0]

    # Not even in another wording.
    assert not {expression(p) for p in train} & {expression(p) for p in held_out}
    for problem in train + held_out:
        assert eval(expression(problem)) == int(problem.answer)


def test_too_many_problems_are_refused():
    with pytest.raises(
        ValueError,
        match=r"data\.synthetic\.train_size: 10000000 problems were requested, the levels hold \d+",
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
        source,
        columns=columns,
        field="data.train",
        where={"level": ("Level 1", "Level 2", "Level 3"), "subject": ("Algebra",)},
    )
    assert [(p.problem, p.answer) for p in problems] == [("q1", "1"), ("q3", "3")]
    assert problems[0].problem_id == "1"  # no id column: the row number


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such.parquet", r"data\.train: no such file '/no/such\.parquet'\. Give the path"),
        ("{dir}/broken.parquet", r"data\.train: cannot read .*broken\.parquet' as Parquet"),
        (
            "{dir}/broken.jsonl",
            r"1 of 2 rows of .*broken\.jsonl' cannot be used: line 2: is not valid JSON "
            r".*Fix or drop",
        ),
        (
            "{dir}/columns.jsonl",
            r"has no column 'problem'\. Its columns are answer, question; name the right one in "
            r"data\.columns\.problem",
        ),
        ("{dir}/notes.txt", r"notes\.txt' is not one of \.parquet, "),
        ("{dir}/empty.jsonl", "is empty"),
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
    rows = [{"problem": "1", "answer": "1", "level": level} for level in (2, 10.0, None)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"data\.where: \{level: \[5, x\]\} leaves no problem of data\.train .*"
        r"\(3 rows read; level holds 2, 10\)",
    ):
        read_problems(source, columns=COLUMNS, field="data.train", where={"level": (5, "x")})


def refusal(path: Path, **options: Any) -> str:
    """Return the one line with which a file is refused."""
    options = {"columns": COLUMNS, "on_dropped": lambda notice: None} | options
    with pytest.raises(ValueError, match=r"^data\.") as error:
        read_problems(str(path), field="data.train", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_row_is_checked_and_a_handful_is_shown(tmp_path: Path):
    good = {"problem": "p", "answer": "1"}
    bad = [
        {"problem": "p"},
        {"problem": "p", "answer": ["4"]},
        {"problem": 5, "answer": "1"},
        {"problem": "p", "answer": {"ground_truth": 4}},
        {"problem": "p", "answer": True},
        {"problem": "p", "answer": float("inf")},
        {"problem": "p", "answer": "1", "id": ["x"]},
    ]
    path = tmp_path / "x.jsonl"
    jsonl(path, [good] * 100 + bad)
    assert refusal(path) == (
        f"data.train: 7 of 107 rows of {str(path)!r} cannot be used: line 101: has no column "
        "'answer'; line 102: 'answer' is a list (['4']); line 103: 'problem' is a number (5); line "
        "104: 'answer' is an object (with ground_truth); line 105: 'answer' is true; and 2 more. "
        "Name a column that every row has, or drop the rows. Write one answer as text. Name the "
        "column with the problem's text, or with its chat messages, in data.columns.problem. Name "
        "the field inside the object, as in data.columns.answer reward_model.ground_truth. Write "
        "the text that a model should answer."
    )
    jsonl(path, bad[-2:])
    assert "line 1: 'answer' is inf; line 2: 'id' is a list (['x'])" in refusal(path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_rows_without_a_problem_or_an_answer_are_dropped_with_a_notice_or_refused(
    tmp_path: Path, suffix: str
):
    rows = [
        {"problem": text, "answer": answer}
        for text, answer in (("p0", "1"), ("p1", None), ("p2", " "), ("", "1"), ("p4", "1"))
    ]
    path, first = tmp_path / f"x.{suffix}", {"parquet": 0, "json": 0, "jsonl": 1}.get(suffix, 2)
    place = "row" if first == 0 else "line"
    write_rows(path, rows)
    null = "blank" if suffix in ("csv", "tsv") else "null"
    shown = (
        f"{place} {first + 1}: 'answer' is {null}; {place} {first + 2}: 'answer' is blank; "
        f"{place} {first + 3}: 'problem' is blank"
    )

    notices: list[str] = []
    problems = read_problems(
        str(path), columns=COLUMNS, field="data.train", on_dropped=notices.append
    )
    assert [(p.problem_id, p.problem) for p in problems] == [("0", "p0"), ("4", "p4")]
    assert notices == [
        f"data.train: 3 of 5 rows of {str(path)!r} lack a problem or an answer and were dropped: "
        + shown
    ]
    assert f"3 of 5 rows of {str(path)!r} cannot be used: {shown}. Fill in" in refusal(
        path, on_dropped=None
    )
    write_rows(path, rows[1:2])
    assert "1 of 1 rows" in refusal(path)  # nothing is left


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the rows with pandas, as users do, in the format of the suffix."""
    frame = pandas.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_all_kinds_of_files_give_the_same_problems(tmp_path: Path, suffix: str):
    rows = [
        {"problem": 'a, "b"\u2028\n c', "answer": "\\frac{1}{2}", "level": "Level 3", "id": "x"},
        {"problem": "é", "answer": "-4", "level": None, "id": "y"},
    ]
    write_rows(tmp_path / f"x.{suffix}", rows)
    problems = read_problems(str(tmp_path / f"x.{suffix}"), columns=COLUMNS, field="data.train")
    assert problems == [
        Problem(problem_id="x", problem=rows[0]["problem"], answer="\\frac{1}{2}"),
        Problem(problem_id="y", problem="é", answer="-4"),
    ]


def test_numbers_with_gaps_as_pandas_writes_them_are_the_numbers_that_they_were(tmp_path: Path):
    """A column of integers with a null becomes one of floats: 4 is 4.0, and level 3 is 3.0."""
    rows = [{"problem": "p", "answer": 4, "level": 3}, {"problem": "q", "answer": None}]
    write_rows(tmp_path / "x.parquet", rows)
    (problem,) = read_problems(
        str(tmp_path / "x.parquet"),
        columns=COLUMNS,
        field="f",
        where={"level": (3,)},
        on_dropped=lambda notice: None,
    )
    assert problem.answer == "4"


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_filters_find_the_same_rows_in_all_kinds_of_files(tmp_path: Path, suffix: str):
    rows = [
        {"problem": f"p{i}", "answer": "1", "level": level, "kind": kind, "hard": i % 2 == 0}
        for i, (level, kind) in enumerate([(1, "a"), (2, "b"), (3, None), (3, "b"), (None, "c")])
    ]
    write_rows(tmp_path / f"x.{suffix}", rows)

    def kept(**where: tuple) -> list[str]:
        source = str(tmp_path / f"x.{suffix}")
        found = read_problems(source, columns=COLUMNS, field="f", where=where)
        return [problem.problem for problem in found]

    assert kept(level=(3,)) == kept(level=("3",)) == kept(level=(3.0,)) == ["p2", "p3"]
    assert kept(level=(1, 3), kind=("a", "b")) == ["p0", "p3"]  # no kind: left out
    assert kept(hard=(True,)) == ["p0", "p2", "p4"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_metadata_are_the_other_columns_as_plain_values(tmp_path: Path, suffix: str):
    rows = [
        {
            "problem": "p",
            "truth": {"value": "4", "style": "rule"},
            "tests": [1, 2],
            "weight": 0.5,
            "level": 3,
        }
    ]
    write_rows(tmp_path / f"x.{suffix}", rows)
    options = {"columns": ColumnNames(answer="truth.value"), "field": "f"}
    (problem,) = read_problems(str(tmp_path / f"x.{suffix}"), metadata=True, **options)
    assert problem.metadata == {
        "truth": {"value": "4", "style": "rule"},  # of which the answer is one field
        "tests": [1, 2],
        "weight": 0.5,
        "level": 3,
    }
    assert isinstance(problem.metadata["weight"], float)
    (without,) = read_problems(str(tmp_path / f"x.{suffix}"), **options)
    assert without.metadata == {}


def test_columns_of_verl_with_chat_messages_and_a_field_inside_an_object(tmp_path: Path):
    prompts = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
        [{"role": "user", "content": "2 + 2?"}],
    ]
    rows = [
        {"prompt": prompt, "reward_model": {"style": "rule", "ground_truth": answer}}
        for prompt, answer in zip(prompts, ("2", "4"), strict=True)
    ]
    write_rows(tmp_path / "x.parquet", rows)
    columns = ColumnNames(problem="prompt", answer="reward_model.ground_truth")
    problems = read_problems(str(tmp_path / "x.parquet"), columns=columns, field="data.train")
    assert [(p.problem, p.answer, len(p.messages)) for p in problems] == [
        ("1 + 1?", "2", 2),
        ("2 + 2?", "4", 1),
    ]
    columns = ColumnNames(problem="prompt", answer="reward_model.truth")
    assert "row 0: has no column 'reward_model.truth'" in refusal(
        tmp_path / "x.parquet", columns=columns
    )


@pytest.mark.parametrize("role", ["problem", "id"])
def test_a_column_that_the_user_names_must_be_there(tmp_path: Path, role: str):
    path = tmp_path / "x.jsonl"
    jsonl(path, [{"problem": "p", "answer": "1"}])
    message = refusal(path, columns=ColumnNames(**{role: "typo"}))
    assert "has no column 'typo'. Its columns are answer, problem; name the right one in" in message
    assert f"data.columns.{role}" in message


def test_filters_need_their_column_and_single_values(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    jsonl(path, [{"problem": "p", "answer": "1"}])
    assert refusal(path, where={"level": (1,)}).endswith(
        "has no column 'level'. Its columns are answer, problem."
    )
    jsonl(path, [{"problem": "p", "answer": "1", "level": {"of": 3}, "subject": ["a"]}])
    assert len(read_problems(str(path), columns=COLUMNS, field="f", where={"level.of": (3,)})) == 1
    assert "line 1: 'level' is an object" in refusal(path, where={"level": (3,)})
    assert "line 1: 'subject' is a list (['a'])" in refusal(path, where={"subject": ("a",)})


def test_filters_are_checked_and_written_as_lists():
    assert config(where={"level": 3, "kind": ["a", "b"], "off": None}).data.where == {
        "level": (3,),
        "kind": ("a", "b"),
    }
    assert config(where={"a": {"b": True}}).data.where == {"a.b": (True,)}
    assert config(where=None).data.where == {}
    for wrong in ({"level": []}, {"level": [[1]]}, {"level": float("nan")}, [1]):
        with pytest.raises(ValueError, match="where"):
            config(where=wrong)


def test_former_columns_of_filters_are_refused_with_the_new_form():
    with pytest.raises(ValueError, match=r'--data\.where "\{hardness: \[...\]\}"'):
        config(columns={"level": "hardness"})


def test_former_filters_are_told_the_new_name():
    now = r"^--data\.levels: this field is now called data\.where\.level"
    with pytest.raises(ConfigError, match=now):
        parse(RunConfig(), ["--data.levels", "1,2"])
    former = {"data": {"levels": [1, 2], "subjects": None}}
    config = RunConfig.model_validate(translated(former))
    assert config.data.where == {"level": (1, 2)}  # of a run that is resumed


def test_former_columns_that_no_filter_used_are_read():
    assert config(columns={"level": "level", "subject": None}).data.columns == COLUMNS


@pytest.mark.skipif(not MATH.exists(), reason="the MATH files are not beside the project")
def test_math_files_work_without_options():
    notices: list[str] = []
    train = read_problems(
        str(MATH / "train.parquet"), columns=COLUMNS, field="f", on_dropped=notices.append
    )
    assert len(train) == 7498
    assert "row 5341: 'answer' is blank; row 5343: 'answer' is blank" in notices[0]
    hard = read_problems(
        str(MATH / "math500.parquet"),
        columns=COLUMNS,
        field="data.eval",
        where={"level": (5,)},
        metadata=True,
    )
    assert 0 < len(hard) < 500
    assert {p.metadata["level"] for p in hard} == {5}


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
                "content": "What is 1 + 1?\n\nReason step by step, and put the final answer in "
                "\\boxed{}.",
            }
        ],
        add_generation_prompt=True,
    )["input_ids"]
    assert list(prompt.token_ids) == expected


CONVERSATION = Problem(
    problem_id="7",
    problem="And 2 + 2?",
    answer="4",
    messages=(
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="1 + 1?"),
        ChatMessage(role="assistant", content="2"),
        ChatMessage(role="user", content="And 2 + 2?"),
    ),
)


@pytest.mark.parametrize(
    ("template", "last"),
    [
        ("chat", "And 2 + 2?"),
        (
            "chat_boxed",
            "And 2 + 2?\n\nReason step by step, and put the final answer in \\boxed{}.",
        ),
    ],
)
def test_a_conversation_keeps_its_turns(tokenizer, template: str, last: str):
    turns = [{"role": turn.role, "content": turn.content} for turn in CONVERSATION.messages[:-1]]
    turns.append({"role": "user", "content": last})
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    prompt = PromptRenderer(template, tokenizer).encode(CONVERSATION)
    assert list(prompt.token_ids) == expected
    assert prompt.problem == "And 2 + 2?"


def test_chat_without_messages_is_the_problem_alone(tokenizer):
    prompt = PromptRenderer("chat", tokenizer).encode(
        Problem(problem_id="1", problem="1 + 1?", answer="2")
    )
    turns = [{"role": "user", "content": "1 + 1?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(prompt.token_ids) == expected


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            r"refuses problem '7' with the roles system, user, assistant, user "
            r"\(roles must alternate\)\. Change or drop",
        ),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            r"leaves out the system message of problem '7'",
        ),
        ("{{ messages[0].content }} {{ messages[-1].content }}", "leaves out the user message"),
    ],
)
def test_a_chat_template_that_cannot_hold_the_conversation(chat_template: str, message: str):
    tokenizer = load_tokenizer(resolve_model("tiny"))
    tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match=r"^data\.template: the model's chat template " + message):
        PromptRenderer("chat", tokenizer).encode(CONVERSATION)


@pytest.mark.parametrize("template", ["chat", "chat_boxed"])
def test_chat_needs_a_chat_template(template: str):
    tokenizer = load_tokenizer(resolve_model("tiny"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=rf"data\.template: '{template}' needs a chat template"):
        PromptRenderer(template, tokenizer)


def test_other_templates_refuse_conversations(tmp_path: Path):
    rows = [{"problem": [{"role": "user", "content": f"p{i}"}], "answer": "1"} for i in range(9)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    message = (
        r"data\.template: 'few_shot' without the model's chat template has no place for chat "
        r"messages, and 8 of 8 problems of data\.train"
    )
    with pytest.raises(ValueError, match=message):
        load_problems(config(train=source, template="few_shot"))
    assert len(load_problems(config(train=source, template="few_shot", chat=True)).train) == 8
    with pytest.raises(ValueError, match="'chat' without the model's chat template"):
        load_problems(config(train=source, template="chat", chat=False))
    assert len(load_problems(config(train=source, template="chat")).train) == 8


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


MINE = Problem(problem_id="1", problem="1 + 1?", answer="2")


def test_a_users_template_declares_its_stop_strings_and_the_chat_template(
    tmp_path: Path, tokenizer
):
    path = tmp_path / "mine.jinja"
    path.write_text('---\nchat: true\nstop: ["</done>", "\\n\\n"]\n---\nSolve: {{ problem }}')
    assert stop_strings(str(path), ()) == ("</done>", "\n\n")
    turns = [{"role": "user", "content": "Solve: 1 + 1?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(PromptRenderer(str(path), tokenizer).encode(MINE).token_ids) == expected
    assert PromptRenderer(str(path), tokenizer, chat=False).encode(MINE).text == "Solve: 1 + 1?"


def test_any_template_can_be_wrapped_in_the_chat_template(tokenizer):
    plain = PromptRenderer("few_shot", tokenizer).encode(MINE).text
    turns = [{"role": "user", "content": plain}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(PromptRenderer("few_shot", tokenizer, chat=True).encode(MINE).token_ids) == expected
    tokenizer = load_tokenizer(resolve_model("tiny"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data\.chat: true needs a chat template"):
        PromptRenderer("few_shot", tokenizer, chat=True)


def test_lines_of_dashes_elsewhere_are_text(tmp_path: Path, tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text("Rules\n---\n{{ problem }}\n---\n")
    assert PromptRenderer(str(path), tokenizer).encode(MINE).text == "Rules\n---\n1 + 1?\n---\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nstops: [a]\n---\n{{ problem }}", r"declares \{'stops': \['a'\]\}\. It may hold"),
        ("---\nchat: 3\n---\n{{ problem }}", r"chat of .* is 3\. Write true or false"),
        ("---\nstop: [1]\n---\n{{ problem }}", r"stop of .* is \[1\]\. Write strings"),
        ("---\nstop: ['']\n---\n{{ problem }}", r"stop of .* is \[''\]\. Write strings"),
        ("---\nstop: [\n---\n{{ problem }}", "is not valid YAML"),
        ("---\nchat: true\n---\nno variable", "never uses"),
        ("no variable", "never uses"),
        (
            "{{ problem }} {{ other }}",
            r"is not a valid Jinja template .*Use \{\{ problem \}\} and nothing",
        ),
        ("{{ problem", "is not a valid Jinja template"),
    ],
)
def test_unusable_templates(tmp_path: Path, text: str, message: str):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_template(str(tmp_path / "t.jinja"))


def test_unknown_template_offers_the_nearest():
    with pytest.raises(
        ValueError, match=r"data\.template: 'few_shots' is neither .*Did you mean few_shot\?"
    ):
        load_template("few_shots")


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
        match=r"data\.max_prompt_tokens: 1 of 3 prompts of data\.train are longer than 100 tokens "
        r".*'2', has \d+",
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


def numbered(path: Path, count: int) -> str:
    return jsonl(path, [{"problem": f"p{i}", "answer": str(i)} for i in range(count)])


def test_evaluation_is_held_out_of_a_training_file(tmp_path: Path):
    source = numbered(tmp_path / "x.jsonl", 50)
    loaded = load_problems(config(train=source, held_out=0.2))
    assert (len(loaded.train), len(loaded.evaluation)) == (40, 10)
    assert not {p.problem for p in loaded.train} & {p.problem for p in loaded.evaluation}
    assert loaded.describe() == (
        "40 training and 10 held-out problems (held out of data.train by a hash of their text, "
        "and not trained on)"
    )
    assert loaded.notices == ()
    few = load_problems(config(train=source, held_out=0.2, eval_limit=3))
    assert (len(few.train), len(few.evaluation)) == (47, 3)  # no more than is evaluated


def test_copies_of_held_out_problems_are_left_out_and_counted(tmp_path: Path):
    rows = [{"problem": f"p{i % 5}", "answer": "1"} for i in range(15)]
    loaded = load_problems(config(train=jsonl(tmp_path / "x.jsonl", rows)))
    assert (len(loaded.train), len(loaded.evaluation)) == (12, 1)
    assert loaded.notices == (
        "data.train: 2 further copies of held-out problems are neither trained on nor evaluated",
    )


def test_auto_is_synthetic_for_synthetic_problems_and_off_is_none():
    assert len(load_problems(config()).evaluation) == 64
    assert load_problems(config()).evaluation == load_problems(config(eval="synthetic")).evaluation
    off = load_problems(config(eval="off"))
    assert off.evaluation == []
    assert off.describe() == "1000 training problems, no evaluation (data.eval is off)"


def test_without_an_evaluation_engine_and_trainer_are_compared_on_training_prompts(tokenizer):
    off = load_prompts(config(eval="off"), tokenizer)
    assert len(off.evaluation) == 0
    assert list(off.samples) == list(off.train.prompts)
    on = load_prompts(config(), tokenizer)
    assert on.samples == on.evaluation.prompts


@pytest.mark.parametrize("value", [None, False, "off"])
def test_off_as_yaml_writes_it(value: object):
    assert config(eval=value).data.eval == "off"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"eval": "synthetic"},
            r"data\.eval: 'synthetic' problems do not measure data\.train .*Set it to auto",
        ),
        ({"train": "off"}, r"data\.train: 'off' is a value of data\.eval"),
        (
            {"train": "synthetic", "where": {"level": 2}},
            r"data\.where: level filters .*data\.synthetic\.levels",
        ),
    ],
)
def test_sources_that_contradict_each_other(tmp_path: Path, data: dict, message: str):
    source = numbered(tmp_path / "x.jsonl", 5)
    with pytest.raises(ValueError, match=message):
        load_problems(config(**{"train": source} | data))


def test_equal_training_and_evaluation_problems_are_warned_of(tmp_path: Path):
    train = numbered(tmp_path / "train.jsonl", 5)
    other = jsonl(
        tmp_path / "eval.jsonl", [{"problem": f" p{i}", "answer": "1"} for i in range(3, 9)]
    )
    for source, shared in ((train, "5 of its 5"), (other, "2 of its 6")):
        loaded = load_problems(config(train=train, eval=source))
        assert loaded.origin == source
        assert loaded.notices[0].startswith(
            f"data.eval: WARNING: {shared} problems are also in data.train"
        )


def test_a_blank_answer_reaches_the_console_and_is_refused_on_request(tmp_path: Path, tokenizer):
    rows = [{"problem": f"p{i}", "answer": "" if i == 2 else "1"} for i in range(9)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    loaded = load_prompts(config(train=source), tokenizer)
    assert any("line 3: 'answer' is blank" in notice for notice in loaded.notices)
    with pytest.raises(ValueError, match=r"line 3: 'answer' is blank\. Fill in"):
        load_problems(config(train=source, blank_rows="refuse"))


def test_fewer_prompts_than_a_step_takes_are_repeated_with_a_notice(tmp_path: Path, tokenizer):
    loaded = load_prompts(config(train=numbered(tmp_path / "x.jsonl", 4)), tokenizer)
    assert loaded.notices == (
        "trainer.prompts_per_step: WARNING: 7 is more than the 3 training prompts, so each step "
        "holds the same prompt several times, in groups of their own. Lower it, or raise "
        "generation.samples_per_prompt",
    )
    batch = loaded.train.next_batch()
    assert len(batch) == 7
    assert len(set(batch.group_ids)) == 7


def test_when_every_prompt_is_too_long_the_field_says_so(tmp_path: Path, tokenizer):
    source = numbered(tmp_path / "x.jsonl", 4)
    message = (
        r"data\.max_prompt_tokens: 3 of 3 prompts of data\.train are longer than 2 tokens .*Raise"
    )
    with pytest.raises(ValueError, match=message):
        load_prompts(config(train=source, max_prompt_tokens=2), tokenizer)


def test_dropped_prompts_are_among_the_notices(tmp_path: Path, tokenizer):
    rows = [{"problem": "x" * (400 if i == 0 else 1) + str(i), "answer": "1"} for i in range(9)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    template = tmp_path / "t.jinja"
    template.write_text("{{ problem }}")
    loaded = load_prompts(
        config(train=source, eval="off", template=str(template), max_prompt_tokens=50), tokenizer
    )
    assert loaded.notices == (
        "data.train: 1 of 9 prompts are longer than data.max_prompt_tokens 50 and were dropped",
    )
