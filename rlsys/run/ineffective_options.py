"""Warnings about options that were set on purpose but have no effect, made from one table.

Defaults of recipes cause no warning: `Invocation.explicit` has the names that flags and files set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.algorithms.advantages import trains_auxiliary
from rlsys.algorithms.policy_objectives import ignores_ratio, is_one_at_ratio_one
from rlsys.config import RunConfig
from rlsys.config.command_line import flat
from rlsys.config.engines import ENGINE_OPTIONS, ENGINES, engines_with
from rlsys.config.hardware import Hardware
from rlsys.rewards import has_accuracy, pool_functions


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A configuration on a machine."""

    config: RunConfig
    hardware: Hardware

    @property
    def has_no_gpu(self) -> bool:
        """The run starts Ray on this machine, which has no GPU."""
        return self.starts_ray and not self.hardware.gpus

    @property
    def reads_no_file(self) -> bool:
        """All problems are generated."""
        data = self.config.data
        return data.train == "synthetic" and data.eval in ("synthetic", "auto", "off")

    @property
    def reads_no_text_file(self) -> bool:
        """No pretraining text comes from a file."""
        ptx = self.config.ptx
        return {ptx.train, ptx.eval} <= {"synthetic", "auto", "off"}

    @property
    def has_gpus(self) -> bool:
        return self.starts_ray and self.hardware.gpus > 0

    def reads(self, option: str) -> bool:
        """Return whether the engine reads this field of `generation`."""
        return option in ENGINES[self.config.generation.engine].options

    @property
    def starts_ray(self) -> bool:
        return self.config.cluster.joined_address is None


@dataclass(frozen=True, kw_only=True)
class Ineffective:
    """Options that have no effect where a condition holds."""

    options: tuple[str, ...]  # dotted names; one that ends in a dot is a whole section
    condition: Callable[[Setting], bool]
    reason: str


def _row(*options: str, when: Callable[[Setting], bool], because: str) -> Ineffective:
    return Ineffective(options=options, condition=when, reason=because)


def _ignores_ratio(setting: Setting) -> bool:
    objective = setting.config.algorithm.objective
    return ignores_ratio(objective.weight, objective.parameters)


def _ratio_is_one(setting: Setting) -> bool:
    """Return whether every ratio is 1, by a single update per batch, and the weight is 1 there."""
    config, objective = setting.config, setting.config.algorithm.objective
    if _ignores_ratio(setting):
        return False  # whoever chose such a weight does not expect it to act on the ratio
    if config.policy.epochs * config.policy.num_mini_batches > 1:
        return False
    return is_one_at_ratio_one(objective.weight, objective.parameters)


_SINGLE_UPDATE = (
    "there is one update per batch (policy.epochs x policy.num_mini_batches is 1), in which every "
    "ratio is 1"
)


def _of_some_engines(option: str) -> Ineffective:
    """Return the row of a field of `generation` that only some engines read."""
    engines = " or ".join(engines_with(option))
    end = "." if option == "engine_arguments" else ""  # a mapping
    return _row(
        f"generation.{option}{end}",
        when=lambda s: not s.reads(option),
        because=f"only the engine {engines} reads it (generation.engine)",
    )


