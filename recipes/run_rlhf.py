"""The command of a pipeline: from the command line to the table over all stages.

    command line -> checks of all stages -> sft -> rankings -> reward_model -> ppo -> table, page

Each stage is a process of its own with the command of its recipe, so that it has a Ray of its own
and can be run again by hand. torch and other slow imports come after the command line was checked,
so they are inside of the functions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from recipes.run_command import exit_with_code_of
from rlsys.config import RootConfig
from rlsys.config.command_line import Invocation, dump_yaml, parse, saved_configuration
from rlsys.config.errors import Mistakes, as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.config.rlhf import (
    COMPARISON,
    GENERATED,
    REWARD_FUNCTION,
    STAGES,
    RlhfRunConfig,
    named_in_pipeline,
    rlhf_contradictions,
    section_of,
    with_shared_fields,
    with_values,
)
from rlsys.run.shown_text import shown

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

    from rlsys.config import RunConfig
    from rlsys.run.pipeline_directory import PipelineDirectory, StageState

INTERRUPTED = 130


def run_rlhf(
    recipe: Callable[[Hardware], RlhfRunConfig], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Run a pipeline as a command, and exit.

    The codes are 0 done, 2 invalid input, 130 interrupted, 1 failed.
    """
    hardware = detect_hardware()

    def run() -> int:
        invocation = parse(recipe(hardware), sys.argv[1:] if arguments is None else arguments)
        return _run(invocation, hardware)

    exit_with_code_of(run, continued="the pipeline")


