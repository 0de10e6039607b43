"""The parser: turns tokens into the tree of an answer.

Recursive descent, one method per level of precedence.

```text
answer    = clause (("," | ";" | "and" | "or") clause)*          several answers
clause    = set (("=" | "<" | "in" | ...) set)*                  equation, inequalities, membership
set       = ratio (("union" | "intersection" | "difference") ratio)*
ratio     = sum (":" sum)*
sum       = product (("+" | "-" | "+-" | "-+") product)*
product   = signed (("*" | "/")? signed)*                        juxtaposition multiplies
power     = primary ("^" exponent | "!" | "%" | degree | unit)*
```
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from rlsys.math_verifier.lexer import FUNCTIONS, SCALE_WORDS, Token, tokenize
from rlsys.math_verifier.limits import MAX_DEPTH, UnparsableError
from rlsys.math_verifier.nodes import (
    EMPTY_SET,
    INFINITY,
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
    negative,
)  # fmt: skip
from rlsys.math_verifier.units import parse_unit
from rlsys.math_verifier.words import plain

_RELATIONS = frozenset({"=", "!=", "<", "<=", ">", ">=", "in", "not in", "~"})
_SIGNS = frozenset({"+", "-", "+-", "-+"})
_SET_OPERATIONS = frozenset({"union", "intersection", "difference"})
_SEPARATORS = frozenset({",", ";", "and", "or", "\\\\"})
_CLOSERS = {"(": (")", "]"), "[": ("]", ")", "["), "]": ("[", "]"), "<|": ("|>",), "<": (">",)}
_INVERSE = {
    "sin": "arcsin",
    "cos": "arccos",
    "tan": "arctan",
    "cot": "arccot",
    "sec": "arcsec",
    "csc": "arccsc",
}
_SYNONYMS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "smallmatrix", "array", "Bmatrix", "vmatrix"}
FILLERS = frozenset({
    "the", "answer", "is", "final", "so", "thus", "are", "equals", "approximately", "about",
    "roughly", "nearly", "at", "exactly", "interval", "for",
})  # fmt: skip
_INTRODUCTIONS = frozenset({"is", "equals", "are", "be"})  # "the probability is ..."
_ROUNDED = frozenset(["approximately", "about", "roughly", "nearly"])
_BASE_WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
_FUNCTION_LETTERS = frozenset("fgFG")
_PROBABILITIES = frozenset({"P", "p", "Pr", "E", "the set P", "the set E"})  # of A | B
_SYSTEMS = frozenset({"array", "aligned", "gathered"})
MAX_SCIENTIFIC_EXPONENT = 4000


def readings(text: str, *, decimal_comma: bool = False) -> list[Node]:
    """Return the ways to read an answer.

    There is one, or two where a comma may separate thousands or answers (`1,234`). With
    `decimal_comma` the comma of a single number may also be a decimal point, unless it may separate
    thousands: `2,74` is 2.74 as well as the list of 2 and 74.

    Raises:
        UnparsableError: it is not a mathematical answer.
    """
    with_point = _with_decimal_point(text) if decimal_comma else None
    if with_point is None:
        return _readings(text)
    try:
        return [*_readings(text), parse(with_point)]
    except UnparsableError:
        return [parse(with_point)]


_DECIMAL_COMMA = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d{3})+|\d+),(\d+)(?![\d.])", re.ASCII)


def _with_decimal_point(text: str) -> str | None:
    """Return `1.000,5`, `2,74 $` and `(0,5; 1,5)` with points; None for anything else."""
    numbers = list(_DECIMAL_COMMA.finditer(text))
    if not numbers or len(numbers) < text.count(","):
        return None
    # In a list or a tuple only where something else separates: 0,5; 1,5.
    is_one_number = len(numbers) == 1 and not any(bracket in text for bracket in "()[]")
    if not is_one_number and not _SEPARATED.search(text):
        return None
    if any(map(_separates_thousands, numbers)):
        return None
    return _DECIMAL_COMMA.sub(lambda number: f"{number[1].replace('.', '')}.{number[2]}", text)


_SEPARATED = re.compile(r";|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|\\(?:cup|cap|lor|land)")


def _separates_thousands(number: re.Match[str]) -> bool:
    whole, decimals = number.groups()
    return (
        len(decimals) == 3 and whole.isdecimal() and len(whole) <= 3 and not whole.startswith("0")
    )


def _readings(text: str) -> list[Node]:
    numeral = _numeral_with_letters(text)
    if numeral is not None:
        return [numeral]

    first = parse(text)
    if isinstance(first, Number) and "," in text and "{,}" not in text and "!" not in text:
        second = _Parser(tokenize(text, thousands=False)).answer()
        if isinstance(second, Listing) and all(map(_is_group_of_digits, second.items[1:])):
            return [first, second]
    return [first]


def _is_group_of_digits(item: Node) -> bool:
    return isinstance(item, Number) and item.value >= 100 and item.decimals is None


def parse(text: str) -> Node:
    """Return the tree of an answer; a comma before three digits separates thousands."""
    return _Parser(tokenize(text)).answer()


_NUMERAL = re.compile(
    r"\(?([0-9A-Z]+)\)?"
    r"(?:_\{\(?(\d\d?|[a-z]+)\)?\}|_(\d\d?|[a-z]+)|,?\(?(?:in)?base(\d\d?|[a-z]+)\)?)"
)


def _numeral_with_letters(text: str) -> Numeral | None:
    """Read 2B7_{12} or "101 base 2"; None for anything else.

    Digits beyond 9 are letters, which the grammar would multiply.
    """
    if ("_" not in text and "base" not in text) or len(text) > 100:
        return None
    match = _NUMERAL.fullmatch("".join(plain(text).split()))
    if not match:
        return None

    written = match[2] or match[3] or match[4]
    base = int(written) if written.isdecimal() else _BASE_WORDS.get(written, 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in match[1]):
        return None
    return Numeral(match[1].lstrip("0") or "0", base)


def added(first: Measured, second: Node) -> Measured:
    """Return 5 ft + 6 in, in the first unit.

    Raises:
        UnparsableError: the second has no unit of the same dimension.
    """
    if not isinstance(second, Measured):
        raise UnparsableError("several units")
    first_unit, second_unit = parse_unit(first.unit), parse_unit(second.unit)
    if first_unit is None or second_unit is None or first_unit[0] != second_unit[0]:
        raise UnparsableError("several units")

    size = Number(second_unit[1] / first_unit[1])
    return Measured(Sum((first.value, Product((second.value, size)))), first.unit)


class _Parser:
    """The state of the descent: tokens, position, depth, units of the current clause."""

    def __init__(self, tokens: list[Token]) -> None:
        while tokens and tokens[-1].text in (",", ";", ":", "...", "\\\\"):
            if tokens[-1].text == "...":
                raise UnparsableError("an unfinished list")
            tokens = tokens[:-1]
        self._tokens = tokens
        self._position = 0
        self._depth = 0
        self._units: list[str] = []

    # Tokens

    def _peek(self, ahead: int = 0) -> str:
        """Return the name of a coming token; empty for a number, letter or word and at the end."""
        position = self._position + ahead
        if position >= len(self._tokens) or self._tokens[position].kind != "name":
            return ""
        return self._tokens[position].text

    def _kind(self, ahead: int = 0) -> str:
        position = self._position + ahead
        return self._tokens[position].kind if position < len(self._tokens) else "end"

    def _next(self) -> Token:
        if self._position >= len(self._tokens):
            raise UnparsableError("it ends too early")
        self._position += 1
        return self._tokens[self._position - 1]

    def _accept(self, *names: str) -> bool:
        if self._peek() in names and self._peek():
            self._position += 1
            return True
        return False

    def _expect(self, name: str) -> None:
        if not self._accept(name):
            raise UnparsableError(f"{name} expected")

    def _nested(self, rule: Callable[[], Node]) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnparsableError("nested too deeply")
        node = rule()
        self._depth -= 1
        return node

    # Answers and clauses

    def answer(self) -> Node:
        """Return the tree of the whole text."""
        node = self._nested(self._listing)
        if self._position < len(self._tokens):
            raise UnparsableError(f"unexpected {self._tokens[self._position].text!r}")
        return node

    def _listing(self) -> Node:
        items = [self._clause()]
        separators: set[str] = set()
        while self._peek() in _SEPARATORS or self._in_a_set():
            if self._in_a_set():
                self._position += 1
                items.append(self._clause())
                self._expect(")")
                continue
            separator = self._next().text
            if separator not in ("and", "or") and self._peek() in ("and", "or"):  # "1, 2, and 3"
                separator = self._next().text
            separators.add(separator)
            items.append(self._clause())
        if len(items) == 1:
            return items[0]
        for word in ("or", "and"):
            if word in separators:
                return Listing(tuple(items), word)
        return Listing(tuple(items), ",")

    def _in_a_set(self) -> bool:
        """Return whether `(k in Z)` comes, which says what a letter before it stands for."""
        if self._peek() != "(" or self._peek(2) != "in" or self._peek(4) != ")":
            return False
        return self._kind(1) == self._kind(3) == "letter"

    def _clause(self) -> Node:
        outer = self._units
        self._units = []
        rounded = self._skip_fillers()
        if self._position == 0:
            self._accept("=")  # a sign before the answer
        if self._accept("~"):
            rounded = True

        parts = [self._set()]
        operators: list[str] = []
        while self._peek() in _RELATIONS:
            operator = self._next().text
            part = self._set()
            if operator == "not in":
                operator, part = "in", SetOperation("difference", REALS, part)
            operators.append(operator)
            parts.append(part)

        node: Node = Relation(tuple(parts), tuple(operators)) if operators else parts[0]
        node = self._measured(node)
        while self._kind() == "number" and isinstance(node, Measured):  # 5 ft 6 in
            node = added(node, self._measured(self._product()))
        self._units = outer
        return Approximate(node) if rounded else node

    def _measured(self, node: Node) -> Node:
        units, self._units = set(self._units), []
        if len(units) > 1:
            raise UnparsableError("several units")
        return Measured(node, units.pop()) if units else node

    def _skip_fillers(self) -> bool:
        """Skip words such as "the answer is"; return whether they say that the value is rounded."""
        start = self._position
        while self._kind() == "word":
            self._position += 1
        words = [token.text.lower() for token in self._tokens[start : self._position]]

        introduced = words and (words[-1] in _INTRODUCTIONS or self._peek() in (":", "="))
        if not introduced and not all(word in FILLERS for word in words):
            self._position = start
            return False
        if words:
            self._accept(":", "=")
        return any(word in _ROUNDED for word in words)

    def _set(self) -> Node:
        left = self._ratio()
        while self._peek() in _SET_OPERATIONS or (left == REALS and self._peek() in ("-", "/")):
            operation = self._next().text
            if operation in ("-", "/"):
                operation = "difference"
            left = SetOperation(operation, left, self._ratio())
        return left

    def _ratio(self) -> Node:
        parts = [self._sum()]
        while self._accept(":"):
            parts.append(self._sum())
        return Ratio(tuple(parts)) if len(parts) > 1 else parts[0]

    # Expressions

    def _sum(self) -> Node:
        terms = [self._term()]
        while self._peek() in _SIGNS and terms[0] != REALS:
            terms.append(self._term())
        return Sum(tuple(terms)) if len(terms) > 1 else terms[0]

    def _term(self) -> Node:
        if self._peek() not in _SIGNS:
            return self._product()

        sign = self._next().text
        term = self._nested(self._term) if self._peek() in _SIGNS else self._product()
        if sign == "+":
            return term
        if sign == "-":
            return _negated(term)
        return PlusMinus(term, 1 if sign == "+-" else -1)

    def _product(self) -> Node:
        factors = [self._power()]
        while True:
            if self._accept("*"):
                factors.append(self._signed_power())
            elif self._accept("/"):
                if self._kind() == "word":  # "miles / hour"
                    self._unit("/ ")
                    continue
                factors.append(Power(self._signed_power(), MINUS_ONE))
            elif self._starts_factor():
                if self._units and self._kind() == "number":
                    return Product(tuple(factors)) if len(factors) > 1 else factors[0]
                factors.append(self._adjacent(factors))
            else:
                return Product(tuple(factors)) if len(factors) > 1 else factors[0]

    def _signed_power(self) -> Node:
        if self._accept("-"):
            return negative(self._nested(self._signed_power))
        if self._accept("+"):
            return self._nested(self._signed_power)
        return self._power()

    def _adjacent(self, factors: list[Node]) -> Node:
        """Parse a factor without a sign before it.

        It is multiplied, or it is the fraction of a mixed number. Two plain numbers are neither.
        """
        is_number = self._kind() == "number"
        position = self._position
        factor = self._power()
        last = factors[-1]
        if isinstance(factor, Numeral):
            raise UnparsableError("a numeral beside a factor")

        if isinstance(last, Number) and last.decimals is None and last.value.denominator == 1:
            mixed = self._mixed_number(factors, last, factor, position)
            if mixed is not None:
                return mixed

        if not is_number or isinstance(last, Symbol | Constant | Call):
            return factor
        if isinstance(last, Group | Sum | Product | Power) and not isinstance(factor, Number):
            return factor
        if self._tokens[position - 1].text in (")", "|", "}"):
            return factor
        raise UnparsableError("two numbers side by side")

    def _mixed_number(
        self, factors: list[Node], whole: Number, factor: Node, position: int
    ) -> Node | None:
        """Return the mixed number of an integer and the factor after it; None where it is none.

        `position` is that of the factor's first token.
        """
        if self._tokens[position - 1].text == ")":
            return None
        token = self._tokens[position]
        is_spaced_number = token.kind == "number" and token.spaced
        if is_spaced_number and isinstance(factor, Number) and self._accept("/"):  # "2 1/2"
            denominator = self._plain_number() if self._kind() == "number" else None
            if denominator is None or not 0 <= factor.value < denominator.value:
                raise UnparsableError("two numbers side by side")
            mixed = self._mixed(factors, whole, Number(factor.value / denominator.value))
            return self._with_suffixes(mixed)

        if token.text != "frac":
            return None
        if _is_proper_fraction(factor) and len(factors) == 1:
            return self._mixed(factors, whole, factor)
        if isinstance(factor, Marked) and _is_proper_fraction(factor.value):
            return replace(factor, value=self._mixed(factors, whole, factor.value))
        return None

    def _mixed(self, factors: list[Node], whole: Number, fraction: Node) -> Node:
        """Return the mixed number, which takes the place of the integer among the factors."""
        factors[-1] = Number(Fraction(1))
        return Number(whole.value + _fraction_value(fraction), mixed=True)

    def _starts_factor(self) -> bool:
        kind, name = self._kind(), self._peek()
        if kind in ("number", "letter"):
            return True
        if self._in_a_set():
            return False
        if name == "|":
            return self._bars == 0 and self._closing_bar()
        if name == "[" and (
            self._kind(1) == "end" or self._peek(1) in (*_SET_OPERATIONS, ")", "\\}", *_SEPARATORS)
        ):
            return False  # it closes an interval that is open on this side: [0, 3[
        return name in FUNCTIONS or name in (
            "(", "[", "{", "frac", "sqrt", "binom", "pi", "i", "infinity", "begin", "\\$", "lfloor",
            "lceil", "<|", "pounds", "euro", "yen", "reals", "sum", "prod",
        )  # fmt: skip

    _bars = 0
    _in_builder = False
    _in_system = False

    def _closing_bar(self) -> bool:
        """Return whether there is another bar after the one at this position."""
        following = self._tokens[self._position + 1 :]
        return any(token.kind == "name" and token.text == "|" for token in following)

    def _power(self) -> Node:
        return self._with_suffixes(self._nested(self._primary))

    def _with_suffixes(self, node: Node) -> Node:
        """Apply what follows a value: exponents, marks, units."""
        for _ in range(MAX_DEPTH):
            if self._skip_suffix():
                continue
            changed = self._operator_after(node)
            if changed is None:
                return node
            node = changed
        raise UnparsableError("nested too deeply")

    def _skip_suffix(self) -> bool:
        """Skip what follows a value and leaves it as it is: a currency, a modulus, 4th."""
        if self._peek() == "\\$" and self._kind(1) not in ("number", "letter"):
            self._position += 1
            self._units.append("dollars")
            return True
        if self._peek() == "mod" or (self._peek() == "(" and self._peek(1) == "mod"):
            self._modulus()
            return True
        return self._accept("ordinal")

    def _operator_after(self, node: Node) -> Node | None:
        """Apply the operator or the word that follows a value; None where there is none."""
        if self._peek() == "^":
            return self._superscript(node)
        if self._accept("!"):
            return Call("double factorial" if self._accept("!") else "factorial", (node,))
        if self._accept("%"):
            return Marked(node, "percent")
        if self._accept("degree", "circ"):
            return self._degrees(node)
        if self._peek() == "_" and isinstance(node, Number):
            return self._numeral(node)
        if self._accept("'"):
            raise UnparsableError("a derivative")
        if self._kind() == "word":
            return self._suffix_words(node)
        return None

    def _superscript(self, node: Node) -> Node:
        self._expect("^")
        braces = self._peek() == "{"
        inner = self._peek(1) if braces else self._peek()
        if inner in ("circ", "degree", "ordinal", "top", "prime"):
            self._position += 3 if braces else 1
            if inner == "prime":
                raise UnparsableError("a derivative")
            if inner == "top":
                return Call("transpose", (node,))
            return node if inner == "ordinal" else self._degrees(node)

        if node == REALS:
            sign = self._next().text
            if sign not in "+-":
                raise UnparsableError("a power of the reals")
            return Relation((Symbol("x"), Number(Fraction(0))), (">" if sign == "+" else "<",))

        letters = [token.text for token in self._tokens[self._position + 1 : self._position + 3]]
        if isinstance(node, Number) and braces and letters in (["t", "h"], ["n", "d"]):
            self._position += 4  # 4^{th}
            return node

        exponent = self._nested(self._exponent)
        if isinstance(node, Matrix | Group) and exponent in (Symbol("T"), Symbol("t")):
            return Call("transpose", (node,))
        return Power(node, exponent)

    def _exponent(self) -> Node:
        if self._peek() == "{":
            return self._braces()
        if self._peek() in ("-", "+"):
            sign = self._next().text
            exponent = self._power()
            return negative(exponent) if sign == "-" else exponent
        if self._kind() == "number":
            return self._plain_number()
        return self._primary()

    def _degrees(self, node: Node) -> Node:
        if self._kind() in ("letter", "word") and self._tokens[self._position].text in ("C", "F"):
            self._units.append("celsius" if self._next().text == "C" else "fahrenheit")
            return node
        return Marked(node, "degree")

    def _numeral(self, node: Number) -> Node:
        """Parse the base below a number's digits."""
        digits = self._tokens[self._position - 1].text
        if digits == ")":
            digits = self._tokens[self._position - 2].text
        self._expect("_")
        braces = self._accept("{")
        brackets = self._accept("(")
        token = self._next()
        base = _BASE_WORDS.get(token.text.lower(), 0)
        if token.kind == "number" and token.text.isdecimal():
            base = int(token.text)
        if (brackets and not self._accept(")")) or (braces and not self._accept("}")):
            raise UnparsableError("a base")
        if not 2 <= base <= 36 or not digits.isdecimal() or any(int(d) >= base for d in digits):
            raise UnparsableError("a base")
        return Numeral(digits.lstrip("0") or "0", base)

    def _modulus(self) -> None:
        """Parse the modulus of 7 (mod 11): a unit, which may be left out but must not differ."""
        brackets = self._accept("(")
        self._expect("mod")
        braces = self._accept("{")
        token = self._next()
        if token.kind != "number":
            raise UnparsableError("a modulus")
        if (braces and not self._accept("}")) or (brackets and not self._accept(")")):
            raise UnparsableError("a modulus")
        self._units.append(f"modulus:{token.text}")

    # Words after a value

    def _suffix_words(self, node: Node) -> Node:
        word = self._tokens[self._position].text.lower()
        if word in ("th", "st", "nd", "rd"):
            self._position += 1
            return node
        if word in SCALE_WORDS:
            self._position += 1
            return Product((node, Number(Fraction(10) ** SCALE_WORDS[word])))
        if word in _BASE_WORDS or word == "base":
            raise UnparsableError("number words")
        self._unit("")
        return node

    def _unit(self, start: str) -> None:
        unit = start
        while True:
            if self._kind() == "word":
                unit += " " + self._next().text.rstrip(".")
            elif self._peek() == "/" and self._kind(1) == "word":
                self._position += 1
                unit += " /"
            elif self._peek() in ("*", ":") and self._kind(1) == "word":
                self._position += 1
            elif self._accept("^"):
                unit += self._exponent_of_unit()
            else:
                break

        if start and self._units:
            self._units[-1] += " " + unit.strip()
        else:
            self._units.append(unit.strip())

    def _exponent_of_unit(self) -> str:
        braces = self._accept("{")
        sign = "-" if self._accept("-") else ""
        token = self._next()
        if token.kind != "number" or not token.text.isdecimal():
            raise UnparsableError("a unit's exponent")
        if braces and not self._accept("}"):
            raise UnparsableError("a unit's exponent")
        return f"^{sign}{token.text}"

    # Primaries

    def _primary(self) -> Node:
        kind = self._kind()
        if kind == "number":
            return self._plain_number()
        if kind == "letter":
            return self._letter()
        if kind == "word":
            raise UnparsableError("a word where a value should stand")
        if kind != "name":
            raise UnparsableError("it ends too early")

        name = self._next().text
        if name == "..." and self._position > 1:  # of 1 + 2 + ... + n, but not of a list
            around = self._tokens[self._position - 2].text, self._peek()
            if all(sign in ("+", "-", "*") for sign in around):
                return Symbol(name)
        if name in FUNCTIONS and name not in ("sqrt",):
            return self._function(name)
        if name in _PRIMARIES:
            return _PRIMARIES[name](self)
        self._position -= 1
        raise UnparsableError(f"unexpected {name!r}")

    def _plain_number(self) -> Number:
        token = self._next()
        mantissa, _, exponent = token.text.partition("e")
        if exponent and abs(int(exponent)) > MAX_SCIENTIFIC_EXPONENT:
            raise UnparsableError("an exponent too large")
        power = int(exponent or 0)
        value = Fraction(mantissa) * Fraction(10) ** power
        if token.decimals is None or power > 0:
            return Number(value, None if exponent else token.decimals)
        return Number(value, token.decimals - power)

    def _letter(self) -> Node:
        name = self._next().text
        if self._peek() == "_":
            self._position += 1
            name += "_" + self._index()
        elif name in ("e", "i"):
            return Constant(name)
        elif name in ("triangle", "angle", "measuredangle"):
            if self._kind() != "letter":
                raise UnparsableError("a figure without its name")
            return Symbol(name + self._next().text)

        while self._accept("'"):
            name += "'"
        if self._defines_function(name):
            return self._undefined_function(name)
        if name in ("C", "P") and self._peek() == "(":
            return self._chosen(name)
        if name.rstrip("'") in _FUNCTION_LETTERS and self._peek() in ("(", "^"):
            return self._undefined_function(name)
        return Symbol(name)

    def _defines_function(self, name: str) -> bool:
        """Return whether the letter begins P(x) = ...; a capital in the brackets is an event."""
        if len(name) != 1:
            return False
        argument = self._tokens[self._position : self._position + 4]
        texts = [token.text for token in argument]
        return (
            len(texts) == 4
            and texts[0] == "("
            and texts[2:] == [")", "="]
            and argument[1].kind == "letter"
            and texts[1].islower()
        )

    def _index(self) -> str:
        if self._accept("{"):
            parts = []
            while not self._accept("}"):
                token = self._next()
                if token.text in "{^_":
                    raise UnparsableError("an index")
                parts.append(token.text)
            return "".join(parts)

        # x_12 is x_1 2 in TeX, and nobody means that: all digits are the index.
        token = self._next()
        if token.kind == "name":
            raise UnparsableError("an index")
        return token.text

    def _chosen(self, name: str) -> Node:
        """Parse C(n, k); anything else in the brackets multiplies or names a value."""
        position = self._position
        node = self._primary()
        if name == "C":
            match node:
                case Group("(", (_, _) as items, ")"):
                    return Call("binomial", items)
        self._position = position
        return Symbol(name)

    def _undefined_function(self, name: str) -> Node:
        """Parse f(x) and f^{-1}(x): the same arguments give the same unknown value."""
        position = self._position
        texts = [token.text for token in self._tokens[position : position + 6]]
        if texts[:1] == ["^"]:
            if texts[:5] == ["^", "{", "-", "1", "}"] and texts[5:] == ["("]:
                self._position += 5
                name += "^-1"
            else:
                return Symbol(name)
        inner = self._nested(self._primary)
        if self._accept("_"):  # f(x)_{max}
            name += "_" + self._index()
        if isinstance(inner, Group):
            return Call(f"undefined {name}", inner.items)
        return Call(f"undefined {name}", (inner,))

    def _function(self, name: str) -> Node:
        name = _SYNONYMS.get(name, name)
        exponent: Node | None = None
        base: Node | None = None
        while self._peek() in ("^", "_"):
            if self._next().text == "^":
                exponent = self._nested(self._exponent)
            else:
                base = self._nested(self._exponent)

        argument = self._nested(self._argument_of_function)
        arguments = argument.items if isinstance(argument, Group | SetOf) else (argument,)
        if exponent == MINUS_ONE and name in _INVERSE:
            return Call(_INVERSE[name], arguments)
        if name == "log" and base is not None:
            arguments = (*arguments, base)
        elif base is not None:
            raise UnparsableError("an index of a function")

        call: Node = Call(name, arguments)
        if name == "exp" and len(arguments) == 1:
            call = Power(Constant("e"), arguments[0])
        return Power(call, exponent) if exponent is not None else call

    def _argument_of_function(self) -> Node:
        """Parse the argument of a function.

        It runs to the next function, sign or bracketed factor: `\\sin 2x \\cos x` is sin(2x) cos x.
        """
        if self._peek() in ("(", "{", "[", "|", "\\{"):
            return self._bracketed_argument()

        factors = [self._signed_power()]
        while True:
            if self._kind() in ("number", "letter") or self._peek() in ("frac", "pi", "sqrt", "i"):
                factors.append(self._adjacent(factors))
            elif self._peek() == "/" and self._kind(1) in ("number", "letter"):
                self._position += 1
                factors.append(Power(self._power(), MINUS_ONE))
            else:
                return Product(tuple(factors)) if len(factors) > 1 else factors[0]

    def _bracketed_argument(self) -> Node:
        node = self._primary()
        while True:
            if self._accept("circ"):
                node = self._degrees(node)
            elif self._peek() == "^" and self._peek(1) == "circ":
                node = self._superscript(node)
            else:
                break
        if self._peek() == "/" and self._tokens[self._position - 1].text == "}":
            self._position += 1
            return Product((node, Power(self._power(), MINUS_ONE)))
        return node

    def _group_or_set(self) -> Node:
        """Parse braces that are no command's argument.

        They are a TeX group, or a set whose braces lack their backslashes: {1, 2}, {x | x > 2}.
        """
        before = self._tokens[self._position - 2].text if self._position > 1 else ""
        builder = self._builder_in_braces()
        if builder is not None:
            return builder

        if self._position == 1 and self._peek() == "}" and self._kind(1) == "end":
            self._position += 1
            return EMPTY_SET
        node = self._rest_of_braces()
        if isinstance(node, Listing):
            return SetOf(node.items)
        return SetOf((node,)) if before in _SET_OPERATIONS else node

    def _builder_in_braces(self) -> Node | None:
        """Parse x | x > 2}; None, and no token taken, for anything else."""
        if self._kind() != "letter" or self._in_builder:  # no attempt within an attempt
            return None

        state = self._position, self._depth, self._bars, self._units
        self._in_builder = True
        try:
            head = self._letter()
            if self._peek() in ("|", ":"):
                return self._rest_of_builder(head, "}")
        except UnparsableError:
            pass
        finally:
            self._in_builder = False
        self._position, self._depth, self._bars, self._units = state
        return None

    def _braces(self) -> Node:
        """Parse a TeX group: transparent, except for \\over and \\choose."""
        self._expect("{")
        return self._rest_of_braces()

    def _rest_of_braces(self) -> Node:
        if self._accept("}"):
            if self._accept("_"):
                return self._choose_with_indices()
            raise UnparsableError("an empty group")
        node = self._nested(self._listing)
        if self._peek() in ("over", "choose"):
            name = self._next().text
            other = self._nested(self._listing)
            quotient = Product((node, Power(other, MINUS_ONE)))
            node = Call("binomial", (node, other)) if name == "choose" else quotient
        self._expect("}")
        return node

    def _choose_with_indices(self) -> Node:
        """Parse {}_{10}C_3."""
        upper = self._exponent()
        letter = self._next()
        self._expect("_")
        if letter.text != "C":
            raise UnparsableError("an index before a symbol")
        return Call("binomial", (upper, self._exponent()))

    def _bracketed(self, opening: str) -> Node:
        """Parse a bracketed expression, a tuple, or an interval."""
        before = self._tokens[self._position - 2].text if self._position > 1 else ""
        bars = self._bars
        self._bars = 0
        node = self._nested(self._listing)
        if before in _PROBABILITIES and self._accept("|"):  # P(A | B)
            node = Relation((node, self._nested(self._listing)), ("|",))
        self._bars = bars
        closing = self._next().text
        if closing not in _CLOSERS[opening]:
            raise UnparsableError("a bracket is not closed")

        if isinstance(node, Listing) and node.separator == ",":
            # ]0, 1[ is the open interval (0, 1).
            opening = {"]": "(", "<|": "<"}.get(opening, opening)
            closing = {"[": ")", "|>": ">"}.get(closing, closing)
            return Group(opening, node.items, closing)
        if isinstance(node, Group) and opening == "[" == node.opening:
            return Group("[", (node,), closing)
        if not isinstance(node, Listing) and (opening, closing) in (("(", ")"), ("[", "]")):
            return node
        raise UnparsableError("brackets around no tuple")

    def _set_braces(self) -> Node:
        if self._accept("\\}"):
            return EMPTY_SET
        system = self._system_in_array()
        if system is not None:
            return system
        bars = self._bars
        self._bars = 1  # a bar is "such that" here
        head = self._nested(self._listing_or_head)
        self._bars = bars
        if self._peek() in ("|", ":"):
            return self._rest_of_builder(head, "\\}")
        self._expect("\\}")
        return SetOf(head.items if isinstance(head, Listing) else (head,))

    def _listing_or_head(self) -> Node:
        start = self._position
        if self._kind() == "letter":
            head = self._letter()
            if self._accept("in"):
                self._expect("reals")
            if self._peek() in ("|", ":") and isinstance(head, Symbol):
                return head
            self._position = start
        return self._listing()

    def _rest_of_builder(self, head: Node, closing: str) -> Node:
        """Parse `| condition}` of a set by a condition."""
        self._next()
        condition = self._nested(self._listing)
        self._expect(closing)
        if not isinstance(head, Symbol) or not isinstance(condition, Relation | Listing):
            raise UnparsableError("a set by a condition on something else than a variable")
        return SetOperation("intersection", REALS, condition)

    def _money(self, unit: str) -> Node:
        self._units.append(unit)
        return self._signed_power()

    def _fraction(self) -> Node:
        if self._peek() == "{" and self._kind(1) == "word":
            return self._unit_fraction()
        numerator = self._tex_argument()
        denominator = self._tex_argument()
        match numerator, denominator:
            case Number(above, None), Number(below, None) if below != 0:
                return Number(above / below)
        return Product((numerator, Power(denominator, MINUS_ONE)))

    def _unit_fraction(self) -> Node:
        self._expect("{")
        self._unit("")
        self._expect("}")
        self._expect("{")
        self._unit("/ ")
        self._expect("}")
        return Number(Fraction(1))

    def _tex_argument(self) -> Node:
        """Parse a group in braces, one digit, or one symbol: \\frac12 is one half."""
        if self._peek() == "{":
            return self._nested(self._braces)
        if self._kind() != "number":
            return self._nested(self._primary)

        if self._has_several_digits():
            # \\frac12: take one digit, leave the others.
            token = self._tokens[self._position]
            first = Token("number", token.text[0], token.spaced)
            rest = Token("number", token.text[1:], False)
            before = self._tokens[: self._position]
            after = self._tokens[self._position + 1 :]
            self._tokens = [*before, first, rest, *after]
        return self._plain_number()

    def _has_several_digits(self) -> bool:
        """Return whether the next token is an integer of several digits."""
        if self._kind() != "number":
            return False
        text = self._tokens[self._position].text
        return len(text) > 1 and text.isdecimal()

    def _root(self) -> Node:
        degree: Node = Number(Fraction(2))
        if self._accept("["):
            degree = self._nested(self._listing)
            self._expect("]")
        several_digits = self._has_several_digits()
        root = Call("root", (self._tex_argument(), degree))
        # \\sqrt12 is sqrt(1) 2.
        digits_follow = several_digits and self._kind() == "number"
        if digits_follow and not self._tokens[self._position].spaced:
            return Product((root, self._plain_number()))
        return root

    def _formal(self, name: str) -> Node:
        r"""Parse \sum_{k=1}^{n} a_k, which is not evaluated: it only equals the same sum."""
        first: Node | None = None
        last: Node = INFINITY
        while self._peek() in ("_", "^"):
            if self._next().text == "_":
                first = self._nested(self._braces)
            else:
                last = self._nested(self._exponent)

        terms = self._nested(self._product)
        match first:
            case Relation((Symbol(index), start), ("=",)):
                ends = (start,) if last == INFINITY else (start, last)
                return Call(f"formal {name} over {index}", (terms, *ends))
            case _:
                raise UnparsableError("a sum without its bounds")

    def _binomial(self) -> Node:
        return Call("binomial", (self._tex_argument(), self._tex_argument()))

    def _absolute_value(self) -> Node:
        self._bars += 1
        node = self._nested(self._set)
        self._expect("|")
        self._bars -= 1
        return Call("abs", (node,))

    def _overlined(self) -> Node:
        """Parse a conjugate; over letters only the name of a segment or a mean."""
        node = self._tex_argument()
        return node if isinstance(node, Symbol) else Call("conjugate", (node,))

    def _rounded_down(self, name: str, closing: str) -> Node:
        node = self._nested(self._sum)
        self._expect(closing)
        return Call(name, (node,))

    def _environment(self) -> Node:
        name = self._environment_name()
        if name == "cases":
            return self._system()
        if name not in _MATRICES:
            raise UnparsableError(f"environment {name}")
        if name == "array" and self._accept("{"):
            while not self._accept("}"):
                self._next()

        rows: list[tuple[Node, ...]] = []
        while self._peek() != "end":
            cells = [self._nested(self._set)]
            while self._accept("&"):
                cells.append(self._nested(self._set))
            rows.append(tuple(cells))
            if not self._accept("\\\\"):
                break

        self._expect("end")
        if self._environment_name() != name or not rows or len({len(row) for row in rows}) != 1:
            raise UnparsableError("an irregular matrix")
        return Matrix(tuple(rows), name == "vmatrix")

    def _system(self) -> Node:
        """Parse equations that hold together."""
        return Listing(tuple(self._rows_of_system("cases")), "and")

    def _rows_of_system(self, name: str) -> list[Node]:
        rows = [self._nested(self._clause)]
        while self._accept("\\\\", ",", ";") and self._peek() != "end":
            rows.append(self._nested(self._clause))
        self._expect("end")
        if self._environment_name() != name or len(rows) < 2:
            raise UnparsableError("a definition by cases")
        return rows

    def _system_in_array(self) -> Node | None:
        r"""Parse the equations of \left\{\begin{array}...; None, and no token taken, else."""
        if self._peek() != "begin" or self._in_system:  # no attempt within an attempt
            return None

        state = self._position, self._depth, self._bars, self._units
        self._in_system = True
        try:
            self._position += 1
            name = self._environment_name()
            if name in _SYSTEMS:
                if name == "array" and self._accept("{"):
                    while not self._accept("}"):
                        self._next()
                rows = self._rows_of_system(name)
                if self._peek() != "\\}" and all(isinstance(row, Relation) for row in rows):
                    return Listing(tuple(rows), "and")
        except UnparsableError:
            pass
        finally:
            self._in_system = False
        self._position, self._depth, self._bars, self._units = state
        return None

    def _environment_name(self) -> str:
        self._expect("{")
        name = ""
        while not self._accept("}"):
            name += self._next().text
        return name


