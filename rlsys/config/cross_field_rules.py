"""Rules about combinations of fields that can be checked from the configuration alone.

`RunConfig` is refused where a rule finds a contradiction. Checks that need plug-ins, files or the
machine follow before a run starts (`rlsys.run.preflight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.config.model_role import TrainableRoleConfig
    from rlsys.config.run import RunConfig

LONGEST_TIMEOUT_S = 86_400.0
LARGEST_MEMORY_GIB = 1e6
BACKGROUND_BACKENDS: tuple[str, ...] = ("fsdp2",)  # that copy before they write
LORA_BACKENDS: tuple[str, ...] = ("fsdp2",)  # of frozen parameters as well


def contradictions(config: RunConfig) -> list[str]:
    """Return the fields that do not fit together, a line each: field, value and remedy."""
    return [line for rule in RULES for line in rule(config)]


def _batches(config: RunConfig) -> Iterator[str]:
    policy = config.policy
    prompts = config.trainer.prompts_per_step
    workers = config.generation.workers
    samples = config.generation.samples_per_prompt

    if prompts % policy.num_mini_batches:
        yield (
            f"policy.num_mini_batches: {policy.num_mini_batches} does not divide "
            f"trainer.prompts_per_step {prompts}. The responses to a prompt stay together: choose "
            "a divisor."
        )
    if prompts * samples < policy.ranks:
        yield (
            f"policy.ranks: {policy.ranks} ranks for fewer responses per step. Raise "
            "trainer.prompts_per_step or lower policy.ranks."
        )
    if (config.reference.ranks or 0) > policy.ranks:
        yield (
            f"reference.ranks: {config.reference.ranks} is above policy.ranks {policy.ranks}, and "
            "each rank of the reference runs beside one of the policy. Lower it, or leave it null."
        )
    if workers > prompts * max(1, config.trainer.max_staleness):
        yield (
            f"generation.workers: {workers} workers share the {prompts} prompts of a step "
            "(trainer.prompts_per_step), so some would never sample. Lower it, or raise "
            "trainer.prompts_per_step."
        )


def _lengths(config: RunConfig) -> Iterator[str]:
    generation = config.generation
    longest = config.data.max_prompt_tokens + generation.max_tokens

    if generation.min_tokens > generation.max_tokens:
        yield (
            f"generation.min_tokens: {generation.min_tokens} is above generation.max_tokens "
            f"{generation.max_tokens}. Lower it."
        )
    if generation.max_model_tokens is not None and generation.max_model_tokens < longest:
        yield (
            f"generation.max_model_tokens: {generation.max_model_tokens} is less than "
            f"data.max_prompt_tokens + generation.max_tokens = {longest}. Raise it, or leave it "
            "null."
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    evaluation = config.trainer.evaluation
    too_large = [k for k in evaluation.pass_at if k > evaluation.samples_per_prompt]
    if too_large:
        yield (
            f"trainer.evaluation.pass_at: pass@{too_large[0]} needs as many samples, and "
            f"trainer.evaluation.samples_per_prompt is {evaluation.samples_per_prompt}. Raise the "
            "samples or drop that k."
        )


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizers = {"policy": config.policy.optimizer}
    if config.critic.enabled:
        optimizers["critic"] = config.critic.optimizer

    for role, optimizer in optimizers.items():
        decay = optimizer.learning_rate * optimizer.weight_decay
        if decay >= 1:
            yield (
                f"{role}.optimizer.weight_decay: {optimizer.weight_decay:g} times "
                f"{role}.optimizer.learning_rate {optimizer.learning_rate:g} is {decay:g}; at 1 or "
                "more each step erases the weights. Lower one of them."
            )


def _backend(config: RunConfig) -> Iterator[str]:
    policy = config.policy
    if policy.backend != "deepspeed":
        return

    if policy.deepspeed.offload_weights and policy.deepspeed.zero_stage != 3:
        yield (
            "policy.deepspeed.offload_weights: true needs sharded weights, and "
            f"policy.deepspeed.zero_stage is {policy.deepspeed.zero_stage}. Set the stage to 3, or "
            "leave the weights on the GPU."
        )
    if config.diagnostics.gradient:
        yield (
            "diagnostics.gradient: true differentiates a part of the model by itself, which the "
            "hooks of policy.backend 'deepspeed' do not follow. Set it to false, or use fsdp2."
        )


def _critic(config: RunConfig) -> Iterator[str]:
    critic, policy, prompts = config.critic, config.policy, config.trainer.prompts_per_step
    if not critic.enabled:
        return

    if prompts % (critic.num_mini_batches or 1):
        yield (
            f"critic.num_mini_batches: {critic.num_mini_batches} does not divide "
            f"trainer.prompts_per_step {prompts}. The responses to a prompt stay together: choose "
            "a divisor."
        )
    if (critic.ranks or 0) > policy.ranks:
        yield (
            f"critic.ranks: {critic.ranks} is above policy.ranks {policy.ranks}, and each rank of "
            "the critic runs beside one of the policy. Lower it, or leave it null."
        )
    if config.algorithm.advantage.recompute:
        yield (
            "critic.enabled: true with algorithm.advantage.recompute, where the ranks of the "
            "policy estimate the advantages and have no values. Set one of them to false."
        )
    yield from _critic_warmup(config)


def _critic_warmup(config: RunConfig) -> Iterator[str]:
    algorithm, warmup = config.algorithm, config.critic.warmup_steps
    if warmup >= config.trainer.steps:
        yield (
            f"critic.warmup_steps: {warmup} of trainer.steps {config.trainer.steps}, so the policy "
            "would never be trained. Lower it, or raise trainer.steps."
        )

    targets = {
        "algorithm.kl.target": algorithm.kl.target,
        "algorithm.entropy.target": algorithm.entropy.target,
    }
    for field, target in targets.items():
        if warmup and target is not None:
            yield (
                f"{field}: {target:g} is approached from step to step, and in "
                f"critic.warmup_steps {warmup} the policy does not move, so the coefficient would "
                "run away. Set the target to null, or warmup_steps to 0."
            )


def _ptx(config: RunConfig) -> Iterator[str]:
    ptx, policy = config.ptx, config.policy
    if not ptx.trains:
        return

    if ptx.train == "off":
        yield (
            f"ptx.coefficient: {ptx.coefficient:g} without a text to train on, since ptx.train is "
            "off. Give --ptx.train a file, a data set or synthetic, or set the coefficient to 0."
        )
    updates = policy.epochs * policy.num_mini_batches
    if ptx.examples_per_step < updates:
        yield (
            f"ptx.examples_per_step: {ptx.examples_per_step} texts for the {updates} optimizer "
            "steps of a training step (policy.epochs x policy.num_mini_batches), of which each "
            f"needs one. Set it to at least {updates}."
        )


def _rewards(config: RunConfig) -> Iterator[str]:
    reward = config.reward
    names = [function.name for function in reward.functions]

    if len(set(names)) < len(names):
        yield (
            f"reward.functions: {', '.join(names)} names a function twice. Name each once, with "
            "one weight."
        )
    if all(function.weight == 0 for function in reward.functions):
        yield (
            "reward.functions: every weight is 0, so every reward would be 0. Give one function a "
            "weight."
        )
    if reward.timeout_s > LONGEST_TIMEOUT_S:
        yield f"reward.timeout_s: {reward.timeout_s:g} is more than a day. Lower it."
    if reward.memory_gb > LARGEST_MEMORY_GIB:
        yield (
            f"reward.memory_gb: {reward.memory_gb:g} is more than a process can have. Lower it, "
            "or set it to 0 for no limit."
        )


def _kl(config: RunConfig) -> Iterator[str]:
    kl, aggregation = config.algorithm.kl, config.algorithm.aggregation

    if kl.target is not None and kl.coefficient == 0:
        yield (
            f"algorithm.kl.target: {kl.target:g} can only be reached from a coefficient above 0. "
            "Set algorithm.kl.coefficient."
        )
    if kl.coefficient == 0:
        return

    if kl.kind == "exact" and config.policy.packing is False:
        yield (
            "algorithm.kl.kind: 'exact' needs the packed forward pass, and policy.packing is "
            "false. Set it to auto, or choose another kind."
        )
    if kl.placement != "loss":
        yield from _kl_outside_the_loss(config)
    elif kl.level == "sequence" and aggregation not in ("sequence_sum", "constant"):
        yield (
            f"algorithm.aggregation: {aggregation!r} with algorithm.kl.level 'sequence' divides "
            "the KL of a response by its length, or by that of all responses. Choose sequence_sum "
            "or constant, or level token."
        )


def _kl_outside_the_loss(config: RunConfig) -> Iterator[str]:
    kl = config.algorithm.kl
    for field, value, default in (
        ("level", kl.level, "token"),
        ("importance_ratio", kl.importance_ratio, "none"),
    ):
        if value != default:
            yield (
                f"algorithm.kl.{field}: {value!r} is for the KL in the loss, and "
                f"algorithm.kl.placement is {kl.placement!r}. Set {default}, or placement loss."
            )


def _kl_to_the_old_policy(config: RunConfig) -> Iterator[str]:
    kl_old, policy = config.algorithm.kl_old, config.policy

    if kl_old.target is not None and kl_old.coefficient == 0:
        yield (
            f"algorithm.kl_old.target: {kl_old.target:g} can only be reached from a coefficient "
            "above 0. Set algorithm.kl_old.coefficient."
        )
    if kl_old.coefficient == 0:
        return

    if config.algorithm.advantage.recompute:
        yield (
            f"algorithm.kl_old.coefficient: {kl_old.coefficient:g} with "
            "algorithm.advantage.recompute compares the live policy with itself, so it does "
            "nothing. Set it to 0, or recompute to false."
        )
    elif policy.epochs * policy.num_mini_batches == 1:
        yield (
            f"algorithm.kl_old.coefficient: {kl_old.coefficient:g} does nothing in the one update "
            "per batch (policy.epochs 1, policy.num_mini_batches 1), where the live policy is the "
            "old one. Raise one of them, or set the coefficient to 0."
        )


def _recomputed_advantages(config: RunConfig) -> Iterator[str]:
    algorithm = config.algorithm
    kl, weight = algorithm.kl, algorithm.objective.weight
    if not algorithm.advantage.recompute:
        return

    if kl.importance_ratio != "none":
        yield (
            f"algorithm.kl.importance_ratio: {kl.importance_ratio!r} with "
            "algorithm.advantage.recompute compares the live policy with itself, so it corrects "
            "nothing. Set it to none, or recompute to false."
        )
    if weight != "none":
        yield (
            f"algorithm.objective.weight: {weight!r} acts on a ratio that "
            "algorithm.advantage.recompute keeps at 1. Set it to none."
        )
    if (kl.placement != "loss" and kl.coefficient > 0) or algorithm.entropy.temperature > 0:
        yield (
            "algorithm.advantage.recompute: true estimates again from outcome rewards alone. "
            "Leave it false with a KL or entropy in the reward or the advantage."
        )


def _entropy(config: RunConfig) -> Iterator[str]:
    entropy = config.algorithm.entropy
    if entropy.target is not None and entropy.temperature == 0:
        yield (
            f"algorithm.entropy.target: {entropy.target:g} can only be reached from a temperature "
            "above 0. Set algorithm.entropy.temperature."
        )


def _rollout_correction(config: RunConfig) -> Iterator[str]:
    correction = config.algorithm.rollout_correction
    low, high = correction.mask_below, correction.mask_above
    if low is not None and high is not None and low >= high:
        yield (
            f"algorithm.rollout_correction.mask_below: {low:g} is not below mask_above {high:g}. "
            "Every token would be dropped."
        )


def _asynchronous(config: RunConfig) -> Iterator[str]:
    """Refuse what asynchronous training does not support, or would compute wrongly."""
    trainer, prompts = config.trainer, config.trainer.prompts_per_step
    settings = trainer.asynchronous
    if settings.update == "interrupt":
        yield (
            "trainer.asynchronous.update: 'interrupt' is not supported: no engine reports yet "
            "which weights sampled which token of a response. Set it to drain."
        )
    if not trainer.max_staleness:
        return

    if settings.groups_per_call > prompts:
        yield (
            f"trainer.asynchronous.groups_per_call: {settings.groups_per_call} is above "
            f"trainer.prompts_per_step {prompts}; a worker gets prompts of one batch at a time. "
            "Lower it."
        )
    yield from _terms_of_the_present_policy(config)


def _terms_of_the_present_policy(config: RunConfig) -> Iterator[str]:
    """Refuse terms that are estimated from samples as if the present policy had drawn them.

    `rollout_correction` multiplies the objective, and none of these.
    """
    kl, kl_old = config.algorithm.kl, config.algorithm.kl_old
    entropy, has_kl = config.algorithm.entropy, config.algorithm.kl.coefficient > 0
    # Field, whether it is refused, its value, and the remedy.
    rows: tuple[tuple[str, bool, object, str], ...] = (
        ("critic.enabled", config.critic.enabled, True, "false"),
        ("algorithm.kl.placement", has_kl and kl.placement != "loss", kl.placement, "loss"),
        (
            "algorithm.kl.importance_ratio",
            has_kl and kl.importance_ratio != "none",
            kl.importance_ratio,
            "none, with a kind other than k1",
        ),
        ("algorithm.kl.target", kl.target is not None, kl.target, "null"),
        ("algorithm.kl_old.coefficient", kl_old.coefficient > 0, kl_old.coefficient, "0"),
        ("algorithm.entropy.temperature", entropy.temperature > 0, entropy.temperature, "0"),
    )
    for field, is_refused, value, remedy in rows:
        if is_refused:
            yield (
                f"{field}: {value!r} with {_stale(config)} would be estimated from samples of "
                "older weights as if the present policy had drawn them, which no correction "
                f"repairs. Set it to {remedy}, or trainer.max_staleness to 0."
            )


def _stale(config: RunConfig) -> str:
    return f"trainer.max_staleness {config.trainer.max_staleness}"


def _sync(config: RunConfig) -> Iterator[str]:
    sync = config.sync
    if sync.chosen_transport == "disk" and sync.directory is None:
        yield (
            "sync.directory: null, but sync.transport is 'disk'. Set it to a directory on storage "
            "that all nodes share, or choose object_store."
        )


def _trained_parameters(config: RunConfig) -> Iterator[str]:
    """Refuse adapters and frozen parameters where a backend or another option excludes them."""
    roles: dict[str, TrainableRoleConfig] = {"policy": config.policy}
    if config.critic.enabled:
        roles["critic"] = config.critic_role()

    rank, backends = config.model.lora.rank, " or ".join(LORA_BACKENDS)
    for name, role in roles.items():
        patterns = ", ".join(role.frozen)
        if role.frozen and rank:
            yield (
                f"{name}.frozen: {patterns} has no use with model.lora.rank {rank}, which freezes "
                "all weights but the adapters. Leave it empty, and choose the adapted layers with "
                "model.lora.target_modules."
            )
        if role.backend in LORA_BACKENDS:
            continue
        if rank:
            yield (
                f"model.lora.rank: {rank} is not supported by {name}.backend {role.backend!r}. "
                f"Set the backend to {backends}, or the rank to 0."
            )
        if role.frozen:
            yield (
                f"{name}.frozen: {patterns} is not supported by {name}.backend {role.backend!r}. "
                f"Set the backend to {backends}, or leave it empty."
            )
    if rank and config.diagnostics.gradient:
        yield (
            f"diagnostics.gradient: true measures the gradient of a weight that model.lora.rank "
            f"{rank} freezes. Set it to false."
        )


def _background_checkpoints(config: RunConfig) -> Iterator[str]:
    roles: dict[str, TrainableRoleConfig] = {"policy": config.policy}
    if config.critic.enabled:
        roles["critic"] = config.critic_role()

    for name, role in roles.items():
        if config.trainer.checkpoints.asynchronous and role.backend not in BACKGROUND_BACKENDS:
            yield (
                "trainer.checkpoints.asynchronous: true is not supported by "
                f"{name}.backend {role.backend!r}, which writes while it gathers. Set it to "
                f"false, or the backend to {' or '.join(BACKGROUND_BACKENDS)}."
            )


RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _batches,
    _lengths,
    _evaluation,
    _optimizer,
    _backend,
    _critic,
    _ptx,
    _rewards,
    _kl,
    _kl_to_the_old_policy,
    _recomputed_advantages,
    _entropy,
    _rollout_correction,
    _asynchronous,
    _sync,
    _trained_parameters,
    _background_checkpoints,
)
