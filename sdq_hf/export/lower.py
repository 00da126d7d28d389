"""Makes the integer network of a model in the hardware profile."""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, DropPath, SelectAdaptivePool2d
from timm.layers.padding import get_same_padding
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..batch_norm import ShiftAvgPool2d, trace
from ..layers import QuantizedLayer, modes_restored
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.power_of_two import exponent
from .graph import IMAGE, Add, Clip, Concat, Flatten, IntegerNetwork, Layer, MaxPool, Node, Quantize, SumPool


class ExportError(ValueError):
    """A model that cannot be exported; names the layer or the operation, and what can be done."""


_SAME = (nn.Identity, nn.Dropout, DropPath)
_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.cat: "cat",
    torch.flatten: "flatten",
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.dropout: "same",
}
_METHODS = {"add": "add", "add_": "add", "flatten": "flatten", "relu": "relu", "relu_": "relu", "contiguous": "same"}


@torch.no_grad()
def integer_network(model: SDQForImageClassification) -> IntegerNetwork:
    """The integer arithmetic of `model`, which must be in the hardware profile and calibrated.

    Raises `ExportError` for a model that is not, and for an operation that integer arithmetic has not.
    """
    if model.config.scales != "power_of_two":
        raise ExportError(
            "The model is not in the hardware profile: its scales are floats. Make a copy that is with "
            "model.to_hardware_profile(images), or scripts/to_hardware.py."
        )
    if model.dtype not in (torch.float32, torch.float64):
        raise ExportError(
            f"The model was loaded in {model.dtype}, which rounds its biases: load it in float32, without dtype."
        )
    if not model.is_calibrated():
        raise ExportError("The activation steps of the model were never fitted: call model.calibrate(images).")
    if not all(layer.enabled for layer in model.quantized_layers().values()):
        raise ExportError("The model is in float_mode: leave that first, its quantizers make the integers.")
    network = model.timm_model
    graph = fx.GraphModule(network, trace(network))
    graph.graph.eliminate_dead_code()
    image = torch.zeros(1, *model.config.input_size, device=model.device, dtype=model.dtype)
    try:
        with modes_restored(network):
            # In the model's own words what its images cannot be: ShapeProp would wrap and print it.
            network.eval()(image)
            ShapeProp(graph.eval()).propagate(image)
    except ValueError as error:
        raise ExportError(str(error)) from error
    return _Lowering(model, graph).network()


