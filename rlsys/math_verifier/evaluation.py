"""Values of expressions, and the comparison of two expressions by their values.

Rational constants are compared exactly. Everything else is evaluated with 50 digits (more where
cancellation has eaten too many) at a few points. The points are drawn from the variables' names, so
the same two expressions are always evaluated at the same points. Different expressions that agree
to 30 digits at three such points are not found among answers. Equal ones always agree, whatever
their form, and no rewriting can run away. In exchange nothing is proven: an identity is accepted on
evidence.

**Conventions**: variables are real, and a point counts where both sides are real
(`sqrt(x) sqrt(y)` is `sqrt(xy)`); where no such point is found, principal complex values decide.
Odd roots of negative numbers are real. `log` without a base is natural or decimal, the same on both
sides. A degree sign is pi/180.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rlsys.math_verifier.limits import (
    MAX_EXACT_BITS,
    MAX_FACTORIAL,
    MAX_MAGNITUDE_DIGITS,
    TooLargeError,
    UndefinedError,
    UnparsableError,
)
from rlsys.math_verifier.nodes import (
    Call,
    Constant,
    Marked,
    Node,
    Number,
    Numeral,
    Power,
    Product,
    Sum,
    Symbol,
    children,
    symbols,
)

# Digits of an evaluation; the next number where the last one left nothing but rounding errors.
DIGITS = (50, 150, 2200)
POINTS = 3  # at which two expressions must agree
# Ranges of the variables: both signs, and large enough for radicands such as x - 20.
_RANGES = (
    (0.3, 2.5),
    (-2.5, 2.5),
    (3.0, 9.0),
    (-3.0, -0.2),
    (-9.0, 9.0),
    (20.0, 60.0),
    (-60.0, -20.0),
    (0.01, 0.3),
    (0.5, 0.99),
    (-0.99, 0.99),
)


def exact(node: Node) -> Fraction | None:
    """Return the exact value of a rational constant; None for anything else.

    Raises:
        TooLargeError: it is rational but too long to write down.
        UndefinedError: a zero denominator.
    """
    match node:
        case Number(value, _):
            return value
        case Numeral(digits, base):
            return Fraction(int(digits, base))
        case Sum(terms):
            return _exact_sum(terms)
        case Product(factors):
            return _exact_product(factors)
        case Power(base, exponent):
            return _exact_power(exact(base), exact(exponent))
        case Call(name, arguments):
            return _exact_call(name, [exact(argument) for argument in arguments])
        case Marked(value, "percent"):
            inner = exact(value)
            return None if inner is None else inner / 100
        case _:
            return None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_EXACT_BITS:
        raise TooLargeError
    return value


def _exact_sum(terms: tuple[Node, ...]) -> Fraction | None:
    # Every term is evaluated, also after one without an exact value: a later one may be undefined.
    values = [exact(term) for term in terms]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return _bounded(sum(known, Fraction(0)))


def _exact_product(factors: tuple[Node, ...]) -> Fraction | None:
    product = Fraction(1)
    for factor in factors:
        value = exact(factor)
        if value is None:
            return None
        product = _bounded(product * value)
    return product


def _exact_power(base: Fraction | None, exponent: Fraction | None) -> Fraction | None:
    if base is None or exponent is None or exponent.denominator != 1:
        return None

    power = exponent.numerator
    if base == 0 and power <= 0:
        raise UndefinedError
    if base in (0, 1) or power == 0:
        return base**0 if power == 0 else base
    if base == -1:
        return base if power % 2 else -base

    # The size is known before the power is computed.
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(power) > MAX_EXACT_BITS:
        raise TooLargeError
    return base**power


def _exact_call(name: str, values: list[Fraction | None]) -> Fraction | None:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None

    whole = [value.numerator for value in numbers if value.denominator == 1]
    if name == "abs" and len(numbers) == 1:
        return abs(numbers[0])
    if name in ("floor", "ceil") and len(numbers) == 1:
        rounded = math.floor(numbers[0]) if name == "floor" else math.ceil(numbers[0])
        return Fraction(rounded)
    if name in ("max", "min") and numbers:
        return max(numbers) if name == "max" else min(numbers)

    # The other functions take integers.
    if len(whole) != len(numbers) or not whole:
        return None
    return _exact_integer_call(name, whole)


def _exact_integer_call(name: str, whole: list[int]) -> Fraction | None:
    if name in ("gcd", "lcm"):
        value = math.gcd(*whole) if name == "gcd" else math.lcm(*whole)
        return _bounded(Fraction(value))
    if name in ("factorial", "double factorial") and whole[0] >= 0:
        if whole[0] > MAX_FACTORIAL:
            raise TooLargeError
        if name == "factorial":
            return Fraction(math.factorial(whole[0]))
        return Fraction(math.prod(range(whole[0], 0, -2)))
    if name == "binomial" and len(whole) == 2 and whole[0] >= 0:
        if whole[0] > MAX_FACTORIAL:
            raise TooLargeError
        if whole[1] < 0:
            return Fraction(0)
        return Fraction(math.comb(whole[0], whole[1]))
    return None


@lru_cache(maxsize=8)
def _context(digits: int) -> Any:
    from mpmath import MPContext  # only some answers need it, and it takes a while to import

    context = MPContext()
    context.dps = digits
    return context


class Evaluator:
    """High-precision values of one expression after another at one point.

    `scale` is the largest number met on the way.
    """

    def __init__(
        self,
        point: dict[str, float],
        *,
        digits: int = DIGITS[0],
        real: bool = True,
        log_base: int | None = None,
    ) -> None:
        self.context = _context(digits)
        self.context.dps = digits  # an interrupted function may have left another
        self._point = {name: self.context.mpf(value) for name, value in point.items()}
        self._real = real
        self._log_base = log_base
        self.scale = self.context.mpf(1)

    def value(self, node: Node) -> Any:
        """Return the value of a node.

        Raises:
            UndefinedError: there is none, or none in the reals.
            TooLargeError: it is beyond the limits.
            UnparsableError: the node is not an expression.
        """
        match node:
            case Number() | Numeral() | Constant():
                result = self._constant(node)
            case Symbol(name):
                if name not in self._point:
                    raise UnparsableError(f"{name} is not a variable")
                result = self._point[name]
            case Sum(terms):
                result = self._sum(terms)
            case Product(factors):
                result = self._product(factors)
            case Power(base, exponent):
                result = self._power(base, exponent)
            case Call(name, arguments):
                result = self._call(name, arguments)
            case Marked(inner, "degree"):
                result = self.value(inner) * (self.context.pi / 180)
            case Marked(inner, _):  # percent
                result = self.value(inner) * (self.context.mpf(1) / 100)
            case _:
                raise UnparsableError("not an expression")
        return self._checked(result)

    def _sum(self, terms: tuple[Node, ...]) -> Any:
        result = self.context.mpf(0)
        for term in terms:
            result += self.value(term)
        return result

    def _product(self, factors: tuple[Node, ...]) -> Any:
        result = self.context.mpf(1)
        for factor in factors:
            result *= self.value(factor)
        return result

    def _checked(self, result: Any) -> Any:
        if not self.context.isfinite(result):
            raise UndefinedError

        magnitude = self.context.mag(result)
        limit = MAX_MAGNITUDE_DIGITS * 3.33  # bits
        if magnitude > limit:
            raise TooLargeError
        if result != 0 and magnitude < -limit and not self._cancelled(magnitude):
            raise TooLargeError

        size = abs(result)
        if size > self.scale:
            self.scale = size
        return result

    def _cancelled(self, magnitude: int) -> bool:
        """Return whether so small a result may be what rounding left of zero."""
        return magnitude < self.context.mag(self.scale) - self.context.prec + 40

    def _rational(self, value: Fraction) -> Any:
        return self.context.mpf(value.numerator) / value.denominator

    def _constant(self, node: Number | Numeral | Constant) -> Any:
        match node:
            case Number(value, _):
                return self._rational(value)
            case Numeral(digits, base):
                return self.context.mpf(int(digits, base))
            case Constant("i"):
                if self._real:
                    raise UndefinedError
                return self.context.mpc(0, 1)
            case Constant("infinity"):
                raise UndefinedError
            case Constant("pi"):
                return +self.context.pi
            case _:
                return self.context.e + 0

    def _real_number(self, value: Any) -> bool:
        return value == value.real and not isinstance(value, self.context.mpc)

    def _power(self, base_node: Node, exponent_node: Node) -> Any:
        base = self.value(base_node)
        fraction = _rational_exponent(exponent_node)
        exponent = self.value(exponent_node) if fraction is None else self._rational(fraction)

        if base == 0:
            if self._is_positive(exponent):
                return self.context.mpf(0)
            raise UndefinedError

        # An estimate of the result's bits, before the power is computed.
        bits = abs(exponent) * abs(self.context.mag(base) + 1)
        if bits > MAX_MAGNITUDE_DIGITS * 3.33 and abs(exponent) > 2:
            raise TooLargeError

        if fraction is not None and fraction.denominator == 1:
            return base ** int(fraction.numerator)
        if fraction is not None:
            return self._root(base, fraction)

        if self._real and base.real < 0:
            if exponent == int(exponent.real):
                return base ** int(exponent.real)
            raise UndefinedError
        return self.context.power(base, exponent)

    def _is_positive(self, exponent: Any) -> bool:
        return exponent.real > 0

    def _root(self, base: Any, exponent: Fraction) -> Any:
        """Return base^(p/q): real for odd q."""
        power = self._rational(exponent)
        is_real = not isinstance(base, self.context.mpc) or base.imag == 0
        if not is_real or base.real >= 0:
            return self.context.power(base, power)

        if exponent.denominator % 2:
            magnitude = self.context.power(-base.real, power)
            return -magnitude if exponent.numerator % 2 else magnitude
        if self._real:
            raise UndefinedError
        return self.context.power(self.context.mpc(base.real, 0), power)

    def _call(self, name: str, arguments: tuple[Node, ...]) -> Any:
        if name == "root":
            degree = exact(arguments[1])
            if degree is not None and degree.denominator == 1 and 0 < degree.numerator < 1000:
                base = self.value(arguments[0])
                return base if base == 0 else self._root(base, Fraction(1, degree.numerator))
            return self._power(arguments[0], Power(arguments[1], Number(Fraction(-1))))

        if name in _EXACT_FUNCTIONS:
            constant = _exact_call(name, [exact(argument) for argument in arguments])
            if constant is not None:
                return self._rational(constant)

        values = [self.value(argument) for argument in arguments]
        if name.startswith(("undefined ", "formal ")):
            return self._undefined(name, values)
        if name == "log":
            return self._log(values)
        if name in _TWO_ARGUMENTS and len(values) == 2:
            return self._two_arguments(name, *values)
        if len(values) != 1:
            raise UnparsableError(f"{name} of {len(values)} arguments")
        return self._one_argument(name, values[0])

    def _undefined(self, name: str, values: list[Any]) -> Any:
        """Return some function of the arguments that no identity relates to another."""
        generator = random.Random(name)
        total = self.context.mpf(generator.uniform(1, 2))
        for value in values:
            if abs(value) > 10**6:
                raise TooLargeError
            wave = self.context.sin(value * self.context.mpf(generator.uniform(0.5, 1)))
            slope = self.context.mpf(generator.uniform(1, 2))
            total += wave + value * slope
        return total

    def _log(self, values: list[Any]) -> Any:
        for value in values:
            self._require(value != 0 and (value.real > 0 or not self._real))

        if len(values) == 2:
            base = self.context.log(values[1])
        elif len(values) != 1:
            raise UnparsableError("log of many arguments")
        elif self._log_base:
            base = self.context.log(self._log_base)
        else:
            base = self.context.mpf(1)  # natural

        if base == 0:
            raise UndefinedError
        return self.context.log(values[0]) / base

    def _require(self, condition: bool) -> None:
        if not condition:
            raise UndefinedError

    def _two_arguments(self, name: str, first: Any, second: Any) -> Any:
        if name == "binomial":
            self._require(abs(first) < MAX_FACTORIAL and abs(second) < MAX_FACTORIAL)
            return self.context.binomial(first, second)

        self._require(self._is_real(first) and self._is_real(second))
        return max(first.real, second.real) if name == "max" else min(first.real, second.real)

    def _is_real(self, value: Any) -> bool:
        return not isinstance(value, self.context.mpc) or value.imag == 0

    def _one_argument(self, name: str, value: Any) -> Any:
        context = self.context
        if name == "abs":
            return abs(value)
        if name == "conjugate":
            return context.conj(value)
        if name in ("ln", "lg"):
            self._require(value != 0 and (value.real > 0 or not self._real))
            return context.log(value) if name == "ln" else context.log(value) / context.log(10)
        if name == "factorial":
            return self._factorial(value)
        if name in ("floor", "ceil"):
            self._require(self._is_real(value))
            return context.floor(value.real) if name == "floor" else context.ceil(value.real)
        if name in ("Re", "Im", "arg"):
            return {"Re": context.re, "Im": context.im, "arg": context.arg}[name](value)
        return self._library_function(name, value)

    def _factorial(self, value: Any) -> Any:
        self._require(abs(value) < MAX_FACTORIAL)
        # The gamma function has poles at the negative integers.
        if self._is_real(value) and value.real < 0:
            self._require(value.real != int(value.real))
        return self.context.gamma(value + 1)

    def _library_function(self, name: str, value: Any) -> Any:
        function = _FUNCTIONS.get(name)
        if function is None:
            raise UnparsableError(f"function {name}")
        if abs(value) > 10**4 and name in ("sinh", "cosh", "cis"):
            raise TooLargeError

        if self._real and name in ("arcsin", "arccos"):
            self._require(abs(value) <= 1)
        if self._real and name in ("arcsec", "arccsc"):
            self._require(abs(value) >= 1)

        try:
            return getattr(self.context, function)(value)
        except (ZeroDivisionError, ValueError):
            raise UndefinedError from None


_EXACT_FUNCTIONS = frozenset(
    {"floor", "ceil", "factorial", "double factorial", "binomial", "gcd", "lcm", "max", "min"}
)
_TWO_ARGUMENTS = frozenset({"binomial", "max", "min"})
# Our names of functions -> mpmath's.
_SAME_NAMES = "sin cos tan cot sec csc sinh cosh tanh coth exp cbrt"
_FUNCTIONS = {name: name for name in _SAME_NAMES.split()} | {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arccot": "acot",
    "arcsec": "asec",
    "arccsc": "acsc",
    "cis": "expj",
}


def _rational_exponent(node: Node) -> Fraction | None:
    try:
        return exact(node)
    except UndefinedError:
        return None


def uses_plain_log(node: Node) -> bool:
    """Return whether a logarithm without a base occurs."""
    if isinstance(node, Call) and node.name == "log" and len(node.arguments) == 1:
        return True
    return any(uses_plain_log(child) for child in children(node))


def same_value(left: Node, right: Node) -> bool:
    """Decide whether two expressions are equal.

    Raises:
        UnparsableError: one of them is not an expression.
        TooLargeError, UndefinedError: it could not be decided.
    """
    if left == right:
        return True
    left_exact, right_exact = exact(left), exact(right)
    if left_exact is not None and right_exact is not None:
        return left_exact == right_exact

    names = symbols(left) | symbols(right)
    has_plain_log = uses_plain_log(left) or uses_plain_log(right)
    bases = (None, 10) if has_plain_log else (None,)
    return any(_same_at_points(left, right, names, base) for base in bases)


def _same_at_points(left: Node, right: Node, names: frozenset[str], log_base: int | None) -> bool:
    for real in (True, False):
        agreed = 0
        for point in points(names):
            try:
                same = _same_at(left, right, point, real, log_base)
            except UndefinedError:
                continue
            if not same:
                return False
            agreed += 1
            if agreed == POINTS or not names:
                return True
        if agreed:
            return True
    raise UndefinedError


def points(names: frozenset[str]) -> Iterator[dict[str, float]]:
    """Yield points at which to evaluate expressions in these variables: always the same ones."""
    if not names:
        yield {}
        return
    for number, (low, high) in enumerate(_RANGES):
        yield {name: random.Random(f"{name} {number}").uniform(low, high) for name in names}


def _same_at(
    left: Node, right: Node, point: dict[str, float], real: bool, log_base: int | None
) -> bool:
    same = False
    # Digits that cancellation may eat: those before the point of the largest number on the way.
    lost = 0
    for digits in DIGITS:
        evaluator = Evaluator(point, digits=digits + lost, real=real, log_base=log_base)
        first = evaluator.value(left)
        second = evaluator.value(right)

        difference = abs(first - second)
        size = max(abs(first), abs(second))
        noise = evaluator.scale * evaluator.context.mpf(10) ** (12 - digits - lost)
        same = bool(difference <= noise)
        if not same and size > noise * 10**10:
            return False

        # Equal, or both are too close to zero to tell with so many digits.
        needed = max(int(evaluator.context.mag(evaluator.scale) / 3.32) + 1, 0)
        if size > noise * 10**10 and needed <= lost + 12:
            return True
        lost = needed
    return same  # no number may be this small but not zero


def real_value(node: Node) -> Any:
    """Return the value of a real constant, for ordering. Raises as `same_value` does."""
    value = exact(node)
    if value is not None:
        return _context(DIGITS[0]).mpf(value.numerator) / value.denominator

    evaluator = Evaluator({})
    result = evaluator.value(node)
    if evaluator.scale > 10**30 and evaluator.scale > abs(result) * 10**30:
        raise TooLargeError  # its digits may all be wrong
    return result
