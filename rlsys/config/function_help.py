"""The keyword parameters of registered functions, read from their source: for --help.

An estimator, weight or reward needs torch, which takes seconds to import. Its signature and
docstring are text, so nothing is imported here: neither the library's modules nor those of a
plug-in.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import yaml

LIBRARY = Path(__file__).parents[1]
ENTRY_POINT_GROUP = "rlsys.plugins"


@dataclass(frozen=True, kw_only=True)
class KeywordHelp:
    """A keyword parameter of a function."""

    name: str
    type: str  # in the words of --help
    default: str  # as YAML; empty: it must be given
    meaning: str  # a sentence of the docstring; empty: the docstring has none


@dataclass(frozen=True, kw_only=True)
class FunctionHelp:
    """A registered function."""

    summary: str  # the first line of its docstring
    keywords: tuple[KeywordHelp, ...]


def function_help(decorator: str, name: str, plugins: Sequence[str] = ()) -> FunctionHelp | None:
    """Return the help of the function that `@decorator(name)` registers, read from its source.

    None where neither the library nor the modules of the plug-ins have such a decorator.
    """
    for file in _sources(plugins):
        text = file.read_text(encoding="utf-8", errors="replace")
        if decorator not in text or name not in text:  # parsing takes most of the time
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # a plug-in that cannot be loaded is refused elsewhere
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and _is_registered(node, decorator, name):
                return _described(node)
    return None


def _sources(plugins: Sequence[str]) -> Iterator[Path]:
    for folder in ("algorithms", "rewards"):
        yield from sorted((LIBRARY / folder).rglob("*.py"))

    published = [entry_point.module for entry_point in entry_points(group=ENTRY_POINT_GROUP)]
    for module in (*plugins, *published):
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            continue
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin)
        if file.name == "__init__.py":  # a package
            yield from sorted(file.parent.rglob("*.py"))
        else:
            yield file


def _is_registered(node: ast.FunctionDef, decorator: str, name: str) -> bool:
    return any(
        isinstance(call, ast.Call)
        and ast.unparse(call.func).split(".")[-1] == decorator
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == name
        for call in node.decorator_list
    )


def _described(node: ast.FunctionDef) -> FunctionHelp:
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return FunctionHelp(
        summary=docstring.split("\n\n")[0].replace("\n", " "),
        keywords=tuple(
            KeywordHelp(
                name=argument.arg,
                type=_type(argument.annotation),
                default=_default(default),
                meaning=_meaning(docstring, argument.arg),
            )
            for argument, default in keywords
        ),
    )


def _type(node: ast.expr | None) -> str:
    """Return an annotation in words: text, a|b, float or null."""
    match node:
        case None:
            return ""
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{_type(left)} or {_type(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=choices)):
            return "|".join(ast.unparse(choice).strip("'\"") for choice in choices)
        case _:
            words = {"str": "text", "bool": "true|false", "None": "null"}
            text = ast.unparse(node)
            return words.get(text, text)


def _default(node: ast.expr | None) -> str:
    if node is None:
        return ""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)  # a name or an expression
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _meaning(docstring: str, name: str) -> str:
    """Return the entry `name: ...` of the docstring, else the sentence that opens with `name`."""
    body = re.split(r"^Raises:", docstring, flags=re.MULTILINE)[0]

    entry = re.search(rf"^ *`?{name}`?: +(\S.*(?:\n +\S.*)*)", body, re.MULTILINE)
    if entry:
        # The next entry may be indented like the continuation of this one.
        text = re.split(r"\n *`?\w+`?: ", entry[1])[0]
        return _first_sentence(text)

    sentences = re.split(r"(?<=[.:;])\s+", " ".join(body.split()))
    about_it = [sentence for sentence in sentences if sentence.startswith(f"`{name}`")]
    return about_it[0].rstrip(";:") if about_it else ""


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", words)[0]
