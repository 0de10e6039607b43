"""Build docker/Dockerfile in a directory where there is no Docker daemon, and run a command in it.

    debootstrap --variant=minbase bookworm ROOT http://deb.debian.org/debian
    cp -a PYTHON/. ROOT/usr/local/      # a CPython 3.11, as the base image has it there
    python -m benchmarks.image_in_chroot ROOT --command "python -m recipes.grpo_math --dry-run"

As root, on Linux. The instructions of the file are carried out in ROOT one after the other, with
chroot instead of layers: RUN, COPY, USER, WORKDIR and ENV. Then a command runs as the image would
run it: its user, its environment and its entry point. Settings of the package managers of this
machine (mirrors, certificates) are copied into ROOT first, and lie beside those of the image.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
MOUNTS = ("/proc", "/sys", "/dev", "/dev/shm")
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}


@dataclass
class Image:
    """What the instructions so far have set up."""

    root: Path
    user: str = "0:0"
    directory: str = "/"
    entry_point: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(BASE_ENVIRONMENT))

    def run(self, words: list[str]) -> None:
        """Run a command as the image's user in its working directory.

        Raises:
            CalledProcessError: it failed.
        """
        home = "/root" if self.user == "0:0" else "/home/rlsys"
        variables = {**self.environment, "HOME": home}
        pairs = [f"{name}={value}" for name, value in variables.items()]
        enter = ["chroot", f"--userspec={self.user}", str(self.root)]
        inside = ["env", "-i", f"--chdir={self.directory}", *pairs, *words]
        subprocess.run([*enter, *inside], check=True)

    def copy_repository(self, owner: str) -> None:
        """Copy the files that git tracks, which is what .dockerignore leaves of a clean clone."""
        target = self.root / self.directory.lstrip("/")
        archive = subprocess.Popen(
            ["git", "-C", str(REPOSITORY), "archive", "HEAD"], stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", str(target)], stdin=archive.stdout, check=True)
        if archive.wait():
            raise RuntimeError("git archive failed")
        self.run(["chown", "-R", owner, self.directory])


def instructions(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Dockerfile with their arguments, lines joined."""
    lines = (line for line in file.read_text().splitlines() if not line.startswith("#"))
    text = "\n".join(lines).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, argument = line.partition(" ")
        yield name, argument.strip()


def carry_out(image: Image, name: str, argument: str) -> None:
    """Carry out one instruction.

    Raises:
        ValueError: an instruction that this program does not know.
    """
    if name == "RUN":
        image.run(["/bin/sh", "-c", argument])
    elif name == "WORKDIR":
        image.directory = argument
        (image.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "USER":
        image.user = argument
    elif name == "ENV":
        for pair in shlex.split(argument.replace("$PATH", image.environment["PATH"])):
            key, _, value = pair.partition("=")
            image.environment[key] = value
    elif name == "COPY":
        option, *places = argument.split()
        if places != [".", "."]:
            raise ValueError(f"COPY {argument}: only the whole repository is copied")
        image.copy_repository(option.removeprefix("--chown="))
    elif name == "ENTRYPOINT":
        image.entry_point = json.loads(argument)
    elif name not in ("FROM", "CMD", "HEALTHCHECK"):
        raise ValueError(f"{name}: no such instruction here")


@contextmanager
def mounted(root: Path, shared: list[str]) -> Iterator[None]:
    """Mount what a container gets, and `shared` directories of this machine."""
    with ExitStack() as stack:
        for directory in (*MOUNTS, *shared):
            target = root / directory.lstrip("/")
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", directory, str(target)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(target)], check=True)
        yield


def main() -> None:
    """Build, and run a command in the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="directory with Debian and Python")
    parser.add_argument("--command", default="python --version", help="to run in the image")
    parser.add_argument("--keep", action="append", default=[], help="a variable, NAME=VALUE")
    parser.add_argument("--share", action="append", default=[], help="directory to mount in it")
    parser.add_argument("--copy", action="append", default=[], help="file to copy into it")
    parser.add_argument("--built", action="store_true", help="it is built: run the command only")
    arguments = parser.parse_args()

    image = Image(root=arguments.root.resolve())
    image.environment |= dict(pair.split("=", 1) for pair in arguments.keep)
    for file in ("/etc/resolv.conf", *arguments.copy):
        target = image.root / file.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)

    with mounted(image.root, arguments.share):
        for name, argument in instructions(DOCKERFILE):
            if arguments.built and name in ("RUN", "COPY"):
                continue
            print(f"{name} {argument}", file=sys.stderr, flush=True)
            carry_out(image, name, argument)
        image.run([*image.entry_point, *shlex.split(arguments.command)])


if __name__ == "__main__":
    main()
