"""hls4ml projects: a network as C++ for FPGA synthesis, with fixed-point types that hold its integers exactly.

The nodes are handed to hls4ml one for one, as streams of pixels with the channels last. Every type follows from the exponent
and the range of a node: nothing is rounded or cut off but in `Quantize`, whose type rounds half to even and saturates.
"""

import ctypes
import re
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..quantizers.activation import activation_range
from ..quantizers.weight import to_channels
from ..writing import folder_beside, replace_folder, writing
from .graph import (
    FLOAT64_EXACT,
    IMAGE,
    Add,
    Clip,
    Concat,
    Flatten,
    IntegerNetwork,
    Layer,
    MaxPool,
    Node,
    Quantize,
    SumPool,
    signed_bits,
)
from .lower import ExportError
from .optional import needed

# The name of the files and of the top function.
PROJECT = "sdq"
_STRATEGIES = ("latency", "resource")
# Where hls4ml keeps what a project was made with.
_NOTES = "hls4ml_config.yml"
# Bytes of stack of an emulation; they are only taken where they are used.
_STACK = 2**30
# hls4ml 1.3 has this for arrays, and not for streams; projects take it in their own copy of its header.
_RELU6 = """
template <class data_T, class res_T, typename CONFIG_T> void relu6(hls::stream<data_T> &data, hls::stream<res_T> &res) {
ReLU6ActLoop:
    for (int i = 0; i < CONFIG_T::n_in / res_T::size; i++) {
        #pragma HLS PIPELINE

        data_T in_data = data.read();
        res_T out_data;
        PRAGMA_DATA_PACK(out_data)

    ReLU6PackLoop:
        for (int j = 0; j < res_T::size; j++) {
            #pragma HLS UNROLL
            if (in_data[j] >= 6)
                out_data[j] = 6;
            else if (in_data[j] > 0)
                out_data[j] = in_data[j];
            else
                out_data[j] = 0;
        }

        res.write(out_data);
    }
}

"""


@dataclass(frozen=True)
class HLSOptions:
    """How hls4ml is to build a network; none of it changes its numbers. Raises `ExportError` that names a wrong option.

    reuse_factor: how many multiplications share a multiplier; hls4ml takes for each layer the nearest one that divides it.
    strategy: "latency", which unrolls whole layers, or "resource"; None: resource from a reuse factor of 2 on.
    part: name of the device, for the vendor's tool; None: hls4ml's default. clock_period: nanoseconds; None: its default.
    """

    reuse_factor: int = 1
    strategy: str | None = None
    part: str | None = None
    clock_period: float | None = None

    def __post_init__(self) -> None:
        factor, clock = self.reuse_factor, self.clock_period
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
            raise ExportError(f"reuse_factor must be a whole number of at least 1, got {factor!r}; the nearest is 1.")
        if self.strategy not in (None, *_STRATEGIES):
            near = get_close_matches(str(self.strategy).lower(), _STRATEGIES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ExportError(f"strategy must be one of {', '.join(_STRATEGIES)}, got {self.strategy!r}.{hint}")
        # It becomes a word of a Tcl script.
        if self.part is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", str(self.part)):
            raise ExportError(f"part must be the name of a device, such as xcvu13p-flga2577-2-e, got {self.part!r}.")
        if clock is not None and not (isinstance(clock, int | float) and 0 < clock < float("inf")):
            raise ExportError(f"clock_period must be a number of nanoseconds above 0, got {clock!r}.")


def export_hls(network: IntegerNetwork, folder: str | Path, options: HLSOptions | None = None) -> dict[str, Any]:
    """Write an hls4ml project of `network` into `folder` (backend Vitis, io_stream).

    The top function takes a stream of the pixels of the image, as integers of the network's first rounding, and gives the
    logits. options: how it is built; default: those of `HLSOptions`.

    Gives what was asked for and taken, as JSON can hold it; `reuse_factors` has those that hls4ml took for each layer.
    Raises `ExportError` where hls4ml is not installed, and for what it has no exact form of, by name.
    """
    options = options or HLSOptions()
    needed("hls4ml", "fpga")
    from hls4ml.model.graph import ModelGraph
    from hls4ml.utils.config import create_config

    writer = _Writer(network)
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / _NOTES).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} holds something else than an earlier hls4ml project: choose another folder.")
    with folder_beside(folder) as beside, writing(beside):
        config = create_config(
            output_dir=str(beside),
            project_name=PROJECT,
            backend="Vitis",
            io_type="io_stream",
            part=options.part,
            clock_period=options.clock_period,
        )
        strategy = options.strategy or ("latency" if options.reuse_factor == 1 else "resource")
        config["HLSConfig"] = {
            "Model": {
                # hls4ml asks for a default. Nothing has it: see `_Writer.check`.
                "Precision": {"default": "fixed<2,1>"},
                "ReuseFactor": options.reuse_factor,
                "Strategy": strategy.capitalize(),
            },
            "LayerName": {name: {"Precision": types} for name, types in writer.types.items()},
        }
        graph = ModelGraph.from_layer_list(config, writer.layers, writer.inputs, [writer.layers[-1]["name"]])
        writer.check(graph)
        graph.write()
        header = beside / "firmware" / "nnet_utils" / "nnet_activation_stream.h"
        front, end, back = header.read_text().rpartition("} // namespace nnet")
        header.write_text(front + _RELU6 + end + back)
        # hls4ml notes where it wrote to.
        notes = beside / _NOTES
        notes.write_text(notes.read_text().replace(str(beside), "."))
        replace_folder(beside, folder)
    return {
        "backend": "Vitis",
        "io_type": "io_stream",
        "strategy": strategy,
        "reuse_factor": options.reuse_factor,
        "reuse_factors": writer.reuse_factors(graph),
        "part": config["Part"],
        "clock_period": config["ClockPeriod"],
    }


