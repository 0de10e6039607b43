"""All presets on one stored rollout batch, under a policy that has moved since.

    python -m benchmarks.compare_objectives runs/NAME/rollouts/step_000001.parquet \\
        --model runs/NAME/checkpoints/step_000020

The rollout file has the tokens, the rewards and the log-probabilities at sampling; the model is the
policy after its updates. Prints a table and writes it with a figure beside the rollouts
(`--output`). Nothing is trained, and Ray is not started.

    mean w, max w    effective weight w(rho, A) before A grad log pi, over tokens
    no gradient      fraction of tokens whose weight is 0
    ESS              effective sample size of the weights, (sum w)^2 / (n sum w^2)
    bias proxy       sum |w - rho| |A| / sum rho |A|, rho the token's own ratio: the distance from
                     the full token-level correction
    noise            N sum x^2 g^2 / (sum |x|)^2 with x = w A / (the aggregation's denominator) and
                     g^2 the squared score norm with respect to the logits: the second moment of the
                     gradient against its size, so that presets with other scales compare
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs
from rlsys.algorithms.policy_objectives import (
    effective_sample_size,
    gradient_coefficient,
    log_ratios,
)
from rlsys.algorithms.policy_objectives.ratios import importance_variances
from rlsys.algorithms.policy_objectives.weights import WEIGHTS
from rlsys.algorithms.token_logprobs import token_logprobs
from rlsys.config import AlgorithmConfig, GenerationConfig, PolicyConfig, RunConfig
from rlsys.config.presets import PRESETS
from rlsys.data.batches import PromptBatch, RewardBatch, RolloutBatch, StopReason
from rlsys.data.padding import ResponsePadding
from rlsys.data.rollout_files import read_rollouts
from rlsys.data.sequences import TokenSequences
from rlsys.driver.advantage_estimation import (
    EstimatorContext,
    TokenArrays,
    TokenCosts,
    advantage_inputs,
    estimate_advantages,
)
from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm

matplotlib.use("Agg")


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """A rollout batch and the policy that has moved since."""

    rollouts: RolloutBatch
    rewards: RewardBatch
    arrays: TokenArrays  # [N]
    live: NDArray[np.float32]  # [N] log-probabilities

    def inputs(self, algorithm: AlgorithmConfig) -> AdvantageInputs:
        """Return the inputs of an estimator in a run with that configuration."""
        costs = TokenCosts(
            kl_coefficient=algorithm.kl.coefficient,
            entropy_temperature=algorithm.entropy.temperature,
        )
        context = EstimatorContext(costs=costs)
        return advantage_inputs(algorithm, self.rollouts, self.rewards, self.arrays, context)


def load(path: Path, model_path: str, temperature: float) -> StoredBatch:
    """Return the responses of a rollout file under the model's policy.

    Raises:
        ValueError: the file is not a rollout file, or holds no response.
    """
    if not path.is_file():
        raise ValueError(
            f"rollouts: there is no file {path}."
            " A run writes them as runs/NAME/rollouts/step_*.parquet."
        )
    rows = [row for row in read_rollouts(path) if row.get("trained", True)]
    if not rows or "rollout_logprobs" not in rows[0]:
        raise ValueError(f"rollouts: {path} is not a rollout file, or holds no trained response")
    model = load_causal_lm(
        resolve_model(model_path), dtype=torch.float32, attention="sdpa", trust_remote_code=False
    )

    old = [row["old_logprobs"] or row["rollout_logprobs"] for row in rows]
    ref = [row["ref_logprobs"] or own for row, own in zip(rows, old, strict=True)]
    scores = [_score(model, row["token_ids"], row["prompt_length"], temperature) for row in rows]
    rollouts = _rollouts(rows, temperature)
    live = _joined([logprobs for logprobs, _ in scores], np.float32)
    arrays = TokenArrays(
        old=_joined(old, np.float32),
        ref=_joined(ref, np.float32),
        squared_score_norms=_joined([norms for _, norms in scores], np.float32),
    )
    return StoredBatch(
        rollouts=rollouts,
        rewards=_rewards(rows),
        arrays=arrays,
        live=np.where(rollouts.response_mask, live, np.float32(0)),
    )


def _joined(parts: Sequence[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return [N] values of all responses, one after the other."""
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])


def _rollouts(rows: Sequence[Mapping[str, Any]], temperature: float) -> RolloutBatch:
    count = len(rows)
    versions = np.asarray([row["weight_version"] for row in rows], dtype=np.int32)
    reasons = [StopReason[row["stop_reason"].upper()] for row in rows]
    nothing = PromptBatch(batch_id=0, prompts=(), group_ids=np.zeros(0, dtype=np.int64))
    lengths = [len(row["token_ids"]) for row in rows]
    return RolloutBatch(
        prompts=nothing,
        sequences=TokenSequences(
            token_ids=_joined([row["token_ids"] for row in rows], np.int32),
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            prompt_lengths=np.asarray([row["prompt_length"] for row in rows], dtype=np.int32),
            loss_mask=_joined([row["response_mask"] for row in rows], np.bool_),
            group_ids=np.asarray([row["group_id"] for row in rows], dtype=np.int64),
        ),
        rollout_logprobs=_joined([row["rollout_logprobs"] for row in rows], np.float32),
        oldest_weight_version=versions,
        newest_weight_version=versions,
        stop_reasons=np.asarray(reasons, dtype=np.int8),
        response_texts=("",) * count,
        temperature=temperature,
    )


def _rewards(rows: Sequence[Mapping[str, Any]]) -> RewardBatch:
    count = len(rows)
    return RewardBatch(
        batch_id=0,
        rewards=np.asarray([row["reward"] for row in rows], dtype=np.float32),
        accuracies=np.asarray([row["accuracy"] for row in rows], dtype=np.float32),
        components={},
        reasons=("",) * count,
        extracted_answers=("",) * count,
    )


