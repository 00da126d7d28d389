"""The integer network against the model's own float simulation: equal, number for number."""

from pathlib import Path

import pytest
import torch

from sdq_hf import SDQForImageClassification
from sdq_hf.export.graph import Layer, Quantize
from sdq_hf.export.lower import ExportError, integer_network
from sdq_hf.quantizers.positive import set_floors

from ..test_hardware_profile import Case, model_of
from ..test_networks import tiny_repvgg  # noqa: F401 (timm knows it then)


def profile_of(architecture: str = "resnet8_cifar", size: int = 16, **options) -> Case:
    """A model in the profile whose layers have bits from 1 to 7 in turn."""
    model, images = model_of(architecture, size, **options)
    free = [name for name, layer in model.strategy.items() if not layer.pinned]
    if options.get("granularity") != "kernel":
        model.set_strategy({name: 1 + i % 7 for i, name in enumerate(free)})
    return model.to_hardware_profile([images]).eval(), images


def simulated(model: SDQForImageClassification, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits.double()


@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("resnet8_cifar", 16, {}),
        ("resnet8_cifar", 28, {"activation_bits": 2}),
        ("resnet8_cifar", 16, {"granularity": "kernel"}),
        ("resnet8_cifar", 16, {"weight_grid": "twos_complement", "activation_bits": 8}),
        ("resnet8_cifar", 16, {"weight_quantizer": "dorefa"}),
        ("mobilenetv1_025_cifar", 28, {}),
        ("mobilenetv2_025_cifar", 16, {}),
        ("test_resnet", 32, {}),
        ("tf_mobilenetv3_small_minimal_100", 64, {}),
        ("tiny_repvgg", 32, {"reparameterize": True}),
        # Its blocks call one ReLU twice.
        ("dla34", 32, {"model_args": {"levels": [1, 1, 1, 1, 1, 1], "channels": [8] * 6}}),
    ],
)
def test_integers_and_simulation_agree_exactly(architecture: str, size: int, options: dict):
    model, images = profile_of(architecture, size, **options)
    network = integer_network(model)
    assert torch.equal(network.logits(images), simulated(model, images))


@pytest.mark.parametrize("value", [0.0, 1e6, -1e6])
def test_so_they_do_on_images_that_are_flat_or_saturate_everything(value: float):
    model, images = profile_of()
    network = integer_network(model)
    flat = torch.full_like(images, value)
    assert torch.equal(network.logits(flat), simulated(model, flat))


def test_so_they_do_on_ties_of_the_first_rounding():
    model, images = profile_of()
    network = integer_network(model)
    first = network.nodes[0]
    assert isinstance(first, Quantize)
    # Halfway between two integers, everywhere.
    ties = (torch.randint(first.low, first.high, images.shape) + 0.5) * 2.0**first.exponent
    assert torch.equal(network.logits(ties), simulated(model, ties))
    away = network.run(ties, keep=True)[first.name]
    assert torch.equal(away % 2, torch.zeros_like(away))


def test_so_they_do_with_a_layer_whose_weights_are_all_equal_or_all_zero():
    model, images = profile_of()
    layers = model.quantized_layers()
    for name, value in (("layer1.0.conv1", 0.25), ("layer2.0.conv1", 0.0)):
        layers[name].weight.data.fill_(value)
        layers[name].weight_quantizer.fit_scale(layers[name].weight)
    assert torch.equal(integer_network(model).logits(images), simulated(model, images))


def test_integers_too_long_for_float32_agree_in_float64():
    model, images = profile_of()
    # Weights of next to nothing, as a layer has that timm starts at zero.
    layer = model.quantized_layers()["layer2.0.conv2"]
    layer.weight.data.mul_(2.0**-24)
    layer.weight_quantizer.scale.data.mul_(2.0**-24)
    set_floors(layer, {"weight_quantizer": None})
    network = integer_network(model)
    assert "layer2.0.conv2" in network.inexact_in_float32()
    assert not torch.equal(network.logits(images), simulated(model, images))
    assert torch.equal(network.logits(images), simulated(model.double(), images.double()))


