"""The table of published algorithms, beside the pieces that it names. It is configuration, and is kept there."""

from rlsys.config.presets import PRESETS

__all__ = ["PRESETS"]
