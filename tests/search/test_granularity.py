"""Blocks, whole networks and output channels as what shares one bitwidth: in search, file, costs and plots."""

import copy
import math
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from sdq_hf import LayerBits, SDQConfig, SDQForImageClassification, Strategy
from sdq_hf.costs import COSTS, get_cost
from sdq_hf.hub import plots
from sdq_hf.packed_files import weight_file_bytes
from sdq_hf.packing import pack_channels, packed_size, unpack_channels
from sdq_hf.quantizers.weight import best_channel_scales, best_scale, fake_quantize
from sdq_hf.search import SearchLog, search
from sdq_hf.search.descent import Descent
from sdq_hf.search.stochastic_weights import StochasticWeights
from sdq_hf.search.units import units_of
from sdq_hf.training.losses import total_bin_regularization
from sdq_hf.training.optim import OptimizerArguments, create_optimizer
from tests.planted import Images

BLOCKS = {
    "resnet8_cifar": ["layer1.0", "layer2.0", "layer3.0"],
    "vit_tiny_patch16_224": ["blocks.0", "blocks.1", "blocks.2"],
}


def network(granularity, architecture="resnet8_cifar", **options):
    torch.manual_seed(0)
    options = {"img_size": 32, "num_labels": 10} | options
    return SDQForImageClassification.from_timm(architecture, granularity=granularity, **options)


@pytest.fixture(scope="module")
def kernels():
    """A model whose channels have bits of their own, 1 to 8, drawn at random."""
    model = network("kernel")
    generator = torch.Generator().manual_seed(1)
    bits = {
        name: tuple(torch.randint(1, 9, (len(layer.weight_bits),), generator=generator).tolist())
        for name, layer in model.strategy.items()
        if not layer.pinned
    }
    model.set_strategy(bits)
    model.calibrate(Images())
    return model.eval()


@pytest.mark.parametrize("architecture", BLOCKS)
def test_blocks_are_timms(architecture):
    model = network("block", architecture, model_args={"img_size": 32, "depth": 3} if "vit" in architecture else {})
    units = units_of(model.timm_model, model.strategy, "block")
    assert list(units) == BLOCKS[architecture]
    assert all(layer.startswith(name) for name, unit in units.items() for layer in unit.layers)
    assert [layer for unit in units.values() for layer in unit.layers] == list(model.strategy.searchable)


@pytest.mark.parametrize("granularity", ["block", "net"])
@pytest.mark.parametrize(
    "method", ["two_sided", "paper", "greedy", "random", "table", "hawq", "clado", "fracbits", "edmips"]
)
def test_layers_of_a_unit_have_the_same_bits_and_the_budget_is_kept(granularity, method):
    model = network(granularity, candidates=[2, 4, 6])
    options = {"table": {"images": 64}, "hawq": {"images": 64, "probes": 1}, "clado": {"images": 64}}
    options |= {name: {"batches": 4} for name in ("fracbits", "edmips")} | {"paper": {"lr": 30.0}}
    log = SearchLog()
    data = Images() if method not in ("greedy", "random") else None
    (found,) = search(
        model, data, [4.2], method=method, log=log, accelerator=Accelerator(cpu=True), **options.get(method, {})
    )
    units = units_of(model.timm_model, model.strategy, granularity)
    for unit in units.values():
        assert len({found[layer].weight_bits for layer in unit.layers}) == 1
    assert found.average_bits() <= 4.2
    assert set(log.start) == set(units)
    for move in log.moves:
        assert move["layer"] in units
    if log.moves:
        (cost, *_) = plots.figure_descent({"bits": log.to_json()}).axes
        assert cost.get_lines()[0].get_ydata()[-1] == log.moves[-1]["cost"]


