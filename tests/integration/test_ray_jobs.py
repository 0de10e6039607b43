"""Recipes as Ray jobs, with the commands of docs/cluster.md: two nodes, tokens, the job server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.run_status import RunStatus, read_status
from tests.support.ray_nodes import RayNode, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

CPUS = 2  # of the cluster: policy and generation reserve one each, so two nodes share the run

# Flags that make a documented command small; later ones override earlier ones.
SMALL = [
    *("--policy.ranks", "1", "--generation.workers", "1"),
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "4", "--generation.samples_per_prompt", "2"),
    *("--trainer.prompts_per_step", "2", "--trainer.evaluation.every", "0"),
    *("--data.synthetic.train_size", "20", "--data.synthetic.eval_size", "2"),
]


def block_with(text: str) -> str:
    """Return the block of the page that contains a text."""
    [block] = [block for block in BLOCKS if text in block]
    return block


@dataclass(frozen=True)
class Cluster:
    """A head, a worker, and what a client of them needs."""

    directory: Path
    environment: Mapping[str, str]  # of a client
    dashboard: str  # host:port

    def shell(self, script: str, *flags: str, limit: float = 600) -> tuple[int, str]:
        """Run a block of the page with more flags at the end; return exit code and output."""
        script = script.replace(". .venv/bin/activate\n", "").rstrip()
        script = script.replace("127.0.0.1:8265", self.dashboard)
        script = script.replace("/shared/runs", str(self.directory / "runs"))
        done = subprocess.run(
            ["bash", "-ec", " ".join([script, *flags])],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        return done.returncode, done.stdout

    def log(self, job: str) -> str:
        """Return what the command of a job printed, without what the client adds."""
        [file] = self.directory.glob(f"node-0/session_2*/logs/job-driver-{job}.log")
        return file.read_bytes().decode()

    def status(self, job: str) -> str:
        return self.shell(f"ray job status {job}")[1]


def environment_of(home: Path, directory: Path, binaries: Path) -> dict[str, str]:
    """Return the environment of a user on one machine, with the programs in `binaries` first."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    return inherited | {
        "HOME": str(home),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(directory),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }


def node_script(block: str, head: int, directory: Path, *flags: str) -> str:
    """Return a block of the page that starts a node, for a node among others on a machine."""
    agent = free_ports(1)[0]
    block = block.replace(". .venv/bin/activate\n", "")
    block = re.sub(r"\b6379\b", str(head), block).replace("HEAD:", "127.0.0.1:")
    more = [
        *("--block", "--temp-dir", str(directory), "--dashboard-agent-listen-port", str(agent)),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--object-store-memory", "100000000", *flags),
    ]
    return f"{block.rstrip().replace('ray start', 'exec ray start')} {' '.join(more)}"


