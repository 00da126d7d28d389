"""The hardware profile of a model: no batch norm, scales of powers of two, integer biases."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d, SelectAdaptivePool2d
from timm.models.selecsls import SelectSeq
from torch import nn

from sdq_hf import SDQConfig, SDQForImageClassification
from sdq_hf.backbones import create_backbone
from sdq_hf.batch_norm import ShiftAvgPool2d, fold_batch_norm, trace
from sdq_hf.export.lower import integer_network
from sdq_hf.quantizers.power_of_two import exponent
from sdq_hf.search import search

Case = tuple[SDQForImageClassification, torch.Tensor]


def trained_looks(network: nn.Module) -> nn.Module:
    """Batch norm with statistics and parameters as a training leaves them: none at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.3, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return network


def model_of(architecture: str = "resnet8_cifar", size: int = 16, **options) -> Case:
    torch.manual_seed(0)
    network = trained_looks(create_backbone(architecture, num_classes=5, **options.get("model_args", {})))
    model = SDQForImageClassification.from_float(network, architecture, img_size=size, **options).eval()
    images = torch.randn(8, 3, size, size)
    model.calibrate([images])
    return model, images


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("resnet8_cifar", 28),
        ("mobilenetv2_025_cifar", 16),
        ("test_resnet", 32),
        ("tf_mobilenetv3_small_minimal_100", 96),
        # It asks its average whether it is none.
        ("lowformer_b0", 32),
    ],
)
def test_folding_keeps_the_function_and_leaves_no_batch_norm(architecture: str, size: int):
    torch.manual_seed(0)
    network = trained_looks(create_backbone(architecture, num_classes=5)).double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        before = network(images)
        after = fold_batch_norm(network, (3, size, size))(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    # Some of the networks average over a number of pixels that is no power of two: 7 x 7 and 3 x 3.
    assert any(isinstance(module, ShiftAvgPool2d) for module in network.modules())
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_a_network_without_a_layer_before_batch_norm_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"Batch norm 'features\.denseblock1\.denselayer1\.norm1' stands behind no conv"
    ):
        fold_batch_norm(create_backbone("densenet121"), (3, 32, 32))


@pytest.mark.parametrize(
    ("architecture", "where"),
    [
        ("mobilevit_xxs", r"\('stages\.2\.1', a MobileVitBlock: symbolically traced variables"),
        # The network itself, in none of its modules.
        ("test_vit", r"\(symbolically traced variables"),
    ],
)
def test_a_network_whose_steps_depend_on_the_image_is_refused_by_the_module(architecture: str, where: str):
    with torch.device("meta"), pytest.raises(ValueError, match=f"computes no fixed sequence of layers {where}"):
        fold_batch_norm(create_backbone(architecture), (3, 32, 32))


def test_a_module_that_picks_one_of_several_tensors_is_no_layer():
    with torch.device("meta"):
        network = create_backbone("selecsls42")
        assert isinstance(network.from_seq, SelectSeq)
        graph = trace(network)
    (head,) = (node for node in graph.nodes if node.target == "head.0.0")
    assert head.args[0].target == "features.5.conv6.2"


def test_an_average_that_is_the_output_must_be_a_shift():
    """Nothing is behind it to take up the rest of the factor."""
    source = create_backbone("resnet8_cifar", num_classes=0)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = source.eval()(images)
        torch.testing.assert_close(fold_batch_norm(source, (3, 16, 16))(images), expected)
    with pytest.raises(
        ValueError, match="'global_pool' over 6 x 6 pixels cannot be a shift: 'output' stands behind it"
    ):
        fold_batch_norm(create_backbone("resnet8_cifar", num_classes=0), (3, 24, 24))


@pytest.mark.parametrize("pool_type", ["fast", "fastavg", "avg"])
@pytest.mark.parametrize("flatten", [True, False])
def test_each_form_of_timms_average_is_a_shift(pool_type: str, flatten: bool):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), SelectAdaptivePool2d(1, pool_type, flatten), nn.Conv2d(4, 5, 1))
    if flatten:
        network[2] = nn.Linear(4, 5)
    images = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fold_batch_norm(network, (3, 5, 6))(images), expected)
    assert isinstance(network[1], ShiftAvgPool2d)


