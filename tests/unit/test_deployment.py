"""The files that start rlsys elsewhere agree with each other, with pyproject.toml and with Ray.

No Docker daemon, Kubernetes or Slurm is needed: what they would do is in docs/deployment.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rlsys.config.command_line import parse
from rlsys.config.hardware import detect_hardware

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
RAY_UP = yaml.safe_load((DOCKER / "ray-cluster.yaml").read_text())
RAY_CLUSTER = yaml.safe_load((DOCKER / "kuberay" / "raycluster.yaml").read_text())
RAY_JOB = yaml.safe_load((DOCKER / "kuberay" / "rayjob.yaml").read_text())
VOLUME = yaml.safe_load((DOCKER / "kuberay" / "volume.yaml").read_text())
SBATCH = DOCKER / "slurm" / "rlsys.sbatch"
DOCKERFILES = {"cpu": DOCKER / "Dockerfile", "gpu": DOCKER / "Dockerfile.gpu"}
CLUSTER_SPECS = {
    "raycluster": RAY_CLUSTER["spec"],
    "rayjob": RAY_JOB["spec"]["rayClusterSpec"],
}
IMAGE = f"rlsys:{PROJECT['version']}-cpu"
USER = 1000
GCS_PORT, DASHBOARD_PORT = 6379, 8265


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pods of a KubeRay cluster, the head first."""
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.split("\n"))]