@torch.no_grad()
def _score(
    model: Any, token_ids: Sequence[int], start: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and squared score norms of the sequence, 0 before `start`."""
    tokens = torch.tensor(token_ids)
    hidden = model.get_decoder()(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
    result = token_logprobs(
        hidden,
        model.get_output_embeddings().weight,
        tokens[start:],
        temperature=temperature,
        chunk_tokens=256,
    )
    before = torch.zeros(start)
    return torch.cat([before, result.logprobs]), torch.cat([before, result.squared_score_norms])


def compare(batch: StoredBatch, preset: AlgorithmConfig) -> dict[str, float]:
    """Return the row of one preset."""
    inputs = batch.inputs(preset)
    mask = inputs.response_mask
    longest = GenerationConfig(max_tokens=mask.shape[1], min_tokens=0)
    # Some presets are refused where a batch has one update: live and old policy are the same then.
    config = RunConfig(
        algorithm=preset, generation=longest, policy=PolicyConfig(num_mini_batches=2)
    )
    advantages = estimate_advantages(config, inputs).advantages

    assert inputs.old_logprobs is not None
    assert inputs.squared_score_norms is not None
    live = ResponsePadding.of(batch.rollouts.sequences).pad(batch.live)
    ratios = log_ratios(preset.objective.ratio, live, inputs.old_logprobs, mask)
    token = log_ratios("token", live, inputs.old_logprobs, mask).exp()[mask]
    weights = gradient_coefficient(
        preset.objective.weight,
        ratios,
        advantages,
        logprobs=live,
        response_mask=mask,
        **preset.objective.parameters,
    )[mask]

    sizes = advantages[mask].abs()
    distance = ((weights - token).abs() * sizes).sum()
    bias_proxy = distance / (token * sizes).sum().clamp(min=1e-30)

    lengths = mask.sum(1, keepdim=True).clamp(min=1).expand_as(mask)[mask]
    steps = weights * advantages[mask] / (lengths if preset.aggregation == "sequence_mean" else 1)
    total = float(steps.abs().sum())
    noise = math.nan
    if total:
        moment = (steps.square() * inputs.squared_score_norms[mask]).sum()
        noise = float(len(steps) * moment) / total**2
    return {
        "mean w": float(weights.mean()),
        "max w": float(weights.max()),
        "no gradient": float((weights == 0).double().mean()),
        "ESS": float(effective_sample_size(weights.clamp(min=1e-30).log())),
        "bias proxy": float(bias_proxy),
        "noise": noise,
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table with a row per preset."""
    names = list(next(iter(rows.values())))
    lines = ["| preset | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {preset} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |"
        for preset, row in rows.items()
    ]
    return "\n".join(lines)


def draw(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw four panels.

    They show the weights over the ratio for both signs of the advantage, each preset's bias and
    effective sample size, and the variance of importance weights over the length.
    """
    from matplotlib import pyplot

    figure, ((up, down), (batch, length)) = pyplot.subplots(
        2, 2, figsize=(12, 9), layout="constrained"
    )
    for axis, sign, title in ((up, 1.0, "advantage above 0"), (down, -1.0, "advantage below 0")):
        _draw_weights(axis, sign)
        axis.set_title(f"Effective weight, {title}")
    up.legend(fontsize=8)

    places = range(len(rows))
    batch.barh(
        [place - 0.2 for place in places],
        [row["ESS"] for row in rows.values()],
        0.4,
        label="effective sample size",
    )
    batch.barh(
        [place + 0.2 for place in places],
        [row["bias proxy"] for row in rows.values()],
        0.4,
        label="bias proxy",
    )
    batch.set_yticks(list(places), list(rows), fontsize=8)
    batch.invert_yaxis()
    batch.legend(fontsize=8)
    batch.set_title("Presets on this batch")

    lengths = [2**k for k in range(8)]
    variances = [importance_variances(tokens) for tokens in lengths]
    length.loglog(lengths, [product for product, _ in variances], "o-", label="product (unbiased)")
    length.loglog(lengths, [mean for _, mean in variances], "o-", label="geometric mean (biased)")
    length.set(
        xlabel="tokens of a response",
        ylabel="variance",
        title="Importance weight of a whole response",
    )
    length.legend(fontsize=8)

    for axis in (batch, length):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw_weights(axis: Any, sign: float) -> None:
    ratios = torch.logspace(math.log10(0.2), math.log10(5), 600, dtype=torch.float64)
    for i, name in enumerate(WEIGHTS.names()):
        coefficient = gradient_coefficient(name, ratios.log(), torch.full_like(ratios, sign))
        axis.plot(ratios, coefficient, label=name, linewidth=2.0, linestyle=("-", "--", ":")[i % 3])
    axis.set(xscale="log", ylim=(-0.1, 3.2), xlabel="ratio", ylabel="w")
    axis.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the presets; exit code 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts", type=Path)
    parser.add_argument(
        "--model",
        required=True,
        help="the policy after its updates: anything that --model.path takes",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature of the run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for objectives.md and objectives.png; default: beside the rollouts",
    )
    parsed = parser.parse_args(arguments)
    try:
        batch = load(parsed.rollouts, parsed.model, parsed.temperature)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    rows = {name: compare(batch, preset.algorithm) for name, preset in PRESETS.items()}
    output = parsed.output or parsed.rollouts.parent
    output.mkdir(parents=True, exist_ok=True)
    print(table(rows))
    (output / "objectives.md").write_text(table(rows) + "\n")
    draw(rows, output / "objectives.png")
    print(f"written to {output / 'objectives.md'} and {output / 'objectives.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
