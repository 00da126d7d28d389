"""What shares one bitwidth in a search: a layer, a block, the whole network, or one output channel (the paper's kernel)."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from timm.models import group_parameters
from torch import nn

from ..strategy import FLOAT_BITS, Strategy


@dataclass(frozen=True)
class Unit:
    """The weights of whole `layers`; or, with a number, output channel `channel` of one; or, with `inputs`, one's inputs."""

    layers: tuple[str, ...]
    channel: int | None = None
    inputs: bool = False


def layer_units(strategy: Strategy) -> dict[str, Unit]:
    """A unit of its own, by the same name, for each searchable layer of `strategy` whose weights are quantized."""
    return {name: Unit((name,)) for name in strategy.searchable if strategy[name].weight_bits != FLOAT_BITS}


def input_units(strategy: Strategy) -> dict[str, Unit]:
    """A unit for the inputs of each searchable layer that rounds them, called `layer1.0.conv1.input`."""
    return {
        f"{name}.input": Unit((name,), inputs=True)
        for name in layer_units(strategy)
        if strategy[name].activation_bits != FLOAT_BITS
    }


def units_of(network: nn.Module, strategy: Strategy, granularity: str) -> dict[str, Unit]:
    """Name -> unit, in the network's order.

    Blocks are those of timm's `group_matcher`, as for layer decay. `ValueError` for a network without one.
    """
    units = layer_units(strategy)
    if granularity == "layer":
        return units
    if granularity == "net":
        return {"net": Unit(tuple(units))}
    if granularity == "kernel":
        return {
            f"{name}[{channel}]": Unit((name,), channel)
            for name in units
            for channel in range(len(cast(tuple[int, ...], strategy[name].weight_bits)))
        }
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"granularity 'block': {type(network).__name__} does not say what its blocks are (no group_matcher, which timm's "
            "layer decay needs too). Take 'layer' or 'net'."
        )
    groups = cast(Mapping[str, Any], group_parameters(network, matcher(coarse=False), reverse=True))
    blocks: dict[Any, list[str]] = {}
    for name in units:
        blocks.setdefault(groups[f"{name}.weight"], []).append(name)
    return {_name(layers): Unit(tuple(layers)) for layers in blocks.values()}


def _name(layers: list[str]) -> str:
    """What the names of a block's layers have in common, down to a module: `layer1.0` for `layer1.0.conv1` and `.conv2`."""
    columns = zip(*(name.split(".") for name in layers), strict=False)
    common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    return ".".join(common) or "+".join(layers)
