"""Paths of an evaluation: models, checkpoints, runs."""

import json
from pathlib import Path

import pytest

from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.evaluated_model import (
    check_evaluated_path,
    model_fingerprint,
    resolve_evaluated,
)


async def run_with_checkpoints(directory: Path, steps: tuple[int, ...]) -> Path:
    """Return the directory of a run with small checkpoints of these steps."""
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text("recipe: grpo_math\n")
    store = CheckpointStore(directory / "checkpoints", keep=9)
    for step in steps:

        async def write(target: Path, step: int = step) -> None:
            (target / "config.json").write_text("{}")
            (target / "tokenizer.json").write_text("{}")
            (target / "model.safetensors").write_bytes(bytes([step]) * 100)

        await store.save(step, write, {"step": step})
    return directory


async def test_a_run_stands_for_its_newest_undamaged_checkpoint(tmp_path: Path):
    run = await run_with_checkpoints(tmp_path / "run", (2, 4))
    found = resolve_evaluated(str(run), "model.path")
    assert found.directory == run / "checkpoints" / "step_000004"
    assert (found.step, found.name) == (4, f"{run} (step 4)")

    (found.directory / "model.safetensors").write_bytes(b"damaged")
    before = resolve_evaluated(str(run), "model.path")
    assert before.step == 2
    with pytest.raises(ValueError, match=r"compare: the checkpoint .* is damaged"):
        check_evaluated_path(str(found.directory), "compare")


async def test_a_checkpoint_is_a_model_with_a_step(tmp_path: Path):
    run = await run_with_checkpoints(tmp_path / "run", (6,))
    path = str(run / "checkpoints" / "step_000006")
    found = resolve_evaluated(path, "compare")
    assert (found.step, found.name, found.field) == (6, path, "compare")


async def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path):
    run = await run_with_checkpoints(tmp_path / "run", ())
    with pytest.raises(ValueError, match=r"model\.path: the run .* has no complete checkpoint"):
        check_evaluated_path(str(run), "model.path")


@pytest.mark.parametrize("field", ["model.path", "compare"])
def test_messages_name_the_field_of_the_model(field: str):
    with pytest.raises(ValueError, match=f"^{field}: 'smollm-135m' is neither") as refused:
        check_evaluated_path("smollm-135m", field)
    assert "smollm2-135m" in str(refused.value)


def test_the_fingerprint_covers_weights_and_texts_and_no_trainer_state(tmp_path: Path):
    """The file is larger than the 16 sampled blocks; the last block is among them."""
    weights = bytearray(2_000_000)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "model.safetensors").write_bytes(weights)
    first = model_fingerprint(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    assert model_fingerprint(tmp_path) == first

    weights[-1] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    changed = model_fingerprint(tmp_path)
    assert changed != first
    (tmp_path / "config.json").write_text(json.dumps({"a": 2}))
    assert model_fingerprint(tmp_path) != changed
