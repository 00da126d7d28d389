"""Strategies as values: what they count, how they change, and what they refuse."""

import json

import pytest

from sdq_hf import LayerBits, Strategy

STRATEGY = Strategy.of(
    {
        "stem": LayerBits(8, 8, 90, 700, pinned=True),
        "wide": LayerBits(3, 4, 1001, 500),
        "many": LayerBits((1, 2, 2, 8), 4, 40, 80),
        "loose": LayerBits(32, 32, 7, 9),
    }
)


def test_sizes_of_a_layer_are_sums_over_its_weights():
    for layer in STRATEGY.values():
        bits = layer.weight_bits if isinstance(layer.weight_bits, tuple) else (layer.weight_bits,)
        each, macs = layer.num_weights // len(bits), layer.macs // len(bits)
        total = sum(b for b in bits for _ in range(each))
        assert layer.total_bits == total
        assert layer.average_bits == pytest.approx(total / layer.num_weights)
        assert layer.num_bytes == -(-total // 8)
        assert layer.bitops == sum(b * layer.activation_bits for b in bits for _ in range(macs))
    assert [layer.is_float for layer in STRATEGY.values()] == [False, False, False, True]
    assert not LayerBits(32, 4, 7, 9).is_float


def test_averages_leave_pinned_layers_out_unless_all_are():
    assert STRATEGY.searchable == ("wide", "many", "loose")
    inner, stem = 1001 * 3 + 10 * 13 + 7 * 32, 90 * 8
    assert STRATEGY.average_bits() == pytest.approx(inner / 1048)
    assert STRATEGY.average_bits(include_pinned=True) == pytest.approx((inner + stem) / 1138)
    assert STRATEGY.compression() == pytest.approx(32 * 1138 / (inner + stem))
    assert STRATEGY.compression(include_pinned=False) == pytest.approx(32 * 1048 / inner)
    sizes = {name: layer.num_bytes for name, layer in STRATEGY.items()}
    assert STRATEGY.weight_bytes() == sum(sizes.values())
    assert STRATEGY.weight_bytes(include_pinned=False) == sum(sizes.values()) - sizes["stem"]
    assert STRATEGY.bitops() - STRATEGY.bitops(include_pinned=False) == 700 * 64
    pinned = Strategy.of({"stem": STRATEGY["stem"]})
    assert pinned.average_bits() == pinned.average_bits(True) == 8


def test_a_number_is_for_all_searchable_layers_and_all_channels():
    changed = STRATEGY.with_bits(5)
    assert changed.weight_bits == {"stem": 8, "wide": 5, "many": (5, 5, 5, 5), "loose": 5}
    assert changed.with_bits({"many": 32, "wide": 32}).weight_bits == {"stem": 8, "wide": 32, "many": 32, "loose": 5}
    assert STRATEGY.with_bits({"many": (1, 2, 3, 4)})["many"].weight_bits == (1, 2, 3, 4)
    inputs = STRATEGY.with_activation_bits({"wide": 2})
    assert {name: layer.activation_bits for name, layer in inputs.items()} == {
        "stem": 8,
        "wide": 2,
        "many": 4,
        "loose": 32,
    }
    assert (inputs.weight_bits, STRATEGY["wide"].activation_bits) == (STRATEGY.weight_bits, 4)
    assert STRATEGY.diff(changed) == {"wide": (3, 5), "many": ((1, 2, 2, 8), (5, 5, 5, 5)), "loose": (32, 5)}
    fewer = Strategy.of({name: layer for name, layer in STRATEGY.items() if name != "wide"})
    assert STRATEGY.diff(fewer) == {"wide": (3, None)}
    assert fewer.diff(STRATEGY) == {"wide": (None, 3)}


def test_strategies_are_values_and_come_back_from_json():
    again = Strategy.from_json(STRATEGY.to_json())
    assert again == STRATEGY
    assert hash(again) == hash(STRATEGY)
    assert Strategy.from_json(json.dumps(STRATEGY.to_json())) == STRATEGY
    assert (list(STRATEGY), len(STRATEGY)) == (["stem", "wide", "many", "loose"], 4)
    assert STRATEGY.to_json()[2]["weight_bits"] == "1228"


def test_the_table_has_a_line_for_each_layer_and_the_averages():
    head, *rows, last = str(STRATEGY).splitlines()
    assert head.split() == ["layer", "W", "bits", "A", "bits", "weights", "MACs"]
    assert [row.split() for row in rows] == [
        ["stem", "8", "8", "90", "700", "pinned"],
        ["wide", "3", "4", "1,001", "500"],
        ["many", "~3.25", "4", "40", "80"],
        ["loose", "float", "float", "7", "9"],
    ]
    # Columns are as wide as the longest name: the bits of all layers end at the same place.
    longer = str(Strategy.of({"a.long.name": STRATEGY["wide"], "b": STRATEGY["wide"]})).splitlines()
    assert longer[1][len("a.long.name") :] == longer[2][len("a.long.name") :]
    big = Strategy.of({"a": LayerBits(2, 4, 8000, 10**9)})
    assert str(big).endswith("average bits 2.00 (with pinned layers 2.00), weights 2.0 kB, 16.0x smaller than float, "
                             "8.000 GBitOPs")  # fmt: skip
    assert last.startswith(f"average bits {STRATEGY.average_bits():.2f} (with")


def entry(**changes):
    return {"layer": "a", "weight_bits": 3, "activation_bits": 4, "num_weights": 8, "macs": 8, **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "must be JSON, got '{'"),
        ({"a": 3}, "is a list of layers with bits and sizes, got dict"),
        ([entry()] * 10_001, "at most 10000 layers, got 10001"),
        ([{"layer": "a"}], "must have the fields"),
        ([entry(extra=1)], "must have the fields"),
        ([entry(layer="a\nb")], "printable names"),
        ([entry(), entry()], "names each layer once, got 'a' again"),
        ([entry(weight_bits=9)], "layer 'a': weight_bits must be 1 to 8, or 32 for float, got 9"),
        ([entry(weight_bits=0)], "weight_bits must be 1 to 8"),
        ([entry(weight_bits=True)], "weight_bits must be 1 to 8"),
        ([entry(weight_bits="12x4")], "weight_bits must be 1 to 8, or 32 for float, got '12x4'"),
        ([entry(weight_bits="19")], "channels must be 1 to 8 each"),
        ([entry(weight_bits="123")], "multiples of its 3 channels"),
        ([entry(weight_bits="12", macs=9)], "multiples of its 2 channels"),
        ([entry(activation_bits=16)], "activation_bits must be 1 to 8"),
        ([entry(num_weights=-1)], "num_weights must be a whole number >= 0, got -1"),
        ([entry(macs=1.5)], "macs must be a whole number >= 0, got 1.5"),
        ([entry(macs=10**15 + 1)], "macs must be a whole number"),
        ([entry(macs=True)], "macs must be a whole number"),
        ([entry(pinned=1)], "pinned must be true or false, got 1"),
    ],
)
def test_what_is_no_strategy_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        Strategy.from_json(data)


