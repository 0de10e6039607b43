"""The parts of the GPU check that need no GPU; its checks run in tests/integration."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.__main__ import PAGE, chosen, main, parse
from benchmarks.gpu_check.catalogue import CHECKS, Check, named
from benchmarks.gpu_check.policy import Optimizer, Role
from benchmarks.gpu_check.report import Report, shown
from benchmarks.gpu_check.results import CheckResult, Figure, Finding, at_least, within
from benchmarks.gpu_check.runner import environment, run_child, why_not
from rlsys.config import OptimizerConfig, PolicyConfig
from workers.training.backends.backend import TrainedRole

ROOT = Path(__file__).resolve().parents[2]
# Packages that neither torch nor transformers needs, in every version that is supported.
ABSENT = ("accelerate", "deepspeed", "flash_attn", "psutil", "pyarrow", "pydantic", "ray", "vllm")
BARE = f"""
import importlib.machinery, sys

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""
FIGURE = Figure(name="loss", value=1.5, unit="nats")


def python(script: str) -> str:
    """Run a script in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_check_imports_with_torch_and_transformers_alone():
    checks = [check.name for check in CHECKS if check.function and not check.needs]
    script = f"""{BARE}
from benchmarks.gpu_check.catalogue import named
for name in {checks}:
    named(name).load()
print(sorted(set({ABSENT!r}) & set(sys.modules)))
"""
    assert python(script).strip() == "[]"


def test_the_command_line_needs_the_standard_library_alone():
    script = """
