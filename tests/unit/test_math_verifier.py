"""The verifier on its labelled set, on adversarial input, and on random strings."""

import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.math_verifier import extract_answer, same_answer_text, verify_math
from rlsys.math_verifier.__main__ import main
from rlsys.math_verifier.limits import UnparsableError
from rlsys.math_verifier.nodes import (
    Call,
    Marked,
    Measured,
    Number,
    Power,
    Product,
    Sum,
    Symbol,
)
from rlsys.math_verifier.parser import parse
from rlsys.math_verifier.units import parse_unit

ROOT = Path(__file__).resolve().parents[2]


def cases_of(name: str) -> list[dict]:
    text = (ROOT / "tests" / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


CASES = cases_of("math_verifier_cases.jsonl")
# Answers as in other data sets than MATH, and answers that try to be right by saying too much.
WIDER = cases_of("math_verifier_wider.jsonl")
# python -m benchmarks.math_verifier --fuzz 50000 runs more.
EXAMPLES = int(os.environ.get("RLSYS_FUZZ_EXAMPLES", "400"))
LIMIT_S = 2.0  # of processor time, on which other work on the machine has no influence

GROUND_TRUTHS = [
    "42", r"\frac{1}{2}", "x^2+1", "(1,2)", r"\{1,2\}", r"(-\infty,1]",
    r"\begin{pmatrix}1\\2\end{pmatrix}", "B", r"2\sqrt{3}", r"x\ge 2", r"\text{Friday}", "2,3",
    "1:2", r"5\text{ cm}", r"50\%", r"9^{9^{9^{9}}}",
]  # fmt: skip
ADVERSARIAL = [
    # towers, factorials, sizes that no machine holds
    r"9^{9^{9^{9^{9}}}}", "2^{2^{2^{2^{2^{2}}}}}", "((((9^9)^9)^9)^9)^9", "9999999999!",
    "((((9!)!)!)!)!", "3!!!!!!", r"\binom{10^9}{10^8}", r"e^{e^{e^{e^{10}}}}",
    r"\exp(\exp(\exp(100)))", r"\tan(10^{500})", r"\sin(10^{1900})", "((x+1)^{1000}+1)^{1000}",
    "(x+1)^{10^{9}}", r"(1+10^{-9})^{10^{12}}", r"\left(1+\frac1x\right)^{10^{300}}",
    "1e999999999", r"10^{-10^{10}}", r"\sqrt[10^{100}]{2}", r"\cosh(9999)",
    "(" * 30 + "x" + "+1)^{99}" * 30, "(" * 36 + "3" + ")^{3}" * 36, "x!" * 300,
    r"0.\overline{" + "123456789" * 190 + "}", "50" + "%" * 1500, "0." + "1" * 1900 + "2...",
    # length and nesting
    "9" * 100_000, "(" * 100_000, "{" * 100_000, r"\frac{" * 20_000, "(" * 900 + "1" + ")" * 900,
    r"\sqrt{" * 300 + "2" + "}" * 300, r"\sqrt" * 400 + "2", "-" * 1900 + "1", "2^" * 900 + "2",
    r"\pm 1" * 200, "(1,2)," * 300 + "(1,2)", r"\{" * 900 + r"\}" * 900, "|" * 1900,
    r"\text{" * 300 + "a" + "}" * 300, "{x|" * 600, r"\left(" * 300 + r"\right)" * 300, "[[" * 400,
    r"\begin{pmatrix}" * 100, "1<x<2 or " * 150 + "x>3",
    r"\begin{pmatrix}" + "&".join(["1"] * 400) + r"\\" + "&".join(["1"] * 400) + r"\end{pmatrix}",
    "(" * 12 + r"\begin{pmatrix}x&y\\1&x\end{pmatrix}" + ")^{9}" * 12,
    "(" * 12 + r"\begin{pmatrix}2&3\\1&7\end{pmatrix}" + ")^{19}" * 12,
    r"\begin{pmatrix}x&y\\1&x\end{pmatrix}" * 60,
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}" * 60,
    r"\cup".join(f"({i},{i + 1})" for i in range(200)),
    r"\{" + ",".join(map(str, range(400))) + r"\}",
    "+".join(f"\\sqrt{{{i}}}" for i in range(2, 180)),
    "+".join(f"\\sin({i}x)" for i in range(2, 170)),
    r"\left\{\begin{array}{l}" * 100, (r"\left\{\begin{array}{l}x=1\\" * 30) + "y=2",
    r"\sum_{k=1}^{n}" * 100, r"\sum_{k=1}^{" * 35, r"\sum_{k=1}^{10^{9}} k", "P(A|" * 200,
    "1or" * 600, "x=1orx=" * 200, r"x=1\quad " * 200, r"x=1 \\ " * 200, "=" * 1900, ":=" * 900,
    "per cent" * 200, "x=" * 900 + "4", "A(1,2)" * 300, "P(x)=" * 380,
    r"\begin{pmatrix}" + r"\\".join("&".join(str(i * j % 7) for j in range(6)) for i in range(6))
    + r"\end{pmatrix}^{-1}",
    # undefined
    r"\frac{1}{0}", "1/0/0", "0^{0}", "0^{-1}", r"\infty-\infty", r"\infty^{\infty}", r"\ln 0",
    r"\log_1 2", r"\sqrt[0]{2}", r"\tan\frac{\pi}{2}",
    # strange characters
    "\x00" * 1000, "1\x002", "٤٢", "𝟒𝟐", "①", "x" * 1900, "\ud800", "\u202e24",
    "1\u200b2x", "🙂" * 500, "\\" * 1999, "$" * 1901, "&" * 1900,
    # code
    "__import__('os').system('true')", "().__class__.__mro__[1].__subclasses__()", "lambda x: x",
    "exec('1')", "{{7*7}}", "Integer(10)**10**10", r"\write18{true}", r"\input{/etc/passwd}",
    r"\def\x{5}\x",
]  # fmt: skip

