"""What a strategy costs, layer by layer, on hardware that computes at its bits: each number with what it is.

Nothing here is measured on a device. Bytes, MACs and BitOPs are counted, accumulators are bounds, LUTs are estimated by
synthesis of one unit (`rtl/dot.v`), without the memories, control and routing of a whole design, and ZigZag is a model.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..costs import LUT_TABLE, get_cost
from ..strategy import FLOAT_BITS, LayerBits, Strategy, bits_text, unknown_layer


class Column(NamedTuple):
    title: str
    width: int
    what: str


COLUMNS = {
    "weight_bytes": Column("bytes", 10, "counted: packed weights, each layer filled up to a whole byte"),
    "macs": Column("MACs", 13, "counted: multiply-accumulates for one image of the configured size"),
    "bitops": Column("BitOPs", 15, "counted: MACs x weight bits x activation bits, no time"),
    "lut_cycles": Column("LUT cycles", 13, "synthesis estimate: MACs x LUTs of a unit that does one MAC a cycle"),
    "accumulator_bits": Column("acc. bits", 9, "bound: two's complement bits that hold every sum of weights and bias"),
    "cycles": Column("cycles", 11, "model: latency on the accelerator that is named below, by ZigZag"),
    "memory_energy": Column("memory, nJ", 11, "model: energy of memory accesses there, by ZigZag, without MACs"),
}
# What adds up over layers.
_SUMS = ("weight_bytes", "macs", "bitops", "lut_cycles", "cycles", "memory_energy")


def cost_report(
    strategy: Strategy,
    accumulator_bits: Mapping[str, int] | None = None,
    memory: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Costs of each layer and of all, as JSON can hold them.

    `layers` has for each layer its bits and the columns of `COLUMNS`; `total` their sums; `what` says what each column is,
    and `lut_table` what the LUTs come from (tool, commands, sha256 of the Verilog). A number that a layer does not have is
    None: LUTs where it or its input stays float, as the unit computes with integers. `total` says how many layers lack it.

    Args:
        accumulator_bits: layer -> bits, as `Layer.sum_width` of an integer network, which holds the sum at any moment.
        memory: what `zigzag.memory_model` gives.

    Raises `ValueError` that names a layer that the network does not have.
    """
    extra: dict[str, Mapping[str, Any]] = {}
    if accumulator_bits is not None:
        extra["accumulator_bits"] = accumulator_bits
    if memory is not None:
        # In nJ: pJ are many digits.
        modelled = memory["layers"].items()
        extra["cycles"] = {name: values["cycles"] for name, values in modelled}
        extra["memory_energy"] = {name: values["memory_energy"] / 1e3 for name, values in modelled}
    for column, values in extra.items():
        for name in values:
            if name not in list(strategy):
                raise ValueError(f"{column}: {unknown_layer(name, list(strategy))}")
    lut = get_cost("lut")
    layers: list[dict[str, Any]] = [
        {
            "layer": name,
            "weight_bits": x.average_bits if isinstance(x.weight_bits, tuple) else x.weight_bits,
            "activation_bits": x.activation_bits,
            "weight_bytes": x.num_bytes,
            "macs": x.macs,
            "bitops": x.bitops,
            "lut_cycles": None if _has_float(x) else lut.of_layer(strategy, name),
            **{column: values.get(name) for column, values in extra.items()},
        }
        for name, x in strategy.items()
    ]
    columns = [column for column in COLUMNS if column in ("weight_bytes", "macs", "bitops", "lut_cycles", *extra)]
    sums = [column for column in columns if column in _SUMS]
    report: dict[str, Any] = {
        "layers": layers,
        "total": {column: sum(layer[column] or 0 for layer in layers) for column in sums},
        "layers_lacking": {column: sum(layer[column] is None for layer in layers) for column in sums},
        "what": {column: COLUMNS[column].what for column in columns},
        "lut_table": json.loads(LUT_TABLE.read_text())["about"],
    }
    if memory is not None:
        report["memory_model"] = {key: memory[key] for key in ("tool", "accelerator")}
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """A text table of a `cost_report`: a line for each layer and the total, and below it what the columns are."""
    layers, total, columns = report["layers"], report["total"], list(report["what"])
    wide = max(len(name) for name in ["layer", "total", *(layer["layer"] for layer in layers)])
    titles = [f"{COLUMNS[column].title:>{COLUMNS[column].width}}" for column in columns]
    lines = ["  ".join([f"{'layer':{wide}}", f"{'W':>5}", f"{'A':>5}", *titles])]
    for layer in [*layers, {"layer": "total", **total}]:
        bits = [f"{_bits(layer.get(key)):>5}" for key in ("weight_bits", "activation_bits")]
        cells = [f"{_number(layer[column]) if column in layer else '':>{COLUMNS[column].width}}" for column in columns]
        lines.append("  ".join([f"{layer['layer']:{wide}}", *bits, *cells]).rstrip())
    lines += ["", *(f"{COLUMNS[column].title}: {text}" for column, text in report["what"].items())]
    table = report["lut_table"]
    lines.append(f"LUTs by {table['tool']} from {table['rtl']} (sha256 {table['rtl_sha256'][:12]}). {table['what']}")
    if "memory_model" in report:
        lines.append(f"ZigZag: {report['memory_model']['tool']}, accelerator {report['memory_model']['accelerator']}")
    for column, lacking in report["layers_lacking"].items():
        if lacking:
            lines.append(f"The total of {COLUMNS[column].title} is without {lacking} of {len(layers)} layers (-).")
    return "\n".join(lines)


def _has_float(layer: LayerBits) -> bool:
    return FLOAT_BITS in (layer.weight_bits, layer.activation_bits)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _bits(bits: float | None) -> str:
    if bits is None:
        return ""
    return f"~{bits:.2f}" if isinstance(bits, float) else bits_text(bits)
