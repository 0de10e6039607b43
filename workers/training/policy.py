"""The policy: log-probabilities, updates, weights for the engines, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rlsys.algorithms.kl import adapted_penalty, old_policy_kl
from rlsys.algorithms.policy_objectives import batch_parameters_of
from rlsys.config import RunConfig
from rlsys.config.engines import ENGINES
from rlsys.data.batches import RolloutBatch, ScoredBatch, TrainBatch
from rlsys.data.packing import Pack, mini_batch_rows, pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.driver.credit_assignment import LiveLogprobs, recomputed
from rlsys.metrics import Metric, combine, mean
from rlsys.models.checkpoint_names import names_without_mapping
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.weights import WeightManifest, pack_weights
from rlsys.run.required_inputs import required_inputs
from workers.training.auxiliary import AuxiliaryLearner
from workers.training.gradient_diagnostics import check_diagnosable, gradient_metrics
from workers.training.learning_rate import learning_rate
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.model_setup import DTYPES
from workers.training.policy_loss import PolicyLoss, pack_log_ratios
from workers.training.rank_worker import CausalLMWorker
from workers.training.update_metrics import UpdateCounts, loss_metrics

STATE_FILE = "policy_state.json"


class PolicyWorker(CausalLMWorker):
    """One rank of the policy."""

    role = "policy"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        super().__init__(config, config.policy, model_directory, rank, world_size)
        self.returns_squared_score_norms = "squared_score_norms" in required_inputs(config)
        self.steps = 0
        self.counts = UpdateCounts()
        self.estimated: NDArray[np.float32] | None = None  # [N] by the last update
        self.old_kl_coefficient = config.algorithm.kl_old.coefficient
        # Between the mini-batches of `algorithm.advantage.recompute`.
        self.estimator_state: Mapping[str, Any] = {}
        self.auxiliary: AuxiliaryLearner | None = None

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`."""
        notes = super().setup(address)
        self._check_export()
        self.auxiliary = AuxiliaryLearner.of(self.config, self.backend.module, self.backend.device)
        if self.config.diagnostics.gradient:
            check_diagnosable(self.backend.module)
        return notes

    def _check_export(self) -> None:
        """Refuse a model whose weights cannot be given the names of its checkpoint.

        Raises:
            UnsupportedModelError: transformers stacks weights that its files hold apart, and knows no way back.
        """
        engine = self.config.generation.engine
        if not ENGINES[engine].takes_checkpoint_names:
            return
        model = self.backend.module.model
        names = names_without_mapping(model, self.model_directory)
        if names:
            raise UnsupportedModelError(
                f"generation.engine: {engine!r} cannot follow the training of model type "
                f"{model.config.model_type!r}: transformers holds {names[0]} as one tensor and has no "
                "mapping back to the weights of the checkpoint. Use --generation.engine transformers."
            )

    def update(self, batch: ScoredBatch) -> dict[str, Metric]:
        """Train all epochs and mini-batches on one batch; every rank gets the whole batch and trains on its part."""
        policy = self.config.policy
        mini_batches = list(
            mini_batch_rows(
                batch.rollouts.sequences,
                num_mini_batches=policy.num_mini_batches,
                epochs=policy.epochs,
                seed=self.config.trainer.seed,
                batch_id=batch.batch_id,
            )
        )
        kept = [_trained_rows(batch, rows) for rows in mini_batches]
        self.counts = UpdateCounts(empty=sum(not len(rows) for rows in kept))
        self.estimated = None

        reports = [
            self.update_on(batch, rows, among)
            for rows, among in zip(kept, mini_batches, strict=True)
            if len(rows)
        ]
        rate = self._learning_rate()
        self.steps += 1
        penalty = self._adapt_old_kl(batch, np.concatenate(kept))

        # Every rank counts the same, so one of them reports.
        counts = self.counts.metrics() if self.rank == 0 else {}
        rate_metric = {"policy/learning_rate": mean(rate)}
        return combine(reports) | counts | rate_metric | penalty | self.metrics()

    def _learning_rate(self) -> float:
        return learning_rate(self.config.policy.optimizer, self.steps, self.config.trainer.steps)

    def update_on(
        self, scored: ScoredBatch, rows: NDArray[np.int64], among: NDArray[np.int64]
    ) -> dict[str, Metric]:
        """Take one optimizer step on `rows`.

        Advantages that are estimated again are estimated over `among`, of which `rows` are a part.
        """
        lengths = scored.rollouts.response_lengths[rows]
        sizes = Denominators(
            num_tokens=max(1, int(lengths.sum())),
            num_sequences=len(rows),
            max_tokens=self.config.generation.max_tokens,
        )
        packs = self.packs_of(scored.rollouts, rows)
        batch, diagnostics, targets = self._credited(scored, among)
        diagnostics |= self._gradient_metrics(batch, rows)
        drifted = self.config.algorithm.advantage.recompute and self.counts.taken > 0
        parameters = self._objective_parameters(batch, packs)
        loss = PolicyLoss(
            batch=batch,
            algorithm=self.config.algorithm,
            objective_parameters=parameters,
            old_kl_coefficient=self.old_kl_coefficient,
        )

        losses: list[PackLoss] = []
        tokens = 0
        temperature = batch.rollouts.temperature
        for pack, result, made in backward_passes(
            self.backend, packs, loss, sizes, temperature=temperature
        ):
            losses.append(made)
            tokens += len(pack.targets)
            if self.auxiliary and targets is not None:
                self.auxiliary.accumulate(result, pack, targets)
        if self.auxiliary:
            diagnostics |= self.auxiliary.step()

        measured = loss_metrics(losses, tokens, self.world_size, drifted=drifted)
        return measured | diagnostics | self._chosen(parameters) | self._optimizer_step()

    def _chosen(self, parameters: Mapping[str, Any]) -> dict[str, Metric]:
        """Return the parameters that the weight took from the mini-batch."""
        configured = self.config.algorithm.objective.parameters
        return {
            f"policy/{name}": mean(value)
            for name, value in parameters.items()
            if name not in configured
        }

    def _optimizer_step(self) -> dict[str, Metric]:
        norm = self.backend.step(self._learning_rate())
        finite = math.isfinite(norm)
        self.counts = self.counts.after(finite=finite)
        return {"policy/grad_norm": mean(norm)} if finite else {}

    @torch.no_grad()
    def _adapt_old_kl(self, batch: ScoredBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """Report the coefficient of KL(old || live), and adapt it to what the updates on `rows` did.

        Every rank does the same.
        """
        used, target = self.old_kl_coefficient, self.config.algorithm.kl_old.target
        if not used:
            return {}
        if target is not None and len(rows):
            assert batch.old_logprobs is not None, "a penalty to the old policy needs its log-probs"
            rollouts, rows = batch.rollouts, np.unique(rows)
            tokens = rollouts.response_mask & _tokens_of(rollouts, rows)
            live = self.live(rollouts, self.packs_of(rollouts, rows)).logprobs[tokens]
            old = batch.old_logprobs[tokens]
            measured = float(old_policy_kl(torch.from_numpy(live), torch.from_numpy(old)).mean())
            self.old_kl_coefficient = adapted_penalty(used, measured, target=target)
        return {"kl/old_coefficient": mean(used)}

    def put_estimated_advantages(self) -> Any:
        """See `ports.Policy.estimated_advantages`; every rank has estimated the same."""
        return None if self.estimated is None else ray.put(self.estimated)

    @torch.no_grad()
    def _credited(
        self, batch: ScoredBatch, rows: NDArray[np.int64]
    ) -> tuple[TrainBatch, dict[str, Metric], NDArray[np.float32] | None]:
        """Return the batch as it came, or (`algorithm.advantage.recompute`) with what the live policy makes of its advantages.

        Every rank estimates the same. Also returned are metrics, and what an auxiliary network is to learn.
        """
        if not self.config.algorithm.advantage.recompute:
            assert isinstance(batch, TrainBatch), "advantages are estimated before the update"
            return batch, {}, None
        live = self.live(batch.rollouts, self.packs_of(batch.rollouts, rows))
        made = recomputed(self.config, batch, rows, live, self.estimator_state)
        self.estimator_state = made.state
        self._keep_estimated(made.batch, _trained_rows(batch, rows))
        return made.batch, made.metrics, made.auxiliary_targets

    def _keep_estimated(self, batch: TrainBatch, rows: NDArray[np.int64]) -> None:
        """Remember the advantages of `rows`, for the file of the step's rollouts."""
        if self.estimated is None or self.estimated.shape != batch.advantages.shape:
            self.estimated = np.full_like(batch.advantages, np.nan)
        tokens = _tokens_of(batch.rollouts, rows)
        self.estimated[tokens] = batch.advantages[tokens]

    @torch.no_grad()
    def live(self, rollouts: RolloutBatch, packs: Sequence[Pack]) -> LiveLogprobs:
        """Return what the policy as it is says of `packs`; collective, and every rank gets the values of all."""
        learner = self.auxiliary
        width = 2 + (learner.width if learner else 0)
        flat = np.zeros((len(rollouts.token_ids), width), dtype=np.float32)
        for pack in packs:
            result = self.run(pack, rollouts.temperature)
            if not pack.is_padding:
                columns = torch.stack([result.logprobs, result.squared_score_norms], dim=1)
                if learner:
                    columns = torch.cat([columns, learner.outputs(result, pack)], dim=1)
                flat[pack.flat_positions] = columns.cpu().numpy()

        everyone = torch.from_numpy(flat).to(self.backend.device)
        dist.all_reduce(everyone)  # each token is one rank's, and 0 elsewhere
        flat = everyone.cpu().numpy()
        return LiveLogprobs(
            logprobs=np.ascontiguousarray(flat[:, 0]),
            squared_score_norms=np.ascontiguousarray(flat[:, 1]),
            auxiliary=flat[:, 2:] if learner else None,
        )

    def _gradient_metrics(self, batch: TrainBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """Measure true gradients under several baselines, in the steps in which `diagnostics.gradient` asks for them."""
        settings = self.config.diagnostics
        if not settings.gradient or self.steps % settings.gradient_every:
            return {}

        def plan(members: NDArray[np.int64]) -> list[Pack]:
            return self.packs_of(batch.rollouts, members, may_share=False)

        return gradient_metrics(self.backend.module, batch, rows, plan, self.backend.device)

    @torch.no_grad()
    def _objective_parameters(self, batch: TrainBatch, packs: Sequence[Pack]) -> dict[str, Any]:
        """Return the weight's parameters.

        A weight with a statistic over the mini-batch costs a forward pass, after the first update of a batch.
        """
        objective = self.config.algorithm.objective
        statistic = batch_parameters_of(objective.weight)
        if statistic is None:
            return objective.parameters

        own = [torch.zeros(0)]
        if batch.old_logprobs is not None:
            for pack in packs:
                result = self.run(pack, batch.rollouts.temperature)
                if not pack.is_padding:
                    columns = PackColumns(pack, self.backend.device)
                    own.append(pack_log_ratios(result, columns, batch, objective.ratio).cpu())
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, torch.cat(own))
        return {**objective.parameters, **statistic(torch.cat(everyone), **objective.parameters)}

    def export_weights(self, version: int) -> tuple[WeightManifest, list[Any]] | None:
        """Return, from rank 0, the manifest and the weights' shards in the object store; collective."""
        dtype = DTYPES[self.config.generation.dtype]
        manifest, shards = pack_weights(self.backend.weights(), version=version, dtype=dtype)
        if self.rank != 0:
            return None
        return manifest, [ray.put(shard) for shard in shards]

    @torch.no_grad()
    def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Return [L - 1] log-probabilities of each token but the first, for sequences of any lengths L.

        Collective; every rank computes the same.
        """
        batch = TokenSequences.of_texts(sequences)
        packs = pack_rows(
            batch,
            np.arange(len(batch)),
            budget=self.settings.microbatch_tokens,
            rank=0,
            ranks=1,
            shared_prefix_packing=False,
        )
        flat = np.zeros(len(batch.token_ids), dtype=np.float32)
        for pack in packs:
            flat[pack.flat_positions] = self.run(pack, temperature).logprobs.cpu().numpy()
        return [row[1:] for row in np.split(flat, batch.offsets[1:-1])]

    def save(self, directory: str) -> None:
        """Write the model in Hugging Face layout, optimizer state, and what else the policy remembers; collective."""
        path = Path(directory)
        self.backend.save(path)
        if self.rank != 0:
            return
        facts = {
            "ranks": self.world_size,
            "steps": self.steps,
            "estimator": dict(self.estimator_state),
            "old_kl_coefficient": self.old_kl_coefficient,
            "old_kl_start": self.config.algorithm.kl_old.coefficient,
        }
        (path / STATE_FILE).write_text(json.dumps(facts))
        if self.auxiliary:
            self.auxiliary.save(path)

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote; collective.

        Raises:
            ValueError: the checkpoint was written by another number of ranks, or for another model.
        """
        path = Path(directory)
        facts = json.loads((path / STATE_FILE).read_text())
        if facts["ranks"] != self.world_size:
            raise ValueError(
                f"policy.ranks: {directory} was written by {facts['ranks']} ranks, now there are "
                f"{self.world_size}. Resume with --policy.ranks {facts['ranks']}, or start a new run "
                f"with --model.path {directory}."
            )
        self.backend.load(path)
        self.steps = facts["steps"]
        # Checkpoints from before it was kept have no state of the estimator.
        self.estimator_state = facts.get("estimator", {})

        kl_old = self.config.algorithm.kl_old
        started_from = facts.get("old_kl_start", kl_old.coefficient)
        if kl_old.target is not None and started_from == kl_old.coefficient:
            # A coefficient that was changed for the resume replaces the adapted one.
            self.old_kl_coefficient = facts.get("old_kl_coefficient", self.old_kl_coefficient)
        if self.auxiliary:
            self.auxiliary.load(path)


def _trained_rows(batch: ScoredBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of `rows` that enter the loss."""
    return rows if batch.trained is None else rows[batch.trained[rows]]


def _tokens_of(rollouts: RolloutBatch, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [N] True at the tokens of `rows`, prompts included."""
    chosen = np.zeros(len(rollouts), dtype=np.bool_)
    chosen[rows] = True
    return np.repeat(chosen, rollouts.sequence_lengths)