# A row is evaluated only where one of its options was set.
TABLE: tuple[Ineffective, ...] = (
    # The objective.
    _row(
        "algorithm.objective.ratio",
        when=_ignores_ratio,
        because="the weight (algorithm.objective.weight) does not read the ratio",
    ),
    _row(
        "algorithm.objective.weight",
        "algorithm.objective.ratio",
        "algorithm.objective.parameters.",
        when=_ratio_is_one,
        because=_SINGLE_UPDATE,
    ),
    # KL and entropy.
    _row(
        "algorithm.kl.kind",
        "algorithm.kl.direction",
        "algorithm.kl.placement",
        "algorithm.kl.level",
        "algorithm.kl.importance_ratio",
        "algorithm.kl.horizon",
        "reference.path",
        "reference.ranks",
        "reference.compute_dtype",
        "reference.microbatch_tokens",
        when=lambda s: s.config.algorithm.kl.coefficient == 0,
        because="algorithm.kl.coefficient is 0",
    ),
    _row(
        "algorithm.kl.kind",
        "algorithm.kl.direction",
        when=lambda s: (
            s.config.algorithm.kl.coefficient > 0 and s.config.algorithm.kl.placement == "advantage"
        ),
        because="with algorithm.kl.placement advantage the estimator has a KL of its own",
    ),
    _row(
        "algorithm.kl.horizon",
        when=lambda s: (
            s.config.algorithm.kl.coefficient > 0 and s.config.algorithm.kl.target is None
        ),
        because="algorithm.kl.target is null, so the coefficient is fixed",
    ),
    _row(
        "algorithm.entropy.learning_rate",
        when=lambda s: s.config.algorithm.entropy.target is None,
        because="algorithm.entropy.target is null, so the temperature is fixed",
    ),
    # Corrections and estimators.
    _row(
        "algorithm.rollout_correction.cap",
        "algorithm.rollout_correction.mask_below",
        "algorithm.rollout_correction.mask_above",
        when=lambda s: s.config.algorithm.rollout_correction.level == "none",
        because="algorithm.rollout_correction.level is none",
    ),
    _row(
        "algorithm.rollout_correction.sequence_kl",
        when=lambda s: s.config.algorithm.rollout_correction.max_sequence_kl is None,
        because="algorithm.rollout_correction.max_sequence_kl is null",
    ),
    _row(
        "algorithm.advantage.auxiliary.",
        when=lambda s: (
            not trains_auxiliary(
                s.config.algorithm.advantage.name, s.config.algorithm.advantage.parameters
            )
        ),
        because="the estimator (algorithm.advantage) has no network with these parameters",
    ),
    # Asynchronous training.
    _row(
        "trainer.asynchronous.",
        when=lambda s: s.config.trainer.max_staleness == 0,
        because="trainer.max_staleness is 0, so sampling and training take turns",
    ),
    # The engines.
    *map(_of_some_engines, ENGINE_OPTIONS),
    _row(
        "generation.gpu_memory_utilization",
        when=lambda s: s.reads("gpu_memory_utilization") and s.has_no_gpu,
        because="this machine has no GPU; generation.kv_cache_gib limits the cache",
    ),
    _row(
        "generation.kv_cache_gib",
        when=lambda s: s.reads("kv_cache_gib") and s.has_gpus,
        because="it is for CPUs; on a GPU generation.gpu_memory_utilization limits the cache",
    ),
    # The weight sync.
    _row(
        "generation.probe_every",
        when=lambda s: s.config.generation.logprob_difference_tolerance == 0,
        because="generation.logprob_difference_tolerance is 0, so nothing is compared",
    ),
    _row(
        "sync.directory",
        when=lambda s: s.config.sync.chosen_transport != "disk",
        because="only the transport disk (sync.transport) writes files",
    ),
    # GPUs.
    _row(
        "policy.gpus_per_rank",
        "policy.offload_optimizer",
        "generation.gpus_per_worker",
        when=lambda s: s.has_no_gpu,
        because="this machine has no GPU",
    ),
    _row(
        "policy.threads_per_rank",
        when=lambda s: s.has_gpus and s.config.policy.gpus_per_rank > 0,
        because="the ranks compute on GPUs",
    ),
    # The policy.
    _row(
        "policy.deepspeed.",
        when=lambda s: s.config.policy.backend != "deepspeed",
        because="policy.backend is not deepspeed",
    ),
    _row(
        "policy.shared_prefix_packing",
        when=lambda s: s.config.policy.packing is False,
        because="policy.packing is false, so every sequence is computed separately",
    ),
    _row(
        "policy.shared_prefix_packing",
        when=lambda s: s.config.model.attention == "flash_attention_2",
        because="flash_attention_2 cannot share a prompt; sdpa and flex_attention can",
    ),
    _row(
        "policy.optimizer.minimum_ratio",
        when=lambda s: s.config.policy.optimizer.schedule == "constant",
        because="policy.optimizer.schedule is constant",
    ),
    _row(
        "model.lora.alpha",
        "model.lora.target_modules",
        when=lambda s: s.config.model.lora.rank == 0,
        because="model.lora.rank is 0, so there are no adapters",
    ),
    _row(
        "reference.ranks",
        "reference.compute_dtype",
        "reference.microbatch_tokens",
        when=lambda s: s.config.is_own_reference,
        because="with model.lora.rank above 0 and without reference.path the policy without its "
        "adapters is the reference",
    ),
    # The critic.
    _row(
        "critic.",
        when=lambda s: not s.config.critic.enabled,
        because="critic.enabled is false",
    ),
    _row(
        "critic.value_clip",
        when=lambda s: s.config.critic_passes() == (1, 1),
        because="there is one update of the critic per batch (critic.epochs x "
        "critic.num_mini_batches is 1), before which no value has moved",
    ),
    _row(
        "critic.optimizer.minimum_ratio",
        when=lambda s: s.config.critic.optimizer.schedule == "constant",
        because="critic.optimizer.schedule is constant",
    ),
    _row(
        "critic.offload_optimizer",
        when=lambda s: s.has_no_gpu,
        because="this machine has no GPU",
    ),
    # Pretraining text.
    _row(
        "ptx.examples_per_step",
        when=lambda s: not s.config.ptx.trains,
        because="ptx.coefficient is 0",
    ),
    _row(
        "ptx.train",
        "ptx.columns.",
        "ptx.held_out",
        "ptx.max_tokens",
        when=lambda s: not s.config.reads_text,
        because="ptx.coefficient is 0 and no evaluation measures the loss of text",
    ),
    _row(
        "ptx.train",
        when=lambda s: (
            not s.config.ptx.trains and s.config.ptx.train != "off" and s.config.ptx.eval != "auto"
        ),
        because="ptx.coefficient is 0, and ptx.eval takes no text from it",
    ),
    _row(
        "ptx.eval",
        when=lambda s: s.config.ptx.holds_out and not s.config.evaluates_text,
        because="trainer.evaluation.every is 0, so nothing is evaluated",
    ),
    _row(
        "ptx.eval_limit",
        when=lambda s: not s.config.evaluates_text,
        because="no evaluation measures the loss of text",
    ),
    _row(
        "ptx.held_out",
        when=lambda s: (
            s.config.ptx.eval not in ("auto", "synthetic") and s.config.ptx.train != "synthetic"
        ),
        because="ptx.eval is neither auto nor synthetic",
    ),
    _row(
        "ptx.columns.",
        when=lambda s: s.reads_no_text_file,
        because="neither ptx.train nor ptx.eval names a file",
    ),
    # Data.
    _row(
        "data.synthetic.",
        when=lambda s: s.config.data.train != "synthetic",
        because="data.train is not synthetic",
    ),
    _row(
        "data.columns.",
        "data.blank_rows",
        when=lambda s: s.reads_no_file,
        because="data.train is synthetic and data.eval names no file",
    ),
    _row(
        "data.held_out",
        when=lambda s: s.config.data.eval != "auto",
        because="data.eval is not auto",
    ),
    _row(
        "data.held_out",
        when=lambda s: s.config.data.train == "synthetic",
        because="data.train is synthetic, which generates its own held-out problems",
    ),
    _row(
        "data.eval_limit",
        "trainer.evaluation.samples_per_prompt",
        "trainer.evaluation.temperature",
        "trainer.evaluation.pass_at",
        when=lambda s: s.config.data.eval == "off",
        because="data.eval is off",
    ),
    _row(
        "trainer.evaluation.every",
        when=lambda s: s.config.data.eval == "off" and not s.config.ptx.holds_out,
        because="data.eval is off",
    ),
    # The loop.
    _row(
        "trainer.checkpoints.keep",
        "trainer.checkpoints.asynchronous",
        when=lambda s: s.config.trainer.checkpoints.every == 0,
        because="trainer.checkpoints.every is 0, so only the last step is saved",
    ),
    _row(
        "trainer.checkpoints.asynchronous",
        when=lambda s: s.config.trainer.checkpoints.every >= s.config.trainer.steps,
        because="trainer.checkpoints.every is not below trainer.steps, so only the last step is "
        "saved, and there is nothing to train meanwhile",
    ),
    _row(
        "trainer.evaluation.samples_per_prompt",
        "trainer.evaluation.temperature",
        "trainer.evaluation.pass_at",
        when=lambda s: s.config.trainer.evaluation.every == 0,
        because="trainer.evaluation.every is 0, so nothing is evaluated",
    ),
    _row(
        "trainer.evaluation.temperature",
        "trainer.evaluation.pass_at",
        when=lambda s: (
            s.config.trainer.evaluation.every > 0
            and s.config.trainer.evaluation.samples_per_prompt == 1
        ),
        because="trainer.evaluation.samples_per_prompt is 1, so evaluation is greedy only",
    ),
    _row(
        "diagnostics.gradient_every",
        when=lambda s: not s.config.diagnostics.gradient,
        because="diagnostics.gradient is false",
    ),
    # Rewards.
    _row(
        "reward.workers",
        "reward.processes",
        "reward.memory_gb",
        "reward.timeout_s",
        when=lambda s: not pool_functions(s.config.reward.functions),
        because="the only one of reward.functions is a model, which ranks of its own compute",
    ),
    _row(
        "trainer.evaluation.samples_per_prompt",
        "trainer.evaluation.temperature",
        "trainer.evaluation.pass_at",
        when=lambda s: not has_accuracy(s.config.reward.functions),
        because="the first of reward.functions is a model, so no response is right or wrong",
    ),
    # The cluster.
    _row(
        "cluster.object_store_gib",
        when=lambda s: not s.starts_ray,
        because="the run joins a cluster, whose object store has its size already",
    ),
    _row(
        "cluster.placement",
        when=lambda s: s.starts_ray,
        because="the run starts Ray on this machine, which is the only node",
    ),
    _row(
        "cluster.recovery_timeout_s",
        when=lambda s: s.starts_ray,
        because="the run starts Ray on this machine, which loses no node",
    ),
)