def test_the_limits_themselves_are_allowed():
    most = Strategy.from_json([entry(layer=f"l{i}") for i in range(10_000)])
    assert len(most) == 10_000
    wide = Strategy.from_json([entry(weight_bits="1" * 100_000, num_weights=100_000, macs=0)])
    assert len(wide["a"].weight_bits) == 100_000
    with pytest.raises(ValueError, match="weight_bits must be 1 to 8"):
        Strategy.from_json([entry(weight_bits="1" * 100_001, num_weights=100_001, macs=0)])
    assert Strategy.from_json([entry(macs=10**15, num_weights=0)])["a"].macs == 10**15


def test_an_unknown_layer_has_its_nearest_names_in_the_message():
    for act in (
        lambda: STRATEGY["wiede"],
        lambda: STRATEGY.with_bits({"wiede": 3}),
        lambda: STRATEGY.with_activation_bits({"wiede": 3}),
    ):
        with pytest.raises(KeyError, match="No layer 'wiede' in the network; near names: wide"):
            act()
    with pytest.raises(KeyError, match="near names: stem, wide, many\\."):
        STRATEGY["qqq"]
    with pytest.raises(KeyError, match=r"No layer 'x{96}\.\.\. in"):
        STRATEGY["x" * 200]
    whole, cut = "x" * 98, "x" * 99
    with pytest.raises(KeyError, match=f"No layer '{whole}' in"):
        STRATEGY[whole]
    with pytest.raises(KeyError, match=r"No layer 'x{96}\.\.\. in"):
        STRATEGY[cut]
    alike = Strategy.of({f"layer{i}": STRATEGY["wide"] for i in range(5)})
    with pytest.raises(KeyError, match=r"near names: layer\d, layer\d, layer\d\."):
        alike["layer"]