def test_a_blocks_price_and_floor_are_those_of_its_layers():
    model = network("block")
    start, units = model.strategy, units_of(model.timm_model, model.strategy, "block")
    way = Descent(start, COSTS["bitops"], [3e8], range(1, 9), 8, {"layer2.0.conv1": 5, "layer3*": 2}, units)
    assert way.floor == {"layer1.0": 1, "layer2.0": 5, "layer3.0": 2}
    before = start.with_bits(8)
    for name, unit in units.items():
        after = before.with_bits(dict.fromkeys(unit.layers, 7))
        assert way.saved(name) == pytest.approx(before.bitops() - after.bitops())
    way.step_down("layer2.0", damage=0.1)
    inside = [name for name in start if name.startswith("layer2.0.")]
    assert len(inside) == 3
    assert way.total() == pytest.approx(before.with_bits(dict.fromkeys(inside, 7)).bitops())


def test_a_blocks_gradient_is_the_sum_of_its_layers():
    model = network("layer").eval()
    images = Images().batches[0]["pixel_values"][:8]
    model.calibrate([images])
    gradients = {}
    for granularity in ("layer", "block"):
        units = units_of(model.timm_model, model.strategy, granularity)
        way = Descent(model.strategy, COSTS["bits"], [2.0], range(1, 9), 3, None, units)
        weights = StochasticWeights(model, way)
        weights.start()
        weights.choose(dict.fromkeys(units, 1.0))
        model(images).logits.square().sum().backward()
        gradients[granularity] = dict(zip(units, weights.gradients().tolist(), strict=True))
        weights.clear()
    for name, unit in units.items():
        expected = sum(gradients["layer"][layer] for layer in unit.layers)
        assert gradients["block"][name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (5, 13)])
def test_channels_of_all_bits_are_packed_without_gaps(shape):
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(1, 9, (shape[0],), generator=generator).tolist()
    codes = torch.stack([torch.randint(0, 2**b, shape[1:], generator=generator) for b in bits]).to(torch.uint8)
    packed = pack_channels(codes, bits)
    assert packed.numel() == math.ceil(math.prod(shape[1:]) * sum(bits) / 8)
    assert torch.equal(unpack_channels(packed, bits, shape), codes)
    # Bit for bit in plain Python: channels of fewest bits first, the lowest bit of a code first.
    stream = [
        (int(code) >> place) & 1
        for width in sorted(set(bits))
        for channel in range(shape[0])
        if bits[channel] == width
        for code in codes[channel].flatten()
        for place in range(width)
    ]
    assert packed.tolist() == [
        sum(bit << i for i, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8)
    ]


def test_each_channel_is_quantized_as_a_layer_of_its_own(kernels):
    for name, layer in kernels.quantized_layers().items():
        bits = kernels.strategy[name].weight_bits
        if isinstance(bits, int):
            assert layer.weight_quantizer.scale.dim() == 0
            continue
        assert len(set(bits)) > 1
        weight, quantizer = layer.weight, layer.weight_quantizer
        quantized = quantizer(weight)
        quantized.square().sum().backward()
        expected = weight.detach().clone().requires_grad_()
        # Scales may differ where two are as good.
        for c, width in enumerate(bits):
            errors = [
                (fake_quantize(weight[c].detach(), "lsq", "midrise", width, scale) - weight[c]).square().sum().item()
                for scale in (quantizer.scale[c].detach(), best_scale(weight[c], "lsq", "midrise", width))
            ]
            assert errors[0] == pytest.approx(errors[1], rel=1e-4)
        scales = [scale.clone().requires_grad_() for scale in quantizer.scale.detach()]
        parts = [fake_quantize(expected[c], "lsq", "midrise", bits[c], scales[c]) for c in range(len(bits))]
        torch.testing.assert_close(quantized, torch.stack(parts))
        torch.stack(parts).square().sum().backward()
        torch.testing.assert_close(weight.grad, expected.grad)
        # LSQ's gradient scale, of the weights of one channel.
        factors = [1 / math.sqrt(weight[0].numel() * (2**b - 1)) for b in bits]
        slopes = torch.stack([scale.grad * factor for scale, factor in zip(scales, factors, strict=True)])
        torch.testing.assert_close(quantizer.scale.grad, slopes, rtol=1e-4, atol=1e-6)
        assert torch.equal(
            quantizer.integers(weight), quantizer.integers(quantizer.from_codes(quantizer.codes(weight)))
        )


