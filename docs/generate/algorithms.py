"""docs/algorithms.md, generated from the docstrings of the library.

Run it with `python -m docs.generate.algorithms docs/algorithms.md`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from docs.generate.kl_gradient_table import step_table, table
from rlsys.algorithms.advantages import (
    available_advantage_estimators,
    estimator_needs,
    estimator_spec,
    get_advantage_estimator,
)
from rlsys.algorithms.entropy import entropy_rewards, tuned_temperature
from rlsys.algorithms.kl import (
    KL_KINDS,
    adapted_coefficient,
    adapted_penalty,
    exact_token_kl,
    kl_estimate,
    kl_loss,
    kl_rewards,
    old_policy_kl,
)
from rlsys.algorithms.loss_aggregation import AGGREGATION_MODES, aggregate_loss
from rlsys.algorithms.policy_objectives import (
    gradient_coefficient,
    levels_of,
    off_policy_sequence_mask,
    responses_within_kl,
    rollout_correction,
)
from rlsys.algorithms.policy_objectives.ratios import RATIOS, importance_variances
from rlsys.algorithms.policy_objectives.weights import WEIGHTS
from rlsys.config import AlgorithmConfig
from rlsys.config.presets import PRESETS
from rlsys.registry import keyword_parameters

INTRODUCTION = """# Algorithms

Generated from the docstrings in `rlsys/algorithms` by `make docs`; a test keeps it current. An
update consists of pieces that are chosen independently:

    advantage estimator  x  ratio level  x  weight function  x  aggregation  x  KL placement

Each piece is a pure function of padded `[B, T]` tensors of response tokens and a mask, and is set
from the config or the command line (`--algorithm.advantage.name rloo --algorithm.objective.weight
cispo`). Everything returns 0 outside the mask. A preset is a row of settings and nothing else.

`values` come from a critic ([PPO](ppo.md)); without one `gae` runs with V = 0. `token_rewards` are
the sum of a KL and an entropy in the reward and of the
[rewards of steps](rewards.md#rewards-of-steps), which come with `step_ends`.

Published methods that are left out: staleness-adaptive trust regions (arXiv:2607.18722), which
contract the clip range of the tokens with the largest log-ratios by a kernel whose formula no
source at hand gives (accounts of it disagree); the top-K approximation of DPPO, which needs the
engine's probabilities of K tokens; BNPO's decomposition of several rewards.

The evidence is in `tests/unit/algorithms/`: golden numbers, slow reference implementations and edge
cases of each module in a file of its name, and exact expectations over policies whose responses can
be enumerated in `test_kl.py` and `test_enumerable_policies.py`.
"""

SCHULMAN = """### Schulman's experiment

Samples of q = N(0, 1); bias and standard deviation of the estimates of KL(q, p), over the true
value. `test_schulmans_experiment` checks them.
"""

KL_GRADIENTS = """### Which estimator has which gradient where

Relative error of the expected gradient to that of the KL that a row names (the KL of whole
responses), by enumeration (`docs/generate/kl_gradient_table.py`): a random policy over three tokens
of which one ends a response, far from its reference; responses of one token, or of up to three
(whole); samples of the live policy, or of an older one (stale). The cosine is that of `whole`.
Terms are summed over tokens. **0** is at most 1e-12. A run refuses a row marked so before it
starts, with the reason. The reward's KL on stale samples is corrected by the ratio of the
objective, together with the reward.
"""

KL_READING = """
How to read it (Tang and Munos 2025):

- In the reward k1 is exact over whole responses, and no other kind is right.
- In the loss k2 and k3_k2 are exact for one token. Over whole responses they lack the effect of a
  token on the KL of later tokens, and on stale samples the ratio. `level: sequence` with k2 lacks
  neither on-policy.
- k3 in the loss, GRPO's, is the gradient of the *forward* KL of each position (its error to that is
  0 for one token and 0.21 over these responses). It vanishes at the reference as well, and is the
  published default.
- `importance_ratio: prefix` makes k1 and k3 exact over whole responses and on stale samples,
  `product` everything at level `sequence`, at the price of the variance of such products; `token`,
  as in DeepSeek-V3.2, is exact for one token.
- The forward direction has the gradient of its KL only with an importance ratio.

Exact gradient steps of a policy that starts near its reference and has no other reward:
"""

EXPLOSION = """## Why a product of ratios is not used for long responses

