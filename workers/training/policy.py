"""The policy: log-probabilities, updates, weights for the engines, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rlsys.algorithms.kl import adapted_penalty, old_policy_kl
from rlsys.algorithms.policy_objectives import (
    BatchTokens,
    batch_parameters_of,
    chooses_tokens,
)
from rlsys.config import RunConfig
from rlsys.data.batches import RolloutBatch, ScoredBatch, TrainBatch
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.hidden_states import JoinedStates
from rlsys.data.packing import Pack, mini_batch_rows
from rlsys.driver.credit_assignment import LiveLogprobs, recomputed
from rlsys.metrics import Metric, combine, mean
from rlsys.models.loading import UnsupportedModelError, load_causal_lm
from rlsys.run.required_inputs import required_inputs
from workers.training.auxiliary import FILE as AUXILIARY_FILE
from workers.training.auxiliary import AuxiliaryLearner
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.gradient_diagnostics import check_diagnosable, gradient_metrics
from workers.training.lm_head import check_packed_for_exact_kl, lm_head_of
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.model_setup import DTYPES, load_on_ranks, prepare_model
from workers.training.optimizer_steps import OptimizerSteps
from workers.training.policy_loss import PolicyLoss, joined_tokens, pack_tokens
from workers.training.pretraining_text import (
    TextLoss,
    TextPart,
    held_out_metrics,
    text_metrics,
    text_parts,
)
from workers.training.reference import OwnReferenceWorker
from workers.training.sampled_from import SampledFromWorker
from workers.training.saved_state import load_state, save_state
from workers.training.sharded_checkpoint import RankFiles
from workers.training.sharded_loading import gather
from workers.training.trained_worker import SavedWorker
from workers.training.update_metrics import loss_metrics


class PolicyWorker(SavedWorker, SampledFromWorker, OwnReferenceWorker):
    """One rank of the policy."""

    role = "policy"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        super().__init__(config, config.policy, model_directory, rank, world_size)
        self.returns_squared_score_norms = "squared_score_norms" in required_inputs(config)
        self.steps = OptimizerSteps("policy", config.policy.optimizer, config.policy_steps)
        # [N] advantages that the last update estimated; None if it did not.
        self.estimated: NDArray[np.float32] | None = None
        self.old_kl_coefficient = config.algorithm.kl_old.coefficient
        # Kept from one mini-batch to the next where `algorithm.advantage.recompute` is true.
        self.estimator_state: Mapping[str, Any] = {}
        self.auxiliary: AuxiliaryLearner | None = None
        self.ref_hidden: JoinedStates | None = None  # of the batch of the present update

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`."""
        notes = super().setup(address)
        self.check_export()
        self.auxiliary = AuxiliaryLearner.of(self.config, self.backend.module, self.backend.device)
        if self.config.diagnostics.gradient:
            check_diagnosable(self.backend.module)
        return notes

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """See `RankWorker`; the forward pass is checked at the length of the texts too."""
        config = with_room_for_texts(self.config)
        module, verdict = prepare_model(config, self.settings, self.model_directory, device)
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason

    def load_reference_head(self, directory: str) -> None:
        """Load the LM head of the reference model, for the KL over the vocabulary.

        Raises:
            UnsupportedModelError: this model runs padded, or has another vocabulary.
        """
        module = self.backend.module
        check_packed_for_exact_kl(self.role, packing=module.packing)
        # The hidden states come from the ranks of this policy where it is its own reference.
        role = self.settings if self.config.is_own_reference else self.config.reference_role()
        load = partial(
            load_causal_lm,
            directory,
            dtype=DTYPES[role.compute_dtype],
            attention="eager",
            trust_remote_code=self.config.model.trust_remote_code,
        )
        device = self.backend.device
        reference, rows = load_on_ranks(load, self.settings, device)
        output = reference.get_output_embeddings()
        if rows is not None and output is not None:
            gather(output, rows, device)
        head = lm_head_of(reference).to(device)
        if len(head.weight) != module.vocabulary_size:
            raise UnsupportedModelError(
                "algorithm.kl.kind: 'exact' needs one vocabulary, and the policy's has "
                f"{module.vocabulary_size} words where the reference's has {len(head.weight)}. "
                "Choose another kind."
            )
        module.reference_head = head

    def update(
        self,
        batch: ScoredBatch,
        ref_hidden: Sequence[Any] = (),
        texts: ExampleBatch | None = None,
    ) -> dict[str, Metric]:
        """Train on one batch, in all its epochs and mini-batches.

        Every rank gets the whole batch and trains on its part.

        Args:
            ref_hidden: object references to the `HiddenStates` of the reference's ranks, where
                the loss has an exact KL.
            texts: pretraining texts, which are divided among the mini-batches of all epochs.
        """
        policy = self.config.policy
        if ref_hidden:
            states = ray.get(list(ref_hidden))
            self.ref_hidden = JoinedStates(states, len(batch.rollouts.token_ids))
        # The plan depends on seed and batch only, so all ranks have the same mini-batches.
        mini_batches = list(
            mini_batch_rows(
                batch.rollouts.sequences,
                num_mini_batches=policy.num_mini_batches,
                epochs=policy.epochs,
                seed=self.config.trainer.seed,
                batch_id=batch.batch_id,
            )
        )
        # A mini-batch without a trained response has no gradient but that of its texts. Without
        # texts it is skipped, and counted.
        trained = [_trained_rows(batch, rows) for rows in mini_batches]
        empty = 0 if texts is not None else sum(not len(rows) for rows in trained)
        self.steps.begin(empty=empty)
        self.estimated = None

        reports = []
        parts = text_parts(texts, len(mini_batches))
        for rows, all_rows, part in zip(trained, mini_batches, parts, strict=True):
            if len(rows):
                reports.append(self.update_on(batch, rows, all_rows, part))
            elif part is not None:
                reports.append(self._backward_texts(part) | self.steps.take(self.backend))

        self.ref_hidden = None
        counts = self.steps.end(self.rank)
        penalty = self._adapt_old_kl(batch, np.concatenate(trained))
        return combine(reports) | counts | penalty | self.metrics()

    def update_on(
        self,
        scored: ScoredBatch,
        rows: NDArray[np.int64],
        all_rows: NDArray[np.int64],
        texts: TextPart | None = None,
    ) -> dict[str, Metric]:
        """Take one optimizer step on a mini-batch.

        Args:
            rows: the rows of the mini-batch that enter the loss.
            all_rows: all its rows. Recomputed advantages are estimated over them, since the
                responses that are not trained still belong to their groups.
            texts: the pretraining texts of the step, whose gradient is added before clipping.
        """
        batch, diagnostics, targets = self._with_advantages(scored, all_rows)
        diagnostics |= self._gradient_metrics(batch, rows)

        parameters = self._objective_parameters(batch, rows)
        loss = PolicyLoss(
            batch=batch,
            algorithm=self.config.algorithm,
            objective_parameters=parameters,
            old_kl_coefficient=self.old_kl_coefficient,
        )
        # The auxiliary network learns from all rows.
        active = rows if self.auxiliary else loss.rows_with_gradient(rows)
        idle = np.setdiff1d(rows, active)
        sizes = self._denominators(batch, rows)
        # Forward passes come before the backward passes, after which the parameters are sharded.
        losses, tokens = self._measure(loss, sizes, idle)
        losses_of_active, active_tokens = self._backward(loss, sizes, active, targets)
        losses += losses_of_active
        tokens += active_tokens
        if texts is not None:
            diagnostics |= self._backward_texts(texts)
        diagnostics["policy/skipped_fraction"] = mean(len(idle) / len(rows), len(rows))
        if self.auxiliary:
            diagnostics |= self.auxiliary.step()

        # With `recompute` the old policy is the live one, which the first update has moved.
        drifted = self.config.algorithm.advantage.recompute and self.steps.counts.taken > 0
        measured = loss_metrics(losses, tokens, self.world_size, drifted=drifted)
        statistics = self._batch_statistics(parameters)
        return measured | diagnostics | statistics | self.steps.take(self.backend)

    def _denominators(self, batch: TrainBatch, rows: NDArray[np.int64]) -> Denominators:
        """Return the sizes of a mini-batch over all ranks.

        So the loss depends neither on its packing nor on which rows have a gradient.
        """
        return Denominators(
            num_tokens=max(1, int(batch.rollouts.response_lengths[rows].sum())),
            num_sequences=len(rows),
            max_tokens=self.config.generation.max_tokens,
        )

    def _backward(
        self,
        loss: PolicyLoss,
        sizes: Denominators,
        rows: NDArray[np.int64],
        targets: NDArray[np.float32] | None,
    ) -> tuple[list[PackLoss], float]:
        """Accumulate the gradient of `rows`, and the statistics of the auxiliary network.

        Returns:
            The losses of this rank's packs, and the number of tokens in them.
        """
        rollouts = loss.batch.rollouts
        packs = self._packs_with_gradient(rollouts, rows)
        losses: list[PackLoss] = []
        tokens = 0
        passes = backward_passes(
            self.backend,
            packs,
            loss,
            sizes,
            temperature=rollouts.temperature,
            ref_hidden=self.ref_hidden,
        )
        for pack, result, pack_loss in passes:
            losses.append(pack_loss)
            tokens += len(pack.targets)
            if self.auxiliary and targets is not None:
                self.auxiliary.accumulate(result, pack, targets)
        return losses, tokens

    def _backward_texts(self, part: TextPart) -> dict[str, Metric]:
        """Accumulate the gradient of the texts of one optimizer step."""
        packs = self.packs_of_sequences(part.texts.sequences, part.rows)
        loss = TextLoss(coefficient=self.config.ptx.coefficient)
        passes = backward_passes(self.backend, packs, loss, part.sizes)
        return text_metrics([pack_loss for _, _, pack_loss in passes])

    @torch.no_grad()
    def text_loss(self, texts: ExampleBatch) -> dict[str, Metric]:
        """Return the loss per token of held-out text under the live weights; collective."""
        part = TextPart(texts=texts, rows=np.arange(len(texts)))
        loss, sizes = TextLoss(coefficient=1.0), part.sizes
        losses: list[PackLoss] = []
        for pack in self.packs_of_sequences(texts.sequences, part.rows):
            result = self.run(pack, 1.0)
            if not pack.is_padding:
                losses.append(loss(result, PackColumns(pack, self.backend.device), sizes))
        return held_out_metrics(losses)

    def _packs_with_gradient(self, rollouts: RolloutBatch, rows: NDArray[np.int64]) -> list[Pack]:
        """Return this rank's packs of `rows`, or one padding pack where there are none.

        The padding pack has a gradient of 0. With it the optimizer takes the same step as if all
        rows had been computed: its moments decay, and so do the weights.
        """
        if len(rows):
            return self.packs_of(rollouts, rows)

        shortest = np.argmin(rollouts.sequence_lengths)
        packs = self.packs_of(rollouts, np.array([shortest]))
        return [replace(pack, is_padding=True) for pack in packs]

    @torch.no_grad()
    def _measure(
        self, loss: PolicyLoss, sizes: Denominators, rows: NDArray[np.int64]
    ) -> tuple[list[PackLoss], float]:
        """Run a sample of rows without a gradient, for the metrics alone.

        Returns:
            The losses of this rank's packs, and the number of tokens that they stand for.
        """
        rollouts = loss.batch.rollouts
        sample = measured_sample(rows, rollouts.group_ids)
        if not len(sample):
            return [], 0.0

        lengths = rollouts.response_lengths
        factor = float(lengths[rows].sum() / max(1, lengths[sample].sum()))
        losses: list[PackLoss] = []
        tokens = 0.0
        for pack in self.packs_of(rollouts, sample):
            result = self.run(pack, rollouts.temperature, self.ref_hidden)
            if pack.is_padding:
                continue
            columns = PackColumns(pack, self.backend.device)
            losses.append(loss(result, columns, sizes).scaled(factor))
            tokens += factor * len(pack.targets)
        return losses, tokens

    def _batch_statistics(self, parameters: Mapping[str, Any]) -> dict[str, Metric]:
        """Return those of the weight's parameters that are statistics of the mini-batch.

        A choice of tokens is none: it is not a number.
        """
        configured = self.config.algorithm.objective.parameters
        return {
            f"policy/{name}": mean(value)
            for name, value in parameters.items()
            if name not in configured and isinstance(value, int | float)
        }

    @torch.no_grad()
    def _adapt_old_kl(self, batch: ScoredBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """Report the coefficient of KL(old || live), and adapt it to the KL after the updates.

        Every rank computes the same. `rows` are those that the updates trained on, perhaps several
        times.
        """
        used = self.old_kl_coefficient
        target = self.config.algorithm.kl_old.target
        if not used:
            return {}

        # One more forward pass, with the weights after the last update.
        if target is not None and len(rows):
            assert batch.old_logprobs is not None, "a penalty to the old policy needs its log-probs"
            rollouts = batch.rollouts
            rows = np.unique(rows)
            tokens = rollouts.response_mask & _tokens_of(rollouts, rows)

            live = self.live(rollouts, self.packs_of(rollouts, rows)).logprobs[tokens]
            old = batch.old_logprobs[tokens]
            measured = float(old_policy_kl(torch.from_numpy(live), torch.from_numpy(old)).mean())
            self.old_kl_coefficient = adapted_penalty(used, measured, target=target)

        return {"kl/old_coefficient": mean(used)}

    def put_estimated_advantages(self) -> Any:
        """See `ports.Policy.estimated_advantages`; all ranks have estimated the same."""
        return None if self.estimated is None else ray.put(self.estimated)

    @torch.no_grad()
    def _with_advantages(
        self, batch: ScoredBatch, rows: NDArray[np.int64]
    ) -> tuple[TrainBatch, dict[str, Metric], NDArray[np.float32] | None]:
        """Return the batch with its advantages, metrics, and targets for the auxiliary network.

        With `algorithm.advantage.recompute` the advantages are estimated here, under the live
        policy; every rank estimates the same. Otherwise the batch has them already.
        """
        if not self.config.algorithm.advantage.recompute:
            assert isinstance(batch, TrainBatch), "advantages are estimated before the update"
            return batch, {}, None

        live = self.live(batch.rollouts, self.packs_of(batch.rollouts, rows))
        estimate = recomputed(self.config, batch, rows, live, self.estimator_state)
        self.estimator_state = estimate.state
        self._keep_estimated(estimate.batch, _trained_rows(batch, rows))
        return estimate.batch, estimate.metrics, estimate.auxiliary_targets

    def _keep_estimated(self, batch: TrainBatch, rows: NDArray[np.int64]) -> None:
        """Keep the advantages of `rows` for the file of the step's rollouts."""
        # NaN marks the responses for which no advantage is estimated.
        if self.estimated is None or self.estimated.shape != batch.advantages.shape:
            self.estimated = np.full_like(batch.advantages, np.nan)
        tokens = _tokens_of(batch.rollouts, rows)
        self.estimated[tokens] = batch.advantages[tokens]

    @torch.no_grad()
    def live(self, rollouts: RolloutBatch, packs: Sequence[Pack]) -> LiveLogprobs:
        """Return the outputs of the live policy and of the auxiliary network; collective.

        Args:
            packs: the packs of this rank. The values of all ranks are returned.
        """
        learner = self.auxiliary
        # The columns: log-probabilities, squared score norms, outputs of the auxiliary network.
        width = 2 + (learner.width if learner else 0)
        flat = np.zeros((len(rollouts.token_ids), width), dtype=np.float32)
        for pack in packs:
            result = self.run(pack, rollouts.temperature)
            if pack.is_padding:
                continue
            columns = torch.stack([result.logprobs, result.squared_score_norms], dim=1)
            if learner:
                columns = torch.cat([columns, learner.outputs(result, pack)], dim=1)
            flat[pack.flat_positions] = columns.cpu().numpy()

        # Each token belongs to one rank and is 0 on the others, so the sum joins them.
        joined = torch.from_numpy(flat).to(self.backend.device)
        dist.all_reduce(joined)
        flat = joined.cpu().numpy()
        return LiveLogprobs(
            logprobs=np.ascontiguousarray(flat[:, 0]),
            squared_score_norms=np.ascontiguousarray(flat[:, 1]),
            auxiliary=flat[:, 2:] if learner else None,
        )

    def _gradient_metrics(self, batch: TrainBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """Measure true gradients under several baselines, in the steps that the configuration sets.

        See `diagnostics.gradient` and `diagnostics.gradient_every`.
        """
        settings = self.config.diagnostics
        if not settings.gradient or self.steps.completed % settings.gradient_every:
            return {}

        def plan(members: NDArray[np.int64]) -> list[Pack]:
            return self.packs_of(batch.rollouts, members, may_share=False)

        return gradient_metrics(self.backend.module, batch, rows, plan, self.backend.device)

    @torch.no_grad()
    def _objective_parameters(self, batch: TrainBatch, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return the weight's parameters, with its statistic over the mini-batch if it has one.

        The statistic costs one more forward pass, except where the batch has no old
        log-probabilities, so that all ratios are 1, and the statistic is of the ratios alone.
        """
        objective = self.config.algorithm.objective
        statistic = batch_parameters_of(objective.weight)
        if statistic is None:
            return objective.parameters

        own: list[BatchTokens] = []  # of this rank, which may have none
        if batch.old_logprobs is not None or chooses_tokens(objective.weight):
            for pack in self.packs_of(batch.rollouts, rows):
                result = self.run(pack, batch.rollouts.temperature)
                if pack.is_padding:
                    continue
                columns = PackColumns(pack, self.backend.device)
                own.append(pack_tokens(result, columns, batch, objective.ratio))

        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, own)
        parts = [part for parts_of_rank in gathered for part in parts_of_rank]
        tokens = joined_tokens(parts, self._choice_seed(batch))
        return {**objective.parameters, **statistic(tokens, **objective.parameters)}

    def _choice_seed(self, batch: TrainBatch) -> int:
        """Return the seed of a random choice of tokens: another one in every update."""
        done = self.steps.counts.taken + self.steps.counts.not_finite
        entropy = (self.config.trainer.seed, batch.batch_id, done)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def write_checkpoint(self, files: RankFiles) -> None:
        """See `SavedWorker`."""
        facts = {
            "ranks": self.world_size,
            "steps": self.steps.completed,
            "estimator": dict(self.estimator_state),
            "old_kl_coefficient": self.old_kl_coefficient,
            "old_kl_start": self.config.algorithm.kl_old.coefficient,
        }
        save_state(self.backend, files, role=self.role, facts=facts)
        if self.auxiliary and self.rank == 0:
            file, content = files.path / AUXILIARY_FILE, self.auxiliary.content()
            files.write(lambda: file.write_bytes(content))

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote; collective.

        Raises:
            ValueError: the checkpoint is of another model, or its files are damaged.
        """
        path = Path(directory)
        facts = load_state(self.backend, path, role=self.role)
        self.steps.completed = facts["steps"]
        # Checkpoints of earlier versions have no state of the estimator.
        self.estimator_state = facts.get("estimator", {})

        kl_old = self.config.algorithm.kl_old
        started_from = facts.get("old_kl_start", kl_old.coefficient)
        # The adapted coefficient continues, unless the user has configured another for the resume.
        if kl_old.target is not None and started_from == kl_old.coefficient:
            self.old_kl_coefficient = facts.get("old_kl_coefficient", self.old_kl_coefficient)

        if self.auxiliary:
            self.auxiliary.load(path)


def with_room_for_texts(config: RunConfig) -> RunConfig:
    """Return a configuration whose longest prompt and response are as long as the longest text."""
    generation = config.generation
    missing = config.longest_text - config.data.max_prompt_tokens
    if missing <= generation.max_tokens:
        return config
    longer = generation.model_copy(update={"max_tokens": missing})
    return config.model_copy(update={"generation": longer})


# Of the groups of rows without a gradient every fourth is measured.
MEASURED_EVERY = 4


def measured_sample(rows: NDArray[np.int64], group_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of `rows` that belong to every fourth of their groups, the first included.

    Whole groups, because the rows of a group share the computation of their prompt.
    """
    groups = np.unique(group_ids[rows])
    return rows[np.isin(group_ids[rows], groups[::MEASURED_EVERY])]


def _trained_rows(batch: ScoredBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the part of `rows` that enters the loss."""
    return rows if batch.trained is None else rows[batch.trained[rows]]


def _tokens_of(rollouts: RolloutBatch, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [N] True at the tokens of `rows`, prompts included."""
    chosen = np.zeros(len(rollouts), dtype=np.bool_)
    chosen[rows] = True
    return np.repeat(chosen, rollouts.sequence_lengths)
