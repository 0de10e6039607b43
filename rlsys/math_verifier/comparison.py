"""Whether two answers are equal: first by what kind of thing each is, then by value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from rlsys.math_verifier.evaluation import exact, real_value, same_value
from rlsys.math_verifier.limits import (
    MAX_LIST_ITEMS,
    MAX_SIGN_CHOICES,
    TooLargeError,
    UndefinedError,
    UnparsableError,
)
from rlsys.math_verifier.nodes import (
    EMPTY_SET,
    MINUS_ONE,
    REALS,
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
    children,
    negative,
    symbols,
)  # fmt: skip
from rlsys.math_verifier.parser import added
from rlsys.math_verifier.real_sets import (
    FLIPPED,
    is_infinite,
    real_set,
    same_equation,
    same_set,
    substitute,
)
from rlsys.math_verifier.units import parse_unit

# Digits that a value said to be rounded must show, to equal another decimal or an exact value.
MIN_DIGITS_OF_DECIMAL = 3
MIN_DIGITS_OF_EXACT = 4


def same_answer(left: Node, right: Node) -> bool:
    """Whether two parsed answers are equal.

    Raises:
        TooLargeError, UndefinedError: it could not be decided.
    """
    left, right = simplified(left), simplified(right)
    if left == right:
        return True
    return any(rule(left, right) or rule(right, left) for rule in _RULES)


def simplified(node: Node) -> Node:
    """An answer without what only says where it comes from: chains of equal values, lists of one, plus-minus signs spelled out."""
    if isinstance(node, Relation):
        return _simplified_relation(node)
    if isinstance(node, Measured):
        inner = simplified(node.value)
        if isinstance(inner, Relation) and inner.operators == ("=",):
            return Relation((inner.parts[0], Measured(inner.parts[1], node.unit)), ("=",))
        return Measured(inner, node.unit)
    if isinstance(node, Approximate):
        return Approximate(simplified(node.value))
    if isinstance(node, Listing):
        return _simplified_listing(node)
    if isinstance(node, SetOf):
        parts = [simplified(item) for item in node.items]
        return SetOf(
            tuple(
                item
                for part in parts
                for item in (part.items if isinstance(part, Listing) else (part,))
            )
        )
    if isinstance(node, SetOperation):
        return node
    node = _grouped_matrix(node)
    values = signs(node)
    return Listing(tuple(values), "and") if len(values) > 1 else node


def _grouped_matrix(node: Node) -> Node:
    """[[1, 2], [3, 4]] is a matrix."""
    if (
        isinstance(node, Group)
        and node.opening == "["
        and node.items
        and all(isinstance(i, Group) and i.opening == "[" for i in node.items)
    ):
        rows = tuple(item.items for item in node.items if isinstance(item, Group))
        if len({len(row) for row in rows}) == 1:
            return Matrix(rows)
    return node


def _simplified_listing(node: Listing) -> Node:
    if isinstance(node.items[0], Relation) and node.items[0].operators == ("=",):
        name = node.items[0].parts[0]
        if is_name(name) and not any(
            isinstance(item, Relation) for item in node.items[1:]
        ):  # x = 2, 3
            return _named(
                name,
                _simplified_listing(
                    Listing((node.items[0].parts[1], *node.items[1:]), node.separator)
                ),
            )
        if all(
            isinstance(item, Relation)
            and item.operators == ("=",)
            and _same_variable(item.parts[0], name)
            for item in node.items
        ):
            values = tuple(i.parts[1] for i in node.items if isinstance(i, Relation))
            return _named(name, _simplified_listing(Listing(values, node.separator)))
    if (
        node.separator == "and"
        and len(node.items) == 2
        and all(isinstance(item, Measured) for item in node.items)
    ):
        first, second = node.items
        try:
            if (
                isinstance(first, Measured)
                and isinstance(second, Measured)
                and first.unit != second.unit
            ):
                return added(first, second)  # 3 hours and 20 minutes
        except UnparsableError:
            pass
    items: list[Node] = []
    for item in node.items:
        inner = simplified(item)
        items.extend(inner.items if isinstance(inner, Listing) else (inner,))
    if (
        node.separator == "or"
        and not any(isinstance(item, Relation) for item in items)
        and all(_item(items[0], item) for item in items[1:])
    ):
        return items[0]  # 0.5 or 1/2
    return Listing(tuple(items), node.separator)


def _named(name: Node, values: Node) -> Node:
    """x = 2, 3: the values and whose they are."""
    if isinstance(name, Symbol):
        return Relation((Symbol(name.name.split("_")[0]), values), ("=",))
    return values


def _same_variable(left: Node, right: Node) -> bool:
    """x = 2 or x = 3; x_1 = 2, x_2 = 3."""
    if not isinstance(left, Symbol) or not isinstance(right, Symbol):
        return False
    first, second = left.name.split("_"), right.name.split("_")
    return first[0] == second[0] and (len(first) == len(second))


def signs(node: Node) -> list[Node]:
    """The values of an expression with plus-minus signs; two signs are first read as belonging together."""
    count = _count_signs(node)
    if count == 0:
        return [node]
    if count > MAX_SIGN_CHOICES:
        raise TooLargeError
    return [_with_sign(node, 1), _with_sign(node, -1)]


def _count_signs(node: Node) -> int:
    return isinstance(node, PlusMinus) + sum(_count_signs(child) for child in children(node))


def _with_sign(node: Node, sign: int) -> Node:
    """`node` with upper signs (1) or lower signs (-1)."""
    match node:
        case PlusMinus(term, upper):
            inner = _with_sign(term, sign)
            return inner if upper * sign > 0 else negative(inner)
        case Sum(terms):
            return Sum(tuple(_with_sign(term, sign) for term in terms))
        case Product(factors):
            return Product(tuple(_with_sign(factor, sign) for factor in factors))
        case Power(base, exponent):
            return Power(_with_sign(base, sign), _with_sign(exponent, sign))
        case Call(name, arguments):
            return Call(name, tuple(_with_sign(argument, sign) for argument in arguments))
        case Marked(value, mark):
            return Marked(_with_sign(value, sign), mark)
        case Measured(value, unit):
            return Measured(_with_sign(value, sign), unit)
        case Group(opening, items, closing):
            return Group(opening, tuple(_with_sign(item, sign) for item in items), closing)
        case _:
            return node


# Equations


def _is_part_of_name(node: Node) -> bool:
    if isinstance(node, Power):
        return node.exponent == MINUS_ONE and is_name(node.base)
    return isinstance(node, Symbol | Relation) or (isinstance(node, Product) and is_name(node))


def is_name(node: Node) -> bool:
    """Whether a side of an equation only names what the other side gives: x, f(x), AB, P(A), (x, y)."""
    if isinstance(node, Symbol):
        return node != REALS
    if isinstance(node, Call):
        return node.name.startswith("undefined ") or (
            node.name == "abs" and is_name(node.arguments[0])
        )
    if isinstance(node, Product):  # AB, P(X = 2), dy/dx, AB/CD
        return (
            0 < len(node.factors) <= 3
            and not isinstance(node.factors[0], Power | Relation)
            and all(map(_is_part_of_name, node.factors))
        )
    if isinstance(node, Group):
        return all(isinstance(item, Symbol) for item in node.items)
    return isinstance(node, Constant) and node.name == "i"


def _simplified_relation(node: Relation) -> Node:
    """A value where a chain of equations has one; contradictory chains have none."""
    parts, operators = list(node.parts), list(node.operators)
    if "~" in operators and set(operators) <= {"=", "~"}:
        return _rounded_chain(parts, operators)
    if set(operators) != {"="}:
        return Relation(
            tuple(simplified(p) if operators == ["in"] else p for p in parts), node.operators
        )
    if len(parts) == 2 and is_name(parts[1]) and not is_name(parts[0]):
        parts.reverse()
    named = is_name(parts[0])
    values = parts[1:] if named else parts
    if len(values) > 1 and (named or len(parts) > 2 or not (symbols(parts[0]) | symbols(parts[1]))):
        if not all(same_answer(values[0], value) for value in values[1:]):
            raise UnparsableError("a chain of different values")
        values = values[-1:]
    if not named:
        return simplified(values[0]) if len(values) == 1 else Relation(tuple(parts), ("=",))
    value = simplified(values[0])
    if isinstance(parts[0], Group):
        return value
    return (
        _named(parts[0], value)
        if isinstance(value, Listing)
        else Relation((parts[0], value), ("=",))
    )


def _rounded_chain(parts: list[Node], operators: list[str]) -> Node:
    """`2/3 ~ 0.67`: the exact value, if the rounding is right."""
    if is_name(parts[0]):
        parts, first = parts[1:], operators[0]
        operators = operators[1:]
        if len(parts) == 1:
            return Approximate(simplified(parts[0])) if first == "~" else simplified(parts[0])
    values = [_without_unit(simplified(part)) for part in parts]
    if (
        len(values) != 2
        or not isinstance(values[1], Number)
        or not _rounds_to(values[0], values[1], minimum=1)
    ):
        raise UnparsableError("a wrong approximation")
    return Listing((parts[0], Approximate(parts[1])), "~")


def _without_unit(node: Node) -> Node:
    return node.value if isinstance(node, Measured) else node


def _equation_sides(node: Node) -> Node | None:
    if isinstance(node, Relation) and node.operators == ("=",):
        return Sum((node.parts[0], negative(node.parts[1])))
    return None


def _equations(left: Node, right: Node) -> bool:
    """x = 3 against 3, and equations that are multiples of each other."""
    if not isinstance(left, Relation) or left.operators != ("=",):
        return False
    if not isinstance(right, Relation):
        return (
            is_name(left.parts[0])
            and not isinstance(right, Ratio)
            and same_answer(left.parts[1], right)
        )
    if right.operators != ("=",):
        return False
    first, second = left.parts[0], right.parts[0]
    if first == second and is_name(first):
        return same_answer(left.parts[1], right.parts[1])
    if (
        _is_function_name(first)
        and _is_function_name(second)
        and same_answer(left.parts[1], right.parts[1])
    ):
        return True
    try:
        return bool(same_equation(_difference(left), _difference(right), ordered=False))
    except UnparsableError:
        return False


def _is_function_name(node: Node) -> bool:
    return node == Symbol("y") or (isinstance(node, Call) and node.name.startswith("undefined "))


def _difference(node: Relation) -> Node:
    return Sum((node.parts[0], negative(node.parts[1])))


def _inequalities(left: Node, right: Node) -> bool:
    """The same inequality, turned round or multiplied."""
    if not (
        isinstance(left, Relation)
        and isinstance(right, Relation)
        and len(left.operators) == len(right.operators) == 1
    ):
        return False
    first, second = left.operators[0], right.operators[0]
    if first not in FLIPPED or second not in FLIPPED or "=" in (first, second):
        return False
    try:
        if real_set(left) and real_set(right):
            return False  # the rule for sets decides, exactly
    except (UnparsableError, UndefinedError):
        pass
    try:
        sign = same_equation(_difference(left), _difference(right), ordered=True)
    except UnparsableError:
        return False
    return first == second if sign > 0 else first == FLIPPED[second] if sign < 0 else False


def _assignments(left: Node, right: Node) -> bool:
    """x = 3, y = -1 against (3, -1), the variables in alphabetical order; AB = 9, CD = 4 in any order."""
    if not (
        isinstance(left, Listing)
        and all(
            isinstance(i, Relation) and i.operators == ("=",) and is_name(i.parts[0])
            for i in left.items
        )
    ):
        return False
    pairs = {str(i.parts[0]): i.parts[1] for i in left.items if isinstance(i, Relation)}
    if len(pairs) != len(left.items):
        return False
    if isinstance(right, Group) and (right.opening, right.closing) in (("(", ")"), ("<", ">")):
        return _same_items([pairs[name] for name in sorted(pairs)], right.items)
    if isinstance(right, Listing) and all(
        isinstance(i, Relation) and i.operators == ("=",) for i in right.items
    ):
        return _same_multiset(left.items, right.items)
    return False


# Sets, tuples, lists


def _sets(left: Node, right: Node) -> bool:
    """Sets of real numbers in whatever notation; finite ones are compared by their members."""
    infinite = Group | SetOperation | Relation
    if isinstance(left, Measured | Approximate) or not (
        isinstance(left, infinite | Listing) or left == REALS
    ):
        return False
    if (
        isinstance(left, Relation)
        and left.operators == ("in",)
        and isinstance(left.parts[1], SetOf | Listing)
    ):
        return same_answer(left.parts[1], right)
    if isinstance(left, Group) and isinstance(right, Group | Listing) and isinstance(right, Group):
        return False  # two pairs are compared as pairs
    if not isinstance(right, infinite | Listing | SetOf) and right != REALS:
        return False
    try:
        return same_set(real_set(left), real_set(right))
    except (UnparsableError, UndefinedError):
        return False


def _memberships(left: Node, right: Node) -> bool:
    """k in Z against k in Z, or against Z."""
    if not isinstance(left, Relation) or left.operators != ("in",):
        return False
    if isinstance(right, Relation) and right.operators == ("in",):
        return _same_items(left.parts, right.parts)
    return isinstance(right, Symbol) and left.parts[1] == right


def _finite_sets(left: Node, right: Node) -> bool:
    if not isinstance(left, SetOf):
        return False
    if (isinstance(right, Listing) and right.separator != "~") or isinstance(right, SetOf):
        others = right.items
    elif (
        len(left.items) == 1
        and not isinstance(right, Group | Matrix | SetOperation)
        and left.items[0] != EMPTY_SET
    ):
        return same_answer(left.items[0], right)
    else:
        return False
    _bound(left.items, others)
    if not left.items or not others:
        return not left.items and not others
    return all(any(_item(a, b) for b in others) for a in left.items) and all(
        any(_item(a, b) for a in left.items) for b in others
    )


def _bound(left: Sequence[Node], right: Sequence[Node]) -> None:
    if max(len(left), len(right)) > MAX_LIST_ITEMS:
        raise TooLargeError


def _item(left: Node, right: Node) -> bool:
    try:
        return same_answer(left, right)
    except UndefinedError:
        return False


def _lists(left: Node, right: Node) -> bool:
    if not isinstance(left, Listing):
        return False
    if left.separator == "~":
        return (
            any(_item(item, right) for item in left.items)
            if not isinstance(right, Listing)
            else _same_items(left.items, right.items)
        )
    if not isinstance(right, Listing):
        return False
    return _same_multiset(left.items, right.items)


def _same_multiset(left: Sequence[Node], right: Sequence[Node]) -> bool:
    if len(left) != len(right):
        return False
    _bound(left, right)
    rest = list(right)
    for item in left:
        match = next((i for i, other in enumerate(rest) if _item(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_items(left: Sequence[Node], right: Sequence[Node]) -> bool:
    return len(left) == len(right) and all(_item(a, b) for a, b in zip(left, right, strict=True))


def _tuples(left: Node, right: Node) -> bool:
    """Tuples, vectors and intervals with the same brackets; angle brackets are as good as round ones."""
    if not isinstance(left, Group) or not isinstance(right, Group):
        return False
    shape = {"<": "(", ">": ")"}
    brackets = [
        (shape.get(g.opening, g.opening), shape.get(g.closing, g.closing)) for g in (left, right)
    ]
    if brackets[0] != brackets[1] and not (
        len(left.items) > 2 and set(brackets) == {("(", ")"), ("[", "]")}
    ):
        return False
    return _same_items(left.items, right.items)


def _same_end(left: Node, right: Node) -> bool:
    return (
        is_infinite(left) == is_infinite(right)
        if is_infinite(left) or is_infinite(right)
        else _item(left, right)
    )


# Matrices


def as_matrix(node: Node) -> Matrix | None:
    """A matrix that sums, multiples and transposes of matrices and vectors make; None for anything else."""
    match node:
        case Matrix():
            return node
        case Group(opening, items, closing) if (opening, closing) in (("(", ")"), ("<", ">")):
            return Matrix(tuple((item,) for item in items))
        case Call("transpose", (inner,)):
            matrix = as_matrix(inner)
            if isinstance(inner, Group):
                return matrix
            return Matrix(tuple(zip(*matrix.rows, strict=True))) if matrix else None
        case Call("binomial", arguments):
            return Matrix(tuple((argument,) for argument in arguments))
        case Product(factors):
            return _multiple(factors)
        case Sum(terms):
            return _sum_of_matrices(terms) or _unit_vectors(node)
        case _:
            return _unit_vectors(node)


def _multiple(factors: tuple[Node, ...]) -> Matrix | None:
    matrices = [
        as_matrix(factor) if isinstance(factor, Matrix | Group) else None for factor in factors
    ]
    if sum(matrix is not None for matrix in matrices) != 1:
        return _unit_vectors(Product(factors))
    matrix = next(matrix for matrix in matrices if matrix is not None)
    scalar = Product(
        tuple(factor for factor, m in zip(factors, matrices, strict=True) if m is None)
    )
    return Matrix(
        tuple(tuple(Product((scalar, cell)) for cell in row) for row in matrix.rows),
        matrix.determinant,
    )


def _sum_of_matrices(terms: tuple[Node, ...]) -> Matrix | None:
    matrices = [as_matrix(term) if _holds_matrix(term) else None for term in terms]
    shapes = {(len(m.rows), len(m.rows[0])) for m in matrices if m is not None}
    if None in matrices or len(shapes) != 1:
        return None
    present = [m for m in matrices if m is not None]
    return Matrix(
        tuple(
            tuple(Sum(cells) for cells in zip(*rows, strict=True))
            for rows in zip(*(m.rows for m in present), strict=True)
        )
    )


def _holds_matrix(node: Node) -> bool:
    return isinstance(node, Matrix | Group) or any(_holds_matrix(child) for child in children(node))


def _unit_vectors(node: Node) -> Matrix | None:
    """2 i + 3 j with bold or hatted letters."""
    names = [f"unit vector {letter}" for letter in "ijk"]
    used = symbols(node)
    if not used & set(names):
        return None
    size = 3 if names[2] in used else 2
    rows = []
    for chosen in names[:size]:
        cell = node
        for name in names:
            cell = substitute(cell, name, Number(Fraction(int(name == chosen))))
        rows.append((cell,))
    return Matrix(tuple(rows))


def _matrices(left: Node, right: Node) -> bool:
    if not (_is_matrix(left) or _is_matrix(right)):
        return False
    first, second = as_matrix(left), as_matrix(right)
    if first is None or second is None or first.determinant != second.determinant:
        return False
    if len(first.rows) == 1 != len(second.rows) and isinstance(right, Group):
        second = Matrix(tuple(zip(*second.rows, strict=True)))  # a row against a tuple
    if len(first.rows) != len(second.rows):
        return False
    return all(_same_items(a, b) for a, b in zip(first.rows, second.rows, strict=True))


def _is_matrix(node: Node) -> bool:
    return not isinstance(node, Group | Listing | Relation | SetOf | SetOperation) and (
        _holds_matrix(node) or _has_unit_vectors(node)
    )


def _has_unit_vectors(node: Node) -> bool:
    return any(name.startswith("unit vector") for name in symbols(node))


# Values

_EXPRESSIONS = Number | Symbol | Constant | Sum | Product | Power | Call | Marked | Numeral


def _values(left: Node, right: Node) -> bool:
    if not isinstance(left, _EXPRESSIONS) or not isinstance(right, _EXPRESSIONS):
        return False
    if is_infinite(left) or is_infinite(right):
        return is_infinite(left) == is_infinite(right)
    try:
        if same_value(left, right):
            return True
        return _same_without_mark(left, right)
    except UnparsableError:
        return False


def _same_without_mark(left: Node, right: Node) -> bool:
    """90 for 90 degrees, 50 for 50 %. A bare number below 1 is a share and no percentage: 0.5 is not 0.5 %."""
    for marked, bare in ((left, right), (right, left)):
        if _mark(marked) == "degree" and not _mark(bare):
            return same_value(_unmarked(marked), bare)
        if _mark(marked) == "percent" and not _mark(bare):
            plain = _unmarked(marked)
            return abs(real_value(plain)) >= 1 and same_value(plain, bare)
    return False


def _mark(node: Node) -> str:
    """The mark on a whole value, looking through signs, sums and factors but not into functions."""
    if isinstance(node, Marked):
        return node.mark
    if isinstance(node, Sum | Product):
        return next((mark for child in children(node) if (mark := _mark(child))), "")
    return ""


def _unmarked(node: Node) -> Node:
    match node:
        case Marked(value, _):
            return value
        case Sum(terms):
            return Sum(tuple(_unmarked(term) for term in terms))
        case Product(factors):
            return Product(tuple(_unmarked(factor) for factor in factors))
        case _:
            return node


def _holds_unit(node: Node) -> bool:
    return isinstance(node, Measured | Marked) or any(
        _holds_unit(child) for child in children(node)
    )


def _different_units(left: Node, right: Node) -> bool:
    if not isinstance(left, Measured) or not isinstance(right, Measured):
        return False
    first, second = parse_unit(left.unit), parse_unit(right.unit)
    return first is not None and second is not None and first != second


_RADIAN = parse_unit("radian")


def _units(left: Node, right: Node) -> bool:
    """A unit may be left out. Two known units must be of one dimension, and are converted."""
    if not isinstance(left, Measured):
        return False
    if not isinstance(right, Measured):
        if _mark(right) == "degree" and parse_unit(left.unit) == _RADIAN:
            return isinstance(left.value, _EXPRESSIONS) and same_value(left.value, right)
        if not isinstance(right, _EXPRESSIONS) and _holds_unit(right):
            return False  # a relation or a rounding; the rules for those look inside
        if isinstance(right, _EXPRESSIONS) and _mark(right) and parse_unit(left.unit) is not None:
            return False  # dollars and percents
        return _item(left.value, right)
    first, second = parse_unit(left.unit), parse_unit(right.unit)
    if first is None or second is None:
        return _item(left.value, right.value)
    if first[0] != second[0]:
        return False
    if first[1] == second[1]:
        return _item(left.value, right.value)
    return (
        isinstance(left.value, _EXPRESSIONS)
        and isinstance(right.value, _EXPRESSIONS)
        and same_value(
            Product((left.value, Number(first[1]))), Product((right.value, Number(second[1])))
        )
    )


def _rounds_to(value: Node, rounded: Number, *, minimum: int) -> bool:
    """Whether `rounded` is `value` to the decimals it is written with, and has digits enough to tell."""
    decimals = rounded.decimals or 0
    digits = str(abs(int(rounded.value * 10**decimals))).lstrip("0")
    if decimals == 0 or len(digits) < minimum:
        return False
    try:
        number = real_value(value)
    except UnparsableError:
        return False
    distance = abs(
        number - rounded.value.numerator / real_value(Number(Fraction(rounded.value.denominator)))
    )
    return bool(distance <= real_value(Number(Fraction(1, 2 * 10**decimals))) * (1 + 1e-12))


def _roundings(left: Node, right: Node) -> bool:
    """A value said to be approximate equals what rounds to it."""
    if not isinstance(left, Approximate):
        return False
    value, other = left.value, right.value if isinstance(right, Approximate) else right
    if isinstance(other, Listing) and other.separator == "~":
        return any(_item(left, item) for item in other.items)
    if _item(value, other):
        return True
    if _different_units(value, other) or _mark(_without_unit(value)) != _mark(_without_unit(other)):
        return False
    plain, against = _without_unit(value), _without_unit(other)
    if not isinstance(plain, Number) or not isinstance(against, _EXPRESSIONS) or symbols(against):
        return False
    decimal = isinstance(against, Number) and against.decimals is not None
    return _rounds_to(
        against, plain, minimum=MIN_DIGITS_OF_DECIMAL if decimal else MIN_DIGITS_OF_EXACT
    )


def _ratios(left: Node, right: Node) -> bool:
    if not isinstance(left, Ratio):
        return False
    if not isinstance(right, Ratio):
        return (
            len(left.parts) == 2
            and isinstance(right, _EXPRESSIONS)
            and _item(Product((left.parts[0], Power(left.parts[1], Number(Fraction(-1))))), right)
        )
    if len(left.parts) != len(right.parts):
        return False
    first, second = left.parts[0], right.parts[0]
    if any(exact(part) == 0 for part in (*left.parts, *right.parts)):
        return _same_items(left.parts, right.parts)
    return all(
        _item(Product((a, second)), Product((b, first)))
        for a, b in zip(left.parts, right.parts, strict=True)
    )


_RULES: tuple[Callable[[Node, Node], bool], ...] = (
    _values,
    _units,
    _roundings,
    _tuples,
    _lists,
    _finite_sets,
    _matrices,
    _ratios,
    _equations,
    _inequalities,
    _assignments,
    _memberships,
    _sets,
)
