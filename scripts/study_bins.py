"""Study F: where weights stand in their bins, and how evenly bins are filled, with and without bin regularization (EBR).

    python scripts/study_bins.py --dataset ../shared/data/fashion-mnist --epochs 1 --seeds 0 \
        --out docs/results/bins-mobilenetv1_025_cifar.json --picture docs/images/bins.png

Fine-tunes at uniform bits, with the learned quantizer (`lsq`) and with the paper's (`dorefa`), each without EBR and with it.
Of every searched layer, before it is packed: the entropy of the occupation of its bins, as a share of the most that there can
be (its bits), and the distance of its weights from their levels, root mean square, in spacings of the levels (evenly spread
weights have 0.289). Of a few layers the histogram is kept for the picture.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from study_common import Cell, add_options, mean_and_error, read, tuned, work

from sdq_hf import SDQForImageClassification
from sdq_hf.quantizers.grids import extremes, half_range, spacing
from sdq_hf.quantizers.weight import normalise
from sdq_hf.training.stages import Run

FIELDS = ("seed", "quantizer", "ebr", "uniform_bits", "activation_bits")
# Of the histograms, in normalised units: 1 is the clip.
EDGES = np.linspace(-1.25, 1.25, 126)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--ebr", type=float, nargs="+", default=[0.0, 0.1], help="weights of the regularizer")
    parser.add_argument("--quantizers", nargs="+", default=["lsq", "dorefa"])
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if not options.table:
        work(options, cells(options), FIELDS, lambda run, cell: measure(options, run, cell))
    found = read(options.out)["cells"]
    print(table(found))
    if options.picture:
        draw(found, options.picture)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        for quantizer in options.quantizers:
            for ebr in options.ebr:
                yield dict(zip(FIELDS, (seed, quantizer, ebr, options.bits, options.activation_bits), strict=True))


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    model, quantizer = run.arguments.model, run.arguments.model.weight_quantizer
    about = {"method": "uniform", "cost": "bits", "budget": float(cell["uniform_bits"]), "seconds": 0.0}
    name = f"{cell['quantizer']}-{cell['ebr']}-{cell['uniform_bits']}"
    model.weight_quantizer = cell["quantizer"]
    try:
        strategy = run.base.strategy.with_bits(cell["uniform_bits"])
        return tuned(run, name, strategy, about, options.epochs, look=bins_of, ebr_weight=cell["ebr"])
    finally:
        model.weight_quantizer = quantizer


@torch.no_grad()
def bins_of(model: SDQForImageClassification) -> Cell:
    """Entropy and distance of each searched layer, and the histograms of a first, a middle and a last one."""
    names = list(model.strategy.searchable)
    shown = [names[i] for i in (1, len(names) // 2, len(names) - 1)]
    entropy, distance, histograms = {}, {}, {}
    for name in names:
        layer = model.quantized_layers()[name]
        quantizer = layer.weight_quantizer
        grid, bits = quantizer.grid, cast(int, quantizer.bits)
        counts = torch.bincount(quantizer.codes(layer.weight).long().flatten(), minlength=2**bits)
        shares = counts.double() / counts.sum()
        entropy[name] = float(torch.special.entr(shares).sum() / np.log(2) / bits)
        half = half_range(grid, bits)
        low, high = (end / half for end in extremes(grid, bits))
        values = normalise(layer.weight.float(), quantizer.form, bits, quantizer.scale)
        levels = quantizer.integers(layer.weight) / half
        distance[name] = float((values.clamp(low, high) - levels).square().mean().sqrt() * half / spacing(grid, bits))
        if name in shown:
            heights, _ = np.histogram(values.cpu().numpy().ravel().clip(EDGES[0], EDGES[-1]), bins=EDGES, density=True)
            histograms[name] = [round(float(height), 4) for height in heights]
    return {"entropy": entropy, "distance": distance, "histograms": histograms}


def table(found: list[Cell]) -> str:
    """Markdown: entropy and distance (mean over layers), test KL and top-1; mean over float networks and standard error."""
    lines = [
        "| quantizer, bits | EBR | entropy, of the most | distance, spacings | test KL, nats | test top-1, % | seeds |",
        "|" + "---|" * 7,
    ]
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell["quantizer"], cell["uniform_bits"], cell["ebr"]), []).append(cell)
    for (quantizer, bits, ebr), members in groups.items():
        numbers = [
            mean_and_error([float(np.mean(list(cell[key].values()))) for cell in members], 3)
            for key in ("entropy", "distance")
        ]
        numbers += [mean_and_error([cell[key] for cell in members], digits) for key, digits in (("kl", 4), ("top1", 2))]
        lines.append(f"| {quantizer}, {bits} | {ebr:g} | {' | '.join(numbers)} | {len(members)} |")
    return "\n".join(lines)


def draw(found: list[Cell], path: Path) -> None:
    """Histograms of the first seed: a row for each quantizer, a column for each layer, a line for each weight of EBR."""
    from matplotlib.figure import Figure

    first = [cell for cell in found if cell["seed"] == found[0]["seed"]]
    quantizers, names = list(dict.fromkeys(cell["quantizer"] for cell in first)), list(first[0]["histograms"])
    figure = Figure(figsize=(4 * len(names), 2.6 * len(quantizers)), layout="constrained")
    axes = figure.subplots(len(quantizers), len(names), squeeze=False, sharex=True)
    for row, quantizer in zip(axes, quantizers, strict=True):
        for axis, name in zip(row, names, strict=True):
            for cell in first:
                if cell["quantizer"] == quantizer:
                    axis.stairs(cell["histograms"][name], EDGES, label=f"EBR {cell['ebr']:g}", linewidth=1.2)
            axis.set_title(f"{quantizer}: {name}", fontsize=9)
            axis.set_yticks([])
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("weight, 1 is the clip", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