@pytest.mark.parametrize(
    "pool", [SelectAdaptivePool2d(2, "avg"), SelectAdaptivePool2d(1, "fast", input_fmt="NHWC")], ids=["2 x 2", "NHWC"]
)
def test_other_averages_are_left_as_they_are(pool: nn.Module):
    network, images = nn.Sequential(nn.Conv2d(3, 6, 1), pool), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(fold_batch_norm(network, (3, 6, 6))(images), expected)


def test_what_timm_has_inside_a_batch_norm_stays():
    network = create_backbone("resnet8_cifar", num_classes=5)
    network.bn1 = trained_looks(BatchNormAct2d(16, drop_layer=partial(nn.Dropout2d, 0.5))).eval()
    network, images = network.eval(), torch.randn(2, 3, 16, 16)
    before = network(images)
    after = fold_batch_norm(network, (3, 16, 16))(images)
    torch.testing.assert_close(after, before)
    assert [type(module) for module in network.bn1] == [nn.Dropout2d, nn.ReLU]


def test_an_image_of_another_size_than_that_of_the_average_is_refused():
    model, images = model_of(size=28)
    profile = model.to_hardware_profile([images])
    with pytest.raises(ValueError, match="the average 'global_pool' is of 7 x 7 pixels, got 8 x 8"):
        profile(torch.randn(1, 3, 32, 32))


def test_weights_for_one_size_are_those_for_another_with_the_same_odd_factor_of_pixels():
    """7 x 7 and 14 x 14: the network folded for 28 pixels has the function of the float one on images of 56."""
    torch.manual_seed(0)
    source = trained_looks(create_backbone("resnet8_cifar", num_classes=5)).double().eval()
    small, large = (fold_batch_norm(copy.deepcopy(source), (3, size, size)) for size in (28, 56))
    large.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(large(images), source(images), rtol=1e-9, atol=1e-9)


