"""The syntax tree of an answer.

Nodes are immutable values: equal trees are equal answers, and a tree never holds code or SymPy
objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational.

    `decimals` is the number of digits written after the point (None for an integer); `mixed` says
    that it is written as an integer and a fraction, `2 1/2`.
    """

    value: Fraction
    decimals: int | None = None
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, with an index as part of its name (`x_1`), or an object of geometry (`AB`)."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """pi, e, i or infinity."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    """terms[0] + terms[1] + ..."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """factors[0] * factors[1] * ..."""

    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Power:
    """base^exponent; a quotient is a product with the power -1."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Call:
    """A function that `evaluation` knows, or one that the answer leaves undefined (`f(4 - x)`)."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class PlusMinus:
    """Both signs of a term.

    `upper` is the sign where the other plus-minus signs of the item are read as plus.
    """

    term: Node
    upper: int


@dataclass(frozen=True, slots=True)
class Marked:
    """A value followed by a degree sign or a percent sign."""

    value: Node
    mark: str  # degree | percent


@dataclass(frozen=True, slots=True)
class Measured:
    """A value with a unit, in the spelling of `units.parse_unit`."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Approximate:
    """A value said to be rounded."""

    value: Node


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a stated base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """parts[0] : parts[1] : ..."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Items between brackets: a tuple or an interval.

    Only the other side of a comparison tells which.
    """

    opening: str  # ( [ < (for angle brackets)
    items: tuple[Node, ...]
    closing: str


@dataclass(frozen=True, slots=True)
class SetOf:
    """A finite set, written with its members."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class SetOperation:
    """Two sets and what is done with them."""

    operation: str  # union | intersection | difference
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Listing:
    """Items without brackets: several answers."""

    items: tuple[Node, ...]
    separator: str  # , | and | or


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix, or the determinant of one."""

    rows: tuple[tuple[Node, ...], ...]
    determinant: bool = False


@dataclass(frozen=True, slots=True)
class Relation:
    """`parts[0] operators[0] parts[1] ...`; operators are = != < <= > >= in ~."""

    parts: tuple[Node, ...]
    operators: tuple[str, ...]


Node = (
    Number | Symbol | Constant | Sum | Product | Power | Call | PlusMinus | Marked | Measured
    | Approximate | Numeral | Ratio | Group | SetOf | SetOperation | Listing | Matrix | Relation
)  # fmt: skip

ONE = Number(Fraction(1))
MINUS_ONE = Number(Fraction(-1))
EMPTY_SET = SetOf(())
REALS = Symbol("the reals")
INFINITY = Constant("infinity")


def negative(node: Node) -> Node:
    """Return -node, with a number's sign folded in."""
    if isinstance(node, Number):
        return Number(-node.value, node.decimals, node.mixed)
    return Product((MINUS_ONE, node))


def children(node: Node) -> tuple[Node, ...]:
    """Return the direct parts of a node."""
    match node:
        case (
            Sum(parts)
            | Product(parts)
            | Call(_, parts)
            | Ratio(parts)
            | Group(_, parts, _)
            | SetOf(parts)
            | Listing(parts, _)
        ):
            return parts
        case Relation(parts, _):
            return parts
        case Power(base, exponent):
            return (base, exponent)
        case PlusMinus(value, _) | Marked(value, _) | Measured(value, _) | Approximate(value):
            return (value,)
        case SetOperation(_, left, right):
            return (left, right)
        case Matrix(rows, _):
            return tuple(cell for row in rows for cell in row)
        case _:
            return ()


def symbols(node: Node) -> frozenset[str]:
    """Return the names of the variables in a node."""
    if isinstance(node, Symbol):
        return frozenset((node.name,))
    found: frozenset[str] = frozenset()
    for child in children(node):
        found |= symbols(child)
    return found
