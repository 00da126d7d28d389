"""What timm's networks are built of, beyond plain chains of convolutions: each goes all the way to a file and back."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models import register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.utils import reparameterize_model
from torch import nn

from sdq_hf import SDQForImageClassification
from sdq_hf.folding import fold, folded_state
from sdq_hf.quantizers.activation import activation_range

from .test_hardware_profile import trained_looks


def images(channels=3, size=32, seed=0, batch=4):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


class OddNet(nn.Module):
    """`twice` is called twice, `alias` is a second name of it; `left` and `right` share one weight."""

    def __init__(self, num_classes=10, in_chans=3, unused=False):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_chans, 8, 3, stride=2)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = nn.Sequential(self.twice)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight
        if unused:
            self.spare = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.fc = nn.Linear(8, num_classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + F.relu(self.alias(x + self.twice(x)))
        return self.fc((self.left(x) - self.right(F.relu(x))).mean((2, 3)))


@register_model
def odd_net(num_classes=10, in_chans=3, unused=False, **of_every_timm_model):
    return OddNet(num_classes, in_chans, unused)


@register_model
def tiny_repvgg(num_classes=10, in_chans=3, rep_block="rep", **of_every_timm_model):
    """A RepVGG, or with `rep_block` "one" a MobileOne, of three blocks of branches and 32 channels."""
    blocks = (ByoBlockCfg(rep_block, d=1, c=16, s=2), ByoBlockCfg(rep_block, d=2, c=32, s=2))
    return ByobNet(ByoModelCfg(blocks, stem_type=rep_block, stem_chs=8), num_classes, in_chans)


def from_float(name, size=32, num_classes=10, **options):
    """A float timm network with random weights and statistics, and the quantized model made of it."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=num_classes, **options.get("model_args", {})).eval()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            # Weights, biases and gains that timm starts at 0 or 1 would hide that they are left out.
            if value.is_floating_point() and key.rpartition(".")[2] in ("bias", "gain", "q_bias", "v_bias", "weight"):
                value.add_(0.1 * torch.randn_like(value))
    return network, SDQForImageClassification.from_float(network, name, img_size=size, **options).eval()


