"""The expected gradient of one update, through the code that trains.

Every batch that a small policy can sample is taken with its probability:

    all batches of P x G responses --CreditAssigner--> TrainBatch --PolicyWorker.update--> gradient

    expected gradient = sum over batches of probability x gradient

The policy is a table of logits that is called with packs, as a language model would be: row
(position, token before) gives the logits of the next token. Everything else is the trainer's own
code, in float64 where it keeps the precision of its inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.campaigns.enumeration_cases import FUNCTIONS, Case
from rlsys.algorithms.kl import exact_token_kl
from rlsys.config import RunConfig
from rlsys.data.batches import (
    LogprobBatch,
    Prompt,
    PromptBatch,
    RewardBatch,
    RolloutBatch,
    StopReason,
)
from rlsys.data.hidden_states import HiddenStates, JoinedStates
from rlsys.data.sequences import TokenSequences
from rlsys.driver.credit_assignment import CreditAssigner
from rlsys.run.required_inputs import required_inputs
from tests.support.enumerable_policy import ResponseSpace
from workers.training.packed_model import PackResult, PackTensors
from workers.training.policy import PolicyWorker
from workers.training.sharded_checkpoint import RankFiles

PROMPT_TOKEN = 7
DRIFT = 0.5  # of logits, in standard deviations
FAR = 30.0  # of one logit: its token's log-ratio leaves the range of the clamp
# The state of an estimator after earlier batches: an average that is unrelated to this one.
EARLIER = {
    "average": 0.3,
    "weight": 1.0,
    "averages": {"0": [0.15, 0.5], "1": [-0.2, 0.8], "2": [0.3, 0.4]},
}


@dataclass(frozen=True, kw_only=True)
class World:
    """All responses, four policies over them, and the reward of each response to each prompt."""

    space: ResponseSpace
    rollout: Tensor  # [rows, V] logits, float64
    old: Tensor
    live: Tensor
    ref: Tensor
    rewards: NDArray[np.float64]  # [P, S]
    ended: NDArray[np.bool_]  # [S] by the end token; the others are truncated

    @staticmethod
    def of(case: Case, seed: int) -> World:
        """Return the world of a case; worlds of one seed differ only in the fields of the case."""
        mixed = case.lengths == "mixed"
        space = ResponseSpace.of(2, case.max_tokens, end_token=mixed)
        draw = torch.Generator().manual_seed(seed)

        def logits(scale: float) -> Tensor:
            return space.random_logits(draw, scale)

        old, ref = logits(1.0), logits(1.0)
        moved, mismatch = logits(DRIFT), logits(DRIFT)
        live = old + moved if case.staleness in ("live_moved", "both") else old
        rollout = old + mismatch if case.staleness in ("engine_mismatch", "both") else old
        if case.staleness == "far":
            rollout = old = old.clone()
            old[0] = torch.tensor([FAR / 2, -FAR / 2], dtype=torch.float64)
            live = old.clone()
            live[0] = 0.0

        rewards = torch.randn(3, len(space.tokens), generator=draw, dtype=torch.float64).numpy()
        if case.rewards == "binary":
            rewards = (rewards > np.median(rewards)).astype(np.float64)

        ended = np.ones(len(space.tokens), dtype=np.bool_)
        if mixed:
            ended = (space.tokens.eq(0) & space.mask).any(1).numpy()
        return World(
            space=space,
            rollout=rollout,
            old=old,
            live=live,
            ref=ref,
            rewards=rewards[: case.prompts],
            ended=ended,
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return [S] tokens of each response."""
        return self.space.mask.sum(1).numpy()

    def batches(self, group: int) -> Iterator[tuple[NDArray[np.int64], float]]:
        """Yield every batch that can be sampled: ([P, G] indices of responses, probability).

        The order within a group does not matter: each multiset of responses is one group.
        """
        probabilities = self.space.probabilities(self.rollout).numpy()
        groups = []
        for drawn in itertools.combinations_with_replacement(range(len(probabilities)), group):
            counts = np.bincount(drawn)
            orders = math.factorial(group) / math.prod(map(math.factorial, counts.tolist()))
            groups.append((drawn, orders * math.prod(probabilities[list(drawn)].tolist())))

        for batch in itertools.product(groups, repeat=len(self.rewards)):
            responses = np.asarray([drawn for drawn, _ in batch])
            yield responses, math.prod(probability for _, probability in batch)