def flags_of(words: list[str]) -> dict[str, str]:
    """Return the --name=value of a command."""
    pairs = (word[2:].partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def test_every_file_uses_the_image_of_this_version():
    compose = {service["image"] for service in COMPOSE["services"].values()}
    kubernetes = {
        container["image"]
        for spec in CLUSTER_SPECS.values()
        for pod in pods(spec)
        for container in pod["containers"]
    }
    assert compose == kubernetes == {RAY_UP["docker"]["image"]} == {IMAGE}
    for kind, file in DOCKERFILES.items():
        assert f"-t rlsys:{PROJECT['version']}-{kind} ." in file.read_text()


def test_kuberay_knows_the_version_of_ray():
    wanted = next(text for text in PROJECT["dependencies"] if text.startswith("ray"))
    least = re.search(r">=([\d.]+)", wanted)
    assert least is not None
    for spec in CLUSTER_SPECS.values():
        assert spec["rayVersion"] == f"{least[1]}.0"


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_images_are_pinned_and_run_as_a_user_with_a_health_check(kind: str):
    steps = instructions(DOCKERFILES[kind])
    for name, rest in steps:
        if name == "FROM":
            tag = rest.split()[0].partition(":")[2]
            assert re.search(r"\d+\.\d+\.\d+", tag), rest

    names = [name for name, _ in steps]
    assert ("USER", f"{USER}:{USER}") in steps
    assert names.index("USER") < names.index("CMD")
    setup = next(rest for name, rest in steps if name == "RUN" and "make setup" in rest)
    words = shlex.split(setup)
    assert f"EXTRA={kind}" in words
    assert "PYTHON=python3.11" in words
    health = next(rest for name, rest in steps if name == "HEALTHCHECK")
    assert "docker/healthcheck.py" in health
    assert any(f"useradd --create-home --uid {USER}" in rest for _, rest in steps)
    assert any(re.search(r"uv==\d+\.\d+\.\d+", rest) for _, rest in steps)


def test_the_gpu_image_installs_the_torch_of_the_project():
    pinned = next(one for one in PROJECT["optional-dependencies"]["gpu"] if "torch==" in one)
    assert f'TORCH_SOURCE="{pinned} ' in DOCKERFILES["gpu"].read_text()


def test_the_token_and_the_environment_stay_out_of_the_images():
    for file in DOCKERFILES.values():
        ignored = file.with_name(f"{file.name}.dockerignore").read_text().split()
        assert {".git", ".venv", "runs", "docker/auth_token"} <= set(ignored)
    assert "docker/auth_token" in (ROOT / ".gitignore").read_text().split()


def commands_of_compose() -> dict[str, list[str]]:
    return {name: shlex.split(service["command"]) for name, service in COMPOSE["services"].items()}


def test_compose_starts_a_head_and_two_workers_that_find_it():
    services, commands = COMPOSE["services"], commands_of_compose()
    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["worker"]["depends_on"]["head"]["condition"] == "service_healthy"
    assert flags_of(commands["head"])["port"] == str(GCS_PORT)
    assert flags_of(commands["worker"])["address"] == f"head:{GCS_PORT}"
    assert services["head"]["healthcheck"]["test"] == ["CMD", "python", "docker/healthcheck.py"]
    for name, words in commands.items():
        assert words[:2] == ["ray", "start"]
        assert "--block" in words
        store = int(flags_of(words)["object-store-memory"])
        assert services[name]["shm_size"] == "2gb"
        assert store < 2 * 1024**3


def test_compose_publishes_no_port_and_every_node_asks_for_the_token():
    secret = next(iter(COMPOSE["secrets"]))
    for service in COMPOSE["services"].values():
        assert "ports" not in service
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{secret}"
        assert service["secrets"] == [secret]
    assert flags_of(commands_of_compose()["head"])["dashboard-host"] == "127.0.0.1"


@pytest.mark.parametrize("name", CLUSTER_SPECS)
def test_kubernetes_asks_for_the_token_and_runs_as_a_user(name: str):
    spec = CLUSTER_SPECS[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in pods(spec):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == USER
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", CLUSTER_SPECS)
def test_every_mount_of_a_pod_has_its_volume(name: str):
    for pod in pods(CLUSTER_SPECS[name]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes)
        assert mounts["shared-memory"] == "/dev/shm"
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        if "runs" in volumes:
            claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
            assert claim == VOLUME["metadata"]["name"]


@pytest.mark.parametrize("name", CLUSTER_SPECS)
def test_the_head_has_the_ports_of_ray(name: str):
    (head,) = pods(CLUSTER_SPECS[name])[0]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["gcs-server"] == GCS_PORT
    assert ports["dashboard"] == DASHBOARD_PORT


def test_the_two_files_of_kuberay_describe_the_same_cluster():
    assert CLUSTER_SPECS["raycluster"] == CLUSTER_SPECS["rayjob"]


def recipe_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each recipe that a file starts, with its flags; those in comments too."""
    for file in sorted(DOCKER.rglob("*.yaml")):
        text = re.sub(r"\\\n#\s*", "", file.read_text())
        for line in re.findall(r"python -m (recipes\.[^\n]*(?:\n    --[^\n]*)?)", text):
            module, *flags = shlex.split(line, comments=True)
            yield module, flags


def test_every_recipe_that_is_started_takes_its_flags():
    commands = list(recipe_commands())
    assert len(commands) >= 3
    for module, flags in commands:
        recipe = getattr(importlib.import_module(module), module.removeprefix("recipes."))
        config = parse(recipe(detect_hardware()), flags).config
        assert config.cluster.address == "auto"
        # Any other directory would be on the disk of a container, and gone with it.
        assert config.run.directory.startswith("/runs/")


def test_ray_accepts_the_file_of_ray_up():
    prepared = prepare_config(yaml.safe_load((DOCKER / "ray-cluster.yaml").read_text()))
    validate_config(prepared)  # what `ray up` calls before it touches a machine
    (nodes,) = prepared["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == 2


def test_ray_up_hands_the_token_to_nodes_that_ask_for_it():
    assert "/home/rlsys/.ray/auth_token" in RAY_UP["file_mounts"]
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in RAY_UP[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert f"--port={GCS_PORT}" in starts[0]
    assert starts[1].endswith(f"--address=$RAY_HEAD_IP:{GCS_PORT}")
    assert RAY_UP["max_workers"] == len(RAY_UP["provider"]["worker_ips"])


def test_bash_reads_the_slurm_script():
    shell = shutil.which("bash")
    assert shell is not None
    subprocess.run([shell, "-n", str(SBATCH)], check=True)


def test_the_slurm_script_never_stops_ray_by_name():
    lines = SBATCH.read_text().splitlines()
    commands = "\n".join(line for line in lines if not line.startswith("#"))
    assert "ray stop" not in commands
    assert "pkill" not in commands
    assert "--dashboard-host=127.0.0.1" in commands
    assert "RAY_AUTH_MODE=token" in commands
    assert "--block" in commands


def test_what_never_ran_says_so_in_its_first_lines():
    files = [*DOCKERFILES.values(), SBATCH, *DOCKER.rglob("*.yaml")]
    for file in files:
        head = "\n".join(file.read_text().splitlines()[:20])
        assert re.search(r"^# Never ", head, re.MULTILINE), file


def health_check() -> Any:
    """Return the module that the images run; docker/ is no package."""
    specification = importlib.util.spec_from_file_location("healthcheck", DOCKER / "healthcheck.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["healthcheck"] = module
    specification.loader.exec_module(module)
    return module


def test_a_container_is_a_node_where_it_runs_ray_start(tmp_path: Path):
    check = health_check()
    for process, words in enumerate((["tini", "--"], ["/rlsys/.venv/bin/ray", "start", "--head"])):
        folder = tmp_path / str(process + 1)
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
    (tmp_path / "not-a-process").mkdir()
    found = list(check.commands(tmp_path))
    assert len(found) == 2
    assert sorted(map(check.is_ray_start, found)) == [False, True]
    assert check.services(found) == [check.RAYLET, check.GCS]
    assert check.services([["python", "/usr/bin/ray", "start"]]) == [check.RAYLET]
    assert check.services([["python", "-m", "recipes.grpo_math"]]) == []


def test_a_node_whose_raylet_does_not_answer_is_not_healthy():
    assert not health_check().answers("http://127.0.0.1:1/")
