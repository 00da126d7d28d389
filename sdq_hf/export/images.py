"""The real images that exports are compared on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling_sdq import SDQForImageClassification
from ..training.data import load_image_data
from ..training.loaders import build_loaders


class RealImages(NamedTuple):
    """Of the test split: images (float32 [B, C, H, W]) and labels (int64 [B]); a batch of training images for calibration;
    the names of the classes that the data has, in their order."""

    images: Tensor
    labels: Tensor
    calibration: Tensor
    classes: Sequence[str]


def real_images(
    model: SDQForImageClassification, dataset: str | None, data_dir: str | None = None, count: int | None = None
) -> RealImages:
    """Images as `model` takes them. dataset, data_dir: as in `load_image_data`. count: so many; default: all."""
    data = load_image_data(dataset, data_dir=data_dir, max_eval_samples=count)
    loaders = build_loaders(data, model.config.pretrained_cfg or {}, aug="none")
    images, labels = (torch.cat([batch[key] for batch in loaders["test"]]) for key in ("pixel_values", "labels"))
    calibration = next(iter(loaders["calibration"]))["pixel_values"]
    return RealImages(images, labels, calibration, data.label_names)
