"""The contract of advantage estimators: inputs, outputs, declarations and registration.

This module imports no estimator. It describes in general terms what an estimator may need of a run:
the inputs it reads, the settings it contradicts, a small network that it trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from rlsys.registry import Registry, check_values

if TYPE_CHECKING:
    from rlsys.config import RunConfig

# The optional fields of `AdvantageInputs`; each is computed only for estimators that need it.
Need = Literal[
    "token_rewards",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "squared_score_norms",
    "greedy_rewards",
    "truncated",
    "step_ends",
    "reward_components",
    "problem_ids",
]

# How a batch gets them; part of the message that one is missing.
REMEDIES: Mapping[Need, str] = {
    "token_rewards": "They come from reward functions that reward steps, and from a KL or an "
    "entropy in the reward.",
    "rollout_logprobs": "The engine must return the log-probability of each sampled token.",
    "old_logprobs": "The policy computes them before the update.",
    "ref_logprobs": "Set algorithm.kl.coefficient above 0, so that the reference runs.",
    "values": "They are those of a critic: set critic.enabled true.",
    "squared_score_norms": "The policy computes them with old_logprobs.",
    "greedy_rewards": "The driver samples and rewards one greedy response per prompt.",
    "truncated": "Give for each response whether it was cut off at the token limit.",
    "step_ends": "They come from reward functions that reward steps.",
    "reward_components": "Give the reward of each function, with reward_weights.",
    "problem_ids": "Give for each response the id of its problem in the data.",
}


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """A batch of B responses padded to T tokens.

    Arrays that an estimator does not need may be None.
    """

    rewards: Tensor  # [B] outcome reward of each response
    response_mask: Tensor  # [B, T] bool
    group_ids: Tensor  # [B] int64, equal iff two responses answer the same prompt
    token_rewards: Tensor | None = None  # [B, T] process rewards, added to the outcome
    rollout_logprobs: Tensor | None = None  # [B, T]
    old_logprobs: Tensor | None = None  # [B, T]
    ref_logprobs: Tensor | None = None  # [B, T]
    values: Tensor | None = None  # [B, T] critic
    # [B, T] proxy of ||grad log pi||^2: 1 - 2 pi(a) + sum_k pi_k^2
    squared_score_norms: Tensor | None = None
    greedy_rewards: Tensor | None = None  # [B] reward of the greedy response to the same prompt
    truncated: Tensor | None = None  # [B] bool: cut off at the token limit
    # [B, T] bool: a process reward was given here; None: where token_rewards are not 0
    step_ends: Tensor | None = None
    # [B, K] the reward of each reward function, unweighted; NaN: it failed on the response
    reward_components: Tensor | None = None
    reward_weights: Tensor | None = None  # [K] of the functions; None: 1
    # [B] the id of each response's problem, which stays the same from batch to batch
    problem_ids: Sequence[str] | None = None
    # [B, T, p] outputs of the estimator's `TokenAuxiliary`, which has not seen the batch; None:
    # there is none
    auxiliary: Tensor | None = None
    kl_coefficient: float = 0.0  # of algorithm.kl, where its placement is "advantage"
    # The state that the estimator returned for the previous batch.
    state: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_mask()
        self._check_per_response()
        self._check_per_token()

    def _check_mask(self) -> None:
        mask = self.response_mask
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"response_mask must be a [B, T] bool tensor, not {tuple(mask.shape)} {mask.dtype}"
            )

    def _check_per_response(self) -> None:
        mask = self.response_mask
        for name in ("rewards", "group_ids", "greedy_rewards", "truncated"):
            array = getattr(self, name)
            if array is not None and array.shape != mask.shape[:1]:
                raise ValueError(
                    f"{name} must have shape [{mask.shape[0]}], not {tuple(array.shape)}"
                )
        if self.problem_ids is not None and len(self.problem_ids) != mask.shape[0]:
            raise ValueError(
                f"problem_ids must have {mask.shape[0]} entries, not {len(self.problem_ids)}"
            )
        self._check_components()

    def _check_components(self) -> None:
        components, weights = self.reward_components, self.reward_weights
        responses = self.response_mask.shape[0]
        if components is None:
            return
        if components.ndim != 2 or components.shape[0] != responses:
            raise ValueError(
                f"reward_components must have shape [{responses}, K], not {tuple(components.shape)}"
            )
        if weights is not None and weights.shape != components.shape[1:]:
            raise ValueError(
                f"reward_weights must have shape [{components.shape[1]}], one for each of the "
                f"reward_components, not {tuple(weights.shape)}"
            )

    def _check_per_token(self) -> None:
        mask = self.response_mask
        for name in (
            "token_rewards",
            "rollout_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "values",
            "squared_score_norms",
            "step_ends",
        ):
            array = getattr(self, name)
            if array is not None and array.shape != mask.shape:
                raise ValueError(
                    f"{name} must have the shape of response_mask, {tuple(mask.shape)}, "
                    f"not {tuple(array.shape)}"
                )

        if self.auxiliary is not None and self.auxiliary.shape[:-1] != mask.shape:
            raise ValueError(
                f"auxiliary must have shape {[*mask.shape, 'p']}, not {tuple(self.auxiliary.shape)}"
            )


@dataclass(frozen=True, kw_only=True)
class AdvantageOutput:
    """The result of an estimator.

    Advantages are 0 outside the mask. Diagnostics go to the metrics as advantage/<name>.
    """

    advantages: Tensor  # [B, T]
    returns: Tensor | None = None  # [B, T] critic targets
    # [B, T, q] targets of the estimator's `TokenAuxiliary` at each token of this batch
    auxiliary_targets: Tensor | None = None
    # Can be saved as JSON. Comes back with the next batch, and is saved in checkpoints.
    state: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)


class TokenAuxiliary(Protocol):
    """A small network on the policy's hidden states that an estimator reads and trains.

    outputs (before the update) -> AdvantageInputs.auxiliary
    AdvantageOutput.auxiliary_targets -> accumulate (for each pack of the update) -> step

    Every rank of the policy has the whole network, with the same initial weights; before `step` the
    arrays of `sums` are added up over the ranks. h is the last hidden state at the position that
    predicts a token: it has seen the prompt and the tokens before, and carries no gradient to the
    policy.
    """

    width: int  # p, numbers for each token

    def to(self, device: torch.device) -> None:
        """Move everything to `device`; called before the first use."""
        ...

    def outputs(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Compute [m, p] from hidden states [m, d] and positions [m] in the response.

        The outputs carry no gradient.
        """
        ...

    def accumulate(self, hidden: Tensor, positions: Tensor, targets: Tensor) -> None:
        """Add the gradient of m tokens with the targets [m, q]."""
        ...

    def sums(self) -> Sequence[Tensor]:
        """Return the arrays that the ranks add up, in place, before `step`."""
        ...

    def step(self) -> Mapping[str, float]:
        """Take a step with the sums of all ranks and reset them.

        The result goes to the metrics as advantage/<name>.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` continues."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that `state_dict` returned.

        Raises:
            RuntimeError: it belongs to a network of another size.
        """
        ...


