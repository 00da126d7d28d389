"""The way down by itself: what it costs at each step, and what is left behind at a budget."""

import itertools
import json
import logging
from operator import mul
from random import Random

import pytest
import torch

from sdq_hf import LayerBits, Strategy
from sdq_hf.costs import get_cost
from sdq_hf.search import BudgetError
from sdq_hf.search.descent import Descent
from sdq_hf.search.units import Unit, input_units, layer_units


@pytest.mark.parametrize("cost", ["bits", "bitops"])
def test_what_channels_cost_is_right_after_each_step_and_a_resume(cost):
    layers = {"a": LayerBits((8,) * 5, 4, 50, 500), "b": LayerBits((8,) * 3, 4, 90, 30)}
    start = Strategy.of(layers | {"head": LayerBits(8, 8, 10, 10, pinned=True)})
    units = {f"{name}[{c}]": Unit((name,), c) for name in layers for c in range(len(layers[name].weight_bits))}

    def descent():
        return Descent(start, get_cost(cost), [get_cost(cost).of_uniform(start, 1.5)], range(1, 9), units=units)

    way, generator = descent(), torch.Generator().manual_seed(0)
    while not way.done:
        way.step_down(way.movable[int(torch.randint(len(way.movable), (), generator=generator))], damage=1.0)
        now = way.strategy(way.bits)
        assert way.total() == pytest.approx(get_cost(cost).total(now))
        assert way.average_bits() == pytest.approx(now.average_bits())
        resumed = descent()
        resumed.load_state_dict(json.loads(json.dumps(way.state_dict())))
        assert (resumed.total(), resumed.average_bits()) == (way.total(), way.average_bits())
    with pytest.raises(TypeError):
        way.bits["a[0]"] = 3


def test_inputs_cost_what_the_strategy_says_and_count_no_weights():
    layers = {name: LayerBits(8, 8, n, m) for name, n, m in (("a", 50, 500), ("b", 90, 30), ("c", 20, 70))}
    start, cost = Strategy.of(layers | {"head": LayerBits(8, 8, 10, 10, pinned=True)}), get_cost("bitops")
    units = layer_units(start) | input_units(start)
    budget = cost.total(start.with_bits(2).with_activation_bits(dict.fromkeys(layers, 2)))

    def descent(**changes):
        return Descent(start, **{"cost": cost, "budgets": [budget], "candidates": [2, 4, 8], "units": units, **changes})

    way, generator = descent(floors={"b": 4}, budgets=[1.5 * budget]), torch.Generator().manual_seed(0)
    assert (way.floor["b"], way.floor["b.input"], way.floor["a"]) == (4, 2, 2)
    assert set(way.bits.values()) == {8}
    while not way.done:
        for name in way.movable:
            lower = way.strategy({**way.bits, name: way.next_bits(name)})
            assert way.saved(name) == pytest.approx(way.total() - cost.total(lower))
        way.step_down(way.movable[int(torch.randint(len(way.movable), (), generator=generator))], damage=1.0)
        now = way.strategy(way.bits)
        assert way.total() == pytest.approx(cost.total(now))
        assert way.average_bits() == pytest.approx(now.average_bits())
    with pytest.raises(ValueError, match="in average bits, which does not count them"):
        descent(cost=get_cost("bits"), budgets=[3.0])
    # One that computes nothing costs nothing, whatever its inputs.
    start = Strategy.of({"a": LayerBits(8, 8, 50, 500), "unused": LayerBits(8, 8, 90, 0)})
    way = Descent(start, cost, [500 * 16], [2, 4, 8], units=layer_units(start) | input_units(start))
    assert (way.ladder["a.input"], way.ladder["unused.input"]) == ([2, 4, 8], [8])


def test_rungs_of_inputs_are_those_that_save_something_beside_weights_of_the_most_bits():
    start = Strategy.of({"a": LayerBits(8, 8, 10, 10)})
    rows = {"2": {"2": 1, "4": 1, "8": 1}, "4": {"2": 2, "4": 4, "8": 4}, "8": {"2": 4, "4": 4, "8": 8}}
    cost = get_cost({"name": "own", "unit": "us", "per_mac": rows})
    way = Descent(start, cost, [20], [2, 4, 8], units=layer_units(start) | input_units(start))
    assert way.ladder["a.input"] == [2, 4, 8]
    # 4-bit inputs beside 8-bit weights would cost as much as 8-bit ones.
    rows["4"]["8"] = 8
    way = Descent(start, get_cost({"name": "own", "unit": "us", "per_mac": rows}), [20], [2, 4, 8], units=way.units)
    assert way.ladder["a.input"] == [2, 8]