class _Lowering:
    def __init__(self, model: SDQForImageClassification, graph: fx.GraphModule):
        self._model, self._graph = model, graph
        self._modules = dict(graph.named_modules())
        self._nodes: dict[str, Node] = {}
        # Node of the traced graph -> node of the integer network, or the image.
        self._of: dict[fx.Node, str] = {}

    def network(self) -> IntegerNetwork:
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                self._of[node] = IMAGE
            elif node.op == "output":
                last = self._of[node.args[0]]
                break
            else:
                self._of[node] = self._lower(node)
        if last == IMAGE or last != list(self._nodes)[-1]:
            raise ExportError(
                f"The output of {self._model.config.architecture} is not that of its last layer, but {last!r}."
            )
        config = self._model.config
        return IntegerNetwork(tuple(self._nodes.values()), config.architecture, config.input_size)

    def _lower(self, node: fx.Node) -> str:
        """Add what the traced `node` does; gives the name of its result."""
        name = str(node.target) if node.op == "call_module" else node.name
        if node.op == "call_module":
            module = self._modules[name]
            if isinstance(module, QuantizedLayer):
                return self._layer(name, module, node)
            kind = self._kind_of_module(name, module)
        else:
            table: dict[Any, str] = _FUNCTIONS if node.op == "call_function" else dict(_METHODS)
            kind = table.get(node.target, "")
            module = None
        lower: Callable[..., str] | None = getattr(self, f"_{kind}", None) if kind else None
        if lower is None:
            what = f"a {type(module).__name__}" if module is not None else _operation(node)
            raise ExportError(
                f"{name!r} is {what}, which has no integer form here. Networks of convolutions, linear layers, ReLU, "
                "ReLU6, sums, concatenation and pooling have one."
            )
        return lower(self._free(name), node, module)

    def _free(self, name: str) -> str:
        """`name`, or with a number behind it: a module without weights may be called several times."""
        names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        return next(free for free in names if free not in self._nodes)

    def _kind_of_module(self, name: str, module: nn.Module) -> str:
        if isinstance(module, nn.Conv2d | nn.Linear):
            raise ExportError(
                f"Layer {name!r} is float: an export needs bits for every layer. Leave out the pin to 32."
            )
        if isinstance(module, SelectAdaptivePool2d):
            return "same" if module.is_identity() else ""
        kinds = {
            nn.ReLU: "relu",
            nn.ReLU6: "relu6",
            nn.MaxPool2d: "max_pool",
            nn.AvgPool2d: "avg_pool",
            ShiftAvgPool2d: "shift_pool",
            nn.Flatten: "flatten",
        }
        empty = isinstance(module, nn.Sequential) and not len(module)
        return "same" if empty or isinstance(module, _SAME) else kinds.get(type(module), "")

    # Pieces ------------------------------------------------------------------------------------------------------

    def _add_node(self, node: Node) -> str:
        assert node.name not in self._nodes, node.name
        self._nodes[node.name] = node
        return node.name

    def _source(self, name: str, node: Any) -> Node:
        """What a node takes; integers, so not the image."""
        source = self._of.get(node) if isinstance(node, fx.Node) else None
        if source is None or source == IMAGE:
            raise ExportError(
                f"{name!r} takes {'the image' if source else repr(node)} itself, not the output of a layer."
            )
        return self._nodes[source]

    def _layer(self, name: str, layer: QuantizedLayer, node: fx.Node) -> str:
        quantizer = layer.input_quantizer
        if layer.has_float_weight or quantizer is None:
            what = "weights are" if layer.has_float_weight else "inputs are"
            raise ExportError(f"Layer {name!r}: its {what} float. An export needs bits for both, 1 to 8.")
        if name in self._nodes:
            raise ExportError(f"Layer {name!r} is used more than once in a forward pass.")
        argument: Any = node.args[0]
        source = self._of[argument]
        shape = tuple(argument.meta["tensor_meta"].shape[1:])
        low, high = quantizer.range
        step = int(exponent(quantizer.effective_step))
        inputs = self._add_node(
            Quantize(
                name=f"{name}.input",
                inputs=(source,),
                shape=shape,
                exponent=step,
                low=low,
                high=high,
                bits=quantizer.bits,
                signed=low < 0,
                source_exponent=None if source == IMAGE else self._nodes[source].exponent,
            )
        )
        weights = layer.weight_quantizer
        weight = weights.integers(layer.weight).long().cpu()
        units = exponent(weights.unit).cpu().expand(len(weight))
        bias = None
        if layer.bias is not None:
            real = layer.quantized_bias()
            assert real is not None
            bias = (real.double().cpu() * 2.0 ** -(units + step)).long()
        # One product at a time, in any order: never below the sum of all that can be negative.
        lows, highs = _sum_range(weight, bias, low, high)
        shifts = units - units.min()
        geometry: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            geometry = {
                "stride": layer.stride,
                "padding": _padding(layer, shape),
                "dilation": layer.dilation,
                "groups": layer.groups,
            }
        return self._add_node(
            Layer(
                name=name,
                inputs=(inputs,),
                shape=self._shape(node),
                exponent=step + int(units.min()),
                low=int((lows << shifts).min()),
                high=int((highs << shifts).max()),
                weight=weight,
                bias=bias,
                exponents=tuple(units.tolist()),
                weight_bits=weights.bits,
                grid=weights.grid,
                sum_low=int(lows.min()),
                sum_high=int(highs.max()),
                **geometry,
            )
        )

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["tensor_meta"].shape[1:])

    def _same(self, name: str, node: fx.Node, module: Any) -> str:
        argument: Any = node.args[0]
        return self._of[argument]

    def _relu(self, name: str, node: fx.Node, module: Any) -> str:
        return self._clip(name, node, None)

    def _relu6(self, name: str, node: fx.Node, module: Any) -> str:
        return self._clip(name, node, 6)

    def _clip(self, name: str, node: fx.Node, top: int | None) -> str:
        source = self._source(name, node.args[0])
        units = None
        if top is not None:
            units = top << -source.exponent if source.exponent <= 0 else top >> source.exponent
            if source.exponent > 0 and units << source.exponent != top:
                raise ExportError(f"{name!r}: its upper end {top} is no whole number of units of 2^{source.exponent}.")
        high = max(source.high, 0)
        return self._add_node(
            Clip(
                name=name,
                inputs=(source.name,),
                shape=source.shape,
                exponent=source.exponent,
                low=0,
                high=high if units is None else min(high, units),
                bounds=(0, units),
            )
        )

    def _add(self, name: str, node: fx.Node, module: Any) -> str:
        sources = [self._source(name, argument) for argument in node.args]
        if len(sources) != 2 or node.kwargs or sources[0].shape != sources[1].shape:
            raise ExportError(f"{name!r} is a sum of something else than two tensors of the same shape.")
        finest, shifts = _aligned(sources)
        return self._add_node(
            Add(
                name=name,
                inputs=tuple(source.name for source in sources),
                shape=sources[0].shape,
                exponent=finest,
                low=sum(s.low << n for s, n in zip(sources, shifts, strict=True)),
                high=sum(s.high << n for s, n in zip(sources, shifts, strict=True)),
                shifts=shifts,
            )
        )

    def _cat(self, name: str, node: fx.Node, module: Any) -> str:
        arguments: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 1:
            raise ExportError(
                f"{name!r} concatenates along dimension {dim}; channels, dimension 1, have an integer form."
            )
        sources = [self._source(name, argument) for argument in arguments]
        finest, shifts = _aligned(sources)
        return self._add_node(
            Concat(
                name=name,
                inputs=tuple(source.name for source in sources),
                shape=self._shape(node),
                exponent=finest,
                low=min(s.low << n for s, n in zip(sources, shifts, strict=True)),
                high=max(s.high << n for s, n in zip(sources, shifts, strict=True)),
                shifts=shifts,
            )
        )

    def _flatten(self, name: str, node: fx.Node, module: Any) -> str:
        return self._flat(name, self._source(name, node.args[0]), self._shape(node))

    def _flat(self, name: str, source: Node, shape: tuple[int, ...]) -> str:
        if shape == source.shape:
            return source.name
        if len(shape) != 1:
            raise ExportError(
                f"{name!r} flattens {source.shape} to {shape}; only the whole of an image can be flattened."
            )
        return self._add_node(
            Flatten(
                name=name,
                inputs=(source.name,),
                shape=shape,
                exponent=source.exponent,
                low=source.low,
                high=source.high,
            )
        )

    def _max_pool(self, name: str, node: fx.Node, pool: Any) -> str:
        source = self._source(name, node.args[0])
        kernel, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
        if _pair(pool.dilation) != (1, 1):
            raise ExportError(f"{name!r}: pooling with dilation has no integer form here.")
        shape = self._shape(node)
        # With ceil_mode the last windows reach over the end, by pixels that never win.
        bottom, right = (
            max(p, (windows - 1) * s + k - n - p)
            for windows, n, k, s, p in zip(shape[1:], source.shape[1:], kernel, stride, padding, strict=True)
        )
        return self._add_node(
            MaxPool(
                name=name,
                inputs=(source.name,),
                shape=shape,
                exponent=source.exponent,
                low=source.low,
                high=source.high,
                kernel=kernel,
                stride=stride,
                padding=(padding[1], right, padding[0], bottom),
            )
        )

    def _avg_pool(self, name: str, node: fx.Node, pool: Any) -> str:
        source = self._source(name, node.args[0])
        kernel, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
        count = kernel[0] * kernel[1]
        whole = all((n - k) % s == 0 for n, k, s in zip(source.shape[1:], kernel, stride, strict=True))
        if pool.ceil_mode and not whole:
            raise ExportError(
                f"{name!r}: its windows of {kernel[0]} x {kernel[1]} pixels reach over the end of {source.shape[1]} x "
                f"{source.shape[2]} pixels (ceil_mode), and averages over fewer are no shift. Choose an image size that "
                "they fit into."
            )
        if count & (count - 1) or any(padding) or pool.divisor_override:
            raise ExportError(
                f"{name!r}: an average over {kernel[0]} x {kernel[1]} pixels with padding {padding} is no shift. "
                "Windows of a power of two of pixels without padding are."
            )
        return self._sum(name, node, source, kernel, stride, count.bit_length() - 1)

    def _shift_pool(self, name: str, node: fx.Node, pool: Any) -> str:
        source = self._source(name, node.args[0])
        result = self._sum(name, node, source, pool.size, pool.size, pool.shift, (source.shape[0], 1, 1))
        return self._flat(f"{name}.flatten", self._nodes[result], (source.shape[0],)) if pool.flatten else result

    def _sum(
        self,
        name: str,
        node: fx.Node,
        source: Node,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        shift: int,
        shape: tuple[int, ...] | None = None,
    ) -> str:
        count = kernel[0] * kernel[1]
        return self._add_node(
            SumPool(
                name=name,
                inputs=(source.name,),
                shape=shape or self._shape(node),
                exponent=source.exponent - shift,
                low=count * source.low,
                high=count * source.high,
                kernel=kernel,
                stride=stride,
            )
        )


