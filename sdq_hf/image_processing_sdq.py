"""The image processor: timm's evaluation transforms, read from config.json."""

from typing import Any

from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from .configuration_sdq import check_pretrained_cfg
from .images import with_channels


class SDQImageProcessor(TimmWrapperImageProcessor):
    """As `TimmWrapperImageProcessor`; images of any mode are brought to the network's channels, 1 (grey) or 3 (RGB).

    Without it a network for grey images would not work in a `pipeline`, which loads every image as RGB.
    """

    def __init__(self, pretrained_cfg: dict[str, Any], architecture: str | None = None, **kwargs: Any):
        check_pretrained_cfg(pretrained_cfg)
        super().__init__(pretrained_cfg, architecture, **kwargs)

    def preprocess(self, images: Any, return_tensors: Any = "pt", **kwargs: Any) -> Any:
        """Images (PIL, numpy, or lists of them) -> `pixel_values`, float32 [B, C, H, W]; tensors are only transformed.

        An array is [H, W, C] or [C, H, W], or [H, W] for a grey image. Modes and errors are those of
        `sdq_hf.images.with_channels`, as in training.
        """
        if not isinstance(images, Tensor):
            channels = self.data_config["input_size"][0]
            images = [_with_axis(image) for image in images] if isinstance(images, list | tuple) else _with_axis(images)
            images = [to_pil_image(image) for image in make_flat_list_of_images(images)]
            images = [with_channels(image, channels) for image in images] if channels in (1, 3) else images
        return super().preprocess(images, return_tensors=return_tensors, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: the code is in the package, and no copy of it is to be saved with a model."""


def _with_axis(image: Any) -> Any:
    """A grey image [H, W] as [H, W, 1], which transformers asks for; anything else as it is."""
    return image[..., None] if getattr(image, "ndim", None) == 2 else image
