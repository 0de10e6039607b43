"""Mistakes of the user, collected, so that all of them are reported at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rlsys.config_error import ConfigError

T = TypeVar("T")

logger = logging.getLogger(__name__)


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turn a ValueError into a ConfigError, for code that does nothing but check input."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Mistakes:
    """A list of mistakes, so that the user sees all of them at once and not only the first."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def attempt(self, field: str, check: Callable[[], T]) -> T | None:
        """Return the result of `check`; where it raises, add the message and return None.

        The message of a ValueError names its field. Plug-ins and readers of files may raise
        anything else; those messages are preceded by `field`.
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
        """Raise an error with all mistakes, if there are any.

        Raises:
            ConfigError: every mistake, a line each.
        """
        if self.lines:
            raise ConfigError("\n".join(self.lines))