_CHARACTERS = r"0123456789+-*/^_=<>()[]{}|,.;:!%&$\ xyzabeniπ√∞°"
_PIECES = [
    r"\frac", r"\sqrt", r"\text{", r"\left(", r"\right)", r"\cup", r"\pm", r"\infty", r"\pi",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "&", r"\{", r"\}", "(", ")", "[", "]", "{", "}",
    "^", "_", "1", "2", "10", "0", "x", "y", "i", "e", "n", ",", ";", "=", "<", r"\le", r"\in",
    r"\mathbb{R}", r"\sin", r"\log", "!", "%", r"^\circ", " cm", r"\$", "+", "-", "*", "/", "|",
    r"\binom", r"\text{ and }", " or ", r"\approx", ":", "0.5", "f(", r"\boxed{", "<answer>",
    "</answer>", r"\overline", r"\lfloor", r"\rfloor", "A", "B", "'", "th", "^T", r"\setminus",
    ".", "\\",
]  # fmt: skip
STRINGS = st.one_of(
    st.text(max_size=80),
    st.text(alphabet=_CHARACTERS, max_size=40),
    st.lists(st.sampled_from(_PIECES), max_size=25).map("".join),
    st.lists(st.sampled_from(_PIECES), max_size=25).map(" ".join),
)


def verdict(case: dict) -> bool:
    boxed = f"so \\boxed{{{case.get('answer')}}}."
    completion = case.get("completion", boxed)
    extraction = case.get("extraction", "boxed")
    found = verify_math(
        completion,
        case["ground_truth"],
        extraction=extraction,
        decimal_comma=case.get("decimal_comma"),
        matrix_products=case.get("matrix_products"),
    )
    return found.score == 1.0


def test_labelled_set():
    wrong = [case for case in CASES if verdict(case) != case["expected"]]
    false_positives = [case for case in wrong if not case["expected"]]
    assert len(CASES) >= 800
    assert len(wrong) <= 0.01 * len(CASES), wrong
    negatives = sum(not case["expected"] for case in CASES)
    assert len(false_positives) <= 0.002 * negatives, false_positives


