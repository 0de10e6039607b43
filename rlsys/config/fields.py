"""Every field of the configuration by its dotted name, and its type in words."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlsys.config.run import RunConfig


def all_fields(
    model: type[BaseModel] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every leaf field with its dotted name, in the order of the models."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def field_at(name: str, model: type[BaseModel] = RunConfig) -> FieldInfo | None:
    """Return the field of a dotted name, or None; below a mapping, the field of its values."""
    field: FieldInfo | None = None
    parts = name.split(".")
    for i, part in enumerate(parts):
        field = model.model_fields.get(part.replace("-", "_"))
        if field is None:
            return None
        if get_origin(field.annotation) is dict:
            return field if i == len(parts) - 1 else _value_of(field)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        elif i < len(parts) - 1:
            return None
    return field


def _value_of(field: FieldInfo) -> FieldInfo:
    """Return the type of a mapping's values as a field."""
    return FieldInfo(annotation=get_args(field.annotation)[1])


def type_name(annotation: Any) -> str:
    """Return a type in the words of --help: int, text, a|b, list of int, ..."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation is type(None):
        return "null"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts)
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    if origin is dict:
        return "mapping"
    if parts and origin is not None:  # Literal
        return "|".join(map(str, parts))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    words = {str: "text", bool: "true|false"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))