def _run(invocation: Invocation[RlhfRunConfig], hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlsys.run.observers.plain_console import PlainConsole

    console = PlainConsole()
    with as_config_error():  # preparation only checks input
        prepared = _prepare(invocation, hardware, console)
    _print_checks(prepared, console)
    if invocation.dry_run:
        print(shown(f"{dump_yaml(prepared.config)}\n{_plan(prepared)}"))
        return 0
    return _run_stages(prepared, console)


@dataclass(frozen=True, kw_only=True)
class CheckedStage:
    """A stage that was checked and may start."""

    name: str
    plan: str
    remarks: tuple[str, ...]  # notices and warnings, with the names of fields in the pipeline


@dataclass(frozen=True, kw_only=True)
class PreparedPipeline:
    """A pipeline that was checked and may start."""

    config: RlhfRunConfig
    resume: bool
    directory: PipelineDirectory
    states: Mapping[str, StageState]
    checked: tuple[CheckedStage, ...]  # the stages that are not complete


def _prepare(
    invocation: Invocation[RlhfRunConfig], hardware: Hardware, console: Console
) -> PreparedPipeline:
    """Check all stages as far as can be known before the first one runs.

    Raises:
        ValueError: mistakes, a line each; `as_config_error` turns it into a ConfigError.
    """
    from rlsys.run.directory import RunDirectory
    from rlsys.run.pipeline import refused_changes, stage_state
    from rlsys.run.pipeline_directory import PipelineDirectory

    config = with_shared_fields(invocation.config, invocation.explicit)
    directory = PipelineDirectory(RunDirectory.named_by(config))
    mistakes = Mistakes()
    mistakes.attempt("run.directory", lambda: directory.run.check(resume=invocation.resume))
    mistakes.lines += rlhf_contradictions(config)
    mistakes.refuse()

    states: dict[str, StageState] = {
        stage: stage_state(config, stage, directory) for stage in (*STAGES, COMPARISON)
    }
    if invocation.resume:
        mistakes.lines += refused_changes(invocation.saved or {}, config, states)
        mistakes.refuse()

    checked = []
    for stage in config.stages:
        if states[stage] == "complete" or (stage, states[stage]) == (COMPARISON, "new"):
            continue  # the comparison has the configuration of ppo without the text
        check = _StageCheck(config, stage, states, directory, invocation.explicit)
        with console.status(f"checking {stage} ..."):
            found = mistakes.attempt(stage, lambda check=check: check.run(hardware, console))
        if found is not None:
            checked.append(found)
    lines = [line for message in mistakes.lines for line in message.splitlines()]
    mistakes.lines = list(dict.fromkeys(lines))  # several stages may find the same mistake
    mistakes.refuse()
    return PreparedPipeline(
        config=config,
        resume=invocation.resume,
        directory=directory,
        states=states,
        checked=tuple(checked),
    )


class _StageCheck:
    """The checks that the command of a stage would make, before its inputs exist.

    A checkpoint that does not exist yet is replaced by the model that the pipeline starts from,
    whose architecture and tokenizer it will have, and rankings that do not exist by generated ones.
    """

    def __init__(
        self,
        config: RlhfRunConfig,
        stage: str,
        states: Mapping[str, StageState],
        directory: PipelineDirectory,
        explicit: frozenset[str],
    ) -> None:
        self._pipeline = config
        self._stage = stage
        self._states = states
        self._directory = directory
        self._explicit = explicit

    def run(self, hardware: Hardware, console: Console) -> CheckedStage:
        """Check the stage.

        Raises:
            ValueError: mistakes, a line each, with the names of fields in the pipeline.
        """
        from rlsys.run.pipeline import results_of_earlier_stages

        config, stage = self._pipeline, self._stage
        values = results_of_earlier_stages(config, stage, self._directory)
        stand_ins = self._stand_ins()
        invocation = self._invocation(with_values(config.stage(stage), values | stand_ins))
        mistakes = Mistakes()
        if "reward.functions" in stand_ins:
            future = with_values(config.stage(stage), values)
            mistakes.attempt(stage, lambda: _check_future_rewards(future))
        check = _check_rankings if stage == "rankings" else _check_training
        checked = mistakes.attempt(stage, lambda: check(invocation, hardware, console))
        if mistakes.lines or checked is None:
            lines = [line for message in mistakes.lines for line in message.splitlines()]
            raise ValueError("\n".join(self._named(line) for line in lines))

        plan, remarks = checked
        if "data.train" in stand_ins:  # what is known of generated data is not true of rankings
            plan = _without(_without(plan, "data "), "evaluation ")
            remarks = _without(remarks, "data: ")
        if "reward.functions" in stand_ins:
            plan = [*_without(plan, "reward model "), "reward model that of the stage before"]
        if stand_ins:
            model = self._pipeline.model.path
            plan = [*plan, f"checked with {model}, since its own inputs do not exist yet"]
        return CheckedStage(
            name=stage, plan="\n".join(plan), remarks=tuple(self._named(line) for line in remarks)
        )

    def _named(self, line: str) -> str:
        return named_in_pipeline(line, self._pipeline, self._stage)

    def _stand_ins(self) -> dict[str, Any]:
        """Return the values that replace results of stages that are not complete."""
        states = self._states
        values: dict[str, Any] = {}
        if self._stage != "sft" and states["sft"] != "complete":
            values["model.path"] = self._pipeline.model.path
        if self._stage == "reward_model" and states["rankings"] != "complete":
            values["data.train"] = GENERATED
        if section_of(self._stage) == "ppo" and states["reward_model"] != "complete":
            values["reward.functions"] = self._rules()
            if self._pipeline.ppo.critic.path is None:
                values["critic.path"] = None
        return values

    def _rules(self) -> list[dict[str, Any]]:
        """Return the reward functions of PPO without the reward model."""
        functions = [
            function.model_dump(mode="json")
            for function in self._pipeline.ppo.reward.functions
            if function.name != REWARD_FUNCTION
        ]
        return [function | {"weight": 1.0} for function in functions] or [{"name": "math"}]

    def _invocation(self, config: RootConfig) -> Invocation[Any]:
        prefix = f"{section_of(self._stage)}."
        names = {n.removeprefix(prefix) for n in self._explicit if n.startswith(prefix)}
        resume, saved = self._states[self._stage] == "begun", None
        if resume:
            directory = str(self._directory.stage(self._stage).path)
            saved = saved_configuration(directory, type(config))
        return Invocation(
            config=config, dry_run=True, resume=resume, explicit=frozenset(names), saved=saved
        )


def _check_future_rewards(config: RunConfig) -> None:
    """Refuse rewards that could not be computed with the reward model of the stage before.

    Raises:
        ConfigError: mistakes, a line each.
    """
    from rlsys.run.preflight import future_reward_model_mistakes

    mistakes = Mistakes()
    mistakes.lines += future_reward_model_mistakes(config)
    mistakes.refuse()


def _without(lines: Sequence[str], start: str) -> list[str]:
    return [line for line in lines if not line.startswith(start)]


def _check_training(
    invocation: Invocation[Any], hardware: Hardware, console: Console
) -> tuple[list[str], list[str]]:
    """Check a training stage; return its plan and its remarks, in lines."""
    from recipes import run_offline, run_recipe
    from rlsys.config import RunConfig

    online = isinstance(invocation.config, RunConfig)
    prepare = run_recipe.prepare if online else run_offline.prepare
    prepared = prepare(invocation, hardware, console)
    if prepared is None:  # it only lacks its last evaluation
        return [], []
    plan = prepared.plan.removeprefix(f"{dump_yaml(prepared.config)}\n")
    warnings = [f"warning: {warning}" for warning in prepared.warnings]
    return plan.splitlines(), [*prepared.notices, *warnings]


def _check_rankings(
    invocation: Invocation[Any], hardware: Hardware, console: Console
) -> tuple[list[str], list[str]]:
    """Check the stage that makes rankings; return its plan and its remarks, in lines."""
    from recipes.make_rankings import prepare

    config, _, prompts = prepare(invocation.config, hardware)
    samples = config.generation.samples_per_prompt
    plan = f"{len(prompts.train)} problems x {samples} samples into {config.output}"
    return [plan], list(prompts.notices)


def _plan(prepared: PreparedPipeline) -> str:
    """Describe what each stage would start."""
    from rlsys.run.pipeline import MODULES, TITLES

    checked = {one.name: one for one in prepared.checked}
    parts = []
    for stage in prepared.config.stages:
        plan = "complete" if prepared.states[stage] == "complete" else "as ppo, without the text"
        if stage in checked:
            plan = checked[stage].plan
        parts.append(f"{stage}: {TITLES[stage]} ({MODULES[stage]})\n{plan}")
    return "\n\n".join(parts)


def _print_checks(prepared: PreparedPipeline, console: Console) -> None:
    for stage in prepared.checked:
        for remark in stage.remarks:
            _print(console, f"{stage.name}: {remark}")


def _print(console: Console, line: str, **style: Any) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True, **style)


