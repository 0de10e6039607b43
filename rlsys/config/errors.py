"""Mistakes of the user: one class of error, and a collector that reports all of them at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """One or more mistakes that the user can correct, a line each: field, value and remedy.

    A command that ends with it prints the lines and exits with code 2, without a traceback.
    """


@contextmanager
def as_config_error() -> Iterator[None]:
    """Raise a ValueError as a ConfigError: for code that only looks at input."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Mistakes:
    """Collect mistakes while checks go on, so that the user sees all of them in one go."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def attempt(self, field: str, check: Callable[[], T]) -> T | None:
        """Return what `check` returns, or None where it raised: then the message is a mistake.

        `field` names what was checked where the error is not a ValueError, which names it itself:
        plug-ins and readers of files may raise anything.
        """
        try:
            return check()
        except ValueError as error:
            self.lines.append(str(error))
        except Exception as error:
            logger.debug("%s", field, exc_info=True)
            message = " ".join(str(error).split())
            self.lines.append(f"{field}: {type(error).__name__}: {message}")
        return None

    def refuse(self) -> None:
        """Raise all mistakes, where there are any.

        Raises:
            ConfigError: every mistake, a line each.
        """
        if self.lines:
            raise ConfigError("\n".join(self.lines))
