"""Plan and time estimate of expert iteration, before Ray starts.

Everything else is checked as in the RL run that `ExpertIterationRunConfig.online` returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rlsys.config.command_line import evolve
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.hardware import Hardware
from rlsys.models.loading import parameter_count
from rlsys.rewards import refuse_rewards_of_training
from rlsys.run.compute_dtype import DtypeChoice, ProductSpeed
from rlsys.run.directory import RunDirectory
from rlsys.run.model_checks import ModelDirectories
from rlsys.run.plan import PlannedData, as_table, plan_rows
from rlsys.run.step_time import StepEstimate, estimate_step

# Rows of the plan of an RL run that do not concern expert iteration.
OTHER_ROWS = ("reference", "critic", "reward model", "advantages", "text")


def expert_mistakes(config: ExpertIterationRunConfig) -> Iterator[str]:
    """Yield the mistakes that only this kind of run can have, a line each."""
    yield from config.own_contradictions()
    try:
        refuse_rewards_of_training(config.reward.functions, "expert iteration")
    except ValueError as error:
        yield str(error)


def with_dtypes(config: ExpertIterationRunConfig, choice: DtypeChoice) -> ExpertIterationRunConfig:
    """Return the configuration with each precision that is `auto` resolved for this machine."""
    chosen = {
        "policy.compute_dtype": choice.config.policy.compute_dtype,
        "generation.dtype": choice.config.generation.dtype,
    }
    return evolve(config, chosen)


def estimate_expert_step(
    config: ExpertIterationRunConfig,
    hardware: Hardware,
    directories: ModelDirectories,
    prompt_tokens: float,
    speed: ProductSpeed | None,
) -> StepEstimate | None:
    """Estimate the time of a step in which every response is kept; None: `speed` does not apply."""
    one_epoch = estimate_step(
        config.online(),
        hardware,
        parameters=parameter_count(directories.policy),
        prompt_tokens=prompt_tokens,
        speed=speed,
    )
    if one_epoch is None:
        return None
    return replace(one_epoch, training_s=config.expert.epochs * one_epoch.training_s)


def describe_expert_plan(
    config: ExpertIterationRunConfig,
    hardware: Hardware,
    data: PlannedData,
    directories: ModelDirectories,
    directory: RunDirectory,
) -> str:
    """Describe what a run would start, with a rough estimate of its memory; see `describe_plan`."""
    rows = plan_rows(config.online(), hardware, data, directories, directory)
    rows = {name: text for name, text in rows.items() if name not in OTHER_ROWS}
    expert, prompts = config.expert, config.trainer.prompts_per_step
    samples = config.generation.samples_per_prompt
    once = ", each once" if expert.deduplicate else ""
    passes = "1 epoch" if expert.epochs == 1 else f"{expert.epochs} epochs"
    rows["step"] = (
        f"{prompts} prompts x {samples} samples = {prompts * samples} responses of at most "
        f"{config.generation.max_tokens} tokens; {passes} of fine-tuning on the correct "
        f"ones{once}, at most {expert.examples_per_update} per optimizer step"
    )
    return as_table(rows)
