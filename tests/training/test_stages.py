"""Parts of a run that its results do not show."""

import pytest
import torch

from sdq_hf.backbones import create_backbone, normalisation
from sdq_hf.training.stages import taking_images_of


@pytest.mark.parametrize("channels", [1, 3])
def test_a_teacher_sees_images_normalised_as_its_own_training_had_them(channels):
    torch.manual_seed(0)
    network, teacher = (
        create_backbone(name, num_classes=4, in_chans=channels).eval() for name in ("resnet8_cifar", "test_resnet")
    )
    images = torch.rand(3, channels, 64, 64)

    def normalised(one):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation(one, channels))
        return (images - mean) / std

    assert not torch.allclose(normalised(network), normalised(teacher), atol=0.05)
    with torch.no_grad():
        expected = teacher(normalised(teacher))
        found = taking_images_of(network, teacher, channels)(normalised(network))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    same = create_backbone("resnet20_cifar", in_chans=channels)
    assert taking_images_of(network, same, channels) is same