class Emulation:
    """A project of `network`, compiled with g++ and the fixed-point types that hls4ml brings; kept as long as this object.

    seconds, peak_bytes: CPU time and memory of the compiler; the memory is that of the largest process started so far.

    Raises `ExportError` without a compiler, and where it fails or takes more than `timeout` seconds.
    """

    def __init__(self, project: str | Path, network: IntegerNetwork, timeout: float | None = None):
        if shutil.which("g++") is None:
            raise ExportError("The emulation of an hls4ml project needs g++, which is not installed.")
        self._network, self._inputs = network, len(_first_roundings(network))
        self._folder = tempfile.TemporaryDirectory(prefix="sdq-hls-")
        copy = Path(self._folder.name) / "project"
        shutil.copytree(project, copy)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            done = subprocess.run(["bash", "build_lib.sh"], cwd=copy, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise ExportError(f"g++ was not done with the hls4ml project after {timeout:.0f} seconds.") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
            raise ExportError(f"g++ cannot compile the hls4ml project: {errors[0]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.peak_bytes = after.ru_maxrss * 1024
        (library,) = (copy / "firmware").glob("*.so")
        # float64 holds every integer that the types do: `_Writer` sees to it.
        self._run = getattr(ctypes.CDLL(str(library)), f"{PROJECT}_double")
        self._run.restype = None

    def __call__(self, images: Tensor) -> np.ndarray:
        """Images (float32 [B, C, H, W]) -> logits (float64 [B, num_labels])."""
        # The C++ reads as many numbers as its network has pixels, whatever there is.
        self._network.check_images(images)
        logits = np.zeros((len(images), *self._network.output.shape))
        pixels = np.ascontiguousarray(images.double().numpy().transpose(0, 2, 3, 1))

        def run() -> None:
            for image, row in zip(pixels, logits, strict=True):
                pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*[image] * self._inputs, row)]
                self._run(*pointers)

        # All products of a layer are on the stack, of which the main thread may have too little.
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
        thread.join()
        return logits


def fixed(low: int, high: int, exponent: int, signed: bool | None = None, rounds: bool = False) -> str:
    """The type, in hls4ml's words, of integers from `low` to `high` times 2^exponent.

    signed: whether there is a sign bit; by default where `low` is negative. rounds: values that are given to it are rounded
    half to even and saturate; else it is only given what it holds.
    """
    signed = low < 0 if signed is None else signed
    width = signed_bits(low, high) if signed else max(high.bit_length(), 1)
    return f"{'' if signed else 'u'}fixed<{width},{width + exponent}{',RND_CONV,SAT' if rounds else ''}>"


def _ungrouped(weight: np.ndarray, groups: int) -> np.ndarray:
    """Weights [O, I / groups, kh, kw] of a convolution in groups as those of one over all channels: [O, I, kh, kw].

    hls4ml has no groups; it takes the zeros off the multipliers that it allows a layer.
    """
    outputs, inputs = len(weight) // groups, weight.shape[1]
    full = np.zeros((len(weight), inputs * groups, *weight.shape[2:]))
    for i in range(groups):
        rows = slice(i * outputs, (i + 1) * outputs)
        full[rows, i * inputs : (i + 1) * inputs] = weight[rows]
    return full