class TablePolicy(nn.Module):
    """A table of logits with the interface of `PackedCausalLM`."""

    packing = True

    def __init__(self, space: ResponseSpace, logits: Tensor) -> None:
        super().__init__()
        self.packing = True
        self.table = nn.Parameter(logits.clone())
        self.rows = torch.full((space.length, PROMPT_TOKEN + 1), -1)
        before = torch.cat(
            [torch.full((len(space.tokens), 1), PROMPT_TOKEN), space.tokens[:, :-1]], dim=1
        )
        for position in range(space.length):
            sampled = space.mask[:, position]
            for token, row in zip(
                before[sampled, position], space.rows[sampled, position], strict=True
            ):
                known = self.rows[position, token]
                assert known in (-1, row), "the row must follow from position and token before"
                self.rows[position, token] = row

    def forward(self, pack: PackTensors) -> PackResult:
        """Return log-probabilities, entropies and squared score norms of the sampled tokens."""
        position = pack.position_ids[0, pack.predict_positions]
        before = pack.token_ids[0, pack.predict_positions]
        logs = (self.table[self.rows[position, before]] / pack.temperature).log_softmax(dim=1)
        chosen = logs.gather(1, pack.targets[:, None])[:, 0]
        probabilities = logs.exp()
        with torch.no_grad():
            norms = 1 - 2 * chosen.exp() + probabilities.square().sum(1)
        exact_kl = None
        if pack.ref_hidden is not None:
            exact_kl = exact_token_kl(logs, pack.ref_hidden)
        return PackResult(
            logprobs=chosen,
            entropies=-(probabilities * logs).sum(1),
            squared_score_norms=norms,
            hidden=logs.detach(),
            exact_kl=exact_kl,
        )


class TableBackend:
    """A `ModelBackend` for a table.

    It keeps the gradient of a step and leaves the weights alone.
    """

    def __init__(self, table: TablePolicy) -> None:
        self.module: Any = table
        self.device = torch.device("cpu")
        self.gradient: Tensor | None = None

    def forward(self, pack: PackTensors) -> PackResult:
        """Run the table on a pack."""
        return self.module(pack)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient; there is one rank."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Take the gradient where it is finite, and return its norm."""
        gradient = self.module.table.grad
        norm = float(gradient.norm())
        if math.isfinite(norm):
            self.gradient = gradient.clone()
        self.module.table.grad = None
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the table."""
        yield "table", self.module.table.detach()

    def save(self, files: RankFiles) -> None:
        """Refuse: a table is never saved."""
        raise NotImplementedError

    def load(self, path: Path) -> None:
        """Refuse: a table is never saved."""
        raise NotImplementedError


class EnumeratedPolicy(PolicyWorker):
    """One rank of the policy whose model is a table."""

    def setup_table(self, world: World) -> None:
        """Set up the worker with a table in place of a language model."""
        join_alone()
        self.table = TableBackend(TablePolicy(world.space, world.live))
        self.backend = self.table
        self.shared_prefix_packing = self.config.policy.shared_prefix_packing

    def ascent(self, batch: Any, ref_hidden: JoinedStates | None) -> Tensor:
        """Return minus the gradient of the loss of one update; 0 where the update is skipped."""
        self.table.gradient = None
        self.ref_hidden = ref_hidden
        self.estimator_state = {}
        self.old_kl_coefficient = self.config.algorithm.kl_old.coefficient  # it adapts
        self.update(batch)
        gradient = self.table.gradient
        return torch.zeros_like(self.table.module.table) if gradient is None else -gradient


def join_alone() -> None:
    """Make a process group of this process alone, for the collectives of an update."""
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def expected_gradient(case: Case, config: RunConfig, world: World) -> Tensor:
    """Return [rows * V] the gradient that the pipeline ascends, in expectation over all batches.

    `config` is the user's configuration. With a policy that has moved since sampling, the update is
    one of the later ones of its batch: it gets `old_logprobs` as the driver would have computed
    them, and is then the only one.
    """
    needs = required_inputs(config)
    once = config.model_copy(
        update={"policy": config.policy.model_copy(update={"epochs": 1, "num_mini_batches": 1})}
    )
    policy = EnumeratedPolicy(once, "", 0, 1)
    torch.set_num_threads(1)
    policy.setup_table(world)

    total = torch.zeros_like(world.live)
    for drawn, probability in world.batches(case.group):
        rollouts = _rollouts(world, drawn)
        assigner = CreditAssigner(config)
        assigner.load_state({**assigner.state(), "estimator": dict(EARLIER)})
        with_norms = "squared_score_norms" in needs
        old = _logprobs(world, rollouts, drawn, world.old, with_norms=with_norms)
        ref = _logprobs(world, rollouts, drawn, world.ref)
        ref_hidden = None
        if config.algorithm.kl.coefficient and config.algorithm.kl.estimator == "exact":
            ref_hidden = _ref_hidden(world, rollouts, drawn)
            old = replace(old, exact_kl=_exact_kl(world, drawn))
        greedy = _greedy(world) if "greedy_rewards" in needs else None
        batch, _ = assigner.assign(
            rollouts,
            _rewards(world, drawn),
            [old] if "old_logprobs" in needs else [],
            [ref] if "ref_logprobs" in needs else [],
            greedy,
        )
        total += probability * policy.ascent(batch, ref_hidden)
    return total.flatten()


def _flat(world: World, drawn: NDArray[np.int64], per_response: Tensor) -> NDArray[np.float64]:
    """Lay [S, L] values of responses out as [N] of the batch's sequences, 0 at the prompts."""
    parts = []
    for index in drawn.reshape(-1):
        parts.append(np.concatenate([[0.0], per_response[index].numpy()[: world.lengths[index]]]))
    return np.concatenate(parts)