def test_after_a_file_too(tmp_path: Path):
    model, images = profile_of()
    model.save_pretrained(tmp_path, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(integer_network(loaded).logits(images), simulated(model, images))


def test_one_weight_more_or_less_is_seen():
    model, images = profile_of()
    network = integer_network(model)
    before = network.logits(images)
    layer = network.layers["layer2.0.conv2"]
    layer.weight.view(-1)[7] += 2
    assert not torch.equal(network.logits(images), before)


def test_every_integer_stays_in_its_range_and_sums_in_theirs():
    model, images = profile_of()
    network = integer_network(model)
    values = network.run(torch.cat([images, 1e6 * images, torch.zeros_like(images)]), keep=True)
    for node in network.nodes:
        found = values[node.name]
        assert found.shape[1:] == node.shape
        assert node.low <= found.min(), node.name
        assert found.max() <= node.high, node.name
        if isinstance(node, Layer):
            # The extreme that can be reached, by a plain loop over the channels.
            taken = network[node.inputs[0]]
            lowest = [
                sum(min(w * taken.low, w * taken.high, 0) for w in row.flatten().tolist()) + min(b, 0)
                for row, b in zip(node.weight, node.bias.tolist(), strict=True)
            ]
            assert node.sum_low == min(lowest)


def test_a_convolution_is_a_plain_loop_over_integers():
    model, images = profile_of(size=8)
    network = integer_network(model)
    values = network.run(images[:1], keep=True)
    node = network.layers["layer2.0.conv1"]
    x = values[node.inputs[0]][0].tolist()
    stride, got = node.stride[0], values[node.name][0]
    assert stride == 2
    for o in range(3):
        for row in range(got.shape[1]):
            for column in range(got.shape[2]):
                total = int(node.bias[o])
                for i in range(node.weight.shape[1]):
                    for u in range(3):
                        for v in range(3):
                            r, c = row * stride + u - 1, column * stride + v - 1
                            if 0 <= r < len(x[0]) and 0 <= c < len(x[0][0]):
                                total += int(node.weight[o, i, u, v]) * x[i][r][c]
                assert int(got[o, row, column]) == total << (node.exponents[o] - min(node.exponents))


@pytest.mark.parametrize("size", [8, 24, 32, 64])
def test_images_of_another_size_are_refused(size: int):
    """With strides and windows that lie side by side some would give logits, of a part of the image."""
    network = integer_network(profile_of()[0])
    message = rf"resnet8_cifar takes images \[B, 3, 16, 16\], got \[2, 3, {size}, {size}\]"
    with pytest.raises(ValueError, match=message):
        network.logits(torch.randn(2, 3, size, size))


def test_a_model_whose_size_of_images_was_changed_is_refused():
    model, _ = profile_of()
    model.config.pretrained_cfg["input_size"] = [3, 24, 24]
    with pytest.raises(
        ExportError, match="size of images is fixed: the average 'global_pool' is of 4 x 4 pixels, got 6"
    ):
        integer_network(model)


def test_a_model_that_is_not_in_the_profile_is_refused():
    model, _ = model_of()
    with pytest.raises(ExportError, match="not in the hardware profile: its scales are floats"):
        integer_network(model)


def test_a_model_in_float_mode_is_refused():
    model, _ = profile_of()
    with model.float_mode(), pytest.raises(ExportError, match="in float_mode: leave that first"):
        integer_network(model)


def test_a_model_whose_biases_are_rounded_is_refused(tmp_path: Path):
    profile_of()[0].save_pretrained(tmp_path, print_size=False)
    with pytest.raises(ExportError, match=r"loaded in torch\.bfloat16, which rounds its biases: load it in float32"):
        integer_network(SDQForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_an_operation_without_an_integer_form_is_refused_by_name():
    model, images = model_of("resnet8_cifar", model_args={"act_layer": "silu"})
    with pytest.raises(ExportError, match="'act1' is a SiLU, which has no integer form"):
        integer_network(model.to_hardware_profile([images]))


def test_so_is_one_outside_of_layers_by_the_module_that_computes_it():
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "block_args": {"attn_layer": "se"}}
    model, images = model_of("resnet10t", 64, model_args=options)
    message = r"'mean' is the operation 'mean' in 'layer1\.0\.se' \(SEModule\), which has no integer form"
    with pytest.raises(ExportError, match=message):
        integer_network(model.to_hardware_profile([images]))


def test_the_largest_of_windows_that_reach_over_the_end_has_an_integer_form():
    model, images = profile_of("test_resnet", 32)
    pool = model.timm_model.maxpool
    before = integer_network(model)["maxpool"].shape
    # The same number of windows, which start at the edge and end beyond the other one.
    pool.padding, pool.ceil_mode = 0, True
    network = integer_network(model)
    assert network["maxpool"].shape == before
    assert network["maxpool"].padding == (0, 1, 0, 1)
    assert torch.equal(network.logits(images), simulated(model, images))


def test_windows_that_reach_over_the_end_are_refused_and_those_that_fit_are_averages():
    """ResNet-D halves shortcuts by averages with ceil_mode."""
    options = {"model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
    model, images = profile_of("resnet10t", 64, **options)
    assert torch.equal(integer_network(model).logits(images), simulated(model, images))
    message = r"'layer4\.0\.downsample\.0': its windows of 2 x 2 pixels reach over the end of 3 x 3 pixels"
    with pytest.raises(ExportError, match=message):
        integer_network(profile_of("resnet10t", 48, **options)[0])


def test_a_float_layer_is_refused_by_name():
    for options, name, what in (
        ({"pins": {"layer2.0.conv1": 32}}, r"layer2\.0\.conv1", "weights are float"),
        ({"activation_bits": 32}, r"layer1\.0\.conv1", "inputs are float"),
    ):
        model, images = model_of(**options)
        with pytest.raises(ValueError, match=f"Layer '{name}': its {what}, and integer hardware needs 1 to 8 bits"):
            model.to_hardware_profile([images])
    # One that has powers of two all the same.
    model, _ = model_of(pins={"layer2.0.conv1": 32}, scales="power_of_two")
    with pytest.raises(ExportError, match=r"Layer 'layer2\.0\.conv1' is float"):
        integer_network(model)
    model, _ = model_of(activation_bits=32, scales="power_of_two")
    with pytest.raises(ExportError, match=r"Layer 'layer1\.0\.conv1': its inputs are float"):
        integer_network(model)
    model, images = model_of()
    with pytest.raises(ValueError, match=r"Layer 'conv1': its weights are float.*before dequantize"):
        model.dequantize().to_hardware_profile([images])
