"""The preparation and start of a run on examples, for the command of a recipe (`run_command`).

torch, Ray and other slow imports come after the command line was checked, so they are inside of the
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recipes.prepared_run import Prepared, Started, machines_of
from recipes.run_command import changes_of, run_command, said_complete
from rlsys.config import RunConfig
from rlsys.config.command_line import Invocation, dump_yaml
from rlsys.config.errors import Mistakes
from rlsys.config.hardware import Hardware
from rlsys.config.offline import OfflineRunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.data.example_stream import LoadedExamples, SourcedExamples
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.ports import OfflineWorkers
    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.directory import RunDirectory
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.offline_checks import OfflineDtypes
    from workers.cluster import Cluster

OfflineRecipe = Callable[[Hardware], OfflineRunConfig]


def run_offline(recipe: OfflineRecipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe of a run on examples as a command, and exit; see `run_command`."""
    run_command(recipe, prepare, arguments)


@dataclass(frozen=True, kw_only=True)
class OfflinePrepared(Prepared[OfflineRunConfig]):
    """A run on examples that was checked and may start."""

    examples: LoadedExamples
    model_directory: Path
    reference_directory: Path

    @property
    def online(self) -> RunConfig:
        """See `Prepared`."""
        return self.config.online()

    @property
    def samples(self) -> bool:
        """Whether the evaluation samples."""
        evaluates = self.config.trainer.evaluation.every > 0
        return evaluates and len(self.examples.problems) > 0

    @property
    def unreserved(self) -> Mapping[str, int]:
        """See `Prepared`."""
        return {"reward": self.online.reward.workers} if self.samples else {}

    def connect(self) -> Cluster:
        """See `Prepared`."""
        from workers.cluster import Cluster

        roles = ("policy", "generation") if self.samples else ("policy",)
        return Cluster.connect(self.online, roles)

    async def start(
        self, cluster: Cluster, status: StatusWriter, console: Console, faults: FaultLog
    ) -> Started:
        """See `Prepared`."""
        from recipes.wiring import start_offline_workers

        workers = await start_offline_workers(
            cluster,
            self.config,
            self.model_directory,
            self.reference_directory,
            self.examples.problems if self.samples else None,
            notify=lambda note: console.print(note, highlight=False, markup=False),
        )
        return _assemble(self, workers, status, console, faults)


