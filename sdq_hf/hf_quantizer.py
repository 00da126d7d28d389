"""transformers' quantizer interface: packs weights at save, unpacks them at load.

With it `save_pretrained` and `from_pretrained` stay transformers' own, with sharding, device maps and Hub traffic.
"""

import copy
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import DIGEST, check_files, check_scale, digest
from .layers import PACKED, quantized_layers

# Inside `save_pretrained`: the tensors that its caller gives in place of the model's own.
given_state: ContextVar[Mapping[str, Tensor] | None] = ContextVar("given_state", default=None)
# Where a layer's weight shape and type, and whether it has a bias, are kept while the weight itself is away.
_AWAY = "_sdq_away"


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

    @property
    def is_qat_trainable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        given = given_state.get()
        state = dict(model.state_dict() if given is None else given)
        for name, layer in quantized_layers(model).items():
            quantizer, weight = layer.weight_quantizer, state.pop(f"{name}.weight").detach()
            if given is not None:
                # What was gathered from several devices is on the CPU, whatever the model is on.
                quantizer = copy.deepcopy(quantizer).to(weight.device)
                quantizer.scale.data.copy_(state[f"{name}.weight_quantizer.scale"])
            state[f"{name}.{PACKED}"] = quantizer.pack(weight)
        return {**state, DIGEST: torch.tensor(list(digest(state)), dtype=torch.uint8)}, {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> nn.Module:
        new = set(model.new_layers)
        for name, layer in quantized_layers(model).items():
            scale = layer.weight_quantizer.scale.shape
            layer.__dict__[_AWAY] = layer.weight.shape, layer.weight.dtype, layer.bias is not None, scale
            if name in new:
                # Nothing of the file is for it, and its bias would be taken in the file's size.
                layer.bias = None
            else:
                size = layer.weight_quantizer.packed_size(layer.weight.numel())
                layer.register_buffer(PACKED, torch.empty(size, dtype=torch.uint8, device=layer.weight.device))
            del layer.weight
        if checkpoint_files:
            of_head = ("weight", PACKED, "bias", "weight_quantizer.scale")
            optional = {f"{name}.{key}" for name in new for key in of_head}
            check_files(checkpoint_files, model.state_dict(), optional)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            quantizer = layer.weight_quantizer
            shape, dtype, has_bias, scale = layer.__dict__.pop(_AWAY)
            if name in model.new_layers:
                layer.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=quantizer.scale.device))
                layer.bias = nn.Parameter(layer.weight.new_empty(shape[0])) if has_bias else None
                layer.reset_parameters()  # type: ignore[operator]
                # transformers 5.18 leaves the one of the file here, a number for each of its classes.
                if quantizer.scale.shape != scale:
                    quantizer.scale = nn.Parameter(quantizer.scale.new_empty(scale))
                quantizer.fit_scale(layer.weight)
                continue
            check_scale(name, quantizer.scale)
            packed = layer._buffers.pop(PACKED)
            assert packed is not None
            weight = quantizer.unpack(packed, shape)
            # Weights that are normalised by all of them stay in float32 whatever the rest has.
            if quantizer.form == "lsq":
                weight = weight.to(dtype)
            layer.weight = nn.Parameter(weight)
            quantizer.mark_quantized(layer.weight)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        # Weights that all normalise together were kept in float32.
        computed = model.dtype
        for layer in quantized_layers(model).values():
            layer.dequantize()
            layer.weight.data = layer.weight.data.to(computed)
        return model
