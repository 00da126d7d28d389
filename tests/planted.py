"""A small network in which the sizes of sensitivities are known by construction, and images for it."""

import timm
import torch
from torch import nn

from sdq_hf import SDQForImageClassification


class Images:
    """Batches of noise with a channel pattern, the same in each pass."""

    def __init__(self, batches=4, size=32):
        generator = torch.Generator().manual_seed(3)
        self.batches = [{"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)} for _ in range(batches)]

    def __iter__(self):
        return iter(self.batches)


def planted_network():
    """A ResNet-8 in which the sizes of sensitivities are known by construction.

    The second and the third stage have layers of the same shape inside a residual branch; `layer2.0`'s branch is
    multiplied by almost zero, so its layers may lose their bits, while the branch of `layer3.0` is amplified.
    """
    torch.manual_seed(0)
    network = timm.create_model("resnet8_cifar", num_classes=10, zero_init_last=False)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
        network.layer3[0].bn2.weight.fill_(1e-4)
        network.layer1[0].bn2.weight.fill_(3.0)
    network.fc.weight.data.mul_(3)
    torch.optim.swa_utils.update_bn([b["pixel_values"] for b in Images()], network)
    return SDQForImageClassification.from_float(network, "resnet8_cifar", img_size=16)
