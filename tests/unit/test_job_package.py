"""What `ray job submit --working-dir .` uploads from a checkout."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MIB = 20
LARGE = 30 * 1024**2
# What a checkout holds after a while, beside the files of the repository.
USED = (
    *(".venv/lib/python3.11/site-packages/torch.so", "runs/a/checkpoints/step_000001/x.bin"),
    *("data/math/train.parquet", "models/mine/model.safetensors", "mine.gguf"),
    *("recipes/__pycache__/x.pyc", ".git/objects/pack/x.pack", "wandb/run/x.bin"),
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files of the repository, with what its use leaves there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    copy = tmp_path / "checkout"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name in USED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        with (copy / name).open("wb") as file:
            file.truncate(LARGE)
    (copy / "my_reward.py").write_text("")
    (copy / "my_data.jsonl").write_text("")
    return copy


def test_a_job_uploads_the_program_and_nothing_large(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    monkeypatch.chdir(checkout)
    package = tmp_path / "package.zip"
    create_package(
        str(checkout),
        package,
        include_parent_dir=False,
        include_gitignore=True,
        excludes=get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(package) as archive:
        names = set(archive.namelist())
        size = sum(entry.file_size for entry in archive.infolist())

    assert size < LIMIT_MIB * 1024**2
    assert names.isdisjoint(USED)
    programs = {
        path.relative_to(checkout).as_posix()
        for top in ("rlsys", "workers", "recipes")
        for path in (checkout / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert programs <= names
    assert {"pyproject.toml", "uv.lock", "my_reward.py", "my_data.jsonl"} <= names
