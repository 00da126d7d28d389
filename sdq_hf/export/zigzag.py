"""Latency and memory energy of each layer on an accelerator that ZigZag knows: a model, no measurement.

ZigZag (Mei et al. 2021, package `zigzag-dse`) searches an order of loops for each layer and counts the accesses to the
memories of an accelerator described by a file. Bits decide how much is moved. Its energy of a MAC does not depend on bits, so
it is left out here; padding, and what is between the layers, is left out too.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..layers import quantizable_layers, run_on_zeros
from ..strategy import FLOAT_BITS, Strategy

# Of a partial sum: what the registers of ZigZag's accelerators hold.
_SUM_BITS = 16


@dataclass(frozen=True)
class Shape:
    """Of a convolution for one image; a linear layer is one of 1 x 1 over its positions. Channels are those of a group."""

    groups: int
    out_channels: int
    in_channels: int
    output: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]


def layer_shapes(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, list[Shape]]:
    """Shapes of each conv and linear layer of `network`, one for each call, from one forward pass of an image (C, H, W)."""
    shapes: dict[str, list[Shape]] = {name: [] for name in quantizable_layers(network)}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            weight = cast(Tensor, module.weight)
            if isinstance(module, nn.Conv2d):
                sizes = [(output.shape[-2], output.shape[-1]), module.kernel_size, module.stride]
                groups = module.groups
            else:
                sizes, groups = [(output.numel() // weight.shape[0], 1), (1, 1), (1, 1)], 1
            shapes[name].append(Shape(groups, weight.shape[0] // groups, weight.shape[1], *cast(Any, sizes)))

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in quantizable_layers(network).items()]
    run_on_zeros(network, input_size, handles)
    return shapes


def memory_model(
    strategy: Strategy, shapes: Mapping[str, list[Shape]], accelerator: str = "tpu_like"
) -> dict[str, Any]:
    """What ZigZag says of each layer: `{"tool", "accelerator", "layers": {name: {"cycles", "memory_energy"}}}`.

    Energy is in the units of the accelerator's file, pJ. A layer is left out that stays float, that is never called, or whose
    channels have bits of their own. Seconds for each kind of layer.

    Args:
        shapes: see `layer_shapes`.
        accelerator: one of ZigZag's own ("tpu_like", "eyeriss_like", ...), with its default mapping.

    Raises `RuntimeError` where zigzag-dse is not installed, `ValueError` for an accelerator that it does not have.
    """
    try:
        import zigzag
        from zigzag.api import get_hardware_performance_zigzag
    except ImportError as error:
        raise RuntimeError(f"ZigZag cannot be imported ({error}): pip install 'sdq-hf[zigzag]'.") from None
    files = Path(next(iter(zigzag.__path__))) / "inputs"
    known = sorted(path.stem for path in (files / "hardware").glob("*.yaml"))
    if accelerator not in known:
        raise ValueError(f"ZigZag has no accelerator {accelerator!r}, only {', '.join(known)}.")
    seen: dict[tuple[Shape, int, int], tuple[float, float]] = {}
    layers: dict[str, dict[str, float]] = {}
    for name, x in strategy.items():
        if isinstance(x.weight_bits, tuple) or FLOAT_BITS in (x.weight_bits, x.activation_bits) or not shapes[name]:
            continue
        for shape in shapes[name]:
            key = shape, x.weight_bits, x.activation_bits
            if key not in seen:
                with tempfile.TemporaryDirectory() as folder, _silent():
                    _, _, found = get_hardware_performance_zigzag(
                        [_workload(*key)],
                        str(files / "hardware" / f"{accelerator}.yaml"),
                        str(files / "mapping" / "default.yaml"),
                        dump_folder=folder,
                        lpf_limit=5,
                        loma_show_progress_bar=False,
                    )
                seen[key] = float(found[0][0].latency_total2), float(found[0][0].mem_energy)
        calls = [seen[shape, x.weight_bits, x.activation_bits] for shape in shapes[name]]
        cycles, energy = (math.fsum(values) for values in zip(*calls, strict=True))
        layers[name] = {"cycles": cycles, "memory_energy": energy}
    return {"tool": f"zigzag-dse {metadata.version('zigzag-dse')}", "accelerator": accelerator, "layers": layers}


def _workload(shape: Shape, weight_bits: int, activation_bits: int) -> dict[str, Any]:
    """A layer as ZigZag describes it."""
    (rows, columns), (height, width), (down, right) = shape.output, shape.kernel, shape.stride
    return {
        "id": 0,
        "name": "layer",
        "operator_type": "Conv",
        "equation": "O[b][g][k][oy][ox]+=W[g][k][c][fy][fx]*I[b][g][c][iy][ix]",
        "dimension_relations": [f"ix={right}*ox+1*fx", f"iy={down}*oy+1*fy"],
        "loop_dims": ["B", "G", "K", "C", "OY", "OX", "FY", "FX"],
        "loop_sizes": [
            *(1, shape.groups, shape.out_channels, shape.in_channels),
            *(rows, columns, height, width),
        ],
        "operand_precision": {"W": weight_bits, "I": activation_bits, "O": _SUM_BITS, "O_final": activation_bits},
        "operand_source": {"I": 0, "W": 0},
    }


@contextmanager
def _silent() -> Iterator[None]:
    """ZigZag sets up the root logger and tells it of each step."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
