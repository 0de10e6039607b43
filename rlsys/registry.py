"""Registries: estimators, objectives and rewards by the name in a config, with their parameters."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import (
    Any,
    Generic,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

E = TypeVar("E")


def _itself(entry: Any) -> Callable[..., Any]:
    return entry


class Registry(Generic[E]):
    """Entries of one kind by name: functions, or records of a function and its declarations."""

    def __init__(
        self, kind: str, *, function_of: Callable[[E], Callable[..., Any]] = _itself
    ) -> None:
        self._kind = kind
        self._function_of = function_of
        self._entries: dict[str, E] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Return a decorator that makes a function available as `name`; see `add`."""
        self.check_name(name)

        def decorator(entry: E) -> E:
            self.add(name, entry)
            return entry

        return decorator

    def check_name(self, name: object) -> None:
        """Refuse a value that is not a name, as when the decorator was written without parentheses.

        Raises:
            ValueError: it is not a name.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{self._kind}: {name!r} is not a name. Register with the name in parentheses, "
                "as in @register...('my_name')."
            )

    def add(self, name: str, entry: E) -> None:
        """Make `entry` available as `name`.

        A module may be imported twice, but two functions may not have one name.

        Raises:
            ValueError: something that cannot be called, a class, or a name that is taken.
        """
        function = self._function_of(entry)
        self._check_callable(name, function)
        if name in self._entries:
            known = self._function_of(self._entries[name])
            if not _same_definition(known, function):
                raise ValueError(
                    f"{self._kind} {name!r} is already registered by {full_name(known)}: "
                    "choose another name"
                )
        self._entries[name] = entry

    def _check_callable(self, name: str, function: object) -> None:
        if inspect.isclass(function):
            raise ValueError(
                f"{self._kind} {name!r}: {function.__name__} is a class. Give it a __call__ and "
                "register an instance."
            )
        if not callable(function):
            raise ValueError(
                f"{self._kind} {name!r}: a {type(function).__name__} cannot be called. Register a "
                "function, a partial or an object with __call__."
            )

    def names(self) -> tuple[str, ...]:
        """Return all registered names, sorted."""
        return tuple(sorted(self._entries))

    def get(self, name: str, *, field: str | None = None) -> E:
        """Return the entry called `name`.

        Raises:
            ValueError: no such name; the message has the nearest ones. `field` is the config field
                that held it.
        """
        if name in self._entries:
            return self._entries[name]

        near = difflib.get_close_matches(name, self._entries, n=3)
        hint = f"Known: {', '.join(self.names())}."
        if near:
            hint = f"Did you mean {' or '.join(near)}?"
        raise ValueError(
            f"{field or self._kind}: unknown {self._kind} {name!r}. {hint} A plug-in's names need "
            "its module in `plugins`."
        )


def plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `def` behind a registered callable.

    Of a `functools.partial` it is the wrapped function, of an object its `__call__`.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__


def short_name(function: Callable[..., Any]) -> str:
    """Return the name of a registered callable, for messages; of an object, that of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def full_name(function: Callable[..., Any]) -> str:
    """Return module and qualified name of a registered callable, for messages."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _same_definition(first: Callable[..., Any], second: Callable[..., Any]) -> bool:
    """Return whether two callables are defined at one place, as when a module is imported twice.

    Two definitions of one name in one module differ by their lines. In a notebook (`__main__`) a
    later cell replaces an earlier one.
    """
    if first is second:
        return True
    if full_name(first) != full_name(second) or type(first) is not type(second):
        return False

    module = full_name(first).removesuffix(f".{short_name(first)}")
    return module == "__main__" or _first_line(first) == _first_line(second)


def _first_line(function: Callable[..., Any]) -> int | None:
    code = getattr(plain_function(function), "__code__", None)
    return code.co_firstlineno if code else None


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a registered function, which a config may set."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def default_parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of the keyword parameters of a registered function."""
    return {
        name: parameter.default
        for name, parameter in keyword_parameters(function).items()
        if parameter.default is not parameter.empty
    }


def follow_token_limit(
    function: Callable[..., Any], parameters: Mapping[str, Any], limit: int
) -> dict[str, Any]:
    """Return `parameters` with the keyword `max_tokens` set to `limit`.

    Only where `function` takes that keyword and it is None or left out. It is for estimators and
    reward functions that depend on `generation.max_tokens`: a run then sets its token limit once.
    """
    follows = "max_tokens" in keyword_parameters(function)
    if follows and parameters.get("max_tokens") is None:
        return {**parameters, "max_tokens": limit}
    return dict(parameters)


def check_parameters(
    function: Callable[..., Any], parameters: Mapping[str, Any], *, field: str
) -> None:
    """Refuse parameters that `function` does not take, of the wrong type, or missing.

    Raises:
        ValueError: names field, value and what is accepted.
    """
    accepted = keyword_parameters(function)
    hints = type_hints(function)
    for name, value in parameters.items():
        if name not in accepted:
            _refuse_name(function, name, accepted, field)
        if name in hints:
            _check_type(function, f"{field}.{name}", value, hints[name])
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field}.{name}: {value} is not a number. Give a finite one.")

    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in parameters:
            raise ValueError(
                f"{field}.{name}: {short_name(function)} needs this parameter and has no default. "
                "Set it."
            )


def _refuse_name(
    function: Callable[..., Any], name: str, accepted: Iterable[str], field: str
) -> NoReturn:
    near = difflib.get_close_matches(name, accepted, n=2)
    hint = f"It takes {', '.join(accepted) or 'no parameters'}."
    if near:
        hint = f"Did you mean {' or '.join(near)}?"
    raise ValueError(f"{field}.{name}: {short_name(function)} has no such parameter. {hint}")


def _check_type(function: Callable[..., Any], path: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal and value not in get_args(hint):
        choices = ", ".join(map(str, get_args(hint)))
        raise ValueError(f"{path}: {value!r} is not accepted. Choose one of {choices}.")
    if not _is_instance(value, hint):
        expected = getattr(hint, "__name__", str(hint))
        raise ValueError(
            f"{path}: {value!r} is a {type(value).__name__}; {short_name(function)} expects "
            f"{expected}."
        )


Validate = Callable[..., None]  # called with keyword parameters; raises ValueError


def check_values(
    name: str,
    function: Callable[..., Any],
    validate: Validate | None,
    parameters: Mapping[str, Any],
    *,
    field: str,
) -> None:
    """Refuse parameters that a registered function does not take or that its `validate` refuses.

    `validate` is called with all keyword parameters of the function, defaults included. The
    function itself is not called.

    Raises:
        ValueError: names field, value and remedy.
    """
    check_parameters(function, parameters, field=field)
    if validate is None:
        return

    try:
        validate(**(default_parameters(function) | dict(parameters)))
    except Exception as error:  # a plug-in's code may raise anything
        message = " ".join(str(error).split()) or type(error).__name__
        known = message.startswith(field)
        raise ValueError(message if known else f"{field} of {name!r}: {message}") from error


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations; none where they use names that only a type checker imports."""
    try:
        return get_type_hints(plain_function(function))
    except (NameError, TypeError):
        return {}


def _is_instance(value: object, hint: Any) -> bool:
    """Return whether `value`, as read from YAML, fits an annotation.

    Annotations of other kinds accept everything.
    """
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
