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
# A filled marker for a budget in bits, a hollow one for a budget in BitOPs.
MARKERS = {"sdq": "o", "greedy": "s", "uniform": "^"}
_PINNED = "#BBBBBB"
_WEIGHTS = "#56B4E9"


def _bitops_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which `largest` BitOPs is a handy number."""
    return next(((d, f"{p}BitOPs") for d, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= d), (1e3, "kBitOPs"))


def _save(figure: Figure, path: str | Path) -> None:
    """Write beside, then rename."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    figure.savefig(beside, format="png", dpi=150)
    os.replace(beside, path)


def figure_bits(strategies: Mapping[str, Strategy]) -> Figure:
    """Weight bits of each layer, one panel a strategy, and the number of weights per layer below.

    The colour is that of the method that a name begins with.
    """
    if not strategies:
        raise ValueError("No strategy to plot.")
    names = list(next(iter(strategies.values())))
    rows = len(strategies) + 1
    figure = Figure(figsize=(max(7, 0.22 * len(names) + 2), 1.5 * rows + 1.3), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    places = np.arange(len(names))
    for axis, (title, strategy) in zip(axes, strategies.items(), strict=False):
        method = COLOURS.get(title.split("-")[0], COLOURS["sdq"])
        colours = [_PINNED if layer.pinned else method for layer in strategy.values()]
        axis.bar(places, list(strategy.weight_bits.values()), color=colours)
        axis.set(ylim=(0, 8.5), yticks=[2, 4, 6, 8], ylabel="bits")
        divisor, unit = _bitops_unit(strategy.bitops())
        axis.set_title(
            f"{title}: {strategy.average_bits():.2f} average bits, {strategy.bitops() / divisor:.1f} {unit} (grey: pinned)",
            fontsize=10,
            loc="left",
        )
    weights = [layer.num_weights for layer in next(iter(strategies.values())).values()]
    axes[-1].bar(places, weights, color=_WEIGHTS)
    axes[-1].set(yscale="log", ylabel="weights")
    axes[-1].set_xticks(places, names, rotation=90, fontsize=8)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure


def figure_descent(logs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Cost over the batches of each search (`SearchLog.to_json()`), its budgets dashed, above the bits of its layers."""
    if not logs or not all(log["moves"] for log in logs.values()):
        raise ValueError("No search with a step to plot.")
    layers = max(len(log["start"]) for log in logs.values())
    height = 2.2 + max(2.0, 0.16 * layers)
    figure = Figure(figsize=(8, height * len(logs)), layout="constrained")
    panels = figure.subplots(2 * len(logs), 1, squeeze=False, height_ratios=[2.2, height - 2.2] * len(logs))[:, 0]
    for i, (title, log) in enumerate(logs.items()):
        above, below = panels[2 * i], panels[2 * i + 1]
        _plot_cost(above, title, log)
        _plot_layers(below, figure, log)
        above.sharex(below)
    return figure


def _plot_cost(axis: Any, title: str, log: Mapping[str, Any]) -> None:
    batches = [0, *(move["batch"] for move in log["moves"])]
    costs = [log["start_cost"], *(move["cost"] for move in log["moves"])]
    scale, unit = _bitops_unit(costs[0]) if log["cost"] == "bitops" else (1.0, "average bits")
    axis.step(batches, [cost / scale for cost in costs], where="post", color=COLOURS["sdq"])
    for budget in log.get("budgets", []):
        axis.axhline(budget / scale, color=COLOURS["float"], linestyle="--", linewidth=1)
    axis.set_ylabel(unit)
    axis.set_title(f"Descent of the search, budget in {title} (dashed)", fontsize=10, loc="left")
    axis.grid(alpha=0.3)


def _plot_layers(axis: Any, figure: Figure, log: Mapping[str, Any]) -> None:
    """Bits of each layer over time, as a heat map with one column a batch."""
    names, last = list(log["start"]), log["moves"][-1]["batch"] + 1
    bits = np.repeat(np.array([[log["start"][name]] for name in names]), last, axis=1)
    for move in log["moves"]:
        bits[names.index(move["layer"]), move["batch"] :] = move["to"]
    image = axis.imshow(
        bits, aspect="auto", interpolation="nearest", cmap="viridis", vmin=1, vmax=8, extent=(0, last, len(names), 0)
    )
    axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6)
    axis.set_xlabel("batches")
    figure.colorbar(image, ax=axis, label="bits", ticks=range(1, 9))


def figure_accuracy(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Top-1 and KL to the float network, against file size and against BitOPs."""
    points = [row for row in rows if row["method"] != "float"]
    if not points:
        raise ValueError("No quantized row to plot.")
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    divisor, unit = _bitops_unit(max(row["bitops"] for row in points))
    for column, (key, scale, label) in enumerate((("file_bytes", 1e3, "file, kB"), ("bitops", divisor, unit))):
        for line, metric in enumerate(("top1", "kl")):
            axis = axes[line, column]
            for row in points:
                colour = COLOURS[row["method"]]
                hollow = {"markerfacecolor": "none"} if row["cost"] == "bitops" else {}
                axis.plot(
                    row[key] / scale,
                    row[metric],
                    MARKERS[row["method"]],
                    color=colour,
                    markersize=9,
                    markeredgewidth=2,
                    label=row["name"],
                    **hollow,
                )
            axis.grid(alpha=0.3)
            axis.margins(0.12)
        axes[1, column].set(xlabel=label, ylim=(0, None))
        axes[1, column].locator_params(axis="x", nbins=6)
    axes[0, 0].set_ylabel("test top-1, %")
    axes[1, 0].set_ylabel("test KL to float, nats")
    for row in rows:
        if row["method"] == "float":
            for axis in axes[0]:
                axis.axhline(row["top1"], color=COLOURS["float"], linestyle="--", linewidth=1, label=row["name"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
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
        axis.hist(normalise(weight, quantizer.form, bits, scale).flatten().numpy(), bins=100, color=_WEIGHTS)
        low, high = extremes(quantizer.grid, bits)
        for level in range(low, high + 1, spacing(quantizer.grid, bits)):
            axis.axvline(level / half_range(quantizer.grid, bits), color=COLOURS["sdq"], linewidth=0.8)
        axis.set_yticks([])
        axis.set_title(f"{name}: {bits} bit{'s' * (bits > 1)}, levels in orange", fontsize=9, loc="left")
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
