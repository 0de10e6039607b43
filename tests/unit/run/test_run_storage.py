"""The storage of a run: whole checkpoints, resumes elsewhere, and stores that fail."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from recipes import run_command
from rlsys.config import RunConfig, RunSection
from rlsys.run.checkpoints import MANIFEST, CheckpointStore, find_damage
from rlsys.run.directory import RunDirectory
from rlsys.run.fetch_stored_run import fetch_stored_run
from rlsys.run.storage import RunStorage, StoragePace, check_storage
from rlsys.run.storage_owner import OWNER, LocalIdentity, read_owner
from rlsys.run.stored_place import StoredPlace
from tests.support.s3_server import S3Server, s3_server

FAST = StoragePace(interval=0.01, longest_pause=0.01, tries_at_end=3)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["directory", "fsspec", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> str:
    """An empty place in each kind of file system."""
    name = f"{tmp_path.parent.name}-{tmp_path.name}/run"
    places = {
        "directory": str(tmp_path / "stored" / "run"),
        "fsspec": f"memory://{name}",
        "s3": s3.uri(name),
    }
    return places[request.param]


class Machine:
    """A machine with a run's directory and a storage."""

    def __init__(self, root: Path, place: StoredPlace | str, keep: int = 2) -> None:
        self.place = StoredPlace.open(place) if isinstance(place, str) else place
        self.directory = RunDirectory(root / "run")
        self.store = CheckpointStore(self.directory.checkpoints, keep=keep)
        self.lines: list[str] = []
        self.storage = RunStorage(
            self.place, self.directory, self.store, self.lines.append, pace=FAST
        )

    def start(self) -> None:
        """Start a new run."""
        self.directory.claim()
        self.directory.create(RunConfig())
        self.storage.claim()
        self.storage.begin()

    def resume(self) -> bool:
        """Fetch the run, and start it again; return whether the storage holds it."""
        found = self.fetch()
        self.store.latest()
        self.storage.claim()
        self.storage.begin()
        return found

    def fetch(self, *, dry_run: bool = False) -> bool:
        return fetch_stored_run(
            self.place, self.directory, dry_run=dry_run, notify=self.lines.append, silent_s=0.2
        )

    async def step(self, number: int) -> None:
        """Write metrics, samples and a checkpoint."""
        with self.directory.metrics.open("a") as file:
            file.write(json.dumps({"step": number}) + "\n")
        (self.directory.rollouts / f"step_{number:06d}.parquet").write_text(f"rollouts {number}")

        async def write(path: Path) -> None:
            (path / "model.safetensors").write_bytes(bytes([number % 256]) * 5000)
            (path / "critic").mkdir()
            (path / "critic" / "optimizer_rank0.pt").write_bytes(b"123456789")

        await self.store.save(number, write, {"step": number})

    def step_of_checkpoint(self) -> int:
        checkpoint = CheckpointStore(self.directory.checkpoints, keep=2).latest()
        return checkpoint.step if checkpoint else 0


def stored_steps(place: StoredPlace) -> list[str]:
    """Return the names of the checkpoints of which a storage has anything."""
    return sorted({name.split("/")[1] for name in place.sizes("checkpoints")})


async def test_a_run_continues_on_an_empty_machine(uri: str, tmp_path: Path):
    first = Machine(tmp_path / "a", uri)
    first.start()
    for number in (1, 2, 3, 4):
        await first.step(number)
    assert first.storage.finish() == []
    assert stored_steps(first.place) == ["step_000003", "step_000004"]

    second = Machine(tmp_path / "b", uri)
    assert second.resume()
    assert second.step_of_checkpoint() == 4
    assert find_damage(second.directory.checkpoints / "step_000004") is None
    assert second.directory.metrics.read_text() == first.directory.metrics.read_text()
    # Of the samples, those that the report shows.
    fetched = sorted(path.name for path in second.directory.rollouts.iterdir())
    assert fetched == ["step_000001.parquet", "step_000004.parquet"]

    await second.step(5)
    assert second.storage.finish() == []
    assert stored_steps(second.place) == ["step_000004", "step_000005"]
    names = set(second.place.sizes())
    assert {f"rollouts/step_{number:06d}.parquet" for number in (1, 2, 3, 4, 5)} <= names
    owner = read_owner(second.place)
    assert owner is not None
    assert (owner.start, owner.ended) == (2, True)

    # Back on the first machine, whose own state is older now.
    third = Machine(tmp_path / "a", uri)
    assert third.resume()
    assert third.step_of_checkpoint() == 5
    assert third.storage.finish() == []