def _rollouts(world: World, drawn: NDArray[np.int64]) -> RolloutBatch:
    rows = drawn.reshape(-1)
    lengths = world.lengths[rows]
    responses = [
        world.space.tokens[row].numpy()[:length] for row, length in zip(rows, lengths, strict=True)
    ]
    prompts = tuple(
        Prompt(problem_id=str(p), token_ids=(PROMPT_TOKEN,), text="", problem="", ground_truth="")
        for p in range(len(drawn))
    )
    groups = np.arange(len(drawn), dtype=np.int64)
    rollout_logprobs: Any = _flat(world, drawn, world.space.logprobs(world.rollout))  # float64
    return RolloutBatch(
        prompts=PromptBatch(batch_id=0, prompts=prompts, group_ids=groups),
        sequences=TokenSequences.of(
            [(PROMPT_TOKEN,)] * len(rows), responses, group_ids=np.repeat(groups, drawn.shape[1])
        ),
        rollout_logprobs=rollout_logprobs,
        oldest_weight_version=np.zeros(len(rows), dtype=np.int32),
        newest_weight_version=np.zeros(len(rows), dtype=np.int32),
        stop_reasons=np.where(world.ended[rows], StopReason.END, StopReason.LENGTH).astype(np.int8),
        response_texts=("",) * len(rows),
        temperature=1.0,
    )


def _rewards(world: World, drawn: NDArray[np.int64]) -> RewardBatch:
    values = np.concatenate([world.rewards[p][drawn[p]] for p in range(len(drawn))])
    return _reward_batch(values)


def _greedy(world: World) -> RewardBatch:
    likeliest = int(world.space.probabilities(world.rollout).argmax())
    return _reward_batch(world.rewards[:, likeliest])


def _reward_batch(values: NDArray[np.float64]) -> RewardBatch:
    count = len(values)
    return RewardBatch(
        batch_id=0,
        rewards=values,  # pyright: ignore[reportArgumentType]
        accuracies=np.clip(values, 0, 1).astype(np.float32),
        components=dict(zip(FUNCTIONS, parts_of(values).T, strict=True)),  # pyright: ignore[reportArgumentType]
        reasons=("",) * count,
        extracted_answers=("",) * count,
    )


def parts_of(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [..., 2] two rewards whose sum is the reward."""
    first = (rewards > 0).astype(np.float64)
    return np.stack([first, rewards - first], axis=-1)


def _logprobs(
    world: World,
    rollouts: RolloutBatch,
    drawn: NDArray[np.int64],
    logits: Tensor,
    *,
    with_norms: bool = False,
) -> LogprobBatch:
    # Float64, where a run has float32.
    logprobs: Any = _flat(world, drawn, world.space.logprobs(logits))
    norms: Any = None
    if with_norms:
        norms = _flat(world, drawn, squared_score_norms(world.space, logits))
    return LogprobBatch(
        batch_id=0,
        rows=np.arange(len(rollouts)),
        logprobs=logprobs,
        squared_score_norms=norms,
    )


def _ref_hidden(world: World, rollouts: RolloutBatch, drawn: NDArray[np.int64]) -> JoinedStates:
    """Return the reference's hidden states: a token's row of log-probabilities."""
    rows = world.ref.log_softmax(1)[world.space.rows]
    states = torch.cat([rows[s][world.space.mask[s]] for s in drawn.reshape(-1)])
    positions = np.flatnonzero(rollouts.response_mask)
    return JoinedStates([HiddenStates.of(0, positions, states)], len(rollouts.token_ids))


def _exact_kl(world: World, drawn: NDArray[np.int64]) -> Any:
    """Return [N] the KL of `old` to the reference at each sampled token, in float64."""
    of_rows = exact_token_kl(world.old, world.ref)[world.space.rows]
    return _flat(world, drawn, torch.where(world.space.mask, of_rows, 0.0))


def squared_score_norms(space: ResponseSpace, logits: Tensor) -> Tensor:
    """Return [S, L] squared norms of each token's score with respect to its row of logits."""
    return space.scores(logits).square().sum(dim=2)
