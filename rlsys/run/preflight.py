"""Everything that can be known to be wrong before Ray starts."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    available_advantage_estimators,
    compares_group,
    estimator_needs,
    estimator_spec,
    get_advantage_estimator,
    is_importance_corrected,
    run_estimator,
)
from rlsys.algorithms.kl import GRADIENT_KINDS, KLLossTerms, check_kl_in_reward, check_kl_loss
from rlsys.algorithms.policy_objectives import check_objective, ignores_ratio
from rlsys.config import RewardFunctionConfig, RunConfig
from rlsys.config.hardware import Hardware
from rlsys.data.prompt_stream import LoadedProblems, load_problems
from rlsys.data.prompt_templates import stop_strings, template_source
from rlsys.models import check_model_path
from rlsys.models.loading import (
    check_architecture,
    context_length,
    end_token_ids,
    load_tokenizer,
    parameter_count,
)
from rlsys.plugins import load_plugins
from rlsys.registry import check_parameters, follow_token_limit
from rlsys.rewards import (
    check_reward_function,
    get_reward_function,
    ground_truth_notices,
    with_token_limit,
)
from rlsys.run.config_checks import field_problems, field_warnings
from rlsys.run.directory import RunDirectory
from rlsys.run.required_inputs import estimator_parameters, missing_inputs

logger = logging.getLogger(__name__)

CONNECT_LIMIT_S = 3.0
LAST_PORT = 65535


class PreflightError(ValueError):
    """All problems that were found, a line each."""


def check_config(
    config: RunConfig, directory: RunDirectory, hardware: Hardware, *, resume: bool
) -> LoadedProblems:
    """Refuse what cannot work, before any process is started; returns the problems, which had to be read for it.

    Raises:
        PreflightError: every problem found.
    """
    load_plugins(config.plugins)  # the names below may be theirs
    problems: list[str] = []
    loaded: list[LoadedProblems] = []
    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        ("run.directory", lambda: directory.check(resume=resume)),
        ("model.path", lambda: check_model_path(config.model.path)),
        ("model.reference_path", lambda: _check_reference_path(config)),
        ("data.template", lambda: template_source(config.data.template)),
        ("data.train", lambda: loaded.append(load_problems(config))),
        ("algorithm.advantage", lambda: _check_estimator(config)),
        (
            "algorithm.objective",
            lambda: check_objective(
                config.algorithm.objective.ratio,
                config.algorithm.objective.weight,
                config.algorithm.objective.parameters,
            ),
        ),
        ("algorithm.kl", lambda: _check_kl(config)),
        ("cluster.address", lambda: _check_address(config)),
        *(
            (
                "reward.functions",
                lambda function=function: _check_reward(function, config.generation.max_tokens),
            )
            for function in config.reward.functions
        ),
    )
    for field, check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
        except Exception as error:  # plug-ins and readers of files may raise anything
            logger.debug("%s", field, exc_info=True)
            problems.append(f"{field}: {type(error).__name__}: {' '.join(str(error).split())}")
    problems += _contradictions(config)
    problems += field_problems(config, hardware)
    problems += _algorithm_contradictions(config)
    if config.cluster.joined_address is None:
        problems += _resource_problems(config, hardware)
    if problems:
        raise PreflightError("\n".join(problems))
    return loaded[0]


def _check_reference_path(config: RunConfig) -> None:
    reference = config.model.reference_path
    if reference is None:
        return
    try:
        check_model_path(reference)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path:", "model.reference_path:", 1)) from error


def _check_estimator(config: RunConfig) -> None:
    advantage = config.algorithm.advantage
    estimator = get_advantage_estimator(advantage.name)
    check_parameters(estimator, advantage.parameters, field="algorithm.advantage.parameters")
    parameters = estimator_parameters(config)
    limit = config.generation.max_tokens
    if parameters.get("max_tokens", limit) < limit:
        raise ValueError(
            f"algorithm.advantage.parameters.max_tokens: {parameters['max_tokens']} is below generation.max_tokens {limit}, so longer responses "
            "would have no place. Leave it null, which follows generation.max_tokens."
        )
    try:
        run_estimator(advantage.name, _example_inputs(limit), parameters)
    except ValueError:
        raise  # refuses values that its signature cannot, and says what to do
    except Exception as error:  # a plug-in may raise anything
        raise ValueError(
            f"algorithm.advantage.name: {advantage.name!r} failed on an example of two responses ({type(error).__name__}: {error}). Mend it."
        ) from error


def _example_inputs(token_limit: int) -> AdvantageInputs:
    """A group of a response of three tokens and one of two, where so many are allowed, with every input that a run can have."""
    longest = min(3, token_limit)
    lengths = torch.tensor([longest, max(1, longest - 1)])
    zeros = torch.zeros(2, longest)
    return AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0]),
        response_mask=torch.arange(longest) < lengths[:, None],
        group_ids=torch.zeros(2, dtype=torch.int64),
        rollout_logprobs=zeros,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        score_norms=zeros + 1,
        greedy_rewards=zeros[:, 0],
        token_rewards=zeros,
        values=zeros,
        step_ends=zeros > 0,
        truncated=torch.tensor([False, False]),
    )


def _check_kl(config: RunConfig) -> None:
    """Refuse a KL term whose gradient is not that of the KL that it names."""
    kl, aggregation = config.algorithm.kl, config.algorithm.aggregation
    if not kl.coefficient:
        return
    if kl.kind == "exact":
        raise ValueError(
            "algorithm.kl.kind: 'exact' sums over the vocabulary and needs the reference's logits beside the policy's, but the reference runs "
            "in actors of its own and sends log-probabilities of sampled tokens alone. Leave kind null."
        )
    if kl.placement == "loss":
        check_kl_loss(KLLossTerms(kl.estimator, kl.direction, kl.level, kl.importance_ratio))
        if kl.level == "sequence" and aggregation not in ("sequence_sum", "constant"):
            raise ValueError(
                f"algorithm.aggregation: {aggregation!r} with algorithm.kl.level 'sequence' divides the one term of a response by its length, or by that "
                "of all. Choose sequence_sum or constant, or level token."
            )
        return
    check_kl_in_reward(kl.estimator, kl.direction, kl.placement)
    for field, value, default in (
        ("level", kl.level, "token"),
        ("importance_ratio", kl.importance_ratio, "none"),
    ):
        if value != default:
            raise ValueError(
                f"algorithm.kl.{field}: {value!r} is for the KL in the loss, and algorithm.kl.placement is {kl.placement!r}. Set {default}, or "
                "placement loss."
            )


def _check_reward(function: RewardFunctionConfig, token_limit: int) -> None:
    reward = get_reward_function(function.name)
    parameters = follow_token_limit(reward, function.parameters, token_limit)
    check_reward_function(function.name, parameters)
    if parameters.get("max_tokens", 0) > token_limit:
        raise ValueError(
            f"reward.functions.parameters.max_tokens: {parameters['max_tokens']} of {function.name!r} is above generation.max_tokens "
            f"{token_limit}, which no response reaches. Leave it null, which follows generation.max_tokens."
        )


def reward_notices(config: RunConfig, problems: LoadedProblems) -> list[str]:
    """What a person should know about the ground truths of a configuration that `check_config` accepts."""
    answers = {
        "data.train": [problem.answer for problem in problems.train],
        "data.eval": [problem.answer for problem in problems.evaluation],
    }
    return ground_truth_notices(config.reward.functions, answers)


def _contradictions(config: RunConfig) -> Iterator[str]:
    trainer, generation = config.trainer, config.generation
    if trainer.prompts_per_step % config.policy.mini_batches:
        yield (
            f"policy.mini_batches: {config.policy.mini_batches} does not divide trainer.prompts_per_step {trainer.prompts_per_step}. Whole groups stay "
            "together: choose a divisor."
        )
    name, estimators = config.algorithm.advantage.name, available_advantage_estimators()
    parameters = config.algorithm.advantage.parameters
    if (
        generation.samples_per_prompt == 1
        and name in estimators
        and compares_group(name, parameters)
    ):
        others = ", ".join(other for other in estimators if not compares_group(other))
        yield (
            f"generation.samples_per_prompt: 1 gives {name!r} nothing to compare, so every advantage would be 0. Sample at "
            f"least 2, or choose another algorithm.advantage.name ({others})."
        )
    if trainer.prompts_per_step * generation.samples_per_prompt < config.policy.ranks:
        yield f"policy.ranks: {config.policy.ranks} ranks for fewer responses a step. Raise trainer.prompts_per_step or lower policy.ranks."
    names = [function.name for function in config.reward.functions]
    if len(set(names)) < len(names):
        yield f"reward.functions: {', '.join(names)} names a function twice. Name each once, with one weight."
    too_large = [k for k in trainer.evaluation.pass_at if k > trainer.evaluation.samples_per_prompt]
    if too_large:
        yield (
            f"trainer.evaluation.pass_at: pass@{too_large[0]} needs as many samples, and trainer.evaluation.samples_per_prompt is "
            f"{trainer.evaluation.samples_per_prompt}. Raise the samples or drop that k."
        )
    if generation.min_tokens > generation.max_tokens:
        yield f"generation.min_tokens: {generation.min_tokens} is above generation.max_tokens {generation.max_tokens}. Lower it."
    longest = config.data.max_prompt_tokens + generation.max_tokens
    if generation.max_model_tokens is not None and generation.max_model_tokens < longest:
        yield (
            f"generation.max_model_tokens: {generation.max_model_tokens} is less than data.max_prompt_tokens + generation.max_tokens = {longest}. Raise "
            "it, or leave it null."
        )


def _algorithm_contradictions(config: RunConfig) -> Iterator[str]:
    """Fields of the algorithm that only make sense together."""
    algorithm, kl, entropy = config.algorithm, config.algorithm.kl, config.algorithm.entropy
    known = (
        algorithm.advantage.name in available_advantage_estimators()
    )  # an unknown one is refused elsewhere
    if known:
        in_advantage = estimator_spec(algorithm.advantage.name).carries_kl
        if in_advantage and (kl.placement != "advantage" or kl.coefficient == 0):
            yield (
                f"algorithm.kl: the estimator {algorithm.advantage.name!r} carries the KL itself, but placement is {kl.placement!r} and coefficient "
                f"{kl.coefficient:g}. Set --algorithm.kl.placement advantage and a coefficient above 0."
            )
        if kl.placement == "advantage" and not in_advantage:
            yield (
                f"algorithm.kl.placement: 'advantage' needs an estimator that reads the reference, and {algorithm.advantage.name!r} does not. Choose "
                "token_kl_grpo, or the placement loss or reward."
            )
    if kl.target is not None and kl.coefficient == 0:
        yield f"algorithm.kl.target: {kl.target:g} can only be reached from a coefficient above 0. Set algorithm.kl.coefficient."
    if entropy.target is not None and entropy.temperature == 0:
        yield f"algorithm.entropy.target: {entropy.target:g} can only be reached from a temperature above 0. Set algorithm.entropy.temperature."
    yield from _ratio_contradictions(config)
    costs = (kl.placement != "loss" and kl.coefficient > 0) or entropy.temperature > 0
    needs_greedy = known and "greedy_rewards" in estimator_needs(algorithm.advantage.name)
    if algorithm.advantage.recompute and (costs or needs_greedy):
        yield (
            "algorithm.advantage.recompute: true estimates again from outcome rewards alone. Leave it false with a KL or entropy in the reward, with "
            "token_kl_grpo and with remax."
        )
    if known:
        yield from _importance_contradictions(config)
        yield from estimator_spec(algorithm.advantage.name).check(config)
        for need in sorted(missing_inputs(config)):
            yield (
                f"algorithm.advantage.name: {algorithm.advantage.name!r} needs {need}, which no part "
                "of this run computes. Choose another estimator."
            )
    low, high = algorithm.rollout_correction.mask_below, algorithm.rollout_correction.mask_above
    if low is not None and high is not None and low >= high:
        yield f"algorithm.rollout_correction.mask_below: {low:g} is not below mask_above {high:g}. Every token would be dropped."


def _importance_contradictions(config: RunConfig) -> Iterator[str]:
    """A ratio of live and rollout policy that would be taken twice, or not at all."""
    algorithm, name = config.algorithm, config.algorithm.advantage.name
    parameters = algorithm.advantage.parameters
    level = algorithm.rollout_correction.level
    if level != "none" and "rollout_logprobs" in estimator_needs(name):
        yield (
            f"algorithm.rollout_correction.level: {level!r} would take the ratio old / rollout a second time, which {name!r} has in its "
            "advantages. Set it to none."
        )
    if algorithm.advantage.recompute and not is_importance_corrected(name, parameters):
        others = ", ".join(
            e for e in available_advantage_estimators() if is_importance_corrected(e)
        )
        yield (
            f"algorithm.advantage.recompute: true takes the live policy as old, so the ratio is always 1, and neither the objective nor {name!r}"
            f"{_shown(parameters)} corrects for the policy having moved. Set it to false; it is for {others}, as whole weights of the score."
        )
    if algorithm.advantage.recompute and algorithm.objective.weight != "none":
        yield (
            f"algorithm.objective.weight: {algorithm.objective.weight!r} acts on a ratio that algorithm.advantage.recompute keeps at 1. Set it to none."
        )


def _ratio_contradictions(config: RunConfig) -> Iterator[str]:
    """Terms of the loss that compare the live policy with the old one, where there is nothing to compare."""
    algorithm, policy = config.algorithm, config.policy
    kl_old, updates = algorithm.kl_old, policy.epochs * policy.mini_batches
    if algorithm.advantage.recompute and algorithm.kl.importance_ratio != "none":
        yield (
            f"algorithm.kl.importance_ratio: {algorithm.kl.importance_ratio!r} with algorithm.advantage.recompute compares the live policy with itself, "
            "so it corrects nothing. Set it to none, or recompute to false."
        )
    if kl_old.target is not None and kl_old.coefficient == 0:
        yield (
            f"algorithm.kl_old.target: {kl_old.target:g} can only be reached from a coefficient above 0. Set algorithm.kl_old.coefficient."
        )
    if kl_old.coefficient > 0 and algorithm.advantage.recompute:
        yield (
            f"algorithm.kl_old.coefficient: {kl_old.coefficient:g} with algorithm.advantage.recompute compares the live policy with itself, so it "
            "does nothing. Set it to 0, or recompute to false."
        )
    elif kl_old.coefficient > 0 and updates == 1:
        yield (
            f"algorithm.kl_old.coefficient: {kl_old.coefficient:g} does nothing in the one update a batch (policy.epochs 1, policy.mini_batches 1), where "
            "the live policy is the old one. Raise one of them, or set the coefficient to 0."
        )


def config_warnings(config: RunConfig) -> Iterator[str]:
    """Yield what is accepted and computed as configured, but is easily not what was meant.

    For a configuration that `check_config` accepts. Shown on the console by a dry run and before a run starts; each line names field and value,
    says what happens, and gives the remedy.
    """
    yield from _objective_warnings(config)
    yield from _kl_warnings(config)
    yield from field_warnings(config)


def _objective_warnings(config: RunConfig) -> Iterator[str]:
    algorithm, policy = config.algorithm, config.policy
    weight = algorithm.objective.weight
    updates = policy.epochs * policy.mini_batches
    corrected = algorithm.advantage.recompute  # by the estimator, before each mini-batch
    if updates > 1 and not corrected and ignores_ratio(weight, algorithm.objective.parameters):
        yield (
            f"algorithm.objective.weight: {weight!r} does not correct for the policy having moved, and "
            f"{updates} updates a batch (policy.epochs {policy.epochs}, policy.mini_batches {policy.mini_batches}) "
            "make all but the first off-policy. Set both to 1, or choose a weight that uses the ratio, such as ppo_clip."
        )


def _kl_warnings(config: RunConfig) -> Iterator[str]:
    kl, policy = config.algorithm.kl, config.policy
    weighs_only = kl.estimator in GRADIENT_KINDS
    if (
        kl.coefficient > 0
        and kl.importance_ratio != "none"
        and weighs_only
        and policy.epochs * policy.mini_batches == 1
    ):
        yield (
            f"algorithm.kl.importance_ratio: {kl.importance_ratio!r} with kind {kl.estimator!r} changes nothing in the one update a batch, where live "
            "and old policy are the same. Set it to none, or raise policy.mini_batches or policy.epochs."
        )


def _resource_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """More actors than a Ray that is started on this machine could place."""
    policy, generation = config.policy, config.generation
    cpus = policy.ranks * policy.cpus_per_rank + generation.workers * generation.cpus_per_worker
    if cpus > hardware.cpus:
        yield (
            f"policy.ranks, generation.workers: {policy.ranks} ranks and {generation.workers} workers need {cpus} CPUs, this machine has "
            f"{hardware.cpus}. Lower them, or join a larger cluster with cluster.address."
        )
    gpus = (
        policy.ranks * policy.gpus_per_rank
        + generation.workers * generation.gpus_per_worker * generation.tensor_parallel
    )
    if hardware.gpus and gpus > hardware.gpus:
        yield (
            f"policy.ranks, generation.workers: they need {gpus:g} GPUs, this machine has {hardware.gpus}. Lower them, share a GPU with "
            "policy.gpus_per_rank and generation.gpus_per_worker below 1, or join a larger cluster with cluster.address."
        )


def _check_address(config: RunConfig) -> None:
    """Knock at the door of a named cluster, so that Ray does not wait half a minute to say the same less clearly."""
    address = config.cluster.joined_address
    if address is None or address == "auto":
        return
    field = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= LAST_PORT:
        raise ValueError(
            f"{field}: {address!r} is not host:port, ray://host:port, auto or local. Give the address that `ray start --head` prints."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_LIMIT_S).close()
    except (OSError, UnicodeError) as error:  # the latter where no host can be called that
        raise ValueError(
            f"{field}: nothing answers at {address!r} ({error}). Start the head node with `ray start --head`, or leave it out to start Ray here."
        ) from error


def check_model(config: RunConfig, model_directory: Path, reference_directory: Path) -> None:
    """Checks that need the files of the model and its reference.

    Raises:
        PreflightError: an architecture that cannot be trained, a model whose responses could not end, prompt and
            response do not fit the model's positions, its heads cannot be split, or the reference has other tokens.
    """
    model = _model_config(model_directory, "model.path", config.model.path)
    _check_architectures(config, model_directory, reference_directory)
    _check_heads(config, model)
    if config.model.reference_path and reference_directory != model_directory:
        path = config.model.reference_path
        reference = _model_config(reference_directory, "model.reference_path", path)
        if reference.get("vocab_size") != model.get("vocab_size"):
            raise PreflightError(
                f"model.reference_path: {path!r} has {reference.get('vocab_size')} tokens and model.path {config.model.path!r} has "
                f"{model.get('vocab_size')}, so they cannot be compared token by token. Give a model with the same tokenizer."
            )
    _check_ends(config, model_directory)
    limit = context_length(model_directory)
    longest = (
        config.generation.max_model_tokens
        or config.data.max_prompt_tokens + config.generation.max_tokens
    )
    if limit is not None and longest > limit:
        raise PreflightError(
            f"generation.max_tokens: data.max_prompt_tokens {config.data.max_prompt_tokens} + generation.max_tokens {config.generation.max_tokens} "
            f"exceed the model's {limit} positions. Lower one of them."
        )


def _check_ends(config: RunConfig, model_directory: Path) -> None:
    tokenizer = load_tokenizer(model_directory, trust_remote_code=config.model.trust_remote_code)
    stop = stop_strings(config.data.template, config.generation.stop)
    if not stop and not end_token_ids(model_directory, tokenizer):
        raise PreflightError(
            f"model.path: neither the configuration nor the tokenizer of {config.model.path!r} names an end token, so every response would be cut off at "
            "generation.max_tokens. Put eos_token_id into its generation_config.json, or set generation.stop."
        )


def _check_architectures(
    config: RunConfig, model_directory: Path, reference_directory: Path
) -> None:
    longest = config.data.max_prompt_tokens + config.generation.max_tokens
    models = {"model.path": model_directory, "model.reference_path": reference_directory}
    for field, directory in models.items():
        try:
            check_architecture(
                directory,
                field=field,
                longest=longest,
                trust_remote_code=config.model.trust_remote_code,
            )
        except ValueError as error:
            raise PreflightError(str(error)) from error


def _model_config(directory: Path, field: str, path: str) -> dict[str, Any]:
    """config.json of a model directory, or the part of it that describes the language model."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"{field}: config.json of {path!r} cannot be read ({' '.join(str(error).split())}). Save the model again."
        ) from error
    if not isinstance(config, dict):
        raise PreflightError(
            f"{field}: config.json of {path!r} holds a {type(config).__name__}, not fields. Save the model again."
        )
    return {**config, **(config.get("text_config") or {})}


