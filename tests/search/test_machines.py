"""The search under what users turn on to make it fit their machine: memory format, precision, checkpointing."""

import copy
import os
import shutil

import datasets
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader

from sdq_hf.backbones import set_grad_checkpointing
from sdq_hf.layers import attach
from sdq_hf.search import SearchLog, search
from sdq_hf.strategy import LayerBits
from tests.planted import Images, planted_network
from tests.search.test_search import ALIVE, DEAD


@pytest.fixture(scope="module")
def planted():
    model = planted_network()
    model.calibrate(Images())
    return model


@pytest.fixture(autouse=True)
def _new_process():
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def find(model, budget=3.0, precision="no", **options):
    log = SearchLog()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    (found,) = search(copy.deepcopy(model), Images(), [budget], log=log, accelerator=accelerator, **options)
    return found, log


def damages(log):
    return [move["damage"] for move in log.moves]


@pytest.mark.parametrize("weight_lr", [0.0, 3e-4])
def test_gradient_checkpointing_changes_nothing(planted, weight_lr):
    checkpointed = copy.deepcopy(planted)
    checkpointed._set_gradient_checkpointing(True)
    assert checkpointed.timm_model.grad_checkpointing
    (expected, log), (found, other) = (find(model, weight_lr=weight_lr) for model in (planted, checkpointed))
    assert found == expected
    assert other.moves == log.moves


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(planted):
    kept = {}
    for enabled in (False, True):
        model = copy.deepcopy(planted)
        model._set_gradient_checkpointing(enabled)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(Images().batches[0]["pixel_values"])
        kept[enabled] = sum(sizes.values())
    assert kept[True] < 0.6 * kept[False]


# Batch norm of torch, and timm's with an activation.
@pytest.mark.parametrize("architecture", ["resnet8_cifar", "mobilenetv3_small_050"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradient_checkpointing_trains_to_the_same_statistics_of_batch_norm(architecture, momentum):
    torch.manual_seed(0)
    plain = timm.create_model(architecture, num_classes=4).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    checkpointed = copy.deepcopy(plain)
    set_grad_checkpointing(checkpointed)
    # Twice, and of a copy, is the same as once.
    checkpointed = copy.deepcopy(checkpointed)
    set_grad_checkpointing(checkpointed)
    images = torch.randn(2, 6, 3, 32, 32)
    for network in (plain, checkpointed):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        for batch in images:
            network(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = plain.state_dict(), checkpointed.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_network_that_timm_cannot_checkpoint_is_named():
    with pytest.raises(ValueError, match="no gradient checkpointing for DLA"):
        set_grad_checkpointing(timm.create_model("dla46_c"))


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile on a CPU needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ from machine to machine
def test_a_compiled_layer_is_one_graph_with_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    network, images = nn.Sequential(nn.Linear(16, 8)), torch.randn(32, 16)
    attach(network[0], "0", LayerBits(3, 4, 128, 128), "lsq", "midrise")
    network.eval()(images)
    found = []
    for compiled in (False, True):
        model = copy.deepcopy(network)
        output = (torch.compile(model, fullgraph=True) if compiled else model)(images)
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_frozen_weights_in_another_memory_format_give_the_same_but_for_the_order_of_sums(planted):
    """Trained weights do not: see test_ranks.py."""
    (expected, log), (found, other) = (
        find(planted.to(memory_format=layout), weight_lr=0.0)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert found == expected
    assert damages(other) == pytest.approx(damages(log), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("precision", "layout"), [("bf16", torch.contiguous_format), ("no", torch.channels_last)])
def test_other_rounding_may_swap_layers_of_equal_damage_and_leaves_what_matters(planted, precision, layout):
    found, _ = find(planted.to(memory_format=layout), budget=2.0, precision=precision)
    bits = found.weight_bits
    assert all(bits[name] == 1 for name in DEAD)
    assert min(bits[name] for name in ALIVE) > 3


def test_a_stream_of_datasets_is_searched_as_the_images_are(planted):
    images = [image for batch in Images().batches for image in batch["pixel_values"]]
    stream = datasets.IterableDataset.from_generator(lambda: ({"pixel_values": image.numpy()} for image in images))
    loader = DataLoader(stream.with_format("torch"), batch_size=32)
    options = {"weight_lr": 0.0, "accelerator": Accelerator(cpu=True)}
    (found,) = search(copy.deepcopy(planted), loader, [4.5], **options)
    (expected,) = search(copy.deepcopy(planted), Images(), [4.5], **options)
    assert found == expected
