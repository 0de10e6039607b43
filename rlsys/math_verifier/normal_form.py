"""A short canonical spelling of an answer, for people who read verdicts.

Equality is decided by `comparison`, not by this text.
"""

from __future__ import annotations

from fractions import Fraction

from rlsys.math_verifier import words
from rlsys.math_verifier.evaluation import exact
from rlsys.math_verifier.limits import TooLargeError, UndefinedError, UnparsableError
from rlsys.math_verifier.nodes import (
    Approximate,
    Call,
    Constant,
    Group,
    Listing,
    Marked,
    Matrix,
    Measured,
    Node,
    Number,
    Numeral,
    PlusMinus,
    Power,
    Product,
    Ratio,
    Relation,
    SetOf,
    SetOperation,
    Sum,
    Symbol,
)  # fmt: skip
from rlsys.math_verifier.parser import parse
from rlsys.math_verifier.plain_numbers import plain_number

MAX_CHARACTERS = 500


def normal_form(answer: str) -> str:
    """Spell an answer: reduced numbers, sorted commuting parts, brackets, words in lower case."""
    number = plain_number(answer)
    if number is not None:
        return str(number)[:MAX_CHARACTERS]

    try:
        return spelled(parse(words.meaning(answer)))[:MAX_CHARACTERS]
    except (UnparsableError, UndefinedError, TooLargeError, RecursionError, ValueError):
        return words.phrase(answer[:MAX_CHARACTERS])


def spelled(node: Node) -> str:
    """Return the spelling of one node."""
    try:
        value = exact(node)
    except (TooLargeError, UndefinedError):
        value = None
    if value is not None and abs(value) < Fraction(10) ** 60:
        return str(value)

    spelling = _spelled_expression(node)
    if spelling is None:
        spelling = _spelled_collection(node)
    return spelling


def _spelled_expression(node: Node) -> str | None:
    """Spell a value or an expression; None for a node of another kind."""
    match node:
        case Number(value, _):
            return f"{float(value):.6e}" if abs(value) < Fraction(10) ** 300 else "a large number"
        case Symbol(name) | Constant(name):
            return name
        case Sum(terms):
            return "(" + " + ".join(sorted(map(spelled, terms))) + ")"
        case Product(factors):
            return "*".join(sorted(map(spelled, factors)))
        case Power(base, exponent):
            return f"{spelled(base)}^{spelled(exponent)}"
        case Call(name, arguments):
            return f"{name}({', '.join(map(spelled, arguments))})"
        case PlusMinus(term, _):
            return f"±{spelled(term)}"
        case Marked(inner, mark):
            return spelled(inner) + {"degree": "°", "percent": "%"}[mark]
        case Measured(inner, unit):
            return f"{spelled(inner)} [{unit}]"
        case Numeral(digits, base):
            return f"{digits}_{base}"
        case _:
            return None


def _spelled_collection(node: Node) -> str:
    """Spell a node that holds several values, or says something about them."""
    match node:
        case Approximate(inner):
            return f"≈{spelled(inner)}"
        case Ratio(parts):
            return ":".join(map(spelled, parts))
        case Group(opening, parts, closing):
            return opening + ", ".join(map(spelled, parts)) + closing
        case SetOf(parts):
            return "{" + ", ".join(sorted(map(spelled, parts))) + "}"
        case SetOperation(operation, left, right):
            return f"({spelled(left)} {operation} {spelled(right)})"
        case Listing(parts, _):
            return ", ".join(sorted(map(spelled, parts)))
        case Matrix(rows, _):
            return "[" + "; ".join(", ".join(map(spelled, row)) for row in rows) + "]"
        case Relation(parts, operators):
            return _spelled_relation(parts, operators)
        case _:
            raise UnparsableError("not an answer")


def _spelled_relation(parts: tuple[Node, ...], operators: tuple[str, ...]) -> str:
    text = spelled(parts[0])
    for operator, part in zip(operators, parts[1:], strict=True):
        text += f" {operator} {spelled(part)}"
    return text
