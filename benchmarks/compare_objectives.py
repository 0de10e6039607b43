"""All presets on one stored rollout batch: what each makes of the same responses once the policy has moved.

    python -m benchmarks.compare_objectives runs/NAME/rollouts/step_000001.parquet --model runs/NAME/checkpoints/step_000020

The rollout file tells tokens, rewards and the log-probabilities at sampling; the model is the policy that has moved on. Prints a
table and writes it with a figure beside the rollouts (`--output`). Nothing is trained, and Ray is not started.

    mean w, max w    effective weight w(rho, A) before A grad log pi, over tokens
    no gradient      share of tokens whose weight is 0
    ESS              effective sample size of the weights, (sum w)^2 / (n sum w^2)
    bias proxy       sum |w - rho| |A| / sum rho |A|, rho the token's own ratio: distance from the full token-level correction
    noise            N sum x^2 g^2 / (sum |x|)^2 with x = w A / (the aggregation's denominator) and g^2 the squared score with respect
                     to the logits: second moment of the gradient against its size, so that presets with other scales compare
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
import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, get_advantage_estimator
from rlsys.algorithms.kl import kl_rewards
from rlsys.algorithms.policy_objectives import (
    effective_sample_size,
    gradient_coefficient,
    log_ratios,
)
from rlsys.algorithms.policy_objectives.ratios import importance_variances
from rlsys.algorithms.policy_objectives.weights import WEIGHTS
from rlsys.algorithms.token_logprobs import token_logprobs
from rlsys.config import AlgorithmConfig
from rlsys.config.presets import PRESETS
from rlsys.data.rollout_files import read_rollouts
from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm

matplotlib.use("Agg")


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """A rollout batch and the policy that has moved since, padded [B, T]."""

    inputs: AdvantageInputs
    live_logprobs: Tensor

    @property
    def mask(self) -> Tensor:
        return self.inputs.response_mask


def load(path: Path, model_path: str, temperature: float) -> StoredBatch:
    """The responses of a rollout file under the model's policy.

    Raises:
        ValueError: the file is no rollout file, or holds no response.
    """
    if not path.is_file():
        raise ValueError(
            f"rollouts: there is no file {path}. A run writes them as runs/NAME/rollouts/step_*.parquet."
        )
    rows = [row for row in read_rollouts(path) if row.get("trained", True)]
    if not rows or "rollout_logprobs" not in rows[0]:
        raise ValueError(f"rollouts: {path} is not a rollout file, or holds no trained response")
    model = load_causal_lm(
        resolve_model(model_path), dtype=torch.float32, attention="sdpa", trust_remote_code=False
    )
    width = max(len(row["token_ids"]) - row["prompt_length"] for row in rows)
    arrays = {
        name: torch.zeros(len(rows), width) for name in ("old", "rollout", "ref", "live", "norms")
    }
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start, length = row["prompt_length"], len(row["token_ids"]) - row["prompt_length"]
        live, norms = _score(model, row["token_ids"], start, temperature)
        old = row["old_logprobs"] or row["rollout_logprobs"]
        values = {"old": old, "rollout": row["rollout_logprobs"], "ref": row["ref_logprobs"] or old}
        for name, value in values.items():
            arrays[name][i, :length] = torch.tensor(value[start:])
        arrays["live"][i, :length], arrays["norms"][i, :length] = live, norms
        mask[i, :length] = torch.tensor(row["response_mask"][start:])
    inputs = AdvantageInputs(
        rewards=torch.tensor([row["reward"] for row in rows]),
        response_mask=mask,
        group_ids=torch.tensor([row["group_id"] for row in rows]),
        rollout_logprobs=arrays["rollout"],
        old_logprobs=arrays["old"],
        ref_logprobs=arrays["ref"],
        score_norms=arrays["norms"],
    )
    return StoredBatch(inputs=inputs, live_logprobs=torch.where(mask, arrays["live"], 0.0))


@torch.no_grad()
def _score(
    model: Any, token_ids: Sequence[int], start: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and score norms of the tokens from `start` on."""
    tokens = torch.tensor(token_ids)
    hidden = model.get_decoder()(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
    result = token_logprobs(
        hidden,
        model.get_output_embeddings().weight,
        tokens[start:],
        temperature=temperature,
        chunk_tokens=256,
    )
    return result.logprobs, result.score_norms


def compare(batch: StoredBatch, preset: AlgorithmConfig) -> dict[str, float]:
    """The row of one preset."""
    mask, inputs = batch.mask, batch.inputs
    advantages = _advantages(batch, preset)
    assert inputs.old_logprobs is not None
    assert inputs.score_norms is not None
    ratios = log_ratios(preset.objective.ratio, batch.live_logprobs, inputs.old_logprobs, mask)
    token = log_ratios("token", batch.live_logprobs, inputs.old_logprobs, mask).exp()[mask]
    weights = gradient_coefficient(
        preset.objective.weight, ratios[mask], advantages[mask], **preset.objective.parameters
    )
    sizes = advantages[mask].abs()
    lengths = mask.sum(1, keepdim=True).clamp(min=1).expand_as(mask)[mask]
    steps = weights * advantages[mask] / (lengths if preset.aggregation == "sequence_mean" else 1)
    total = float(steps.abs().sum())
    return {
        "mean w": float(weights.mean()),
        "max w": float(weights.max()),
        "no gradient": float((weights == 0).double().mean()),
        "ESS": float(effective_sample_size(weights.clamp(min=1e-30).log())),
        "bias proxy": float(
            ((weights - token).abs() * sizes).sum() / (token * sizes).sum().clamp(min=1e-30)
        ),
        "noise": float(len(steps) * (steps.square() * inputs.score_norms[mask]).sum()) / total**2
        if total
        else math.nan,
    }


def _advantages(batch: StoredBatch, preset: AlgorithmConfig) -> Tensor:
    inputs, kl = batch.inputs, preset.kl
    token_rewards = None
    if kl.placement == "reward" and kl.coefficient:
        assert inputs.old_logprobs is not None
        assert inputs.ref_logprobs is not None
        token_rewards = kl_rewards(
            inputs.old_logprobs, inputs.ref_logprobs, batch.mask, kl.coefficient
        )
    changed = AdvantageInputs(
        **{
            **vars(inputs),
            "token_rewards": token_rewards,
            "kl_coefficient": kl.coefficient if kl.placement == "advantage" else 0.0,
        }
    )
    return get_advantage_estimator(preset.advantage.name)(
        changed, **preset.advantage.parameters
    ).advantages


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    names = list(next(iter(rows.values())))
    lines = ["| preset | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {preset} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |"
        for preset, row in rows.items()
    ]
    return "\n".join(lines)


def draw(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Weights against the ratio for both signs of the advantage, each preset's bias and effective sample size, importance weights over length."""
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
    """Exit code 0, or 2 for bad input."""
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
