"""Trials of the command-line campaign: flags, files, plug-ins, and their expected outcomes."""

from __future__ import annotations

import json
import math
import random
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from rlsys.config.command_line import all_fields
from rlsys.config.presets import PRESETS

Expectation = Literal["accepted", "refused", "either", "reported", "seen"]
RECIPES = ("grpo_math", "dapo_math", "hierarchical_math")
# A run of seconds on a CPU.
TINY = (
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--data.synthetic.train_size", "24", "--data.synthetic.eval_size", "4"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
    *("--trainer.prompts_per_step", "4", "--trainer.steps", "2"),
)
# Words with which a message names a remedy. A refusal needs at least one of them.
REMEDIES = (
    "Add|Ask|Check|Choose|Convert|Did you mean|Drop|Fix|Give|Install|It takes|Join|Keep|Known|"
    "Leave|Lower|Make|Name|Look|Pass|Pick|Put|Quote|Raise|Remove|Repair|Return|Sample|Save|"
    "See|Set|Start|Turn|Unset|Use|Widen|Write|choose|expects|give|must be|name the|should be|"
    "should have|should match|widen|allows|needs|is none of|is neither|is outside|of the form|"
    "is called with"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One command line and the outcome that is expected of it.

    | `expect` | means |
    |---|---|
    | accepted | exit code 0 |
    | refused | exit code 2, with `field` and `value` in the message |
    | either | one of these two |
    | reported | refused, or the output names `field`: an option without effect |
    | seen | a run that cannot end well: exit code 2, or not 0 with `value` on the console |
    """

    kind: str
    arguments: tuple[str, ...]
    expect: Expectation
    recipe: str = "grpo_math"
    field: str = ""
    value: str = ""
    python_path: str = ""
    runs: bool = False  # for real, in a process; else --dry-run
    problems: int | None = None  # how many training problems the plan must count

    def flags(self) -> list[str]:
        """Return all flags of the command line."""
        return [*TINY, *self.arguments, *([] if self.runs else ["--dry-run"])]


# --- every field, with values that it must not take ---


def _parts(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _bounds(metadata: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return the values just outside a field's bounds, and those at the bounds."""
    outside: list[float] = []
    inside: list[float] = []
    for bound in metadata:
        if isinstance(bound, annotated_types.Ge):
            outside.append(bound.ge - 1)  # pyright: ignore[reportOperatorIssue, reportArgumentType]
            inside.append(bound.ge)  # pyright: ignore[reportArgumentType]
        if isinstance(bound, annotated_types.Gt):
            outside.append(bound.gt)  # pyright: ignore[reportArgumentType]
            outside.append(bound.gt - 1)  # pyright: ignore[reportOperatorIssue, reportArgumentType]
        if isinstance(bound, annotated_types.Le):
            outside.append(bound.le + 1)  # pyright: ignore[reportOperatorIssue, reportArgumentType]
            inside.append(bound.le)  # pyright: ignore[reportArgumentType]
        if isinstance(bound, annotated_types.Lt):
            outside.append(bound.lt)  # pyright: ignore[reportArgumentType]
    return outside, inside


def _typed(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


# Fields for which an empty text, or null, has a meaning.
EMPTY_IS_FINE = {"cluster.address"}
NULL_IS_FINE = {"data.eval"}


def field_trials() -> Iterator[Trial]:
    """Yield each leaf field with values that it may not take.

    They lie outside its bounds, are not finite, empty, null, huge, or of another type.
    """
    for name, field in all_fields():
        for value, expect in _field_values(name, field):
            yield Trial(
                kind="field",
                arguments=(f"--{name}={value}",),
                expect=expect,
                field=name,
                value=value,
            )


def _field_values(name: str, field: FieldInfo) -> Iterator[tuple[str, Expectation]]:
    """Yield values of a field, each with its expected outcome."""
    parts = _parts(field.annotation)
    origins = {get_origin(part) for part in parts}

    outside, inside = _bounds(field.metadata)
    for value in outside:
        yield _typed(value), "refused"
    for value in inside:
        yield _typed(value), "either"

    optional = type(None) in parts or name in NULL_IS_FINE
    yield "null", "either" if optional else "refused"
    mapping = dict in origins or str in parts  # text is taken as it is typed
    yield "{a: 1}", "either" if mapping else "refused"
    yield from _values_of_type(name, parts)


# The first type of a field decides about the values of another type.
_REFUSED_BY_TYPE: dict[Any, tuple[str, ...]] = {
    float: (".nan", ".inf", "-.inf", "abc", "[1.0]", "''"),
    bool: ("maybe", "2", "[true]", "''"),
    int: ("1.5", ".nan", ".inf", "abc", "[1]", "''"),
    str: (),
    Literal: ("nonsense", "''", "0"),
    tuple: ("{a: 1}", "[[1]]", "[null]"),
    dict: ("5", "abc", "{no_such_keyword: 1}"),
}
_HUGE = {float: "1e300", int: "1" + "0" * 30}


def _values_of_type(name: str, parts: Sequence[Any]) -> Iterator[tuple[str, Expectation]]:
    """Yield values that the type of a field refuses, and huge ones that it may take."""
    types_and_origins = {*parts, *(get_origin(part) for part in parts)}
    known = [kind for kind in _REFUSED_BY_TYPE if kind in types_and_origins]
    if not known:
        return

    kind = known[0]
    for value in _REFUSED_BY_TYPE[kind]:
        yield value, "refused"
    if kind in _HUGE:
        yield _HUGE[kind], "either"
    if kind is str:
        empty: Expectation = "either" if name in EMPTY_IS_FINE else "refused"
        yield "", empty
        yield " ", empty
        yield "[a, b]", "either"


def edge_trials() -> Iterator[Trial]:
    """Yield values that types let through and that cannot work."""

    def refused(field: str, value: str, *more: str) -> Trial:
        return Trial(
            kind="edge",
            arguments=(f"--{field}={value}", *more),
            expect="refused",
            field=field,
            value=value,
        )

    yield refused("trainer.evaluation.pass_at", "0")
    yield refused("trainer.evaluation.pass_at", "-1")
    yield refused("policy.optimizer.betas", "0.9,1.5")
    yield refused("policy.optimizer.betas", "-0.1,0.9")
    yield refused("policy.optimizer.betas", "0.9,1.0")
    yield refused("algorithm.rollout_correction.cap", ".inf")
    yield refused("data.synthetic.levels", "9")
    yield refused("data.synthetic.levels", "0")
    yield refused("model.attention", "flash_attention_2")
    yield refused("run.directory", "/proc/no/such")
    yield refused("run.directory", "/dev/null/run")
    yield refused("generation.stop", "['']")
    yield refused("plugins", "['']")
    for name, weight in (("math", ".nan"), ("math", ".inf"), ("format_boxed", "1e39")):
        yield Trial(
            kind="edge",
            arguments=(f"--reward.functions=[{{name: {name}, weight: {weight}}}]",),
            expect="refused",
            field="reward.functions",
            value=weight.strip("."),
        )
    for name, parameters in (
        ("soft_overlong", {"max_tokens": 8, "buffer_tokens": 0}),
        ("soft_overlong", {"max_tokens": 8, "buffer_tokens": 9}),
        ("soft_overlong", {"max_tokens": 4000, "buffer_tokens": 4}),
        ("repetition", {"ngram": 0}),
        ("repetition", {"scale": math.nan}),
        ("repetition", {"scale": math.inf}),
        ("math", {"extraction": "none"}),
    ):
        functions = yaml.safe_dump(
            [
                {"name": "math" if name != "math" else "format_boxed"},
                {"name": name, "parameters": parameters},
            ],
            default_flow_style=True,
            width=1000,
        ).strip()
        yield Trial(
            kind="edge",
            arguments=(f"--reward.functions={functions}",),
            expect="refused",
            field="reward.functions",
            value=str(list(parameters.values())[-1]),
        )
    yield Trial(
        kind="edge", arguments=("--reward.functions", "math,format_boxed"), expect="accepted"
    )
    yield Trial(
        kind="edge",
        recipe="dapo_math",
        arguments=("--generation.max_tokens", "256"),
        expect="accepted",
    )
    for recipe in RECIPES:
        yield Trial(kind="edge", recipe=recipe, arguments=(), expect="accepted")
    for preset in PRESETS:
        yield Trial(kind="edge", arguments=("--preset", preset), expect="accepted")


def parameter_trials() -> Iterator[Trial]:
    """Yield each keyword parameter of each estimator and weight with values of no formula."""
    import torch  # noqa: F401  (the registries need it; the fields above do not)

    from rlsys.algorithms.advantages import (
        available_advantage_estimators,
        get_advantage_estimator,
    )
    from rlsys.algorithms.policy_objectives import available_weights
    from rlsys.algorithms.policy_objectives.weights import WEIGHTS
    from rlsys.registry import keyword_parameters

    kinds = (
        *(
            ("advantage.name", "advantage.parameters", name, get_advantage_estimator(name))
            for name in available_advantage_estimators()
            if not name.startswith("example")
        ),
        *(
            ("objective.weight", "objective.parameters", name, WEIGHTS.get(name))
            for name in available_weights()
        ),
    )
    for field, where, name, function in kinds:
        for parameter, description in keyword_parameters(function).items():
            values = ["[1]", "{a: 1}", "no_such_choice"]
            if "float" in str(description.annotation):
                values += [".nan", ".inf", "-.inf"]
            for value in values:
                kl = ("--algorithm.kl.coefficient=0.1", "--algorithm.kl.placement=advantage")
                yield Trial(
                    kind="parameter",
                    arguments=(
                        *(f"--algorithm.{field}", name),
                        *(kl if name == "token_kl_grpo" else ()),
                        f"--algorithm.{where}.{parameter}={value}",
                    ),
                    expect="refused",
                    field=f"algorithm.{where}.{parameter}",
                    value=value.strip(".-"),
                )


def silent_trials() -> Iterator[Trial]:
    """Yield options that have no effect beside the other ones: refused, or reported."""
    settings: tuple[tuple[str, tuple[str, ...]], ...] = (
        (
            "algorithm.objective.ratio",
            ("--algorithm.objective.weight=none", "--algorithm.objective.ratio=sequence"),
        ),
        (
            "algorithm.kl.kind",
            (
                *("--algorithm.advantage.name=token_kl_grpo", "--algorithm.kl.coefficient=0.1"),
                *("--algorithm.kl.placement=advantage", "--algorithm.kl.kind=k2"),
            ),
        ),
        ("algorithm.kl.kind", ("--algorithm.kl.kind=k2",)),
        ("algorithm.kl.direction", ("--algorithm.kl.direction=forward",)),
        ("generation.kv_cache_gib", ("--generation.kv_cache_gib=3",)),
        ("generation.compile", ("--generation.compile=true",)),
        ("generation.tensor_parallel", ("--generation.tensor_parallel=2",)),
        ("policy.optimizer.minimum_ratio", ("--policy.optimizer.minimum_ratio=0.1",)),
        ("policy.optimizer.warmup_steps", ("--policy.optimizer.warmup_steps=1000",)),
        ("trainer.evaluation.temperature", ("--trainer.evaluation.temperature=0.7",)),
        ("algorithm.rollout_correction.cap", ("--algorithm.rollout_correction.cap=3",)),
        ("algorithm.entropy.learning_rate", ("--algorithm.entropy.learning_rate=0.2",)),
        ("algorithm.advantage.auxiliary.width", ("--algorithm.advantage.auxiliary.width=16",)),
        (
            "algorithm.objective.weight",
            ("--algorithm.objective.weight=none", "--policy.epochs=2"),
        ),
    )
    for field, arguments in settings:
        yield Trial(kind="silent", arguments=arguments, expect="reported", field=field)


# --- data files ---


def _flow_yaml(value: Any) -> str:
    """Return a value on one line, as it is typed behind a flag."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.strip().removesuffix("...").strip()


def _row(number: int) -> dict[str, Any]:
    return {"problem": f"What is {number} + 1?", "answer": str(number + 1), "level": 1}


def data_trials(folder: Path, draw: random.Random) -> Iterator[Trial]:
    """Yield files as people have them. The bad row of a bad file is drawn at random."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    count = draw.randint(3, 20)
    rows = [_row(i) for i in range(count)]
    bad = draw.randrange(1, count)

    def changed(**fields: Any) -> list[dict[str, Any]]:
        return [row | (fields if i == bad else {}) for i, row in enumerate(rows)]

    def write(name: str, content: str | bytes) -> Path:
        file = folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def jsonl(name: str, content: list[Any]) -> Path:
        lines = [json.dumps(row, ensure_ascii=False) for row in content]
        return write(f"{name}.jsonl", "\n".join(lines) + "\n")

    def parquet(name: str, content: list[Any]) -> Path:
        pyarrow.parquet.write_table(pa.Table.from_pylist(content), folder / f"{name}.parquet")
        return folder / f"{name}.parquet"

    def trial(
        file: Path, expect: Expectation, *more: str, problems: int | None = None, value: str = ""
    ) -> Trial:
        return Trial(
            kind="data",
            arguments=("--data.train", str(file), *more),
            expect=expect,
            field="data.",
            value=value,
            problems=problems,
        )

    off = ("--data.eval", str(jsonl("held_out", [_row(100 + i) for i in range(4)])))
    good = "".join(json.dumps(row) + "\n" for row in rows)
    csv = "problem,answer,level\n" + "".join(f'"{r["problem"]}",{r["answer"]},1\n' for r in rows)
    yield trial(jsonl("good", rows), "accepted", *off, problems=count)
    yield trial(parquet("good", rows), "accepted", *off, problems=count)
    yield trial(write("good.csv", csv), "accepted", *off, problems=count)
    yield trial(write("good.json", json.dumps(rows)), "accepted", *off, problems=count)
    yield trial(
        write("bom.jsonl", b"\xef\xbb\xbf" + good.encode()), "accepted", *off, problems=count
    )
    yield trial(write("bom.csv", b"\xef\xbb\xbf" + csv.encode()), "accepted", *off, problems=count)
    yield trial(write("crlf.jsonl", good.replace("\n", "\r\n")), "accepted", *off, problems=count)
    separated = changed(problem="one line\u2028and\u2029another\x85one?")
    yield trial(jsonl("separators", separated), "accepted", *off, problems=count)
    chat = [row | {"problem": [{"role": "user", "content": row["problem"]}]} for row in rows]
    template = ("--data.template", "chat", "--data.max_prompt_tokens", "512")
    yield trial(jsonl("chat", chat), "accepted", *off, *template, problems=count)
    yield trial(parquet("chat", chat), "accepted", *off, *template, problems=count)
    yield trial(
        jsonl("chat", chat), "refused", *off, "--data.template", "few_shot", value="few_shot"
    )
    levels = [row | {"level": 3.0} for row in rows]
    third = ("--data.eval", str(jsonl("third", [_row(100 + i) | {"level": 3.0} for i in range(4)])))
    yield trial(jsonl("levels", levels), "accepted", *third, "--data.where.level=3", problems=count)
    gsm = [row | {"answer": f"1 + 1 = 2, so\n#### {row['answer']}"} for row in rows]
    yield trial(jsonl("gsm8k", gsm), "accepted", *off, problems=count)
    yield trial(jsonl("extra", changed(extra={"a": [1]})), "accepted", *off, problems=count)
    yield trial(jsonl("numbers", [row | {"answer": 4} for row in rows]), "accepted", *off)

    line = str(bad + 1)
    without = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    yield trial(jsonl("missing_column", without), "refused", *off, value="answer")
    hole = [without[i] if i == bad else row for i, row in enumerate(rows)]
    yield trial(jsonl("missing_key", hole), "refused", *off, value=line)
    yield trial(
        jsonl("list_answers", [r | {"answer": [r["answer"]]} for r in rows]), "refused", *off
    )
    yield trial(
        parquet("list_answers", [r | {"answer": [r["answer"]]} for r in rows]), "refused", *off
    )
    yield trial(jsonl("one_list", changed(answer=["4"])), "refused", *off, value=line)
    yield trial(jsonl("dict_problem", changed(problem={"text": "?"})), "refused", *off, value=line)
    at_line, at_row = f"line {line}", f"row {bad}"
    yield trial(jsonl("null_answer", changed(answer=None)), "reported", *off, value=at_line)
    yield trial(parquet("null_answer", changed(answer=None)), "reported", *off, value=at_row)
    yield trial(jsonl("null_problem", changed(problem=None)), "reported", *off, value=at_line)
    yield trial(jsonl("empty_problem", changed(problem="")), "reported", *off, value=at_line)
    yield trial(jsonl("empty_answer", changed(answer=" ")), "reported", *off, value=at_line)
    yield trial(jsonl("no_object", [*rows[:bad], 7, *rows[bad:]]), "refused", *off, value=line)
    broken = good.splitlines()
    broken[bad] = broken[bad][:-3]
    yield trial(write("broken.jsonl", "\n".join(broken)), "refused", *off, value=line)
    yield trial(write("empty.jsonl", ""), "refused", *off, value="empty")
    yield trial(write("blank.jsonl", "\n\n"), "refused", *off)
    yield trial(write("empty.csv", ""), "refused", *off)
    yield trial(write("headers.csv", "problem,answer\n"), "refused", *off)
    yield trial(write("empty.json", ""), "refused", *off)
    yield trial(write("empty.parquet", b""), "refused", *off)
    yield trial(parquet("no_rows", rows).parent / "absent.parquet", "refused", *off)
    yield trial(
        write("latin.jsonl", good.replace("What", "Was für").encode("latin-1")), "refused", *off
    )
    yield trial(write("no_parquet.parquet", good), "refused", *off)
    yield trial(write("data.txt", good), "refused", *off)
    yield trial(folder, "refused", *off)
    same = jsonl("same", rows)
    yield Trial(
        kind="data",
        arguments=("--data.train", str(same), "--data.eval", str(same)),
        expect="reported",
        field="data.eval",
    )


# --- plug-ins and reward functions ---

_REWARD = """
import asyncio, os, time
from rlsys.rewards import register_reward_function

{definition}
"""
_REGISTERED = "@register_reward_function('trial')\n"
_TWO_ARGUMENTS = _REGISTERED + "def trial(completion, ground_truth):\n"
# name -> (source, expected outcome, text on the console)
REWARD_FUNCTIONS: dict[str, tuple[str, Expectation, str]] = {
    "raises": (
        _TWO_ARGUMENTS + "    raise KeyError('a plain mistake')",
        "seen",
        "a plain mistake",
    ),
    "returns_nan": (_TWO_ARGUMENTS + "    return float('nan')", "seen", "nan"),
    "returns_none": (_TWO_ARGUMENTS + "    return None", "seen", "None"),
    "returns_list": (_TWO_ARGUMENTS + "    return [1.0]", "seen", "list"),
    "returns_huge": (_TWO_ARGUMENTS + "    return 1e39", "seen", "1e+39"),
    "is_async": (
        _REGISTERED + "async def trial(completion, ground_truth):\n    return 1.0",
        "refused",
        "trial",
    ),
    "wants_more": (
        _REGISTERED + "def trial(completion, ground_truth, context):\n    return 1.0",
        "refused",
        "trial",
    ),
    "wants_less": (_REGISTERED + "def trial(completion):\n    return 1.0", "refused", "trial"),
    "is_slow": (_TWO_ARGUMENTS + "    time.sleep(60)", "seen", "timeout"),
    "exits": (_TWO_ARGUMENTS + "    os._exit(3)", "seen", "trial"),
    "fine": (
        _TWO_ARGUMENTS + "    print('scored')\n    return len(completion) % 3 / 2",
        "accepted",
        "",
    ),
    "callable_object": (
        "class Scorer:\n    def __call__(self, completion, ground_truth):\n"
        "        return len(completion) % 2\n"
        "register_reward_function('trial')(Scorer())",
        "either",
        "trial",
    ),
}
REFUSED_AT_START = ("is_async", "wants_more", "wants_less", "callable_object")

_ESTIMATOR = """
import torch
from rlsys.algorithms.advantages import AdvantageOutput, register_advantage_estimator

@register_advantage_estimator('trial')
def trial({arguments}):
    {body}

"""


def _estimator(body: str, arguments: str = "inputs") -> str:
    return _ESTIMATOR.format(arguments=arguments, body=body)


# name -> (source, expected outcome of a dry run, text of the message)
PLUGINS: dict[str, tuple[str, Expectation, str]] = {
    "syntax": ("def broken(:\n", "refused", "{module}"),
    "raises_at_import": ("raise RuntimeError('at import')\n", "refused", "at import"),
    "exits_at_import": ("import sys\nsys.exit(0)\n", "refused", "{module}"),
    "missing_import": ("import no_such_package\n", "refused", "no_such_package"),
    "takes_a_name": (
        "from rlsys.rewards import register_reward_function\n"
        "@register_reward_function('math')\n"
        "def mine(completion, ground_truth):\n    return 1.0\n",
        "refused",
        "math",
    ),
    "wrong_type": (_estimator("return inputs.rewards"), "refused", "trial"),
    "wrong_shape": (
        _estimator("return AdvantageOutput(advantages=inputs.rewards)"),
        "refused",
        "trial",
    ),
    "estimator_raises": (_estimator("raise KeyError('a plain mistake')"), "refused", "trial"),
    "no_arguments": (_estimator("return None", arguments=""), "refused", "trial"),
    "not_finite": (
        _estimator(
            "return AdvantageOutput(advantages=torch.full(inputs.response_mask.shape, torch.nan))"
        ),
        "refused",
        "trial",
    ),
    "fine": (
        _estimator(
            "return AdvantageOutput("
            "advantages=inputs.response_mask * inputs.rewards[:, None] * scale)",
            arguments="inputs, *, scale: float = 1.0",
        ),
        "accepted",
        "",
    ),
}


def plugin_trials(folder: Path) -> Iterator[Trial]:
    """Yield plug-in modules as people get them wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, expect, message) in PLUGINS.items():
        module = f"trial_plugin_{name}"
        (folder / f"{module}.py").write_text(source)
        uses = ("--algorithm.advantage.name", "trial") if "'trial'" in source else ()
        yield Trial(
            kind="plug-in",
            arguments=("--plugins", module, *uses),
            expect=expect,
            field="algorithm.advantage.name" if uses else "plugins",
            value=message.format(module=module),
            python_path=str(folder),
        )


def reward_trials(folder: Path) -> Iterator[Trial]:
    """Yield reward functions that fail on every answer.

    Those that can be refused at the start are dry runs, the other ones run for real.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (definition, expect, message) in REWARD_FUNCTIONS.items():
        module = f"trial_reward_{name}"
        (folder / f"{module}.py").write_text(_REWARD.format(definition=definition))
        yield Trial(
            kind="reward function",
            arguments=(
                *("--plugins", module, "--reward.functions", "[{name: trial}]"),
                *("--reward.timeout_s", "0.5", "--trainer.evaluation.every", "0"),
            ),
            expect=expect,
            field="reward.functions",
            value=message,
            python_path=str(folder),
            runs=name not in REFUSED_AT_START,
        )


# --- random configurations ---


def random_trial(draw: random.Random, *, runs: bool = False) -> Trial:
    """Return a configuration that a user might write, of options that each make sense.

    It is refused by the name of a field, or it works.
    """
    flags: dict[str, Any] = {}

    def maybe(probability: float, name: str, *choices: Any) -> None:
        if draw.random() < probability:
            flags[name] = draw.choice(choices)

    estimators = (
        *("grpo", "rloo", "reinforce", "opo", "remax", "gae", "grpo_process", "reinforce_baseline"),
        *("optimal_baseline", "optimal_token_baseline", "reinforce_plus_plus", "hierarchical"),
        *("grpo_passk", "maxrl", "bnpo", "rae", "gdpo"),
    )
    weights = (
        "none",
        "importance",
        "ppo_clip",
        "dual_clip",
        "upper_clip",
        "power",
        "sapo",
        "cispo",
        *("gmpo", "dppo_tv", "dppo_kl", "vespo", "dro", "clip_cov", "kl_cov"),
    )
    maybe(0.6, "algorithm.advantage.name", *estimators, "token_kl_grpo")
    maybe(0.15, "algorithm.advantage.recompute", True)
    maybe(0.4, "algorithm.objective.ratio", "token", "sequence", "future", "prefix", "product")
    maybe(0.5, "algorithm.objective.weight", *weights, "adaptive_power")
    if "algorithm.objective.weight" in flags:
        flags["algorithm.objective.parameters"] = {}  # the recipe's are another weight's
    if "algorithm.advantage.name" in flags:
        flags["algorithm.advantage.parameters"] = {}
    aggregations = ("token_mean", "sequence_mean", "sequence_sum", "constant")
    maybe(0.5, "algorithm.aggregation", *aggregations)
    maybe(0.4, "algorithm.kl.coefficient", 0.01, 0.3)
    if flags.get("algorithm.kl.coefficient"):
        maybe(0.7, "algorithm.kl.kind", "k1", "k2", "k3", "k3_k2")
        maybe(0.6, "algorithm.kl.placement", "loss", "reward", "advantage")
        maybe(0.2, "algorithm.kl.direction", "forward")
        maybe(0.2, "algorithm.kl.target", 0.05)
    maybe(0.2, "algorithm.entropy.bonus", 0.01)
    maybe(0.2, "algorithm.entropy.temperature", 0.01)
    if flags.get("algorithm.entropy.temperature"):
        maybe(0.4, "algorithm.entropy.target", 0.5)
    maybe(0.3, "algorithm.rollout_correction.level", "token", "sequence", "geometric")
    maybe(0.2, "algorithm.rollout_correction.max_sequence_kl", 0.01, 0.5)
    maybe(0.2, "algorithm.rollout_correction.off_policy_mask", 0.05, 0.5)
    maybe(0.2, "algorithm.overlong.mask_truncated", True)
    maybe(0.2, "algorithm.dynamic_sampling.max_rounds", 2, 3)
    maybe(0.3, "policy.epochs", 2)
    maybe(0.3, "policy.num_mini_batches", 1, 2, 4)
    maybe(0.3, "policy.microbatch_tokens", 1, 64, 256)
    maybe(0.3, "policy.shared_prefix_packing", False, True)
    maybe(0.2, "policy.logit_chunk_tokens", 1, 7)
    maybe(0.2, "policy.gradient_checkpointing", True)
    maybe(0.2, "policy.compute_dtype", "bfloat16")
    maybe(0.2, "policy.optimizer.schedule", "linear", "cosine")
    maybe(0.2, "policy.optimizer.warmup_steps", 1)
    maybe(0.2, "policy.optimizer.max_grad_norm", 0.0, 0.5)
    maybe(0.2, "policy.optimizer.weight_decay", 0.1)
    maybe(0.2, "model.attention", "sdpa", "eager")
    maybe(0.3, "generation.temperature", 0.7, 1.3)
    maybe(0.2, "generation.top_p", 0.9)
    maybe(0.2, "generation.top_k", 5)
    maybe(0.3, "generation.min_tokens", 0, 1, 8)
    maybe(0.3, "generation.samples_per_prompt", 1, 2, 3)
    maybe(0.2, "generation.stop", ["\n"], ["5", "7"])
    maybe(0.2, "data.template", "r1_zero", "few_shot")
    maybe(0.2, "data.shuffle", False)
    maybe(0.2, "data.synthetic.levels", [1, 2])
    maybe(0.3, "trainer.prompts_per_step", 1, 2, 6)
    maybe(0.3, "trainer.seed", 7, 2**31)
    maybe(0.3, "trainer.evaluation.every", 0, 1)
    maybe(0.2, "trainer.evaluation.samples_per_prompt", 2, 4)
    maybe(0.2, "trainer.evaluation.pass_at", [1], [1, 2])
    maybe(0.2, "trainer.checkpoints.every", 0, 1)
    maybe(0.1, "trainer.save_rollouts_every", 0)
    maybe(0.1, "diagnostics.gradient", True)
    functions = (
        [{"name": "math"}],
        [{"name": "format_boxed"}, {"name": "math", "weight": 0.5}],
        [{"name": "math"}, {"name": "repetition", "weight": 0.1, "parameters": {"ngram": 2}}],
    )
    maybe(0.3, "reward.functions", *functions)
    arguments = tuple(f"--{name}={_flow_yaml(value)}" for name, value in flags.items())
    return Trial(
        kind="run" if runs else "random",
        recipe=draw.choice(RECIPES),
        arguments=arguments,
        expect="either",
        runs=runs,
    )
