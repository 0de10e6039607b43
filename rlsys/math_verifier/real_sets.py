"""Subsets of the real line: the meaning of intervals, unions, inequalities and conditions.

A set is a rule for membership with a list of the points where membership may change. Two sets are
equal when they agree at all those points of both, and between them.
"""

from __future__ import annotations

import operator as operators
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cmp_to_key
from typing import Any

from rlsys.math_verifier.evaluation import Evaluator, exact, points, real_value, same_value
from rlsys.math_verifier.limits import MAX_LIST_ITEMS, UndefinedError, UnparsableError
from rlsys.math_verifier.nodes import (
    INFINITY,
    MINUS_ONE,
    REALS,
    Call,
    Group,
    Listing,
    Node,
    Number,
    Power,
    Product,
    Relation,
    SetOf,
    SetOperation,
    Sum,
    Symbol,
    children,
    negative,
    symbols,
)  # fmt: skip

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "<": operators.lt,
    "<=": operators.le,
    ">": operators.gt,
    ">=": operators.ge,
    "=": operators.eq,
    "!=": operators.ne,
}


@dataclass(frozen=True)
class RealSet:
    """A set of real numbers.

    `contains` takes the order of a point against an endpoint: order(endpoint) is -1, 0 or 1 where
    the point is below, at or above it.
    """

    endpoints: tuple[Node, ...]
    contains: Callable[[Callable[[Node], int]], bool]
    variable: str | None = None  # that an inequality speaks of


def is_infinite(node: Node) -> int:
    """Return 1 or -1 for plus or minus infinity, else 0."""
    if node == INFINITY:
        return 1
    return -1 if node == negative(INFINITY) else 0


def real_set(node: Node) -> RealSet:
    """Return the set of real numbers that a node means.

    Raises:
        UnparsableError: it does not mean one.
        UndefinedError: an endpoint has no value.
    """
    match node:
        case Symbol() if node == REALS:
            return RealSet((), lambda order: True)
        case SetOf(items):
            return _points(items)
        case Group("(" | "[" as opening, (low, high), ")" | "]" as closing):
            return _interval(low, high, opening == "[", closing == "]")
        case SetOperation(operation, left, right):
            found = _combined(operation, real_set(left), real_set(right))
            return RealSet(found.endpoints, found.contains)  # the variable of {x | x > 2} is bound
        case Relation((_, inner), ("in",)):
            found = real_set(inner)
            return RealSet(found.endpoints, found.contains, _variable_name(node.parts[0]))
        case Relation():
            return _relation(node)
        case Listing(items, separator):
            return _listing(items, separator)
        case _:
            raise UnparsableError("not a set of real numbers")


def same_set(left: RealSet, right: RealSet) -> bool:
    """Return whether two sets have the same members."""
    if left.variable and right.variable and left.variable != right.variable:
        return False
    endpoints = _sorted_distinct([*left.endpoints, *right.endpoints])

    def member(chosen: RealSet, position: int) -> bool:
        # Odd positions are endpoints, even ones the open intervals around them.
        def compare(endpoint: Node) -> int:
            place = 2 * next(i for i, group in enumerate(endpoints) if endpoint in group) + 1
            return (position > place) - (position < place)

        return chosen.contains(compare)

    positions = range(2 * len(endpoints) + 1)
    return all(member(left, position) == member(right, position) for position in positions)


def _sorted_distinct(endpoints: list[Node]) -> list[list[Node]]:
    valued = [(real_value(endpoint), endpoint) for endpoint in dict.fromkeys(endpoints)]
    if any(value.imag != 0 for value, _ in valued):
        raise UndefinedError

    def by_value(a: tuple[Any, Node], b: tuple[Any, Node]) -> int:
        return (a[0] > b[0]) - (a[0] < b[0])

    groups: list[list[Node]] = []
    for _, endpoint in sorted(valued, key=cmp_to_key(by_value)):
        if groups and same_value(groups[-1][0], endpoint):
            groups[-1].append(endpoint)
        else:
            groups.append([endpoint])
    return groups


def _points(items: tuple[Node, ...]) -> RealSet:
    for item in items:
        if symbols(item) or is_infinite(item):
            raise UnparsableError("not a set of numbers")
    return RealSet(items, lambda order: any(order(item) == 0 for item in items))