class KilledError(OSError):
    """A store that does not answer."""


class FailingPlace(StoredPlace):
    """A real place that fails whenever `fails` says so, by the name of the file."""

    def __init__(self, place: StoredPlace) -> None:
        super().__init__(place._files, place.path, shown=place.shown)
        self.fails: Callable[[str], bool] = lambda name: False
        self.failed = threading.Event()
        self.manifests: list[str] = []

    def _write(self, name: str, fill: Callable) -> None:
        if self.fails(name):
            self.failed.set()
            raise KilledError("Could not connect to server\nwith many details")
        super()._write(name, fill)
        if name.endswith(MANIFEST):
            self.manifests.append(name)


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("directory", "model.safetensors"),
        ("directory", "critic/optimizer_rank0.pt"),
        ("directory", MANIFEST),
        ("s3", MANIFEST),
    ],
    indirect=["uri"],
)
async def test_a_checkpoint_is_whole_or_absent_wherever_the_copy_ends(
    uri: str, tmp_path: Path, written: str
):
    """The store fails from one file of the second checkpoint on, as if the machine were gone."""
    place = FailingPlace(StoredPlace.open(uri))
    first = Machine(tmp_path / "a", place)
    first.start()
    await first.step(1)
    assert first.storage.finish() == []

    again = Machine(tmp_path / "a", place)
    place.fails = lambda name: name.startswith("checkpoints/step_000002") and name.endswith(written)
    again.resume()
    await again.step(2)
    assert "checkpoints/step_000002" in again.storage.finish()

    elsewhere = Machine(tmp_path / "b", place)
    assert elsewhere.resume()
    assert elsewhere.step_of_checkpoint() == 1
    place.fails = lambda name: False
    await elsewhere.step(2)
    assert elsewhere.storage.finish() == []
    assert stored_steps(place) == ["step_000001", "step_000002"]


async def test_a_store_that_fails_in_the_middle_is_named_and_used_again(uri: str, tmp_path: Path):
    place = FailingPlace(StoredPlace.open(uri))
    run = Machine(tmp_path / "a", place)
    run.start()
    place.fails = lambda name: name != OWNER
    await run.step(1)
    assert place.failed.wait(30)
    place.fails = lambda name: False
    await run.step(2)
    assert run.storage.finish() == []

    lines = [line for line in run.lines if not line.startswith("storing in ")]  # a slow end
    assert lines[0] == (
        f"storage {place.shown} failed (Could not connect to server). The run goes on with its "
        f"files in {run.directory.path}; storing them is tried again until the run ends."
    )
    assert lines[1].endswith("works again; all files up to now are there")
    assert len(lines) == 2
    assert place.sizes("checkpoints")[f"checkpoints/step_000002/{MANIFEST}"] > 0


async def test_a_store_that_stays_away_is_said_at_the_end_and_stored_by_the_next_start(
    tmp_path: Path,
):
    place = FailingPlace(StoredPlace.open(str(tmp_path / "stored")))
    run = Machine(tmp_path / "a", place)
    place.fails = lambda name: name != OWNER
    run.start()
    await run.step(1)
    missing = run.storage.finish()
    assert missing[0] == "checkpoints/step_000001"
    assert {"config.yaml", "metrics.jsonl"} <= set(missing)
    assert not fetch_stored_run(
        place, RunDirectory(tmp_path / "b"), dry_run=False, notify=run.lines.append
    )

    place.fails = lambda name: False
    again = Machine(tmp_path / "a", place)
    again.resume()
    assert again.storage.finish() == []
    assert Machine(tmp_path / "b", place).fetch()


