"""The base of every configuration section: frozen, and strict about names."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a `RunConfig`.

    Each field carries its documentation in `Field(description=...)`: units, and what 0 or null means. Command-line help and
    `docs/configuration.md` are made from it, so a default is written down exactly once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
