"""Labels of a cluster's nodes, by which roles are placed."""

from typing import Annotated

from pydantic import AfterValidator

EXAMPLE = "pool=train"


def split_label(label: str) -> tuple[str, str]:
    """Return the name and the value of a label name=value."""
    name, _, value = label.partition("=")
    return name, value


def _checked(label: str) -> str:
    name, value = split_label(label)
    if not name or not value or label != label.strip():
        raise ValueError(f"a label is name=value, such as {EXAMPLE}")
    # Ray reads these as operators: in(a,b), !in(a,b), !value.
    if value.startswith("!") or "(" in value:
        raise ValueError("the value of a label is plain text, without operators")
    return label


NodeLabel = Annotated[str, AfterValidator(_checked)]
