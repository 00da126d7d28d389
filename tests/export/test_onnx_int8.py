"""The 8-bit ONNX file: integer kernels, and how near they come to the integer network."""

from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from sdq_hf.export.graph import Add, Clip, IntegerNetwork, Layer, MaxPool, Node, Quantize  # noqa: E402
from sdq_hf.export.lower import ExportError, integer_network  # noqa: E402
from sdq_hf.export.onnx_int8 import SESSION, export_onnx_int8, int8_weight, ranges  # noqa: E402

from .test_lower import profile_of  # noqa: E402
from .test_onnx_qdq import LEVELS, Square, conv, logits_of, small  # noqa: E402


def rounded(source: Node, name: str, exponent: int, bits: int, signed: bool) -> Quantize:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return Quantize(
        name=name,
        inputs=(source.name,),
        shape=source.shape,
        exponent=exponent,
        low=low,
        high=high,
        bits=bits,
        signed=signed,
        source_exponent=source.exponent,
    )


def second(source: Quantize) -> Layer:
    """A convolution of three channels, each with 5-bit weights and units of its own."""
    weight = torch.randint(-16, 16, (3, 3, 3, 3), generator=torch.Generator().manual_seed(1))
    return conv(
        "second",
        source.shape,
        inputs=(source.name,),
        exponent=source.exponent - 6,
        weight=weight,
        exponents=(-6, -5, -4),
        weight_bits=5,
        grid="twos_complement",
    )


def chain(*between: Node) -> IntegerNetwork:
    """Convolution, `between`, convolution: all that is rounded is rounded by the model itself."""
    last = between[-1]
    assert isinstance(last, Quantize)
    behind = second(last)
    return small(*between, behind, rounded(behind, "end", -1, 8, True))


def clip(source: Node, top: int | None) -> Clip:
    return Clip(
        name="clip",
        inputs=(source.name,),
        shape=source.shape,
        exponent=source.exponent,
        low=0,
        high=source.high if top is None else top << -source.exponent,
        bounds=(0, None if top is None else top << -source.exponent),
    )


def pool(source: Node, shape: tuple[int, ...]) -> MaxPool:
    return MaxPool(
        name="pool",
        inputs=(source.name,),
        shape=shape,
        exponent=source.exponent,
        low=source.low,
        high=source.high,
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1, 1, 1),
    )


FIRST = conv()
RELU = clip(FIRST, None)
POOL = pool(RELU, (3, 3, 3))


@pytest.mark.parametrize("level", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL], ids=["float", "integer kernels"])
@pytest.mark.parametrize(
    "between",
    [
        (FIRST, rounded(FIRST, "r", -2, 4, True)),
        (FIRST, rounded(FIRST, "r", -5, 8, True)),
        (FIRST, RELU, rounded(RELU, "r", -3, 3, False)),
        (FIRST, RELU, rounded(RELU, "r", -2, 1, False)),
        # 6 is level 12 of 15; 2 is level 1 of 3 and halfway between two of the next.
        (FIRST, clip(FIRST, 6), rounded(clip(FIRST, 6), "r", -1, 4, False)),
        (FIRST, clip(FIRST, 2), rounded(clip(FIRST, 2), "r", 2, 2, False)),
        (FIRST, RELU, rounded(RELU, "r", -2, 5, True)),
        (FIRST, RELU, POOL, rounded(POOL, "r", -1, 4, False)),
    ],
    ids=["signed4", "signed8", "unsigned3", "unsigned1", "relu6", "relu2", "relu signed", "pool"],
)
def test_where_the_model_rounds_everything_the_logits_are_its_own(tmp_path: Path, between: tuple[Node, ...], level):
    network = chain(*between)
    images = torch.randn(16, 2, 6, 5)
    export_onnx_int8(network, tmp_path / "model.onnx", [images])
    ties = (torch.randint(-128, 127, images.shape) + 0.5) * 2.0**-5
    for pixels in (images, 1e6 * images, ties):
        assert torch.equal(logits_of(tmp_path / "model.onnx", pixels, level), network.logits(pixels))


@pytest.mark.parametrize("top", [None, 6])
def test_a_tensor_that_a_clip_and_another_node_take_is_on_a_grid_over_its_range(tmp_path: Path, top: int | None):
    clipped = clip(FIRST, top)
    total = Add(
        name="sum",
        inputs=("conv", "clip"),
        shape=FIRST.shape,
        exponent=FIRST.exponent,
        low=2 * FIRST.low,
        high=2 * FIRST.high,
        shifts=(0, 0),
    )
    network = small(FIRST, clipped, total)
    images = torch.randn(16, 2, 6, 5)
    export_onnx_int8(network, tmp_path / "model.onnx", [images])
    values = network.run(images, keep=True)
    step, last = (2.0**-9 * (values[name].max() - values[name].min()) / 255 for name in ("conv", "sum"))
    # Each term is off by half a step, and their sum by half a step of its own, and zero by a rounding of its place.
    off = (logits_of(tmp_path / "model.onnx", images) - network.logits(images)).abs().max()
    assert 0 < off < 1.01 * (2 * step + last)


