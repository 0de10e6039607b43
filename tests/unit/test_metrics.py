"""Reductions of metrics."""

from __future__ import annotations

import math

from rlsys.metrics import combine, maximum, mean, total, values


def test_each_reduction():
    left = {"t": total(1), "m": mean(1.0, 3), "x": maximum(2.0)}
    right = {"t": total(2), "m": mean(5.0, 1), "x": maximum(1.0)}
    assert values(combine([left, right])) == {"t": 3, "m": 2, "x": 2}


def test_a_mean_over_nothing_takes_no_part():
    """Combine a mean of weight 0, whatever its value is, NaN included."""
    for nothing in (mean(0.0, 0), mean(math.nan, 0)):
        assert values(combine([{"m": nothing}, {"m": mean(2.0, 4)}])) == {"m": 2}
        assert values(combine([{"m": mean(2.0, 4)}, {"m": nothing}])) == {"m": 2}
        assert values(combine([{"m": nothing}, {"m": nothing}])) == {}


def test_nan_stays_nan_in_any_order():
    """Combine in both orders: in Python max(1, nan) is 1, and max(nan, 1) is nan."""
    for kind in (total, mean, maximum):
        for pair in ((kind(1.0), kind(math.nan)), (kind(math.nan), kind(1.0))):
            (value,) = values(combine([{"a": part} for part in pair])).values()
            assert math.isnan(value)