T independent tokens over a vocabulary of two, the live policy's logit 0.6 above the old one's at
every token: exact variance of the importance weight of a whole response, by enumeration
(`test_the_product_explodes_and_the_geometric_mean_does_not`). The product (`product`, unbiased)
grows as E[rho^2]^T - 1; the geometric mean (`sequence`, biased) shrinks with T.
"""


FIGURE = """## All presets on one batch

![Weights, presets on a stored batch, variance over length](images/objectives.png)

Drawn by `python -m benchmarks.compare_objectives`, which also prints a table of effective weights,
bias proxy, effective sample size and gradient noise for every preset on any stored rollout batch.
The batch here is the first of a run of `recipes.dapo_math`, under the policy three steps (six
updates) later.
"""


def reference() -> str:
    """Return the page."""
    lines = [INTRODUCTION, "## Presets\n", *_presets(), "", *_coefficients(), ""]
    lines += [
        "## Advantage estimators\n",
        "`algorithm.advantage.name`; keyword parameters as "
        "`algorithm.advantage.parameters.<name>`.\n",
    ]
    for name in _of_the_library(available_advantage_estimators(), get_advantage_estimator):
        reads = [f"{need}, where there are some" for need in estimator_spec(name).reads]
        needs = ", ".join(sorted(estimator_needs(name)) + sorted(reads))
        lines += _section(
            name,
            get_advantage_estimator(name),
            _used_by(lambda preset: preset.advantage.name, name),
            needs,
        )
    lines += [
        "## Ratio levels\n",
        "`algorithm.objective.ratio`.\n",
        _block(inspect.getmodule(RATIOS.get("token"))),
    ]
    lines += [
        f"- `{name}`: {_users(_used_by(lambda preset: preset.objective.ratio, name))}"
        for name in _of_the_library(RATIOS.names(), RATIOS.get)
    ]
    lines += [
        "",
        "## Weight functions\n",
        "`algorithm.objective.weight`; any weight with any ratio, unless it names its own.\n",
    ]
    for name in _of_the_library(WEIGHTS.names(), WEIGHTS.get):
        lines += _section(
            name,
            WEIGHTS.get(name),
            _used_by(lambda preset: preset.objective.weight, name),
            levels=", ".join(levels_of(name) or ()),
        )
    lines += [
        "### The coefficient itself\n",
        _block(gradient_coefficient),
        "## Mismatch between engine and trainer\n",
        _block(rollout_correction),
        "### Responses far from the sampler\n",
        "`algorithm.rollout_correction.max_sequence_kl` and `sequence_kl`.\n",
        _block(responses_within_kl),
        "### Far responses with a negative advantage\n",
        "`algorithm.rollout_correction.off_policy_mask`.\n",
        _block(off_policy_sequence_mask),
    ]
    lines += ["## Aggregation\n", _block(aggregate_loss)]
    lines += [
        f"- `{mode}`: {_users(_used_by(lambda preset: preset.aggregation, mode))}"
        for mode in AGGREGATION_MODES
    ]
    lines += [
        "",
        "## KL to the reference\n",
        _block(kl_estimate),
        SCHULMAN,
        *_schulman(),
        "",
        "### In the loss\n",
        _block(kl_loss),
        "### In the reward\n",
        _block(kl_rewards),
        KL_GRADIENTS,
        *table(),
        KL_READING,
        *step_table(),
        "",
        "### Exact, over the vocabulary\n",
        "`algorithm.kl.kind: exact`. The reference sends its last hidden states at the sampled "
        "tokens, and the policy computes both distributions in chunks. With placement loss, the "
        "loss has the gradient of the KL at each position. With placement reward, the KL of a "
        "position is also a cost in the reward of the tokens before it, which together is the "
        "gradient of the KL of whole responses; the estimator must be unbiased and on the "
        "reward's own scale (`rloo`, `reinforce`, `remax`, ...). Cost: one more product with each "
        "LM head, and the hidden states in the object store.\n",
        _block(exact_token_kl),
        "### Adaptive coefficient\n",
        _block(adapted_coefficient),
        "## KL to the old policy\n",
        "`algorithm.kl_old`: a penalty in the loss, beside any objective.\n",
        _block(old_policy_kl),
        _block(adapted_penalty),
    ]
    lines += [
        "## Entropy\n",
        "### In the reward\n",
        _block(entropy_rewards),
        "### Its temperature\n",
        _block(tuned_temperature),
    ]
    lines += [EXPLOSION, *_explosion(), "", FIGURE]
    return "\n".join(lines) + "\n"


def _of_the_library(names: Iterable[str], get: Callable[[str], Any]) -> list[str]:
    """Return the names that no plug-in registered.

    The page must not depend on the modules that this process has imported.
    """
    return [name for name in names if get(name).__module__.startswith("rlsys.")]


def _block(thing: Any) -> str:
    """Return a docstring as a block of text, so that formulas keep their layout."""
    text = inspect.getdoc(thing)
    assert text is not None
    return "```text\n" + text + "\n```\n"


def _section(
    name: str,
    function: Callable[..., Any],
    users: Iterable[str],
    needs: str = "",
    levels: str = "",
) -> Iterator[str]:
    """Yield heading, facts and docstring of a registered function."""
    parameters = ", ".join(
        f"`{key} = {value.default!r}`" for key, value in keyword_parameters(function).items()
    )
    facts = [f"Parameters: {parameters or 'none'}."]
    if needs:
        facts.append(f"Reads: {needs}.")
    if levels:
        facts.append(f"Ratio levels: {levels}.")
    facts.append(f"Presets: {_users(users)}.")

    yield f"### {name}\n"
    yield " ".join(facts) + "\n"
    yield _block(function)


def _used_by(part: Callable[[AlgorithmConfig], str], name: str) -> list[str]:
    return [preset for preset, settings in PRESETS.items() if part(settings.algorithm) == name]


def _users(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _presets() -> Iterator[str]:
    yield "| preset | estimator | ratio | weight | aggregation | KL | more |"
    yield "|---|---|---|---|---|---|---|"
    for name, published in PRESETS.items():
        preset = published.algorithm
        kl = "none"
        if preset.kl.coefficient:
            kl = f"{preset.kl.coefficient:g} {preset.kl.estimator} in the {preset.kl.placement}"
            if preset.kl.level == "sequence":
                kl += ", whole responses"

        more = []
        if preset.dynamic_sampling.max_rounds > 1:
            more.append(f"dynamic sampling, {preset.dynamic_sampling.max_rounds} rounds")
        if preset.kl_old.coefficient:
            more.append(f"KL to the old policy {preset.kl_old.coefficient:g}")
        if published.critic:
            more.append("critic")

        estimator = _with(preset.advantage.name, preset.advantage.parameters)
        weight = _with(preset.objective.weight, preset.objective.parameters)
        yield (
            f"| `{name}` | {estimator} | {preset.objective.ratio} | {weight} "
            f"| {preset.aggregation} | {kl} | {'; '.join(more)} |"
        )


def _with(name: str, parameters: Mapping[str, Any]) -> str:
    """Return a name with its parameters, if there are any."""
    if not parameters:
        return name
    return f"{name} {yaml.safe_dump(dict(parameters), default_flow_style=True).strip()}"


def _coefficients() -> Iterator[str]:
    """Yield a table of the coefficient of each weight before A grad log pi, at some ratios."""
    ratios = (0.25, 0.5, 0.9, 1.0, 1.1, 2.0, 4.0)
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    yield (
        "Effective weight w(rho, A) before A grad log pi, with default parameters, of a response "
        "of one token with the live probability 0.22; A = 1 / A = -1 where they differ:\n"
    )
    yield "| weight | " + " | ".join(f"rho {ratio:g}" for ratio in ratios) + " |"
    yield "|---" * (len(ratios) + 1) + "|"
    for name in _of_the_library(WEIGHTS.names(), WEIGHTS.get):
        up, down = (
            gradient_coefficient(name, logs, torch.full_like(logs, sign)).tolist()
            for sign in (1.0, -1.0)
        )
        cells = [
            f"{abs(a):.2f}" if abs(a - b) < 0.005 else f"{abs(a):.2f} / {abs(b):.2f}"
            for a, b in zip(up, down, strict=True)
        ]
        yield f"| `{name}` | " + " | ".join(cells) + " |"


def _schulman(samples: int = 4_000_000) -> Iterator[str]:
    x = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    yield "| estimator | N(0.1, 1): bias | deviation | N(1, 1): bias | deviation |"
    yield "|---|---|---|---|---|"
    for kind in KL_KINDS[:3]:
        cells = []
        for mean in (0.1, 1.0):
            estimate = kl_estimate(-(x**2) / 2, -((x - mean) ** 2) / 2, kind) / (mean**2 / 2)
            cells += [f"{float(estimate.mean()) - 1:+.2f}", f"{float(estimate.std()):.2f}"]
        yield f"| `{kind}` | " + " | ".join(cells) + " |"


def _explosion() -> Iterator[str]:
    yield "| tokens | variance of the product | variance of the geometric mean |"
    yield "|---|---|---|"
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        product, mean = importance_variances(tokens)
        yield f"| {tokens} | {product:.3g} | {mean:.3g} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