def _first_roundings(network: IntegerNetwork) -> list[Node]:
    return [node for node in network.nodes if node.inputs == (IMAGE,)]


class _Writer:
    """Layers of hls4ml, and their types, of the nodes of a network.

    layers: dictionaries as hls4ml's own readers of models make them. types: of each layer by its name, those of its "result",
    "weight", "bias", "accum". inputs: names of the layers that take the image; their types are the first roundings.
    """

    def __init__(self, network: IntegerNetwork):
        self._network = network
        self.layers: list[dict[str, Any]] = []
        self.types: dict[str, dict[str, str]] = {}
        # Names become identifiers in C++.
        self._names = {
            node.name: f"n{i}_{re.sub('[^0-9A-Za-z]', '_', node.name)}" for i, node in enumerate(network.nodes)
        }
        self.inputs = [self._names[node.name] for node in _first_roundings(network)]
        for node in network.nodes:
            if max(-node.low, node.high) >= FLOAT64_EXACT:
                raise ExportError(
                    f"{node.name!r} takes {node.width} bits, more than the 53 in which an emulation can be checked."
                )
            getattr(self, f"_{node.op.lower()}")(node)

    def check(self, graph: Any) -> None:
        """`ExportError` unless hls4ml's `graph` has the types asked for, and no others."""
        convert = graph.config.backend.convert_precision_string
        for layer in graph.get_layers():
            # Those that hls4ml adds, which copy and pad streams, take the type of their input.
            for kind, asked in self.types.get(layer.name, {}).items():
                if kind == "result":
                    got = layer.get_output_variable().type.precision
                elif kind in layer.weights:
                    got = layer.get_weights(kind).type.precision
                else:
                    got = layer.get_attr(f"{kind}_t").precision
                if got != convert(asked):
                    raise ExportError(f"hls4ml gives {layer.name!r} a {kind} of type {got}, not {asked}.")

    def reuse_factors(self, graph: Any) -> dict[str, int]:
        """Layer of the network -> the reuse factor that hls4ml has taken for it."""
        taken = {layer.name: layer.get_attr("reuse_factor") for layer in graph.get_layers()}
        return {name: taken[self._names[name]] for name in self._network.layers}

    # Pieces ------------------------------------------------------------------------------------------------------

    def _emit(self, node: Node, kind: str, types: dict[str, str] | None = None, **attributes: Any) -> None:
        name = self._names[node.name]
        inputs = {} if kind == "InputLayer" else {"inputs": [self._names[source] for source in node.inputs]}
        self.layers.append({"name": name, "class_name": kind, **inputs, **attributes})
        result = fixed(node.low, node.high, node.exponent, rounds=isinstance(node, Quantize))
        self.types[name] = {"result": result, **(types or {})}

    def _source(self, node: Node) -> Node:
        return self._network[node.inputs[0]]

    def _sizes(self, node: Node, stride: Sequence[int], padding: Sequence[int] = (0, 0, 0, 0)) -> dict[str, Any]:
        channels, height, width = self._source(node).shape
        return {
            "data_format": "channels_last",
            "in_height": height,
            "in_width": width,
            "out_height": node.shape[1],
            "out_width": node.shape[2],
            "n_chan": channels,
            "n_filt": node.shape[0],
            "stride_height": stride[0],
            "stride_width": stride[1],
            **dict(zip(("pad_left", "pad_right", "pad_top", "pad_bottom"), padding, strict=True)),
        }

    def _depthwise(
        self,
        node: Node,
        weight: np.ndarray,
        stride: tuple[int, int],
        types: dict[str, str],
        padding: Sequence[int] = (0, 0, 0, 0),
        **bias: Any,
    ) -> None:
        """weight: [kh, kw, C, 1]."""
        if weight.shape[0] == 1 and stride[0] > 1:
            raise ExportError(f"{node.name!r} skips rows with windows of one row, which hls4ml's streams do not.")
        kernel = {"filt_height": weight.shape[0], "filt_width": weight.shape[1], "depth_multiplier": 1}
        sizes = self._sizes(node, stride, padding)
        self._emit(node, "DepthwiseConv2D", types, depthwise_data=weight, **kernel, **sizes, **bias)

    # Nodes -------------------------------------------------------------------------------------------------------

    def _quantize(self, node: Quantize) -> None:
        full = activation_range(node.bits, node.signed)
        if (node.low, node.high) != full:
            raise ExportError(f"{node.name!r} saturates at {node.low} and {node.high}; hls4ml's types do at {full}.")
        if node.source_exponent is None:
            channels, height, width = node.shape
            self._emit(node, "InputLayer", input_shape=[height, width, channels])
        else:
            self._emit(node, "Activation", activation="linear")

    def _layer(self, node: Layer) -> None:
        # All channels stand on the finest grid among them: hls4ml has one type for all weights of a layer.
        weight, unit = node.weight * to_channels(2**node.shifts, node.weight), min(node.exponents)
        # Products and sums on the way stay in the range of the node, whose ends are sums of all that can be negative, and
        # of all that can be positive.
        types = {
            "weight": fixed(int(weight.min()), int(weight.max()), unit, signed=True),
            "accum": fixed(node.low, node.high, node.exponent, signed=True),
        }
        bias: dict[str, Any] = {"bias_data": None}
        if node.bias is not None:
            shifted = node.bias << node.shifts
            types["bias"] = fixed(int(shifted.min()), int(shifted.max()), node.exponent, signed=True)
            bias["bias_data"] = shifted.double().numpy() * 2.0**node.exponent
        values = weight.double().numpy() * 2.0**unit
        if node.is_linear:
            sizes = {"n_in": values.shape[1], "n_out": values.shape[0]}
            self._emit(node, "Dense", types, weight_data=values.T, **sizes, **bias)
            return
        if node.dilation != (1, 1):
            raise ExportError(f"Layer {node.name!r} is dilated by {node.dilation}, which hls4ml's streams cannot be.")
        if 1 < node.groups == len(values) == self._source(node).shape[0]:
            self._depthwise(node, values.transpose(2, 3, 0, 1), node.stride, types, node.padding, **bias)
            return
        values = _ungrouped(values, node.groups)
        kernel = {"filt_height": values.shape[2], "filt_width": values.shape[3]}
        if values.shape[2] == 1 < node.stride[0] and values.shape[3] > 1:
            raise ExportError(f"Layer {node.name!r} skips rows with windows of one row, which hls4ml's streams do not.")
        sizes = self._sizes(node, node.stride, node.padding)
        self._emit(node, "Conv2D", types, weight_data=values.transpose(2, 3, 1, 0), **kernel, **sizes, **bias)

    def _clip(self, node: Clip) -> None:
        low, high = node.bounds
        assert low == 0
        ends = high is not None and high < self._source(node).high
        if ends and node.high * 2.0**node.exponent != 6:
            raise ExportError(f"{node.name!r} ends at {node.high * 2.0**node.exponent:g}; ReLU and ReLU6 are exported.")
        self._emit(node, "Activation", activation="relu6" if ends else "relu")

    def _add(self, node: Add) -> None:
        if len(set(node.inputs)) < len(node.inputs):
            raise ExportError(f"{node.name!r} adds a tensor to itself, which hls4ml's streams cannot.")
        self._emit(node, "Merge", op="add")

    def _concat(self, node: Concat) -> None:
        raise ExportError(f"{node.name!r} concatenates channels, which is not exported to hls4ml.")

    def _maxpool(self, node: MaxPool) -> None:
        if any(node.padding) or node.kernel != node.stride:
            raise ExportError(
                f"{node.name!r} pools windows of {node.kernel} at a stride of {node.stride} with padding {node.padding}: "
                "hls4ml's streams have windows that lie side by side, without padding."
            )
        kernel = {"pool_height": node.kernel[0], "pool_width": node.kernel[1]}
        types = {"accum": fixed(node.low, node.high, node.exponent)}
        self._emit(node, "MaxPooling2D", types, **kernel, **self._sizes(node, node.stride))

    def _sumpool(self, node: SumPool) -> None:
        # hls4ml's own averages are other numbers.
        source, count = self._source(node), node.kernel[0] * node.kernel[1]
        unit = node.exponent - source.exponent
        types = {
            "weight": fixed(1, 1, unit),
            "accum": fixed(count * min(source.low, 0), count * max(source.high, 0), node.exponent, signed=True),
        }
        weight = np.full((*node.kernel, node.shape[0], 1), 2.0**unit)
        self._depthwise(node, weight, node.stride, types, bias_data=None)

    def _flatten(self, node: Flatten) -> None:
        shape = self._source(node).shape
        if shape[1:] != (1, 1):
            raise ExportError(
                f"{node.name!r} flattens {shape}: of more than one pixel, hls4ml, with its channels last, has another order."
            )
        self._emit(node, "Reshape", target_shape=list(node.shape))
