"""Write the model of a run or checkpoint as a Hugging Face directory of its own.

    python -m rlsys.export runs/NAME OUT                                   the newest checkpoint
    python -m rlsys.export runs/NAME/checkpoints/step_000020 OUT --dtype bfloat16
    python -m rlsys.export runs/NAME/checkpoints/step_000020/critic OUT

OUT gets config, tokenizer and weights in files of at most 5 GB, without optimizer and training
state. One tensor at a time is in memory. Adapters are first merged with their base in the cache of
models, in the type of the base's files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlsys.config.command_line import CONFIG_FILE
from rlsys.models import resolve_model, weight_files
from rlsys.models.adapters import holds_adapters
from rlsys.models.saving import change_model_config, copy_model_files
from rlsys.models.tensor_files import TensorFacts, TensorFileWriter
from rlsys.models.weight_files import FILE_BYTES, FORMAT, WeightFiles
from rlsys.run.checkpoints import TRAINER_STATE
from rlsys.run.evaluated_model import named, resolve_evaluated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELD = "RUN_OR_CHECKPOINT"  # in messages


def export(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> None:
    """Write the model in the directory `source` to a new directory.

    Args:
        dtype: of floating-point weights; None: as they are.
        file_bytes: the size of a file of weights, unless a single tensor is larger.

    Raises:
        ValueError: there are no weights, or they are damaged.
        OSError: the files cannot be written; nothing is left at `target` then.
    """
    files = WeightFiles.of(source)
    tensors = [_converted(facts, dtype) for facts in files.tensors.values()]
    parts = weight_files.divided(tensors, file_bytes)

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_model_files(source, partial)
        if dtype is not None:
            # The second is the name that older configs and readers have for it.
            name = str(dtype).removeprefix("torch.")
            change_model_config(partial, {"dtype": name, "torch_dtype": name})
        for name, part in zip(weight_files.file_names(len(parts)), parts, strict=True):
            with TensorFileWriter(partial / name, part, FORMAT) as file:
                for facts in part:
                    file.write(facts.name, files.read_whole(facts.name))
        weight_files.write_index(partial, parts)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _converted(facts: TensorFacts, dtype: torch.dtype | None) -> TensorFacts:
    keeps = dtype is None or not facts.dtype.is_floating_point
    return facts if keeps else replace(facts, dtype=dtype)


def model_directory(path: str) -> Path:
    """Return the directory of the model that a path names: of a run, the newest checkpoint.

    Adapters are merged with their base.

    Raises:
        ValueError: it names no model, or a damaged checkpoint; the base of adapters is missing.
    """
    place = Path(path).expanduser()
    if (place / CONFIG_FILE).is_file() or (place / TRAINER_STATE).is_file():
        return resolve_evaluated(path, FIELD).directory
    if not (place / "config.json").is_file():
        raise ValueError(
            f"{FIELD}: {path!r} is no run, checkpoint or model directory. Give runs/NAME, "
            "runs/NAME/checkpoints/step_N, or the critic/ of one."
        )
    if holds_adapters(place):
        return named(FIELD, lambda: resolve_model(path))
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlsys.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar=FIELD)
    parser.add_argument("target", metavar="OUT", type=Path, help="a directory that does not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights (default: as they are, float32)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.target.exists():
            raise ValueError(f"OUT: {options.target} exists already. Give another directory.")
        source = model_directory(options.source)
        dtype = DTYPES[options.dtype] if options.dtype else None
        export(source, options.target, dtype=dtype)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{source} -> {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