def test_wider_set():
    wrong = [case for case in WIDER if verdict(case) != case["expected"]]
    assert len(WIDER) >= 700
    assert [case for case in wrong if not case["expected"]] == []
    assert len(wrong) <= 0.01 * len(WIDER), wrong


@pytest.mark.parametrize("cases", [CASES, WIDER], ids=["labelled", "wider"])
def test_symmetric_and_reflexive(cases: list[dict]):
    pairs = [(case["answer"], case["ground_truth"]) for case in cases if "answer" in case]
    for more in (False, True):
        asymmetric = [
            (first, second)
            for first, second in pairs
            if same_answer_text(first, second, decimal_comma=more, matrix_products=more)[0]
            != same_answer_text(second, first, decimal_comma=more, matrix_products=more)[0]
        ]
        assert asymmetric == []
    texts = [text for pair in pairs for text in pair]
    assert [text for text in texts if not same_answer_text(text, text)[0]] == []


@pytest.mark.parametrize(
    ("answer", "truth", "rule", "reason", "normal_form"),
    [
        ("42", "42", "text", "correct", "42"),
        (r"\frac{6}{4}", "1.5", "number", "correct", "3/2"),
        (r"\frac{6}{4}", "1.6", "number", "wrong", "3/2"),
        ("b+a", "a+b", "expression", "correct", "(a + b)"),
        (r"\text{(C)}", "C", "choice", "correct", None),
        (r"\text{blue}", "red", "words", "wrong", "blue"),
        ("9 a.m.", r"9\text{ p.m.}", "time", "wrong", None),
        (r"2^{10^{20}}", "1", "expression", "too_large", None),
        (r"\frac{1", "1", "words", "unparsable", None),
        ("1" * 3000, "1", "extraction", "too_long", None),
    ],
)
def test_verdicts_say_how_they_came_about(
    answer: str, truth: str, rule: str, reason: str, normal_form: str | None
):
    found = verify_math(f"<answer>{answer}</answer>", truth, extraction="answer_tag")
    assert (found.rule, found.reason) == (rule, reason)
    assert found.score == float(reason == "correct")
    if normal_form:
        assert found.normal_form == normal_form


def test_unknown_extraction_is_refused():
    message = (
        r"extraction: 'box' is unknown\. Choose one of boxed, boxes, answer_tag, after_hashes, "
        "lenient"
    )
    with pytest.raises(ValueError, match=message):
        extract_answer("", "box")


def test_cancellation_and_size_do_not_make_answers_equal():
    for answer in (
        r"\tan(10^{500})",
        r"\sin(10^{300})",
        r"10^{400}\sqrt{2}",
        r"e^{-400}",
        r"10^{-100}\sqrt{2}",
    ):
        for truth in (
            "0",
            "1",
            r"\sqrt{2}",
            r"10^{400}\sqrt{3}",
            r"e^{-401}",
            r"10^{-100}\sqrt{3}",
            "x",
        ):
            assert not same_answer_text(answer, truth)[0], (answer, truth)
    assert same_answer_text(r"\sqrt{2}\sqrt{3}-\sqrt{6}", "0")[0]
    # Equal to 12 decimals.
    assert not same_answer_text(r"e^{\pi\sqrt{163}}", "262537412640768744")[0]
    assert same_answer_text(r"10^{40}+\sqrt2", r"\sqrt2+10^{40}")[0]
    assert not same_answer_text(r"10^{60}+\sqrt2", r"10^{60}+\sqrt3")[0]


def test_units_are_converted_by_dimension():
    metre_per_second, kilometre_per_hour = parse_unit("m / s"), parse_unit("km / h")
    assert metre_per_second is not None
    assert kilometre_per_hour is not None
    assert metre_per_second[0] == kilometre_per_hour[0] == (("length", 1), ("time", -1))
    assert metre_per_second[1] / kilometre_per_hour[1] == Fraction(18, 5)  # 1 m/s is 3.6 km/h
    assert parse_unit("ways") is None


