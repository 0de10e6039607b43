"""One rank of the actor group: log-probabilities, updates, weights out, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlsys.algorithms.advantages.hierarchical.baseline_network import BaselineRegression
from rlsys.algorithms.kl import adapted_penalty, old_policy_kl
from rlsys.algorithms.policy_objectives import batch_parameters_of
from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, RolloutBatch, TrainBatch
from rlsys.data.packing import Pack, mini_batch_rows, pack_rows
from rlsys.driver.credit_assignment import LiveLogprobs, recomputed
from rlsys.metrics import Metric, combine, maximum, mean, total
from rlsys.models.checkpoint_names import from_checkpoint, names_without_mapping, to_checkpoint
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.saving import copy_model_files
from rlsys.models.weights import WeightManifest, pack_weights
from rlsys.plugins import load_plugins
from rlsys.run.required_inputs import required_inputs
from workers.training.backends.fsdp2 import (
    DTYPES,
    build_sharded_model,
    choose_kernel,
    full_state_dict,
    join_process_group,
    load_full_state_dict,
    open_rendezvous,
    peak_memory_gib,
    use_all_threads,
)
from workers.training.baseline_network import BaselineLearner, wants_network
from workers.training.gradient_diagnostics import check_diagnosable, gradient_metrics
from workers.training.learning_rate import learning_rate
from workers.training.packed_attention import SHARING_KERNELS
from workers.training.packed_model import PackTensors
from workers.training.policy_loss import Denominators, PackLoss, pack_log_ratios, pack_loss
from workers.training.weight_decay import parameter_groups


class RankWorker:
    """What actor and reference ranks have in common: a sharded model that answers with log-probabilities."""

    trainable = False
    role = "reference"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        load_plugins(config.plugins)
        use_all_threads()
        self.config = config
        self.model_directory = model_directory
        self.rank, self.world_size = rank, world_size
        self._store: TCPStore | None = None  # on rank 0, from `rendezvous` on
        self.returns_score_norms = self.trainable and "score_norms" in required_inputs(config)

    def rendezvous(self) -> str:
        """Open the store at which the ranks meet, on rank 0, and return its host:port."""
        host = ray.util.get_node_ip_address()
        self._store = open_rendezvous(host, self.world_size)
        return f"{host}:{self._store.port}"

    def setup(self, address: str) -> tuple[str, ...]:
        """Join the other ranks and build the model; collective. Return what the user should know of it."""
        self.device = join_process_group(address, self.rank, self.world_size, self._store)
        self.model, verdict = build_sharded_model(
            self.config,
            self.model_directory,
            self.device,
            self.world_size,
            trainable=self.trainable,
        )
        kernel = choose_kernel(self.config.model.attention, self.device)
        self.share_prompts = (
            self.config.policy.share_prompts and verdict.packing and kernel in SHARING_KERNELS
        )
        if verdict.reason is None:
            return ()
        return (f"{self.role}: runs padded instead of packed, which is slower ({verdict.reason})",)

    def packs_of(
        self, rollouts: RolloutBatch, rows: NDArray[np.int64], *, may_share: bool = True
    ) -> list[Pack]:
        """This rank's share of those rows, each with its prompt where `may_share` is False."""
        return pack_rows(
            rollouts,
            rows,
            budget=self.config.policy.microbatch_tokens,
            rank=self.rank,
            ranks=self.world_size,
            share_prompts=self.share_prompts and may_share,
            padded=not self.model.packing,
        )

    @torch.no_grad()
    def logprobs(self, *parts: RolloutBatch) -> LogprobBatch:
        """Log-probabilities of this rank's rows of the batch, given as its parts in prompt order."""
        rollouts = RolloutBatch.concatenate(parts)
        packs = self.packs_of(rollouts, np.arange(len(rollouts)))
        flat, norms = (np.zeros(len(rollouts.token_ids), dtype=np.float32) for _ in range(2))
        rows: list[int] = []
        for pack in packs:
            result = self.model(PackTensors.of(pack, self.device), rollouts.temperature)
            if not pack.is_filler:
                flat[pack.flat_positions] = result.logprobs.cpu().numpy()
                norms[pack.flat_positions] = result.score_norms.cpu().numpy()
                rows += pack.rows.tolist()
        own = np.asarray(rows, dtype=np.int64)
        return LogprobBatch(
            batch_id=rollouts.batch_id,
            rows=own,
            logprobs=_of_rows(flat, own, rollouts.sequence_offsets),
            score_norms=_of_rows(norms, own, rollouts.sequence_offsets)
            if self.returns_score_norms
            else None,
        )

    def put_logprobs(self, *parts: RolloutBatch) -> Any:
        """`logprobs`, left in the object store: a reference comes back."""
        return ray.put(self.logprobs(*parts))

    def metrics(self) -> dict[str, Metric]:
        """Peak memory of this rank."""
        return {f"memory/{self.role}": maximum(peak_memory_gib(self.device))}

    def shutdown(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class ReferenceWorker(RankWorker):
    """One rank of the frozen reference."""


class PolicyWorker(RankWorker):
    """One rank of the actor group."""

    trainable = True
    role = "policy"

    def setup(self, address: str) -> tuple[str, ...]:
        notes = super().setup(address)
        self._check_export()
        settings = self.config.policy.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model.named_parameters(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self.steps = 0
        self.counts = UpdateCounts()
        self.estimated: NDArray[np.float32] | None = None  # [N] by the last update
        self.old_kl_coefficient = self.config.algorithm.kl_old.coefficient
        self.estimator_state: Mapping[
            str, Any
        ] = {}  # between the mini-batches of `algorithm.advantage.recompute`
        self.baselines: BaselineLearner | None = None
        if wants_network(self.config):
            self.baselines = BaselineLearner(self.config, self.model.hidden_size, self.device)
        if self.config.diagnostics.gradient:
            check_diagnosable(self.model)
        return notes

    def _check_export(self) -> None:
        """Refuse a model whose weights cannot be given the names of its checkpoint.

        Raises:
            UnsupportedModelError: transformers stacks weights in memory that its files hold apart, and knows no way back.
        """
        if self.config.generation.engine == "transformers":  # loads what it holds itself
            return
        names = names_without_mapping(self.model.model, self.model_directory)
        if names:
            raise UnsupportedModelError(
                f"generation.engine: {self.config.generation.engine!r} cannot follow the training of model type {self.model.model.config.model_type!r}: "
                f"transformers holds {names[0]} as one tensor and has no mapping back to the weights of the checkpoint. Use "
                "--generation.engine transformers."
            )

    def update(self, batch: TrainBatch) -> dict[str, Metric]:
        """All epochs and mini-batches on one batch; every rank gets the whole batch and trains on its share."""
        policy = self.config.policy
        rate = learning_rate(policy.optimizer, self.steps, self.config.trainer.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mini_batches = mini_batch_rows(
            batch.rollouts,
            mini_batches=policy.mini_batches,
            epochs=policy.epochs,
            seed=self.config.trainer.seed,
        )
        rows = list(mini_batches)
        kept = [_trained_rows(batch, chosen) for chosen in rows]
        self.counts = UpdateCounts(empty=sum(not len(chosen) for chosen in kept))
        self.estimated = None
        reports = [
            self.update_on(batch, chosen, among)
            for chosen, among in zip(kept, rows, strict=True)
            if len(chosen)
        ]
        self.steps += 1
        penalty = self._adapt_old_kl(batch, np.concatenate(kept))
        # Every rank counts the same, so one of them reports.
        counts = self.counts.metrics() if self.rank == 0 else {}
        rate_metric = {"policy/learning_rate": mean(rate)}
        return combine(reports) | counts | rate_metric | penalty | self.metrics()

    @torch.no_grad()
    def _adapt_old_kl(self, batch: TrainBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """Report the coefficient of KL(old || live), and adapt it to what the updates on `rows` did; every rank does the same."""
        used, target = self.old_kl_coefficient, self.config.algorithm.kl_old.target
        if not used:
            return {}
        if target is not None and len(rows):
            assert batch.old_logprobs is not None
            rollouts, rows = batch.rollouts, np.unique(rows)
            response_of = np.repeat(np.arange(len(rollouts)), rollouts.sequence_lengths)
            tokens = rollouts.response_mask & np.isin(response_of, rows)
            live = self.live(rollouts, self.packs_of(rollouts, rows)).logprobs[tokens]
            old = batch.old_logprobs[tokens]
            measured = float(old_policy_kl(torch.from_numpy(live), torch.from_numpy(old)).mean())
            self.old_kl_coefficient = adapted_penalty(used, measured, target=target)
        return {"kl/old_coefficient": mean(used)}

    def put_estimated_advantages(self) -> Any:
        """See `ports.Policy.estimated_advantages`; every rank has estimated the same."""
        return None if self.estimated is None else ray.put(self.estimated)

    def update_on(
        self, batch: TrainBatch, rows: NDArray[np.int64], among: NDArray[np.int64]
    ) -> dict[str, Metric]:
        """One optimizer step on `rows`; advantages that are estimated again are estimated over `among`, of which they are a part."""
        lengths = batch.rollouts.response_lengths[rows]
        sizes = Denominators(
            num_tokens=max(1, int(lengths.sum())),
            num_sequences=len(rows),
            max_tokens=self.config.generation.max_tokens,
        )
        losses, tokens = [], 0
        packs = self.packs_of(batch.rollouts, rows)
        batch, diagnostics, regression = self._recomputed(batch, among)
        diagnostics |= self._gradient_metrics(batch, rows)
        drifted = self.config.algorithm.advantage.recompute and self.counts.taken > 0
        parameters = self._objective_parameters(batch, packs)
        for pack in packs:
            result = self.model(PackTensors.of(pack, self.device), batch.rollouts.temperature)
            loss = pack_loss(
                result,
                pack,
                batch,
                self.config.algorithm,
                sizes,
                parameters,
                old_kl_coefficient=self.old_kl_coefficient,
            )
            # FSDP averages gradients over ranks, and the denominators are global already: so scale by the ranks.
            (loss.loss * (0.0 if pack.is_filler else self.world_size)).backward()
            if not pack.is_filler:
                losses.append(loss)
                tokens += len(pack.targets)
                if self.baselines and regression:
                    self.baselines.learn(result, pack, regression)
        if self.baselines:
            diagnostics |= self.baselines.step()
        chosen = {
            f"policy/{name}": mean(value)
            for name, value in parameters.items()
            if name not in self.config.algorithm.objective.parameters
        }
        measured = _loss_metrics(losses, tokens, self.world_size, drifted=drifted)
        return measured | diagnostics | chosen | self._optimizer_step()

    @torch.no_grad()
    def _recomputed(
        self, batch: TrainBatch, rows: NDArray[np.int64]
    ) -> tuple[TrainBatch, dict[str, Metric], BaselineRegression | None]:
        """The batch as the live policy sees it, where `algorithm.advantage.recompute` asks for it; every rank estimates the same."""
        if not self.config.algorithm.advantage.recompute:
            return batch, {}, None
        live = self.live(batch.rollouts, self.packs_of(batch.rollouts, rows))
        made = recomputed(self.config, batch, rows, live, self.estimator_state)
        self.estimator_state = made.state
        self._keep_estimated(made.batch, _trained_rows(batch, rows))
        return made.batch, made.metrics, made.regression

    def _keep_estimated(self, batch: TrainBatch, rows: NDArray[np.int64]) -> None:
        """Remember the advantages of `rows`, for the file of the step's rollouts."""
        assert batch.advantages is not None
        if self.estimated is None or self.estimated.shape != batch.advantages.shape:
            self.estimated = np.full_like(batch.advantages, np.nan)
        chosen = np.zeros(len(batch.rollouts), dtype=np.bool_)
        chosen[rows] = True
        tokens = np.repeat(chosen, batch.rollouts.sequence_lengths)
        self.estimated[tokens] = batch.advantages[tokens]

    @torch.no_grad()
    def live(self, rollouts: RolloutBatch, packs: Sequence[Pack]) -> LiveLogprobs:
        """What the policy as it is says of `packs`; all ranks ask for theirs at once, and every one gets all."""
        learner = self.baselines
        flat = np.zeros(
            (len(rollouts.token_ids), 2 + (learner.layers if learner else 0)), dtype=np.float32
        )
        for pack in packs:
            result = self.model(PackTensors.of(pack, self.device), rollouts.temperature)
            if not pack.is_filler:
                columns = torch.stack([result.logprobs, result.score_norms], dim=1)
                if learner:
                    columns = torch.cat([columns, learner.baselines(result, pack)], dim=1)
                flat[pack.flat_positions] = columns.cpu().numpy()
        everyone = torch.from_numpy(flat).to(self.device)
        dist.all_reduce(everyone)  # each token is one rank's, and 0 elsewhere
        flat = everyone.cpu().numpy()
        return LiveLogprobs(
            logprobs=np.ascontiguousarray(flat[:, 0]),
            score_norms=np.ascontiguousarray(flat[:, 1]),
            layer_baselines=flat[:, 2:] if learner else None,
        )

    def _gradient_metrics(self, batch: TrainBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """True gradients under several baselines, in the steps in which `diagnostics.gradient` asks for them."""
        settings = self.config.diagnostics
        if not settings.gradient or self.steps % settings.gradient_every:
            return {}

        def plan(members: NDArray[np.int64]) -> list[Pack]:
            return self.packs_of(batch.rollouts, members, may_share=False)

        return gradient_metrics(self.model, batch, rows, plan, self.device)

    @torch.no_grad()
    def _objective_parameters(self, batch: TrainBatch, packs: Sequence[Pack]) -> dict[str, Any]:
        """The weight's parameters; one with a statistic over the mini-batch costs a forward pass, after the first update of a batch."""
        objective = self.config.algorithm.objective
        statistic = batch_parameters_of(objective.weight)
        if statistic is None:
            return objective.parameters
        own = [torch.zeros(0)]
        if batch.old_logprobs is not None:
            for pack in packs:
                result = self.model(PackTensors.of(pack, self.device), batch.rollouts.temperature)
                if not pack.is_filler:
                    own.append(pack_log_ratios(result, pack, batch, objective.ratio).cpu())
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, torch.cat(own))
        return {**objective.parameters, **statistic(torch.cat(everyone), **objective.parameters)}

    def _optimizer_step(self) -> dict[str, Metric]:
        limit = self.config.policy.optimizer.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        finite = math.isfinite(value)  # the same on every rank, so all skip together
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.counts = self.counts.after(finite=finite)
        return {"policy/grad_norm": mean(value)} if finite else {}

    def export_weights(self, version: int) -> tuple[WeightManifest, list[Any]] | None:
        """On rank 0: the manifest, and the shards in the object store. All ranks must be asked."""
        weights = full_state_dict(self.model)
        if self.rank != 0:
            return None
        weights = to_checkpoint(self.model.model, weights)
        manifest, shards = pack_weights(
            weights.items(), version=version, dtype=DTYPES[self.config.generation.dtype]
        )
        return manifest, [ray.put(shard) for shard in shards]

    @torch.no_grad()
    def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Sequences of any lengths L -> [L - 1] log-probabilities of each token but the first. All ranks must be asked, and compute the same."""
        batch = RolloutBatch.from_sequences(sequences, temperature=temperature)
        packs = pack_rows(
            batch,
            np.arange(len(batch)),
            budget=self.config.policy.microbatch_tokens,
            rank=0,
            ranks=1,
            share_prompts=False,
        )
        flat = np.zeros(len(batch.token_ids), dtype=np.float32)
        for pack in packs:
            flat[pack.flat_positions] = (
                self.model(PackTensors.of(pack, self.device), temperature).logprobs.cpu().numpy()
            )
        return [row[1:] for row in np.split(flat, batch.sequence_offsets[1:-1])]

    def save(self, directory: str) -> None:
        """Hugging Face layout from rank 0, and each rank's optimizer state. All ranks must be asked."""
        path = Path(directory)
        weights = full_state_dict(self.model)
        if self.rank == 0:
            self._save_model(path, weights)
            facts = {
                "ranks": self.world_size,
                "steps": self.steps,
                "estimator": dict(self.estimator_state),
                "old_kl_coefficient": self.old_kl_coefficient,
                "old_kl_start": self.config.algorithm.kl_old.coefficient,
            }
            (path / "policy_state.json").write_text(json.dumps(facts))
            if self.baselines:
                self.baselines.save(path)
        torch.save(self._local_optimizer_state(), path / f"optimizer_rank{self.rank}.pt")

    def _save_model(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        copy_model_files(Path(self.model_directory), path)
        saved = to_checkpoint(self.model.model, weights)
        # A view of a larger tensor would be written with the whole of it.
        save_file(
            {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in saved.items()
            },
            path / "model.safetensors",
            {"format": "pt"},
        )

    def _local_optimizer_state(self) -> list[dict[str, torch.Tensor]]:
        """Adam's moments of this rank's shards, in parameter order."""
        return [
            {
                key: (value.to_local() if hasattr(value, "to_local") else value)
                for key, value in self.optimizer.state[parameter].items()
            }
            for parameter in self.model.parameters()
        ]

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: the checkpoint was written by another number of ranks, or for another model.
        """
        from safetensors.torch import load_file

        path = Path(directory)
        facts = json.loads((path / "policy_state.json").read_text())
        if facts["ranks"] != self.world_size:
            raise ValueError(
                f"policy.ranks: {directory} was written by {facts['ranks']} ranks, now there are {self.world_size}. Resume with "
                f"--policy.ranks {facts['ranks']}, or start a new run with --model.path {directory}."
            )
        saved = load_file(path / "model.safetensors")
        load_full_state_dict(self.model, from_checkpoint(self.model.model, saved))
        self._load_optimizer_state(
            torch.load(path / f"optimizer_rank{self.rank}.pt", weights_only=True)
        )
        self.steps = facts["steps"]
        self.estimator_state = facts.get(
            "estimator", {}
        )  # not in checkpoints from before it was kept
        kl_old = self.config.algorithm.kl_old
        started_from = facts.get("old_kl_start", kl_old.coefficient)
        if kl_old.target is not None and started_from == kl_old.coefficient:
            # A coefficient that was changed for the resume replaces the adapted one.
            self.old_kl_coefficient = facts.get("old_kl_coefficient", self.old_kl_coefficient)
        if self.baselines:
            self.baselines.load(path)

    def _load_optimizer_state(self, states: Sequence[dict[str, torch.Tensor]]) -> None:
        from torch.distributed.tensor import DTensor

        for parameter, state in zip(self.model.parameters(), states, strict=True):
            for key, value in state.items():
                if key != "step" and isinstance(parameter, DTensor):
                    value = DTensor.from_local(
                        value.to(self.device),
                        parameter.device_mesh,
                        parameter.placements,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )
                self.optimizer.state[parameter][key] = value


def _trained_rows(batch: TrainBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of `rows` that enter the loss."""
    return rows if batch.trained is None else rows[batch.trained[rows]]


def _of_rows(
    flat: NDArray[np.float32], rows: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The tokens of `rows`, one row after the other."""
    own = [flat[offsets[row] : offsets[row + 1]] for row in rows]
    return np.concatenate(own) if own else np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class UpdateCounts:
    """What became of the mini-batches of one batch."""

    taken: int = 0  # optimizer steps
    not_finite: int = 0  # skipped: the gradient was not finite
    empty: int = 0  # skipped: no response of the mini-batch is trained

    def after(self, *, finite: bool) -> UpdateCounts:
        """With one more mini-batch that had a gradient."""
        return replace(self, taken=self.taken + finite, not_finite=self.not_finite + (not finite))

    def metrics(self) -> dict[str, Metric]:
        return {
            "policy/updates": total(self.taken),
            "policy/skipped_updates": total(self.not_finite + self.empty),
            "policy/nonfinite_gradients": total(self.not_finite),
        }


def _loss_metrics(
    losses: Sequence[PackLoss], tokens: int, ranks: int, *, drifted: bool
) -> dict[str, Metric]:
    """Loss, token-weighted means and maxima of one mini-batch on one rank.

    The loss of a mini-batch is the sum over packs and ranks: its share on this rank is reported times the number of ranks, so that the mean over
    ranks and mini-batches is the mean loss of a mini-batch. Every rank reports one, also one that has no pack.

    `drifted`: `old` are the log-probabilities of a policy that has moved since it sampled, so what they differ by is drift and no gap between
    engine and trainer.
    """
    loss = {"policy/loss": mean(ranks * sum(float(loss.loss.detach()) for loss in losses))}
    if not losses:
        return loss

    def average(name: str) -> Metric:
        return mean(sum(loss.sums[name] for loss in losses) / max(tokens, 1), tokens)

    difference = "drift" if drifted else "logprob_gap"
    metrics = loss | {
        "policy/entropy": average("entropy"),
        "policy/ratio_mean": average("ratio"),
        "policy/ratio_square": average("ratio_square"),
        "policy/clipped_share": average("clipped"),
        f"policy/{difference}_mean": average("gap"),
        "policy/ratio_max": maximum(max(loss.maxima["ratio"] for loss in losses)),
        f"policy/{difference}_max": maximum(max(loss.maxima["gap"] for loss in losses)),
        "policy/tokens": total(tokens),
    }
    return metrics | {
        f"policy/{name}": average(name)
        for name in losses[0].sums
        if name.startswith(("kl_", "rollout_"))
    }
