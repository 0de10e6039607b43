"""The lexer: turns the text of an answer into tokens.

What is not in the tables of this module is not a token, and the answer is then compared as text
only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rlsys.math_verifier.limits import MAX_ANSWER_CHARACTERS, MAX_TOKENS, UnparsableError
from rlsys.math_verifier.units import SINGLE_LETTER_UNITS, UNIT_WORDS


class Token(NamedTuple):
    """One token of an answer."""

    kind: str  # number | letter | word | name (an operator, bracket, function or constant)
    text: str
    spaced: bool = False  # white space stands before it
    decimals: int | None = None  # of a number


def _words(text: str) -> list[str]:
    return text.split()


FUNCTIONS = frozenset(
    _words(
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth "
        "log ln lg exp sqrt cbrt gcd lcm min max cis asin acos atan abs floor ceil arg Re Im"
    )
)
# Their prefixes of a run of letters without a space: "sinx".
_PREFIX_FUNCTIONS = ("arcsin", "arccos", "arctan", "sin", "cos", "tan", "log", "ln", "sqrt")
_UNICODE = {
    **dict.fromkeys("−–—﹣－", "-"), **dict.fromkeys("×✕", "\\times "),
    **dict.fromkeys("·⋅∙•", "\\cdot "), "÷": "\\div ", "≤": "\\le ", "⩽": "\\le ",
    "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∞": "\\infty ",
    "π": "\\pi ", "√": "\\sqrt ", "∛": "\\sqrt[3]", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "∉": "\\notin ", "∅": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ", "°": "^\\circ ",
    "º": "^\\circ ", "ℝ": "\\mathbb{R}", "∖": "\\setminus ", "¢": "\\text{ cents}",
    "£": "\\pounds ", "€": "\\euro ", "¥": "\\yen ", "…": "\\ldots ", "∠": "\\angle ",
    "△": "\\triangle ", "∧": "\\land ", "∨": "\\lor ", "θ": "\\theta ", "α": "\\alpha ",
    "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "μ": "\\mu ",
    "ω": "\\omega ", "σ": "\\sigma ", "⟨": "\\langle ", "⟩": "\\rangle ", "′": "'",
    "∶": ":", "，": ",", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ",
    "⌉": "\\rceil ", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    "½": "\\frac12 ", "⅓": "\\frac13 ", "⅔": "\\frac23 ", "¼": "\\frac14 ",
    "¾": "\\frac34 ", "⅕": "\\frac15 ", "⅖": "\\frac25 ", "⅗": "\\frac35 ",
    "⅘": "\\frac45 ", "⅙": "\\frac16 ", "⅚": "\\frac56 ", "⅛": "\\frac18 ",
    "⅜": "\\frac38 ", "⅝": "\\frac58 ", "⅞": "\\frac78 ", "⁄": "/",
    **{chr(0xFF10 + i): str(i) for i in range(10)},
}  # fmt: skip
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_PLAIN_DIGITS = str.maketrans(
    "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ" + "₀₁₂₃₄₅₆₇₈₉",
    "0123456789+-n" + "0123456789",
)
_TRANSLATION = str.maketrans(_UNICODE)

_IGNORED = frozenset(
    _words(
        "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr "
        "displaystyle textstyle scriptstyle limits nolimits mathstrut strut hline cline boldmath "
        "rm bf it sf tt mathop mathbin mathrel mathord nonumber therefore"
    )
)
_INVISIBLE = frozenset({"phantom", "hphantom", "vphantom", "label", "tag"})
_SPACES = frozenset(
    _words("quad qquad enspace thinspace medspace thickspace space hspace vspace hskip")
)
_TEXT_COMMANDS = frozenset(
    _words(
        "text mbox hbox textnormal textrm textbf textit textsf texttt textup emph mathrm "
        "operatorname mathsf mathtt"
    )
)
_STYLE_COMMANDS = frozenset(
    _words("mathbf mathit boldsymbol bm bold vec hat overrightarrow mathcal mathscr")
)
_TRANSPARENT = frozenset(_words("boxed fbox underline widehat mathchoice ensuremath cancel"))
_RENAMED = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "sfrac": "frac", "nicefrac": "frac",
    "dbinom": "binom", "tbinom": "binom", "cdot": "*", "times": "*", "ast": "*", "div": "/",
    "slash": "/", "pm": "+-", "mp": "-+", "le": "<=", "leq": "<=", "leqslant": "<=",
    "leqq": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=", "lt": "<", "gt": ">",
    "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~", "doteq": "~", "cup": "union",
    "bigcup": "union", "cap": "intersection", "bigcap": "intersection", "setminus": "difference",
    "backslash": "difference", "smallsetminus": "difference", "in": "in",
    "notin": "not in", "infty": "infinity",
    "pi": "pi", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "langle": "<|",
    "rangle": "|>", "lvert": "|", "rvert": "|", "vert": "|", "lVert": "|", "rVert": "|",
    "Vert": "|", "mid": "|", "lfloor": "lfloor", "rfloor": "rfloor", "lceil": "lceil",
    "rceil": "rceil", "colon": ":", "land": "and", "wedge": "and", "lor": "or", "vee": "or",
    "circ": "circ", "degree": "degree", "textdegree": "degree", "emptyset": "emptyset",
    "varnothing": "emptyset", "frac": "frac", "binom": "binom", "sqrt": "sqrt", "over": "over",
    "choose": "choose", "begin": "begin", "end": "end", "imath": "i", "pounds": "pounds",
    "textsterling": "pounds", "euro": "euro", "yen": "yen", "top": "top", "overline": "overline",
    "bar": "overline", "prime": "prime", "coloneqq": "=", "equiv": "=", "to": ":", "rtimes": "*",
    "And": "and", "pmod": "mod", "bmod": "mod", "mod": "mod", "percent": "%",
    "textdollar": "\\$", "mathdollar": "\\$", "sum": "sum", "prod": "prod",
}  # fmt: skip
_SYMBOL_COMMANDS = frozenset(
    _words(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
        "xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma "
        "Upsilon Phi Psi Omega triangle angle measuredangle ell hbar"
    )
)
WORD_NAMES = {
    "and": "and", "or": "or", "percent": "%", "pct": "%", "percentage": "%",
    "degrees": "degree", "degree": "degree", "deg": "degree", "infinity": "infinity", "mod": "mod",
    "inf": "infinity", "infty": "infinity", "to": ":",
}  # fmt: skip
_COMMAND_NAMES = (
    FUNCTIONS | _IGNORED | _INVISIBLE | _SPACES | _TEXT_COMMANDS | _STYLE_COMMANDS | _TRANSPARENT
    | _SYMBOL_COMMANDS | frozenset(_RENAMED) | frozenset(_words("mathbb Bbb ldots dots cdots not"))
    | frozenset("!,;:$%{}")
)  # fmt: skip
_BACKSLASHES = re.compile(r"\\+")
_DOUBLED_COMMAND = re.compile(r"(?<!\\)\\\\([A-Za-z]+|[^A-Za-z\\])")
_NO_VALUES = frozenset({"=", ",", ";", "and", "or", ":", "(", "{", "["})
_ESCAPED_FORMULA = re.compile(r"\s*(?:\\\\\(.*\\\\\)|\\\\\[.*\\\\\])\s*", re.DOTALL)
_PUNCTUATION = frozenset("+-*/^_=<>()[]{}|,;:!%&'")
# Commands of one character that stand for something: \\{ is a brace, \\& a word.
_ESCAPED = {"{": "\\{", "}": "\\}", "$": "\\$", "%": "%", "&": "and", "|": "|"}
MAX_REPEATED_DIGITS = 12  # before the period, and in it, where dots stand for the rest of a decimal
_STRONG_SEPARATOR = r"(?:,\\!\s?|\{,\}(?:\\!)?|\\,|\\ |\\;|\\!,|,\\,)"
_INTEGER = re.compile(
    rf"[1-9]\d{{0,2}}(?:(?:{_STRONG_SEPARATOR}|,)\d{{3}}(?!\d))+"
    r"|[1-9]\d{0,2}(?: \d{3}(?!\d))+"
    r"|\d+",
    re.ASCII,
)
_INTEGER_IN_BRACKETS = re.compile(
    rf"[1-9]\d{{0,2}}(?:{_STRONG_SEPARATOR}\d{{3}}(?!\d))+|\d+", re.ASCII
)
_DECIMALS = re.compile(r"(?:\.|\{,\}|\{\.\}|\\\.)(\d+)", re.ASCII)
_REPEATING = re.compile(
    r"\.(\d*)(?:\\(?:overline|bar|dot|widehat)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\)(?=\s*$))",
    re.ASCII,
)
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,6})(?![\d.])", re.ASCII)
_NEGATED = re.compile(r"=|\\in(?![A-Za-z])")
_ELLIPSIS = re.compile(r"\s*(?:\\l?dots\b|\\cdots\b|\.\.\.)")
_PER_TIME = re.compile(r"\s*/\s*(?:s|h|sec|min|hr)(?![a-z])")
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_LETTERS = re.compile(r"[A-Za-z]+")
_GLUED_OR = re.compile(r"or(?=[A-Za-z](?:_\{?\w{1,3}\}?|\([a-z]\))?\s*=)")
_PER_CENT = re.compile(r"per\s+cent(?![A-Za-z])", re.IGNORECASE)
_TEXT_RUN = re.compile(r"[A-Za-z]+(?:[.'’-][A-Za-z]+)*\.?")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_GLUED_SPACE = re.compile("q?quad")
# Behind a wide space: the name of another value.
_ANOTHER_NAME = re.compile(r"\s*(?:\\quad\s*)*[A-Za-z](?:_(?:\w|\{\w{1,3}\}))?\s*=")
NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen "
            "fourteen fifteen sixteen seventeen eighteen nineteen"
        )
    )
} | {
    word: 10 * tens
    for tens, word in enumerate(
        _words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2
    )
}
SCALE_WORDS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def unescaped(text: str) -> str:
    r"""Return text that was escaped for JSON or a string literal as LaTeX; other text unchanged.

    Escaping doubles every backslash, so text is escaped where no run of backslashes has an odd
    length, and a pair stands before the name or sign of a command.

    Example: `unescaped(r"\\frac{1}{2}")` is `\frac{1}{2}`.
    """
    if "\\\\" not in text:
        return text
    if _ESCAPED_FORMULA.fullmatch(text):
        return text.replace("\\\\", "\\")
    if any(len(run) % 2 for run in _BACKSLASHES.findall(text)):
        return text
    if not any(name in _COMMAND_NAMES for name in _DOUBLED_COMMAND.findall(text)):
        return text
    return text.replace("\\\\", "\\")


def tokenize(text: str, *, thousands: bool = True) -> list[Token]:
    r"""Return the tokens of an answer.

    With `thousands` false a comma always separates: `1,234` is two numbers.

    Raises:
        UnparsableError: a character or command that no mathematical answer needs, or too many.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise UnparsableError("too long")

    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_PLAIN_DIGITS)}}}", text)
    text = _SUBSCRIPTS.sub(lambda match: f"_{{{match[0].translate(_PLAIN_DIGITS)}}}", text)
    text = _TIMES.sub("*", text.translate(_TRANSLATION))
    return _Lexer(text, thousands).run()