def _check_heads(config: RunConfig, model: Mapping[str, Any]) -> None:
    heads, parts = model.get("num_attention_heads"), config.generation.tensor_parallel
    if config.generation.engine == "vllm" and isinstance(heads, int) and heads % parts:
        raise PreflightError(
            f"generation.tensor_parallel: {parts} does not divide the {heads} attention heads of {config.model.path!r}. Choose a divisor."
        )


def _shown(parameters: Mapping[str, object]) -> str:
    """ " (a=1, b=2)" of keyword parameters; nothing where there are none."""
    pairs = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f" ({pairs})" if pairs else ""


def describe_plan(
    config: RunConfig,
    hardware: Hardware,
    problems: LoadedProblems,
    model_directory: Path,
    directory: RunDirectory,
) -> str:
    """What a run would start, and roughly how much memory it would take. Nothing is started.

    Memory of a policy rank: (4 weights + 4 gradients + 8 Adam) bytes a parameter over the ranks, compute-dtype weights beside them where that
    is bfloat16. Of an engine: its weights and the KV cache. Activations come on top and grow with policy.microbatch_tokens.
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
        f"policy       {policy.ranks} x {policy.strategy}, {policy.cpus_per_rank} CPU"
        + (f" + {policy.gpus_per_rank:g} GPU" if on_gpu else "")
        + f" each; {rank_gib:.2f} GiB weights, gradients and Adam ({policy.compute_dtype}), and activations",
        "reference    "
        + (
            f"{policy.ranks} ranks beside the policy"
            if config.algorithm.kl.coefficient
            else "none (algorithm.kl.coefficient is 0)"
        ),
        f"rewards      {config.reward.processes} processes: {', '.join(f'{f.name}{_shown(f.parameters)}' for f in rewards)}",
        f"advantages   {config.algorithm.advantage.name}{_shown(estimator_parameters(config))}, "
        f"objective {config.algorithm.objective.ratio} x {config.algorithm.objective.weight}, "
        f"{config.algorithm.aggregation}",
        f"data         {problems.describe()}, template {config.data.template}",
        f"step         {trainer.prompts_per_step} prompts x {generation.samples_per_prompt} samples = {samples} responses of at most "
        f"{generation.max_tokens} tokens; {policy.epochs * policy.mini_batches} optimizer steps",
        f"run          {trainer.steps} steps into {directory.path}",
    ]
    return "\n".join(rows)
