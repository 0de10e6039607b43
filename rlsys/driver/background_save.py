"""A checkpoint whose files are written while training goes on.

    the pause             the ranks copy their state into host memory
    beside training       the ranks write files --> the driver seals and renames the checkpoint

Until it is sealed, the newest checkpoint is the one before. There is one at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rlsys.run.checkpoints import CheckpointStore

# After an error of the run: for a checkpoint of which all files are there, and for a cancellation.
SEALING_S = 300.0
CANCEL_S = 5.0

logger = logging.getLogger(__name__)

Written = Callable[[], Awaitable[None]]  # waits until the files of a model are complete


class HasFiles(Protocol):
    """A part of a run whose state is large: a model with its optimizer."""

    async def save(self, directory: Path) -> None: ...

    async def copy_state(self, directory: Path) -> Written: ...

    async def load(self, directory: Path) -> None: ...


class BackgroundSave:
    """One checkpoint, from its pause until it is sealed."""

    def __init__(
        self,
        step: int,
        models: Mapping[str, HasFiles],
        store: CheckpointStore,
        state: dict[str, Any],
        sealed: Callable[[Path, float], None],
        clock: Callable[[], float],
    ) -> None:
        """Begin the pause; `copied` waits for its end.

        Args:
            models: by their directories in the checkpoint.
            state: the driver's, which nobody changes any more.
            sealed: gets the path of the checkpoint and the seconds since the pause.
        """
        self.step = step
        self._models = models
        self._store = store
        self._state = state
        self._sealed = sealed
        self._clock = clock
        self._began = 0.0
        self._copied = asyncio.Event()
        self._is_sealing = False
        self._task = asyncio.create_task(self._save())

    async def copied(self) -> None:
        """Wait until training may go on.

        Raises:
            Exception: the state was not copied, or written already but not successfully.
        """
        pause = asyncio.create_task(self._copied.wait())
        try:
            await asyncio.wait((self._task, pause), return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
        self.raise_failure()

    @property
    def is_done(self) -> bool:
        """Whether it is sealed, or has failed."""
        return self._task.done()

    def raise_failure(self) -> None:
        """Raise the error with which it has ended, if it has."""
        if self._task.done():
            self._task.result()

    async def finish(self) -> None:
        """Wait until it is sealed.

        Raises:
            OSError: the disk failed or is full.
            Exception: any other of a rank.
        """
        await asyncio.wait((self._task,))
        self._task.result()

    def cancel(self) -> None:
        """Delete it unless it is sealed, as soon as the event loop gets to it."""
        self._task.cancel()

    async def leave(self, cause: Exception) -> None:
        """End it after an error of the run: seal it if all files are written, else delete it."""
        if self._is_sealing:
            await asyncio.wait((self._task,), timeout=SEALING_S)
        self._task.cancel()
        await asyncio.wait((self._task,), timeout=CANCEL_S)
        if not self._task.done() or self._task.cancelled():
            logger.warning("the checkpoint of step %d was not finished: discarded", self.step)
        elif (error := self._task.exception()) not in (None, cause):
            logger.warning("the checkpoint of step %d failed", self.step, exc_info=error)

    async def _save(self) -> None:
        path = await self._store.save(self.step, self._write, self._state)
        self._sealed(path, self._clock() - self._began)

    async def _write(self, checkpoint: Path) -> None:
        written: list[Written] = []
        for directory, model in self._models.items():
            target = checkpoint / directory
            target.mkdir(parents=True, exist_ok=True)
            written.append(await model.copy_state(target))
        self._began = self._clock()
        self._copied.set()

        await all_of(one() for one in written)
        self._is_sealing = True


async def all_of(waits: Iterable[Awaitable[Any]]) -> None:
    """Wait for all, or for the first error, after which nobody waits for the others."""
    tasks = [asyncio.ensure_future(one) for one in waits]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