def _interval(low: Node, high: Node, low_closed: bool, high_closed: bool) -> RealSet:
    if is_infinite(low) > 0 or is_infinite(high) < 0:
        raise UnparsableError("an interval that begins or ends at the wrong infinity")
    if (is_infinite(low) and low_closed) or (is_infinite(high) and high_closed):
        raise UnparsableError("an interval that contains infinity")

    ends = tuple(end for end in (low, high) if not is_infinite(end))
    if len(ends) == 2 and not real_value(low) <= real_value(high):
        raise UnparsableError("an interval that ends before it begins")

    def contains(order: Callable[[Node], int]) -> bool:
        above = is_infinite(low) or order(low) > 0 or (low_closed and order(low) == 0)
        below = is_infinite(high) or order(high) < 0 or (high_closed and order(high) == 0)
        return bool(above and below)

    return RealSet(ends, contains)


def _combined(operation: str, left: RealSet, right: RealSet) -> RealSet:
    def contains(order: Callable[[Node], int]) -> bool:
        if operation == "union":
            return left.contains(order) or right.contains(order)
        return left.contains(order) and right.contains(order) == (operation == "intersection")

    return RealSet((*left.endpoints, *right.endpoints), contains, left.variable or right.variable)


def _listing(items: tuple[Node, ...], separator: str) -> RealSet:
    """Return the set of `x < 1 or x > 2`; `x != 1, 2`; `(-oo, 1), (2, oo)`."""
    if len(items) > MAX_LIST_ITEMS:
        raise UnparsableError("too many conditions")

    first = items[0]
    excludes = isinstance(first, Relation) and "!=" in first.operators
    sets = [_listed_set(item, items, separator) for item in items]

    operation = "union" if separator == "or" and not excludes else "intersection"
    if isinstance(first, Group):
        operation = "union"

    result = sets[0]
    for other in sets[1:]:
        if result.variable != other.variable:
            raise UnparsableError("conditions on several variables")
        result = _combined(operation, result, other)

    # `x < -1, x > 1` says "or": nothing fulfils both.
    if separator == "," and operation == "intersection" and same_set(result, _EMPTY):
        return _listing(items, "or")
    return result


def _listed_set(item: Node, items: tuple[Node, ...], separator: str) -> RealSet:
    """Return the set of one item of a listing."""
    first = items[0]
    is_value = not isinstance(item, Relation | Group | SetOperation)
    if is_value and isinstance(first, Relation) and first.operators == ("!=",):
        item = Relation((first.parts[0], item), ("!=",))  # the 2 of `x != 1, 2`

    if isinstance(item, Group):
        ends = [end for group in items if isinstance(group, Group) for end in group.items]
        if not any(is_infinite(end) for end in ends):
            raise UnparsableError("tuples, not intervals")

    if isinstance(item, Relation) and item.operators == ("=",):
        if separator != "or":
            raise UnparsableError("values, not conditions")
        return _half_line(item.parts[0], item.parts[1], "=")
    return real_set(item)


def _variable_name(node: Node) -> str:
    if isinstance(node, Symbol):
        return node.name
    if isinstance(node, Call) and node.name.startswith("undefined "):
        return node.name
    raise UnparsableError("a condition on an expression")


def _relation(node: Relation) -> RealSet:
    """Return the set of a chain of inequalities on one variable.

    Each link is linear in the variable and gives half of the line.
    """
    if any(operator not in FLIPPED for operator in node.operators) or (node.operators == ("=",)):
        raise UnparsableError("not an inequality")
    if len(node.operators) > 1 and len({operator[0] for operator in node.operators}) > 1:
        raise UnparsableError("a chain of inequalities in both directions")

    result: RealSet | None = None
    for left, right, operator in zip(node.parts, node.parts[1:], node.operators, strict=False):
        half = _half_line(left, right, operator)
        result = half if result is None else _combined("intersection", result, half)
    assert result is not None
    return result


