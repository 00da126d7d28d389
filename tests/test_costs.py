import json
from pathlib import Path

import pytest

from sdq_hf import LayerBits, Strategy
from sdq_hf.costs import COSTS, LUT_TABLE, bitops_text, get_cost
from sdq_hf.search import BudgetError
from sdq_hf.search.assignment import least_sum
from sdq_hf.search.descent import Descent

LAYERS = {
    "stem": LayerBits(8, 8, 99, 700, pinned=True),
    "wide": LayerBits(3, 4, 1001, 500),
    "deep": LayerBits(2, 4, 407, 900),
    "head": LayerBits(8, 8, 50, 50, pinned=True),
}
STRATEGY = Strategy.of(LAYERS)


def test_built_in_costs_are_what_the_strategy_says():
    assert get_cost("bits").total(STRATEGY) == STRATEGY.average_bits()
    assert get_cost("bytes").total(STRATEGY) == STRATEGY.weight_bytes()
    assert get_cost("bitops").total(STRATEGY) == STRATEGY.bitops()
    compression = get_cost("compression")
    assert compression.limit(compression.total(STRATEGY)) == pytest.approx(STRATEGY.compression())


def test_lut_cost_is_the_table_times_the_macs():
    table = json.loads(LUT_TABLE.read_text())["per_mac"]
    expected = 700 * table["8"]["8"] + 500 * table["4"]["3"] + 900 * table["4"]["2"] + 50 * table["8"]["8"]
    assert get_cost("lut").total(STRATEGY) == pytest.approx(expected)


def test_bits_chosen_for_luts_are_others_and_need_fewer_luts_for_the_same_damage():
    """The layers of a real network; damages are those of rounding when all layers are alike, `4^-b`."""
    folder = Path(__file__).parents[1] / "model_cards" / "mobilenetv1_025_cifar-sdq" / "w2"
    config = json.loads((folder / "config.json").read_text())
    network, candidates, lut = Strategy.from_json(config["strategy"]), range(1, 9), get_cost("lut")

    def least_damage(cost, budget):
        way = Descent(network, get_cost(cost), [budget], candidates, start_bits=8)
        return way.strategy(least_sum(way, budget, {name: {b: 4.0**-b for b in candidates} for name in way.names}))

    def damage(strategy):
        return sum(4.0**-bits for name, bits in strategy.weight_bits.items() if name in network.searchable)

    by_bits = least_damage("bits", 2.0)
    by_luts = least_damage("lut", 0.85 * lut.total(by_bits))
    assert lut.total(by_luts) <= 0.85 * lut.total(by_bits)
    assert damage(by_luts) <= damage(by_bits)
    # They pay with bytes, which the other budget counts.
    assert by_luts.average_bits() > by_bits.average_bits()
    changed = by_bits.diff(by_luts)
    macs_per_weight = {name: x.macs / x.num_weights for name, x in network.items()}
    fewer = [macs_per_weight[name] for name, (before, after) in changed.items() if after < before]
    more = [macs_per_weight[name] for name, (before, after) in changed.items() if after > before]
    assert min(fewer) > max(more)


@pytest.mark.parametrize("name", [*COSTS, "lut"])
def test_the_budget_of_uniform_bits_is_what_they_cost_and_fractions_lie_between(name):
    cost = get_cost(name)
    for bits in (1, 2, 3, 8):
        assert cost.limit(cost.of_uniform(STRATEGY, bits)) == pytest.approx(cost.total(STRATEGY.with_bits(bits)))
    halfway = (cost.total(STRATEGY.with_bits(2)) + cost.total(STRATEGY.with_bits(3))) / 2
    assert cost.limit(cost.of_uniform(STRATEGY, 2.5)) == pytest.approx(halfway)
    for bits in (0.5, 8.5, 9):
        with pytest.raises(ValueError, match=rf"Uniform {bits} bits are out of reach: 1 to 8"):
            cost.of_uniform(STRATEGY, bits)


def walk(way):
    """Down to the budgets, the largest saving first."""
    while not way.done:
        name = max(way.movable, key=way.saved)
        way.step_down(name, damage=1 / way.saved(name))
    return way.strategies()


@pytest.mark.parametrize(("name", "budgets"), [("bytes", [600, 350, 200]), ("compression", [8, 10, 14])])
def test_several_budgets_in_bytes_or_as_compression_are_kept(name, budgets):
    layers = {f"layer{i}": LayerBits(8, 4, 20 + i, 10) for i in range(30)}
    start = Strategy.of(layers | {"head": LAYERS["head"]})
    found = walk(Descent(start, get_cost(name), budgets, range(1, 9)))
    for budget, strategy in zip(budgets, found, strict=True):
        spent = strategy.weight_bytes() if name == "bytes" else strategy.compression()
        least, most = (0.98 * budget, budget) if name == "bytes" else (budget, 1.02 * budget)
        assert least <= spent <= most


