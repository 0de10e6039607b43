"""Variance and bias of the policy gradient under each baseline, by Monte Carlo.

The policies are so small that their exact gradient is known. Tables and figure of
docs/hierarchical_log.md, 5 minutes:

    python -m benchmarks.hierarchical_variance

A rough look:

    python -m benchmarks.hierarchical_variance --repeats 0.1

The table by group size at another drift, alone:

    python -m benchmarks.hierarchical_variance --drift 0.7

Fewer rows, smaller errors:

    python -m benchmarks.hierarchical_variance --drift 0.3 --groups 16 --policies 512

A policy over 3 tokens and 5 positions shares its parameters between positions, so that it has the
covariance which the derivation neglects. Its sampler is another policy. There are three settings:

    learned    the policy is a step along the exact gradient ahead of its sampler; the reward is the
               fraction of one token
    counted    the same reward, but policy and sampler differ at random
    noise      they differ at random, every response has its own random reward and responses end
               early

Measured is the error of the gradient, averaged over a group, against the exact one:
E ||g - exact||^2 over that of the leave-one-out mean, and the length of the mean error in units of
its standard error, which is about 1 without bias.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, hierarchical_advantages
from rlsys.algorithms.advantages.hierarchical.diagnostics import plain_baseline
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons
from tests.support.enumerable_policy import ResponseSpace

SETTINGS: tuple[str, ...] = ("learned", "counted", "noise")
PLAIN = ("none", "group_mean", "opo", "optimal_token")
HORIZONS = ("final", "current", "current_and_final", "all")
FIRST_SEED = 1000  # the constants of the estimator were set on seeds below 200
GROUPS = (4, 8, 16, 64)
POLICIES = 64  # in every row: 64 batches of one prompt, or 4 of 16
FIGURE = Path("docs/images/hierarchical_variance.svg")
Weights = Callable[[AdvantageInputs], Tensor]  # -> [B, T]


@dataclass(frozen=True)
class Prompt:
    """A sampler, a policy and the reward of each response to one prompt."""

    space: ResponseSpace
    rollout: Tensor
    old: Tensor
    rewards: Tensor

    @staticmethod
    def of(setting: str, drift: float, seed: int) -> Prompt:
        """Return the prompt of a setting; `drift` is that of the logits, in deviations."""
        generator = torch.Generator().manual_seed(seed)
        space = ResponseSpace.of(3, 5, context="previous_token", end_token=setting == "noise")
        rollout = space.random_logits(generator)
        rewards = torch.randn(len(space.tokens), generator=generator, dtype=torch.float64)
        if setting != "noise":
            rewards = (space.tokens == 1).double().mean(1)

        step = space.random_logits(generator)
        if setting == "learned":
            step = space.gradient(rollout, rewards).reshape(rollout.shape)
            step = step / step.std()
        return Prompt(space, rollout, rollout + drift * step, rewards)

    def room(self, horizons: str = "current_and_final") -> tuple[float, float]:
        """Return the exact variance of one response under two baselines.

        The first has the best coefficients of those horizons, the second is the true mean reward.
        """
        chance = self.space.probabilities(self.rollout)
        ratios = (self.space.logprobs(self.old) - self.space.logprobs(self.rollout)).cumsum(1).exp()
        scores = self.space.scores(self.old)
        plain = ratios[:, -1] * (self.rewards - chance @ self.rewards)

        # The exact weighted least squares of each position, with all responses as the data.
        positions = torch.arange(ratios.shape[1])
        chosen = Horizons.of(horizons, len(positions), 1, ratios.device)
        x = chosen.features(ratios[None], positions)[0]  # [t, S, p]
        weighted = (x * (chance * scores.square().sum(2).T)[..., None]).transpose(1, 2)
        beta = torch.linalg.pinv(weighted @ x, hermitian=True) @ (weighted @ plain)[..., None]
        best = plain[:, None] - (x @ beta)[..., 0].T
        exact = self.space.gradient(self.old, self.rewards)

        def variance(weights: Tensor) -> float:
            error = torch.einsum("sl,slp->sp", weights, scores) - exact
            return float(chance @ error.square().sum(1))

        return variance(best), variance(plain[:, None].expand_as(best))


def plain(name: str) -> Weights:
    """Return a plain baseline as a function of a batch of equal groups."""

    def weights(batch: AdvantageInputs) -> Tensor:
        groups = len(batch.group_ids.unique())
        assert batch.old_logprobs is not None
        assert batch.rollout_logprobs is not None
        assert batch.squared_score_norms is not None
        logs = (batch.old_logprobs - batch.rollout_logprobs).sum(1)
        final = logs.exp().unflatten(0, (groups, -1))
        rewards = batch.rewards.unflatten(0, (groups, -1))
        norms = batch.squared_score_norms.unflatten(0, (groups, -1))
        present = torch.ones_like(rewards, dtype=torch.bool)
        found = plain_baseline(name, rewards, final, norms, present)
        return found.flatten(0, 1) * batch.response_mask

    return weights


def hierarchical(horizons: str) -> Weights:
    """Return the hierarchical baseline as a function of a batch."""

    def weights(batch: AdvantageInputs) -> Tensor:
        output = hierarchical_advantages(batch, horizons=horizons, diagnostics=False)
        return output.advantages.double()

    return weights


def errors(
    prompts: list[Prompt], size: int, repeats: int, methods: list[Weights], seed: int
) -> Tensor:
    """Return errors of the gradient: its average over the group minus the exact one.

    Shapes:
        result: [repeats, methods, prompts, parameters].
    """
    generator = torch.Generator().manual_seed(seed)
    exact = torch.stack([p.space.gradient(p.old, p.rewards) for p in prompts])
    tables = [
        (
            p.space.probabilities(p.rollout),
            p.space.logprobs(p.rollout),
            p.space.logprobs(p.old),
            p.space.scores(p.old),
        )
        for p in prompts
    ]
    ids = torch.arange(len(prompts)).repeat_interleave(size)
    found = []
    for _ in range(repeats):
        drawn = [
            torch.multinomial(table[0], size, replacement=True, generator=generator)
            for table in tables
        ]
        from_prompts = list(zip(prompts, drawn, strict=True))
        from_tables = list(zip(tables, drawn, strict=True))
        scores = torch.stack([table[3][rows] for table, rows in from_tables])
        batch = AdvantageInputs(
            rewards=torch.cat([prompt.rewards[rows] for prompt, rows in from_prompts]),
            response_mask=torch.cat([prompt.space.mask[rows] for prompt, rows in from_prompts]),
            group_ids=ids,
            rollout_logprobs=torch.cat([table[1][rows] for table, rows in from_tables]),
            old_logprobs=torch.cat([table[2][rows] for table, rows in from_tables]),
            squared_score_norms=scores.square().sum(3).flatten(0, 1),
        )

        weights = torch.stack([method(batch) for method in methods])
        weights = weights.unflatten(1, (len(prompts), size))
        found.append(torch.einsum("mkgt,kgtp->mkp", weights, scores) / size - exact)
    return torch.stack(found)


def measure(
    setting: str,
    drift: float,
    prompts: int,
    size: int,
    methods: list[Weights],
    repeats: float,
    policies: int = POLICIES,
) -> tuple[list[str], float]:
    """Return `ratio ± error` of each method to the first, and the largest standardised bias.

    A batch has `prompts` of the policies.
    """
    drawn_policies = [Prompt.of(setting, drift, FIRST_SEED + k) for k in range(policies)]
    batches = [drawn_policies[k : k + prompts] for k in range(0, policies, prompts)]
    number = max(3, round(repeats * 40))
    drawn = [errors(batch, size, number, methods, seed) for seed, batch in enumerate(batches)]
    squares = torch.cat([e.square().sum(3).mean(0) for e in drawn], dim=1)  # [m, policies]
    ratio = squares.sum(1) / squares[0].sum()
    # Between policies, which differ more than the batches of one.
    spread = (squares - ratio[:, None] * squares[0]).std(1) * policies**0.5 / squares[0].sum()

    biases = torch.stack([standardised_bias(e) for e in drawn]).mean(0)
    largest = float(biases[1:].max().sqrt())
    pairs = zip(ratio[1:].tolist(), spread[1:].tolist(), strict=True)
    return [f"{value:.3f} ± {error:.3f}" for value, error in pairs], largest


def standardised_bias(error: Tensor) -> Tensor:
    """Return [m] squared lengths of the mean error over their expectation without bias.

    The expectation is the variance over N.

    Shapes:
        error: [N, m, prompts, P].
    """
    mean = error.mean(0)
    return len(error) * mean.square().sum((1, 2)) / error.var(0).sum((1, 2))


def room(
    setting: str, drift: float, horizons: str = "current_and_final", policies: int = POLICIES
) -> float:
    """Return `Prompt.room` as a ratio."""
    both = [Prompt.of(setting, drift, FIRST_SEED + k).room(horizons) for k in range(policies)]
    return sum(best for best, _ in both) / sum(mean for _, mean in both)


def by_group_size(repeats: float, drift: float, sizes: Sequence[int], policies: int) -> None:
    """Print the table of variance ratios by group size."""
    methods = [plain("leave_one_out"), *(hierarchical(name) for name in HORIZONS)]
    print(f"| setting | prompts | group | {' | '.join(HORIZONS)} | largest bias |")
    print(f"{'|---' * (len(HORIZONS) + 4)}|", flush=True)
    for setting in SETTINGS:
        rooms = " | ".join(f"{room(setting, drift, name, policies):.2f}" for name in HORIZONS)
        print(f"| {setting} | | room | {rooms} | |", flush=True)
        for prompts in (1, 16):
            for size in sizes:
                times = repeats if size < 64 else repeats / 2
                cells, bias = measure(setting, drift, prompts, size, methods, times, policies)
                row = " | ".join(cells)
                print(f"| {setting} | {prompts} | {size} | {row} | {bias:.2f} |", flush=True)


def by_drift(repeats: float) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Print the table of variance ratios by drift, and return its lines for the figure."""
    baselines = [plain(name) for name in ("leave_one_out", *PLAIN)]
    methods = [*baselines, hierarchical("current_and_final")]
    names = (*PLAIN, "current_and_final")
    print(f"\n| setting | drift | room | prompts | {' | '.join(names)} |")
    print(f"{'|---' * (len(names) + 4)}|", flush=True)
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for setting in SETTINGS:
        for drift in (0.0, 0.1, 0.3, 0.5, 0.7):
            best = room(setting, drift)
            for prompts in (1, 16):
                cells, _ = measure(setting, drift, prompts, 16, methods, repeats)
                row = " | ".join(cells)
                print(f"| {setting} | {drift} | {best:.2f} | {prompts} | {row} |", flush=True)
                ratio = float(cells[-1].split()[0])
                lines.setdefault((setting, prompts), []).append((drift, ratio))
    return lines