@pytest.mark.parametrize(
    ("kernel", "padding"),
    [((3, 3), (1, 1, 1, 1)), ((2, 5), (0, 1, 3, 2)), ((1, 1), (0, 0, 0, 0)), ((4, 3), (0, 1, 0, 1))],
)
def test_a_first_layer_with_stride_2_is_computed_on_quarters(
    tmp_path: Path, kernel: tuple[int, int], padding: tuple[int, int, int, int]
):
    left, right, top, bottom = padding
    shape = (3, (6 + top + bottom - kernel[0]) // 2 + 1, (8 + left + right - kernel[1]) // 2 + 1)
    weight = 2 * torch.randint(0, 8, (3, 2, *kernel)) - 7
    first = conv(shape=shape, weight=weight, stride=(2, 2), padding=padding)
    network = small(first, rounded(first, "end", -4, 8, True), image=(2, 6, 8))
    images = torch.randn(4, 2, 6, 8)
    export_onnx_int8(network, tmp_path / "model.onnx", [images])
    assert torch.equal(logits_of(tmp_path / "model.onnx", images, LEVELS.ORT_ENABLE_ALL), network.logits(images))
    stored = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in stored.node].count("SpaceToDepth") == 1


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnet8_cifar", 28), ("mobilenetv1_025_cifar", 28), ("test_resnet", 32)]
)
def test_whole_networks_run_in_integer_kernels_and_come_near(tmp_path: Path, architecture: str, size: int):
    # In two's complement all weights are the model's own.
    model, images = profile_of(architecture, size, weight_grid="twos_complement")
    network = integer_network(model)
    export_onnx_int8(network, tmp_path / "model.onnx", [{"pixel_values": images}])
    wanted = network.logits(images)
    got = logits_of(tmp_path / "model.onnx", images, LEVELS.ORT_ENABLE_ALL, SESSION)
    assert (got - wanted).norm() < 0.1 * wanted.norm()
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
    ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert run.count("QLinearConv") == sum(not layer.is_linear for layer in network.layers.values())
    assert run.count("QLinearAdd") == sum(isinstance(node, Add) for node in network.nodes)
    assert run.count("QGemm") == 1
    assert not {"Conv", "Add", "Gemm", "Relu", "MaxPool", "GlobalAveragePool", "AveragePool"} & set(run)


def test_one_weight_more_or_less_is_seen(tmp_path: Path):
    model, images = profile_of()
    network = integer_network(model)
    export_onnx_int8(network, tmp_path / "before.onnx", [images])
    weight = network.layers["layer2.0.conv2"].weight.view(-1)
    weight[7] += 8 if weight[7] < 0 else -8
    export_onnx_int8(network, tmp_path / "after.onnx", [images])
    before, after = (logits_of(tmp_path / f"{name}.onnx", images) for name in ("before", "after"))
    assert not torch.equal(before, after)


def test_weights_are_the_models_own_up_to_7_bits_and_else_the_nearest_of_255_levels():
    for bits, weights in ((7, range(-127, 128, 2)), (8, range(-255, 256, 2))):
        count = len(weights)
        layer = conv(weight=torch.tensor([*weights, *weights]).view(2, count, 1, 1), exponents=(-3, -5))
        integers, scales = int8_weight(layer)
        assert integers.abs().max() == 127
        real = layer.weight * torch.tensor([2.0**-3, 2.0**-5]).double().view(2, 1, 1, 1)
        off = (integers * scales.view(2, 1, 1, 1) - real).abs().flatten(1).amax(1)
        assert torch.equal(off, torch.zeros(2)) if bits == 7 else (off <= scales / 2).all() and (off > 0).all()
    # A channel that would fit has its own weights, whatever the others need.
    layer = conv(weight=torch.tensor([[-255], [101]]).view(2, 1, 1, 1), exponents=(-3, -5))
    integers, scales = int8_weight(layer)
    assert integers.flatten().tolist() == [-127, 101]
    assert scales.tolist() == [255 / 127 * 2.0**-3, 2.0**-5]


def test_ranges_are_the_extremes_over_all_batches():
    model, images = profile_of()
    network = integer_network(model)
    found = ranges(network, [images[:3], {"pixel_values": images[3:]}])
    values = network.run(images, keep=True)
    for node in network.nodes:
        real = values[node.name].double() * 2.0**node.exponent
        assert found[node.name] == (min(real.min().item(), 0), max(real.max().item(), 0))


def test_what_has_no_form_is_refused(tmp_path: Path):
    images = torch.randn(2, 2, 6, 5)
    square = Square(name="x", inputs=("image8",), shape=(2, 6, 5), exponent=-10, low=0, high=2**14)
    with pytest.raises(ExportError, match="'x' is a Square, which this export does not know"):
        export_onnx_int8(small(square), tmp_path / "model.onnx", [images])
    with pytest.raises(ValueError, match="at least one batch of images, got none"):
        export_onnx_int8(small(conv()), tmp_path / "model.onnx", [])
    assert not list(tmp_path.iterdir())