async def test_the_metrics_reach_as_far_as_each_stored_checkpoint(tmp_path: Path):
    """Metrics that stay behind a checkpoint would be lost by a resume from it."""
    place = FailingPlace(StoredPlace.open(str(tmp_path / "stored")))
    run = Machine(tmp_path / "a", place)
    behind: list[str] = []

    def metrics_reach(name: str) -> bool:
        if name.endswith(MANIFEST):
            step = int(name.split("/")[1].removeprefix("step_"))
            lines = (place.read("metrics.jsonl") or b"").decode().splitlines()
            if step not in [json.loads(line)["step"] for line in lines]:
                behind.append(name)
        return False

    place.fails = metrics_reach
    run.start()
    for number in range(1, 6):
        await run.step(number)
    assert run.storage.finish() == []
    assert behind == []
    assert place.manifests


async def test_a_checkpoint_that_is_being_copied_is_kept_until_it_is_there(tmp_path: Path):
    """Copies that take longer than the time between checkpoints are completed all the same."""
    place = FailingPlace(StoredPlace.open(str(tmp_path / "stored")))
    run = Machine(tmp_path / "a", place, keep=1)
    begun, goes_on = threading.Event(), threading.Event()

    def waits(name: str) -> bool:
        if name == "checkpoints/step_000001/model.safetensors":
            begun.set()
            assert goes_on.wait(30)
        return False

    place.fails = waits
    run.start()
    await run.step(1)
    assert begun.wait(30)
    await run.step(2)
    await run.step(3)
    goes_on.set()
    assert run.storage.finish() == []
    assert place.manifests[0] == f"checkpoints/step_000001/{MANIFEST}"
    assert stored_steps(place) == ["step_000003"]
    assert [path.name for path in run.directory.checkpoints.iterdir()] == ["step_000003"]


async def test_a_newer_state_is_never_replaced_by_an_older_one(tmp_path: Path):
    """The store was away from step 2 on, and the local directory has more steps."""
    place = FailingPlace(StoredPlace.open(str(tmp_path / "stored")))
    run = Machine(tmp_path / "a", place)
    run.start()
    await run.step(1)
    assert run.storage.finish() == []
    again = Machine(tmp_path / "a", place)
    place.fails = lambda name: name != OWNER
    again.resume()
    await again.step(2)
    assert again.storage.finish()

    place.fails = lambda name: False
    third = Machine(tmp_path / "a", place)
    third.resume()
    assert third.step_of_checkpoint() == 2
    assert third.storage.finish() == []
    assert stored_steps(place) == ["step_000001", "step_000002"]


async def test_rollouts_of_an_abandoned_start_do_not_replace_those_of_a_later_one(tmp_path: Path):
    first, second = (Machine(tmp_path / name, str(tmp_path / "stored")) for name in "ab")
    first.start()
    await first.step(1)
    assert first.storage.finish() == []
    for number in (2, 3, 4):  # taken, but without a checkpoint
        file = first.directory.rollouts / f"step_{number:06d}.parquet"
        file.write_text(f"abandoned rollouts {number}")

    second.resume()
    for number in (2, 3):
        await second.step(number)
    assert second.storage.finish() == []

    again = Machine(tmp_path / "a", str(tmp_path / "stored"))
    again.resume()
    assert again.storage.finish() == []
    names = [name for name in again.place.sizes("rollouts") if "000001" not in name]
    assert {name: again.place.read(name) for name in names} == {
        "rollouts/step_000002.parquet": b"rollouts 2",
        "rollouts/step_000003.parquet": b"rollouts 3",
    }


async def test_a_damaged_stored_checkpoint_is_named_and_the_previous_one_used(
    uri: str, tmp_path: Path
):
    run = Machine(tmp_path / "a", uri)
    run.start()
    for number in (1, 2):
        await run.step(number)
    assert run.storage.finish() == []
    run.place.write("checkpoints/step_000002/model.safetensors", b"\x01" * 5000)

    other = Machine(tmp_path / "b", uri)
    assert other.resume()
    assert other.step_of_checkpoint() == 1
    assert any("step_000002 is damaged (model.safetensors has" in line for line in other.lines)
    await other.step(2)
    assert other.storage.finish() == []
    third = Machine(tmp_path / "c", uri)
    third.fetch()
    assert third.step_of_checkpoint() == 2