AdvantageEstimator = Callable[..., AdvantageOutput]
# What an estimator does with the rewards of steps that reward functions give.
StepRewardsUse = Literal["added", "needed", "refused"]
# A constant, or a function of the keyword parameters.
Declared = bool | Callable[[Mapping[str, Any]], bool]
# From the configuration and the width of a hidden state.
BuildAuxiliary = Callable[["RunConfig", int], TokenAuxiliary]


def _no_check(config: RunConfig) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True, kw_only=True)
class EstimatorSpec:
    """An estimator and its declarations; see `register_advantage_estimator`."""

    name: str
    function: AdvantageEstimator
    needs: frozenset[Need]
    reads: frozenset[Need] = frozenset()
    compares_group: Declared = False
    importance_corrected: Declared = False
    carries_kl: bool = False
    unbiased: Declared = False
    step_rewards: StepRewardsUse = "added"
    check: Callable[[RunConfig], Iterator[str]] = _no_check
    validate: Callable[..., None] | None = None
    auxiliary: BuildAuxiliary | None = None
    uses_auxiliary: Declared = True


_ESTIMATORS: Registry[EstimatorSpec] = Registry(
    "advantage estimator", function_of=lambda spec: spec.function
)


# A public decorator: its keywords are the declarations of `EstimatorSpec`.
def register_advantage_estimator(  # noqa: PLR0913
    name: str,
    *,
    needs: Iterable[Need] = (),
    reads: Iterable[Need] = (),
    compares_group: Declared = False,
    importance_corrected: Declared = False,
    carries_kl: bool = False,
    unbiased: Declared = False,
    step_rewards: StepRewardsUse = "added",
    check: Callable[[RunConfig], Iterator[str]] = _no_check,
    validate: Callable[..., None] | None = None,
    auxiliary: BuildAuxiliary | None = None,
    uses_auxiliary: Declared = True,
) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Register `function(inputs, *, keywords...) -> AdvantageOutput` as an estimator (decorator).

    `name` is then a value of `algorithm.advantage.name`.

    needs: the optional inputs that it requires. The driver has them computed, and a batch without
        one is refused before the estimator is called. An estimator that needs `rollout_logprobs`
        corrects for the policy having moved since sampling: a second correction
        (`algorithm.rollout_correction`) is refused.
    reads: the optional inputs that it uses where a batch has them, and does without elsewhere. A
        critic runs only for an estimator that needs or reads `values`, and that returns `returns`.
    compares_group: a response that is alone in its group gets 0, so a run that samples one response
        per prompt is refused.
    importance_corrected: the result is the whole weight of the score, with the ratio old / rollout
        in it. Only such an estimator may run again before each mini-batch
        (`algorithm.advantage.recompute`).
    carries_kl: the advantages contain the KL to the reference, with the weight `kl_coefficient`.
        Such an estimator requires `algorithm.kl.placement: advantage`, and no other may use it.
    unbiased: on samples of the policy itself, E[sum_t A_t grad log pi_t] is the gradient of the
        expected reward, process rewards included, neither scaled nor shifted. Where it is not,
        `algorithm.kl.kind: exact` is refused in the reward, since a part of its gradient is in the
        loss and would have another scale.
    step_rewards: what it does with the rewards of steps. added: they are a part of `token_rewards`,
        which it adds to the outcome. needed: they are what it is defined for, so a run in which no
        reward function gives any is refused. refused: it is defined for outcomes alone, so a run in
        which a reward function gives some is refused.
    check: called before a run starts; yields a message for every other setting that the estimator
        contradicts.
    validate: called before a run starts with all keyword parameters, defaults included; raises a
        ValueError for values that the signature cannot refuse.
    auxiliary: builds the small network that it reads and trains (`algorithm.advantage.auxiliary`),
        with the parameters for which `uses_auxiliary` holds. The policy's ranks train it, so it
        needs `algorithm.advantage.recompute`.

    `compares_group`, `importance_corrected`, `unbiased` and `uses_auxiliary` may be functions of
    the keyword parameters. A keyword called `max_tokens` is the token limit of the run: null or
    left out, it follows `generation.max_tokens`.
    """
    _ESTIMATORS.check_name(name)

    def decorator(estimator: AdvantageEstimator) -> AdvantageEstimator:
        spec = EstimatorSpec(
            name=name,
            function=estimator,
            needs=frozenset(needs),
            reads=frozenset(reads),
            compares_group=compares_group,
            importance_corrected=importance_corrected,
            carries_kl=carries_kl,
            unbiased=unbiased,
            step_rewards=step_rewards,
            check=check,
            validate=validate,
            auxiliary=auxiliary,
            uses_auxiliary=uses_auxiliary,
        )
        _ESTIMATORS.add(name, spec)
        return estimator

    return decorator


def estimator_spec(name: str) -> EstimatorSpec:
    """Return the estimator called `name` with its declarations.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _ESTIMATORS.get(name, field="algorithm.advantage.name")


