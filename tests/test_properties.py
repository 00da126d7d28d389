"""Properties of the mathematical core that hold for all inputs: packing, grids, gradients, descent, costs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdq_hf import LayerBits, Strategy
from sdq_hf.costs import COSTS, get_cost
from sdq_hf.packing import pack, packed_size, unpack
from sdq_hf.quantizers import FORMS, GRIDS
from sdq_hf.quantizers.grids import codes_to_integers, extremes, half_range, integers_to_codes, round_to_grid, spacing
from sdq_hf.quantizers.weight import fake_quantize, normalise, quantize_to_integers
from sdq_hf.search.descent import Descent

quick = settings(max_examples=60, deadline=None, derandomize=True)
bits = st.integers(1, 8)
grids = st.sampled_from(GRIDS)


@quick
@given(bits, st.data())
def test_unpacking_undoes_packing_and_each_code_takes_its_bits(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.numel() == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    # The whole is one number, in whose base 2^bits the codes are the digits.
    number = int.from_bytes(bytes(packed.tolist()), "little")
    assert number == sum(code << (i * bits) for i, code in enumerate(codes))


@quick
@given(grids, bits, st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20))
def test_rounding_gives_the_nearest_integer_of_the_grid_and_leaves_it_there(grid, bits, values):
    low, high = extremes(grid, bits)
    levels = torch.arange(low, high + 1, spacing(grid, bits), dtype=torch.float32)
    assert len(levels) == 2**bits
    assert -low == half_range(grid, bits)
    x = torch.tensor(values)
    found = round_to_grid(x, grid, bits)
    nearest = (x[:, None] - levels).abs().amin(dim=1)
    torch.testing.assert_close((found - x).abs(), nearest)
    assert set(found.tolist()) <= set(levels.tolist())
    assert torch.equal(round_to_grid(found, grid, bits), found)
    codes = integers_to_codes(levels, grid, bits)
    assert codes.tolist() == list(range(2**bits))
    assert torch.equal(codes_to_integers(codes, grid, bits), levels)


@quick
@given(st.sampled_from(FORMS), grids, bits, st.integers(0, 10_000), st.floats(0.05, 3))
def test_straight_through_gradients_are_finite_differences_of_the_relaxed_function(form, grid, bits, seed, scale):
    """Inside the clip rounding is taken for the identity, and what lies outside for a constant."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    direction = torch.randn(6, dtype=torch.float64, generator=generator)
    scale = torch.tensor(scale, dtype=torch.float64)
    (fake_quantize(w, form, grid, bits, scale) * direction).sum().backward()
    reach, (low, high) = half_range(grid, bits), extremes(grid, bits)
    with torch.no_grad():
        x = normalise(w, form, bits, scale) * reach
        inside, edges = (x >= low) & (x <= high), torch.minimum((x - low).abs(), (x - high).abs())
        integers = quantize_to_integers(w, form, grid, bits, scale)

        def relaxed(w):
            y = normalise(w, form, bits, scale) * reach
            return (torch.where(inside, y, integers) * scale / reach * direction).sum().item()

        for i in range(len(w)):
            step = torch.zeros_like(w)
            step[i] = 1e-6
            numeric = (relaxed(w + step) - relaxed(w - step)) / 2e-6
            # The largest weight of DoReFa stands on the edge, where its normalisation has a kink.
            if form != "dorefa" or edges[i] > 1e-3:
                assert w.grad[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)


layers = st.builds(LayerBits, bits, st.integers(1, 8), st.integers(1, 5000), st.integers(0, 10_000), st.booleans())
networks = st.lists(layers, min_size=1, max_size=8).map(
    lambda found: Strategy.of({f"l{i}": x if i else replace(x, pinned=False) for i, x in enumerate(found)})
)


@quick
@given(networks)
def test_costs_are_their_sums(strategy):
    free = [x for x in strategy.values() if not x.pinned]
    weights = sum(x.num_weights for x in strategy.values())
    expected = {
        "bits": sum(x.num_weights * x.weight_bits for x in free) / sum(x.num_weights for x in free),
        "bytes": sum(-(-x.num_weights * x.weight_bits // 8) for x in strategy.values()),
        "compression": sum(x.num_weights * x.weight_bits for x in strategy.values()) / (32 * weights),
        "bitops": sum(x.macs * x.weight_bits * x.activation_bits for x in strategy.values()),
    }
    for name, value in expected.items():
        assert get_cost(name).total(strategy) == pytest.approx(value)
    assert strategy.average_bits() == pytest.approx(expected["bits"])
    assert strategy.compression() == pytest.approx(1 / expected["compression"])
    assert (strategy.weight_bytes(), strategy.bitops()) == (expected["bytes"], expected["bitops"])


@quick
@given(
    networks, st.sampled_from(["bits", "bytes", "bitops"]), st.lists(st.floats(1, 8), min_size=1, max_size=3), st.data()
)
def test_bits_only_fall_and_every_strategy_keeps_its_budget(strategy, name, uniform, data):
    cost = COSTS[name]
    budgets = [cost.of_uniform(strategy, x) for x in uniform]
    if min(budgets) <= 0:
        return
    way = Descent(strategy, cost, budgets, range(1, 9))
    before = dict(way.bits)
    while not way.done:
        layer = data.draw(st.sampled_from(way.movable))
        saved, total = way.saved(layer), way.total()
        way.step_down(layer, damage=data.draw(st.floats(0, 1)))
        assert way.total() == pytest.approx(total - saved)
        assert way.bits[layer] < before[layer]
        assert all(way.bits[other] == before[other] for other in way.names if other != layer)
        before = dict(way.bits)
    for budget, found in zip(budgets, way.strategies(), strict=True):
        assert cost.total(found) <= budget * (1 + 1e-6)
        assert all(
            found[layer].weight_bits == strategy[layer].weight_bits for layer in strategy if strategy[layer].pinned
        )
        assert all(found[layer].weight_bits <= way.start[layer] for layer in way.names)