@contextmanager
def cluster_of_nodes(count: int, *, bare: bool = False) -> Iterator[Cluster]:
    """Start a head and workers by the blocks of the page; each has a home of its own.

    Args:
        bare: start them from an environment without rlsys.
    """
    directory = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))
    binaries = Path(sys.executable).parent
    gcs, dashboard, client = free_ports(3)
    nodes: list[RayNode] = []
    try:
        if bare:
            binaries = make_bare_environment(directory / "bare")
        for index in range(count):
            cpus = ("--num-cpus", str(CPUS // count))
            ports = (gcs, dashboard, client)
            nodes.append(start_node(directory, index, binaries, ports, cpus))
        environment = {
            **environment_of(directory / "home-0", directory / "node-0", binaries),
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        yield Cluster(directory, environment, f"127.0.0.1:{dashboard}")
    finally:
        for node in reversed(nodes):
            node.stop()
        left = [process for node in nodes for process in node.processes()]
        shutil.rmtree(directory, ignore_errors=True)
    assert not left


def start_node(
    directory: Path,
    index: int,
    binaries: Path,
    ports: tuple[int, int, int],
    more: tuple[str, ...],
) -> RayNode:
    """Start the head (index 0) or a worker, with more flags of `ray start`."""
    gcs, dashboard, client = ports
    home, place = directory / f"home-{index}", directory / f"node-{index}"
    (home / ".ray").mkdir(parents=True)
    environment = environment_of(home, place, binaries)
    if index == 0:
        flags = ("--dashboard-port", str(dashboard), "--ray-client-server-port", str(client))
        script = node_script(block_with("\nray start --head"), gcs, place, *flags, *more)
        return RayNode.start(script, place, environment)

    # The page copies the token by ssh.
    shutil.copy(directory / "home-0" / ".ray" / "auth_token", home / ".ray")
    script = node_script(block_with("ray start --address"), gcs, place, *more)
    return RayNode.start(script, place, environment)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of_nodes(2) as cluster:
        yield cluster


def wait_for(run: RunDirectory, reached: int, cluster: Cluster, job: str) -> RunStatus:
    """Wait until a run has completed a step, and return its status."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        status = read_status(run)
        if status and status.step >= reached:
            return status
        time.sleep(0.1)
    raise AssertionError(f"{cluster.status(job)}\n{cluster.log(job)}")


def test_a_job_is_stopped_and_the_same_command_continues_it(cluster: Cluster):
    submit, again = block_with("--submission-id math-1"), block_with("--submission-id math-2")
    run = RunDirectory(cluster.directory / "runs" / "math")

    code, output = cluster.shell(submit, *SMALL, "--trainer.steps", "500")
    assert code == 0, output
    wait_for(run, 1, cluster, "math-1")
    code, output = cluster.shell("ray job stop math-1")
    assert code == 0, output
    assert "Job 'math-1' was stopped" in cluster.status("math-1")
    log = cluster.log("math-1")
    status = read_status(run)
    assert status is not None
    assert status.state == "interrupted"
    assert f"stopped after step {status.step} of 500: saved" in log.splitlines()[-1]
    assert "RAY_JOB_STOP_WAIT_TIME_S" not in log  # the head was started with time enough
    assert sorted(run.checkpoints.glob("step_??????"))[-1].name == f"step_{status.step:06d}"

    steps = status.step + 1
    code, output = cluster.shell(again, *SMALL, "--trainer.steps", str(steps))
    assert code == 0, output
    code, output = cluster.shell("ray job logs math-2 --follow")
    assert code == 0, output
    assert f"resuming from {run.checkpoints}/step_{status.step:06d}" in output
    assert "Job 'math-2' succeeded" in cluster.status("math-2")
    records = read_metrics(run.metrics)
    assert [record.step for record in records] == list(range(1, steps + 1))
    check_plain_lines(cluster.log("math-2"), first=steps, last=steps)

    third = again.replace("math-2", "math-3").replace("--no-wait", "")
    code, output = cluster.shell(third, *SMALL, "--trainer.steps", str(steps))
    assert code == 0, output
    assert "already complete" in cluster.log("math-3")


def check_plain_lines(log: str, *, first: int, last: int) -> None:
    """Check that a log has a row for each step, and no control characters but Ray's tabs."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log)
    total = f"/{last}"
    rows = [line.split()[0] for line in log.splitlines() if line.split()[:1]]
    assert [row for row in rows if row.endswith(total)] == [
        f"{step}{total}" for step in range(first, last + 1)
    ]


def test_a_job_whose_results_ray_would_delete_fails_with_the_reason(cluster: Cluster):
    submit = block_with("--submission-id math-1").replace("math-1", "lost").replace("--no-wait", "")
    code, output = cluster.shell(submit, *SMALL, "--run.directory", "runs/lost")
    assert code == 1, output
    status = cluster.status("lost")
    assert "Job 'lost' failed" in status
    assert re.search(r"error: run\.directory: 'runs/lost' lies in .*--run\.directory /PATH", status)


def test_a_client_without_the_token_is_refused(cluster: Cluster):
    environment = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    stranger = Cluster(cluster.directory, environment, cluster.dashboard)
    code, output = stranger.shell("ray job list")
    assert code != 0
    assert "token" in output.lower(), output


@pytest.mark.long
def test_nodes_without_the_environment_get_it_from_another_path():
    """The head is started from an environment in which neither torch nor rlsys can be imported."""
    with cluster_of_nodes(1, bare=True) as cluster:
        python = cluster.directory / "bare" / "bin" / "python"
        missing = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
        assert "No module named 'torch'" in missing.stderr

        submit = block_with("--submission-id math-3").replace("--no-wait", "")
        submit = submit.replace("/opt/rlsys/bin/python", sys.executable)
        code, output = cluster.shell(submit, *SMALL, "--trainer.steps", "1")
        assert code == 0, output
        run = RunDirectory(cluster.directory / "runs" / "math")
        assert (run.checkpoints / "step_000001").is_dir()


def make_bare_environment(directory: Path) -> Path:
    """Make an environment with Ray and without torch, transformers, vLLM and rlsys; return bin/."""
    absent = ("torch", "transformers", "vllm", "rlsys", "__editable__")
    packages = directory / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(absent):
            (packages / entry.name).symlink_to(entry)

    binaries = directory / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to(os.path.realpath(sys.executable))
    home = Path(os.path.realpath(sys.executable)).parent
    (directory / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    command = binaries / "ray"
    command.write_text(f"#!{binaries / 'python'}\nfrom ray.scripts.scripts import main\n\nmain()\n")
    command.chmod(0o755)
    return binaries
