"""Start of all actors of a run. This is the only module that imports every part of `workers/`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from rlsys.config import ModelRoleConfig, RootConfig, RunConfig
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.offline import (
    OfflineRunConfig,
    PreferenceRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from rlsys.data.batches import PromptBatch
from rlsys.data.probe import probe_sequences
from rlsys.data.prompt_stream import LoadedPrompts
from rlsys.driver.ports import (
    ConcurrentGeneration,
    EvaluationWorkers,
    ExpertIterationWorkers,
    OfflineWorkers,
    Workers,
)
from rlsys.models.loading import longest_window
from rlsys.rewards import reward_model_of, reward_model_role
from rlsys.run.model_checks import ModelDirectories
from workers.advantage_controller import AdvantageController, AdvantageControllerClient
from workers.cluster import Cluster
from workers.generation.group import GenerationGroup
from workers.generation.worker import GenerationWorker
from workers.response_filter import ResponseFilter, ResponseFilterClient
from workers.reward_worker import RewardWorker, RewardWorkerClient
from workers.supervision import ActorPool, SupervisedActor
from workers.training.critic import CriticWorker
from workers.training.expert_iteration import ExpertIterationWorker
from workers.training.offline import (
    ExampleReferenceWorker,
    OfflineWorker,
    PreferenceWorker,
    ProcessRewardModelWorker,
    RewardModelWorker,
    SupervisedWorker,
)
from workers.training.policy import PolicyWorker
from workers.training.rank_group import (
    CriticGroup,
    ExampleReferenceGroup,
    OfflineGroup,
    OwnExampleReferenceGroup,
    OwnReferenceGroup,
    PolicyGroup,
    RankGroup,
    ReferenceGroup,
    RewardModelGroup,
    ScoringGroup,
)
from workers.training.rank_worker import RankWorker
from workers.training.reference import ReferenceWorker
from workers.training.reward_scoring import scoring_worker
from workers.weight_sync.synchronizer import EngineWeightSync


def probe_tokens(
    config: RunConfig, prompts: LoadedPrompts, model_directory: Path
) -> list[NDArray[np.int32]]:
    """Return the prompts on which engine and trainer are compared after each weight sync.

    They are whole held-out prompts, or training prompts where none are held out.
    """
    longest = config.data.max_prompt_tokens + config.generation.max_tokens
    return probe_sequences(
        [prompt.token_ids for prompt in prompts.samples],
        limit=longest - 1,  # an engine always samples one more token
        window=longest_window(model_directory, trust_remote_code=config.model.trust_remote_code),
    )


def spawn_engines(cluster: Cluster, config: RunConfig, model_directory: Path) -> ActorPool:
    """Start the generation workers of a run, which are restarted when they die."""
    members = []
    for i in range(config.generation.workers):
        cluster.spawn("generation", i, GenerationWorker, config, model_directory)
        called = f"generation worker {i}"
        members.append(cluster.supervise("generation", i, kind="generation_worker", called=called))
    return ActorPool(members)


async def start_workers(
    cluster: Cluster,
    config: RunConfig,
    directories: ModelDirectories,
    probe: Sequence[NDArray[np.int32]],
    notify: Callable[[str], None],
) -> Workers:
    """Start all actors of a run, and return them when they are ready.

    `notify` is called with their notes for the user.
    """
    model = directories.policy
    policy_actors = _spawn_ranks(cluster, PolicyWorker, config, config.policy, model)
    engines = spawn_engines(cluster, config, model)
    rewards = spawn_reward_workers(cluster, config, model)
    cluster.spawn("advantage", 0, AdvantageController, config)
    reference_actors = []
    if config.algorithm.kl.coefficient > 0 and not config.is_own_reference:
        role = config.reference_role()
        reference_actors = _spawn_ranks(
            cluster, ReferenceWorker, config, role, directories.reference, shares="policy"
        )
    critic_actors = []
    if config.critic.enabled:
        role = config.critic_role()
        critic_actors = _spawn_ranks(
            cluster, CriticWorker, config, role, directories.critic, shares="policy"
        )
    scoring_actors = []
    if reward_model_of(config.reward.functions) is not None:
        assert directories.reward_model is not None, "a reward that is a model needs its directory"
        role, directory = reward_model_role(config), directories.reward_model
        scoring_actors = _spawn_ranks(
            cluster, scoring_worker(config), config, role, directory, shares="policy"
        )

    policy = PolicyGroup(policy_actors)
    generator = GenerationGroup(engines)
    reward_model = ScoringGroup(scoring_actors) if scoring_actors else None
    scorer = RewardWorkerClient(rewards, reward_model)
    controller = AdvantageControllerClient(
        cluster.supervise(
            "advantage", 0, kind="advantage_controller", called="the advantage controller"
        )
    )
    other = ReferenceGroup(reference_actors) if reference_actors else None
    critic = CriticGroup(critic_actors) if critic_actors else None
    optional = [group for group in (other, critic, reward_model) if group]

    for note in await set_up_models(cluster, [policy, *optional]):
        notify(note)
    reference = other
    if config.algorithm.kl.coefficient > 0 and config.is_own_reference:
        reference = OwnReferenceGroup(policy_actors)
    if reference and config.algorithm.kl.estimator == "exact":
        await policy.load_reference_head(
            [
                cluster.on_node(directories.reference, cluster.node_of("policy", rank))
                for rank in range(config.policy.ranks)
            ]
        )
    weights = EngineWeightSync(policy, engines, config, probe)
    return Workers(
        generator=generator,
        scorer=scorer,
        policy=policy,
        reference=reference,
        critic=critic,
        advantages=controller,
        weights=weights,
        put=ray.put,
        reporting=(generator, scorer, controller, *optional),
        concurrent=ConcurrentGeneration(slots=generator.slots(), publisher=weights),
    )


async def start_offline_workers(
    cluster: Cluster,
    config: OfflineRunConfig,
    model_directory: Path,
    reference_directory: Path,
    problems: PromptBatch | None,
    notify: Callable[[str], None],
) -> OfflineWorkers:
    """Start all actors of a run on examples, and return them when they are ready.

    Args:
        problems: held-out prompts that the evaluation answers; None: it samples nothing.
        notify: called with the actors' notes for the user.
    """
    online, kind = config.online(), OFFLINE_KINDS[type(config)]
    trained_actors = _spawn_ranks(
        cluster, kind.worker, config, config.trained, model_directory, place="policy"
    )
    role, reference_actors = config.reference_role(), []
    owns_reference = role is not None and online.is_own_reference
    if role is not None and not owns_reference:
        reference_actors = _spawn_ranks(
            cluster,
            ExampleReferenceWorker,
            config,
            role,
            reference_directory,
            shares="policy",
        )
    engines, rewards = ActorPool(()), []
    if problems is not None:
        engines = spawn_engines(cluster, online, model_directory)
        rewards = spawn_reward_workers(cluster, online)

    trained = kind.group(trained_actors)
    optional = [ExampleReferenceGroup(reference_actors)] if reference_actors else []
    for note in await set_up_models(cluster, [trained, *optional]):
        notify(note)
    reference = optional[0] if optional else None
    if owns_reference:
        reference = OwnExampleReferenceGroup(trained_actors)
    if problems is None:
        return OfflineWorkers(trained=trained, put=ray.put, reference=reference, reporting=optional)

    generator, scorer = GenerationGroup(engines), RewardWorkerClient(rewards)
    probe = probe_sequences(
        [prompt.token_ids for prompt in problems.prompts],
        limit=config.data.max_prompt_tokens + online.generation.max_tokens - 1,
        window=longest_window(model_directory, trust_remote_code=config.model.trust_remote_code),
    )
    return OfflineWorkers(
        trained=trained,
        put=ray.put,
        reference=reference,
        evaluation=EvaluationWorkers(
            generator=generator,
            scorer=scorer,
            weights=EngineWeightSync(trained, engines, online, probe),
        ),
        reporting=(generator, scorer, *optional),
    )


async def start_expert_iteration_workers(
    cluster: Cluster,
    config: ExpertIterationRunConfig,
    model_directory: Path,
    prompts: LoadedPrompts,
    notify: Callable[[str], None],
) -> ExpertIterationWorkers:
    """Start all actors of expert iteration, and return them when they are ready.

    `notify` is called with their notes for the user.
    """
    # Of these prompts some are the probe on which engine and trainer are compared.
    samples = tuple(prompts.samples)
    problems = PromptBatch(batch_id=-1, prompts=samples, group_ids=np.arange(len(samples)))
    cluster.spawn("filter", 0, ResponseFilter, config)
    workers = await start_offline_workers(
        cluster, config, model_directory, model_directory, problems, notify
    )
    assert workers.evaluation is not None, "the engines that evaluate sample for training too"
    chooser = ResponseFilterClient(
        cluster.supervise("filter", 0, kind="response_filter", called="the response filter")
    )
    return ExpertIterationWorkers(
        generator=workers.evaluation.generator,
        scorer=workers.evaluation.scorer,
        filter=chooser,
        policy=workers.trained,
        weights=workers.evaluation.weights,
        reporting=(*workers.reporting, chooser),
    )


@dataclass(frozen=True)
class OfflineKind:
    """The trained model of a kind of run on examples."""

    worker: type[OfflineWorker]
    group: type[OfflineGroup] = OfflineGroup


OFFLINE_KINDS: Mapping[type[OfflineRunConfig], OfflineKind] = {
    SupervisedRunConfig: OfflineKind(SupervisedWorker),
    PreferenceRunConfig: OfflineKind(PreferenceWorker),
    RewardModelRunConfig: OfflineKind(RewardModelWorker, RewardModelGroup),
    ExpertIterationRunConfig: OfflineKind(ExpertIterationWorker),
    ProcessRewardModelRunConfig: OfflineKind(ProcessRewardModelWorker),
}


async def set_up_models(cluster: Cluster, groups: Sequence[RankGroup]) -> list[str]:
    """Wait for all actors, set up the models of `groups`, and return notes for the user.

    Models are set up while engines start, except on GPUs that both use: an engine measures the
    memory that is free when it starts.
    """
    if any(0 < bundle.gpus < 1 for bundle in cluster.bundles):
        await cluster.wait_until_ready()

    async def set_up(group: RankGroup) -> tuple[str, ...]:
        # Without one of the ranks the others would wait for it in vain.
        await cluster.wait_until_ready(group.workers)
        return await group.setup()

    models = asyncio.gather(*(set_up(group) for group in groups))
    _, notes = await asyncio.gather(cluster.wait_until_ready(), models)
    return list(itertools.chain.from_iterable(notes))


def spawn_reward_workers(
    cluster: Cluster, config: RunConfig, model_directory: Path | None = None
) -> list[SupervisedActor]:
    """Start the actors that compute rewards, which are restarted when they die.

    See `RewardWorker` for `model_directory`.
    """
    workers = []
    for index in range(config.reward.workers):
        cluster.spawn("reward", index, RewardWorker, config, model_directory, max_concurrency=1000)
        called = f"reward worker {index}" if config.reward.workers > 1 else "the reward worker"
        workers.append(cluster.supervise("reward", index, kind="reward_worker", called=called))
    return workers


def _spawn_ranks(
    cluster: Cluster,
    worker: type[RankWorker],
    config: RootConfig,
    role: ModelRoleConfig,
    directory: Path,
    *,
    place: str | None = None,
    shares: str | None = None,
) -> list[Any]:
    """Start the ranks of one model.

    Args:
        directory: of the model, on this machine.
        place: the bundles that were reserved for them; None: those of the worker's role.
        shares: a role on whose resources they run instead.
    """
    return [
        cluster.spawn(
            place or worker.role, rank, worker, config, directory, rank, role.ranks, shares=shares
        )
        for rank in range(role.ranks)
    ]
