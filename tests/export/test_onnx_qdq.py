"""The ONNX file against the integer network: the same numbers from another program."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from sdq_hf.export.graph import (  # noqa: E402
    IMAGE,
    Concat,
    Flatten,
    IntegerNetwork,
    Layer,
    MaxPool,
    Node,
    Quantize,
    SumPool,
)
from sdq_hf.export.lower import ExportError, integer_network  # noqa: E402
from sdq_hf.export.onnx_qdq import export_onnx  # noqa: E402
from sdq_hf.packing import packed_size  # noqa: E402
from sdq_hf.quantizers.grids import codes_to_integers  # noqa: E402

from .test_lower import profile_of  # noqa: E402

LEVELS = ort.GraphOptimizationLevel


def session_of(path: Path, level=LEVELS.ORT_ENABLE_BASIC, entries=None):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits_of(path: Path, images: torch.Tensor, level=LEVELS.ORT_ENABLE_BASIC, entries=None) -> torch.Tensor:
    (logits,) = session_of(path, level, entries).run(["logits"], {"pixel_values": images.numpy()})
    return torch.from_numpy(logits).double()


def small(*nodes: Node, image: tuple[int, int, int] = (2, 6, 5)) -> IntegerNetwork:
    """8-bit images, then `nodes`, flattened behind."""
    first = Quantize(
        name="image8",
        inputs=(IMAGE,),
        shape=image,
        exponent=-5,
        low=-128,
        high=127,
        bits=8,
        signed=True,
        source_exponent=None,
    )
    last = nodes[-1]
    shape = (math.prod(last.shape),)
    flat = Flatten(name="flat", inputs=(last.name,), shape=shape, exponent=last.exponent, low=last.low, high=last.high)
    return IntegerNetwork((first, *nodes, flat), "small", image)


def conv(name: str = "conv", shape: tuple[int, ...] = (3, 6, 5), **options) -> Layer:
    """A convolution with 3-bit weights whose channels have units of their own."""
    torch.manual_seed(0)
    settings = {
        "name": name,
        "inputs": ("image8",),
        "shape": shape,
        "exponent": -9,
        "low": -(2**20),
        "high": 2**20,
        "weight": 2 * torch.randint(0, 8, (3, 2, 3, 3)) - 7,
        "bias": torch.tensor([5, -300, 7]),
        "exponents": (-3, -4, -2),
        "weight_bits": 3,
        "grid": "midrise",
        "sum_low": -(2**20),
        "sum_high": 2**20,
        "padding": (1, 1, 1, 1),
    }
    return Layer(**{**settings, **options})


@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("resnet8_cifar", 16, {}),
        ("resnet8_cifar", 28, {"activation_bits": 2}),
        ("resnet8_cifar", 16, {"granularity": "kernel", "activation_bits": 5}),
        ("resnet8_cifar", 16, {"weight_grid": "twos_complement", "activation_bits": 1}),
        ("resnet8_cifar", 16, {"weight_quantizer": "dorefa", "activation_bits": 7}),
        ("mobilenetv1_025_cifar", 28, {"activation_bits": 3}),
    ],
)
def test_the_logits_are_those_of_the_integer_network(tmp_path: Path, architecture: str, size: int, options: dict):
    model, images = profile_of(architecture, size, **options)
    network = integer_network(model)
    export_onnx(network, tmp_path / "model.onnx")
    # Images that saturate everything, and images halfway between two integers, too.
    ties = (torch.randint(-128, 127, images.shape) + 0.5) * 2.0 ** network.nodes[0].exponent
    for pixels in (images, 1e6 * images, ties, torch.zeros_like(images)):
        assert torch.equal(logits_of(tmp_path / "model.onnx", pixels), network.logits(pixels))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("grid", ["midrise", "twos_complement"])
def test_so_they_are_with_other_batch_sizes_and_all_optimizations(tmp_path: Path, grid: str):
    # Runtimes have integer kernels for activations of 8 bits, and may put some of the weights into them.
    model, images = profile_of(activation_bits=8, weight_grid=grid)
    network = integer_network(model)
    export_onnx(network, tmp_path / "model.onnx")
    wanted = network.logits(images)
    for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_ALL):
        assert torch.equal(logits_of(tmp_path / "model.onnx", images[:3], level), wanted[:3])


@pytest.mark.parametrize("grid", ["midrise", "twos_complement"])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_of_every_bitwidth_is_in_the_file(tmp_path: Path, bits: int, channels: bool, grid: str):
    widths = (1, bits, bits) if channels else (bits, bits, bits)
    rows = [codes_to_integers(torch.arange(1152) % 2**width, grid, width) for width in widths]
    layer = conv(
        shape=(3, 6, 5),
        weight=torch.stack(rows).long()[:, : 2 * 3 * 3].reshape(3, 2, 3, 3),
        weight_bits=widths if channels else bits,
        grid=grid,
    )
    if bits > 4:
        # More levels than weights: the outermost ones are those that may not fit.
        layer.weight.view(3, -1)[1:, :2] = torch.tensor([rows[1].min(), rows[1].max()]).long()
    network = small(layer)
    export_onnx(network, tmp_path / "model.onnx")
    images = torch.randn(2, 2, 6, 5)
    assert torch.equal(logits_of(tmp_path / "model.onnx", images), network.logits(images))


@pytest.mark.parametrize(
    "node",
    [
        conv(shape=(3, 7, 2), stride=(1, 2), padding=(0, 1, 2, 1), weight_bits=3),
        conv(shape=(3, 4, 3), dilation=(2, 1), padding=(0, 0, 1, 1)),
        conv(
            shape=(4, 6, 5),
            weight=torch.tensor([-3, -1, 1, 3] * 9).view(4, 1, 3, 3),
            bias=None,
            exponents=(-4,) * 4,
            groups=2,
        ),
        MaxPool(
            name="pool",
            inputs=("image8",),
            shape=(2, 3, 3),
            exponent=-5,
            low=-128,
            high=127,
            kernel=(3, 2),
            stride=(2, 2),
            padding=(0, 1, 1, 0),
        ),
        # Windows that overlap: an average.
        SumPool(
            name="pool",
            inputs=("image8",),
            shape=(2, 5, 4),
            exponent=-7,
            low=-512,
            high=508,
            kernel=(2, 2),
            stride=(1, 1),
        ),
        # Over the image, 30 pixels, divided by 32.
        SumPool(
            name="pool",
            inputs=("image8",),
            shape=(2, 1, 1),
            exponent=-10,
            low=-3840,
            high=3810,
            kernel=(6, 5),
            stride=(6, 5),
        ),
    ],
    ids=["stride", "dilation", "groups", "max", "average", "sum"],
)
def test_geometry(tmp_path: Path, node: Node):
    network = small(node)
    images = torch.randn(4, 2, 6, 5)
    assert network.run(images, keep=True)[node.name].shape[1:] == node.shape
    export_onnx(network, tmp_path / "model.onnx")
    assert torch.equal(logits_of(tmp_path / "model.onnx", images), network.logits(images))


def test_concatenation_of_tensors_with_different_units(tmp_path: Path):
    cat = Concat(
        name="cat",
        inputs=("a", "image8"),
        shape=(5, 6, 5),
        exponent=-9,
        low=-(2**20),
        high=2**20,
        shifts=(0, 4),
    )
    network = small(conv("a"), cat)
    export_onnx(network, tmp_path / "model.onnx")
    images = torch.randn(4, 2, 6, 5)
    assert torch.equal(logits_of(tmp_path / "model.onnx", images), network.logits(images))


def test_one_weight_more_or_less_is_seen(tmp_path: Path):
    model, images = profile_of()
    network = integer_network(model)
    wanted = network.logits(images)
    weight = network.layers["layer2.0.conv2"].weight.view(-1)
    weight[7] += 2 if weight[7] < 0 else -2
    export_onnx(network, tmp_path / "model.onnx")
    assert not torch.equal(logits_of(tmp_path / "model.onnx", images), wanted)


def test_weights_take_the_smallest_type_and_the_file_little_more(tmp_path: Path):
    model, _ = profile_of()
    network = integer_network(model)
    path = tmp_path / "model.onnx"
    export_onnx(network, path)
    stored = onnx.load(path)
    found, rest = {}, 0
    for tensor in stored.graph.initializer:
        name, _, kind = tensor.name.rpartition(".weight.")
        if kind in ("integers", "codes"):
            found[name] = len(tensor.raw_data)
        else:
            rest += len(tensor.raw_data)
    next_type = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    ideal = {
        name: packed_size(layer.weight.numel(), next_type[layer.weight_bits]) for name, layer in network.layers.items()
    }
    assert found == ideal
    # Names and attributes take about a kilobyte for each layer, as large as it may be.
    assert path.stat().st_size <= 1.1 * (sum(ideal.values()) + rest) + 1024 * len(ideal)


@pytest.mark.parametrize(("bits", "opset"), [(2, 25), (4, 21)])
def test_the_file_says_what_it_is(tmp_path: Path, bits: int, opset: int):
    model, _ = profile_of(activation_bits=8)
    model.set_strategy(bits)
    network = integer_network(model)
    export_onnx(network, tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx")
    assert stored.producer_name == "sdq_hf"
    assert {entry.domain: entry.version for entry in stored.opset_import} == {"": opset}
    facts = {entry.key: entry.value for entry in stored.metadata_props}
    assert facts["architecture"] == "resnet8_cifar"
    strategy = {name: layer.weight_bits for name, layer in model.strategy.items()}
    assert json.loads(facts["weight_bits"]) == strategy
    assert set(strategy.values()) == {bits, 8}
    assert set(json.loads(facts["activation_bits"]).values()) == {8}
    assert json.loads(facts["inexact_in_float32"]) == network.inexact_in_float32()
    # Shapes as far as the checker infers them are those of the network.
    inferred = onnx.shape_inference.infer_shapes(stored, strict_mode=True)
    shapes = {
        value.name: tuple(dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for value in inferred.graph.value_info
    }
    for node in network.nodes[:-1]:
        assert shapes[node.name] == ("batch", *node.shape), node.name


class Square(Node):
    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[0] ** 2


def test_what_has_no_form_is_refused_by_name_and_a_file_that_was_there_stays(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    plain = {"name": "x", "inputs": ("image8",), "shape": (2, 6, 5), "low": -128, "high": 127}
    thirds = SumPool(**{**plain, "shape": (2, 2, 1)}, exponent=-9, kernel=(3, 4), stride=(3, 1))
    linear = dataclasses.replace(conv(), weight=torch.ones(3, 5).long(), shape=(2, 6, 3))
    refused = [
        (small(Square(**plain, exponent=-5)), "'x' is a Square, which this export does not know"),
        (small(thirds), "'x' divides sums of 3 x 4 pixels by 16"),
        (small(conv(exponent=-120)), r"'conv' has units of 2\^-120, which float32 does not reach"),
        (small(linear), r"Layer 'conv' is linear and takes \[2, 6, 5\] for each image"),
        (small(conv(), conv("second", inputs=("conv",))), "Layer 'second' takes the output of a Layer"),
    ]
    for network, message in refused:
        with pytest.raises(ExportError, match=message):
            export_onnx(network, path)
    assert path.read_bytes() == b"before"
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]
