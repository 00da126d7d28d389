"""SDQ: learned bitwidths for timm image classifiers, with a transformers-like API.

`import sdq_hf` registers the `sdq` model type with transformers' Auto classes, and `resnet20_cifar` and relatives with
timm. Training (`sdq_hf.training`), search (`sdq_hf.search`) and plots (`sdq_hf.hub`) are imported when they are needed.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .configuration_sdq import SDQConfig
from .image_processing_sdq import SDQImageProcessor
from .modeling_sdq import SDQForImageClassification
from .strategy import LayerBits, Strategy

__all__ = ["LayerBits", "SDQConfig", "SDQForImageClassification", "SDQImageProcessor", "Strategy"]
__version__ = "0.1.0"

AutoConfig.register("sdq", SDQConfig)
AutoModelForImageClassification.register(SDQConfig, SDQForImageClassification)
AutoImageProcessor.register(SDQConfig, image_processor_classes={"torchvision": SDQImageProcessor})
