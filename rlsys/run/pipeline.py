"""The order of stages: which one is next, and what a resume may still change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.config.command_line import flat
from rlsys.config.rlhf import (
    COMPARISON,
    REWARD_FUNCTION,
    SHARED,
    STAGES,
    RlhfRunConfig,
    flat_values,
)
from rlsys.run.pipeline_directory import (
    PipelineDirectory,
    StageState,
    rankings_state,
    training_state,
)

MODULES: Mapping[str, str] = {
    "sft": "recipes.sft_math",
    "rankings": "recipes.make_rankings",
    "reward_model": "recipes.reward_model_math",
    "ppo": "recipes.ppo_math",
    COMPARISON: "recipes.ppo_math",
}
TITLES: Mapping[str, str] = {
    "sft": "supervised fine-tuning",
    "rankings": "rankings of samples",
    "reward_model": "reward model",
    "ppo": "PPO on the reward model",
    COMPARISON: "PPO without pretraining text",
}

# Fields of the pipeline that may change at any time, without an effect on the results.
FREE = ("last_stage", "compare_without_ptx", "cluster.", "run.")


class StageRunner(Protocol):
    """Anything that runs one stage to its end."""

    def run(self, stage: str, *, resume: bool) -> int:
        """Run a stage, or continue it, and return the exit code of its command."""
        ...


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """How a pipeline ended."""

    code: int  # of the last stage that ran; 0: all stages are complete
    stage: str | None  # that did not complete; None: all are complete


def stage_state(
    config: RlhfRunConfig, stage: str, directory: PipelineDirectory, *, checksums: bool = True
) -> StageState:
    """Return how far a stage is; see `training_state`."""
    if stage == "rankings":
        return rankings_state(directory.rankings)
    steps = config.stage(stage).trainer.steps
    return training_state(directory.stage(stage), steps, checksums=checksums)


def run_stages(
    stages: Sequence[str],
    runner: StageRunner,
    directory: PipelineDirectory,
    *,
    state_of: Callable[[str], StageState],
    on_start: Callable[[str, StageState], None],
) -> PipelineResult:
    """Run all stages that are not complete, in their order, until one fails or is interrupted.

    Args:
        on_start: called with each stage and its state, before it runs or is passed over.
    """
    for stage in stages:
        state = state_of(stage)
        on_start(stage, state)
        if state == "complete":
            continue

        began = time.monotonic()
        code = runner.run(stage, resume=state == "begun")
        directory.add_seconds(stage, time.monotonic() - began)
        if code != 0:
            return PipelineResult(code=code, stage=stage)
    return PipelineResult(code=0, stage=None)


def results_of_earlier_stages(
    config: RlhfRunConfig, stage: str, directory: PipelineDirectory
) -> dict[str, Any]:
    """Return the fields of a stage that earlier ones decide, by their names in the stage."""
    values: dict[str, Any] = {}
    sft = str(directory.checkpoint("sft", config.sft.trainer.steps))
    if stage != "rankings":
        values["run.directory"] = str(directory.stage(stage).path)
    if stage != "sft":
        values["model.path"] = sft
    if stage == "rankings":
        values["output"] = str(directory.rankings)
    if stage == "reward_model":
        values["data.train"] = str(directory.rankings)
    if stage in ("ppo", COMPARISON):
        reward_model = str(directory.checkpoint("reward_model", config.reward_model.trainer.steps))
        values["reward.functions"] = _with_reward_model(config, reward_model)
        if config.ppo.critic.enabled and config.ppo.critic.path is None:
            values["critic.path"] = reward_model
    return values


def _with_reward_model(config: RlhfRunConfig, path: str) -> list[dict[str, Any]]:
    functions = [function.model_dump(mode="json") for function in config.ppo.reward.functions]
    for function in functions:
        if function["name"] == REWARD_FUNCTION:
            function["parameters"]["path"] = path
    return functions


def refused_changes(
    saved: Mapping[str, Any], config: RlhfRunConfig, states: Mapping[str, StageState]
) -> list[str]:
    """Return why changes of a resumed pipeline are refused, a line each.

    A stage may change as long as no later one was begun from its result; while it runs, by the
    rules of its own recipe. Shared fields may not change.

    Args:
        saved: the configuration of the pipeline so far, nested.
    """
    before, after = flat(saved), flat_values(config)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    # Of a shared field and its copies, the message names the field alone.
    copies = {copy for one in SHARED if one.field in changed for copy in one.copies}
    lines = []
    for name in sorted(changed - copies):
        if not name.startswith(FREE):
            lines += _refused_change(name, before.get(name), after.get(name), states)
    return lines


def _refused_change(
    name: str, old: Any, new: Any, states: Mapping[str, StageState]
) -> Iterator[str]:
    stage = name.split(".")[0]
    if stage not in STAGES:
        yield (
            f"{name}: {new!r}, but the pipeline was started with {old!r}, which all stages share. "
            "Leave it out, or start a new run."
        )
        return
    later = (*STAGES[STAGES.index(stage) + 1 :], COMPARISON)
    begun = next((other for other in later if states[other] != "new"), None)
    if begun is not None:
        yield (
            f"{name}: {new!r}, but stage {begun} was begun when it was {old!r}. Leave it out, or "
            "start a new run."
        )
    elif states[stage] == "complete":
        yield (
            f"{name}: {new!r}, but stage {stage} is complete with {old!r}, so it would change "
            "nothing. Leave it out, or start a new run."
        )
