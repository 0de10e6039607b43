"""The MATH verifier under its former name; it lives in `rlsys.math_verifier`."""

from rlsys.math_verifier import MathVerdict, verify_math

__all__ = ["MathVerdict", "verify_math"]
