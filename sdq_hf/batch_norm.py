"""Puts a network in the form of the hardware profile: no batch norm, and averages that are sums and shifts.

The function of the network in eval mode stays the same, up to the rounding of floats:

- Batch norm is folded into the convolution or linear layer whose output it takes.
- An average over a number of pixels that is no power of two, as 7 x 7 of a global pooling, becomes the sum divided by the
  next power of two; the layers behind it take up the rest in their weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .layers import modes_restored, run_on_zeros

# Between a pooling and the layer that takes up its factor there may stand what a positive factor goes through unchanged.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Flatten, nn.ReLU)
_TRANSPARENT_CALLS = ("flatten", "dropout", "relu", "view", "reshape")


class ShiftAvgPool2d(nn.Module):
    """[B, C, H, W] -> sum over all pixels / 2^`shift`: [B, C], or [B, C, 1, 1] without `flatten`.

    Raises `ValueError` that names it (`name`, its place in the network) for another number of pixels than `size` (H, W),
    which the shift is for.
    """

    def __init__(self, name: str, size: tuple[int, int], flatten: bool):
        super().__init__()
        self.name, self.size, self.flatten = name, size, flatten
        self.shift = shift_of(size)

    def extra_repr(self) -> str:
        return f"size={self.size}, shift={self.shift}"

    def is_identity(self) -> bool:
        """As of timm's average, which LowFormer asks in its forward."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.size:
            raise ValueError(
                f"In the hardware profile the size of images is fixed: the average {self.name!r} is of {self.size[0]} x "
                f"{self.size[1]} pixels, got {x.shape[-2]} x {x.shape[-1]}."
            )
        x = x.sum((2, 3), keepdim=not self.flatten)
        return x * 2.0**-self.shift


def shift_of(size: Sequence[int]) -> int:
    """The logarithm of the next power of two to the number of pixels of `size` (H, W)."""
    return (size[0] * size[1] - 1).bit_length()


def factor_of(size: Sequence[int]) -> float:
    """What the weights behind an average over `size` (H, W) are multiplied with, from 1 up to 2."""
    return 2 ** shift_of(size) / (size[0] * size[1])


def average_sizes(network: nn.Module) -> dict[str, list[int]]:
    """Name -> [H, W] of each average of `network` that is a shift."""
    return {name: list(pool.size) for name, pool in network.named_modules() if isinstance(pool, ShiftAvgPool2d)}


def fold_batch_norm(network: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Put a timm `network`, already folded by `sdq_hf.folding`, in that form, in place, and return it.

    input_size: (C, H, W) of its images. Raises `ValueError` that names the module where it cannot be done.
    """
    graph, modules = trace(network), dict(network.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    norms = {str(n.target): n for n in graph.nodes if isinstance(modules.get(str(n.target)), nn.BatchNorm2d)}
    for name, node in norms.items():
        source = node.args[0]
        layer: Any = modules.get(str(source.target)) if source.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ValueError(f"Batch norm {name!r} stands behind no convolution or linear layer to fold it into.")
        if len(source.users) > 1 or calls.count(source.target) > 1 or calls.count(name) > 1:
            raise ValueError(
                f"Batch norm {name!r} cannot be folded: the output of {source.target!r} is used elsewhere too."
            )
        _fold(layer, modules[name])
        # timm's own one has the activation inside.
        norm: Any = modules[name]
        drop, act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        _replace(network, name, act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act))
    for node in graph.nodes:
        pool = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(pool, SelectAdaptivePool2d) and pool.pool_type in ("avg", "fast", "fastavg"):
            _shift_pool(network, node, modules, input_size, calls)
    return network


def trace(network: nn.Module) -> fx.Graph:
    """What `network` computes in eval mode, as a graph of calls of its layers.

    Raises `ValueError` that names the module where it depends on the values or the size of an image.
    """
    tracer = _Tracer()
    try:
        with modes_restored(network):
            return tracer.trace(network.eval())
    except Exception as error:  # each of timm's networks that cannot be traced fails in a way of its own
        raise ValueError(
            f"{type(network).__name__} cannot be put in the hardware profile: it computes no fixed sequence of layers "
            f"({tracer.failed}{error})."
        ) from error


class _Tracer(fx.Tracer):
    """Goes into modules as far as their parts are layers. `failed`: the innermost module that an error came from."""

    failed = ""
    takes_several = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.takes_several = bool(args) and isinstance(args[0], list | tuple)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or f"{self.path_of_module(m)!r}, a {type(m).__name__}: "
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d | SelectAdaptivePool2d | ShiftAvgPool2d)
        # What takes several tensors, as SelectSeq of SelecSLS, picks one or joins them: it is no layer.
        has_parts = any(m.children()) or self.takes_several
        return whole or not has_parts or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    norm_state = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *norm_state)
    # A bias that there was none of comes back as one that is not to be trained.
    layer.bias.requires_grad_(layer.weight.requires_grad)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


@torch.no_grad()
def _shift_pool(
    network: nn.Module,
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    calls: Sequence[Any],
) -> None:
    name = str(node.target)
    pool: Any = modules[name]
    taken, given = _shapes(network, name, input_size)
    if getattr(pool.pool, "dim", (2, 3)) != (2, 3) or any(n > 1 for n in given[2:]):
        # Of channels-last images, or to several pixels: that has no such form.
        return
    height, width = taken[2:]
    _replace(network, name, ShiftAvgPool2d(name, (height, width), flatten=len(given) == 2))
    factor = factor_of((height, width))
    if factor == 1:
        return
    for target in _behind(node, modules):
        layer: Any = modules.get(target)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ValueError(
                f"The average {name!r} over {height} x {width} pixels cannot be a shift: {target!r} stands behind it. "
                "Choose an image size that leaves a power of two of pixels."
            )
        if calls.count(target) > 1:
            raise ValueError(
                f"The average {name!r} over {height} x {width} pixels cannot be a shift: layer {target!r} behind it is used "
                "elsewhere too, so its weights cannot take up the factor. Choose an image size that leaves a power of two "
                "of pixels."
            )
        layer.weight.mul_(factor)


def _behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """What takes a node's output, past everything transparent."""
    for user in node.users:
        target = getattr(user.target, "__name__", str(user.target))
        module = modules.get(target) if user.op == "call_module" else None
        called = user.op in ("call_function", "call_method") and target in _TRANSPARENT_CALLS
        if called or isinstance(module, _TRANSPARENT):
            yield from _behind(user, modules)
        else:
            yield target


def _shapes(network: nn.Module, name: str, input_size: tuple[int, int, int]) -> tuple[torch.Size, torch.Size]:
    """Of what the module `name` takes and gives."""
    shapes: list[tuple[torch.Size, torch.Size]] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _, x, y: shapes.append((x[0].shape, y.shape)))
    run_on_zeros(network, input_size, [handle])
    return shapes[0]
