"""QONNX files against the integers, by qonnx's own executor."""

from pathlib import Path

import pytest
import torch

from sdq_hf.export.graph import IntegerNetwork
from sdq_hf.export.lower import integer_network

from .test_lower import profile_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("qonnx")

from sdq_hf.export.qonnx import export_qonnx, run_qonnx  # noqa: E402
from sdq_hf.export.verify import made_images, with_one_weight_changed  # noqa: E402


def exported(network: IntegerNetwork, path: Path, images: torch.Tensor, per_channel: bool = True) -> torch.Tensor:
    export_qonnx(network, path, per_channel=per_channel)
    return torch.from_numpy(run_qonnx(path, images)).double()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("resnet8_cifar", 12, {}),
        ("resnet8_cifar", 12, {"granularity": "kernel", "weight_grid": "twos_complement", "activation_bits": 2}),
        ("test_resnet", 32, {"activation_bits": 8}),
        ("mobilenetv1_025_cifar", 12, {}),
    ],
)
def test_a_file_computes_the_integers(tmp_path: Path, architecture: str, size: int, options: dict, per_channel: bool):
    model, images = profile_of(architecture, size, **options)
    network = integer_network(model)
    images = torch.cat([images[:2], made_images(network)])
    got = exported(network, tmp_path / "model.onnx", images, per_channel)
    assert torch.equal(got, network.logits(images))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_one_weight_more_or_less_is_seen(tmp_path: Path):
    model, images = profile_of(size=12)
    network = integer_network(model)
    changed, _ = with_one_weight_changed(network, images)
    got = exported(changed, tmp_path / "model.onnx", images)
    assert not torch.equal(got, network.logits(images))
    assert torch.equal(got, changed.logits(images))


def test_nodes_have_the_bits_of_the_model(tmp_path: Path):
    model, _ = profile_of(size=12)
    network = integer_network(model)
    export_qonnx(network, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = [int(constants[node.input[3]]) for node in graph.node if node.op_type == "Quant"]
    bipolar = sum(node.op_type == "BipolarQuant" for node in graph.node)
    strategy = dict(model.strategy)
    # Mid-rise grids hold odd integers of one bit more; those of one bit are bipolar; the average is a convolution of 2.
    weights = [layer.weight_bits + 1 for layer in strategy.values() if layer.weight_bits != 1]
    assert sorted(found) == sorted([layer.activation_bits for layer in strategy.values()] + weights + [2])
    assert bipolar == sum(layer.weight_bits == 1 for layer in strategy.values()) > 0
