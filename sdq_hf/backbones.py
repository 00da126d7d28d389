"""Networks for small images that the literature reports on and timm lacks, registered with timm.

`resnet20_cifar` and relatives, the CIFAR ResNets of He et al. 2016: a 3x3 stem without pooling and three stages of basic
blocks of widths 16, 32, 64. Unlike the original's parameter-free shortcut (option A), a stage's first block has timm's 1x1
projection (option B).

`mobilenetv1_025_cifar`, `mobilenetv2_050_cifar` and relatives: timm's MobileNets (Howard et al. 2017, Sandler et al. 2018)
with a stem of stride 1, and in V2 one more stage at full resolution: the strides of the originals, meant for 224 pixels,
leave a single pixel of a small image long before the last stage.
"""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_bn_args, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet, make_blocks
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .strategy import short


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stem at full resolution and three stages of widths `width`, 2 `width`, 4 `width`."""

    def __init__(self, blocks_per_stage: int = 3, width: int = 16, **kwargs: Any):
        # timm's constructor makes head, pooling and bookkeeping; its stem has a fixed width of 64, so the stem and the
        # stages, whose first block depends on that width, are made here.
        layers, channels = (blocks_per_stage,) * 3, (width, 2 * width, 4 * width)
        super().__init__(BasicBlock, layers, channels=channels, **kwargs)
        self.conv1 = nn.Conv2d(self.in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        stages, _ = make_blocks(
            (BasicBlock,) * 3, channels, layers, width, drop_path_rate=kwargs.get("drop_path_rate", 0.0)
        )
        for name, stage in stages:
            setattr(self, name, stage)
        # Not nn.Identity: timm's gradient checkpointing goes through the blocks of each stage.
        self.layer4 = nn.Sequential()
        self.feature_info = [
            {"num_chs": width, "reduction": 1, "module": "act1"},
            *({"num_chs": c, "reduction": 2**i, "module": f"layer{i + 1}"} for i, c in enumerate(channels)),
        ]
        self.init_weights()


class CifarMobileNet(EfficientNet):
    """timm's EfficientNet, which MobileNets are built with, and a stem of stride 1."""

    def __init__(self, blocks: Sequence[str] = (), **kwargs: Any):
        # Decoded for each network anew: timm's builder empties the decoded list.
        super().__init__(decode_arch_def([[block] for block in blocks]), **kwargs)
        self.conv_stem.stride = (1, 1)
        for info in self.feature_info:
            info["reduction"] //= 2


# timm's block strings: kernel 3, stride, expansion, channels at width 1.
_MOBILENETS = {
    "v1": ("dsa_r1_k3_s1_c64", "dsa_r2_k3_s2_c128", "dsa_r2_k3_s2_c256", "dsa_r6_k3_s2_c512", "dsa_r2_k3_s2_c1024"),
    "v2": (
        "ds_r1_k3_s1_c16",
        "ir_r2_k3_s1_e6_c24",
        "ir_r3_k3_s2_e6_c32",
        "ir_r4_k3_s2_e6_c64",
        "ir_r3_k3_s1_e6_c96",
        "ir_r3_k3_s2_e6_c160",
        "ir_r1_k3_s1_e6_c320",
    ),
}


def _cfg(first_conv: str = "conv1", classifier: str = "fc") -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_WIDTHS = (25, 35, 50, 75, 100)
default_cfgs = generate_default_cfgs(
    {f"resnet{depth}_cifar.untrained": _cfg() for depth in _DEPTHS}
    | {
        f"mobilenet{version}_{width:03}_cifar.untrained": _cfg("conv_stem", "classifier")
        for version in _MOBILENETS
        for width in _WIDTHS
    }
)


def _register(name: str, description: str, network: type[nn.Module], **defaults: Any) -> None:
    def model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(network, name, pretrained, **{**defaults, **kwargs})

    model.__name__ = model.__qualname__ = name
    model.__doc__ = description
    globals()[name] = register_model(model)


for _depth in _DEPTHS:
    # 6n + 2 layers: two convolutions in each of n blocks of three stages, the stem and the head.
    _register(
        f"resnet{_depth}_cifar",
        f"ResNet-{_depth} for 32x32 images: widths 16, 32, 64.",
        CifarResNet,
        blocks_per_stage=(_depth - 2) // 6,
    )
for _version, _blocks in _MOBILENETS.items():
    for _width in _WIDTHS:
        _register(
            f"mobilenet{_version}_{_width:03}_cifar",
            f"MobileNet{_version.upper()} of width {_width / 100:g} for 32x32 images.",
            CifarMobileNet,
            blocks=_blocks,
            num_features=1280 if _version == "v2" else 0,
            round_chs_fn=partial(round_channels, multiplier=_width / 100),
            norm_layer=partial(nn.BatchNorm2d, **resolve_bn_args({})),
            act_layer=get_act_layer("relu6"),
        )


