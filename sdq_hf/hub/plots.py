"""Pictures of strategies, searches and results, made with matplotlib, readable on a phone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..costs import bitops_text, bitops_unit
from ..layers import QuantizedLayer
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.grids import extremes, half_range, spacing
from ..quantizers.weight import channel_parts, normalise, quantize_to_integers
from ..strategy import Strategy
from ..writing import write_beside

# Mostly Okabe and Ito's colours, told apart by colour-blind readers; markers tell the rest.
COLOURS = {
    "sdq": "#D55E00",
    "greedy": "#0072B2",
    "uniform": "#009E73",
    "float": "#555555",
    "random": "#E69F00",
    "size": "#CC79A7",
    "table": "#56B4E9",
    "hawq": "#8C6D31",
    "clado": "#5E3C99",
    "fracbits": "#000000",
    "edmips": "#B2182B",
}
# A filled marker for a budget in bits, a hollow one for a budget in BitOPs.
MARKERS = {
    "sdq": "o",
    "greedy": "s",
    "uniform": "^",
    "random": "h",
    "size": "v",
    "table": "D",
    "hawq": "P",
    "clado": "X",
    "fracbits": "<",
    "edmips": ">",
}
_PINNED = "#BBBBBB"
_WEIGHTS = "#56B4E9"


def _save(figure: Figure, path: str | Path) -> None:
    write_beside(path, lambda beside: figure.savefig(beside, format="png", dpi=150))


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
        axis.bar(places, [layer.average_bits for layer in strategy.values()], color=colours)
        axis.set(ylim=(0, 8.5), yticks=[2, 4, 6, 8], ylabel="bits")
        axis.set_title(
            f"{title}: {strategy.average_bits():.2f} average bits, {bitops_text(strategy.bitops())} (grey: pinned)",
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
    """Cost over the batches of each search (`SearchLog.to_json()`), its budgets dashed, above the bits of its layers.

    A cost other than average bits is drawn beside the average bits.
    """
    if not logs or not all(log["moves"] for log in logs.values()):
        raise ValueError("No search with a step to plot.")
    layers = max(len(log["start"]) for log in logs.values())
    height = 2.2 + min(max(2.0, 0.16 * layers), 16.0)
    figure = Figure(figsize=(8, height * len(logs)), layout="constrained")
    panels = figure.subplots(2 * len(logs), 1, squeeze=False, height_ratios=[2.2, height - 2.2] * len(logs))[:, 0]
    for i, (title, log) in enumerate(logs.items()):
        above, below = panels[2 * i], panels[2 * i + 1]
        _plot_cost(above, title, log)
        if log["cost"] != "bits":
            _plot_average_bits(above.twinx(), log)
        _plot_layers(below, figure, log)
        above.sharex(below)
    return figure


def _plot_cost(axis: Any, title: str, log: Mapping[str, Any]) -> None:
    batches = [0, *(move["batch"] for move in log["moves"])]
    costs = [log["start_cost"], *(move["cost"] for move in log["moves"])]
    scale, unit = bitops_unit(costs[0]) if log["cost"] == "bitops" else (1.0, log.get("unit", "average bits"))
    if log["cost"] == "compression":
        costs, unit = [1 / cost for cost in costs], "compression"
    axis.step(batches, [cost / scale for cost in costs], where="post", color=COLOURS["sdq"])
    for budget in log.get("budgets", []):
        axis.axhline(budget / scale, color=COLOURS["float"], linestyle="--", linewidth=1)
    axis.set_ylabel(unit)
    axis.set_title(f"Descent of the search, budget in {title} (dashed)", fontsize=10, loc="left")
    axis.grid(alpha=0.3)


def _plot_average_bits(axis: Any, log: Mapping[str, Any]) -> None:
    batches = [0, *(move["batch"] for move in log["moves"])]
    averages = [log["start_average_bits"], *(move["average_bits"] for move in log["moves"])]
    axis.step(batches, averages, where="post", color=COLOURS["greedy"], linewidth=1)
    axis.set_ylabel("average bits", color=COLOURS["greedy"])


def _plot_layers(axis: Any, figure: Figure, log: Mapping[str, Any]) -> None:
    """Bits of each layer over time, as a heat map with one column a batch."""
    names, last = list(log["start"]), log["moves"][-1]["batch"] + 1
    bits = np.repeat(np.array([[log["start"][name]] for name in names]), last, axis=1)
    for move in log["moves"]:
        bits[names.index(move["layer"]), move["batch"] :] = move["to"]
    image = axis.imshow(
        bits, aspect="auto", interpolation="nearest", cmap="viridis", vmin=1, vmax=8, extent=(0, last, len(names), 0)
    )
    # Of more layers than there is room for, every so many get their name.
    shown = slice(None, None, -(-len(names) // 100))
    axis.set_yticks((np.arange(len(names)) + 0.5)[shown], names[shown], fontsize=6)
    axis.set_xlabel("batches")
    figure.colorbar(image, ax=axis, label="bits", ticks=range(1, 9))


def figure_accuracy(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Top-1 and KL to the float network, against file size and against BitOPs.

    Rows of one method with budgets in one cost are joined by a line; what comes first in `rows` lies on top.
    """
    points = [row for row in rows if row["method"] != "float"]
    if not points:
        raise ValueError("No quantized row to plot.")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in points:
        groups.setdefault((row["method"], row["cost"]), []).append(row)
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    divisor, unit = bitops_unit(max(row["bitops"] for row in points))
    for column, (key, scale, label) in enumerate((("file_bytes", 1e3, "file, kB"), ("bitops", divisor, unit))):
        for line, metric in enumerate(("top1", "kl")):
            axis = axes[line, column]
            for number, ((method, cost), members) in enumerate(groups.items()):
                members = sorted(members, key=lambda row: row[key])
                hollow = {} if cost == "bits" else {"markerfacecolor": "none"}
                axis.plot(
                    [row[key] / scale for row in members],
                    [row[metric] for row in members],
                    marker=MARKERS[method],
                    color=COLOURS[method],
                    markersize=9,
                    markeredgewidth=2,
                    linewidth=1,
                    zorder=3 - number / len(groups),
                    label=_joined([row["name"] for row in groups[method, cost]]),
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


def _joined(names: Sequence[str]) -> str:
    """`sdq-bits-2, -3` of `["sdq-bits-2", "sdq-bits-3"]`."""
    return ", ".join([names[0], *(f"-{name.rpartition('-')[2]}" for name in names[1:])])


def figure_weights(model: SDQForImageClassification, count: int = 6) -> Figure:
    """Histograms of the weights of up to `count` layers of `model` under its strategy, with their levels as lines.

    In normalised units: 1.0 is the clip. Real weights in training; a loaded model has quantized weights only, whose bars
    tell how full each level is.
    """
    layers, strategy = model.quantized_layers(), model.strategy
    names = [name for name in strategy.searchable if name in layers]
    if not names:
        raise ValueError("No quantized layer to plot.")
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))]
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(9, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        title = _plot_layer_weights(axis, layers[name])
        axis.set_title(f"{name}: {title}, levels in orange", fontsize=9, loc="left")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure


def _plot_layer_weights(axis: Any, layer: QuantizedLayer) -> str:
    """Draws a layer, or of one whose channels have bits of their own those with the commonest; gives their bits as text."""
    quantizer = layer.weight_quantizer
    parts = channel_parts(layer.weight.detach().float().cpu(), quantizer.bits, quantizer.effective_scale.detach().cpu())
    weight, bits, scale, rows = max(parts, key=lambda part: part[0].numel())
    grid = quantizer.grid
    low, high = extremes(grid, bits)
    levels = np.arange(low, high + 1, spacing(grid, bits)) / half_range(grid, bits)
    if quantizer.is_quantized(layer.weight):
        integers = quantize_to_integers(weight, quantizer.form, grid, bits, scale)
        values = (integers / half_range(grid, bits)).flatten().numpy()
        gap = spacing(grid, bits) / half_range(grid, bits)
        heights, _ = np.histogram(values, bins=np.append(levels - gap / 2, levels[-1] + gap / 2))
        axis.bar(levels, heights, width=0.8 * gap, color=_WEIGHTS)
    else:
        values = normalise(weight, quantizer.form, bits, scale).flatten().numpy()
        axis.stairs(*np.histogram(values, bins=100), fill=True, color=_WEIGHTS)
    axis.vlines(levels, 0, 1, transform=axis.get_xaxis_transform(), color=COLOURS["sdq"], linewidth=0.8)
    axis.set_yticks([])
    of = "" if rows is None else f" ({len(rows)} of {layer.weight.shape[0]} channels)"
    return f"{bits} bit{'s' * (bits > 1)}{of}"


def plot_bits(strategies: Mapping[str, Strategy], path: str | Path) -> None:
    _save(figure_bits(strategies), path)


def plot_descent(logs: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    _save(figure_descent(logs), path)


def plot_accuracy(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    _save(figure_accuracy(rows), path)


def plot_weights(model: SDQForImageClassification, path: str | Path) -> None:
    _save(figure_weights(model), path)
