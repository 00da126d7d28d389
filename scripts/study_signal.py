"""Do the estimates of a search agree with the damage that a step down really does?

    python scripts/study_signal.py --dataset ../shared/data/fashion-mnist --out docs/results/signal-mobilenetv1_025_cifar.json

From uniform bits b, the truth for a layer is the growth of the KL divergence from the float network when this layer alone
goes to b - 1, over all validation images. Each signal that a search could follow is ranked against it: Spearman's correlation
over the layers. A cell is one rung of one float network; weights are frozen.

Signals: the gradient to the DBP at the upper draws, at the lower draws, their mix under a DBP of 0.95, the mean of both sides
(SDQ's two-sided search), and Simpson's rule with weights halfway (the same search from 2 bits to 1), all layers drawn at
once, each of the three places in a third of the batches; the tables of `table` (other layers in float) and `hawq`; the growth
of the relative quantization error (`greedy`); the layer's size.
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from study_common import Cell, add_options, mean_and_error, read, work
from torch import nn

from sdq_hf import SDQForImageClassification
from sdq_hf.costs import get_cost
from sdq_hf.quantizers.stochastic import draw
from sdq_hf.search.descent import Descent
from sdq_hf.search.errors import quantization_errors, scale_at, weight_at
from sdq_hf.search.sensitivity import hessian_traces, probing
from sdq_hf.search.stochastic_weights import StochasticWeights, searching
from sdq_hf.search.task import SearchLog, Task, distillation_loss
from sdq_hf.training.stages import Run

FIELDS = ("seed", "bits", "activation_bits")
# Name in the file -> row of the table.
SIGNALS = {
    "two_sided": "mean of both sides (SDQ)",
    "simpson": "Simpson's rule (SDQ from 2 bits)",
    "upper": "upper draws only",
    "mix": "mix of DBP 0.95",
    "lower": "lower draws only",
    "table": "table, others in float",
    "hawq": "Hessian trace x error",
    "greedy": "growth of relative error",
    "size": "size of the layer",
}
Values = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="where the steps down begin")
    parser.add_argument("--batches", type=int, default=300, help="of the two-sided estimate")
    options = parser.parse_args()
    if not options.table:
        cells = (
            {"seed": seed, "bits": bits, "activation_bits": options.activation_bits}
            for seed in options.seeds
            for bits in options.bits
        )
        work(options, cells, FIELDS, lambda run, cell: measure(options, run, cell))
    print(table(read(options.out)["cells"]))


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    bits, model = cell["bits"], run.base
    loader = run.loaders(options.search_batch_size)["train"]
    descent = Descent(model.strategy, get_cost("bits"), [bits - 1], model.config.candidates, bits)
    task = Task(model, descent, loader, run.network, cell["seed"], 0.0, 10**6, SearchLog(), run.accelerator, None, None)
    truth = true_damages(run, model, descent.names, bits)
    sides = both_sides(task, options.batches)
    layers, traces = model.quantized_layers(), hessian_traces(task, 512, 8)
    errors = quantization_errors(model, descent)

    def growth(name: str) -> float:
        """Of the squared error, in the weights' own unit."""
        weight = layers[name].weight.detach()
        low, high = ((weight_at(layers[name], b).detach() - weight).square().sum() for b in (bits - 1, bits))
        return (low - high).item()

    with probing(task, 512) as loss:
        single = {name: loss({name: bits - 1}) - loss({name: bits}) for name in descent.names}
    signals: dict[str, Values] = {
        **sides,
        "table": single,
        "hawq": {name: traces[name] / layers[name].weight.numel() * growth(name) for name in descent.names},
        "greedy": {name: errors[name][bits - 1] - errors[name][bits] for name in descent.names},
        "size": {name: -float(layers[name].weight.numel()) for name in descent.names},
    }
    expected = [truth[name] for name in descent.names]
    return {
        "rank": {
            key: float(spearmanr([values[name] for name in descent.names], expected).statistic)
            for key, values in signals.items()
        },
        "sum_true": sum(expected),
        "sum_of": {key: sum(sides[key].values()) for key in ("two_sided", "simpson")},
        "layers": len(descent.names),
    }


@torch.no_grad()
def true_damages(run: Run, model: SDQForImageClassification, names: list[str], bits: int) -> Values:
    """Growth of the KL divergence on the validation split as each layer alone goes from `bits` to the next lower ones."""
    layers = model.quantized_layers()
    batches = [batch["pixel_values"] for batch in run.loaders()["validation"]]

    def loss() -> float:
        total = sum(distillation_loss(model, run.network, images, run.accelerator) * len(images) for images in batches)
        return float(total) / sum(len(images) for images in batches)

    def put(name: str, width: int) -> None:
        weight = weight_at(layers[name], width, scale_at(layers[name], width)).detach()
        layers[name].weight_source = lambda _: weight

    found = {}
    with searching(model):
        for name in names:
            put(name, bits)
        whole = loss()
        for name in names:
            put(name, bits - 1)
            found[name] = loss() - whole
            put(name, bits)
    for name in names:
        layers[name].weight_source = None
    return found


def both_sides(task: Task, batches: int) -> dict[str, Values]:
    """Estimates of each layer's damage from its draws: upper, lower, two_sided, simpson, mix."""
    model, names = task.model, task.descent.names
    teacher: nn.Module = task.float_network()
    weights = StochasticWeights(model, task.descent)
    places = (1.0, 0.5, 0.0)
    seen: dict[str, dict[float, list[float]]] = {name: {share: [] for share in places} for name in names}
    with searching(model):
        weights.start()
        data = task.batches()
        for step in range(batches):
            thirds = (3 * draw(task.seed, step, len(names))).int().tolist()
            drawn = {name: places[third] for name, third in zip(names, thirds, strict=True)}
            weights.choose(drawn)
            images = next(data)["pixel_values"].to(model.device)
            distillation_loss(model, teacher, images, task.accelerator).backward()
            for name, gradient in zip(names, weights.gradients(), strict=True):
                seen[name][drawn[name]].append(-gradient.item())
    weights.clear()
    upper, middle, lower = ({n: statistics.fmean(seen[n][share]) for n in names} for share in places)
    return {
        "upper": upper,
        "lower": lower,
        "two_sided": {n: (upper[n] + lower[n]) / 2 for n in names},
        "simpson": {n: (upper[n] + 4 * middle[n] + lower[n]) / 6 for n in names},
        "mix": {n: 0.95 * upper[n] + 0.05 * lower[n] for n in names},
    }


def table(cells: list[Cell]) -> str:
    """Markdown: rank correlation of each signal with the true damage, mean over float networks and standard error."""
    rungs = sorted({cell["bits"] for cell in cells}, reverse=True)
    lines = [f"| signal | {' | '.join(f'{b} -> {b - 1}' for b in rungs)} |", "|---" * (len(rungs) + 1) + "|"]
    groups = [[cell for cell in cells if cell["bits"] == b] for b in rungs]
    for key, label in SIGNALS.items():
        lines.append(
            f"| {label} | {' | '.join(mean_and_error([c['rank'][key] for c in members], 2) for members in groups)} |"
        )
    for key, label in (("two_sided", "mean of both sides"), ("simpson", "Simpson's rule")):
        sums = [mean_and_error([c["sum_of"][key] / c["sum_true"] for c in members], 2) for members in groups]
        lines.append(f"| sum over layers, {label} / true | {' | '.join(sums)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
