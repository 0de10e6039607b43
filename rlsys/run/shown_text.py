r"""Texts as people see them: without secrets, and without characters that act on the display.

Responses, data files, file names and the messages of other libraries may hold anything. A control
sequence could change or hide what a terminal shows, and a bidirectional mark shows text in another
order than it has. They are shown as escapes: \u001b, \u202e.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlsys.config.secrets import redacted

_KEPT = "\t\n"
_RANGES = (
    (0x00, 0x1F),  # control characters
    (0x7F, 0x9F),
    (0x061C, 0x061C),  # bidirectional marks, embeddings, overrides and isolates
    (0x200E, 0x200F),
    (0x202A, 0x202E),
    (0x2066, 0x2069),
    (0x2028, 0x2029),  # separators of lines and paragraphs
    (0xD800, 0xDFFF),  # lone surrogates, which no file can hold
    (0xE0000, 0xE007F),  # invisible tags
)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


_ESCAPES = {
    code: _escape(code)
    for first, last in _RANGES
    for code in range(first, last + 1)
    if chr(code) not in _KEPT
}


def visible(text: str) -> str:
    """Return a text with escapes for what acts on the display; tabs and newlines stay."""
    return text.translate(_ESCAPES)


def shown(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text for people: visible, and without the secrets of the environment."""
    return visible(redacted(text, environment))
