"""Puts a timm network in the form that quantizers need: each layer multiplies with its own weight, in its own forward.

The function of the network stays the same. What is put otherwise:

- Weight-standardised convolutions (BiT, NFNets) multiply with a weight that they make of `weight` at each forward. They
  become ordinary ones, with the standardised weight as their `weight`, as batch norm is folded for inference. So what is
  quantized, packed and loaded is what the convolution multiplies with; training goes on from there without
  standardisation.
- Attention with a bias for queries and values only (BEiT, EVA, Swin V2) reads the weight of `qkv` past its forward, to add
  the bias in the same operation. timm has a switch that calls the layer and adds the bias behind it.
- A module that stands in several places of the network (position encodings of CoaT) is one layer with one bitwidth: the
  `state_dict` has it under its first name only.
- Attention with learned position biases (LeViT, EfficientViT, TinyViT) keeps what it made of them in eval mode from one
  forward to the next. It forgets that after each, as the search trains weights in eval mode.
- Layers that share one weight each get their own copy, since each has its own bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
# Their attributes that ordinary convolutions lack.
_ATTRIBUTES = ("gain", "scale", "eps", "gain_init", "same_pad")


def fold(network: nn.Module) -> nn.Module:
    """Put a timm `network` in that form, in place, and return it."""
    module: Any
    seen = set[int]()
    for module in network.modules():
        if type(module) in _STANDARDISED:
            module.weight = nn.Parameter(_standardised_weight(module))
            # With `same_pad` the padding depends on the size of the image.
            module.__class__ = Conv2dSame if getattr(module, "same_pad", False) else nn.Conv2d
            for name in _ATTRIBUTES:
                if hasattr(module, name):
                    delattr(module, name)
        elif isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) in seen:
            module.weight = nn.Parameter(module.weight.detach().clone())
        elif hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
        elif hasattr(module, "attention_bias_cache"):
            module.register_forward_hook(_forget_biases, always_call=True)
        if isinstance(module, nn.Linear | nn.Conv2d):
            seen.add(id(module.weight))
    if _aliases(network):
        network.register_state_dict_post_hook(_drop_aliases)
        network.register_load_state_dict_pre_hook(_add_aliases)
    return network


def folded_state(network: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` that timm's `network` would have after `fold`; the network stays as it is."""
    state = network.state_dict()
    for name, module in network.named_modules():
        if type(module) in _STANDARDISED:
            state[f"{name}.weight"] = _standardised_weight(module)
            state.pop(f"{name}.gain", None)
    _drop_aliases(network, state, "", None)
    return state


@torch.no_grad()
def _standardised_weight(layer: Any) -> Tensor:
    """What the layer's forward multiplies with (shape of `weight`), by timm's own operations: the same bits."""
    gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
    flat = layer.weight.reshape(1, layer.out_channels, -1)
    flat = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=layer.eps)
    return flat.reshape_as(layer.weight)


def _forget_biases(module: Any, *_: Any) -> None:
    module.attention_bias_cache = {}


def _aliases(network: nn.Module) -> dict[str, str]:
    """Further name of a module -> its first name, for those that stand in several places."""
    first: dict[nn.Module, str] = {}
    named = network.named_modules(remove_duplicate=False)
    return {name: first[module] for name, module in named if first.setdefault(module, name) != name}


def _drop_aliases(network: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    further = tuple(f"{prefix}{name}." for name in _aliases(network))
    for key in [key for key in state if key.startswith(further)]:
        del state[key]


def _add_aliases(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for further, first in _aliases(network).items():
        start = f"{prefix}{first}."
        for key in [key for key in state if key.startswith(start)]:
            state.setdefault(f"{prefix}{further}.{key.removeprefix(start)}", state[key])
