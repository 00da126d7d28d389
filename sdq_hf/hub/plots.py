"""Pictures of strategies, searches and results, made with matplotlib, readable on a phone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..modeling_sdq import SDQForImageClassification
from ..quantizers.grids import extremes, half_range, spacing
from ..quantizers.weight import best_scale, normalise
from ..strategy import Strategy

# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = {"sdq": "#D55E00", "greedy": "#0072B2", "uniform": "#009E73", "float": "#555555"}
MARKERS = {"sdq": "o", "greedy": "s", "uniform": "^", "float": "*"}
_PINNED = "#BBBBBB"


def _save(figure: Figure, path: str | Path) -> None:
    """Write beside, then rename."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    figure.savefig(beside, format="png", dpi=150)
    os.replace(beside, path)


def figure_bits(strategies: Mapping[str, Strategy]) -> Figure:
    """Weight bits of each layer, one panel a strategy, and the number of weights per layer below."""
    if not strategies:
        raise ValueError("No strategy to plot.")
    names = list(next(iter(strategies.values())))
    rows = len(strategies) + 1
    figure = Figure(figsize=(max(7, 0.22 * len(names) + 2), 1.5 * rows + 1.3), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    places = np.arange(len(names))
    for axis, (title, strategy) in zip(axes, strategies.items(), strict=False):
        colours = [_PINNED if layer.pinned else COLOURS["sdq"] for layer in strategy.values()]
        axis.bar(places, list(strategy.weight_bits.values()), color=colours)
        axis.set(ylim=(0, 8.5), yticks=[2, 4, 6, 8], ylabel="bits")
        axis.set_title(f"{title}: {strategy.average_bits():.2f} average bits (grey: pinned)", fontsize=10, loc="left")
    weights = [layer.num_weights for layer in next(iter(strategies.values())).values()]
    axes[-1].bar(places, weights, color="#56B4E9")
    axes[-1].set(yscale="log", ylabel="weights")
    axes[-1].set_xticks(places, names, rotation=90, fontsize=8)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure


def figure_descent(logs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Cost over the batches of each search (`SearchLog.to_json()`), its budgets as dashed lines."""
    if not logs or not all(log["moves"] for log in logs.values()):
        raise ValueError("No search with a step to plot.")
    figure = Figure(figsize=(7, 2.8 * len(logs)), layout="constrained")
    axes = figure.subplots(len(logs), 1, squeeze=False)[:, 0]
    for axis, (title, log) in zip(axes, logs.items(), strict=True):
        batches = [move["batch"] for move in log["moves"]]
        scale, unit = (1e9, "GBitOPs") if log["cost"] == "bitops" else (1.0, "average bits")
        axis.step(batches, [move["cost"] / scale for move in log["moves"]], where="post", color=COLOURS["sdq"])
        for budget in log.get("budgets", []):
            axis.axhline(budget / scale, color=COLOURS["float"], linestyle="--", linewidth=1)
        axis.set(xlabel="batches", ylabel=unit)
        axis.set_title(f"Descent of the search, budget in {title} (dashed)", fontsize=10, loc="left")
        axis.grid(alpha=0.3)
    return figure


def figure_accuracy(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Top-1 and KL to the float network, against file size and against BitOPs."""
    points = [row for row in rows if row["method"] != "float"]
    if not points:
        raise ValueError("No quantized row to plot.")
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (key, scale, label) in enumerate((("file_bytes", 1e3, "file, kB"), ("bitops", 1e9, "GBitOPs"))):
        for line, metric in enumerate(("top1", "kl")):
            axis = axes[line, column]
            for row in points:
                place = (row[key] / scale, row[metric])
                axis.plot(*place, MARKERS[row["method"]], color=COLOURS[row["method"]], markersize=8)
                axis.annotate(row["name"], place, xytext=(5, 4), textcoords="offset points", fontsize=8)
            axis.grid(alpha=0.3)
            axis.margins(x=0.25, y=0.15)
        axes[1, column].set(xlabel=label, yscale="log")
    axes[0, 0].set_ylabel("test top-1, %")
    axes[1, 0].set_ylabel("test KL to float, nats")
    for row in rows:
        if row["method"] == "float":
            for axis in axes[0]:
                axis.axhline(row["top1"], color=COLOURS["float"], linestyle="--", linewidth=1)
            axes[0, 0].set_title(f"dashed: full precision, {row['top1']:.1f} %", fontsize=10, loc="left")
    return figure


def figure_weights(model: SDQForImageClassification, strategy: Strategy, count: int = 6) -> Figure:
    """Histograms of the real weights of up to `count` layers, with the levels of `strategy` as lines.

    In normalised units: 1.0 is the clip.
    """
    layers = model.quantized_layers()
    names = [name for name in strategy.searchable if name in layers]
    if not names:
        raise ValueError("No quantized layer to plot.")
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))]
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(9, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        quantizer, bits = layers[name].weight_quantizer, strategy[name].weight_bits
        weight = layers[name].weight.detach().float().cpu()
        scale = best_scale(weight, quantizer.form, quantizer.grid, bits)
        axis.hist(normalise(weight, quantizer.form, bits, scale).flatten().numpy(), bins=100, color="#56B4E9")
        low, high = extremes(quantizer.grid, bits)
        for level in range(low, high + 1, spacing(quantizer.grid, bits)):
            axis.axvline(level / half_range(quantizer.grid, bits), color=COLOURS["sdq"], linewidth=0.8)
        axis.set_yticks([])
        axis.set_title(f"{name}: {bits} bits", fontsize=9, loc="left")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure


def plot_bits(strategies: Mapping[str, Strategy], path: str | Path) -> None:
    _save(figure_bits(strategies), path)


def plot_descent(logs: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    _save(figure_descent(logs), path)


def plot_accuracy(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    _save(figure_accuracy(rows), path)


def plot_weights(model: SDQForImageClassification, strategy: Strategy, path: str | Path) -> None:
    _save(figure_weights(model, strategy), path)
