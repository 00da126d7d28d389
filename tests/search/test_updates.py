"""The updates by themselves, on gradients that are made up: when a layer steps, and the paper's against autograd."""

import json

import pytest
import torch

from sdq_hf import LayerBits, Strategy
from sdq_hf.costs import get_cost
from sdq_hf.quantizers.stochastic import draw
from sdq_hf.search.descent import Descent
from sdq_hf.search.updates import Paper, RunningMean, TwoSided
from tests.search.descents import descent


def test_no_layer_steps_before_all_are_measured():
    way = descent([2.0], sizes=(100, 100))
    update = TwoSided(way, seed=0)
    for step in range(40):
        update.observe({"l0": -0.1}, update.draw(step))
    assert list(update.estimates()) == ["l0"]
    assert update.next_moves() == []
    for step in range(40):
        update.observe({"l1": -0.2}, update.draw(step))
    assert [move.layer for move in update.next_moves()] == ["l0"]


def test_an_estimate_is_there_from_the_second_draw_of_each_place_on():
    update = TwoSided(descent([2.0], sizes=(100,)), seed=0)
    for side in (1.0, 0.0, 1.0, 0.0):
        assert update.estimates() == {}
        update.observe({"l0": -0.1 - side}, {"l0": side})
    assert update.estimates() == {"l0": (pytest.approx(0.6), pytest.approx(0.0, abs=1e-6))}


