"""Facts are read where they stand, on any machine."""

import http.server
import importlib.util
import json
import threading
from pathlib import Path

import pytest

from rlsys.config.hardware import cpu_flags
from rlsys.doctor import facts
from rlsys.doctor.facts import Token, disk_of, gather, hub_error, token
from rlsys.models.catalogue import MANIFEST, damaged_models


def test_the_facts_of_this_machine_are_found():
    found = gather()
    assert found.hardware.cpus >= 1
    assert 0 < found.available_memory_gib <= found.hardware.memory_gib
    assert found.versions["ray"].startswith("2.60")
    assert all(disk.total_gib >= disk.free_gib for disk in found.disks.values())


def test_the_disk_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(tmp_path: Path):
    disk = disk_of(tmp_path / "runs" / "one")
    assert disk.total_gib == disk_of(tmp_path).total_gib
    assert 0 <= disk.used_fraction < 1


def test_flags_of_the_cpu_are_read(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name : Some CPU\nflags : fpu avx2 amx_bf16\n")
    assert cpu_flags(info) == {"fpu", "avx2", "amx_bf16"}


def test_the_token_is_looked_for_in_the_order_of_ray(tmp_path: Path):
    default, other = tmp_path / "auth_token", tmp_path / "other"
    assert token({}, default) == Token(mode=None, source=None)

    default.write_text("secret\n")
    default.chmod(0o600)
    assert token({}, default) == Token(mode=None, source=str(default))

    named = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(other)}
    assert token(named, default) == Token(mode="token", source=None, missing_path=str(other))
    other.write_text("secret")
    other.chmod(0o644)
    assert token(named, default).readable_by_others

    assert token({**named, "RAY_AUTH_TOKEN": "secret"}, default).source == "RAY_AUTH_TOKEN"


def test_no_fact_holds_the_token_itself(tmp_path: Path):
    file = tmp_path / "auth_token"
    file.write_text("planted-secret")
    assert "planted-secret" not in repr(token({"RAY_AUTH_TOKEN": "planted-secret"}, file))


def test_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        assert hub_error() is None  # an error page is an answer too
    finally:
        thread.join()
        server.server_close()

    assert "refused" in (hub_error() or "")


def test_a_damaged_model_of_the_cache_is_found(tmp_path: Path):
    model = tmp_path / "some-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    (model / MANIFEST).write_text(json.dumps({"config.json": {"bytes": 2, "sha256": digest}}))
    assert damaged_models(tmp_path) == {}

    (model / "config.json").write_text("[]")
    assert damaged_models(tmp_path) == {model: "config.json differs from what was written"}
    (model / "config.json").unlink()
    assert damaged_models(tmp_path) == {model: "config.json is missing"}


def test_requirements_that_are_not_met_are_named(monkeypatch: pytest.MonkeyPatch):
    wanted = {"rlsys": ["alpha>=2", "beta>=1", "gamma; extra == 'gpu'"], "torch": ["delta<1"]}
    present = {"rlsys": "0.1", "torch": "2.13.0+cpu", "alpha": "1.5", "delta": "1.0"}

    def version(name: str) -> str:
        if name not in present:
            raise facts.PackageNotFoundError(name)
        return present[name]

    monkeypatch.setattr(facts, "NAMED_PACKAGES", ("rlsys", "torch"))
    monkeypatch.setattr(facts, "distribution", version)
    monkeypatch.setattr(facts, "requires", wanted.get)
    monkeypatch.setattr(facts, "version", version)
    assert facts.unmet_requirements() == (
        "alpha 1.5, and rlsys needs >=2",
        "beta is missing",
        "delta 1.0, and torch needs <1",
    )

    del present["rlsys"]
    assert facts.unmet_requirements() is None


@pytest.mark.parametrize(
    ("line", "cuda"),
    [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None), ("", None)],
)
def test_the_cuda_of_torch_is_read_without_importing_it(
    line: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('it was imported')")
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{line}\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(facts, "find_spec", lambda name: spec)
    assert facts.torch_cuda() == cuda
