"""ZigZag's model gets the layers as they are, and its numbers follow the bits."""

import importlib.util
import math

import pytest
import timm
from torch import nn

from sdq_hf import LayerBits, Strategy
from sdq_hf.export.zigzag import Shape, layer_shapes, memory_model
from sdq_hf.layers import count_macs

there = importlib.util.find_spec("zigzag") is not None


@pytest.mark.parametrize(("name", "size"), [("mobilenetv1_025_cifar", 28), ("resnet8_cifar", 16)])
def test_shapes_have_the_multiply_accumulates_of_the_network(name, size):
    import sdq_hf  # noqa: F401 (registers the networks)

    network = timm.create_model(name, num_classes=10)
    shapes = layer_shapes(network, (3, size, size))
    for layer, macs in count_macs(network, (3, size, size)).items():
        assert macs == sum(
            x.groups * x.out_channels * x.in_channels * math.prod((*x.output, *x.kernel)) for x in shapes[layer]
        )


def test_a_shape_is_that_of_the_layer_and_a_layer_that_is_called_twice_has_two():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 2), groups=4)
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.fc(self.conv(x).flatten(2).transpose(1, 2)))

    linear = Shape(1, 16, 16, (48, 1), (1, 1), (1, 1))
    assert layer_shapes(Network(), (8, 8, 12)) == {
        "conv": [Shape(4, 4, 2, (4, 12), (3, 5), (2, 1))],
        "fc": [linear, linear],
    }


@pytest.mark.skipif(not there, reason="zigzag-dse is not installed")
def test_fewer_bits_move_less_and_layers_that_stay_float_are_left_out():
    shape = Shape(1, 64, 32, (7, 7), (1, 1), (1, 1))
    layer = LayerBits(8, 8, 2048, 2048 * 49)
    strategy = Strategy.of({"a": layer, "b": LayerBits(2, 4, 2048, 2048 * 49), "c": LayerBits(32, 32, 1, 1)})
    found = memory_model(strategy, {"a": [shape], "b": [shape], "c": [shape]})
    assert list(found["layers"]) == ["a", "b"]
    assert found["layers"]["a"]["memory_energy"] > 1.5 * found["layers"]["b"]["memory_energy"] > 0
    assert found["layers"]["a"]["cycles"] >= found["layers"]["b"]["cycles"] >= 49 * 2048 / 32**2
    twice = memory_model(Strategy.of({"a": layer}), {"a": [shape, shape]})
    assert twice["layers"]["a"]["cycles"] == 2 * found["layers"]["a"]["cycles"]
    with pytest.raises(ValueError, match=r"no accelerator 'tpu', only .*tpu_like"):
        memory_model(strategy, {}, "tpu")
