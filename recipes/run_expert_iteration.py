"""The preparation and start of expert iteration, for the command of a recipe (`run_command`).

Model, engine, rewards, problems and machine are checked as for an RL run.

torch, Ray and other slow imports come after the command line was checked, so they are inside of the
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recipes.prepared_run import Prepared, Started
from recipes.run_command import changes_of, run_command, said_complete
from rlsys.config.command_line import Invocation, dump_yaml
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.hardware import Hardware

if TYPE_CHECKING:
    from rich.console import Console

    from recipes.run_recipe import CheckedModels, CheckedProblems
    from rlsys.config import RunConfig
    from rlsys.data.prompt_stream import LoadedPrompts
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.ports import ExpertIterationWorkers
    from rlsys.run.observers.run_status import StatusWriter
    from workers.cluster import Cluster

ExpertRecipe = Callable[[Hardware], ExpertIterationRunConfig]


def run_expert_iteration(recipe: ExpertRecipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe of expert iteration as a command, and exit; see `run_command`."""
    run_command(recipe, _prepare, arguments)


@dataclass(frozen=True, kw_only=True)
class ExpertIterationPrepared(Prepared[ExpertIterationRunConfig]):
    """A run that was checked and may start."""

    prompts: LoadedPrompts
    model_directory: Path

    @property
    def online(self) -> RunConfig:
        """See `Prepared`."""
        return self.config.online()

    @property
    def unreserved(self) -> Mapping[str, int]:
        """See `Prepared`."""
        return {"reward": self.online.reward.workers, "filter": 1}

    def connect(self) -> Cluster:
        """See `Prepared`."""
        from workers.cluster import Cluster

        return Cluster.connect(self.online)

    async def start(
        self, cluster: Cluster, status: StatusWriter, console: Console, faults: FaultLog
    ) -> Started:
        """See `Prepared`."""
        from recipes.wiring import start_expert_iteration_workers

        workers = await start_expert_iteration_workers(
            cluster,
            self.config,
            self.model_directory,
            self.prompts,
            notify=lambda note: console.print(note, highlight=False, markup=False),
        )
        return _assemble(self, workers, status, console, faults)


def _assemble(
    prepared: ExpertIterationPrepared,
    workers: ExpertIterationWorkers,
    status: StatusWriter,
    console: Console,
    faults: FaultLog,
) -> Started:
    """Build the loop and its session: observers, evaluation and checkpoints."""
    from rlsys.driver.evaluation import Evaluator
    from rlsys.driver.expert_iteration import ExpertIterationLoop
    from rlsys.driver.sampling import Sampler
    from rlsys.run.observers.console import Progress

    config, prompts, directory = prepared.config, prepared.prompts, prepared.directory
    online = prepared.online
    progress = Progress(console, live=config.run.progress)
    sampler = Sampler(online, workers.generator, workers.scorer, notify=progress.notice)
    evaluator = None
    if len(prompts.evaluation):
        evaluator = Evaluator(online, prompts.evaluation, sampler)

    session = prepared.open_session(progress, status, evaluator, faults)
    loop = ExpertIterationLoop(config, workers, prompts.train, sampler, session, directory.rollouts)
    return Started(loop=loop, session=session)


def _prepare(
    invocation: Invocation[ExpertIterationRunConfig], hardware: Hardware, console: Console
) -> ExpertIterationPrepared | None:
    """Check everything that can be checked before Ray starts, without changing a file.

    Returns None where a resumed run is already complete.

    Raises:
        ValueError: mistakes, a line each.
    """
    from recipes.run_recipe import check_problems, choose_models, load_checked_prompts
    from rlsys.run.expert_iteration_checks import expert_mistakes

    config = invocation.config
    checked = check_problems(
        config,
        config.online(),
        hardware,
        resume=invocation.resume,
        further_mistakes=expert_mistakes(config),
    )
    evaluates = bool(checked.problems.evaluation)
    if said_complete(checked.checkpoint, config, console, evaluates=evaluates):
        return None

    models = choose_models(config.online(), hardware)
    prompts = load_checked_prompts(models, checked)
    return _assemble_prepared(invocation, hardware, checked, models, prompts)


def _assemble_prepared(
    invocation: Invocation[ExpertIterationRunConfig],
    hardware: Hardware,
    checked: CheckedProblems,
    models: CheckedModels,
    prompts: LoadedPrompts,
) -> ExpertIterationPrepared:
    """Put the checked parts together, with the texts that the user will see."""
    from rlsys.run.config_warnings import config_warnings, reward_notices
    from rlsys.run.expert_iteration_checks import (
        describe_expert_plan,
        estimate_expert_step,
        with_dtypes,
    )
    from rlsys.run.ineffective_options import ineffective_options
    from rlsys.run.plan import PlannedData
    from rlsys.run.step_time import describe_estimate

    config = with_dtypes(invocation.config, models.dtypes)
    online, problems = config.online(), checked.problems
    estimate = estimate_expert_step(
        config, hardware, models.directories, prompts.train.mean_tokens, models.dtypes.speed
    )
    sources = PlannedData(problems=problems, texts=checked.texts)
    plan = describe_expert_plan(config, hardware, sources, models.directories, checked.directory)
    notices = [
        *([config.run.note] if config.run.note else []),
        *models.dtypes.reasons,
        describe_estimate(estimate, config),
        f"data: {problems.describe()}",
        *prompts.notices,
    ]
    return ExpertIterationPrepared(
        config=config,
        resume=invocation.resume,
        prompts=prompts,
        store=checked.store,
        checkpoint=checked.checkpoint,
        model_directory=models.directories.policy,
        directory=checked.directory,
        plan=f"{dump_yaml(config)}\n{plan}",
        changes=changes_of(invocation, checked.checkpoint, config),
        notices=tuple(notices),
        reasons=models.dtypes.reasons,
        speed=models.dtypes.speed,
        estimate=estimate,
        warnings=(
            *models.dtypes.warnings,
            *config_warnings(online),
            *reward_notices(online, problems),
            *ineffective_options(online, invocation.explicit, hardware),
        ),
    )