@torch.no_grad()
def check_whole_way(model, x, folder):
    """Mixed bits, all of 1 to 8; then the saved, the loaded and the dequantized model have the same logits."""
    model.set_strategy({name: 1 + i % 8 for i, name in enumerate(model.strategy.searchable)})
    model.calibrate([x])
    expected = model(x).logits
    assert expected.isfinite().all()
    assert expected.std() > 0
    model.save_pretrained(folder, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(loaded(x).logits, expected)
    # Other images, other rounding: not only what was calibrated.
    other = images(x.shape[1], x.shape[2], seed=7)
    assert torch.equal(loaded(other).logits, model(other).logits)
    assert torch.equal(loaded.dequantize()(x).logits, expected)
    loaded.save_pretrained(folder / "float", print_size=False)
    assert torch.equal(SDQForImageClassification.from_pretrained(folder / "float").eval()(x).logits, expected)


# Small networks of timm's own, and what each stands for.
NETWORKS = {
    "test_efficientnet": ("depthwise, squeeze-excite, SiLU", {}),
    "test_byobnet": ("grouped", {}),
    "test_vit": ("fused qkv", {"img_size": 32}),
    "test_nfnet": ("ScaledStdConv2d", {}),
    "resnetv2_50": ("a 1x1 convolution as the head", {"layers": [1, 1], "channels": [16, 32], "stem_chs": 8}),
    "vit_tiny_r_s16_p8_224": ("StdConv2dSame", {"img_size": 32, "depth": 1, "embed_dim": 48}),
    "beit_base_patch16_224": ("qkv with a bias of its own", {"img_size": 32, "depth": 2, "embed_dim": 48}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_files_give_back_the_same_logits(tmp_path, name):
    _, arguments = NETWORKS[name]
    _, model = from_float(name, model_args=arguments)
    check_whole_way(model, images(), tmp_path)


@pytest.mark.parametrize("name", ["test_nfnet", "vit_tiny_r_s16_p8_224"])
def test_the_standardised_weight_is_quantized(name):
    _, arguments = NETWORKS[name]
    network, model = from_float(name, model_args=arguments)
    convs = {key: m for key, m in network.named_modules() if "StdConv" in type(m).__name__}
    assert convs
    for key, conv in convs.items():
        w = conv.weight.detach().double().flatten(1)
        w = (w - w.mean(1, keepdim=True)) / (w.var(1, unbiased=False, keepdim=True) + conv.eps).sqrt()
        if hasattr(conv, "gain"):
            w = w * conv.gain.detach().double().flatten(1) * conv.scale
        layer = model.quantized_layers()[key]
        torch.testing.assert_close(layer.weight.double().flatten(1), w, rtol=1e-5, atol=1e-6)
        assert not hasattr(layer, "gain")
    assert all("StdConv" in type(conv).__name__ for conv in convs.values()), "the network itself is left as it is"
    # Without quantizers it is the network that it was made of, with the same bits; so is its twin.
    with model.float_mode(), torch.no_grad():
        assert torch.equal(model(images()).logits, network(images()))
        assert torch.equal(model.float_twin()(images()), network(images()))
    # The weights of such a network in a `state_dict` are taken in the same way.
    other = SDQForImageClassification.from_timm(name, num_labels=10, img_size=32, model_args=arguments)
    other.load_float_state(network.state_dict())
    assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items() if not k.endswith("step"))


@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
# "same" of an even kernel with a stride depends on the size of the image; 1 is the same for all.
@pytest.mark.parametrize("padding", ["same", 1])
def test_a_folded_convolution_computes_the_same(kind, padding):
    if padding == "same" and "Same" not in kind.__name__:
        padding = None
    torch.manual_seed(0)
    conv = kind(6, 8, 3, stride=2, padding=padding, groups=2)
    if hasattr(conv, "gain"):
        torch.nn.init.normal_(conv.gain)
    network = nn.Sequential(conv)
    x = images(6, 9)
    with torch.no_grad():
        expected, state = network(x), folded_state(network)
        fold(network)
        assert type(network[0]) in (nn.Conv2d, Conv2dSame)
        assert torch.equal(network(x), expected)
        assert state.keys() == network.state_dict().keys()
        assert torch.equal(state["0.weight"], network[0].weight)


def test_attention_with_a_bias_of_its_own_computes_the_same():
    network, model = from_float("beit_base_patch16_224", model_args=NETWORKS["beit_base_patch16_224"][1])
    assert "blocks.0.attn.qkv" in model.quantized_layers()
    with model.float_mode(), torch.no_grad():
        torch.testing.assert_close(model(images()).logits, network(images()))


def test_attention_biases_are_not_kept_from_one_forward_to_the_next():
    _, model = from_float("efficientvit_m0", size=64, weight_quantizer="dorefa")
    biases = {name: p for name, p in model.named_parameters() if name.endswith("attention_biases")}
    x = images(size=64)
    # As in the search: eval mode, with gradients.
    before = model(x).logits
    before.sum().backward()
    with torch.no_grad():
        for bias in biases.values():
            bias.copy_(torch.randn_like(bias))
    after = copy.deepcopy(model)(x).logits
    after.sum().backward()
    assert biases
    assert not torch.equal(before, after)


@pytest.mark.parametrize("rep_block", ["rep", "one"])
def test_branches_of_the_training_are_merged_before_anything_is_quantized(rep_block, tmp_path):
    options = {"img_size": 32, "model_args": {"rep_block": rep_block}, "reparameterize": True}
    torch.manual_seed(0)
    network = trained_looks(timm.create_model("tiny_repvgg", num_classes=10, rep_block=rep_block)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model = SDQForImageClassification.from_float(network, "tiny_repvgg", **options).eval()
    assert list(model.strategy) == [
        "stem.reparam_conv",
        "stages.0.0.reparam_conv",
        "stages.1.0.reparam_conv",
        "stages.1.1.reparam_conv",
        "head.fc",
    ]
    with model.float_mode(), torch.no_grad():
        torch.testing.assert_close(model(images()).logits, network(images()))
    # The network stays as it was, and timm's merging leaves nothing frozen.
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = SDQForImageClassification.from_timm("tiny_repvgg", num_labels=10, **options)
    other.load_float_state(before)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items() if not k.endswith("step"))
    check_whole_way(model, images(), tmp_path)


def test_what_is_merged_is_not_merged_again(monkeypatch):
    """As for the profile, whose weights come from the merged network: timm's FastViT cannot be asked twice."""
    seen = []

    def merge(network, inplace):
        seen.append(any(name.endswith("conv_kxk") for name, _ in network.named_modules()))
        return reparameterize_model(network, inplace)

    monkeypatch.setattr("sdq_hf.configured.reparameterize_model", merge)
    model = SDQForImageClassification.from_timm("tiny_repvgg", num_labels=10, img_size=32, reparameterize=True)
    profile = model.to_hardware_profile([images()])
    assert list(profile.strategy) == list(model.strategy)
    assert seen
    assert all(seen)


def test_a_network_without_such_branches_is_named():
    with pytest.raises(ValueError, match="timm has nothing to merge in resnet8_cifar: leave it out"):
        SDQForImageClassification.from_timm("resnet8_cifar", reparameterize=True)
    with pytest.raises(ValueError, match="reparameterize must be true or false, got 'yes'"):
        SDQForImageClassification.from_timm("tiny_repvgg", reparameterize="yes")


def test_shared_modules_and_weights_go_the_whole_way(tmp_path):
    network, model = from_float("odd_net")
    with model.float_mode(), torch.no_grad():
        assert torch.equal(model(images()).logits, network(images()))
    # A module with two names is one layer; its work counts as often as it is done (15 x 15 pixels after the stem).
    assert list(model.strategy) == ["stem", "twice", "left", "right", "fc"]
    assert model.strategy["twice"].macs == 2 * 8 * 8 * 9 * 15 * 15
    model.set_strategy({"left": 2, "right": 5})
    levels = {n: model.quantized_layers()[n].quantized_weight().unique().numel() for n in ("left", "right")}
    assert levels["left"] <= 4 < levels["right"] <= 32
    check_whole_way(model, images(), tmp_path)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).dequantize()(images()).logits, model(images()).logits)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = SDQForImageClassification.from_timm("odd_net", num_labels=10, img_size=32)
    other.set_strategy(model.strategy)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other.eval()(images()).logits, model(images()).logits)