import sys
import benchmarks.gpu_check.__main__
print([name for name in ("torch", "numpy", "transformers", "pydantic") if name in sys.modules])
"""
    assert python(script).strip() == "[]"


def test_names_are_unique_and_each_check_has_a_function_or_a_reason():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert bool(check.function) != bool(check.not_implemented), check.name
        assert named(check.name) is check
    with pytest.raises(ValueError, match="no check 'flash'"):
        named("flash")


def test_what_is_called_not_implemented_is_absent():
    """When one of them is written, its check has to be written as well."""
    transports = {file.stem for file in (ROOT / "workers" / "weight_sync").glob("*.py")}
    absent = {check.name for check in CHECKS if check.not_implemented}
    for transport, name in (("nccl", "weight_sync_nccl"), ("ipc", "weight_sync_cuda_ipc")):
        assert (transport in transports) != (name in absent)

    engine = (ROOT / "workers" / "generation" / "engines" / "vllm.py").read_text()
    assert (".sleep(" in engine) != ("sleep_and_wake" in absent)


def test_settings_have_the_fields_and_the_defaults_of_the_configuration():
    optimizer = Optimizer(learning_rate=OptimizerConfig().learning_rate)
    for name in Optimizer.__dataclass_fields__:
        assert getattr(optimizer, name) == getattr(OptimizerConfig(), name), name
    role = Role(compute_dtype="bfloat16", optimizer=optimizer)
    for name in ("gradient_checkpointing", "offload_optimizer"):
        assert getattr(role, name) == getattr(PolicyConfig(), name)
    assert isinstance(role, TrainedRole)
    assert isinstance(PolicyConfig(), TrainedRole)


def test_limits_count_nan_as_a_fault():
    assert within("difference", 0.5, 1.0) == ()
    assert within("difference", 2.0, 1.0) == ("difference is 2, above 1",)
    assert within("difference", float("nan"), 1.0)
    assert at_least("rise", 2.0, 1.0) == ()
    assert at_least("rise", 0.5, 1.0) == ("rise is 0.5, below 1",)
    assert at_least("rise", float("nan"), 1.0)


def test_a_result_survives_json():
    result = CheckResult.of("grpo", Finding(figures=(FIGURE,), facts={"engine": "vllm"}), 2.0)
    assert result.status == "passed"
    assert CheckResult.of_json(result.to_json()) == result
    failed = CheckResult.of("grpo", Finding(faults=("one", "two")), 2.0)
    assert (failed.status, failed.reason) == ("failed", "one; two")


def test_a_check_is_skipped_by_name():
    check = Check(name="x", proves="", function="y:z", needs=("ray", "vllm"), needs_gpu="too large")

    def without_vllm(package: str) -> bool:
        return package != "vllm"

    assert why_not(check, device="cuda", installed=without_vllm) == "not installed: vllm"
    assert why_not(check, device="cuda", installed=lambda package: True) == ""
    assert why_not(check, device="cpu") == "needs a GPU: too large"
    asked = why_not(check, device="cpu", asked_for=True, installed=without_vllm)
    assert asked == "not installed: vllm"
    missing = why_not(named("sleep_and_wake"), device="cuda")
    assert missing.startswith("not implemented: ")


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str, seconds: float = 60.0):
    """Run a script in the place of a check."""
    (folder / "script.py").write_text(script)
    program = folder / "program"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/script.py"\n')
    program.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(program))
    work = folder / "files"
    work.mkdir()
    return run_child("grpo", "cpu", work, seconds)


def test_a_crash_of_a_child_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = "import os; print('illegal memory access', flush=True); os.abort()"
    result = child(monkeypatch, tmp_path, script)
    assert (result.name, result.status) == ("grpo", "failed")
    assert result.reason == "ended with signal SIGABRT: illegal memory access"


def test_a_child_that_hangs_is_ended_with_its_own_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # The grandchild holds the other end of the FIFO: reading ends when it has ended.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    command = f"exec 9> {fifo}; echo the grandchild runs; exec sleep 600"
    script = f"import subprocess; subprocess.run(['sh', '-c', {command!r}])"

    result = child(monkeypatch, tmp_path, script, seconds=10.0)
    assert result.status == "failed"
    assert result.reason == "did not end within 10 s: the grandchild runs"
    os.set_blocking(pipe, True)
    assert os.read(pipe, 1) == b""
    os.close(pipe)


def test_a_child_without_a_result_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    result = child(monkeypatch, tmp_path, "pass")
    assert (result.status, result.reason) == ("failed", "ended with exit code 0")


def test_a_child_sees_one_gpu_or_none():
    assert environment("cpu", {"CUDA_VISIBLE_DEVICES": "3"})["CUDA_VISIBLE_DEVICES"] == ""
    assert environment("cuda", {})["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment("cuda", {"CUDA_VISIBLE_DEVICES": "3,5"})["CUDA_VISIBLE_DEVICES"] == "3"
    paths = environment("cpu", {"PYTHONPATH": "/mine"})["PYTHONPATH"]
    assert paths.split(os.pathsep) == [str(ROOT), "/mine"]


def test_the_page_shows_every_outcome():
    results = (
        CheckResult(name="machine", status="passed", facts={"GPU": "NVIDIA H200"}, seconds=1.0),
        CheckResult(name="attention_flex", status="failed", reason="a | b", seconds=2.0),
        CheckResult(name="grpo_recipe", status="skipped", reason="not installed: ray"),
        CheckResult(
            name="throughput_0.5b",
            status="passed",
            figures=(
                Figure(name="parameters", value=0.494, unit="B"),
                Figure(name="update: time", value=0.5, unit="s"),
                Figure(name="update: rate", value=68000.4, unit="tokens/s"),
                Figure(name="update: MFU", value=41.23, unit="%"),
            ),
            facts={"peak": "989 TFLOP/s"},
            seconds=3.0,
        ),
    )
    report = Report(results=results, device="cuda", when=datetime(2026, 1, 2, tzinfo=UTC))
    page = report.to_markdown()
    assert "| GPU | NVIDIA H200 |" in page
    assert "| **failed** | 2.0 | a \\| b |" in page
    assert "| skipped |  | not installed: ray |" in page
    assert "parameters: 0.494 B." in page
    assert "| update | 0.5 s | 68,000 tokens/s | 41.23 % |  |" in page
    assert [result.name for result in report.failed] == ["attention_flex"]
    assert shown(FIGURE) == "1.5 nats"


def test_some_checks_alone_do_not_replace_the_page():
    assert parse([]).out == PAGE
    assert parse(["--only", "grpo"]).out is None
    assert parse(["--device", "cpu"]).out is None
    assert [check.name for check in chosen(["grpo"])] == ["machine", "grpo"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "flash"], "there is no check 'flash'"),
        (["--seconds", "0"], "Give a positive number"),
        (["--device", "cpu", "--out", str(PAGE)], "for measurements on a GPU"),
    ],
)
def test_mistakes_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse(words)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def no_driver(*_: object, **__: object):
        yield CheckResult(name="machine", status="failed", reason="no NVIDIA driver")

    monkeypatch.setattr("benchmarks.gpu_check.__main__.run_checks", no_driver)
    assert main(["--out", str(tmp_path / "page.md")]) == 2
    captured = capsys.readouterr()
    assert "no NVIDIA driver" in captured.out
    assert "--device cpu" in captured.err
    assert not (tmp_path / "page.md").exists()