def get_advantage_estimator(name: str) -> AdvantageEstimator:
    """Return the function of the estimator called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return estimator_spec(name).function


def available_advantage_estimators() -> tuple[str, ...]:
    """Return all registered names, sorted."""
    return _ESTIMATORS.names()


def estimator_needs(name: str) -> frozenset[Need]:
    """Return the optional inputs that the estimator `name` requires."""
    return estimator_spec(name).needs


def reads_values(name: str) -> bool:
    """Return whether the estimator `name` uses the values of a critic."""
    spec = estimator_spec(name)
    return "values" in spec.needs | spec.reads


def compares_group(name: str, parameters: Mapping[str, Any] | None = None) -> bool:
    """Return whether the estimator `name` gives 0 to a response that is alone in its group."""
    return _holds(estimator_spec(name).compares_group, parameters)


def is_importance_corrected(name: str, parameters: Mapping[str, Any] | None = None) -> bool:
    """Return whether the result of the estimator `name` contains the ratio old / rollout.

    It is then the whole weight of the score.
    """
    return _holds(estimator_spec(name).importance_corrected, parameters)


def is_unbiased(name: str, parameters: Mapping[str, Any] | None = None) -> bool:
    """Return whether the estimator `name` declares the gradient of the expected reward itself."""
    return _holds(estimator_spec(name).unbiased, parameters)


def trains_auxiliary(name: str, parameters: Mapping[str, Any] | None = None) -> bool:
    """Return whether the estimator `name`, with those parameters, trains an auxiliary network."""
    spec = estimator_spec(name)
    return spec.auxiliary is not None and _holds(spec.uses_auxiliary, parameters)


def carries_kl(name: str) -> bool:
    """Return whether the advantages of the estimator `name` contain the KL to the reference."""
    return estimator_spec(name).carries_kl


def check_advantage_estimator(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse keyword parameters that the estimator `name` does not take, without calling it.

    Raises:
        ValueError: names field, value and remedy.
    """
    spec = estimator_spec(name)
    field = "algorithm.advantage.parameters"
    check_values(name, spec.function, spec.validate, parameters, field=field)