def _assemble(
    prepared: OfflinePrepared,
    workers: OfflineWorkers,
    status: StatusWriter,
    console: Console,
    faults: FaultLog,
) -> Started:
    """Build the loop and its session: observers, evaluation and checkpoints."""
    from rlsys.driver.evaluation import Evaluator
    from rlsys.driver.offline_loop import OfflineEvaluator, OfflineLoop
    from rlsys.driver.sampling import Sampler
    from rlsys.run.observers.console import Progress

    online = prepared.online
    progress = Progress(console, live=prepared.config.run.progress)
    answers = None
    if workers.evaluation is not None:
        generator, scorer = workers.evaluation.generator, workers.evaluation.scorer
        sampler = Sampler(online, generator, scorer, notify=progress.notice)
        answers = Evaluator(online, prepared.examples.problems, sampler)
    evaluator = None
    if prepared.examples.held_out is not None:
        evaluator = OfflineEvaluator(workers, prepared.examples.held_out, answers)

    session = prepared.open_session(progress, status, evaluator, faults)
    loop = OfflineLoop(workers, prepared.examples.train, session)
    return Started(loop=loop, session=session)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A configuration without mistakes, its examples, and the checkpoint to resume from."""

    directory: RunDirectory
    examples: SourcedExamples
    store: CheckpointStore
    checkpoint: Checkpoint | None


def prepare(
    invocation: Invocation[OfflineRunConfig], hardware: Hardware, console: Console
) -> OfflinePrepared | None:
    """Check everything that can be checked before Ray starts, without changing a file.

    Returns None where a resumed run is already complete.

    Raises:
        ValueError: mistakes, a line each.
    """
    from rlsys.models import resolve_model
    from rlsys.run.offline_checks import check_offline_model, choose_offline_dtypes

    config = invocation.config
    checked = _check(invocation, hardware)
    evaluates = bool(checked.examples.held_out)
    if said_complete(checked.checkpoint, config, console, evaluates=evaluates):
        return None

    directory = resolve_model(config.model.path)
    reference = getattr(config, "reference", None)
    reference_directory = directory
    if reference is not None and reference.path:
        reference_directory = resolve_model(reference.path)
    check_offline_model(config, directory, reference_directory)
    machines = machines_of(config.online(), directory)
    dtypes = choose_offline_dtypes(config, hardware, directory, machines)
    loaded = _load(dtypes.config, directory, checked)
    return _assemble_prepared(
        invocation, hardware, checked, (directory, reference_directory), dtypes, loaded
    )


def _check(invocation: Invocation[OfflineRunConfig], hardware: Hardware) -> _Checked:
    """Check configuration and data, and find the checkpoint that a resume continues from."""
    from rlsys.data.example_stream import source_examples
    from rlsys.run.checkpoints import CheckpointStore
    from rlsys.run.directory import RunDirectory
    from rlsys.run.offline_checks import offline_mistakes
    from rlsys.run.resume import check_resumable

    config = invocation.config
    directory = RunDirectory.named_by(config)

    # Mistakes in the configuration and in the data are reported together.
    mistakes = Mistakes()
    mistakes.lines += offline_mistakes(config, directory, hardware, resume=invocation.resume)
    examples = mistakes.attempt("data.train", lambda: source_examples(config))
    mistakes.refuse()
    assert examples is not None, "data that cannot be read is a mistake"

    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    checkpoint = store.latest() if invocation.resume else None
    if checkpoint:
        check_resumable(checkpoint, config)
    return _Checked(directory=directory, examples=examples, store=store, checkpoint=checkpoint)


def _load(config: OfflineRunConfig, directory: Path, checked: _Checked) -> LoadedExamples:
    """Tokenize the examples, at the position of the checkpoint if there is one."""
    from rlsys.data.example_stream import load_examples
    from rlsys.models.loading import end_token_ids, load_tokenizer
    from rlsys.run.resume import registered_states

    tokenizer = load_tokenizer(directory, trust_remote_code=config.model.trust_remote_code)
    ends = end_token_ids(directory, tokenizer)
    loaded = load_examples(config, tokenizer, checked.examples, ends)
    if checked.checkpoint:  # refuses other examples
        states = registered_states(checked.checkpoint, config, ("examples",))
        loaded.train.load_state(states["examples"])
    return loaded


def _assemble_prepared(
    invocation: Invocation[OfflineRunConfig],
    hardware: Hardware,
    checked: _Checked,
    directories: tuple[Path, Path],
    dtypes: OfflineDtypes,
    loaded: LoadedExamples,
) -> OfflinePrepared:
    """Put the checked parts together, with the texts that the user will see."""
    from rlsys.models.loading import parameter_count
    from rlsys.run.offline_checks import (
        describe_offline_plan,
        estimate_offline_step,
        offline_notices,
        offline_warnings,
    )
    from rlsys.run.step_time import describe_estimate

    config, examples = dtypes.config, checked.examples
    model_directory, reference_directory = directories
    estimate = estimate_offline_step(
        config,
        hardware,
        parameters=parameter_count(model_directory),
        example_tokens=loaded.train.mean_tokens,
        speed=dtypes.speed,
    )
    plan = describe_offline_plan(config, hardware, examples, model_directory, checked.directory)
    notices = [
        *([config.run.note] if config.run.note else []),
        *dtypes.reasons,
        describe_estimate(estimate, config),
        f"data: {examples.describe()}",
        *offline_notices(config, loaded),
    ]
    return OfflinePrepared(
        config=config,
        resume=invocation.resume,
        examples=loaded,
        store=checked.store,
        checkpoint=checked.checkpoint,
        model_directory=model_directory,
        reference_directory=reference_directory,
        directory=checked.directory,
        plan=f"{dump_yaml(config)}\n{plan}",
        changes=changes_of(invocation, checked.checkpoint, config),
        notices=tuple(notices),
        reasons=dtypes.reasons,
        speed=dtypes.speed,
        estimate=estimate,
        warnings=(
            *dtypes.warnings,
            *offline_warnings(config, invocation.explicit, hardware, loaded),
        ),
    )