class StageProcess:
    """Runner of stages as processes with the commands of their recipes."""

    def __init__(self, config: RlhfRunConfig, directory: PipelineDirectory) -> None:
        self._config = config
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, stage: str, *, resume: bool) -> int:
        """See `StageRunner`."""
        from rlsys.run.directory import write_whole
        from rlsys.run.pipeline import MODULES, results_of_earlier_stages

        values = results_of_earlier_stages(self._config, stage, self._directory)
        config = with_values(self._config.stage(stage), values)
        file = self._directory.stage_config(stage)
        write_whole(file, dump_yaml(config))
        words = [sys.executable, "-m", MODULES[stage], "--config", str(file)]
        if resume:
            words += ["--run.directory", values["run.directory"], "--resume"]

        # In a process group of its own: the terminal sends Ctrl-C to this process alone, which
        # passes it on exactly once, as it does with a signal from elsewhere.
        self._process = subprocess.Popen(words, process_group=0)
        try:
            code = self._process.wait()
        finally:
            self._process = None
        if self._stopped:
            return INTERRUPTED
        return code if code >= 0 else 1  # below 0: ended by a signal

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the stage; between two stages, stop."""
        self._stopped = True
        if self._process is None:
            raise KeyboardInterrupt
        # A stage saves after SIGINT and SIGTERM, and would end at once after SIGHUP.
        self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _run_stages(prepared: PreparedPipeline, console: Console) -> int:
    """Run the stages that are not complete, and show what all of them did."""
    from rlsys.run.observers.pipeline_console import print_pipeline
    from rlsys.run.observers.pipeline_report import write_pipeline_report
    from rlsys.run.pipeline import TITLES, run_stages
    from rlsys.run.pipeline_directory import PipelineDirectory

    config, directory = prepared.config, prepared.directory
    if not prepared.resume:
        directory = PipelineDirectory(directory.run.claim())
    directory.run.write_config(config)
    if config.run.note:
        _print(console, config.run.note)

    def on_start(stage: str, state: StageState) -> None:
        write_pipeline_report(config, directory)
        number = f"{config.stages.index(stage) + 1} of {len(config.stages)}"
        text = {"new": "", "begun": ", resumed", "complete": ", already complete"}[state]
        console.rule(f"{number}: {TITLES[stage]}{text}", align="left")

    runner = StageProcess(config, directory)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, runner.pass_on)
    result = run_stages(
        config.stages,
        runner,
        directory,
        state_of=lambda stage: prepared.states[stage],
        on_start=on_start,
    )
    write_pipeline_report(config, directory)
    console.rule(f"pipeline: {directory.path}", align="left")
    print_pipeline(console, config, directory)
    if result.stage is not None:
        what = "was interrupted" if result.code == INTERRUPTED else "did not complete"
        _print(console, f"stage {result.stage} {what}", style="yellow")
        _print(console, f"continue with --run.directory {directory.path} --resume")
    return result.code