async def test_a_dry_run_fetches_nothing(tmp_path: Path):
    run = Machine(tmp_path / "a", str(tmp_path / "stored"))
    run.start()
    await run.step(1)
    assert run.storage.finish() == []
    other = Machine(tmp_path / "b", str(tmp_path / "stored"))
    with pytest.raises(ValueError, match=r"run\.storage: .*step 1.* a dry run fetches nothing"):
        other.fetch(dry_run=True)
    assert not other.directory.path.exists()


async def test_a_place_belongs_to_one_run(uri: str, tmp_path: Path):
    run = Machine(tmp_path / "a", uri)
    run.start()
    await run.step(1)
    # It is alive: neither a second start of it nor another run may write there.
    with pytest.raises(ValueError, match=r"run\.storage: .* is being written to by process"):
        Machine(tmp_path / "b", uri).fetch()
    assert run.storage.finish() == []

    section = RunSection(storage=uri)
    with pytest.raises(ValueError, match=r"run\.storage: .*holds a run .*Add --resume"):
        check_storage(section, RunDirectory(tmp_path / "c" / "run"), resume=False)
    other = Machine(tmp_path / "c", str(tmp_path / "elsewhere"))
    other.start()
    assert other.storage.finish() == []
    with pytest.raises(ValueError, match=r"run\.storage: .* holds another run than"):
        fetch_stored_run(run.place, other.directory, dry_run=False, notify=other.lines.append)
    with pytest.raises(ValueError, match=r"run\.storage: .* belongs to another run"):
        RunStorage(run.place, other.directory, other.store, other.lines.append).claim()


async def test_a_process_of_another_machine_is_watched(tmp_path: Path):
    """It is gone where it does not renew its file, whatever the clocks say."""
    run = Machine(tmp_path / "a", str(tmp_path / "stored"))
    run.start()
    await run.step(1)
    assert run.storage.finish() == []
    owner = read_owner(run.place)
    assert owner is not None
    far = replace(owner, machine="another", host="node7", ended=False)
    run.place.write_json(OWNER, far.__dict__)
    other = Machine(tmp_path / "b", str(tmp_path / "stored"))
    assert other.fetch()
    assert "sign of process" in other.lines[0]

    renewing = threading.Event()

    def renew(line: str) -> None:
        run.place.write_json(OWNER, replace(far, renewed=far.renewed + 1).__dict__)
        renewing.set()

    with pytest.raises(ValueError, match=r"is being written to by process \d+ on node7"):
        fetch_stored_run(
            run.place,
            RunDirectory(tmp_path / "c" / "run"),
            dry_run=False,
            notify=renew,
            silent_s=30,
        )
    assert renewing.is_set()


async def test_a_process_that_lost_the_storage_writes_no_more(tmp_path: Path):
    run = Machine(tmp_path / "a", str(tmp_path / "stored"))
    ended: list[str] = []
    run.storage.on_loss = lambda: ended.append("ends")
    run.start()
    await run.step(1)
    owner = read_owner(run.place)
    assert owner is not None
    other = replace(owner, process="another", host="node7")
    # A renewal that has read the file before may write it after.
    while not run.storage.is_lost:
        run.place.write_json(OWNER, other.__dict__)
        await asyncio.sleep(0.01)
    await run.step(2)
    assert "checkpoints/step_000002" in run.storage.finish()
    assert ended == ["ends"]
    assert any("on node7 has continued this run" in line for line in run.lines)
    found = read_owner(run.place)
    assert found is not None
    assert found.process == "another"