@pytest.mark.parametrize("answer", ADVERSARIAL, ids=range(len(ADVERSARIAL)))
def test_adversarial_answers_end_in_time_and_are_wrong(answer: str):
    for truth in GROUND_TRUTHS:
        start = time.process_time()
        for completion, wanted in (
            (f"\\boxed{{{answer}}}", truth),
            (f"\\boxed{{{truth}}}", answer),
            (answer, truth),
        ):
            found = verify_math(completion, wanted, extraction="lenient")
            assert found.score == 0.0 or completion == answer
        assert time.process_time() - start < LIMIT_S, answer[:50]


@pytest.mark.parametrize(
    "filler",
    [
        r"\boxed{5",
        "<answer>",
        r"\boxed{5} ",
        r"\boxed{5}, ",
        r"$x = \boxed{5}$ apples and ",
        r"\boxed{5} (b) ",
        r"\boxed{",
        "the answer is ",
        "$",
        "\\(",
        " ",
        "\n",
        "a",
    ],
)
def test_extraction_is_linear(filler: str):
    completion = filler * (200_000 // len(filler))
    for extraction in ("boxed", "boxes", "answer_tag", "lenient"):
        start = time.process_time()
        extract_answer(completion, extraction)
        assert time.process_time() - start < LIMIT_S


def test_adversarial_answers_need_little_memory():
    """Verify the whole list in a process that may not use more than 1 GB."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "from tests.unit.test_math_verifier import ADVERSARIAL\n"
        "from rlsys.math_verifier import verify_math\n"
        "for answer in ADVERSARIAL: verify_math('\\\\boxed{%s}' % answer, 'x^2+1')\n"
        "print('done')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.strip() == "done", result.stderr[-500:]


def test_no_payload_creates_a_file(tmp_path: Path):
    target = tmp_path / "created"
    payloads = [
        f"__import__('pathlib').Path('{target}').touch()",
        f"open('{target}', 'w')",
        f"eval(\"open('{target}', 'w')\")",
        f"exec('import pathlib; pathlib.Path(\"{target}\").touch()')",
        f"(lambda: open('{target}', 'w'))()",
        f"[open('{target}', 'w') for _ in (1,)]",
        f"\\immediate\\openout\\file={target}",
        f"\\write18{{touch {target}}}",
        f"$(touch {target})",
        f"`touch {target}`",
        f"Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('{target}', 'w')",
        f"sympify(\"open('{target}', 'w')\")",
        f"\\text{{open('{target}', 'w')}}",
        f"x_{{open('{target}', 'w')}}",
    ]
    for payload in payloads:
        for truth in ("1", "x^2", payload + " "):
            for extraction in ("boxed", "boxes", "answer_tag", "lenient"):
                verify_math(f"\\boxed{{{payload}}}", truth, extraction=extraction)
                verify_math(f"<answer>{payload}</answer>", truth, extraction=extraction)
            verify_math("\\boxed{1}", payload)
    assert not target.exists()


def check_any_pair(examples: int) -> None:
    """Check that no pair of strings raises, and that equality is symmetric and reflexive."""

    @given(STRINGS, STRINGS)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def check(first: str, second: str) -> None:
        assert verify_math(first, second).score in (0.0, 1.0)
        assert verify_math(f"\\boxed{{{first}}}", second, extraction="lenient").score in (0.0, 1.0)
        for more in (False, True):
            forwards = same_answer_text(first, second, decimal_comma=more, matrix_products=more)[0]
            assert (
                forwards
                == same_answer_text(second, first, decimal_comma=more, matrix_products=more)[0]
            )
        assert same_answer_text(first, first)[0]

    check()


def test_any_pair_of_strings():
    check_any_pair(EXAMPLES)


def test_command_line_prints_verdict_and_rule(capsys: pytest.CaptureFixture[str]):
    assert main([r"so \boxed{0.5}", r"\frac{1}{2}"]) == 0
    printed = capsys.readouterr().out
    assert "score        1.0" in printed
    assert "rule         number" in printed
    assert main([r"so \boxed{0.4}", r"\frac{1}{2}"]) == 1
    assert main([r"\boxed{0,5}", "0.5"]) == 1
    assert main([r"\boxed{0,5}", "0.5", "--decimal-comma"]) == 0
    assert main(["The answer is 0,5.", "0.5", "--extraction", "lenient"]) == 0
    assert main(["The answer is 0,5.", "0.5", "--extraction", "lenient", "--no-decimal-comma"]) == 1
    product = r"\begin{pmatrix}1&2\end{pmatrix}\begin{pmatrix}3\\4\end{pmatrix}"
    value = r"\begin{pmatrix}11\end{pmatrix}"
    assert main([f"\\boxed{{{product}}}", value]) == 1
    assert main([f"\\boxed{{{product}}}", value, "--matrix-products"]) == 0


def test_command_line_scores_files_and_compares_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {"id": 1, "completion": r"\boxed{1}", "ground_truth": "1"},
        {"id": 2, "completion": "<answer>2</answer> \\boxed{3}", "ground_truth": "2"},
        {"id": 3, "completion": "none", "ground_truth": "[4,5]"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    boxed, tagged = tmp_path / "boxed.parquet", tmp_path / "tagged.parquet"
    assert main(["--file", str(file), "--out", str(boxed)]) == 0
    assert main(["--file", str(file), "--out", str(tagged), "--extraction", "answer_tag"]) == 0
    table = pyarrow.parquet.read_table(boxed)
    assert table["score"].to_pylist() == [1.0, 0.0, 0.0]
    assert table["id"].to_pylist() == [1, 2, 3]
    assert table["reason"].to_pylist() == ["correct", "wrong", "no_answer"]
    assert main(["--compare", str(boxed), str(tagged)]) == 1
    assert "3 rows, 2 disagreements: 1 now right, 1 now wrong" in capsys.readouterr().out
    assert main(["--compare", str(boxed), str(boxed)]) == 0


def test_command_line_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"completion": "a"}\n')
    assert main(["--file", str(file)]) == 2
    assert "row 1: no column 'ground_truth' among completion. Name it" in capsys.readouterr().err
    file.write_text("{\n")
    assert main(["--file", str(file)]) == 2
    assert "line 1: not valid JSON" in capsys.readouterr().err


MEASURED = [
    r"5\text{ cm}",
    r"5\text{ m}",
    r"\$5",
    r"5\text{ hours}",
    r"5\text{ cm}^2",
    r"5\%",
    r"5^\circ",
    r"5\pmod 7",
    r"5\pmod 8",
]
WRAPPERS = [
    "{}",
    "x={}",
    r"\approx {}",
    r"\{{{}\}}",
    "({},1)",
    "{},6",
    r"x\approx {}",
    r"\text{{The answer is }} {}",
]


def test_a_wrong_unit_stays_wrong_in_whatever_it_is_wrapped():
    wrapped = [[wrapper.format(value) for wrapper in WRAPPERS] for value in MEASURED]
    pairs = [
        (a, b)
        for i, first in enumerate(wrapped)
        for j, second in enumerate(wrapped)
        if i != j
        for a in first
        for b in second
    ]
    assert [pair for pair in pairs if same_answer_text(*pair)[0]] == []


def test_a_near_miss_stays_wrong_inside_equations_tuples_and_lists():
    values = (Number, Symbol, Sum, Product, Power, Call, Measured, Marked)
    pairs = [
        (case["answer"], case["ground_truth"])
        for case in CASES
        if "answer" in case and not case["expected"]
    ]
    pairs = [pair for pair in pairs if all(isinstance(parsed(text), values) for text in pair)]
    assert len(pairs) > 500
    for i, wrapper in enumerate(
        ("z={}", "z>{}", "({},1)", "{},9999", "\\begin{{pmatrix}}{}\\\\1\\end{{pmatrix}}")
    ):
        wrapped = [(wrapper.format(answer), wrapper.format(truth)) for answer, truth in pairs[i::5]]
        assert [pair for pair in wrapped if same_answer_text(*pair)[0]] == []


def parsed(text: str) -> object:
    try:
        return parse(text)
    except UnparsableError:
        return None
