"""The responses of an evaluation as Parquet files, a part of the prompts each.

    responses/model/
        _origin.json           what the responses depend on: model, prompts, sampling, rewards
        part_00000.parquet     the columns of a run's rollouts; `group_id` is the place in the data

pyarrow and pandas read the directory as one table; they skip names that begin with _. A part is
written whole and has all samples of each of its prompts. Where it has fewer prompts than it should,
the evaluation was interrupted; it is then sampled again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch
from rlsys.data.rollout_files import sample_columns, write_table_whole

ORIGIN = "_origin.json"


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """All samples of one prompt, with their rewards."""

    rollouts: RolloutBatch
    rewards: RewardBatch

    @property
    def place(self) -> int:
        """The place of the prompt's problem in the data."""
        return int(self.rollouts.group_ids[0])


class ResponseFiles:
    """The responses of one model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self, origin: Mapping[str, Any]) -> None:
        """Create the directory, and write what the responses depend on."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"{ORIGIN}.partial"
        partial.write_text(json.dumps(origin, indent=1), encoding="utf-8")
        os.replace(partial, self.directory / ORIGIN)

    def origin(self) -> dict[str, Any] | None:
        """Return what `create` wrote; None where nothing has been sampled yet."""
        file = self.directory / ORIGIN
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, part: int, groups: Sequence[ScoredResponses]) -> None:
        """Write the groups of one part, in the order of their prompts."""
        tables = [
            pa.table(sample_columns(ScoredBatch(rollouts=group.rollouts, rewards=group.rewards)))
            for group in sorted(groups, key=lambda group: group.place)
        ]
        write_table_whole(pa.concat_tables(tables), self._path(part))

    def prompts_in(self, part: int) -> int:
        """Return how many prompts a part has; 0 where it was not written."""
        path = self._path(part)
        if not path.is_file():
            return 0
        column = pyarrow.parquet.read_table(path, columns=["group_id"])["group_id"]
        return len(column.unique())

    def read(self, choose: Callable[[Sequence[str]], list[str]] | None = None) -> pa.Table | None:
        """Return all responses in the order of the prompts; None where there are none.

        Args:
            choose: returns the names of the columns to read, given those of the files. None: all.
        """
        parts = sorted(self.directory.glob("part_*.parquet"))
        if not parts:
            return None
        columns = None
        if choose is not None:
            columns = choose(pyarrow.parquet.read_schema(parts[0]).names)
        return pa.concat_tables(
            [pyarrow.parquet.read_table(part, columns=columns) for part in parts]
        )

    def _path(self, part: int) -> Path:
        return self.directory / f"part_{part:05d}.parquet"