def _half_line(left: Node, right: Node, operator: str) -> RealSet:
    if isinstance(right, Call) and right.name == "abs":
        left, right, operator = right, left, FLIPPED[operator]
    if isinstance(left, Call) and left.name == "abs" and _bounds_absolute_value(operator, right):
        (inner,) = left.arguments
        above = _half_line(inner, right, operator)
        below = _half_line(inner, negative(right), FLIPPED[operator])
        return _combined("intersection" if operator in ("<", "<=") else "union", above, below)

    left, right = _opaque(left), _opaque(right)
    names = symbols(left) | symbols(right)
    if len(names) != 1:
        raise UnparsableError("an inequality in several variables")

    (name,) = names
    for infinite, other_side in ((left, right), (right, left)):
        if is_infinite(infinite) and isinstance(other_side, Symbol):
            upward = operator in (">", ">=") if infinite is right else operator in ("<", "<=")
            return _all_or_nothing((is_infinite(infinite) < 0) == upward, name)

    # left - right must be the line through its values at 0 and 1.
    difference = Sum((left, negative(right)))
    zero = substitute(difference, name, Number(Fraction(0)))
    one = substitute(difference, name, Number(Fraction(1)))
    slope = Sum((one, negative(zero)))
    line = Sum((zero, Product((slope, Symbol(name)))))
    slope_value = real_value(slope)
    if slope_value == 0 or not same_value(difference, line):
        raise UnparsableError("an inequality that is not linear")

    if isinstance(right, Symbol) and not symbols(left):
        end = left
    elif isinstance(left, Symbol) and not symbols(right):
        end = right
    else:
        end = Product((MINUS_ONE, zero, Power(slope, MINUS_ONE)))
    if slope_value < 0:
        operator = FLIPPED[operator]
    holds = _COMPARISONS[operator]
    return RealSet((end,), lambda order: holds(order(end), 0), name)


def _bounds_absolute_value(operator: str, bound: Node) -> bool:
    """Return whether `|x| operator bound` is a condition on both sides of zero."""
    return not symbols(bound) and real_value(bound) > 0 and operator not in ("=", "!=")


def _all_or_nothing(everything: bool, variable: str) -> RealSet:
    return RealSet((), lambda order: everything, variable)


def _opaque(node: Node) -> Node:
    """Return g(x) as one variable."""
    if isinstance(node, Call) and node.name.startswith("undefined "):
        return Symbol(node.name)
    return node


def substitute(node: Node, name: str, value: Node) -> Node:
    """Return `node` with a variable replaced."""
    if isinstance(node, Symbol):
        return value if node.name == name else node
    match node:
        case Sum(terms):
            return Sum(tuple(substitute(term, name, value) for term in terms))
        case Product(factors):
            return Product(tuple(substitute(factor, name, value) for factor in factors))
        case Power(base, exponent):
            return Power(substitute(base, name, value), substitute(exponent, name, value))
        case Call(function, arguments):
            return Call(
                function, tuple(substitute(argument, name, value) for argument in arguments)
            )
        case _ if children(node):
            raise UnparsableError("not an expression")
        case _:
            return node


_EMPTY = RealSet((), lambda order: False)
MAX_SCALE = 10**9  # of the numbers in two equations that are compared by their ratio


def same_equation(left: Node, right: Node, *, ordered: bool) -> int:
    """Return the sign of the constant c with `left = c * right`; 0 where there is none.

    With such a constant, `left = 0` and `right = 0` are the same equation. With `ordered` the sign
    matters (inequalities), and the constant must be real.
    """
    names = symbols(left) | symbols(right)
    if not names:  # constants have any ratio: f(1) = 3 and f(2) = 3
        return int(same_value(left, right))

    ratios = _equal_ratios(left, right, names)
    if ratios is None:
        return 0
    if len(ratios) < 2:
        return int(exact(left) is not None and exact(left) == exact(right))
    if ordered and abs(ratios[0].imag) > 0:
        return 0
    return 1 if ratios[0].real > 0 else -1


def _equal_ratios(left: Node, right: Node, names: frozenset[str]) -> list[Any] | None:
    """Return the ratio of two expressions at several points; None where it is not constant."""
    ratios: list[Any] = []
    for real in (True, False):
        for point in points(names):
            try:
                evaluator = Evaluator(point, real=real)
                above = evaluator.value(left)
                below = evaluator.value(right)
            except UndefinedError:
                continue

            if evaluator.scale > MAX_SCALE:
                return None  # a change of the variables would not show in the ratio

            noise = evaluator.scale * evaluator.context.mpf(10) ** -35
            vanishing = (abs(above) < noise) + (abs(below) < noise)
            if vanishing == 1:
                return None
            if vanishing == 2:
                continue

            ratios.append(above / below)
            tolerance = evaluator.context.mpf(10) ** -32
            if len(ratios) > 1 and abs(ratios[-1] / ratios[0] - 1) > tolerance:
                return None
            if len(ratios) == 4:
                break
        if len(ratios) >= 2:
            break
    return ratios
