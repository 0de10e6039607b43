"""The console of all commands: it shows a text as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from rlsys.config.secrets import SHORTEST
from rlsys.run.shown_text import shown, visible


class PlainConsole(Console):
    """A console that shows texts as they are, but for secrets and control characters.

    Brackets and colons in a response or a file name are no markup and no emoji, and escapes stand
    for what would act on the terminal.
    """

    def __init__(self, **options: Any) -> None:
        """Open the console; `options` as of `rich.console.Console`."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text for rich, so that the width of a column is that of what is shown."""
        return super().render_str(shown(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the parts of what is shown; rich's own control sequences have a part each."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
                continue
            # Most parts of a live display are too short for a secret.
            show = shown if len(segment.text) >= SHORTEST else visible
            yield Segment(show(segment.text), segment.style)
