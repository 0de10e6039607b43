"""The base of every configuration section: frozen, and strict about names."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 3.4e38  # float32 represents larger numbers as infinity


class Section(BaseModel):
    """One section of a `RunConfig`.

    Each field carries its documentation in `Field(description=...)`: its unit, and the meaning of 0
    and null. The command-line help and `docs/configuration.md` are generated from it, so a default
    is written down exactly once.

    Numbers must be finite in float32, and strings must not be empty (null stands for an absent
    value). true and false are not accepted as numbers.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        str_min_length=1,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_finite_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true, which pydantic reads as 1, and 1e39, which is infinite in float32."""
        assert info.field_name
        annotation = cls.model_fields[info.field_name].annotation
        is_switch = annotation is bool or bool in get_args(annotation)
        items = value if isinstance(value, list | tuple) else (value,)

        for item in items:
            if isinstance(item, bool) and not is_switch:
                raise ValueError("true and false belong to switches")
            if isinstance(item, int | float) and abs(item) > LARGEST:
                raise ValueError(f"it should be a finite number, at most {LARGEST:g}")
        return value