def test_layers_that_are_never_used_are_refused_by_name_and_can_stay_float(tmp_path):
    options = {"num_labels": 10, "img_size": 32, "model_args": {"unused": True}}
    with pytest.raises(
        ValueError, match=r"'spare\.0' of odd_net, and 2 more, is never called.*pins=\{'spare\.\*': 32\}"
    ):
        SDQForImageClassification.from_timm("odd_net", **options)
    model = SDQForImageClassification.from_timm("odd_net", **options, pins={"spare.*": 32}).eval()
    assert {name for name, bits in model.strategy.items() if bits.is_float} == {f"spare.{i}" for i in range(3)}
    check_whole_way(model, images(), tmp_path)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_numbers_of_channels(tmp_path, channels):
    network, model = from_float("resnet8_cifar", model_args={"in_chans": channels})
    assert model.config.input_size == (channels, 32, 32)
    x = images(channels)
    with model.float_mode(), torch.no_grad():
        assert torch.equal(model(x).logits, network(x))
    check_whole_way(model, x, tmp_path)


def test_a_network_without_a_head_gives_its_features(tmp_path):
    network, model = from_float("resnet8_cifar", num_classes=0)
    assert "fc" not in model.strategy
    with model.float_mode(), torch.no_grad():
        features = model(images()).logits
        assert features.shape == (4, 64)
        assert torch.equal(features, network(images()))
    check_whole_way(model, images(), tmp_path)


def test_the_signs_of_activations_come_from_the_data(tmp_path):
    """Only layers whose inputs in the float network go below zero are signed, whatever makes them."""
    signs = {}
    # ReLU6 and linear bottlenecks; SiLU; hard-swish; GELU and residual sums.
    for name in ("mobilenetv2_035", "test_efficientnet", "mobilenetv3_small_050", "test_vit"):
        arguments = {"img_size": 32} if name == "test_vit" else {}
        # Fine enough that rounding does not turn a layer's inputs to zero.
        network, model = from_float(name, model_args=arguments, activation_bits=8)
        lowest = {}

        def record(key, lowest=lowest):
            return lambda module, inputs: lowest.__setitem__(key, min(lowest.get(key, 0.0), inputs[0].min().item()))

        for key, layer in network.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_pre_hook(record(key))
        with torch.no_grad():
            network(images())
        model.calibrate([images()])
        for key, layer in model.quantized_layers().items():
            quantizer = layer.input_quantizer
            assert not quantizer.signed or lowest[key] < 0, (name, key)
            assert quantizer.range == activation_range(quantizer.bits, bool(quantizer.signed))
            signs[name, key] = bool(quantizer.signed)
    assert signs["mobilenetv2_035", "blocks.1.0.conv_pw"], "a linear bottleneck"
    assert not signs["mobilenetv2_035", "blocks.1.0.conv_dw"], "after ReLU6"
    assert signs["test_vit", "blocks.0.mlp.fc2"], "after GELU"
    assert set(signs.values()) == {False, True}
