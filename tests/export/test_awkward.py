"""A network of what quantization and batch norm find awkward, on images that are, in the integers and in every export."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone
from sdq_hf.export.artefacts import export_model
from sdq_hf.export.graph import Quantize
from sdq_hf.export.lower import integer_network
from sdq_hf.export.verify import made_images

from ..test_hardware_profile import Case, trained_looks

NEEDED = {"qonnx": "qonnx", "onnx": "onnxruntime", "hls4ml": "hls4ml", "verilog": "torch", "da4ml": "da4ml"}
# Benches that are exported beside the Verilog, with what they take of it.
BENCHES = {
    target: f"iverilog -g2005 -s testbench -o ../bench {sources} && vvp -n ../bench"
    for target, sources in {"verilog": "*.v", "da4ml": "testbench.v src/*.v src/static/*.v"}.items()
}
PROGRAMS = {"hls4ml": "g++", "verilog": "iverilog", "da4ml": "iverilog"}


@torch.no_grad()
def awkward(size: int = 12, **options) -> Case:
    """A model in the profile: factors of batch norm below zero and zero, variances of nothing, channels and a layer of zeros,
    a layer and a class whose weights are all equal, 1 to 4 bits."""
    torch.manual_seed(0)
    network = trained_looks(create_backbone("resnet8_cifar", num_classes=5)).eval()
    layers, norms = ([m for m in network.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d))
    for layer, norm in zip(layers, norms, strict=True):
        norm.weight[0::4] *= -1
        norm.weight[1::8] = 0
        # Dead channels as a training leaves them, and one that never saw anything.
        for channel, factor, variance in ((2, 1e-4, 1e-9), (3, 0.0, 0.0)):
            layer.weight[channel] *= factor
            norm.running_mean[channel], norm.running_var[channel] = 0, variance
    network.layer1[0].conv2.weight.zero_()
    network.layer2[0].conv2.weight.fill_(0.02)
    network.get_classifier().weight[1], network.get_classifier().weight[2] = 0, 0.1
    model = SDQForImageClassification.from_float(network, "resnet8_cifar", img_size=size, **options).eval()
    model.set_strategy({name: 1 + i % 4 for i, name in enumerate(model.strategy.searchable)})
    images = torch.randn(8, 3, size, size)
    model.calibrate([images])
    return model.to_hardware_profile([images]).eval(), images


def test_it_has_what_it_is_for():
    model, images = awkward()
    network = integer_network(model)
    assert {bits for layer in network.layers.values() for bits in [layer.weight_bits]} == {1, 2, 3, 4, 8}
    kinds = {name: {len(row.unique()) for row in layer.weight} for name, layer in network.layers.items()}
    assert kinds["layer1.0.conv2"] == kinds["layer2.0.conv2"] == {1}
    assert all(1 in rows for rows in kinds.values())
    assert all(
        max(layer.exponents) - min(layer.exponents) >= 5 for name, layer in network.layers.items() if "conv1" in name
    )
    # Inside of the network, too, values are halfway between two integers, above even ones and odd ones, and saturate.
    values, ties = network.run(torch.cat([images, made_images(network)]), keep=True), set()
    for node in network.nodes[1:]:
        if isinstance(node, Quantize):
            shift = node.exponent - node.source_exponent
            taken, given = values[node.inputs[0]], values[node.name]
            assert (given == node.high).any(), node.name
            if shift > 0:
                halfway = taken - ((taken >> shift) << shift) == 1 << (shift - 1)
                ties |= set((taken >> shift)[halfway & (given < node.high)].remainder(2).tolist())
    assert ties == {0, 1}


@pytest.mark.parametrize("grid", ["midrise", "twos_complement"])
def test_integers_and_simulation_agree(grid: str):
    model, images = awkward(weight_grid=grid)
    network = integer_network(model)
    pixels = torch.cat(
        [images, made_images(network), torch.full_like(images[:2], 1e6), torch.full_like(images[:2], -1e6)]
    )
    with torch.no_grad():
        assert torch.equal(network.logits(pixels), model(pixels).logits.double())


@pytest.mark.parametrize(
    ("target", "grid"),
    [
        ("qonnx", "midrise"),
        ("qonnx", "twos_complement"),
        ("onnx", "midrise"),
        ("onnx", "twos_complement"),
        ("verilog", "midrise"),
        ("verilog", "twos_complement"),
        ("da4ml", "midrise"),
        # Ten seconds of g++; its types hold the integers of both grids alike.
        ("hls4ml", "midrise"),
    ],
)
def test_every_export_computes_the_integers(tmp_path: Path, target: str, grid: str):
    if importlib.util.find_spec(NEEDED[target]) is None or not shutil.which(PROGRAMS.get(target, "env")):
        pytest.skip(f"What the target {target} needs is not here.")
    model, images = awkward(weight_grid=grid)
    report = export_model(model, tmp_path / "out", [target], images)
    if target in BENCHES:
        said = subprocess.run(
            BENCHES[target], shell=True, cwd=tmp_path / "out" / target, capture_output=True, text=True
        )
        assert "PASS" in said.stdout, said
    found = [c for c in report["comparisons"] if c["what"] == target]
    assert [(c["images"], c["equal"], c["max_difference"]) for c in found] == [("real", True, 0), ("made", True, 0)]
