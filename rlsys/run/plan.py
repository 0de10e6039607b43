"""The plan of a run: what it would start, and roughly how much memory that takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.data.prompt_stream import LoadedProblems
from rlsys.models.loading import parameter_count
from rlsys.rewards import with_token_limit
from rlsys.run.directory import RunDirectory
from rlsys.run.required_inputs import estimator_parameters


def describe_plan(
    config: RunConfig,
    hardware: Hardware,
    problems: LoadedProblems,
    model_directory: Path,
    directory: RunDirectory,
) -> str:
    """Return what a run would start, and roughly how much memory it would take. Nothing is started.

    Memory of a policy rank: (4 weights + 4 gradients + 8 Adam) bytes per parameter over the ranks,
    compute-dtype weights beside them where that is bfloat16. Of an engine: its weights and the KV
    cache. Activations come on top and grow with policy.microbatch_tokens.
    """
    parameters = parameter_count(model_directory)
    policy, generation, trainer = config.policy, config.generation, config.trainer
    half = 2 if policy.compute_dtype == "bfloat16" else 0
    rank_gib = parameters * (16 / policy.ranks + half) / 1024**3
    cache = (
        f"{generation.kv_cache_gib:g} GiB cache"
        if not hardware.gpus
        else f"{generation.gpu_memory_utilization:.0%} of its GPU"
    )
    engine_gib = parameters * (2 if generation.dtype == "bfloat16" else 4) / 1024**3
    samples = trainer.prompts_per_step * generation.samples_per_prompt
    on_gpu = bool(hardware.gpus)
    rewards = with_token_limit(config.reward.functions, generation.max_tokens)
    rows = [
        f"machine      {hardware.cpus} CPUs, {hardware.memory_gib:.0f} GiB, {hardware.gpus} GPUs",
        f"ray          {config.cluster.joined_address or 'started on this machine'}",
        f"model        {config.model.path}: {parameters / 1e6:.1f} M parameters",
        f"generation   {generation.workers} x {generation.engine}, {generation.cpus_per_worker} CPU"
        + (f" + {generation.gpus_per_worker:g} GPU" if on_gpu else "")
        + f" each; {engine_gib:.2f} GiB weights ({generation.dtype}), {cache}",
        f"policy       {policy.ranks} x {policy.backend}, {policy.cpus_per_rank} CPU"
        + (f" + {policy.gpus_per_rank:g} GPU" if on_gpu else "")
        + f" each; {rank_gib:.2f} GiB weights, gradients and Adam ({policy.compute_dtype}), "
        "and activations",
        "reference    "
        + (
            f"{config.reference_role().ranks} ranks beside the policy"
            if config.algorithm.kl.coefficient
            else "none (algorithm.kl.coefficient is 0)"
        ),
        f"rewards      {config.reward.processes} processes: "
        f"{', '.join(f'{f.name}{shown_parameters(f.parameters)}' for f in rewards)}",
        "advantages   "
        f"{config.algorithm.advantage.name}{shown_parameters(estimator_parameters(config))}, "
        f"objective {config.algorithm.objective.ratio} x {config.algorithm.objective.weight}, "
        f"{config.algorithm.aggregation}",
        f"data         {problems.describe()}, template {config.data.template}",
        f"step         {trainer.prompts_per_step} prompts x {generation.samples_per_prompt} "
        f"samples = {samples} responses of at most "
        f"{generation.max_tokens} tokens; {policy.epochs * policy.num_mini_batches} optimizer steps",
        f"run          {trainer.steps} steps into {directory.path}",
    ]
    return "\n".join(rows)


def shown_parameters(parameters: Mapping[str, object]) -> str:
    """Return " (a=1, b=2)" for keyword parameters, and nothing where there are none."""
    pairs = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f" ({pairs})" if pairs else ""
