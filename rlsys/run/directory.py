"""The directory of a run, and all paths in it.

runs/<name>/
    config.yaml      metrics.jsonl      tensorboard/     rollouts/step_*.parquet
    checkpoints/     report.html        status.json      run.log         logs/<actor>.{out,err}
    failures/        faults.jsonl
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from rlsys.config import ConfigError, RootConfig
from rlsys.config.command_line import CONFIG_FILE, dump_yaml

# The directory of one Ray instance: logs, and below runtime_resources the unpacked working
# directories of jobs, which Ray deletes when they have ended.
RAY_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_\d+")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path
    is_given: bool = True  # the user named it; otherwise any free name will do
    field: str = "run.directory"  # the option that decides the path, for messages
    is_stored: bool = False  # `run.storage` keeps its files

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def failures(self) -> Path:
        """Evidence of failures, after which the actors were restarted; absent without any."""
        return self.path / "failures"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def faults(self) -> Path:
        return self.path / "faults.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def logs(self) -> Path:
        """What the actors printed; `log` is the driver's."""
        return self.path / "logs"

    @classmethod
    def named_by(cls, config: RootConfig) -> Self:
        """Return `run.directory`, else one in runs/ named by the storage, or by recipe and time."""
        given = config.run.given_directory
        directory = given or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        return cls(
            Path(directory).expanduser(),
            is_given=given is not None,
            is_stored=config.run.storage is not None,
        )

    def check(self, *, resume: bool) -> None:
        """Refuse to overwrite a run, to resume a missing one, or to run where results are lost.

        That is where writing fails, and in a directory of Ray's own. Nothing is left behind on the
        disk.

        Raises:
            ConfigError: one of these, with the field run.directory.
        """
        self.check_kept()
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"{self.field}: {str(self.path)!r} is a file. Name a directory, existing or not."
            )
        if resume and not self.config.is_file():
            raise ConfigError(
                f"{self.field}: {str(self.path)!r} holds no run to resume. Name the directory of "
                "an earlier run."
            )
        if not resume and self.is_given and self.path.exists() and any(self.path.iterdir()):
            raise self._exists_already()

        existing = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not existing.is_dir():
            raise ConfigError(
                f"{self.field}: {str(self.path)!r} cannot be made below the file {existing}. Name "
                "another directory."
            )
        places = [existing, *self._existing_parts()] if resume else [existing]
        for place in places:
            self._check_writable(place)

    def check_kept(self) -> None:
        """Refuse a directory that Ray will delete, unless a storage keeps the run's files."""
        if self.is_stored:
            return
        path = self.path.resolve()
        session = next((p for p in (path, *path.parents) if RAY_SESSION.fullmatch(p.name)), None)
        if session is None:
            return
        raise ConfigError(
            f"{self.field}: {str(self.path)!r} lies in {path.parent}, a directory of Ray's own. "
            "Ray deletes it after the job, and the results with it. Name an absolute path on a "
            f"disk that stays: --{self.field} /PATH/NAME, or a storage: --run.storage URI."
        )

    def _existing_parts(self) -> list[Path]:
        """Return the files and directories that a resumed run continues to write."""
        parts = (self.config, self.metrics, self.log, self.checkpoints, self.rollouts)
        return [part for part in parts if part.exists()]

    def _check_writable(self, place: Path) -> None:
        """Try to write, since permissions do not tell for root, or on a read-only or full disk."""
        try:
            if place.is_dir():
                tempfile.TemporaryFile(dir=place).close()
            else:
                place.open("r+b").close()
        except OSError as error:
            raise self._cannot_be_written(place, error) from error

    def _cannot_be_written(self, place: Path, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.field}: {str(self.path)!r} cannot be written to ({place}: {error.strerror}). "
            "Name a directory where you may write."
        )

    def _exists_already(self) -> ConfigError:
        remedy = "Add --resume to continue it, or name another directory."
        if not self.config.exists():
            remedy = "It holds other files and no run. Name another directory."
        return ConfigError(f"{self.field}: {str(self.path)!r} exists already. {remedy}")

    def claim(self) -> Self:
        """Create the directory of a new run, exclusively for this process.

        If the user gave no name and another run of the same second has the default one, the name
        gets a suffix.

        Raises:
            ConfigError: another run has taken the name that the user gave, or nothing can be
                written there.
        """
        try:
            if self.is_given:
                self.path.mkdir(parents=True, exist_ok=True)
                self.config.touch(exist_ok=False)
                return self
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(1):
                name = self.path.name if number == 1 else f"{self.path.name}-{number}"
                try:
                    self.path.with_name(name).mkdir()
                except FileExistsError:
                    continue
                return replace(self, path=self.path.with_name(name))
        except FileExistsError as error:
            raise self._exists_already() from error
        except OSError as error:
            raise self._cannot_be_written(self.path, error) from error
        raise AssertionError("unreachable")

    def discard(self) -> None:
        """Remove the directory of a run that was refused before it began.

        A directory that the user gave is emptied but stays.
        """
        if not self.is_given:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for part in self.path.iterdir():
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()

    def create(self, config: RootConfig, reasons: Sequence[str] = ()) -> None:
        """Create the subdirectories and write the resolved configuration.

        Args:
            reasons: see `write_config`.
        """
        for directory in (self.rollouts, self.checkpoints, self.tensorboard):
            directory.mkdir(parents=True, exist_ok=True)
        self.write_config(config, reasons)

    def write_config(self, config: RootConfig, reasons: Sequence[str] = ()) -> None:
        """Write the resolved configuration.

        Args:
            reasons: the choices that the configuration left to the machine, with their reasons.
                They are written as comments at the top of the file, below those of earlier starts
                of the run.
        """
        comments = self._comments()
        comments += [f"# {time.strftime('%Y-%m-%d')} {reason}" for reason in reasons]
        write_whole(self.config, "\n".join([*comments, dump_yaml(config)]))

    def _comments(self) -> list[str]:
        """Return the comments at the top of the configuration."""
        if not self.config.is_file():
            return []
        lines = self.config.read_text(encoding="utf-8").splitlines()
        return list(itertools.takewhile(lambda line: line.startswith("#"), lines))


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the whole old text or the whole new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
