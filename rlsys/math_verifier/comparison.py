"""The comparison of two answers: first by their kinds, then by value."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction

from rlsys.math_verifier.evaluation import exact, real_value, same_value
from rlsys.math_verifier.limits import (
    MAX_LIST_ITEMS,
    MAX_MATRIX_EXPONENT,
    MAX_MATRIX_NODES,
    MAX_MATRIX_SIDE,
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

# Digits that an approximate value must show, to equal another decimal or an exact value.
MIN_DIGITS_OF_DECIMAL = 3
MIN_DIGITS_OF_EXACT = 4
# Digits that make a decimal a rounding without being said to be one, and those of a double.
MIN_DIGITS_OF_ROUNDED = 12
DIGITS_OF_DOUBLE = 15
MAX_POWER_OF_DECIMAL = 100  # of ten, in scientific notation


def same_answer(left: Node, right: Node) -> bool:
    """Decide whether two parsed answers are equal.

    Raises:
        TooLargeError, UndefinedError: it could not be decided.
    """
    left, right = simplified(left), simplified(right)
    if left == right:
        return True
    return any(rule(left, right) or rule(right, left) for rule in _RULES)


def simplified(node: Node) -> Node:
    """Return an answer without what only says where it comes from.

    Chains of equal values and lists of one become a value; plus-minus signs are spelled out.
    """
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
        return SetOf(_flattened(node.items))
    if isinstance(node, SetOperation):
        return node

    node = _grouped_matrix(node)
    point = _named_point(node)
    if point is not None:
        return point
    values = signs(node)
    return Listing(tuple(values), "and") if len(values) > 1 else node


def _flattened(items: Sequence[Node]) -> tuple[Node, ...]:
    """Simplify items; a listing among them gives its own items."""
    found: list[Node] = []
    for item in items:
        inner = simplified(item)
        found.extend(inner.items if isinstance(inner, Listing) else (inner,))
    return tuple(found)


def _named_point(node: Node) -> Relation | None:
    """Return A(1, 2), a point with its name, as an equation; None for anything else."""
    match node:
        case Product((Symbol(name) as symbol, Group("(", items, ")") as point)):
            if len(name) == 1 and name.isupper() and len(items) > 1:
                return Relation((symbol, point), ("=",))
    return None


def _grouped_matrix(node: Node) -> Node:
    """Return [[1, 2], [3, 4]] as a matrix, and any other node unchanged."""
    if not isinstance(node, Group) or node.opening != "[" or not node.items:
        return node
    rows = [item for item in node.items if isinstance(item, Group) and item.opening == "["]
    if len(rows) == len(node.items) and len({len(row.items) for row in rows}) == 1:
        return Matrix(tuple(row.items for row in rows))
    return node


def _simplified_listing(node: Listing) -> Node:
    values_of_name = _values_of_one_name(node)
    if values_of_name is not None:
        name, values = values_of_name
        return _named(name, _simplified_listing(Listing(values, node.separator)))

    if node.separator == "and" and len(node.items) == 2:
        total = _total(node.items)
        if total is not None:
            return total

    items = _flattened(node.items)
    if all(isinstance(item, Group) for item in items):
        items = tuple(dict.fromkeys(items))  # a point given twice is one point
        if len(items) == 1:
            return items[0]
    if node.separator == "or" and _are_one_value(items):
        return items[0]  # 0.5 or 1/2
    return Listing(items, node.separator)


def _total(items: tuple[Node, ...]) -> Measured | None:
    """Return the sum of two values with different units: 3 hours and 20 minutes."""
    first, second = items
    if not isinstance(first, Measured) or not isinstance(second, Measured):
        return None
    if first.unit == second.unit:
        return None
    try:
        return added(first, second)
    except UnparsableError:
        return None


def _are_one_value(items: tuple[Node, ...]) -> bool:
    if any(isinstance(item, Relation) for item in items):
        return False
    return all(_item(items[0], item) for item in items[1:])


def _values_of_one_name(node: Listing) -> tuple[Node, tuple[Node, ...]] | None:
    """Return the name and the values of `x = 2, 3` and `x = 2, x = 3`; None for other lists."""
    first = node.items[0]
    if not isinstance(first, Relation) or first.operators != ("=",):
        return None
    name, value = first.parts

    if is_name(name) and not any(isinstance(item, Relation) for item in node.items[1:]):
        return name, (value, *node.items[1:])

    equations = [
        item
        for item in node.items
        if isinstance(item, Relation)
        and item.operators == ("=",)
        and _same_variable(item.parts[0], name)
    ]
    if len(equations) < len(node.items):
        return None
    return name, tuple(item.parts[1] for item in equations)


def _named(name: Node, values: Node) -> Node:
    """Return `x = 2, 3` as one relation, where the name is a variable."""
    if isinstance(name, Symbol):
        return Relation((Symbol(name.name.split("_")[0]), values), ("=",))
    return values


def _same_variable(left: Node, right: Node) -> bool:
    """Return whether two names are the same, up to an index: x and x, x_1 and x_2."""
    if not isinstance(left, Symbol) or not isinstance(right, Symbol):
        return left == right and _is_function_name(left)
    first, second = left.name.split("_"), right.name.split("_")
    return first[0] == second[0] and (len(first) == len(second))


def signs(node: Node) -> list[Node]:
    """Return the values of an expression with plus-minus signs.

    All upper signs belong together, and all lower ones.
    """
    count = _count_signs(node)
    if count == 0:
        return [node]
    if count > MAX_SIGN_CHOICES:
        raise TooLargeError
    return [_with_sign(node, 1), _with_sign(node, -1)]


def _count_signs(node: Node) -> int:
    return isinstance(node, PlusMinus) + sum(_count_signs(child) for child in children(node))


def _with_sign(node: Node, sign: int) -> Node:
    """Return `node` with upper signs (1) or lower signs (-1)."""
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
    return isinstance(node, Symbol | Relation | SetOperation) or (
        isinstance(node, Product) and is_name(node)
    )


def is_name(node: Node) -> bool:
    """Return whether a side of an equation only names the value of the other side.

    Names are x, f(x), AB, P(A), (x, y), AB : BC.
    """
    if isinstance(node, Symbol):
        return node != REALS
    if isinstance(node, Call):
        if node.name == "abs":
            return _is_named_set_or_length(node.arguments[0])
        return node.name.startswith("undefined ")
    if isinstance(node, Power):  # C_5^2, a number of combinations
        return (
            isinstance(node.base, Symbol) and _COMBINATORIAL.fullmatch(node.base.name) is not None
        )
    if isinstance(node, Product):  # AB, P(X = 2), dy/dx, AB/CD
        return (
            0 < len(node.factors) <= 3
            and not isinstance(node.factors[0], Power | Relation)
            and all(map(_is_part_of_name, node.factors))
        )
    if isinstance(node, Group):
        return all(isinstance(item, Symbol) for item in node.items)
    if isinstance(node, Ratio):
        return all(map(is_name, node.parts))
    return isinstance(node, Constant) and node.name == "i"


def _is_named_set_or_length(node: Node) -> bool:
    """Return whether |node| names a value: |AB|, |a + b| of vectors, |A union B|."""
    if isinstance(node, SetOperation):
        return all(map(_is_named_set_or_length, (node.left, node.right)))
    if isinstance(node, Sum):
        return all(is_name(_unsigned(term)) for term in node.terms)
    return is_name(node)


def _unsigned(term: Node) -> Node:
    match term:
        case Product((first, inner)) if first == MINUS_ONE:
            return inner
        case _:
            return term


_FORMULA = Symbol("a formula")
_NAMED_FUNCTIONS = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "max", "min", "gcd", "lcm", "arg", "Re", "Im"]
)
_COMBINATORIAL = re.compile(r"[CAP]_\d+")


def names_value(label: Node, value: Node) -> bool:
    """Return whether a side of an equation only names the value on the other side.

    A function of names does so for a constant (`sin A = 1/2`, but not `cos x = sin x`), and a
    formula of names for a matrix that is written out (`A^{-1} = ...`).
    """
    if is_name(label):
        return True
    if isinstance(value, Matrix):
        return _is_name_of_matrix(label)
    if not isinstance(label, Call) or symbols(value):
        return False
    if label.name not in _NAMED_FUNCTIONS and not label.name.startswith("formal "):
        return False
    return all(map(symbols, label.arguments))


def _is_name_of_matrix(node: Node) -> bool:
    """Return whether a formula has names only: A^{-1}, AB + C, but not 2A."""
    match node:
        case Symbol():
            return True
        case Power(base, Number()):
            return _is_name_of_matrix(base)
        case Product(parts) | Sum(parts) | Call("transpose", parts):
            return all(map(_is_name_of_matrix, parts))
        case _:
            return False


def _simplified_relation(node: Relation) -> Node:
    """Reduce a chain of equations to its value, and refuse contradictory chains."""
    parts, operators = list(node.parts), list(node.operators)
    if "~" in operators and set(operators) <= {"=", "~"}:
        return _rounded_chain(parts, operators)
    if operators == ["in"]:
        return Relation(tuple(simplified(part) for part in parts), node.operators)
    if set(operators) != {"="}:
        return node

    if len(parts) == 2 and names_value(parts[1], parts[0]) and not names_value(*parts):
        parts.reverse()
    named = names_value(parts[0], parts[-1])
    values = parts[1:] if named else parts
    if _name_several_variables(parts):
        value = simplified(parts[-1])
        names = parts[:-1]
        return Listing(tuple(Relation((name, value), ("=",)) for name in names), "and")

    # Two sides with a variable are an equation; any other chain states equal values.
    is_chain = named or len(parts) > 2 or not (_is_open(parts[0]) or _is_open(parts[1]))
    if len(values) > 1 and is_chain:
        values = _without_formulas(values)
        if not all(same_answer(values[0], value) for value in values[1:]):
            raise UnparsableError("a chain of different values")
        values = values[-1:]

    if len(values) > 1:
        return Relation(tuple(parts), ("=",))
    value = simplified(values[0])
    if not named:
        # 2x = 4 + 2 = 6 is 6, but it is not x = 6.
        is_formula = _is_open(parts[0]) and not _is_open(value)
        return Relation((_FORMULA, value), ("=",)) if is_formula else value
    if isinstance(parts[0], Group):
        return value
    if isinstance(value, Listing):
        return _named(parts[0], value)
    return Relation((parts[0], value), ("=",))


def _name_several_variables(parts: list[Node]) -> bool:
    """Return whether a chain gives one value to several variables: x = y = 4."""
    names = parts[:-1]
    if len(names) < 2 or symbols(parts[-1]) or len(set(names)) < len(names):
        return False
    return all(isinstance(name, Symbol) and name != REALS for name in names)


def _without_formulas(values: list[Node]) -> list[Node]:
    """Return a chain that ends in a constant without its formulas: pi r^2 of A = pi r^2 = 9 pi.

    A variable alone is no formula but a second name: x = y = 3 has two values.
    """
    if _is_open(values[-1]):
        return values
    return [value for value in values if not _is_formula(value)]


def _is_formula(node: Node) -> bool:
    is_function = isinstance(node, Call) and not is_name(node)
    return _is_open(node) and (is_function or isinstance(node, Sum | Product | Power))


def _is_open(node: Node) -> bool:
    """Return whether a node has a variable, or an unknown value such as f(2)."""
    if isinstance(node, Symbol) or (isinstance(node, Call) and node.name.startswith("undefined ")):
        return True
    return any(map(_is_open, children(node)))


def _rounded_chain(parts: list[Node], operators: list[str]) -> Node:
    """Return `2/3 ~ 0.67` as the exact and the rounded value; without a rounding that is wrong."""
    if len(parts) > 2 and set(operators[:-1]) == {"="}:
        exact_part = simplified(Relation(tuple(parts[:-1]), tuple(operators[:-1])))
        if isinstance(exact_part, Relation) and is_name(exact_part.parts[0]):
            exact_part = exact_part.parts[1]
        parts, operators = [exact_part, parts[-1]], operators[-1:]
    if is_name(parts[0]):
        parts, first = parts[1:], operators[0]
        operators = operators[1:]
        if len(parts) == 1:
            return Approximate(simplified(parts[0])) if first == "~" else simplified(parts[0])

    values = [_without_unit(simplified(part)) for part in parts]
    if len(values) != 2 or not isinstance(values[1], Number):
        raise UnparsableError("a wrong approximation")
    if not _rounds_to(values[0], values[1], minimum=1):
        return simplified(parts[0])  # a wrong rounding is no answer, but the exact value is one
    return Listing((parts[0], Approximate(parts[1])), "~")


def _without_unit(node: Node) -> Node:
    return node.value if isinstance(node, Measured) else node


def _equations(left: Node, right: Node) -> bool:
    """Compare x = 3 with 3, and equations that are multiples of each other."""
    if not isinstance(left, Relation) or left.operators != ("=",):
        return False
    if not isinstance(right, Relation):
        name, value = left.parts
        if not names_value(name, value):
            return False
        if isinstance(right, Ratio) and not isinstance(name, Ratio) and not _is_quotient(name):
            return False
        return same_answer(value, right)
    if right.operators != ("=",):
        return False

    first, second = left.parts[0], right.parts[0]
    if first == second and names_value(first, left.parts[1]):
        return same_answer(left.parts[1], right.parts[1])
    both_functions = _is_function_name(first) and _is_function_name(second)
    if both_functions and same_answer(_with_variable_of(second, left), right.parts[1]):
        return True

    try:
        return bool(same_equation(_difference(left), _difference(right), ordered=False))
    except UnparsableError:
        return False


def _is_quotient(node: Node) -> bool:
    match node:
        case Product((_, Power(_, exponent))):
            return exponent == MINUS_ONE
        case _:
            return False


def _is_function_name(node: Node) -> bool:
    """Return whether a side names a function: y or f(x), but not its value f(2)."""
    if isinstance(node, Call):
        of_variables = all(isinstance(argument, Symbol) for argument in node.arguments)
        return node.name.startswith("undefined ") and of_variables
    return node == Symbol("y")


def _with_variable_of(name: Node, equation: Relation) -> Node:
    """Return the right side of f(t) = 2t + 3 with the variable of another name, f(x)."""
    match name, equation.parts:
        case Call(first, (Symbol(wanted),)), (Call(second, (Symbol(variable),)), value):
            if first == second and wanted not in symbols(value):
                with suppress(UnparsableError):
                    return substitute(value, variable, Symbol(wanted))
    return equation.parts[1]


def _difference(node: Relation) -> Node:
    return Sum((node.parts[0], negative(node.parts[1])))


def _inequalities(left: Node, right: Node) -> bool:
    """Compare inequalities that are turned round or multiplied."""
    if not isinstance(left, Relation) or not isinstance(right, Relation):
        return False
    if len(left.operators) != 1 or len(right.operators) != 1:
        return False

    first, second = left.operators[0], right.operators[0]
    if first not in FLIPPED or second not in FLIPPED or "=" in (first, second):
        return False

    with suppress(UnparsableError, UndefinedError):
        if real_set(left) and real_set(right):
            return False  # the rule for sets decides, exactly

    try:
        sign = same_equation(_difference(left), _difference(right), ordered=True)
    except UnparsableError:
        return False
    if sign == 0:
        return False
    return first == (second if sign > 0 else FLIPPED[second])


def _assignments(left: Node, right: Node) -> bool:
    """Compare values of several variables, `x = 3, y = -1`, with the same, or without the names.

    `(3, -1)` has the values in the alphabetical order of the names, and `3, -1` has them as written
    on the other side. With several solutions (`x = 3, y = -1; x = 1, y = 2`) each is a tuple.
    """
    if not isinstance(left, Listing) or not _is_assigned(left):
        return False

    solutions = _solutions(left)
    if solutions is None:
        return isinstance(right, Listing) and _same_equations(left, right)
    if isinstance(right, Listing) and all(_is_equation(item) for item in right.items):
        others = _solutions(right) if _is_assigned(right) else None
        if others is None:
            return len(solutions) == 1 and _same_equations(left, right)
        return solutions[0].keys() == others[0].keys() and _same_multiset(
            [_as_tuple(solution) for solution in solutions],
            [_as_tuple(solution) for solution in others],
        )

    points = right.items if isinstance(right, Listing | SetOf) else (right,)
    named_points = len(solutions) == 1 and all(map(_is_tuple, solutions[0].values()))
    if all(map(_is_tuple, points)) and not named_points:
        return _same_multiset([_as_tuple(solution) for solution in solutions], points)
    if isinstance(right, Listing) and len(solutions) == 1:
        return _same_items(tuple(solutions[0].values()), right.items)
    return False


def _is_assigned(node: Node) -> bool:
    """Return whether a list gives the values of several variables."""
    if not isinstance(node, Listing) or not all(map(_is_assignment, node.items)):
        return False
    return len({children(item)[0] for item in node.items}) > 1


def _is_assignment(node: Node) -> bool:
    return isinstance(node, Relation) and _is_equation(node) and names_value(*node.parts)


def _solutions(node: Listing) -> list[dict[str, Node]] | None:
    """Return the values by name; a new solution begins where the first name is used again.

    None where the solutions have different names.
    """
    solutions: list[dict[str, Node]] = [{}]
    for item in node.items:
        name, value = children(item)
        if str(name) in solutions[-1]:
            solutions.append({})
        solutions[-1][str(name)] = value
    same_names = all(solution.keys() == solutions[0].keys() for solution in solutions)
    return solutions if same_names else None


def _as_tuple(solution: dict[str, Node]) -> Group:
    return Group("(", tuple(solution[name] for name in sorted(solution)), ")")


def _is_tuple(node: Node) -> bool:
    return isinstance(node, Group) and (node.opening, node.closing) in (("(", ")"), ("<", ">"))


def _same_equations(left: Listing, right: Listing) -> bool:
    return all(map(_is_equation, right.items)) and _same_multiset(left.items, right.items)


def _is_equation(node: Node) -> bool:
    return isinstance(node, Relation) and node.operators == ("=",)


# Sets, tuples, lists


def _sets(left: Node, right: Node) -> bool:
    """Compare sets of real numbers in any notation; finite ones are compared by their members."""
    infinite = Group | SetOperation | Relation
    if not isinstance(left, infinite | Listing) and left != REALS:
        return False
    match left:
        case Relation((_, SetOf() | Listing() as members), ("in",)):
            return same_answer(members, right)
    if isinstance(left, Group) and isinstance(right, Group):
        return False  # two pairs are compared as pairs
    if not isinstance(right, infinite | Listing | SetOf) and right != REALS:
        return False

    try:
        return same_set(real_set(left), real_set(right))
    except (UnparsableError, UndefinedError):
        return False


def _memberships(left: Node, right: Node) -> bool:
    """Compare `k in Z` with `k in Z`, or with Z."""
    if not isinstance(left, Relation) or left.operators != ("in",):
        return False
    if isinstance(right, Relation) and right.operators == ("in",):
        return _same_items(left.parts, right.parts)
    return isinstance(right, Symbol) and left.parts[1] == right


def _finite_sets(left: Node, right: Node) -> bool:
    if not isinstance(left, SetOf):
        return False

    is_rounding = isinstance(right, Listing) and right.separator == "~"
    if not isinstance(right, Listing | SetOf) or is_rounding:
        if len(left.items) != 1 or left.items[0] == EMPTY_SET:
            return False
        if isinstance(right, Group | Matrix | SetOperation):
            return False
        return same_answer(left.items[0], right)

    if _is_assigned(right):
        return False  # a set does not say which value belongs to which variable
    _bound(left.items, right.items)
    if not left.items or not right.items:
        return not left.items and not right.items
    if not all(any(_item(a, b) for b in right.items) for a in left.items):
        return False
    return all(any(_item(a, b) for a in left.items) for b in right.items)


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
    if left.separator == "~":  # an exact and a rounded value
        if isinstance(right, Listing):
            return _same_items(left.items, right.items)
        return any(_item(item, right) for item in left.items)
    if not isinstance(right, Listing) or _is_assigned(left) or _is_assigned(right):
        return False  # values of several variables have a rule of their own
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
    """Compare tuples, vectors and intervals with the same brackets; <...> counts as (...)."""
    if not isinstance(left, Group) or not isinstance(right, Group):
        return False

    first, second = _brackets(left), _brackets(right)
    # With more than two items there is no interval, and [1, 2, 3] is the vector (1, 2, 3).
    both_vectors = len(left.items) > 2 and {first, second} == {("(", ")"), ("[", "]")}
    if first != second and not both_vectors:
        return False
    return _same_items(left.items, right.items)


def _brackets(group: Group) -> tuple[str, str]:
    shape = {"<": "(", ">": ")"}
    return shape.get(group.opening, group.opening), shape.get(group.closing, group.closing)


# Matrices


def as_matrix(node: Node) -> Matrix | None:
    """Evaluate sums, products and transposes of matrices and vectors; None for anything else."""
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
            return _product_of_matrices(factors) or _unit_vectors(node)
        case Power(base, Number(exponent, _)):
            return _power_of_matrix(base, exponent)
        case Sum(terms):
            return _sum_of_matrices(terms) or _unit_vectors(node)
        case _:
            return _unit_vectors(node)


def _product_of_matrices(factors: tuple[Node, ...]) -> Matrix | None:
    """Return the product of numbers and matrices; None where the shapes do not fit."""
    matrices = [as_matrix(factor) if _holds_matrix(factor) else None for factor in factors]
    present = [matrix for matrix in matrices if matrix is not None]
    unknown = any(
        matrix is None and _holds_matrix(factor)
        for factor, matrix in zip(factors, matrices, strict=True)
    )
    if unknown or not present:
        return None

    product = present[0]
    for matrix in present[1:]:
        multiplied = _multiplied(product, matrix)
        if multiplied is None:
            return None
        product = multiplied

    scalars = [factor for factor, m in zip(factors, matrices, strict=True) if m is None]
    if not scalars:
        return product
    scalar = Product(tuple(scalars))
    rows = tuple(tuple(Product((scalar, cell)) for cell in row) for row in product.rows)
    return Matrix(rows, product.determinant)


def _multiplied(left: Matrix, right: Matrix) -> Matrix | None:
    columns = tuple(zip(*right.rows, strict=True))
    if len(left.rows[0]) != len(right.rows) or left.determinant or right.determinant:
        return None
    if max(len(left.rows), len(right.rows), len(columns)) > MAX_MATRIX_SIDE:
        raise TooLargeError
    rows = [[_inner_product(row, column) for column in columns] for row in left.rows]
    if sum(_size(cell) for row in rows for cell in row) > MAX_MATRIX_NODES:
        raise TooLargeError
    return Matrix(tuple(map(tuple, rows)))


def _size(node: Node) -> int:
    return 1 + sum(map(_size, children(node)))


def _inner_product(first: tuple[Node, ...], second: tuple[Node, ...]) -> Node:
    """Return the sum of the products; a constant as a number, which keeps long products small."""
    total = Sum(tuple(Product(pair) for pair in zip(first, second, strict=True)))
    value = exact(total)
    return total if value is None else Number(value)


def _power_of_matrix(base: Node, exponent: Fraction) -> Matrix | None:
    matrix = as_matrix(base) if _holds_matrix(base) else None
    if exponent == -1:
        return _inverse(matrix) if matrix else None
    if exponent.denominator != 1 or not 0 < exponent <= MAX_MATRIX_EXPONENT:
        return None
    power = matrix
    for _ in range(int(exponent) - 1):
        power = _multiplied(power, matrix) if power and matrix else None
    return power


def _inverse(matrix: Matrix) -> Matrix | None:
    """Return the inverse of a matrix of rational numbers, by Gauss and Jordan; None without one."""
    side = len(matrix.rows)
    if side > MAX_MATRIX_SIDE or len(matrix.rows[0]) != side or matrix.determinant:
        return None

    rows: list[list[Fraction]] = []
    for index, cells in enumerate(matrix.rows):
        values = [exact(cell) for cell in cells]
        known = [value for value in values if value is not None]
        if len(known) < side:
            return None
        rows.append([*known, *(Fraction(int(index == column)) for column in range(side))])

    for column in range(side):
        pivot = next((i for i in range(column, side) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = rows[column][column]
        rows[column] = [value / scale for value in rows[column]]
        for i in set(range(side)) - {column}:
            factor = rows[i][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return Matrix(tuple(tuple(map(Number, row[side:])) for row in rows))


def _sum_of_matrices(terms: tuple[Node, ...]) -> Matrix | None:
    matrices = [as_matrix(term) if _holds_matrix(term) else None for term in terms]
    present = [matrix for matrix in matrices if matrix is not None]
    shapes = {(len(matrix.rows), len(matrix.rows[0])) for matrix in present}
    if len(present) < len(matrices) or len(shapes) != 1:
        return None

    rows = []
    for same_row in zip(*(matrix.rows for matrix in present), strict=True):
        rows.append(tuple(Sum(cells) for cells in zip(*same_row, strict=True)))
    return Matrix(tuple(rows))


def holds_matrix_product(node: Node) -> bool:
    """Return whether a node holds a product or a power of matrices that is left uncomputed."""
    match node:
        case Product(factors) if any(map(_written_matrix, factors)):
            return sum(map(_holds_matrix, factors)) > 1
        case Power(base, _) if _written_matrix(base):
            return True
        case _:
            return any(map(holds_matrix_product, children(node)))


def _written_matrix(node: Node) -> bool:
    return isinstance(node, Matrix) or any(map(_written_matrix, children(node)))


def _holds_matrix(node: Node) -> bool:
    return isinstance(node, Matrix | Group) or any(_holds_matrix(child) for child in children(node))


def _unit_vectors(node: Node) -> Matrix | None:
    """Return 2 i + 3 j, with bold or hatted letters, as a column vector."""
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
    if isinstance(node, Group | Listing | Relation | SetOf | SetOperation):
        return False
    return _holds_matrix(node) or _has_unit_vectors(node)


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
    """Accept 90 for 90 degrees and 50 for 50 %.

    A bare number below 1 is no percentage, and neither is a fraction: 0.5 is not 0.5 %, and 9/2 is
    not 4 1/2 %, but 4 1/2 and 4.5 are.
    """
    for marked, bare in ((left, right), (right, left)):
        if _mark(marked) == "degree" and not _mark(bare):
            return same_value(_unmarked(marked), bare)
        if _mark(marked) == "percent" and not _mark(bare):
            plain = _unmarked(marked)
            if abs(real_value(plain)) < 1 or _is_fraction(bare):
                return False
            return same_value(plain, bare)
    return False


def _is_fraction(node: Node) -> bool:
    """Return whether a node is a fraction, and neither a decimal nor a mixed number."""
    value = exact(node)
    if value is None or value.denominator == 1:
        return False
    return not isinstance(node, Number) or not (node.decimals or node.mixed)


def _mark(node: Node) -> str:
    """Return the mark on a whole value, looking through sums and factors but not into functions."""
    if isinstance(node, Marked):
        return node.mark
    if isinstance(node, Sum | Product):
        for child in children(node):
            mark = _mark(child)
            if mark:
                return mark
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
    """Compare measured values.

    A unit may be left out. Two known units must be of one dimension, and are converted.
    """
    if not isinstance(left, Measured):
        return False
    if not isinstance(right, Measured):
        return _with_and_without_unit(left, right)

    first, second = parse_unit(left.unit), parse_unit(right.unit)
    if first is None or second is None:
        return _item(left.value, right.value)
    if first[0] != second[0]:
        return False
    if first[1] == second[1]:
        return _item(left.value, right.value)
    if not isinstance(left.value, _EXPRESSIONS) or not isinstance(right.value, _EXPRESSIONS):
        return False
    left_size = Product((left.value, Number(first[1])))
    right_size = Product((right.value, Number(second[1])))
    return same_value(left_size, right_size)


def _with_and_without_unit(left: Measured, right: Node) -> bool:
    unit = parse_unit(left.unit)
    is_expression = isinstance(right, _EXPRESSIONS)
    if _mark(right) == "degree" and unit == _RADIAN:
        return isinstance(left.value, _EXPRESSIONS) and same_value(left.value, right)
    if not is_expression and _holds_unit(right):
        return False  # a relation or a rounding; the rules for those look inside
    if is_expression and _mark(right) and unit is not None:
        return False  # dollars and percents
    return _item(left.value, right)


def _rounds_to(value: Node, rounded: Number, *, minimum: int) -> bool:
    """Return whether `rounded` is `value`, to the decimals that it is written with.

    It must have at least `minimum` significant digits.
    """
    decimals = rounded.decimals or 0
    digits = str(abs(int(rounded.value * 10**decimals))).lstrip("0")
    if decimals == 0 or len(digits) < minimum:
        return False
    try:
        number = real_value(value)
    except UnparsableError:
        return False

    denominator = real_value(Number(Fraction(rounded.value.denominator)))
    distance = abs(number - rounded.value.numerator / denominator)
    half_a_unit = real_value(Number(Fraction(1, 2 * 10**decimals)))
    return bool(distance <= half_a_unit * (1 + 1e-12))


def _roundings(left: Node, right: Node) -> bool:
    """Compare an approximate value with a value that rounds to it."""
    if not isinstance(left, Approximate):
        return False
    value = left.value
    other = right.value if isinstance(right, Approximate) else right
    if isinstance(other, Listing) and other.separator == "~":
        return any(_item(left, item) for item in other.items)
    if _item(value, other):
        return True
    if _different_units(value, other):
        return False

    plain, against = _without_unit(value), _without_unit(other)
    if _mark(plain) != _mark(against):
        return False
    if not isinstance(plain, Number) or not isinstance(against, _EXPRESSIONS) or symbols(against):
        return False
    is_decimal = isinstance(against, Number) and against.decimals is not None
    minimum = MIN_DIGITS_OF_DECIMAL if is_decimal else MIN_DIGITS_OF_EXACT
    return _rounds_to(against, plain, minimum=minimum)


def _long_decimal(node: Node) -> Number | None:
    """Return a decimal with so many digits that it must be a rounding; None for anything else.

    33.3333333333333 % and 3.33333333333333 * 10^{-1} are such decimals too.
    """
    match node:
        case Marked(Number(value, int(decimals)), "percent"):
            node = Number(value / 100, decimals + 2)
        case Product((Number(value, int(decimals)), Power(Number(base, _), Number(exponent, _)))):
            if base != 10 or exponent.denominator != 1 or abs(exponent) > MAX_POWER_OF_DECIMAL:
                return None
            node = Number(value * base**exponent.numerator, max(decimals - exponent.numerator, 0))
    if not isinstance(node, Number) or not node.decimals:
        return None
    is_long = abs(node.value) * 10**node.decimals >= 10 ** (MIN_DIGITS_OF_ROUNDED - 1)
    return node if is_long else None


def _long_decimals(left: Node, right: Node) -> bool:
    """Compare 0.0833333333333333 with 1/12: with what it rounds, but with no other decimal.

    The last digit may be off by one, and only as many digits as a double has must agree.
    """
    decimal = _long_decimal(left)
    if decimal is None or not isinstance(right, _EXPRESSIONS) or symbols(right):
        return False
    if _mark(right) == "percent":
        right = Product((_unmarked(right), Number(Fraction(1, 100))))
    is_short = isinstance(right, Number) and (right.decimals or right.value.denominator == 1)
    if is_short or _holds_unit(right):
        return False

    unit = Fraction(1, 10 ** (decimal.decimals or 0))
    tolerance = max(unit, abs(decimal.value) / 10**DIGITS_OF_DOUBLE)
    try:
        distance = abs(real_value(Number(decimal.value)) - real_value(right))
    except (UnparsableError, UndefinedError, TooLargeError):
        return False
    return bool(distance <= real_value(Number(tolerance)))


_INTEGERS = frozenset({"the set Z", "the set N", "Z", "N"})


def _family(node: Node) -> tuple[Node, str, str] | None:
    """Return the members, parameter and set of `pi/4 + k pi, k in Z`; None for anything else."""
    if not isinstance(node, Listing) or len(node.items) < 2:
        return None
    match node.items[-1]:
        case Relation((Symbol(parameter), Symbol(integers)), ("in",)) if integers in _INTEGERS:
            members = node.items[:-1]
            if not all(parameter in symbols(item) for item in members):
                return None
            rest = members[0] if len(members) == 1 else Listing(members, node.separator)
            return simplified(rest), parameter, integers.removeprefix("the set ")
        case _:
            return None


def _families(left: Node, right: Node) -> bool:
    """Compare solutions for every integer; the parameter's name is free where both name its set."""
    first, second = _family(left), _family(right)
    if first is None:
        return False
    members, parameter, integers = first
    if second is None:
        return same_answer(members, right)

    others, other_parameter, other_integers = second
    if integers != other_integers or parameter in symbols(others) - {other_parameter}:
        return False
    try:
        return same_answer(members, _renamed(others, other_parameter, parameter))
    except UnparsableError:
        return False


def _renamed(node: Node, old: str, new: str) -> Node:
    match node:
        case Relation(parts, operators):
            return Relation(tuple(_renamed(part, old, new) for part in parts), operators)
        case Listing(items, separator):
            return Listing(tuple(_renamed(item, old, new) for item in items), separator)
        case Group(opening, items, closing):
            return Group(opening, tuple(_renamed(item, old, new) for item in items), closing)
        case _:
            return substitute(node, old, Symbol(new))


def _ratios(left: Node, right: Node) -> bool:
    if not isinstance(left, Ratio):
        return False
    if not isinstance(right, Ratio):
        if len(left.parts) != 2 or not isinstance(right, _EXPRESSIONS):
            return False
        above, below = left.parts
        return _item(Product((above, Power(below, Number(Fraction(-1))))), right)
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
    _long_decimals,
    _families,
)