def test_the_papers_update_is_sgd_on_its_loss():
    """The loss by autograd, of the Gumbel-softmax written out, and the step by torch's SGD."""
    way = descent([12_000], "bitops", sizes=(900, 400, 100), candidates=[2, 4, 8], start_bits=8)
    errors = {name: {8: 0.01 * i, 4: 0.3 * i, 2: 5.0} for i, name in enumerate(way.names, 1)}
    # The square root of what a bit more costs, as a share: BitOPs with 4-bit inputs.
    shares = torch.tensor([30.0, 20.0, 10.0], dtype=torch.float64) / 60
    update, theta = Paper(way, 3, errors, patience=2), torch.full((3,), 3.0, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([theta], lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    # Two batches at most until the step at the fourth and after it, then the cost weighs twice as much.
    cost_weights = [1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 8.0]
    for step, cost_weight in enumerate(cost_weights):
        if step == 3:
            # 8 -> 4 -> 2: no lower rung is left, and what is left of its step is momentum.
            for _ in range(2):
                way.step_down("l2", 1.0)
            update.reset("l2")
            with torch.no_grad():
                theta[2] = 3.0
                sgd.state[theta]["momentum_buffer"][2] = 0.0
        drawn = update.draw(step)
        uniform = draw(3, step, 3)
        noise = torch.log(uniform) - torch.log(1 - uniform)
        beta = torch.sigmoid(theta)
        soft = torch.softmax(torch.stack([torch.log(beta) + noise, torch.log(1 - beta)]), dim=0)[0]
        assert list(drawn.values()) == (soft > 0.5).double().tolist()
        task = torch.randn(3, dtype=torch.float64, generator=generator)
        loss = torch.zeros((), dtype=torch.float64)
        for i, name in enumerate(way.names):
            upper, lower = way.bits[name], way.next_bits(name)
            if lower is None:
                continue
            expected_bits = beta[i] * upper + (1 - beta[i]) * lower
            expected_error = beta[i] * errors[name][upper] + (1 - beta[i]) * errors[name][lower]
            loss = loss + task[i] * soft[i] + cost_weight * shares[i] * expected_bits + expected_error
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        with torch.no_grad():
            theta.clamp_(-4, 4)
        update.observe(dict(zip(way.names, task.tolist(), strict=True)), drawn)
        torch.testing.assert_close(update.theta, theta.detach())
        assert update.estimates() == {
            n: (pytest.approx(b), 0.0) for n, b in zip(way.names, beta_of(theta), strict=True)
        }
    restored = Paper(way, 3, errors, patience=2)
    restored.load_state_dict(json.loads(json.dumps(update.state_dict())))
    assert restored.state_dict() == update.state_dict()
    for either in (restored, update):
        either.observe(dict.fromkeys(way.names, 0.1), either.draw(8))
    assert restored.state_dict() == update.state_dict()


def test_a_cost_that_may_not_grow_stays_what_it_is():
    update = Paper(descent([2.0], sizes=(100,)), 0, {"l0": dict.fromkeys(range(1, 9), 0.0)}, patience=0)
    for step in range(300):
        update.observe({"l0": 0.0}, update.draw(step))
    assert update.cost_weight == 1.0


def beta_of(theta):
    return torch.sigmoid(theta.detach()).tolist()


def test_the_paper_steps_down_below_its_threshold_the_lowest_first():
    way = descent([2.0], sizes=(100, 100, 100, 100), start_bits=6)
    update = Paper(way, 0, {name: {b: 4.0**-b for b in range(1, 9)} for name in way.names}, threshold=0.1)
    for beta, expected in [((0.5, 0.11, 0.2, 0.3), []), ((0.09, 0.5, 0.02, 0.05), ["l2", "l3", "l0"])]:
        update.theta = torch.logit(torch.tensor(beta, dtype=torch.float64))
        assert [move.layer for move in update.next_moves(4)] == expected
        assert [move.layer for move in update.next_moves()] == expected[:1]
    (move,) = update.next_moves()
    assert (move.damage, move.error) == (pytest.approx(4.0**-5 - 4.0**-6), 0.0)


@pytest.mark.parametrize(("shape", "expected"), [("linear", (0.9, 0.1)), ("sqrt", (0.75, 0.25))])
def test_the_papers_shares_are_those_of_the_cost_or_of_its_root(shape, expected):
    way = descent([2.0], sizes=(900, 100))
    update = Paper(way, 0, {}, cost_shape=shape)
    assert list(update.share.values()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="'sqrt' or 'linear', got 'cube'"):
        Paper(way, 0, {}, cost_shape="cube")


def feed(update, name, values):
    """Observe each of `values` as the damage of `name`, at the upper and the lower bitwidth in turn."""
    for i, value in enumerate(values):
        update.observe({name: -value}, {name: float(i % 2 == 0)})


def test_a_layer_is_ready_after_three_draws_of_each_place_or_when_its_error_is_half_its_damage_or_after_thirteen():
    def ready(*values):
        update = TwoSided(descent([2.0], sizes=(100,)), seed=0)
        feed(update, "l0", values)
        return bool(update.next_moves())

    assert not ready(*[0.1] * 5)
    assert ready(*[0.1] * 6)
    # Damages of 0.1 +- 1 on both sides: measured well enough at no time.
    noisy = [1.1, 1.1, -0.9, -0.9] * 4
    assert not ready(*noisy[:12])
    assert ready(*noisy[:13])
    # The mean's standard error of +-1 is about 0.4 of each side after six draws, so 0.3 for both.
    assert not ready(*[0.5 + x for x in (1, 1, -1, -1) * 3])
    assert ready(*[0.7 + x for x in (1, 1, -1, -1) * 3])


def test_layers_are_compared_by_damage_with_two_errors_for_each_cost_saved():
    def first(sizes, *values):
        update = TwoSided(descent([2.0], sizes=sizes), seed=0)
        for name, damages in zip(update.descent.names, values, strict=True):
            feed(update, name, damages)
        return [move.layer for move in update.next_moves()], update

    assert first((100, 100), [0.1] * 8, [0.2] * 8)[0] == ["l0"]
    # Three times the damage for four times the cost.
    assert first((100, 400), [0.1] * 8, [0.3] * 8)[0] == ["l1"]
    assert first((100, 400), [0.1] * 8, [0.5] * 8)[0] == ["l0"]
    # None does harm: the largest.
    assert first((100, 400, 50), [-0.1] * 14, [-0.3] * 14, [-0.9] * 14)[0] == ["l1"]
    noisy = [1 + x for x in (0.1, 0.1, -0.1, -0.1)] * 2
    (_, update) = first((100, 100), [1.05] * 8, noisy)
    damage, error = update.estimates()["l1"]
    assert damage == pytest.approx(1.0, abs=1e-2)
    least = damage + 2 * error
    assert least > 1.05
    for other, expected in ((least - 1e-3, "l0"), (least + 1e-3, "l1")):
        assert first((100, 100), [other] * 8, noisy)[0] == [expected]


def test_a_layer_that_stepped_counts_four_times_its_damage_until_each_place_has_three_draws():
    update = TwoSided(descent([2.0], sizes=(100, 100)), seed=0)
    for name, damage in (("l0", 0.1), ("l1", 0.6)):
        feed(update, name, [damage] * 8)
    update.descent.step_down("l0", 0.1)
    update.reset("l0")
    # As 0.4 it is still the next, and not measured.
    assert update.next_moves() == []
    feed(update, "l0", [0.9] * 5)
    assert update.next_moves() == []
    update.observe({"l0": -0.9}, {"l0": 0.0})
    assert [move.layer for move in update.next_moves()] == ["l1"]


def test_several_moves_are_the_best_of_those_that_are_ready():
    update = TwoSided(descent([2.0], sizes=(100, 100, 100)), seed=0)
    for name, damages in (("l0", [0.3] * 8), ("l1", [0.1, 0.2] * 2), ("l2", [0.2] * 8)):
        feed(update, name, damages)
    # l1 may be the best, and is not measured.
    assert [move.layer for move in update.next_moves(2)] == ["l2"]
    assert [(move.layer, move.damage) for move in update.next_moves(3)] == [
        ("l2", pytest.approx(0.2)),
        ("l0", pytest.approx(0.3)),
    ]


def test_what_the_two_sided_search_does_by_default():
    way = descent([1.0], sizes=(100, 100), start_bits=3)
    update = TwoSided(way, seed=0)
    # Halfway from 2 bits on, not from 3.
    assert 0.5 not in {share for step in range(50) for share in update.draw(step).values()}
    way.step_down("l0", 0.0)
    update.reset("l0")
    drawn = [update.draw(step) for step in range(50)]
    assert {shares["l0"] for shares in drawn} == {1.0, 0.5, 0.0}
    assert 0.5 not in {shares["l1"] for shares in drawn}
    # Of two draws the first weighs 0.99.
    for side in (1.0, 0.0):
        for gradient in (0.0, -1.0):
            update.observe({"l1": gradient}, {"l1": side})
    assert update.estimates()["l1"][0] == pytest.approx(1 / 1.99)
    mean = RunningMean()
    for value in (0.0, 1.0):
        mean.add(value)
    assert mean.mean == pytest.approx(1 / 1.99)


def test_what_the_papers_update_does_by_default():
    way = descent([2.0], sizes=(100, 100))
    update = Paper(way, 0, {name: dict.fromkeys(range(1, 9), 0.0) for name in way.names}, lr=0.0)
    for step in range(101):
        assert update.cost_weight == 1.0
        assert update.next_moves() == []
        update.draw(step)
        update.observe(dict.fromkeys(way.names, 0.0), {})
    # Doubled behind a hundred batches without a step.
    assert update.cost_weight == 2.0
    for gradient, end in ((1e6, -4.0), (-1e6, 4.0)):
        update = Paper(way, 0, update.errors, temperature=10.0)
        update.draw(0)
        update.observe(dict.fromkeys(way.names, gradient), {})
        assert update.theta.tolist() == [end, end]


def test_the_papers_shares_are_those_of_what_bits_cost_above_the_fewest():
    # A bit of weights costs more beside 8-bit inputs, and not in proportion.
    start = Strategy.of({"l0": LayerBits(8, 4, 10, 10), "l1": LayerBits(8, 8, 10, 10)})
    cost = get_cost("lut")
    way = Descent(start, cost, [cost.of_layer(start, "l1")], [1, 2, 8])
    low = start.with_bits(1)
    above = [(cost.of_layer(start, name) - cost.of_layer(low, name)) ** 0.5 for name in start]
    shares = Paper(way, 0, {}).share
    assert shares == {name: pytest.approx(size / sum(above)) for name, size in zip(start, above, strict=True)}