def table(**changes):
    rows = {name: {str(b): 10.0 * b for b in range(1, 9)} for name in ("wide", "deep")}
    return {"name": "latency", "unit": "us", "layers": rows, "fixed": 5.0, **changes}


def test_a_table_of_ones_own_counts_what_it_names_and_what_is_fixed(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table()))
    for source in (path, str(path), table(), get_cost(path)):
        assert get_cost(source).total(STRATEGY) == 5 + 30 + 20


def test_more_than_a_hundredth_of_a_budget_left_over_is_told_and_less_is_not(caplog):
    start = Strategy.of({"a": LayerBits(8, 4, 800, 1000), "b": LayerBits(8, 4, 8, 10)})
    for budget, told in ((28_320 * 1.009, False), (28_320 * 1.02, True)):
        caplog.clear()
        (found,) = walk(Descent(start, get_cost("bitops"), [budget], range(1, 9)))
        assert found.bitops() <= budget
        assert ("the nearest strategy below it" in caplog.text) == told


def test_bits_that_cost_no_less_than_more_bits_are_never_chosen():
    """Hardware with 2, 4 and 8 bits only, where others take what the next ones take, and a dip that is a measuring error."""
    steps = {"1": 21.0, "2": 20.0, "3": 40.0, "4": 40.0, "5": 80.0, "6": 80.0, "7": 85.0, "8": 80.0}
    way = Descent(STRATEGY, get_cost(table(layers={"wide": steps, "deep": steps})), [130, 90, 50], range(1, 9))
    assert way.ladder == {"wide": [2, 4, 8], "deep": [2, 4, 8]}
    assert way.start == {"wide": 8, "deep": 8}
    for strategy in walk(way):
        assert {strategy["wide"].weight_bits, strategy["deep"].weight_bits} <= {2, 4, 8}


def test_a_budget_out_of_reach_names_the_range_and_the_layers_that_bind():
    ends, wide = r"between 451 and 1557\.", r"wide \(at least 2 bits, 56%\)"
    with pytest.raises(
        BudgetError, match=rf"{ends}.* {wide}, stem \(pinned to 8 bits, 22%\), deep \(at least 1 bits, 11%\)\.$"
    ):
        Descent(STRATEGY, get_cost("bytes"), [300], [1, 2, 8], floors={"wide": 2})
    with pytest.raises(BudgetError, match=r"between 4 and 12\.43"):
        Descent(STRATEGY, get_cost("compression"), [30], [1, 2, 8], floors={"wide": 2, "deep": 2})
    for budget in (0, -1.0, float("nan")):
        with pytest.raises(BudgetError, match="above 0"):
            Descent(STRATEGY, get_cost("compression"), [budget], [1, 2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bitop", "Did you mean 'bitops'"),
        ("none.json", r"none\.json cannot be read"),
        ({"name": "x"}, "must be a mapping with the fields"),
        (table(per_mac={"4": {"1": 1}}), "either 'layers' or 'per_mac'"),
        (table(name="bits"), "not one of bits"),
        (table(name="../up"), "letters, digits"),
        (table(fixed=-1), "fixed must be a number of at least 0"),
        (table(layers={"wide": {"x": 1}}), r"\['wide'\] must map weight bits to costs"),
        (table(layers={"wide": {"1": 1, "x": 1}}), r"\['wide'\] must map weight bits to costs"),
        (table(layers={"wide": [1, 2]}), r"\['wide'\] must map weight bits to costs"),
        (table(layers={}), "layers must be a mapping with an entry for each row"),
        (table(layers=["wide"]), "layers must be a mapping with an entry for each row"),
        (table(layers={"wide": {"1": "2"}}), r"\['wide'\]\['1'\] must be a number"),
        ({"name": "x", "unit": "y", "per_mac": {"a": {"1": 1}}}, "named by activation bits"),
    ],
)
def test_a_wrong_cost_is_refused_by_name(source, message):
    with pytest.raises(ValueError, match=message):
        get_cost(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (table(layers={"wyde": {"1": 1}}), "lacks the layer 'wide'.*wyde"),
        (table(layers={"wide": {"3": 1}, "deep": {"1": 1, "3": 2}}), "layer 'deep' has no cost at 2 bits"),
        ({"name": "x", "unit": "y", "per_mac": {"8": {"8": 1}}}, "3-bit weights and 4-bit inputs, as layer 'wide'"),
    ],
)
def test_a_table_that_does_not_fit_the_network_names_the_layer(source, message):
    with pytest.raises(ValueError, match=message):
        get_cost(source).total(STRATEGY)


def test_bitops_are_written_in_the_largest_unit_that_they_fill():
    expected = {
        1e3: "1.0 k",
        999e3: "999.0 k",
        1e6: "1.0 M",
        2.5e8: "250.0 M",
        1e9: "1.0 G",
        999e9: "999.0 G",
        1e12: "1.0 T",
    }
    assert {bitops: bitops_text(bitops) for bitops in expected} == {b: f"{text}BitOPs" for b, text in expected.items()}
