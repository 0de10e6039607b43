"""The log of a run's faults: deaths of processes, and what was done about them.

    worker groups --record--> FaultLog --> session --> observers: console, faults.jsonl, report
                                 |
                                 +--> metrics: faults/<kind>

One log lives as long as the driver, so it also counts what happened before all groups were started
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from rlsys.config.secrets import redacted
from rlsys.run.fault_events import FAULT_KINDS, Fault

logger = logging.getLogger(__name__)


class FaultLog:
    """The faults of a run so far, and its present step and phase."""

    def __init__(self, earlier: Mapping[str, int] | None = None) -> None:
        """Create a log; `earlier` are the counts by kind of the run before it was resumed."""
        counted = earlier or {}
        self._counts = {kind: counted.get(kind, 0) for kind in FAULT_KINDS}
        self._unseen: list[Fault] = []  # until there is a listener
        self._listener: Callable[[Fault], None] | None = None
        self.step = 0
        self.phase = ""

    def listen(self, listener: Callable[[Fault], None]) -> None:
        """Call `listener` with each event from now on, and with those that nobody has seen."""
        self._listener = listener
        unseen, self._unseen = self._unseen, []
        for fault in unseen:
            listener(fault)

    @property
    def place(self) -> str:
        """The present step in words; "" where there are no steps."""
        return f"in step {self.step}" if self.phase else ""

    def enter(self, step: int, phase: str) -> None:
        """Set the place in the run that the next events belong to.

        Without steps `step` is any number that grows with the progress, and `phase` is "".
        """
        self.step = step
        self.phase = phase

    def record(
        self, kind: str, event: str, reason: str, action: str, *, evidence: str = ""
    ) -> Fault:
        """Count an event, write it to the run's log, and notify the listener.

        Args:
            kind: one of `FAULT_KINDS`.
            event: such as "generation worker 1 died".
            reason: why, in one line.
            action: what is done about it, in one line.
            evidence: the end of its stderr and the like; it may have many lines.
        """
        assert kind in FAULT_KINDS, f"{kind!r} is not a kind of fault"
        fault = Fault(
            kind=kind,
            event=event,
            reason=redacted(reason),
            action=action,
            evidence=redacted(evidence),
            step=self.step,
            phase=self.phase,
        )
        self._counts[kind] += 1
        logger.warning("%s%s", fault.line(), f"\n{fault.evidence}" if evidence else "")
        if self._listener is None:
            self._unseen.append(fault)
        else:
            self._listener(fault)
        return fault

    def metrics(self) -> dict[str, float]:
        """Return faults/<kind> for every kind: the number of events of the run so far.

        The counts only grow, as monitoring systems expect of counters, and continue in a resumed
        run. So an event in a step that was repeated from a checkpoint is not lost.
        """
        return {f"faults/{kind}": float(count) for kind, count in self._counts.items()}