def _operation(node: fx.Node) -> str:
    """What a traced operation outside of layers is, and the innermost module that computes it."""
    kind = "parameter" if node.op == "get_attr" else "operation"
    what = f"the {kind} {getattr(node.target, '__name__', node.target)!r}"
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return what
    name, module = list(stack.values())[-1]
    return f"{what} in {name!r} ({module.__name__})"


def _sum_range(weight: Tensor, bias: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    """What the sum of each output channel cannot leave, in any order of its terms (int64 [O] each)."""
    flat = weight.flatten(1)
    ends = torch.stack([flat * low, flat * high, torch.zeros_like(flat)])
    lows, highs = ends.amin(0).sum(1), ends.amax(0).sum(1)
    if bias is not None:
        lows, highs = lows + bias.clamp(max=0), highs + bias.clamp(min=0)
    return lows, highs


def _aligned(sources: Sequence[Node]) -> tuple[int, tuple[int, ...]]:
    """The finest exponent, and how far each is to be shifted left for it."""
    finest = min(source.exponent for source in sources)
    return finest, tuple(source.exponent - finest for source in sources)


def _padding(layer: nn.Conv2d, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Pixels on the left, right, top, bottom."""
    if isinstance(layer, Conv2dSame):
        found = [
            get_same_padding(n, k, s, d)
            for n, k, s, d in zip(shape[1:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ]
        (top, left), (bottom, right) = ((n // 2 for n in found), (n - n // 2 for n in found))
        return left, right, top, bottom
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ExportError(
            f"A convolution with padding {layer.padding!r} of {layer.padding_mode!r} has no integer form here."
        )
    height, width = layer.padding
    return width, width, height, height


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
