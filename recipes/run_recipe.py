"""The preparation and start of an RL run, for the command of a recipe (`run_command`).

torch, Ray and other slow imports come after the command line was checked, so they are inside of the
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from recipes.prepared_run import Prepared, Started, machines_of
from recipes.run_command import changes_of, run_command, said_complete
from rlsys.config import RootConfig, RunConfig
from rlsys.config.command_line import Invocation, dump_yaml
from rlsys.config.errors import Mistakes
from rlsys.config.hardware import Hardware

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from rlsys.data.prompt_stream import LoadedProblems, LoadedPrompts
    from rlsys.data.text_stream import LoadedTexts, SourcedTexts
    from rlsys.driver.evaluation import Evaluator, TextEvaluator
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.ports import Workers
    from rlsys.driver.sampling import Sampler
    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.compute_dtype import DtypeChoice
    from rlsys.run.directory import RunDirectory
    from rlsys.run.model_checks import ModelDirectories
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.reward_model_identity import RewardModelIdentity
    from workers.cluster import Cluster

Recipe = Callable[[Hardware], RunConfig]


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe of an RL run as a command, and exit; see `run_command`."""
    run_command(recipe, prepare, arguments)


@dataclass(frozen=True, kw_only=True)
class OnlinePrepared(Prepared[RunConfig]):
    """An RL run that was checked and may start."""

    prompts: LoadedPrompts
    texts: LoadedTexts
    models: ModelDirectories
    reward_model: RewardModelIdentity | None  # None: no reward is a model

    @property
    def online(self) -> RunConfig:
        """See `Prepared`."""
        return self.config

    @property
    def unreserved(self) -> Mapping[str, int]:
        """See `Prepared`."""
        return {"reward": self.config.reward.workers, "advantage": 1}

    def connect(self) -> Cluster:
        """See `Prepared`."""
        from workers.cluster import Cluster

        return Cluster.connect(self.config)

    async def start(
        self, cluster: Cluster, status: StatusWriter, console: Console, faults: FaultLog
    ) -> Started:
        """See `Prepared`."""
        workers = await _start_workers(self, cluster, console)
        return _assemble(self, workers, status, console, faults)


