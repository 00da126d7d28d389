"""Networks that the literature reports on and timm lacks: the CIFAR ResNets of He et al. 2016, registered with timm.

`resnet20_cifar` and relatives: a 3x3 stem without pooling and three stages of basic blocks of widths 16, 32, 64. Unlike
the original's parameter-free shortcut (option A), a stage's first block has timm's 1x1 projection (option B).
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet, make_blocks
from torch import nn


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
        self.layer4 = nn.Identity()
        self.feature_info = [
            {"num_chs": width, "reduction": 1, "module": "act1"},
            *({"num_chs": c, "reduction": 2**i, "module": f"layer{i + 1}"} for i, c in enumerate(channels)),
        ]
        self.init_weights()


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
    }


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs({f"resnet{depth}_cifar.untrained": _cfg() for depth in _DEPTHS})


def _register(depth: int) -> None:
    # 6n + 2 layers: two convolutions in each of n blocks of three stages, the stem and the head.
    def model(pretrained: bool = False, **kwargs: Any) -> ResNet:
        arguments = {"blocks_per_stage": (depth - 2) // 6, **kwargs}
        return build_model_with_cfg(CifarResNet, f"resnet{depth}_cifar", pretrained, **arguments)

    model.__name__ = model.__qualname__ = f"resnet{depth}_cifar"
    model.__doc__ = f"ResNet-{depth} for 32x32 images: widths 16, 32, 64."
    globals()[model.__name__] = register_model(model)


for _depth in _DEPTHS:
    _register(_depth)