class _Lexer:
    def __init__(
        self, text: str, thousands: bool, in_text: bool = False, before: Sequence[Token] = ()
    ) -> None:
        self._text = text
        self._thousands = thousands
        self._in_text = in_text
        self._before = before  # the tokens before this text
        self._position = 0
        self._spaced = False
        self._brackets = 0
        self._tokens: list[Token] = []

    def run(self) -> list[Token]:
        """Return the tokens of the text."""
        # A lone dollar sign is money; a pair encloses mathematics.
        self._dollar_is_money = len(re.findall(r"(?<!\\)\$", self._text)) % 2 == 1
        while self._position < len(self._text):
            self._check_size()
            self._step()
        self._check_size()
        return self._tokens

    def _check_size(self) -> None:
        if len(self._tokens) > MAX_TOKENS:
            raise UnparsableError("too many tokens")

    def _following(self) -> str:
        """Return the character after the current one, empty at the end."""
        return self._text[self._position + 1 : self._position + 2]

    def _step(self) -> None:
        """Read what begins at the position."""
        character = self._text[self._position]
        if character.isspace() or character == "~":
            self._position += 1
            self._spaced = True
        elif character in "0123456789":
            self._number()
        elif character == ".":
            self._period()
        elif character.isascii() and character.isalpha():
            self._letters()
        elif character == "\\":
            self._command()
        elif character == "$":
            self._position += 1
            if self._dollar_is_money:
                self._add("name", "\\$")
        elif character in _PUNCTUATION:
            self._punctuation(character)
        else:
            raise UnparsableError(f"character {character!r}")

    def _period(self) -> None:
        """Read the beginning of a decimal such as .5, or skip the end of a sentence."""
        following = self._following()
        if following.isdecimal():
            self._number()
        elif following in ("", " ", "\\", "$", "}"):
            self._position += 1
        else:
            raise UnparsableError("character '.'")

    def _add(self, kind: str, text: str, decimals: int | None = None) -> None:
        self._tokens.append(Token(kind, text, self._spaced, decimals))
        self._spaced = False

    def _punctuation(self, character: str) -> None:
        two = self._text[self._position : self._position + 2]
        if two == ":=":
            self._position += 2
            self._add("name", "=")
            return
        third = self._text[self._position + 2 : self._position + 3]
        is_factorial = two == "!=" and third == "="  # 5!==120
        if two in ("<=", ">=", "!=", "**", "==") and not is_factorial:
            self._position += 2
            self._add("name", {"**": "^", "==": "="}.get(two, two))
            return

        self._position += 1
        if character in "([":
            self._brackets += 1
        elif character in ")]":
            self._brackets -= 1
        self._add("name", character)

    def _number(self) -> None:
        text = self._text
        pattern = _INTEGER if self._thousands and self._brackets <= 0 else _INTEGER_IN_BRACKETS
        match = pattern.match(text, self._position)
        digits = "".join(c for c in match[0] if c in "0123456789") if match else ""
        position = match.end() if match else self._position

        repeating = _REPEATING.match(text, position)
        if repeating:
            self._position = repeating.end()
            ellipsis = _ELLIPSIS.match(text, self._position)
            if ellipsis:
                self._position = ellipsis.end()
            period = repeating[2] or repeating[3] or repeating[4]
            self._add("number", _fraction_of_repeating(digits or "0", repeating[1], period))
            return

        decimals = None
        fraction = _DECIMALS.match(text, position)
        if fraction and not (text[position] == "{" and len(fraction[1]) == 3 and digits == ""):
            position, decimals = fraction.end(), len(fraction[1])
            ellipsis = _ELLIPSIS.match(text, position)
            if ellipsis:
                self._position = ellipsis.end()
                self._add("number", _fraction_of_ellipsis(digits or "0", fraction[1]))
                return
            digits = f"{digits or '0'}.{fraction[1]}"

        exponent = _EXPONENT.match(text, position)
        if exponent:
            position = exponent.end()
            digits += f"e{exponent[1]}"
        self._position = position
        self._add("number", digits, decimals)

    def _letters(self) -> None:
        pattern = _TEXT_RUN if self._in_text else _LETTERS
        match = pattern.match(self._text, self._position)
        assert match
        self._position = match.end()

        run = match[0].rstrip(".")
        lower = run.lower()
        glued = None if self._in_text else _GLUED_OR.match(self._text, match.start())
        per_cent = _PER_CENT.match(self._text, match.start())
        if glued and self._tokens:  # 1orx=2
            self._position = glued.end()
            self._add("name", "or")
        elif per_cent:
            self._position = per_cent.end()
            self._add("name", "%")
        elif lower in WORD_NAMES:
            self._add("name", WORD_NAMES[lower])
        elif self._in_text and lower in UNIT_WORDS and self._after_value():
            self._add("word", run)  # before the functions: "min" is a minute here
        elif run in FUNCTIONS:
            self._add("name", run)
        elif self._in_text:
            unit = run in SINGLE_LETTER_UNITS and self._after_value()
            self._add("word" if len(run) > 1 or unit else "letter", run)
        else:
            self._formula_letters(run)

    def _formula_letters(self, run: str) -> None:
        """Read a run of letters outside text commands."""
        lower = run.lower()
        if run in ("USD", "EUR"):
            self._add("name", "\\$" if run == "USD" else "euro")
        elif run == "pi":
            self._add("name", "pi")
        elif self._is_union_letter(run):
            self._add("name", "union")
        elif lower in ("th", "st", "nd", "rd") and self._follows_number():
            self._add("name", "ordinal")
        elif self._after_value() and self._is_unit(run):
            self._add("word", run)
        else:
            self._letter_run(run)

    def _follows_number(self) -> bool:
        return bool(self._tokens) and self._tokens[-1].kind == "number"

    def _is_unit(self, run: str) -> bool:
        is_unit_word = len(run) > 1 and run.lower() in UNIT_WORDS
        return is_unit_word or self._is_speed(run)

    def _is_union_letter(self, run: str) -> bool:
        following = self._text[self._position :].lstrip()[:1]
        return (
            run == "U"
            and bool(self._tokens)
            and self._tokens[-1].text in (")", "]", "}")
            and following in ("(", "[", "\\")
        )

    def _after_value(self) -> bool:
        tokens = [*self._before[-3:], *self._tokens[-4:]]
        position = len(tokens) - 1
        while position > 0 and tokens[position].text in ("{", "frac"):  # 15 \frac{m}{s}
            position -= 1
        if position > 0 and tokens[position].text == "*" and tokens[position - 1].kind == "word":
            return True
        last = tokens[position] if tokens else None
        return last is not None and (
            last.kind in ("number", "word") or last.text in (")", "}", "pi", "/", "|")
        )

    def _is_speed(self, run: str) -> bool:
        """Return whether the run is one of the letters of m/s, which are not variables."""
        if run == "m" and _PER_TIME.match(self._text, self._position):
            return True
        return (
            run in ("s", "h")
            and len(self._tokens) > 1
            and self._tokens[-1].text == "/"
            and self._tokens[-2].kind == "word"
        )

    def _letter_run(self, run: str) -> None:
        if len(run) == 1:
            self._add("letter", run)
        elif run.isupper():
            self._add("letter", run)  # a segment, an angle, a triangle: its letters have an order
        elif self._is_word(run):
            self._add("word", run)
        else:
            for function in _PREFIX_FUNCTIONS:
                if run.startswith(function) and len(run) <= len(function) + 2:
                    self._add("name", function)
                    run = run[len(function) :]
                    break
            for letter in run:
                self._add("letter", letter)

    def _is_word(self, run: str) -> bool:
        """Return whether a run of letters is a word.

        It is a product of variables only where it is short, or in alphabetical order as factors
        are written.
        """
        for function in FUNCTIONS:
            known = len(function) > 2 or function == "ln"
            if known and run.startswith(function) and len(run) <= len(function) + 2:
                return False

        if run[0].isupper() and run[1:].islower():
            return len(run) > 2
        return len(run) >= 4 and list(run) != sorted(run)

    def _command(self) -> None:
        match = _COMMAND.match(self._text, self._position)
        if match is None:
            raise UnparsableError("a lone backslash")
        name = match[1]
        start = self._position
        self._position = match.end()

        space = _GLUED_SPACE.match(name)
        if space and name not in _SPACES:  # \quadx
            name = space[0]
            self._position = start + 1 + len(name)

        if name in _ESCAPED:
            self._add("name", _ESCAPED[name])
        elif name == "\\":
            self._line_break()
        elif name in ",;: >!()[]" or name in "\n\t":
            self._spaced = self._spaced or name != "!"
        elif name in _SPACES or name in _INVISIBLE or name in _IGNORED:
            self._skip_command(name)
        elif name in _TEXT_COMMANDS:
            self._text_command(name)
        elif name in _STYLE_COMMANDS:
            self._style_command(name)
        elif name in ("mathbb", "Bbb"):
            self._blackboard()
        elif name == "not":
            self._not()
        else:
            self._named(name, start)

    def _at(self, character: str) -> bool:
        return self._text[self._position : self._position + 1] == character

    def _line_break(self) -> None:
        self._add("name", "\\\\")
        if self._at("["):  # \\[2ex]
            self._position = max(self._text.find("]", self._position) + 1, self._position)

    def _skip_command(self, name: str) -> None:
        """Skip a command that has no meaning, with its argument."""
        if name in _SPACES:
            self._spaced = True
            if self._at("{"):
                self._argument()
            elif name in ("quad", "qquad") and self._separates_values():
                self._add("name", ",")
        elif name in _INVISIBLE:
            self._argument()
        elif name in ("left", "right") and self._at("."):
            self._position += 1

    def _separates_values(self) -> bool:
        r"""Return whether a wide space stands between two equations: x = 1 \quad y = 2."""
        if not self._tokens or not _ANOTHER_NAME.match(self._text, self._position):
            return False
        has_equation = any(token.text == "=" for token in self._tokens)
        return has_equation and self._tokens[-1].text not in _NO_VALUES

    def _named(self, name: str, start: int) -> None:
        if name in _TRANSPARENT:
            return  # its argument is a group in braces
        if name in FUNCTIONS:
            self._add("name", name)
        elif name in _RENAMED:
            self._add("name", _RENAMED[name])
            if name in ("langle", "lbrack"):
                self._brackets += 1
            elif name in ("rangle", "rbrack"):
                self._brackets -= 1
        elif name in _SYMBOL_COMMANDS:
            self._add("letter", name)
        elif name in ("ldots", "dots", "cdots"):
            self._add("name", "...")
        else:
            raise UnparsableError(f"command {self._text[start : self._position]!r}")

    def _argument(self) -> str:
        """Return the text of a command's argument, in braces or one character."""
        text = self._text
        while self._position < len(text) and text[self._position] == " ":
            self._position += 1
        if self._position >= len(text):
            raise UnparsableError("a command without its argument")

        if text[self._position] != "{":
            self._position += 1
            return text[self._position - 1]

        depth = 0
        start = self._position + 1
        for position in range(self._position, len(text)):
            if text[position] in "{}" and text[position - 1 : position] != "\\":
                depth += 1 if text[position] == "{" else -1
                if depth == 0:
                    self._position = position + 1
                    return text[start:position]
        raise UnparsableError("a brace is not closed")

    def _text_command(self, name: str) -> None:
        content = self._argument()
        stripped = content.strip()
        if stripped in ("e", "i", "d") and name in ("mathrm", "operatorname"):
            self._add("letter", stripped)
            return
        raised = bool(self._tokens) and self._tokens[-1].text in ("^", "{")
        if raised and stripped in ("o", "th", "st", "nd", "rd"):
            self._add("name", "circ" if stripped == "o" else "ordinal")
            return
        self._nested(content, in_text=True)

    def _style_command(self, name: str) -> None:
        content = self._argument()
        if content in ("i", "j", "k") or content in ("\\imath", "\\jmath"):
            self._add("letter", "unit vector " + content.strip("\\")[0])
            return
        in_text = len(content) > 1 and name in ("mathbf", "mathit", "boldsymbol")
        self._nested(content, in_text=in_text)

    def _nested(self, content: str, *, in_text: bool) -> None:
        if content.count("\\") > 20 or content.count("{") > 10:
            raise UnparsableError("text within text")
        inner = _Lexer(content, self._thousands, in_text, [*self._before, *self._tokens[-4:]])
        inner._brackets = self._brackets
        inner._spaced = True
        self._tokens.extend(inner.run())
        self._brackets = inner._brackets
        self._spaced = True

    def _blackboard(self) -> None:
        letter = self._argument().strip()
        if letter == "R":
            self._add("name", "reals")
        else:
            self._add("letter", f"the set {letter}")

    def _not(self) -> None:
        """Read the relation after \\not."""
        rest = self._text[self._position :].lstrip()
        relation = _NEGATED.match(rest)
        if relation is None:
            raise UnparsableError("a negated relation")
        self._position = len(self._text) - len(rest) + relation.end()
        self._add("name", "!=" if relation[0] == "=" else "not in")


def _fraction_of_repeating(whole: str, fixed: str, period: str) -> str:
    """Return the decimal whole.fixed(period) as `a/b`."""
    scale = 10 ** len(fixed)
    denominator = scale * (10 ** len(period) - 1)
    numerator = int(whole + fixed) * (10 ** len(period) - 1) + int(period)
    return f"{numerator}/{denominator}"


def _fraction_of_ellipsis(whole: str, digits: str) -> str:
    """Return `0.333...` as 1/3, by the shortest period that fills the digits at least twice."""
    for start in range(min(len(digits), MAX_REPEATED_DIGITS)):
        rest = digits[start:]
        for length in range(1, min(len(rest) // 2, MAX_REPEATED_DIGITS) + 1):
            period = rest[:length]
            repeats = (period * len(rest))[: len(rest)] == rest
            if repeats and len(rest) >= 2 * length:
                return _fraction_of_repeating(whole, digits[:start], period)
    raise UnparsableError("digits cut off")