def create_backbone(architecture: str, *, pretrained_path: str | os.PathLike | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with near names in the error for a name that timm does not know.

    pretrained_path: a file of weights that takes the place of timm's pretrained ones, as timm's `--pretrained-path` does:
    the head is new, of `num_classes`, and the first layer is adapted to `in_chans`. Raises `ValueError` when another layer
    finds no weights in it.
    """
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        known = timm.list_models()
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ValueError(f"Unknown timm model {architecture!r}.{hint} `timm.list_models()` lists {len(known)} names.")
    if pretrained_path:
        return _from_pretrained_file(architecture, os.fspath(pretrained_path), kwargs)
    try:
        return timm.create_model(architecture, **kwargs)
    except Exception as error:  # each family of networks refuses wrong arguments in a way of its own
        reason = str(error) or type(error).__name__
        raise ValueError(f"timm cannot make {architecture!r} with {short(kwargs)}: {reason}") from error


def sized(architecture: str, model_args: Mapping[str, Any], img_size: int | None) -> dict[str, Any]:
    """`model_args`, and `img_size` among them where timm makes networks of `architecture` for one size of images."""
    known = timm.get_pretrained_cfg(architecture)
    fixed = known is not None and known.fixed_input_size
    return {**model_args, "img_size": img_size} if img_size and fixed else dict(model_args)


def _from_pretrained_file(architecture: str, path: str, kwargs: Mapping[str, Any]) -> nn.Module:
    classes = timm.get_pretrained_cfg(architecture).num_classes
    # -1 is no head's size, so that timm takes none from the file.
    overlay = {"file": path, "num_classes": -1}
    given = {"num_classes": classes, **kwargs, "pretrained": True, "pretrained_cfg_overlay": overlay}
    # timm leaves at random what it finds no weights for, without a word. That alone differs where the draws do.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        other = create_backbone(architecture, **given).state_dict()
    network = create_backbone(architecture, **given)
    config: Any = network.pretrained_cfg
    heads = config["classifier"] if isinstance(config["classifier"], tuple | list) else [config["classifier"]]
    for name, tensor in network.state_dict().items():
        if name.rpartition(".")[0] not in heads and not torch.equal(tensor, other[name]):
            raise ValueError(
                f"{path} has no weights for {name!r} of {architecture!r}, and only the head may be new: it is of another "
                "network, or its tensors have other names."
            )
    # Neither the path nor the -1 is for others; what describes the images stays.
    config |= {"file": None, "num_classes": classes}
    return network


def set_grad_checkpointing(network: Any, enable: bool = True) -> None:
    """timm's gradient checkpointing: activations inside a block are computed again in the backward pass, not kept.

    Running statistics of batch norm move in the first pass alone, as without checkpointing. Raises `ValueError` where timm
    has none for this network.
    """
    try:
        network.set_grad_checkpointing(enable)
    except (AttributeError, AssertionError, NotImplementedError):
        raise ValueError(f"timm has no gradient checkpointing for {type(network).__name__}: leave it off.") from None
    for module in network.modules():
        # A copy of a network has the hooks of the original; without checkpointing they do nothing.
        if isinstance(module, _BatchNorm) and _restore_statistics not in module._forward_hooks.values():
            module.register_forward_pre_hook(_copy_statistics)
            module.register_forward_hook(_restore_statistics, always_call=True)


def _copy_statistics(norm: nn.Module, inputs: Any) -> None:
    """Before a forward within a backward pass, let it move copies of the statistics.

    `torch.utils.checkpoint` compares what both passes keep, so none can be left out.
    """
    if torch.compiler.is_compiling() or not norm.training or torch._C._current_graph_task_id() == -1:
        return
    kept = dict(norm.named_buffers(recurse=False))
    norm.__dict__["_kept_statistics"] = kept
    for name, buffer in kept.items():
        setattr(norm, name, buffer.clone())


def _restore_statistics(norm: nn.Module, inputs: Any, output: Any) -> None:
    """After it, or when `torch.utils.checkpoint` stops it early."""
    if not torch.compiler.is_compiling():
        for name, buffer in norm.__dict__.pop("_kept_statistics", {}).items():
            setattr(norm, name, buffer)


def normalisation(network: nn.Module, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the images that `network` is for, one of each channel, where values go from 0 to 1.

    For another number of channels than timm knows: their average, as many times.
    """
    data = timm.data.resolve_data_config(pretrained_cfg=getattr(network, "pretrained_cfg", None), model=network)
    mean, std = tuple(data["mean"]), tuple(data["std"])
    if len(mean) == channels:
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def hub_id(network: nn.Module) -> str | None:
    """Hub id of the pretrained weights that timm has for `network`, such as `timm/resnet18.a1_in1k`."""
    return (getattr(network, "pretrained_cfg", None) or {}).get("hf_hub_id")


def pretrained_labels(network: nn.Module) -> dict[int, str] | None:
    """Class names of timm's pretrained weights of `network`, where they are ImageNet's and the head is still theirs."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    subset = infer_imagenet_subset(config) if config.get("num_classes") == getattr(network, "num_classes", 0) else None
    if not subset:
        return None
    info = ImageNetInfo(subset)
    descriptions = info.label_descriptions(as_dict=True)
    return {i: descriptions[synset] for i, synset in enumerate(info.label_names())}