def _holds(declared: Declared, parameters: Mapping[str, Any] | None) -> bool:
    if callable(declared):
        return declared(parameters or {})
    return declared


def run_estimator(
    name: str, inputs: AdvantageInputs, parameters: Mapping[str, Any]
) -> AdvantageOutput:
    """Run the estimator `name` and check its result.

    The arrays of the result are detached, and 0 outside the mask.

    Raises:
        ValueError: the batch lacks an input that the estimator needs; or the result has another
            type or shape than `AdvantageOutput` says, or values inside the mask that are not
            finite.
    """
    spec = estimator_spec(name)
    _check_needs(spec, inputs)
    output = spec.function(inputs, **parameters)

    mask = inputs.response_mask
    subject = f"algorithm.advantage.name: {name!r} returned"
    if not isinstance(output, AdvantageOutput):
        raise ValueError(
            f"{subject} {_described(output)}. Return an AdvantageOutput, with advantages of shape "
            f"{list(mask.shape)}."
        )

    advantages = _checked_array(output.advantages, mask, f"{subject} advantages")
    returns = output.returns
    if returns is not None:
        returns = _checked_array(returns, mask, f"{subject} returns")
    _check_targets(output.auxiliary_targets, mask, subject)
    _check_numbers(output, subject)
    return replace(output, advantages=advantages, returns=returns)


def _check_needs(spec: EstimatorSpec, inputs: AdvantageInputs) -> None:
    """Refuse a batch that lacks a needed input, or whose squared score norms are not finite."""
    for name in sorted(spec.needs):
        array = getattr(inputs, name)
        if array is None:
            raise ValueError(
                f"algorithm.advantage.name: {spec.name!r} needs {name}, which this batch does not "
                f"have. {REMEDIES[name]}"
            )
        # Other inputs may be infinite: the log-probability of a token of probability 0.
        if name == "squared_score_norms":
            _check_finite(array[inputs.response_mask], spec.name, name)


def _check_finite(values: Tensor, estimator: str, name: str) -> None:
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        raise ValueError(
            f"algorithm.advantage.name: {estimator!r} needs {name}, of which {broken} of "
            f"{values.numel()} are not finite. Look at the policy's weights and at the batch: "
            "no gradient computed from them would be valid."
        )


def _checked_array(array: object, mask: Tensor, subject: str) -> Tensor:
    if not isinstance(array, Tensor) or not array.is_floating_point():
        raise ValueError(
            f"{subject} as {_described(array)}. Return a floating-point tensor of shape "
            f"{list(mask.shape)} (responses, tokens)."
        )
    if array.shape != mask.shape:
        raise ValueError(
            f"{subject} of shape {list(array.shape)}. Return the shape of response_mask, "
            f"{list(mask.shape)} (responses, tokens)."
        )
    broken = int((mask & ~torch.isfinite(array)).sum())
    if broken:
        raise ValueError(
            f"{subject} of which {broken} of {int(mask.sum())} inside the response mask are not "
            "finite. Look for a division by 0, and at the rewards and log-probabilities of the "
            "batch."
        )
    return torch.where(mask, array.detach(), 0.0)


def _check_targets(targets: object, mask: Tensor, subject: str) -> None:
    if targets is None:
        return
    if not isinstance(targets, Tensor) or targets.ndim != 3 or targets.shape[:2] != mask.shape:
        raise ValueError(
            f"{subject} auxiliary_targets as {_described(targets)}. Return a tensor of shape "
            f"{[*mask.shape, 'q']} (responses, tokens, numbers for each)."
        )


def _check_numbers(output: AdvantageOutput, subject: str) -> None:
    """Refuse diagnostics that are not numbers, and a state that is not JSON."""
    if not isinstance(output.diagnostics, Mapping):
        raise ValueError(
            f"{subject} diagnostics as {_described(output.diagnostics)}. Return a mapping of names "
            "to numbers."
        )
    for key, value in output.diagnostics.items():
        if not isinstance(value, int | float):
            raise ValueError(
                f"{subject} the diagnostic {key!r} as {_described(value)}. Return a number."
            )
    try:
        json.dumps(dict(output.state))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{subject} a state that cannot be saved as JSON ({error}). Return a mapping of "
            "numbers, text and lists."
        ) from error


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    name = type(value).__name__
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    return f"{article} {name}"
