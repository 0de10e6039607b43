"""Named functions: how estimators, objectives and rewards are found by the name in a config, and their parameters checked."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Functions of one kind by name."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._functions: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that makes a function available as `name`. A module may be imported twice; two functions may not share a name."""

        def decorator(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise ValueError(
                    f"{self._kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}: choose another name"
                )
            self._functions[name] = function
            return function

        return decorator

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        return tuple(sorted(self._functions))

    def get(self, name: str, *, field: str | None = None) -> F:
        """The function called `name`.

        Raises:
            ValueError: no such name; the message has the nearest ones. `field` is the config field that held it.
        """
        if name not in self._functions:
            near = difflib.get_close_matches(name, self._functions, n=3)
            hint = (
                f"Did you mean {' or '.join(near)}?"
                if near
                else f"Known: {', '.join(self.names())}."
            )
            raise ValueError(
                f"{field or self._kind}: unknown {self._kind} {name!r}. {hint} A plug-in's names need its module in `plugins`."
            )
        return self._functions[name]


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a registered function: what a config may set."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check_parameters(
    function: Callable[..., Any], parameters: Mapping[str, Any], *, field: str
) -> None:
    """Refuse parameters that `function` does not take, of the wrong type, or missing where it has no default.

    Raises:
        ValueError: names field, value and what is accepted.
    """
    accepted = keyword_parameters(function)
    hints = get_type_hints(function)
    for name, value in parameters.items():
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=2)
            hint = (
                f"Did you mean {' or '.join(near)}?"
                if near
                else f"It takes {', '.join(accepted) or 'no parameters'}."
            )
            raise ValueError(f"{field}.{name}: {function.__name__} has no such parameter. {hint}")
        if (
            name in hints
            and get_origin(hints[name]) is Literal
            and value not in get_args(hints[name])
        ):
            raise ValueError(
                f"{field}.{name}: {value!r} is not accepted. Choose one of {', '.join(map(str, get_args(hints[name])))}."
            )
        if name in hints and not _is_instance(value, hints[name]):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise ValueError(
                f"{field}.{name}: {value!r} is a {type(value).__name__}; {function.__name__} expects {expected}."
            )
    missing = [
        name
        for name, p in accepted.items()
        if p.default is inspect.Parameter.empty and name not in parameters
    ]
    if missing:
        raise ValueError(
            f"{field}.{missing[0]}: {function.__name__} needs this parameter and has no default. Set it."
        )


def _is_instance(value: object, hint: Any) -> bool:
    """Whether `value`, as read from YAML, fits an annotation; annotations of other kinds are let through."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_instance(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    return True
