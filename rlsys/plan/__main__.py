"""The command `python -m rlsys.plan`: the memory of a run, before anything is started.

    python -m rlsys.plan --model.path smollm2-135m --policy.ranks 2      on CPUs
    python -m rlsys.plan --size 7b --gpu h100 --gpus 8 --propose         settings that fit
    python -m rlsys.plan --config runs/NAME/config.yaml --gpu h200 --gpus 2 --json

Every field of an RL run is a flag, as in the recipes (`python -m recipes.grpo_math --help` lists
them), and --config reads a file of them. The model is that of --model.path, whose config.json has
to be on this machine; or one of --size; or one whose sizes are given. With --gpu the default
lengths and batch are those of recipes.grpo_math on GPUs. It starts nothing and fetches nothing; it
exits with 0 where the run fits, 1 where it does not, and 2 for a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rlsys.config import RunConfig
from rlsys.config.command_line import evolve, parse
from rlsys.config.errors import ConfigError
from rlsys.plan.gpus import GPUS, gpu_called
from rlsys.plan.printing import as_record, as_text, proposal_record, proposal_text
from rlsys.plan.proposals import GPU_WORKLOAD, propose
from rlsys.plan.run_memory import Machine, plan_run
from rlsys.plan.shapes import NAMED_SHAPES, ModelShape, shape_of_flags, shape_of_model

SIZE_FLAGS = (
    "--hidden",
    "--layers",
    "--heads",
    "--kv-heads",
    "--intermediate",
    "--vocabulary",
    "--head-dim",
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not fields of a run."""
    found = argparse.ArgumentParser(
        prog="python -m rlsys.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--size", choices=list(NAMED_SHAPES), help="a model by its size")
    for flag in SIZE_FLAGS:
        found.add_argument(flag, type=int, help="size of a model of Llama's kind")
    found.add_argument("--tied", action="store_true", help="embedding and head are one matrix")
    found.add_argument(
        "--gpu", help=f"type of GPU ({', '.join(GPUS)}), or its GiB; without it: on CPUs"
    )
    found.add_argument("--gpus", type=int, default=1, help="number of GPUs (default: 1)")
    found.add_argument("--gpus-per-node", type=int, default=8, help="(default: 8)")
    found.add_argument("--propose", action="store_true", help="find settings that fit")
    found.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan, and return the exit code."""
    options, fields = parser().parse_known_args(arguments)
    try:
        return _plan(options, fields)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace, fields: Sequence[str]) -> int:
    gpu = gpu_called(options.gpu) if options.gpu else None
    machine = Machine(gpu=gpu, gpus=options.gpus, gpus_per_node=options.gpus_per_node)
    config = configuration(fields, on_gpu=gpu is not None)
    shape, name = model_of(options, config, fields)

    if options.propose:
        proposal = propose(config, machine, shape, shape_of_model)
        record, text = proposal_record(proposal), proposal_text(proposal, name, shape)
        fits = proposal.memory is not None
    else:
        memory = plan_run(config, machine, shape, shape_of_model)
        record, text = as_record(memory), as_text(memory, name, shape)
        fits = memory.fits
    print(json.dumps({"model": name, **record}, indent=1) if options.json else text)
    return 0 if fits else 1


def configuration(fields: Sequence[str], *, on_gpu: bool) -> RunConfig:
    """Return the configuration that the flags of a run give.

    Raises:
        ConfigError: an unknown field, an invalid value, fields that contradict each other, or a
            flag that would start or continue a run.
    """
    for word in fields:
        if word.partition("=")[0] in ("--dry-run", "--resume"):
            raise ConfigError(f"{word}: the plan starts nothing and resumes nothing. Leave it out.")
    recipe = evolve(RunConfig(), GPU_WORKLOAD) if on_gpu else RunConfig()
    config = parse(recipe, fields).config
    return evolve(config, {})  # `parse` leaves contradictions to the checks before a start


def model_of(
    options: argparse.Namespace, config: RunConfig, fields: Sequence[str]
) -> tuple[ModelShape, str]:
    """Return the shape and the name of the model.

    Raises:
        ConfigError: it is named in more than one way, or its sizes are not known.
    """
    names = [flag.removeprefix("--").replace("-", "_") for flag in SIZE_FLAGS]
    sizes = {name: getattr(options, name) for name in names}
    by_sizes = any(size is not None for size in sizes.values())
    by_path = any(word.partition("=")[0] == "--model.path" for word in fields)
    if by_sizes + by_path + (options.size is not None) > 1:
        raise ConfigError(
            "--size: the model is named in more than one way. Give one of --model.path, --size, "
            "and the sizes."
        )
    if options.tied and not by_sizes:
        raise ConfigError("--tied: it belongs to the sizes of a model. Give them, or leave it out.")
    if options.size is not None:
        return NAMED_SHAPES[options.size], options.size
    if by_sizes:
        return shape_of_flags(sizes, tied=options.tied), "the sizes given"
    return shape_of_model(config.model.path), config.model.path


if __name__ == "__main__":
    sys.exit(main())
