"""Losses of reward models."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.reward_modeling import (
    calibration_bins,
    centre_rewards,
    ranking_accuracy,
    ranking_loss,
    right_steps,
    step_loss,
)

KINDS = ("pairwise", "plackett_luce")


def rewards(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ranks(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def log1pexp(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize("kind", KINDS)
def test_two_responses_give_bradley_terry(kind: str):
    # log(1 + e^-1) = 0.313262; the second prompt has the worse response first: log(1 + e^2)
    loss = ranking_loss(rewards([1, 0], [2, 0]), ranks([0, 1], [1, 0]), kind=kind)
    assert float(loss) == pytest.approx((0.31326168751822286 + log1pexp(2)) / 2, abs=1e-12)


def test_all_pairs_of_a_prompt_count_together_as_one_prompt():
    # Prompt 1 has 3 pairs with differences 1, 2, 1, prompt 2 has one with -1.
    loss = ranking_loss(rewards([2, 1, 0], [0, 1, 9]), ranks([0, 1, 2], [0, 1, -1]))
    first = (2 * log1pexp(-1) + log1pexp(-2)) / 3
    assert float(loss) == pytest.approx((first + log1pexp(1)) / 2, abs=1e-12)


def test_the_margin_is_subtracted_from_each_difference():
    loss = ranking_loss(rewards([1, 0]), ranks([0, 1]), margin=1.0)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-12)


def test_plackett_luce_is_the_likelihood_of_the_order():
    # e^2/(e^2+e^1+e^0) * e^1/(e^1+e^0)
    total = math.e**2 + math.e + 1
    expected = -math.log(math.e**2 / total * math.e / (math.e + 1))
    loss = ranking_loss(rewards([1, 2, 0]), ranks([1, 0, 2]), kind="plackett_luce")
    assert float(loss) == pytest.approx(expected, abs=1e-12)


def test_the_likelihoods_of_all_orders_add_up_to_one():
    values = [0.3, -1.0, 2.0, 0.7]
    likelihoods = [
        math.exp(-float(ranking_loss(rewards(values), ranks([*order]), kind="plackett_luce")))
        for order in itertools.permutations(range(4))
    ]
    assert sum(likelihoods) == pytest.approx(1, abs=1e-12)


def test_ties_form_no_pair():
    # Only the pairs (0, 2) and (1, 2), with differences 3 and 1.
    loss = ranking_loss(rewards([3, 1, 0]), ranks([0, 0, 5]))
    assert float(loss) == pytest.approx((log1pexp(-3) + log1pexp(-1)) / 2, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_ties_is_left_out(kind: str):
    both = ranking_loss(rewards([1, 0], [5, 3]), ranks([0, 1], [2, 2]), kind=kind)
    alone = ranking_loss(rewards([1, 0]), ranks([0, 1]), kind=kind)
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_places_change_nothing_and_get_no_gradient(kind: str):
    values = rewards([1, 0, 7]).requires_grad_()
    loss = ranking_loss(values, ranks([0, 1, -1]), kind=kind)
    assert loss.item() == pytest.approx(log1pexp(-1), abs=1e-12)
    loss.backward()
    assert values.grad is not None
    assert float(values.grad[0, 2]) == 0
    assert float(values.grad[0, 0]) == pytest.approx(-1 / (1 + math.e))


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_constant_changes_nothing_and_gradients_add_up_to_zero(kind: str):
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, generator=rng, dtype=torch.float64).requires_grad_()
    order = ranks([0, 1, 2], [1, 0, 1], [2, 2, 0], [0, 1, -1])
    loss = ranking_loss(values, order, kind=kind)
    torch.testing.assert_close(loss, ranking_loss(values + 3.0, order, kind=kind))
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_global_number_of_prompts_makes_parts_add_up(kind: str):
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    order = ranks([0, 1, 2], [1, 0, 1], [2, 1, 0], [0, 1, -1])
    parts = [
        ranking_loss(values[i : i + 2], order[i : i + 2], kind=kind, num_prompts=4) for i in (0, 2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], ranking_loss(values, order, kind=kind))


def test_parity_with_a_loop_over_pairs():
    rng = torch.Generator().manual_seed(3)
    values = torch.randn(20, 4, generator=rng, dtype=torch.float64)
    order = torch.randint(-1, 3, (20, 4), generator=rng)
    per_prompt = []
    for row, places in zip(values.tolist(), order.tolist(), strict=True):
        pairs = [
            log1pexp(-(row[i] - row[j] - 0.2))
            for i, j in itertools.permutations(range(4), 2)
            if places[i] >= 0 and places[j] >= 0 and places[i] < places[j]
        ]
        if pairs:
            per_prompt.append(sum(pairs) / len(pairs))
    loss = ranking_loss(values, order, margin=0.2)
    assert float(loss) == pytest.approx(sum(per_prompt) / len(per_prompt), abs=1e-12)


def test_accuracy_counts_equal_rewards_half():
    found = ranking_accuracy(rewards([2, 1, 1], [0, 1, 5]), ranks([0, 1, 2], [0, 1, -1]))
    assert found.tolist() == [pytest.approx(2.5 / 3), 0.0]


def test_centred_rewards_have_mean_0_on_the_calibration_set():
    calibration = torch.tensor([1.0, 2.0, 6.0])  # mean 3
    assert centre_rewards(torch.tensor([4.0, 3.0]), calibration).tolist() == [1.0, 0.0]
    assert float(centre_rewards(calibration, calibration).mean()) == 0
    with pytest.raises(ValueError, match="calibration"):
        centre_rewards(calibration, torch.zeros(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "listwise"}, "objective.kind"),
        ({"kind": "plackett_luce", "margin": 0.5}, "objective.margin"),
        ({"ranks": ranks([1, 1])}, "no pair"),
        ({"ranks": ranks([1, 1, 0])}, r"\(1, 2\).*\(1, 3\)"),
    ],
)
def test_what_is_not_defined_is_refused(options: dict, message: str):
    arguments = {"ranks": ranks([0, 1]), **options}
    with pytest.raises(ValueError, match=message):
        ranking_loss(rewards([1, 0]), **arguments)


def test_calibration_bins_by_hand():
    # sigmoid(1) = 0.731 and sigmoid(3) = 0.953; a difference of 0 predicts 1/2, and is half right.
    values = rewards([1, 0, 0], [0, 3, 9])
    bins = calibration_bins(values, ranks([0, 1, 2], [0, 1, -1]))
    assert bins.pairs.tolist() == [1, 0, 2, 0, 1]
    assert bins.observed.tolist() == [0.5, 0, 2, 0, 0]
    expected = [0.5, 0, 2 * 0.7310585786300049, 0, 0.9525741268224334]
    assert bins.predicted.tolist() == pytest.approx(expected, abs=1e-12)


def test_calibration_against_a_loop_over_pairs():
    rng = torch.Generator().manual_seed(5)
    values = torch.randn(30, 4, generator=rng, dtype=torch.float64)
    order = torch.randint(-1, 3, (30, 4), generator=rng)
    counts, predicted, right = [0.0] * 5, [0.0] * 5, [0.0] * 5
    for row, places in zip(values.tolist(), order.tolist(), strict=True):
        for i, j in itertools.permutations(range(4), 2):
            if min(places[i], places[j]) < 0 or places[i] >= places[j]:
                continue
            better = 1 / (1 + math.exp(row[j] - row[i]))
            sure = max(better, 1 - better)
            place = next(k for k in range(5) if sure <= 0.6 + k / 10)
            counts[place] += 1
            predicted[place] += sure
            right[place] += better > 0.5

    bins = calibration_bins(values, order)
    assert bins.pairs.tolist() == counts
    assert bins.observed.tolist() == right
    assert bins.predicted.tolist() == pytest.approx(predicted)


def test_rewards_that_generated_the_order_are_calibrated():
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, 2, generator=rng, dtype=torch.float64) * 2
    first_wins = torch.rand(100_000, generator=rng) < torch.sigmoid(values[:, 0] - values[:, 1])
    order = torch.where(first_wins[:, None], torch.tensor([0, 1]), torch.tensor([1, 0]))
    bins = calibration_bins(values, order)
    errors = (bins.observed - bins.predicted) / bins.pairs
    assert float(errors.abs().max()) < 0.012


def test_step_loss_golden():
    # log 2 = 0.693147 and log(1 + e^2) = 2.126928, over two steps; the third token ends none
    logits = rewards([0, 2, 5])
    loss = step_loss(logits, ranks([1, 0, -1]))
    assert float(loss) == pytest.approx((0.6931471805599453 + 2.1269280110429727) / 2, abs=1e-12)
    assert float(step_loss(logits, ranks([1, 0, -1]), num_steps=4)) == pytest.approx(
        float(loss) / 2, abs=1e-12
    )


def test_step_loss_against_a_slow_loop_and_the_two_class_form():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 2, (7, 9), generator=generator)
    losses = []
    for row, column in (labels >= 0).nonzero().tolist():
        probability = 1 / (1 + math.exp(-float(logits[row, column])))
        right = int(labels[row, column]) == 1
        losses.append(-math.log(probability if right else 1 - probability))
    assert float(step_loss(logits, labels)) == pytest.approx(sum(losses) / len(losses), abs=1e-12)

    # Two classes of which the logits differ by the one logit.
    two = torch.stack([torch.zeros_like(logits), logits], dim=-1) + 0.7
    reference = torch.nn.functional.cross_entropy(
        two.flatten(0, 1), labels.flatten(), ignore_index=-1
    )
    assert float(step_loss(logits, labels)) == pytest.approx(float(reference), abs=1e-12)


def test_step_losses_of_parts_add_up_and_only_steps_get_a_gradient():
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]], requires_grad=True)
    labels = ranks([1, -1, 0], [-1, 1, -1])
    whole = step_loss(logits, labels)
    parts = step_loss(logits[0], labels[0], num_steps=3) + step_loss(
        logits[1], labels[1], num_steps=3
    )
    assert float(whole.detach()) == pytest.approx(float(parts.detach()), abs=1e-7)
    whole.backward()
    assert logits.grad is not None
    assert ((logits.grad != 0) == (labels >= 0)).all()


def test_extreme_logits_have_a_finite_step_loss():
    loss = step_loss(torch.tensor([1e4, -1e4]), torch.tensor([0, 1]))
    assert float(loss) == 1e4


def test_right_steps():
    found = right_steps(torch.tensor([1.0, -1.0, 0.0, -2.0, 3.0]), torch.tensor([1, 1, 0, 0, -1]))
    assert found.tolist() == [1.0, 0.0, 0.5, 1.0, 0.0]


def test_step_losses_without_steps_or_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="no step ends anywhere"):
        step_loss(torch.zeros(2), torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match="must have one shape"):
        step_loss(torch.zeros(2), torch.tensor([1]))
    assert float(step_loss(torch.zeros(2), torch.tensor([-1, -1]), num_steps=3)) == 0