def way_of(sizes, budget, **options):
    """A way down from 6 bits; the budget counts bits of all weights."""
    start = Strategy.of({name: LayerBits(8, 4, size, size) for name, size in sizes.items()})
    return Descent(start, get_cost("bits"), [budget / sum(sizes.values())], range(1, 9), **options)


def found_after(way, *steps):
    for name, damage in steps:
        assert not way.done
        way.step_down(name, damage)
    assert way.done
    return way.strategies()[0].weight_bits


def test_what_a_large_step_leaves_over_goes_to_the_layer_with_the_largest_damage_that_fits():
    way = way_of({"a": 1000, "b": 220, "c": 200, "d": 300}, 8900 + 230)
    # 10,320 at the start, 8,600 after the steps: d would fit the most, but 300 are too many once b is raised.
    steps = [("b", 0.9), ("c", 0.5), ("d", 0.7), ("a", 2.0)]
    assert found_after(way, *steps) == {"a": 5, "b": 6, "c": 5, "d": 6}


def test_a_budget_may_be_met_exactly():
    way = way_of({"a": 1000, "b": 220}, 6320)
    assert found_after(way, ("b", 0.9), ("a", 2.0)) == {"a": 5, "b": 6}


def test_a_layer_steps_down_for_another_where_too_much_would_be_left_over():
    # 12,900 at the start, 10,750 after the steps; 500 are left over, too few for any of them. One bit less in d or in e makes
    # room for a, and d's next step is the one that harms less.
    sizes = {"a": 1000, "d": 600, "e": 550}
    assert found_after(way_of(sizes, 11_250), ("d", 0.1), ("e", 0.3), ("a", 0.5)) == {"a": 6, "d": 4, "e": 5}
    assert found_after(way_of(sizes, 11_250), ("d", 0.3), ("e", 0.1), ("a", 0.5)) == {"a": 6, "d": 5, "e": 4}


def test_the_next_step_of_a_layer_counts_four_times_its_last_one():
    # 500 are left over. A step of d makes room for a and f, one of e for a alone: 4 x 0.2 - f against 4 x 0.1.
    sizes = {"a": 1000, "d": 600, "e": 550, "f": 80}
    for f, expected in ((0.45, {"a": 6, "d": 4, "e": 5, "f": 6}), (0.35, {"a": 6, "d": 5, "e": 4, "f": 5})):
        assert found_after(way_of(sizes, 11_650), ("f", f), ("d", 0.2), ("e", 0.1), ("a", 0.5)) == expected


def test_a_layer_that_never_stepped_counts_as_the_first_steps_of_others():
    # 500 are left over. One bit less in d or in e makes room for a, and e has made no step yet: its first one counts four
    # times the mean of what the first steps of d, a and f have cost.
    sizes = {"a": 1000, "d": 600, "e": 550, "f": 20}
    d, e = {"a": 6, "d": 4, "e": 6, "f": 6}, {"a": 6, "d": 5, "e": 5, "f": 6}
    assert found_after(way_of(sizes, 11_900), ("f", 0.0), ("d", 0.1), ("a", 0.5)) == d
    assert found_after(way_of(sizes, 11_900), ("f", 0.0), ("d", 0.6), ("a", 0.7)) == e
    # Not their last ones, which would make it dearer than the third step of d.
    steps = ("f", 0.0), ("d", 0.1), ("d", 0.5), ("a", 1.2)
    assert found_after(way_of(sizes, 11_300), *steps) == {**e, "d": 4}


def test_several_layers_step_for_one_where_single_exchanges_leave_too_much():
    # The sizes of ResNet-8. 3.83 average bits are left by the last step, of a layer with half of all weights.
    sizes = {"a": 2304, "b": 2304, "c": 4608, "d": 9216, "e": 512, "f": 18432, "g": 36864, "h": 2048}
    steps = [("f", 0.01), *(("g", 0.01 * 4**i) for i in range(4))]
    found = found_after(way_of(sizes, 4.0 * sum(sizes.values())), *steps)
    assert sum(found[name] * sizes[name] for name in sizes) == 4 * sum(sizes.values())
    # Nothing is known of most layers: they go down together and not far.
    assert found["g"] == 3
    assert min(found.values()) >= 3