def test_a_file_is_loaded_for_images_of_another_size_only_where_its_weights_are_right_for_it(tmp_path: Path):
    model, images = model_of(size=28)
    profile = model.to_hardware_profile([images]).eval()
    profile.save_pretrained(tmp_path / "28", print_size=False)

    def load(folder: str, size: int) -> SDQForImageClassification:
        changed = {**profile.config.pretrained_cfg, "input_size": [3, size, size]}
        return SDQForImageClassification.from_pretrained(tmp_path / folder, pretrained_cfg=changed)

    with pytest.raises(ValueError, match=r"average 'global_pool' are for 7 x 7 pixels, .*\(3, 24, 24\).* leave 6 x 6"):
        load("28", 24)
    larger, pixels = load("28", 56), torch.randn(4, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(integer_network(larger).logits(pixels), larger(pixels).logits.double())
        larger.save_pretrained(tmp_path / "56", print_size=False)
        assert torch.equal(load("56", 28)(images).logits, profile(images).logits)
    with pytest.raises(ValueError, match="are for 14 x 14 pixels"):
        load("56", 24)


class TwoHeads(nn.Module):
    """A layer that takes an average and something else, or two averages."""

    def __init__(self, second: str):
        super().__init__()
        self.conv, self.second, self.head = nn.Conv2d(3, 4, 3, padding=1), second, nn.Linear(4, 5)
        self.pool, self.other = SelectAdaptivePool2d(flatten=True), SelectAdaptivePool2d(flatten=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        second = x[:, :, 0, 0] if self.second == "pixel" else getattr(self, self.second)(x.relu())
        return self.head(self.pool(x)) + self.head(second)


@pytest.mark.parametrize("second", ["other", "pool", "pixel"])
def test_a_layer_that_takes_an_average_and_something_else_takes_no_factor(second: str):
    """It would take that of each average, for all that it computes."""
    network, images = TwoHeads(second).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fold_batch_norm(copy.deepcopy(network), (3, 8, 8))(images), expected)
    with pytest.raises(
        ValueError, match=r"'(pool|other)' over 7 x 7 .* a shift: layer 'head' behind it is used elsewhere"
    ):
        fold_batch_norm(network, (3, 7, 7))


def test_the_profile_has_the_strategy_and_nearly_the_function_of_its_model():
    model, images = model_of(first_last_bits=8, activation_bits=8)
    model.set_strategy({"layer1.0.conv1": 5, "layer2.0.conv2": 6})
    profile = model.to_hardware_profile([images])
    assert profile.strategy == model.strategy
    with torch.no_grad():
        wanted, got = model(images).logits, profile(images).logits
    assert (got - wanted).norm() < 0.1 * wanted.norm()
    assert not torch.equal(got, wanted)


def test_units_are_powers_of_two_and_biases_whole_numbers_of_them():
    model, images = model_of()
    profile = model.to_hardware_profile([images])
    for layer in profile.quantized_layers().values():
        inputs, weights = layer.input_quantizer, layer.weight_quantizer
        assert inputs is not None
        unit = 2.0 ** (exponent(weights.unit) + exponent(inputs.effective_step)).double()
        bias = layer.quantized_bias()
        assert bias is not None
        whole = bias.double() / unit
        assert torch.equal(whole, whole.round())
        assert (bias - layer.bias).abs().max() <= unit.max() / 2


@pytest.mark.parametrize("options", [{}, {"granularity": "kernel"}, {"weight_quantizer": "dorefa"}])
def test_save_and_load_give_the_same_logits(tmp_path: Path, options: dict):
    model, images = model_of(**options)
    profile = model.to_hardware_profile([images]).eval()
    for quantizer in (layer.weight_quantizer for layer in profile.quantized_layers().values()):
        # As after a training: no power of two any more.
        quantizer.scale.data *= 1.1
    profile.save_pretrained(tmp_path, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.scales == "power_of_two"
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, profile(images).logits)
        assert torch.equal(loaded.dequantize()(images).logits, profile(images).logits)


def test_biases_in_units_that_are_not_fitted_yet_are_not_dequantized():
    model, images = model_of(scales="power_of_two")
    model._forget_steps()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Layer 'conv1': its activation step was never fitted.*calibrate"):
        model.dequantize()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.calibrate(images)
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(model.dequantize()(images).logits, expected)


def test_it_can_be_searched_and_trained_from_the_start():
    torch.manual_seed(0)
    network = trained_looks(create_backbone("resnet8_cifar", num_classes=5))
    model = SDQForImageClassification.from_float(network, "resnet8_cifar", img_size=16, scales="power_of_two")
    batches = [{"pixel_values": torch.randn(8, 3, 16, 16)} for _ in range(4)]
    model.calibrate(batches)
    (strategy,) = search(model, batches, budgets=[3.0], max_batches=2000)
    assert strategy.average_bits() <= 3.0
    model.set_strategy(strategy)
    model.train()
    logits = model(batches[0]["pixel_values"]).logits
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_profile_has_no_profile():
    model, images = model_of()
    with pytest.raises(ValueError, match="in the hardware profile already"):
        model.to_hardware_profile([images]).to_hardware_profile([images])


def test_scales_are_checked():
    with pytest.raises(ValueError, match="scales must be one of float, power_of_two, got 'powers'"):
        SDQConfig(scales="powers")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"global_pool": [7]}, r"average_sizes\['global_pool'\] must be \[height, width\] in pixels, got \[7\]"),
        ({"global_pool": [7, 0]}, r"got \[7, 0\]"),
        ({"global_pool": [7, 10**9]}, "must be"),
        ({3: [7, 7]}, "must map names of poolings"),
        ([7, 7], "must map names of poolings"),
    ],
)
def test_average_sizes_are_checked(sizes, message: str):
    with pytest.raises(ValueError, match=message):
        SDQConfig(average_sizes=sizes)