_PRIMARIES: dict[str, Callable[[_Parser], Node]] = {
    "(": lambda p: p._bracketed("("),
    "[": lambda p: p._bracketed("["),
    "]": lambda p: p._bracketed("]"),
    "<|": lambda p: p._bracketed("<|"),
    "<": lambda p: p._bracketed("<"),
    "{": lambda p: p._group_or_set(),
    "\\{": lambda p: p._set_braces(),
    "|": lambda p: p._absolute_value(),
    "frac": lambda p: p._fraction(),
    "sqrt": lambda p: p._root(),
    "binom": lambda p: p._binomial(),
    "lfloor": lambda p: p._rounded_down("floor", "rfloor"),
    "lceil": lambda p: p._rounded_down("ceil", "rceil"),
    "begin": lambda p: p._environment(),
    "sum": lambda p: p._formal("sum"),
    "prod": lambda p: p._formal("product"),
    "pi": lambda p: Constant("pi"),
    "i": lambda p: Constant("i"),
    "infinity": lambda p: INFINITY,
    "emptyset": lambda p: EMPTY_SET,
    "overline": lambda p: p._overlined(),
    "_": lambda p: p._choose_with_indices(),
    "reals": lambda p: REALS,
    "\\$": lambda p: p._money("dollars"),
    "pounds": lambda p: p._money("pounds"),
    "euro": lambda p: p._money("euros"),
    "yen": lambda p: p._money("yen"),
}


def _negated(term: Node) -> Node:
    """Return -term; a minus before a mixed number or a measured value belongs to all of it."""
    if isinstance(term, Product) and isinstance(term.factors[0], Number):
        first, *rest = term.factors
        return Product((negative(first), *rest))
    return negative(term)


def _is_proper_fraction(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator > 1 and 0 < node.value < 1


def _fraction_value(node: Node) -> Fraction:
    assert isinstance(node, Number)
    return node.value