def test_strategies_come_near_the_best_use_of_a_budget_that_there_is():
    random = Random(0)
    for _ in range(40):
        sizes = [int(10 ** random.uniform(1, 4)) for _ in range(random.randint(3, 5))]
        budget, weights = random.uniform(1.5, 5.8), sum(sizes)
        way = way_of({f"l{i}": size for i, size in enumerate(sizes)}, budget * weights)
        while not way.done:
            name = random.choice(way.movable)
            way.step_down(name, random.random() * 4.0 ** (6 - way.bits[name]))
        averages = (sum(map(mul, bits, sizes)) / weights for bits in itertools.product(range(1, 7), repeat=len(sizes)))
        most = max(average for average in averages if average <= budget)
        (found,) = way.strategies()
        assert min(most, budget - 0.05) - 0.17 <= found.average_bits() <= budget * (1 + 1e-9)


def test_what_no_exchange_can_use_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert found_after(way_of({"a": 1000, "b": 10}, 5500), ("a", 0.1)) == {"a": 5, "b": 6}
    assert (
        "Budget of 5.446 average bits: the nearest strategy below it that was found costs 5.01 average bits"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        # Within 0.05 bits.
        assert found_after(way_of({"a": 1000, "b": 10}, 5100), ("a", 0.1)) == {"a": 5, "b": 6}
    assert caplog.text == ""


def test_rungs_and_steps_follow_the_ladder():
    way = way_of({"a": 1000, "b": 10}, 3000, floors={"b": 5}, start_bits=7)
    assert way.rungs("a") == [1, 2, 3, 4, 5, 6, 7]
    assert way.rungs("b") == [5, 6, 7]
    assert (way.next_bits("a"), way.next_bits("b"), way.movable) == (6, 6, ["a", "b"])
    for bits in (6, 5):
        way.step_down("b", 0.1)
        assert way.bits["b"] == bits
    assert way.next_bits("b") is None
    assert way.movable == ["a"]


def test_layers_that_share_their_bits_have_the_highest_of_their_floors():
    start = Strategy.of({name: LayerBits(8, 4, 10, 10) for name in "abc"})
    units = {"ab": Unit(("a", "b")), "c": Unit(("c",))}
    way = Descent(start, get_cost("bits"), [4.0], range(1, 9), floors={"a": 2, "b": 3}, units=units)
    assert way.floor == {"ab": 3, "c": 1}


def test_wrong_starts_floors_and_budgets_are_refused():
    with pytest.raises(BudgetError, match="No budget given"):
        Descent(Strategy.of({"a": LayerBits(8, 4, 9, 9)}), get_cost("bits"), [], range(1, 9))
    with pytest.raises(ValueError, match=r"one of the candidates \[1, 2, 3, 4, 5, 6, 7, 8\], got 9"):
        way_of({"a": 10}, 30, start_bits=9)
    # Above one budget, and below the other.
    with pytest.raises(BudgetError, match="start_bits 3 is below the budget of 4 average bits"):
        Descent(Strategy.of({"a": LayerBits(8, 4, 9, 9)}), get_cost("bits"), [2.0, 4.0], range(1, 9), start_bits=3)
    # A hundredth of the larger budget may be left over.
    start = Strategy.of({"a": LayerBits(8, 4, 1000, 1000)})
    way = Descent(start, get_cost("bitops"), [6000, 12_100], range(1, 9), start_bits=3)
    assert way.found[12_100].weight_bits == {"a": 3}
    with pytest.raises(ValueError, match=r"floors\['a'\] must be at most 8, the largest candidate, got 9"):
        way_of({"a": 10}, 30, floors={"a": 9})
    with pytest.raises(BudgetError, match=r"start_bits 2 is below the budget of 3 average bits.*at 6 for example"):
        way_of({"a": 10}, 30, start_bits=2)
    # A start within the cost's tolerance of the budget is none below it.
    assert way_of({"a": 10}, 20.4, start_bits=2).done
    with pytest.raises(ValueError, match="belongs to another network"):
        way_of({"a": 10}, 30).load_state_dict(way_of({"b": 10}, 30).state_dict())
