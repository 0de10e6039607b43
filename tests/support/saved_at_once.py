"""Parts of a run that save everything in the pause of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from rlsys.driver.background_save import Written


class SavedAtOnce:
    """Base of a `HasFiles` whose `copy_state` has nothing left to write."""

    async def save(self, directory: Path) -> None:
        raise NotImplementedError

    async def copy_state(self, directory: Path) -> Written:
        await self.save(directory)
        return _nothing


async def _nothing() -> None: ...