@dataclass(frozen=True, kw_only=True)
class CheckedProblems:
    """A configuration without mistakes, its data, and the checkpoint to resume from."""

    directory: RunDirectory
    problems: LoadedProblems
    texts: SourcedTexts
    store: CheckpointStore
    checkpoint: Checkpoint | None


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The data of a run as tokens."""

    prompts: LoadedPrompts
    texts: LoadedTexts


@dataclass(frozen=True, kw_only=True)
class CheckedModels:
    """The models of a run, and the precisions in which they are computed."""

    directories: ModelDirectories
    dtypes: DtypeChoice
    reward_model: RewardModelIdentity | None  # None: no reward is a model


def prepare(
    invocation: Invocation[RunConfig], hardware: Hardware, console: Console
) -> OnlinePrepared | None:
    """Check everything that can be checked before Ray starts, without changing a file.

    Returns None where a resumed run is already complete.

    Raises:
        ValueError: mistakes, a line each; `as_config_error` turns it into a ConfigError.
    """
    config = invocation.config
    checked = check_problems(config, config, hardware, resume=invocation.resume)
    evaluates = bool(checked.problems.evaluation) or bool(checked.texts.held_out)
    if said_complete(checked.checkpoint, config, console, evaluates=evaluates):
        return None

    models = choose_models(config, hardware, checked.checkpoint)
    data = _load_data(models, checked)
    return _assemble_prepared(invocation, hardware, checked, models, data)


def check_problems(
    config: RootConfig,
    online: RunConfig,
    hardware: Hardware,
    *,
    resume: bool,
    further_mistakes: Iterable[str] = (),
) -> CheckedProblems:
    """Check configuration and data, and find the checkpoint that a resume continues from.

    Args:
        config: the configuration of the run, which its checkpoints hold.
        online: the RL run with its model, engine, rewards and problems; the same for an RL run.
        further_mistakes: of kinds that an RL run cannot have, a line each.
    """
    from rlsys.data.prompt_stream import load_problems
    from rlsys.data.text_stream import source_texts
    from rlsys.rewards import reads_metadata
    from rlsys.run.checkpoints import CheckpointStore
    from rlsys.run.directory import RunDirectory
    from rlsys.run.preflight import config_mistakes
    from rlsys.run.resume import check_resumable

    directory = RunDirectory.named_by(config)

    # Mistakes in the configuration and in the data are reported together.
    mistakes = Mistakes()
    mistakes.lines += config_mistakes(online, directory, hardware, resume=resume)
    mistakes.lines += further_mistakes
    metadata = reads_metadata(online.reward.functions)
    problems = mistakes.attempt("data.train", lambda: load_problems(online, metadata=metadata))
    texts = mistakes.attempt("ptx.train", lambda: source_texts(online))
    mistakes.refuse()
    assert problems is not None, "data that cannot be read is a mistake"
    assert texts is not None, "texts that cannot be read are a mistake"

    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    checkpoint = store.latest() if resume else None
    if checkpoint:
        check_resumable(checkpoint, config)
    return CheckedProblems(
        directory=directory, problems=problems, texts=texts, store=store, checkpoint=checkpoint
    )


def choose_models(
    config: RunConfig, hardware: Hardware, checkpoint: Checkpoint | None = None
) -> CheckedModels:
    """Find and check the models, and choose their precisions for this machine."""
    from rlsys.models import resolve_model
    from rlsys.run.compute_dtype import choose_dtypes
    from rlsys.run.evaluated_model import named
    from rlsys.run.model_checks import ModelDirectories, check_model
    from rlsys.run.reward_model_identity import reward_model_identity

    policy = resolve_model(config.model.path)
    reference = config.reference.path
    critic = config.critic.path if config.critic.enabled else None
    reward_model = reward_model_identity(config, checkpoint)

    def other(field: str, path: str | None) -> Path:
        return named(field, lambda: resolve_model(path)) if path else policy

    directories = ModelDirectories(
        policy=policy,
        reference=other("reference.path", reference),
        critic=other("critic.path", critic),
        reward_model=reward_model.directory if reward_model else None,
    )
    check_model(config, directories)
    return CheckedModels(
        directories=directories,
        dtypes=choose_dtypes(config, hardware, policy, machines=machines_of(config, policy)),
        reward_model=reward_model,
    )


def load_checked_prompts(models: CheckedModels, checked: CheckedProblems) -> LoadedPrompts:
    """Tokenize the prompts, at the position of the checkpoint if there is one."""
    from rlsys.data.prompt_stream import load_prompts
    from rlsys.run.resume import prompt_state

    prompts = load_prompts(models.dtypes.config, _tokenizer(models), checked.problems)
    if checked.checkpoint:
        prompts.train.load_state(prompt_state(checked.checkpoint))  # refuses other problems
    return prompts


def _load_data(models: CheckedModels, checked: CheckedProblems) -> _Data:
    """Tokenize prompts and texts, at the position of the checkpoint if there is one."""
    from rlsys.data.text_stream import load_texts
    from rlsys.models.loading import end_token_ids
    from rlsys.run.resume import registered_states

    config, tokenizer = models.dtypes.config, _tokenizer(models)
    ends = end_token_ids(models.directories.policy, tokenizer)
    texts = load_texts(config, tokenizer, checked.texts, ends)
    if checked.checkpoint and texts.train:
        states = registered_states(checked.checkpoint, config, ("texts",))
        texts.train.load_state(states["texts"])  # refuses other texts
    return _Data(prompts=load_checked_prompts(models, checked), texts=texts)


def _tokenizer(models: CheckedModels) -> Any:
    from rlsys.models.loading import load_tokenizer

    trust = models.dtypes.config.model.trust_remote_code
    return load_tokenizer(models.directories.policy, trust_remote_code=trust)


def _assemble_prepared(
    invocation: Invocation,
    hardware: Hardware,
    checked: CheckedProblems,
    models: CheckedModels,
    data: _Data,
) -> OnlinePrepared:
    """Put the checked parts together, with the texts that the user will see."""
    from rlsys.models.loading import parameter_count
    from rlsys.run.config_warnings import config_warnings, reward_notices
    from rlsys.run.ineffective_options import ineffective_options
    from rlsys.run.plan import PlannedData, describe_plan
    from rlsys.run.step_time import describe_estimate, estimate_step

    config, problems = models.dtypes.config, checked.problems
    prompts, texts = data.prompts, data.texts
    estimate = estimate_step(
        config,
        hardware,
        parameters=parameter_count(models.directories.policy),
        prompt_tokens=prompts.train.mean_tokens,
        text_tokens=texts.train.mean_tokens if texts.train else 0.0,
        speed=models.dtypes.speed,
    )
    sources = PlannedData(problems=problems, texts=checked.texts)
    plan = describe_plan(config, hardware, sources, models.directories, checked.directory)
    notices = [
        *models.dtypes.reasons,
        describe_estimate(estimate, config),
        f"data: {problems.describe()}",
        *prompts.notices,
        *([f"text: {checked.texts.describe()}"] if config.reads_text else []),
        *texts.notices,
    ]
    if config.run.note:
        notices.insert(0, config.run.note)
    return OnlinePrepared(
        config=config,
        resume=invocation.resume,
        prompts=prompts,
        texts=texts,
        store=checked.store,
        checkpoint=checked.checkpoint,
        models=models.directories,
        reward_model=models.reward_model,
        directory=checked.directory,
        plan=f"{dump_yaml(config)}\n{plan}",
        changes=changes_of(invocation, checked.checkpoint, config),
        notices=tuple(notices),
        reasons=models.dtypes.reasons,
        speed=models.dtypes.speed,
        estimate=estimate,
        warnings=(
            *models.dtypes.warnings,
            *config_warnings(config),
            *reward_notices(config, problems),
            *ineffective_options(config, invocation.explicit, hardware),
        ),
    )


async def _start_workers(prepared: OnlinePrepared, cluster: Cluster, console: Console) -> Workers:
    """Start all actors, and print their notes for the user."""
    from recipes.wiring import probe_tokens, start_workers

    return await start_workers(
        cluster,
        prepared.config,
        prepared.models,
        probe_tokens(prepared.config, prepared.prompts, prepared.models.policy),
        notify=lambda note: console.print(note, highlight=False, markup=False),
    )


def _assemble(
    prepared: OnlinePrepared,
    workers: Workers,
    status: StatusWriter,
    console: Console,
    faults: FaultLog,
) -> Started:
    """Build the loop and its session: observers, evaluation and checkpoints."""
    from rlsys.driver.asynchronous_loop import AsynchronousLoop
    from rlsys.driver.sampling import Sampler
    from rlsys.driver.synchronous_loop import SynchronousLoop
    from rlsys.run.observers.console import Progress
    from rlsys.run.resume import REWARD_MODEL_STATE

    config = prepared.config
    progress = Progress(console, live=config.run.progress)
    sampler = Sampler(config, workers.generator, workers.scorer, notify=progress.notice)
    evaluator = _evaluator(prepared, workers, sampler)

    session = prepared.open_session(progress, status, evaluator, faults)
    if prepared.reward_model:
        session.register(REWARD_MODEL_STATE, prepared.reward_model)
    make_loop = AsynchronousLoop if config.trainer.max_staleness else SynchronousLoop
    loop = make_loop(
        config,
        workers,
        prepared.prompts.train,
        sampler,
        session,
        prepared.directory.rollouts,
        texts=prepared.texts.train,
    )
    return Started(loop=loop, session=session)


def _evaluator(
    prepared: OnlinePrepared, workers: Workers, sampler: Sampler
) -> Evaluator | TextEvaluator | None:
    """Return the evaluation of held-out problems and texts; None where there are neither."""
    from rlsys.driver.evaluation import Evaluator, TextEvaluator

    problems = None
    if len(prepared.prompts.evaluation):
        problems = Evaluator(prepared.config, prepared.prompts.evaluation, sampler)
    if prepared.texts.held_out is None:
        return problems
    return TextEvaluator(workers, prepared.texts.held_out, problems)