def draw(lines: dict[tuple[str, int], list[tuple[float, float]]]) -> str:
    """Return an SVG of variance ratio over drift, one line per setting and number of prompts."""
    colours = dict(zip(SETTINGS, ("#1f77b4", "#2ca02c", "#d62728"), strict=True))
    top = max(1.05, *(math.ceil(20 * r) / 20 for line in lines.values() for _, r in line))
    bottom = min(math.floor(20 * r) / 20 for line in lines.values() for _, r in line)

    def at(drift: float, ratio: float) -> str:
        return f"{60 + 430 * drift / 0.7:.1f},{30 + 260 * (top - ratio) / (top - bottom):.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="700" height="350"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="700" height="350" fill="white"/>',
        '<text x="60" y="18">variance over that of the leave-one-out mean, groups of 16,'
        " current_and_final</text>",
    ]
    for step in range(round(bottom * 20), round(top * 20) + 1, 2):
        start, end = at(0, step / 20), at(0.7, step / 20)
        colour = "#000" if step == 20 else "#ddd"
        parts.append(f'<polyline points="{start} {end}" stroke="{colour}" fill="none"/>')
        y = float(start.split(",")[1]) + 4
        parts.append(f'<text x="52" y="{y:.1f}" text-anchor="end">{step / 20:.2f}</text>')
    for drift in (0.0, 0.1, 0.3, 0.5, 0.7):
        x = at(drift, 1).split(",")[0]
        parts.append(f'<text x="{x}" y="308" text-anchor="middle">{drift}</text>')
    parts.append('<text x="275" y="330" text-anchor="middle">drift of the logits</text>')
    for row, ((setting, prompts), line) in enumerate(lines.items()):
        style = f'stroke="{colours[setting]}" stroke-width="2" fill="none"'
        if prompts == 1:
            style += ' stroke-dasharray="5 4"'
        parts.append(f'<polyline points="{" ".join(at(*point) for point in line)}" {style}/>')

        y = 50 + 22 * row
        label = f"{setting}, {prompts} prompt{'s' * (prompts > 1)}"
        parts.append(
            f'<polyline points="510,{y} 545,{y}" {style}/><text x="552" y="{y + 4}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Print the tables and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=float, default=1.0, help="times as many batches as by default"
    )
    parser.add_argument("--drift", type=float, help="only the table by group size, at this drift")
    parser.add_argument(
        "--groups", type=int, nargs="+", default=GROUPS, help="sizes of groups in that table"
    )
    parser.add_argument(
        "--policies",
        type=int,
        default=POLICIES,
        help="policies in each of its rows, a multiple of 16",
    )
    given = parser.parse_args()

    if given.policies < 32 or given.policies % 16:
        parser.error(f"--policies: {given.policies} must be a multiple of 16, at least 32")
    drift = 0.3 if given.drift is None else given.drift
    by_group_size(given.repeats, drift, given.groups, given.policies)
    if given.drift is None:
        FIGURE.write_text(draw(by_drift(given.repeats)))


if __name__ == "__main__":
    main()