# Values that switch an option off: whoever sets them expects no effect.
OFF = (None, False, (), [])


def ineffective_options(
    config: RunConfig, explicit: Iterable[str], hardware: Hardware
) -> Iterator[str]:
    """Yield "X: 3 has no effect because ..." for each option in `explicit` without an effect.

    The configuration must have been checked.
    """
    setting = Setting(config=config, hardware=hardware)
    values = flat(config.model_dump(mode="json"))
    yield from without_effect(TABLE, setting, values, explicit)


def without_effect(
    table: Sequence[Ineffective],
    setting: Setting,
    values: dict[str, Any],
    explicit: Iterable[str],
) -> Iterator[str]:
    """Yield a line for each option in `explicit` of which a row of `table` holds.

    Args:
        values: the whole configuration by dotted name.
    """
    names = {leaf for option in explicit for leaf in _leaves(option, values)}
    for name in sorted(names):
        value = values[name]
        if value in OFF or (name == "generation.tensor_parallel" and value == 1):
            continue
        for row in table:
            if _covers(row.options, name) and row.condition(setting):
                yield f"{name}: {value} has no effect because {row.reason}."
                break


def _leaves(option: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield the option itself, or all parameters below it."""
    for name in values:
        if name == option or name.startswith(f"{option}."):
            yield name


def _covers(options: Iterable[str], name: str) -> bool:
    """Return whether a field is one of the options, or in one of their sections ("data.")."""
    return any(name == option or _is_below(name, option) for option in options)


def _is_below(name: str, section: str) -> bool:
    return section.endswith(".") and name.startswith(section)
