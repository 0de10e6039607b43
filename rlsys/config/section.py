"""The base of every configuration section: frozen, and strict about names."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 3.4e38  # beyond it float32 has infinity


class Section(BaseModel):
    """One section of a `RunConfig`.

    Each field carries its documentation in `Field(description=...)`: units, and what 0 or null means. Command-line help and
    `docs/configuration.md` are made from it, so a default is written down exactly once.

    Numbers are finite in float32 and strings are not empty: nothing here means anything at infinity, and what may be left out is null. true is no 1.
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
    def _is_a_number_of_use(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read true as 1, and arithmetic 1e39 as infinity."""
        assert info.field_name
        annotation = cls.model_fields[info.field_name].annotation
        is_switch = annotation is bool or bool in get_args(annotation)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, bool) and not is_switch:
                raise ValueError("true and false belong to switches")
            if isinstance(item, int | float) and abs(item) > LARGEST:
                raise ValueError(f"it should be a finite number, at most {LARGEST:g}")
        return value
