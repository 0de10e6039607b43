"""From tokens to the tree of an answer: recursive descent, one method a level of precedence.

```text
answer    = clause (("," | ";" | "and" | "or") clause)*          several answers
clause    = set (("=" | "<" | "in" | ...) set)*                  an equation, a chain of inequalities, a membership
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

_RELATIONS = frozenset({"=", "!=", "<", "<=", ">", ">=", "in", "~"})
_SEPARATORS = frozenset({",", ";", "and", "or"})
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
_FILLERS = frozenset(
    [
        "the",
        "answer",
        "is",
        "final",
        "so",
        "thus",
        "are",
        "equals",
        "approximately",
        "about",
        "roughly",
        "nearly",
        "at",
        "exactly",
    ]
)
_INTRODUCTIONS = frozenset({"is", "equals", "are", "be"})  # "the probability is ..."
_ROUNDED = frozenset(["approximately", "about", "roughly", "nearly"])
_BASE_WORDS = {
    w: i
    for i, w in enumerate(
        [
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ],
        start=2,
    )
} | {"sixteen": 16}
_FUNCTION_LETTERS = frozenset("fgFG")
MAX_SCIENTIFIC_EXPONENT = 4000


def readings(text: str) -> list[Node]:
    """The ways to read an answer: one, or two where a comma may separate thousands or answers (`1,234`).

    Raises:
        UnparsableError: it is no mathematical answer.
    """
    if (numeral := _numeral_with_letters(text)) is not None:
        return [numeral]
    first = parse(text)
    if isinstance(first, Number) and "," in text and "{,}" not in text and "!" not in text:
        second = _Parser(tokenize(text, thousands=False)).answer()
        if isinstance(second, Listing) and all(
            isinstance(item, Number) and item.value >= 100 and item.decimals is None
            for item in second.items[1:]
        ):
            return [first, second]
    return [first]


def parse(text: str) -> Node:
    """The tree of an answer, a comma between groups of three digits read as a thousands separator."""
    return _Parser(tokenize(text)).answer()


_NUMERAL = re.compile(
    r"\(?([0-9A-Z]+)\)?(?:_\{\(?(\d\d?|[a-z]+)\)?\}|_(\d\d?|[a-z]+)|,?\(?(?:in)?base(\d\d?|[a-z]+)\)?)"
)


def _numeral_with_letters(text: str) -> Numeral | None:
    """2B7_{12} or "101 base 2"; digits beyond 9 are letters, which the grammar would multiply."""
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
    """5 ft + 6 in, in the first unit."""
    units = [
        parse_unit(part.unit) if isinstance(part, Measured) else None for part in (first, second)
    ]
    if (
        units[0] is None
        or units[1] is None
        or units[0][0] != units[1][0]
        or not isinstance(second, Measured)
    ):
        raise UnparsableError("several units")
    return Measured(
        Sum((first.value, Product((second.value, Number(units[1][1] / units[0][1]))))), first.unit
    )


class _Parser:
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
        position = self._position + ahead
        return (
            self._tokens[position].text
            if position < len(self._tokens) and self._tokens[position].kind == "name"
            else ""
        )

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
        """The whole text."""
        node = self._nested(self._listing)
        if self._position < len(self._tokens):
            raise UnparsableError(f"unexpected {self._tokens[self._position].text!r}")
        return node

    def _listing(self) -> Node:
        items, separators = [self._clause()], set()
        while self._peek() in _SEPARATORS:
            separator = self._next().text
            if separator in (",", ";") and self._peek() in ("and", "or"):  # "1, 2, and 3"
                separator = self._next().text
            separators.add(separator)
            items.append(self._clause())
        if len(items) == 1:
            return items[0]
        kind = "or" if "or" in separators else "and" if "and" in separators else ","
        return Listing(tuple(items), kind)

    def _clause(self) -> Node:
        outer, self._units = self._units, []
        rounded = self._skip_fillers()
        if self._accept("~"):
            rounded = True
        parts, operators = [self._set()], []
        while self._peek() in _RELATIONS:
            operators.append(self._next().text)
            parts.append(self._set())
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
        rounded = False
        start = self._position
        while self._kind() == "word":
            self._position += 1
        words = [token.text.lower() for token in self._tokens[start : self._position]]
        rounded = any(word in _ROUNDED for word in words)
        introduced = words and (words[-1] in _INTRODUCTIONS or self._peek() in (":", "="))
        if not introduced and not all(word in _FILLERS for word in words):
            self._position = start
            return False
        if words:
            self._accept(":", "=")
        return rounded

    def _set(self) -> Node:
        left = self._ratio()
        while self._peek() in ("union", "intersection", "difference") or (
            left == REALS and self._peek() in ("-", "/")
        ):
            operation = self._next().text
            left = SetOperation(
                "difference" if operation in "-/" else operation, left, self._ratio()
            )
        return left

    def _ratio(self) -> Node:
        parts = [self._sum()]
        while self._accept(":"):
            parts.append(self._sum())
        return Ratio(tuple(parts)) if len(parts) > 1 else parts[0]

    # Expressions

    def _sum(self) -> Node:
        terms = [self._term()]
        while self._peek() in ("+", "-", "+-", "-+") and terms[0] != REALS:
            terms.append(self._term())
        return Sum(tuple(terms)) if len(terms) > 1 else terms[0]

    def _term(self) -> Node:
        if self._peek() in ("+", "-", "+-", "-+"):
            sign = self._next().text
            term = (
                self._nested(self._term)
                if self._peek() in ("+", "-", "+-", "-+")
                else self._product()
            )
            if sign in ("+", "-"):
                return term if sign == "+" else _negated(term)
            return PlusMinus(term, 1 if sign == "+-" else -1)
        return self._product()

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
        """A factor without a sign between: a product, or the fraction of a mixed number; two plain numbers are neither."""
        number = self._kind() == "number"
        position = self._position
        factor = self._power()
        last = factors[-1]
        if isinstance(factor, Numeral):
            raise UnparsableError("a numeral beside a factor")
        if isinstance(last, Number) and last.decimals is None and last.value.denominator == 1:
            if (
                number
                and self._tokens[position].spaced
                and isinstance(factor, Number)
                and self._accept("/")
            ):
                denominator = self._power()  # "2 1/2"
                if not isinstance(denominator, Number) or not 0 < factor.value < denominator.value:
                    raise UnparsableError("two numbers side by side")
                factor = Number(factor.value / denominator.value)
                return self._mixed(factors, last, factor)
            if (
                _is_proper_fraction(factor)
                and self._tokens[position].text == "frac"
                and len(factors) == 1
            ):
                return self._mixed(factors, last, factor)
            if (
                isinstance(factor, Marked)
                and _is_proper_fraction(factor.value)
                and self._tokens[position].text == "frac"
            ):
                return replace(factor, value=self._mixed(factors, last, factor.value))
        if number:
            if isinstance(last, Symbol | Constant | Call) or (
                isinstance(last, Group | Sum | Product | Power) and not isinstance(factor, Number)
            ):
                return factor
            if self._tokens[position - 1].text in (")", "|", "}"):
                return factor
            raise UnparsableError("two numbers side by side")
        return factor

    def _mixed(self, factors: list[Node], whole: Number, fraction: Node) -> Node:
        factors.pop()
        value = whole.value + _fraction_value(fraction)
        factors.append(Number(Fraction(1)))
        return Number(value)

    def _starts_factor(self) -> bool:
        kind, name = self._kind(), self._peek()
        if kind in ("number", "letter"):
            return True
        if name == "|":
            return self._bars == 0 and self._closing_bar()
        if name == "[" and (
            self._kind(1) == "end"
            or self._peek(1) in ("union", "intersection", "difference", ")", "\\}", *_SEPARATORS)
        ):
            return False  # it closes an interval that is open on this side: [0, 3[
        return name in FUNCTIONS or name in (
            "(", "[", "{", "frac", "sqrt", "binom", "pi", "i", "infinity", "begin", "\\$", "lfloor", "lceil", "<|", "pounds", "euro", "yen", "reals",
        )  # fmt: skip

    _bars = 0

    def _closing_bar(self) -> bool:
        """Whether a bar at this position has a partner before anything that ends the expression."""
        return any(
            token.kind == "name" and token.text == "|"
            for token in self._tokens[self._position + 1 :]
        )

    def _power(self) -> Node:
        node = self._nested(self._primary)
        for _ in range(MAX_DEPTH):
            if self._peek() == "^":
                node = self._superscript(node)
            elif self._accept("!"):
                node = Call("double factorial" if self._accept("!") else "factorial", (node,))
            elif self._peek() == "\\$" and self._kind(1) not in ("number", "letter"):
                self._position += 1
                self._units.append("dollars")
            elif self._peek() == "mod" or (self._peek() == "(" and self._peek(1) == "mod"):
                self._modulus()
            elif self._accept("ordinal"):
                pass
            elif self._accept("%"):
                node = Marked(node, "percent")
            elif self._accept("degree"):
                node = self._degrees(node)
            elif self._peek() == "circ":
                self._next()
                node = self._degrees(node)
            elif self._peek() == "_" and isinstance(node, Number):
                node = self._numeral(node)
            elif self._accept("'"):
                raise UnparsableError("a derivative")
            elif self._kind() == "word":
                node = self._suffix_words(node)
            else:
                return node
        raise UnparsableError("nested too deeply")

    def _superscript(self, node: Node) -> Node:
        self._expect("^")
        braces = self._peek() == "{"
        inner = self._peek(1) if braces else self._peek()
        if inner in ("circ", "degree", "ordinal", "top", "prime"):
            self._position += 3 if braces else 1
            if inner == "prime":
                raise UnparsableError("a derivative")
            return (
                self._degrees(node)
                if inner in ("circ", "degree")
                else Call("transpose", (node,))
                if inner == "top"
                else node
            )
        if node == REALS:
            sign = self._next().text
            if sign not in "+-":
                raise UnparsableError("a power of the reals")
            return Relation((Symbol("x"), Number(Fraction(0))), (">" if sign == "+" else "<",))
        if (
            isinstance(node, Number)
            and braces
            and [t.text for t in self._tokens[self._position + 1 : self._position + 3]]
            in (["t", "h"], ["n", "d"])
        ):
            self._position += 4
            return node
        exponent = self._nested(self._exponent)
        if self._matrix_like(node) and isinstance(exponent, Symbol) and exponent.name in ("T", "t"):
            return Call("transpose", (node,))
        if self._units and isinstance(exponent, Number) and not isinstance(node, Number):
            return Power(node, exponent)
        return Power(node, exponent)

    def _matrix_like(self, node: Node) -> bool:
        return isinstance(node, Matrix | Group)

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
        """Digits with a base below them."""
        digits = self._tokens[self._position - 1].text
        if digits == ")":
            digits = self._tokens[self._position - 2].text
        self._expect("_")
        braces = self._accept("{")
        brackets = self._accept("(")
        token = self._next()
        base = _BASE_WORDS.get(token.text.lower()) or (
            int(token.text) if token.kind == "number" and token.text.isdecimal() else 0
        )
        if (brackets and not self._accept(")")) or (braces and not self._accept("}")):
            raise UnparsableError("a base")
        if not 2 <= base <= 36 or not digits.isdecimal() or any(int(d) >= base for d in digits):
            raise UnparsableError("a base")
        return Numeral(digits.lstrip("0") or "0", base)

    def _modulus(self) -> None:
        """7 (mod 11): the modulus is a unit, which may be left out but not be another."""
        brackets = self._accept("(")
        self._expect("mod")
        braces = self._accept("{")
        token = self._next()
        if (
            token.kind != "number"
            or (braces and not self._accept("}"))
            or (brackets and not self._accept(")"))
        ):
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
            elif self._peek() == "^":
                self._position += 1
                braces = self._accept("{")
                sign = "-" if self._accept("-") else ""
                token = self._next()
                if (
                    token.kind != "number"
                    or not token.text.isdecimal()
                    or (braces and not self._accept("}"))
                ):
                    raise UnparsableError("a unit's exponent")
                unit += f"^{sign}{token.text}"
            else:
                break
        if start and self._units:
            self._units[-1] += " " + unit.strip()
        else:
            self._units.append(unit.strip())

    # Primaries

    def _primary(self) -> Node:
        kind = self._kind()
        if kind == "number":
            return self._plain_number()
        if kind == "letter":
            return self._letter()
        if kind != "name":
            raise UnparsableError(
                "a word where a value should stand" if kind == "word" else "it ends too early"
            )
        name = self._next().text
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
        value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
        return Number(value, None if exponent else token.decimals)

    def _letter(self) -> Node:
        name = self._next().text
        if self._peek() == "_":
            self._position += 1
            name += "_" + self._index()
        elif name == "e" or (name == "i"):
            return Constant(name)
        elif name in ("triangle", "angle", "measuredangle"):
            if self._kind() != "letter":
                raise UnparsableError("a figure without its name")
            return Symbol(name + self._next().text)
        while self._accept("'"):
            name += "'"
        if name in ("C", "P") and self._peek() == "(":
            return self._chosen(name)
        if name.rstrip("'") in _FUNCTION_LETTERS and self._peek() in ("(", "^"):
            return self._undefined_function(name)
        return Symbol(name)

    def _index(self) -> str:
        if self._accept("{"):
            parts = []
            while not self._accept("}"):
                token = self._next()
                if token.text in "{^_":
                    raise UnparsableError("an index")
                parts.append(token.text)
            return "".join(parts)
        token = self._next()
        if (
            token.kind == "number" and len(token.text) > 1
        ):  # x_12 is x_1 2 in TeX, and nobody means that
            return token.text
        if token.kind == "name":
            raise UnparsableError("an index")
        return token.text

    def _chosen(self, name: str) -> Node:
        """C(n, k) and P(n, k); anything else in the brackets multiplies or names a value."""
        position = self._position
        node = self._primary()
        if (
            name == "C"
            and isinstance(node, Group)
            and len(node.items) == 2
            and (node.opening, node.closing) == ("(", ")")
        ):
            return Call("binomial", node.items)
        self._position = position
        return Symbol(name)

    def _undefined_function(self, name: str) -> Node:
        """f(x) and f^{-1}(x): the same arguments give the same unknown value."""
        position = self._position
        texts = [token.text for token in self._tokens[position : position + 6]]
        if texts[:1] == ["^"]:
            if texts[:5] == ["^", "{", "-", "1", "}"] and texts[5:] == ["("]:
                self._position += 5
                name += "^-1"
            else:
                return Symbol(name)
        inner = self._nested(self._primary)
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
        call: Node = (
            Power(Constant("e"), arguments[0])
            if name == "exp" and len(arguments) == 1
            else Call(name, arguments)
        )
        return Power(call, exponent) if exponent is not None else call

    def _argument_of_function(self) -> Node:
        """`\\sin 2x \\cos x` is sin(2x) cos x: the argument runs to the next function, sign or bracketed factor."""
        if self._peek() in ("(", "{", "[", "|", "\\{"):
            node = self._primary()
            while self._peek() == "circ" or (self._peek() == "^" and self._peek(1) in ("circ",)):
                node = (
                    self._superscript(node)
                    if self._peek() == "^"
                    else (self._next(), self._degrees(node))[1]
                )
            if self._peek() == "/" and self._tokens[self._position - 1].text == "}":
                self._position += 1
                return Product((node, Power(self._power(), MINUS_ONE)))
            return node
        factors = [self._signed_power()]
        while True:
            if self._kind() in ("number", "letter") or self._peek() in ("frac", "pi", "sqrt", "i"):
                factors.append(self._adjacent(factors))
            elif self._peek() == "/" and self._kind(1) in ("number", "letter"):
                self._position += 1
                factors.append(Power(self._power(), MINUS_ONE))
            else:
                return Product(tuple(factors)) if len(factors) > 1 else factors[0]

    def _braces(self) -> Node:
        """A TeX group: transparent, except for \\over and \\choose."""
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
            node = (
                Call("binomial", (node, other))
                if name == "choose"
                else Product((node, Power(other, MINUS_ONE)))
            )
        self._expect("}")
        return node

    def _choose_with_indices(self) -> Node:
        """{}_{10}C_3."""
        upper = self._exponent()
        letter = self._next()
        self._expect("_")
        if letter.text != "C":
            raise UnparsableError("an index before a symbol")
        return Call("binomial", (upper, self._exponent()))

    def _bracketed(self, opening: str) -> Node:
        """A bracketed expression, a tuple, or an interval."""
        bars, self._bars = self._bars, 0
        node = self._nested(self._listing)
        self._bars = bars
        closing = self._next().text
        if closing not in _CLOSERS[opening]:
            raise UnparsableError("a bracket is not closed")
        if isinstance(node, Listing) and node.separator in (",",):
            if opening == "]":
                opening = "("
            if closing == "[":
                closing = ")"
            return Group(
                "<" if opening == "<|" else opening, node.items, ">" if closing == "|>" else closing
            )
        if isinstance(node, Group) and opening == "[" == node.opening:
            return Group("[", (node,), closing)
        if (
            opening in ("(", "[")
            and not isinstance(node, Listing)
            and closing == {"(": ")", "[": "]"}[opening]
        ):
            return node
        raise UnparsableError("brackets around no tuple")

    def _set_braces(self) -> Node:
        if self._accept("\\}"):
            return EMPTY_SET
        bars, self._bars = self._bars, 1  # a bar is "such that" here
        head = self._nested(self._listing_or_head)
        self._bars = bars
        if self._accept("|", ":"):
            condition = self._nested(self._listing)
            self._expect("\\}")
            return self._builder(head, condition)
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

    def _builder(self, head: Node, condition: Node) -> Node:
        if not isinstance(head, Symbol) or not isinstance(condition, Relation | Listing):
            raise UnparsableError("a set by a condition on something else than a variable")
        return SetOperation("intersection", REALS, condition)

    def _money(self, unit: str) -> Node:
        self._units.append(unit)
        return self._signed_power()

    def _fraction(self) -> Node:
        if self._peek() == "{" and self._kind(1) == "word":
            return self._unit_fraction()
        numerator, denominator = self._tex_argument(), self._tex_argument()
        if (
            isinstance(numerator, Number)
            and isinstance(denominator, Number)
            and denominator.value
            and None is numerator.decimals is denominator.decimals
        ):
            return Number(numerator.value / denominator.value)
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
        """A group in braces, one digit, or one symbol: \\frac12 is one half."""
        if self._peek() == "{":
            return self._nested(self._braces)
        if self._kind() == "number":
            token = self._tokens[self._position]
            if (
                len(token.text) > 1 and token.text.isdecimal()
            ):  # \frac12: take one digit, leave the others
                self._tokens = [
                    *self._tokens[: self._position],
                    Token("number", token.text[0], token.spaced),
                    Token("number", token.text[1:], False),
                    *self._tokens[self._position + 1 :],
                ]
            return self._plain_number()
        return self._nested(self._primary)

    def _root(self) -> Node:
        degree: Node = Number(Fraction(2))
        if self._accept("["):
            degree = self._nested(self._listing)
            self._expect("]")
        if (
            self._kind() == "number"
            and len(self._tokens[self._position].text) > 1
            and self._tokens[self._position].text.isdecimal()
        ):
            radicand: Node = self._tex_argument()
            if self._kind() == "number" and not self._tokens[self._position].spaced:
                return Product((Call("root", (radicand, degree)), self._plain_number()))
        else:
            radicand = self._tex_argument()
        return Call("root", (radicand, degree))

    def _binomial(self) -> Node:
        return Call("binomial", (self._tex_argument(), self._tex_argument()))

    def _absolute_value(self) -> Node:
        self._bars += 1
        node = self._nested(self._sum)
        self._expect("|")
        self._bars -= 1
        return Call("abs", (node,))

    def _overlined(self) -> Node:
        """A conjugate; over letters only the name of a segment or a mean."""
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
        """Equations that hold together."""
        rows = [self._nested(self._clause)]
        while self._accept("\\\\", ",") and self._peek() != "end":
            rows.append(self._nested(self._clause))
        self._expect("end")
        if self._environment_name() != "cases" or len(rows) < 2:
            raise UnparsableError("a definition by cases")
        return Listing(tuple(rows), "and")

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
    "{": lambda p: p._rest_of_braces(),
    "\\{": lambda p: p._set_braces(),
    "|": lambda p: p._absolute_value(),
    "frac": lambda p: p._fraction(),
    "sqrt": lambda p: p._root(),
    "binom": lambda p: p._binomial(),
    "lfloor": lambda p: p._rounded_down("floor", "rfloor"),
    "lceil": lambda p: p._rounded_down("ceil", "rceil"),
    "begin": lambda p: p._environment(),
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
    """-term; a minus before a mixed number or a measured value belongs to all of it."""
    if isinstance(term, Product) and isinstance(term.factors[0], Number):
        return Product(
            (Number(-term.factors[0].value, term.factors[0].decimals), *term.factors[1:])
        )
    return negative(term)


def _is_proper_fraction(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator > 1 and 0 < node.value < 1


def _fraction_value(node: Node) -> Fraction:
    assert isinstance(node, Number)
    return node.value
