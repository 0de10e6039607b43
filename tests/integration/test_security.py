"""A real run with hostile data, secrets in its environment, and a reward that prints them."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest

from rlsys.models.catalogue import cache_directory

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
LOOK_EVERY_S = 0.5

SECRETS = {
    "HF_TOKEN": "hf_PlantedHubTokenOfTheTest",
    "WANDB_API_KEY": "planted0wandb1key2of3the4test5",
    "AWS_SECRET_ACCESS_KEY": "planted/storage+key/of/the/test",
    "RAY_AUTH_TOKEN": "planted9ray8token7of6the5test4planted9ray8token7of6the5test4",
    "JUDGE_PASSWORD": "planted-password-of-the-test",
    "HTTPS_PROXY": "http://planted-user:planted-proxy-password@127.0.0.1:9",
}
PLANTED = [*list(SECRETS.values())[:-1], "planted-proxy-password"]

# Fails on the responses to one of eight problems, with all that it knows.
REWARD = """
import os

from rlsys.rewards import register_reward_function

NAMES = {names!r}


@register_reward_function("leaking")
def leaking_reward(completion: str, ground_truth: str) -> float:
    known = " ".join(f"{{name}}: {{os.environ[name]}}" for name in NAMES)
    print(known, "\\x1b[2J\\u202e", flush=True)
    if ground_truth == "7":
        raise RuntimeError(f"[red]refused[/red] \\x1b[2J\\u202e with {{known}}")
    return float(len(completion) % 2)
"""
HOSTILE = (
    "<script>alert(1)</script></pre><img src=x onerror=alert(1)> [red] \x1b]0;t\x07 \u202e \x00"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, set[str]]:
    """Train for two steps.

    Return the folder of the test, what the run printed, and the addresses that it listened on.
    """
    folder = tmp_path_factory.mktemp("security")
    rows = [{"problem": f"{HOSTILE} {i}?", "answer": str(i)} for i in range(8)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "leaking.py").write_text(REWARD.format(names=list(SECRETS)))
    command = [
        *(sys.executable, "-m", "recipes.grpo_math", "--model.path", "tiny"),
        *("--generation.engine", "transformers", "--generation.dtype", "float32"),
        *("--policy.compute_dtype", "float32", "--generation.max_tokens", "8"),
        *("--generation.samples_per_prompt", "4", "--trainer.prompts_per_step", "8"),
        *("--data.train", str(folder / "data.jsonl"), "--data.eval", "off"),
        *("--data.max_prompt_tokens", "400"),
        *("--plugins", "leaking", "--reward.functions", "leaking"),
        *("--trainer.steps", "2", "--trainer.checkpoints.every", "2"),
        *("--run.directory", str(folder / "run")),
    ]
    environment = os.environ | SECRETS
    environment |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    environment |= {"RLSYS_CACHE": str(cache_directory())}

    with (folder / "output.txt").open("w") as output:
        process = psutil.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            addresses = watched(process)
        finally:
            with suppress(psutil.Error):
                process.terminate()  # a run that is stopped stops its Ray
            process.wait(60)
    printed = (folder / "output.txt").read_text()
    assert process.returncode == 0, printed
    return folder, printed, addresses


def watched(process: psutil.Popen) -> set[str]:
    """Return the addresses on which a process and its children listen, until it ends."""
    addresses: set[str] = set()
    while process.poll() is None:
        with suppress(psutil.Error):
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):
                    addresses |= listening(one)
        with suppress(psutil.TimeoutExpired):
            process.wait(LOOK_EVERY_S)
    return addresses


def listening(process: psutil.Process) -> set[str]:
    connections = process.net_connections("inet")
    return {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN and one.laddr}


def test_everything_listens_on_the_loopback_address(run: tuple[Path, str, set[str]]):
    _, _, addresses = run
    assert addresses
    assert addresses <= set(LOOPBACK)


def test_no_secret_is_written_or_printed(run: tuple[Path, str, set[str]]):
    folder, printed, _ = run
    texts = {"output": printed}
    for file in (folder / "run").rglob("*"):
        if file.suffix == ".parquet":  # compressed
            texts[file.name] = str(pyarrow.parquet.read_table(file).to_pylist())
        elif file.is_file():
            texts[str(file)] = file.read_bytes().decode(errors="replace")

    leaks = [(name, secret) for name, text in texts.items() for secret in PLANTED if secret in text]
    assert leaks == []
    # What the reward printed and raised did arrive there.
    for text in (texts[str(folder / "run" / "run.log")], printed):
        assert "RuntimeError: [red]refused[/red]" in text
        assert "HF_TOKEN: ***" in text


def test_console_log_and_report_show_hostile_texts_as_they_are(run: tuple[Path, str, set[str]]):
    folder, printed, _ = run
    log = (folder / "run" / "run.log").read_text()
    report = (folder / "run" / "report.html").read_text()
    for text in (printed, log, report):
        assert not {"\x1b", "\x07", "\u202e", "\x00"} & set(text)
    assert r"\u001b[2J\u202e" in printed
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert(1)" in report
