"""Units of measurement.

A missing unit is forgiven, a wrong one is not, and units of one dimension are converted.
"""

from __future__ import annotations

import re
from fractions import Fraction

Dimension = tuple[tuple[str, int], ...]

# name: (dimension, size in the dimension's base unit)
_BASE: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, *entries: tuple[str, str]) -> None:
    for size, names in entries:
        for name in names.split():
            _BASE[name] = (dimension, Fraction(size))


_define(
    "length",
    ("1", "m meter meters metre metres"),
    ("1/100", "cm centimeter centimeters centimetre centimetres cms"),
    ("1/1000", "mm millimeter millimeters millimetre millimetres"),
    ("1000", "km kilometer kilometers kilometre kilometres kms"),
    ("254/10000", "in inch inches"),
    ("3048/10000", "ft foot feet"),
    ("9144/10000", "yd yds yard yards"),
    ("1609344/1000", "mi mile miles"),
)
_define(
    "time",
    ("1", "s sec secs second seconds"),
    ("60", "min mins minute minutes"),
    ("3600", "h hr hrs hour hours"),
    ("86400", "day days"),
    ("604800", "week weeks wk wks"),
)
_define("calendar", ("1", "month months"), ("12", "year years yr yrs"))
_define(
    "mass",
    ("1", "g gram grams gm gms"),
    ("1000", "kg kilogram kilograms kgs"),
    ("1/1000", "mg milligram milligrams"),
    ("45359237/100000", "lb lbs pound pounds pounds-sterling"),
    ("45359237/1600000", "oz ounce ounces"),
)
_define(
    "volume",
    ("1", "L liter liters litre litres"),
    ("1/1000", "mL ml milliliter milliliters"),
    ("3785411784/1000000000", "gallon gallons gal"),
)
_define("dollar", ("1", "dollar dollars usd"), ("1/100", "cent cents"))
_define("euro", ("1", "euro euros eur"))
_define("rupee", ("1", "rupee rupees"))
_define("yen", ("1", "yen"))
_define("angle", ("1", "radian radians rad"))
_define("celsius", ("1", "celsius"))
_define("fahrenheit", ("1", "fahrenheit"))
_define("newton", ("1", "N newton newtons"))
_define("joule", ("1", "J joule joules"))
_define("watt", ("1", "W watt watts"))
_define("hertz", ("1", "Hz hertz"))
_define("acre", ("1", "acre acres"))

_WHOLE = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_AREA = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
UNIT_WORDS = (
    frozenset(name for name in _BASE if len(name) > 1)
    | frozenset(_WHOLE)
    | frozenset({"square", "cubic", "sq", "units", "unit", "per"})
)
SINGLE_LETTER_UNITS = frozenset("mgshLNJW")
_IMPOSSIBLE = ((("impossible", 1),), Fraction(1))  # no unit has this exponent: it equals no other
_PART = re.compile(r"(/|\^-?\d+|[^\s/^]+)")


def parse_unit(text: str) -> tuple[Dimension, Fraction] | None:
    """Return dimension and size of a unit that is written as words, `/` and `^n`.

    None where a word is not known ("ways", "units").

    Example: `parse_unit("km / h")` is `((("length", 1), ("time", -1)), Fraction(5, 18))`.
    """
    if text.startswith("modulus:"):
        return ((text, 1),), Fraction(1)
    if text.lower().replace(".", "") in ("am", "pm"):
        return ((text.lower().replace(".", ""), 1),), Fraction(1)

    powers: dict[str, int] = {}
    size = Fraction(1)
    sign = 1  # -1 after a slash
    coming = 1  # the power of the next unit, 2 after "square"
    last: tuple[str, Fraction, int] | None = None  # the unit that an exponent belongs to
    written_out = " ".join(_WHOLE.get(word, word) for word in text.split())
    for part in _PART.findall(written_out):
        if part in ("/", "per"):
            sign, last = -1, None
        elif part.startswith("^") or part in ("squared", "cubed"):
            power = {"squared": 2, "cubed": 3}.get(part) or int(part[1:][:3])
            if last is None or not 0 < abs(power) <= 4:
                return _IMPOSSIBLE
            name, factor, done = last
            powers[name] += done * (power - 1)
            size *= factor ** (done * (power - 1))
        elif part in _AREA:
            coming = _AREA[part]
        elif part in _BASE or part.lower() in _BASE:
            name, factor = _BASE.get(part) or _BASE[part.lower()]
            power, coming = sign * coming, 1
            powers[name] = powers.get(name, 0) + power
            size *= factor**power
            last = (name, factor, power // abs(power)) if abs(power) == 1 else None
        else:
            return None

    if not powers:
        return None
    dimension = sorted((name, power) for name, power in powers.items() if power)
    return tuple(dimension), size
