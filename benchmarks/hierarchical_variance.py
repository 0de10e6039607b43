"""Variance and bias of the policy gradient under each baseline, by Monte Carlo on policies whose gradient is known exactly.

    python -m benchmarks.hierarchical_variance                        tables and figure of docs/hierarchical_log.md, 5 min
    python -m benchmarks.hierarchical_variance --repeats 0.1          a rough look
    python -m benchmarks.hierarchical_variance --drift 0.7            the table by group size at another drift, alone
    python -m benchmarks.hierarchical_variance --drift 0.3 --groups 16 --policies 512       fewer rows, smaller errors

A policy over 3 tokens and 5 positions shares its parameters between positions, so that the covariance which the derivation neglects is there. Its
sampler is another policy. Three settings: `learned`, the policy is a step along the exact gradient ahead of its sampler and the reward is the share
of one token; `counted`, the same reward but the two differ at random; `noise`, they differ at random, every response has its own random reward and
responses end early. What is measured is the error of the gradient averaged over a group, against the exact one: E ||g - exact||^2 over that of the
leave-one-out mean, and the length of the mean error in units of its standard error, about 1 without bias.
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
    space: ResponseSpace
    rollout: Tensor
    old: Tensor
    rewards: Tensor

    @staticmethod
    def of(setting: str, drift: float, seed: int) -> Prompt:
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
        """Exact variance of one response with the best coefficients of those horizons, and with the true mean reward."""
        chance = self.space.probabilities(self.rollout)
        ratios = (self.space.logprobs(self.old) - self.space.logprobs(self.rollout)).cumsum(1).exp()
        scores = self.space.scores(self.old)
        plain = ratios[:, -1] * (self.rewards - chance @ self.rewards)
        positions = torch.arange(ratios.shape[1])
        x = Horizons.of(horizons, len(positions), 1, ratios.device).features(
            ratios[None], positions
        )[0]  # [t, S, p]
        weighted = (x * (chance * scores.square().sum(2).T)[..., None]).transpose(1, 2)
        beta = torch.linalg.pinv(weighted @ x, hermitian=True) @ (weighted @ plain)[..., None]
        best = plain[:, None] - (x @ beta)[..., 0].T
        exact = self.space.gradient(self.old, self.rewards)
        errors = [
            torch.einsum("sl,slp->sp", w, scores) - exact
            for w in (best, plain[:, None].expand_as(best))
        ]
        return tuple(float(chance @ error.square().sum(1)) for error in errors)  # type: ignore[return-value]


def plain(name: str) -> Weights:
    """A baseline of `baseline_variance` as a function of a batch of equal groups."""

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
    return lambda batch: hierarchical_advantages(
        batch, horizons=horizons, diagnostics=False
    ).advantages.double()


def errors(
    prompts: list[Prompt], size: int, repeats: int, methods: list[Weights], seed: int
) -> Tensor:
    """[repeats, methods, prompts, parameters] gradient averaged over the group less the exact one."""
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
        scores = torch.stack([table[3][d] for table, d in zip(tables, drawn, strict=True)])
        batch = AdvantageInputs(
            rewards=torch.cat([p.rewards[d] for p, d in zip(prompts, drawn, strict=True)]),
            response_mask=torch.cat([p.space.mask[d] for p, d in zip(prompts, drawn, strict=True)]),
            group_ids=ids,
            rollout_logprobs=torch.cat(
                [table[1][d] for table, d in zip(tables, drawn, strict=True)]
            ),
            old_logprobs=torch.cat([table[2][d] for table, d in zip(tables, drawn, strict=True)]),
            squared_score_norms=scores.square().sum(3).flatten(0, 1),
        )
        weights = torch.stack([method(batch) for method in methods]).unflatten(
            1, (len(prompts), size)
        )
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
    """`ratio ± error` of each method after the first to the first, and the largest standardised bias; `prompts` of the policies a batch."""
    made = [Prompt.of(setting, drift, FIRST_SEED + k) for k in range(policies)]
    batches = [made[k : k + prompts] for k in range(0, policies, prompts)]
    number = max(3, round(repeats * 40))
    drawn = [errors(batch, size, number, methods, seed) for seed, batch in enumerate(batches)]
    squares = torch.cat([e.square().sum(3).mean(0) for e in drawn], dim=1)  # [m, policies]
    ratio = squares.sum(1) / squares[0].sum()
    # between policies, which differ more than the batches of one
    spread = (squares - ratio[:, None] * squares[0]).std(1) * policies**0.5 / squares[0].sum()
    largest = float(torch.stack([standardised_bias(e) for e in drawn]).mean(0)[1:].max().sqrt())
    return [
        f"{r:.3f} ± {s:.3f}" for r, s in zip(ratio[1:].tolist(), spread[1:].tolist(), strict=True)
    ], largest


def standardised_bias(error: Tensor) -> Tensor:
    """[N, m, prompts, P] errors -> [m] squared length of the mean error over what it would be without bias, the variance over N."""
    mean = error.mean(0)
    return len(error) * mean.square().sum((1, 2)) / error.var(0).sum((1, 2))


def room(
    setting: str, drift: float, horizons: str = "current_and_final", policies: int = POLICIES
) -> float:
    """`Prompt.room` as a ratio."""
    both = [Prompt.of(setting, drift, FIRST_SEED + k).room(horizons) for k in range(policies)]
    return sum(best for best, _ in both) / sum(mean for _, mean in both)


def by_group_size(repeats: float, drift: float, sizes: Sequence[int], policies: int) -> None:
    methods = [plain("leave_one_out"), *(hierarchical(name) for name in HORIZONS)]
    print(
        f"| setting | prompts | group | {' | '.join(HORIZONS)} | largest bias |\n{'|---' * (len(HORIZONS) + 4)}|",
        flush=True,
    )
    for setting in SETTINGS:
        rooms = " | ".join(f"{room(setting, drift, name, policies):.2f}" for name in HORIZONS)
        print(f"| {setting} | | room | {rooms} | |", flush=True)
        for prompts in (1, 16):
            for size in sizes:
                cells, bias = measure(
                    setting,
                    drift,
                    prompts,
                    size,
                    methods,
                    repeats if size < 64 else repeats / 2,
                    policies,
                )
                print(
                    f"| {setting} | {prompts} | {size} | {' | '.join(cells)} | {bias:.2f} |",
                    flush=True,
                )


def by_drift(repeats: float) -> dict[tuple[str, int], list[tuple[float, float]]]:
    methods = [
        plain("leave_one_out"),
        *(plain(name) for name in PLAIN),
        hierarchical("current_and_final"),
    ]
    names = (*PLAIN, "current_and_final")
    print(
        f"\n| setting | drift | room | prompts | {' | '.join(names)} |\n{'|---' * (len(names) + 4)}|",
        flush=True,
    )
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for setting in SETTINGS:
        for drift in (0.0, 0.1, 0.3, 0.5, 0.7):
            best = room(setting, drift)
            for prompts in (1, 16):
                cells, _ = measure(setting, drift, prompts, 16, methods, repeats)
                print(
                    f"| {setting} | {drift} | {best:.2f} | {prompts} | {' | '.join(cells)} |",
                    flush=True,
                )
                lines.setdefault((setting, prompts), []).append(
                    (drift, float(cells[-1].split()[0]))
                )
    return lines


def draw(lines: dict[tuple[str, int], list[tuple[float, float]]]) -> str:
    """An SVG of variance ratio over drift, one line a setting and number of prompts."""
    colours = dict(zip(SETTINGS, ("#1f77b4", "#2ca02c", "#d62728"), strict=True))
    top = max(1.05, *(math.ceil(20 * r) / 20 for line in lines.values() for _, r in line))
    bottom = min(math.floor(20 * r) / 20 for line in lines.values() for _, r in line)

    def at(drift: float, ratio: float) -> str:
        return f"{60 + 430 * drift / 0.7:.1f},{30 + 260 * (top - ratio) / (top - bottom):.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="700" height="350" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="700" height="350" fill="white"/>')
    parts.append(
        '<text x="60" y="18">variance over that of the leave-one-out mean, groups of 16, current_and_final</text>'
    )
    for step in range(round(bottom * 20), round(top * 20) + 1, 2):
        start, end = at(0, step / 20), at(0.7, step / 20)
        parts.append(
            f'<polyline points="{start} {end}" stroke="{"#000" if step == 20 else "#ddd"}" fill="none"/>'
        )
        parts.append(
            f'<text x="52" y="{float(start.split(",")[1]) + 4:.1f}" text-anchor="end">{step / 20:.2f}</text>'
        )
    for drift in (0.0, 0.1, 0.3, 0.5, 0.7):
        parts.append(
            f'<text x="{at(drift, 1).split(",")[0]}" y="308" text-anchor="middle">{drift}</text>'
        )
    parts.append('<text x="275" y="330" text-anchor="middle">drift of the logits</text>')
    for row, ((setting, prompts), line) in enumerate(lines.items()):
        style = f'stroke="{colours[setting]}" stroke-width="2" fill="none"' + (
            ' stroke-dasharray="5 4"' if prompts == 1 else ""
        )
        parts.append(f'<polyline points="{" ".join(at(*point) for point in line)}" {style}/>')
        y = 50 + 22 * row
        parts.append(
            f'<polyline points="510,{y} 545,{y}" {style}/><text x="552" y="{y + 4}">{setting}, {prompts} prompt{"s" * (prompts > 1)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
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
    by_group_size(
        given.repeats, 0.3 if given.drift is None else given.drift, given.groups, given.policies
    )
    if given.drift is None:
        FIGURE.write_text(draw(by_drift(given.repeats)))


if __name__ == "__main__":
    main()
