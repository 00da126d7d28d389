"""transformers' quantizer interface: packs weights at save, unpacks them at load.

With it `save_pretrained` and `from_pretrained` stay transformers' own, with sharding, device maps and Hub traffic.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layers import QuantizedLayer, quantized_layers
from .packing import pack, packed_size, unpack

PACKED = "weight_packed"


@register_quantization_config("sdq")
class SDQQuantizationConfig(QuantizationConfigMixin):
    """Marks a configuration as quantized by SDQ. The bits are in the configuration's `strategy` and only there."""

    def __init__(self, **kwargs: Any):
        self.quant_method = "sdq"  # type: ignore[assignment]


@register_quantizer("sdq")
class SDQHfQuantizer(HfQuantizer):
    """Packed codes in the file as `<layer>.weight_packed` (uint8); `<layer>.weight` in the model."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = model.state_dict()
        for name, layer in quantized_layers(model).items():
            del state[f"{name}.weight"]
            codes = layer.weight_quantizer.codes(layer.weight.detach())
            state[f"{name}.{PACKED}"] = pack(codes, layer.weight_quantizer.bits)
        return state, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in quantized_layers(model).values():
            size = packed_size(layer.weight.numel(), layer.weight_quantizer.bits)
            layer.register_buffer(PACKED, torch.empty(size, dtype=torch.uint8, device=layer.weight.device))
            _shapes(layer)["shape"] = layer.weight.shape
            del layer.weight
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in quantized_layers(model).values():
            quantizer, shape = layer.weight_quantizer, _shapes(layer).pop("shape")
            packed = layer._buffers.pop(PACKED)
            assert packed is not None
            weight = quantizer.from_codes(unpack(packed, quantizer.bits, shape.numel()).view(shape))
            layer.weight = nn.Parameter(weight)
            quantizer.exact = True
        return model


def _shapes(layer: QuantizedLayer) -> dict[str, torch.Size]:
    """Where a layer's weight shape is kept while the weight itself is away."""
    return layer.__dict__.setdefault("_sdq_packed", {})
