"""Limits of the work on one answer, checked before any of it is done.

Every limit is on a size that is known beforehand (characters, tokens, depth, bits of a power), so
an adversarial answer is refused in time proportional to its length. The reward pool's wall clock is
the second line of defence, not the first.
"""

from __future__ import annotations

MAX_ANSWER_CHARACTERS = 2000  # no answer of MATH has more than a few hundred
# Of an answer in words; more is a sentence, which nobody repeats word for word. MATH has at most 3.
MAX_WORDS_OF_AN_ANSWER = 8
MAX_TOKENS = 1500
MAX_DEPTH = 40  # nesting of brackets, fractions, roots and exponents
MAX_EXACT_BITS = 16_000  # of an exact integer or of a fraction's parts: 2^4950 is an answer of MATH
MAX_FACTORIAL = 1000
MAX_MAGNITUDE_DIGITS = 2000  # of a number in a high-precision evaluation
MAX_LIST_ITEMS = 64  # unordered comparison is quadratic
MAX_MATRIX_SIDE = 6  # of a matrix in a product
MAX_MATRIX_EXPONENT = 20
MAX_MATRIX_NODES = 5000  # of the cells of a product: with variables they grow with every factor
MAX_SIGN_CHOICES = 4  # plus-minus signs in one item: 2^4 values


class UnparsableError(Exception):
    """The text is not a mathematical answer that the grammar knows."""


class TooLargeError(Exception):
    """A number would exceed the limits of this module."""


class UndefinedError(Exception):
    """An expression has no value at the point where it was evaluated.

    It has a zero denominator, or the root of a negative number in the reals.
    """
