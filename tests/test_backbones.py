"""Networks made with the weights of a file in place of timm's pretrained ones."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    network = timm.create_model("resnet8_cifar", num_classes=10)
    save_file(network.state_dict(), tmp_path / "resnet8.safetensors")
    return tmp_path / "resnet8.safetensors"


@pytest.mark.parametrize("classes", [4, 10])
def test_all_but_the_head_comes_from_the_file_and_grey_images_see_the_sum_of_its_channels(weights, classes):
    torch.manual_seed(0)
    network = create_backbone("resnet8_cifar", pretrained_path=weights, num_classes=classes, in_chans=1)
    given, found = load_file(weights), network.state_dict()
    given["conv1.weight"] = given["conv1.weight"].sum(1, keepdim=True)
    assert found.keys() == given.keys()
    assert found["fc.weight"].shape[0] == classes
    assert not (classes == 10 and torch.equal(found["fc.weight"], given["fc.weight"]))
    for name in given.keys() - {"fc.weight", "fc.bias"}:
        torch.testing.assert_close(found[name], given[name])
    # The head's draws are those of a network that is made without a file.
    torch.manual_seed(0)
    plain = timm.create_model("resnet8_cifar", num_classes=classes, in_chans=1)
    assert torch.equal(found["fc.weight"], plain.fc.weight)


def test_weights_of_another_network_are_refused_by_the_first_layer_without_any(weights):
    with pytest.raises(ValueError, match=r"no weights for 'layer1.1.conv1.weight' of 'resnet20_cifar'"):
        create_backbone("resnet20_cifar", pretrained_path=weights, num_classes=4)
    save_file({f"other.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"resnet8.safetensors has no weights for 'conv1.weight'"):
        create_backbone("resnet8_cifar", pretrained_path=weights)


def test_a_file_that_is_not_there_is_given_as_the_reason(tmp_path, monkeypatch):
    """timm's error has no text."""
    # A longer path would be cut in the message.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'checkpoint_path': 'missing\.pth'.*: FileNotFoundError$"):
        create_backbone("resnet8_cifar", checkpoint_path="missing.pth")


def test_a_quantized_model_from_a_file_says_nothing_of_where_it_lay(weights, tmp_path):
    model = SDQForImageClassification.from_timm("resnet8_cifar", pretrained_path=weights, num_labels=3, img_size=12)
    conv = model.quantized_layers()["layer1.0.conv1"].weight
    torch.testing.assert_close(conv, load_file(weights)["layer1.0.conv1.weight"])
    model.calibrate([torch.randn(4, 3, 12, 12)])
    model.save_pretrained(tmp_path / "model", print_size=False)
    text = (tmp_path / "model" / "config.json").read_text()
    assert str(weights.parent) not in text
    assert json.loads(text)["pretrained_cfg"]["num_classes"] == 3


def test_networks_made_for_one_size_of_images_are_made_for_the_size_asked_for():
    images = torch.randn(2, 3, 64, 64)
    by_size = SDQForImageClassification.from_timm("test_vit", num_labels=4, img_size=64)
    assert by_size.config.input_size == (3, 64, 64)
    assert by_size(images).logits.shape == (2, 4)
    # timm's own argument says the same.
    by_argument = SDQForImageClassification.from_timm("test_vit", num_labels=4, model_args={"img_size": 64})
    assert by_argument.config.input_size == (3, 64, 64)
    macs = [model.strategy.bitops() for model in (by_size, by_argument)]
    whole = SDQForImageClassification.from_timm("test_vit", num_labels=4)
    assert macs[0] == macs[1] < whole.strategy.bitops()
    # Patches of 16 x 16 and one token more: 17 in place of 101.
    assert by_size.strategy["blocks.0.mlp.fc1"].macs * 101 == whole.strategy["blocks.0.mlp.fc1"].macs * 17
    # A network of convolutions takes any size, and no such argument.
    assert "img_size" not in SDQForImageClassification.from_timm("resnet8_cifar", img_size=64).config.model_args