def test_what_a_refused_start_wrote_is_removed(uri: str, tmp_path: Path):
    run = Machine(tmp_path / "a", uri)
    run.directory.claim()
    run.directory.create(RunConfig())
    run.storage.claim()
    assert set(run.place.sizes()) == {OWNER}
    run.storage.discard(resumed=False)
    assert run.place.sizes() == {}


def test_a_start_that_was_killed_before_it_stored_anything_leaves_the_place_free(tmp_path: Path):
    run = Machine(tmp_path / "a", str(tmp_path / "stored"))
    run.directory.claim()
    run.storage.claim()
    owner = read_owner(run.place)
    assert owner is not None
    run.storage._end_ownership()
    run.place.write_json(OWNER, replace(owner, number=2**30, ended=False).__dict__)

    section = RunSection(storage=str(tmp_path / "stored"))
    check_storage(section, RunDirectory(tmp_path / "b" / "run"), resume=False)
    other = Machine(tmp_path / "b", str(tmp_path / "stored"))
    other.start()
    assert other.storage.finish() == []


def test_the_check_leaves_no_trace(uri: str, tmp_path: Path):
    check_storage(RunSection(storage=uri), RunDirectory(tmp_path / "run"), resume=False)
    assert StoredPlace.open(uri).sizes() == {}
    assert not (tmp_path / "stored" / "run").exists()


def test_places_that_cannot_be_used_are_refused_with_one_line(tmp_path: Path, s3: S3Server):
    directory = RunDirectory(tmp_path / "run")
    gone = s3.uri("x").replace(s3.address, "127.0.0.1:9")  # no server has this port
    missing = s3.uri("x").replace("rlsys-tests", "no-such-bucket")
    (tmp_path / "file").write_text("")
    cases = {
        gone: "cannot be used",
        missing: "cannot be used .*bucket does not exist",
        str(tmp_path / "file" / "below"): "cannot be used",
        str(tmp_path / "run" / "inside"): "overlap",
        str(tmp_path): "overlap",
        "nosuch://place/run": "nosuch:// cannot be opened",
    }
    for uri, message in cases.items():
        with pytest.raises(ValueError, match=rf"^run\.storage: .*{message}") as refusal:
            check_storage(RunSection(storage=uri), directory, resume=False)
        assert len(str(refusal.value).splitlines()) == 1


def test_no_identity_no_run(tmp_path: Path):
    """A directory without storage.json is not known to be the run of a storage."""
    run = Machine(tmp_path / "a", str(tmp_path / "stored"))
    run.start()
    assert run.storage.finish() == []
    identity = LocalIdentity.read(run.directory)
    assert identity is not None
    assert identity.start == 1
    LocalIdentity.file(run.directory).unlink()
    with pytest.raises(ValueError, match="holds another run"):
        run.fetch()


class WatchedText(io.StringIO):
    """A console's file that says when a text was written to it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self.seen = threading.Event()

    def write(self, text: str, /) -> int:
        if self._text in text:
            self.seen.set()
        return super().write(text)


async def test_the_second_ctrl_c_leaves_and_names_what_is_missing(tmp_path: Path):
    place = FailingPlace(StoredPlace.open(str(tmp_path / "stored")))
    run = Machine(tmp_path / "a", place)
    begun, leaving = threading.Event(), threading.Event()

    def waits(name: str) -> bool:
        if name.startswith("checkpoints/"):
            begun.set()
            assert leaving.wait(60)
        return False

    place.fails = waits
    run.start()
    await run.step(1)
    output = WatchedText("once more to leave at once")

    def interrupt() -> None:
        assert begun.wait(60)
        assert run.storage._ending.wait(60)  # the end waits, and holds signals back
        os.kill(os.getpid(), signal.SIGTERM)
        assert output.seen.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        assert run.storage._giving_up.wait(60)
        leaving.set()

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a run leaves it
    try:
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(interrupt)
            console = Console(file=output, width=500)
            stored = run_command._store_rest(run.storage, run.directory, console)
            sent.result()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not stored
    assert f"not stored in {place.shown}: checkpoints/step_000001" in output.getvalue()
    owner = read_owner(place)
    assert owner is not None
    assert owner.ended
