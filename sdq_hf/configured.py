"""What a configuration says: its timm network, and that network's strategy, the one it holds or the top of the ladder."""

import copy
import fnmatch
import re
from dataclasses import replace
from typing import Any, cast

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .backbones import create_backbone
from .batch_norm import average_sizes, factor_of, fold_batch_norm
from .configuration_sdq import SDQConfig
from .folding import fold, folded_state
from .layers import count_macs, own_forward, quantizable_layers
from .strategy import FLOAT_BITS, LayerBits, Strategy, unknown_layer

# Attribute of a network that is merged already: some families cannot be asked twice.
_MERGED = "_sdq_merged"


def configured_backbone(config: SDQConfig) -> nn.Module:
    """The timm network of `config`, in the form for its quantizers, with the weights that timm initialises it with.

    That is merged where `config.reparameterize` asks for it, folded (`sdq_hf.folding`), and with scales of powers of two
    without batch norm (`sdq_hf.batch_norm`). Raises `ValueError` where there is nothing to merge.
    """
    network = timm_backbone(config)
    layers = set(quantizable_layers(network))
    network = _formed(config, network)
    if config.reparameterize and layers == set(quantizable_layers(network)):
        raise ValueError(f"reparameterize: timm has nothing to merge in {config.architecture}: leave it out.")
    return network


def configured_state(config: SDQConfig, network: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` that timm's `network` would have in that form; the network stays as it is."""
    if config.scales == "float" and not config.reparameterize:
        return folded_state(network)
    return _formed(config, copy.deepcopy(network)).state_dict()


def _formed(config: SDQConfig, network: nn.Module) -> nn.Module:
    if config.reparameterize and not getattr(network, _MERGED, False):
        with torch.no_grad():
            network = reparameterize_model(network, inplace=True)
        # timm detaches what it merges.
        network.requires_grad_()
        setattr(network, _MERGED, True)
    network = fold(network)
    return network if config.scales == "float" else fold_batch_norm(network, config.input_size)


def timm_backbone(config: SDQConfig) -> nn.Module:
    """The network of `config` as timm makes it."""
    return create_backbone(config.architecture, pretrained=False, num_classes=config.num_labels, **config.model_args)


def fitting_average_sizes(config: SDQConfig, network: nn.Module) -> dict[str, list[int]] | None:
    """Name -> [H, W] of each average of `network` that is a shift; None for one without.

    Raises `ValueError` where the weights that `config` is for make up for another shift than that of its images.
    """
    found = average_sizes(network)
    for name, size in (config.average_sizes or {}).items():
        if name in found and factor_of(size) != factor_of(found[name]):
            raise ValueError(
                f"{config.architecture}: the weights behind the average {name!r} are for {size[0]} x {size[1]} pixels, and "
                f"images of {config.input_size} (channels, height, width) leave {found[name][0]} x {found[name][1]}. In the "
                "hardware profile the size of images is fixed: keep that of the file, or make the profile anew from the "
                "model it was made from."
            )
    return found or None


def initial_strategy(config: SDQConfig, network: nn.Module) -> Strategy:
    """Top of the ladder; first and last layer and pins at their bits."""
    layers = quantizable_layers(network)
    try:
        macs = count_macs(network, config.input_size)
    except Exception as error:
        raise ValueError(
            f"{config.architecture} does not run on images of size {config.input_size} "
            f"(channels, height, width): {error}"
        ) from error
    names = list(layers)
    result, refused = {}, dict[str, list[str]]()
    for name in names:
        is_end = name in (names[0], names[-1])
        pin = config.pinned_bits(name)
        bits = pin if pin is not None else config.first_last_bits if is_end else max(config.candidates)
        reason = own_forward(layers[name]) if macs[name] else _NEVER_CALLED
        if bits != FLOAT_BITS and reason is not None:
            refused.setdefault(reason, []).append(name)
        activation_bits = config.first_last_bits if is_end else config.activation_bits
        if bits == FLOAT_BITS:
            activation_bits = FLOAT_BITS
        weights = sum(p.numel() for key, p in layers[name].named_parameters() if key == "weight")
        pinned = is_end or pin is not None
        channels = cast(Tensor, layers[name].weight).shape[0]
        per_channel = config.granularity == "kernel" and not pinned
        result[name] = LayerBits(
            (bits,) * channels if per_channel else bits, activation_bits, weights, macs[name], pinned
        )
    if refused:
        raise ValueError(_refusal(config.architecture, refused, names))
    for pattern in config.pins:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"pins: no layer of {config.architecture} matches {pattern!r}, e.g. {names[:3]}.")
    if not any(not layer.pinned for layer in result.values()):
        raise ValueError(f"{config.architecture} has no layer left to search: all {len(names)} are pinned.")
    return Strategy.of(result)


_NEVER_CALLED = "is never called: its weight is unused, or read past its forward, where no quantizer can stand."


def _refusal(architecture: str, refused: dict[str, list[str]], names: list[str]) -> str:
    """Which layers cannot be quantized (`refused`, reason -> layers of the network's `names`), and what can be done."""
    texts, pins = [], {}
    for reason, layers in refused.items():
        more = f" of {architecture}" + (f", and {len(layers) - 1} more," if len(layers) > 1 else "")
        texts.append(f"Layer {layers[0]!r}{more} {reason}")
    unwanted = {name for layers in refused.values() for name in layers}
    for name in sorted(unwanted, key=names.index):
        # One pattern for the same layer in all blocks, if there is nothing else that it would match.
        pattern = re.sub(r"\d+", "*", name)
        pins[pattern if unwanted.issuperset(fnmatch.filter(names, pattern)) else name] = FLOAT_BITS
    return f"{' '.join(texts)} Keep {'it' if len(unwanted) == 1 else 'them'} float with pins={pins}."


def fitting_strategy(config: SDQConfig, network: nn.Module) -> tuple[Strategy, list[str]]:
    """The strategy of `config`, which must have the layers of `network` and their sizes, and the layers that are new.

    A head of another size is a new head: `num_labels` was changed, and its sizes follow.
    """
    strategy, layers = Strategy.from_json(config.strategy or []), quantizable_layers(network)
    architecture = config.architecture
    for name in strategy:
        if name not in layers:
            raise ValueError(f"strategy of {architecture}: {unknown_layer(name, list(layers))}")
    heads = cast(Any, network).get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    changed, new = dict(strategy), list[str]()
    for name, module in layers.items():
        if name not in strategy:
            raise ValueError(f"strategy of {architecture}: it lacks the layer {name!r}.")
        layer, weight = strategy[name], cast(Tensor, module.weight)
        weights, bits = weight.numel(), layer.weight_bits
        if isinstance(bits, tuple) and (config.granularity != "kernel" or len(bits) != weight.shape[0]):
            raise ValueError(
                f"strategy of {architecture}: layer {name!r} has bits for {len(bits)} output channels, of {weight.shape[0]}, "
                f"in a model of granularity {config.granularity!r}."
            )
        if layer.num_weights == weights:
            continue
        if module not in heads:
            raise ValueError(
                f"strategy of {architecture}: layer {name!r} has {weights} weights, not {layer.num_weights}."
            )
        new.append(name)
        macs = layer.macs * weights // layer.num_weights if layer.num_weights else 0
        changed[name] = replace(layer, num_weights=weights, macs=macs)
    return Strategy.of(changed), new