def test_a_file_of_channels_loads_bit_for_bit_and_is_as_small_as_its_bits(kernels, tmp_path):
    kernels.save_pretrained(tmp_path, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path)
    images = Images().batches[0]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, kernels(images).logits)
    assert loaded.strategy == kernels.strategy
    packed = load_file(tmp_path / "model.safetensors")
    for name, layer in kernels.strategy.items():
        bits = layer.weight_bits
        each = Counter(bits if isinstance(bits, tuple) else [bits])
        weights = layer.num_weights // each.total()
        size = packed_size(sum(b * n for b, n in each.items()) * weights, 1)
        assert packed[f"timm_model.{name}.weight_packed"].numel() == size
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert weight_file_bytes(tmp_path) - header <= kernels.ideal_bytes() + len(kernels.strategy) + 32
    # Training goes on from what was loaded, and the head of an optimizer takes the scales.
    loaded.train()
    optimizer = create_optimizer(loaded, OptimizerArguments(lr=1e-3))
    (loaded(images).logits.square().mean() + total_bin_regularization(loaded)).backward()
    optimizer.step()
    again = SDQForImageClassification.from_pretrained(tmp_path).dequantize()
    with torch.no_grad():
        assert torch.equal(again(images).logits, kernels(images).logits)


def test_costs_of_channels_are_those_of_their_bits(kernels):
    strategy = kernels.strategy
    plain = [
        (layer.num_weights // len(bits), layer.macs // len(bits), b, layer.activation_bits)
        for layer in strategy.values()
        for bits in [layer.weight_bits if isinstance(layer.weight_bits, tuple) else (layer.weight_bits,)]
        for b in bits
    ]
    inner = [layer for layer in strategy.values() if not layer.pinned]
    searched = [(layer.num_weights // len(layer.weight_bits), b) for layer in inner for b in layer.weight_bits]
    assert strategy.average_bits() == pytest.approx(sum(n * b for n, b in searched) / sum(n for n, _ in searched))
    assert strategy.bitops() == sum(macs * b * a for _, macs, b, a in plain)
    assert get_cost("bitops").total(strategy) == pytest.approx(strategy.bitops())
    assert get_cost("bits").total(strategy) == pytest.approx(strategy.average_bits())
    assert get_cost("bytes").total(strategy) == pytest.approx(strategy.weight_bytes(), abs=len(strategy))
    assert Strategy.from_json(strategy.to_json()) == strategy
    assert SDQConfig.from_dict(kernels.config.to_dict()).strategy == kernels.config.strategy


@pytest.mark.parametrize(
    ("method", "options"),
    [("two_sided", {}), ("paper", {"lr": 30.0, "cost_weight": 30.0}), ("greedy", {}), ("size", {}), ("random", {})],
)
def test_channels_are_searched_and_the_budget_is_kept(method, options):
    model = network("kernel", img_size=16, candidates=[2, 4, 6])
    before = copy.deepcopy(model.state_dict())
    seen = []

    def once(state):
        if not seen and state.batch == 20:
            seen.append(copy.deepcopy(state.state_dict()))

    arguments = {"method": method, "accelerator": Accelerator(cpu=True), "max_batches": 3000, **options}
    data = Images() if method in ("two_sided", "paper") else None
    (found,) = search(model, data, [4.5], on_step=once, **arguments)
    assert 4.45 <= found.average_bits() <= 4.5
    widths = {name: set(layer.weight_bits) for name, layer in found.items() if not layer.pinned}
    assert any(len(width) > 1 for width in widths.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "input" not in key)
    if seen and method == "two_sided":
        assert search(model, Images(), [4.5], resume_from=seen[0], **arguments) == [found]
    model.set_strategy(found)


def test_a_channel_that_does_not_matter_loses_its_bits():
    """Half of a layer's channels are multiplied by zero behind it."""
    torch.manual_seed(0)
    model = network("kernel", img_size=16, candidates=[2, 4, 6])
    dead = range(0, 16, 2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
        model.timm_model.layer1[0].bn1.weight[list(dead)] = 0.0
    (found,) = search(model, Images(), [4.5], accelerator=Accelerator(cpu=True), weight_lr=0.0)
    bits = found["layer1.0.conv1"].weight_bits
    means = [sum(bits[c] for c in part) / 8 for part in (dead, range(1, 16, 2))]
    assert means[0] < means[1] - 1


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_channels_may_have_scales_of_their_own_at_the_bits_of_the_layer(bits, tmp_path):
    model = network("layer", weight_scale="channel", img_size=16).eval()
    model.set_strategy(bits)
    model.calibrate(Images())
    for name, layer in model.quantized_layers().items():
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        assert quantizer.scale.shape == weight.shape[:1]
        expected = best_channel_scales(weight, "lsq", "midrise", [quantizer.bits] * len(weight))
        torch.testing.assert_close(quantizer.scale.detach(), expected)
        parts = [
            fake_quantize(w, "lsq", "midrise", quantizer.bits, scale)
            for w, scale in zip(weight, quantizer.scale.detach(), strict=True)
        ]
        assert torch.equal(quantizer(weight).detach(), torch.stack(parts)), name
    model.save_pretrained(tmp_path, print_size=False)
    images, loaded = Images().batches[0]["pixel_values"], SDQForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(images).logits
        assert torch.equal(loaded(images).logits, logits)
        assert torch.equal(loaded.dequantize()(images).logits, logits)
    loss = model(images).logits.square().mean() + total_bin_regularization(model)
    loss.backward()
    # Branches that end in a norm of weight 0 have no gradient.
    for name in ("conv1", "fc"):
        assert (model.quantized_layers()[name].weight_quantizer.scale.grad != 0).all()
    plots.figure_weights(model)


@pytest.mark.parametrize("method", ["two_sided", "table", "hawq", "fracbits"])
def test_layers_whose_channels_have_scales_of_their_own_are_searched(method):
    model = network("layer", weight_scale="channel", img_size=16, candidates=[2, 4, 6])
    options = {"table": {"images": 64}, "hawq": {"images": 64, "probes": 1}, "fracbits": {"batches": 4}}
    accelerator, seen = Accelerator(cpu=True), []

    def look(state):
        if state.batch == 8:
            seen.append(copy.deepcopy(state.state_dict()))

    arguments = {"method": method, "accelerator": accelerator, **options.get(method, {})}
    (found,) = search(model, Images(), [4.0], on_step=look, **arguments)
    assert found.average_bits() <= 4.0
    if method == "two_sided":
        assert search(model, Images(), [4.0], resume_from=seen[0], **arguments) == [found]


def test_channels_keep_their_scale_when_their_bits_stay(kernels):
    model = copy.deepcopy(kernels)
    name = "layer1.0.conv1"
    quantizer, bits = model.quantized_layers()[name].weight_quantizer, list(model.strategy[name].weight_bits)
    with torch.no_grad():
        quantizer.scale.mul_(1.5)
    before, bits[3] = quantizer.scale.detach().clone(), bits[3] % 8 + 1
    model.set_strategy({name: tuple(bits)})
    changed = (quantizer.scale != before).nonzero().flatten().tolist()
    assert changed == [3]
    expected = best_channel_scales(model.quantized_layers()[name].weight, "lsq", "midrise", bits)[3]
    assert quantizer.scale[3].item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: network("kernel", weight_quantizer="dorefa"), "granularity 'kernel' needs weight_quantizer 'lsq'"),
        (lambda: network("layer", weight_scale="channel", weight_quantizer="dorefa"), "weight_scale 'channel' needs"),
        (lambda: network("channel"), "granularity must be one of layer, block, net, kernel"),
        (lambda: network("layer").set_strategy({"layer1.0.conv1": (3,) * 16}), "for a model of granularity 'kernel'"),
        (
            lambda: network("kernel").set_strategy({"layer1.0.conv1": (3,) * 8}),
            "has 16 output channels, the strategy 8",
        ),
        (lambda: LayerBits((3, 9), 4, 10, 10), "channels must be 1 to 8 each"),
        (lambda: LayerBits((3, 4, 5), 4, 10, 12), "multiples of its 3 channels"),
        (lambda: search(network("kernel"), Images(), [3.0], method="table"), "does not search granularity 'kernel'"),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
