"""Study C: the loss under stochastic quantization and under linear interpolation, and the gradients of DBPs.

    python scripts/study_landscape.py --dataset ../shared/data/fashion-mnist \
        --out docs/results/landscape-mobilenetv1_025_cifar.json --picture docs/images/landscape.png

All searched layers stand between two bitwidths with a DBP of one half. The network is trained so, once with weights that are
one of the two at random (SDQ), once with their mean (FracBits). Around both trained weights the distillation loss is taken
on a grid along two random directions whose filters have the norms of the weights' filters (Li et al. 2018), under both
kinds of weights; for the random ones it is the mean over a few draws, the same at every point. A surface's roughness is the
root mean square of its second differences over the standard deviation of its values.

Then, in the float network: the gradient of a DBP's logit by Gumbel-softmax, batch by batch, at several temperatures: its
standard deviation over the batches divided by the size of its mean, median over layers. All temperatures see the same draws.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_common import Cell, add_options, mean_and_error, read, work
from torch import Tensor

from sdq_hf import SDQForImageClassification
from sdq_hf.costs import get_cost
from sdq_hf.quantizers.stochastic import draw, gumbel_choice
from sdq_hf.search.descent import Descent
from sdq_hf.search.errors import scale_at, weight_at
from sdq_hf.search.stochastic_weights import StochasticWeights, searching
from sdq_hf.search.task import distillation_loss, endless
from sdq_hf.training.optim import OptimizerArguments, create_optimizer, create_scheduler
from sdq_hf.training.stages import Run

FIELDS = ("seed", "activation_bits", "bits")
KINDS = ("stochastic", "interpolation")
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
LOGITS = (0.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--bits", type=int, default=3, help="the upper bitwidth; the lower is one less")
    parser.add_argument("--updates", type=int, default=300, help="of the training, 128 images each")
    parser.add_argument("--points", type=int, default=15, help="of the grid, along each direction")
    parser.add_argument("--radius", type=float, default=0.5, help="of the grid, in norms of the filters")
    parser.add_argument("--draws", type=int, default=4, help="over which the loss of random weights is averaged")
    parser.add_argument("--images", type=int, default=512, help="of the validation split, for the surfaces")
    parser.add_argument("--batches", type=int, default=200, help="for the gradients of the DBPs")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if not options.table:
        cells = [
            {"seed": seed, "activation_bits": options.activation_bits, "bits": options.bits} for seed in options.seeds
        ]
        work(options, cells, FIELDS, lambda run, cell: measure(options, run, cell))
    cells = read(options.out)["cells"]
    print(table(cells))
    if options.picture:
        draw_surfaces(cells[0], options.picture)


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    images = torch.cat([batch["pixel_values"] for batch in run.loaders()["validation"]])[: options.images]
    surfaces: dict[str, dict[str, list[list[float]]]] = {}
    for trained in KINDS:
        model = train(options, run, trained)
        surfaces[trained] = {kind: surface(options, run, model, kind, images, cell["seed"]).tolist() for kind in KINDS}
    return {
        "surfaces": {
            trained: {kind: [[round(value, 5) for value in row] for row in rows] for kind, rows in found.items()}
            for trained, found in surfaces.items()
        },
        "roughness": {
            trained: {kind: roughness(np.array(rows)) for kind, rows in found.items()}
            for trained, found in surfaces.items()
        },
        "noise": gradient_noise(options, run, cell["seed"]),
    }


@contextmanager
def between(model: SDQForImageClassification, bits: int, kind: str) -> Iterator[Callable[[Mapping[str, bool]], None]]:
    """Inside, searched weights stand between `bits` and one less; the function it gives sets the layers' draws."""
    layers, names = model.quantized_layers(), model.strategy.searchable
    scales = {name: [scale_at(layers[name], width) for width in (bits, bits - 1)] for name in names}
    upper: dict[str, bool] = dict.fromkeys(names, True)

    def weight_of(name: str) -> Callable[[Tensor], Tensor]:
        def weight(_: Tensor) -> Tensor:
            if kind == "stochastic":
                side = 0 if upper[name] else 1
                return weight_at(layers[name], bits - side, scales[name][side])
            high, low = (weight_at(layers[name], bits - side, scales[name][side]) for side in (0, 1))
            return (high + low) / 2

        return weight

    for name in names:
        layers[name].weight_source = weight_of(name)
    try:
        yield upper.update
    finally:
        for name in names:
            layers[name].weight_source = None


def _draws(names: list[str], seed: int, step: int) -> dict[str, bool]:
    return dict(zip(names, (draw(seed, step, len(names)) < 0.5).tolist(), strict=True))


def train(options: argparse.Namespace, run: Run, kind: str) -> SDQForImageClassification:
    """A copy of the network, trained by distillation with weights of a kind."""
    model = copy.deepcopy(run.base)
    names, seed = list(model.strategy.searchable), run.arguments.run.seed
    recipe = OptimizerArguments(epochs=1, lr=options.lr)
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe, options.updates)
    data = endless(run.loaders(128)["train"])
    model.train()
    with between(model, options.bits, kind) as choose:
        for update in range(options.updates):
            scheduler.step_update(update)
            choose(_draws(names, seed, update))
            distillation_loss(model, run.network, next(data)["pixel_values"], run.accelerator).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@torch.no_grad()
def surface(
    options: argparse.Namespace, run: Run, model: SDQForImageClassification, kind: str, images: Tensor, seed: int
) -> np.ndarray[Any, Any]:
    """The loss on the grid, [points, points]."""
    names = list(model.strategy.searchable)
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.weight for layer in model.quantized_layers().values()]
    centre = [weight.detach().clone() for weight in weights]
    directions = [[_like_filters(weight, generator) for weight in centre] for _ in range(2)]
    places = np.linspace(-options.radius, options.radius, options.points)
    losses = np.zeros((options.points, options.points))
    draws = range(options.draws if kind == "stochastic" else 1)
    # Scales stay those of the centre: the surface is that of the weights.
    with searching(model), between(model, options.bits, kind) as choose:
        for i, x in enumerate(places):
            for j, y in enumerate(places):
                for weight, start, first, second in zip(weights, centre, *directions, strict=True):
                    weight.copy_(start + x * first + y * second)
                for number in draws:
                    choose(_draws(names, seed + 1, number))
                    loss = distillation_loss(model, run.network, images, run.accelerator)
                    losses[i, j] += loss.item() / len(draws)
        for weight, start in zip(weights, centre, strict=True):
            weight.copy_(start)
    return losses


def _like_filters(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction, each of whose filters has the norm of the weight's filter."""
    direction = torch.randn(weight.shape, generator=generator)
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (weight, direction)]
    return direction * (norms[0] / norms[1]).view(-1, *[1] * (weight.ndim - 1))


def roughness(losses: np.ndarray[Any, Any]) -> float:
    second = [np.diff(losses, n=2, axis=axis) for axis in (0, 1)]
    return float(np.sqrt(np.mean([np.mean(d**2) for d in second])) / losses.std())


def gradient_noise(options: argparse.Namespace, run: Run, seed: int) -> dict[str, dict[str, float]]:
    """Logit of the DBP -> temperature, or "two_sided" -> standard deviation over the mean's size, median over layers."""
    model = run.base
    names = list(model.strategy.searchable)
    found = {}
    for theta in LOGITS:
        way = Descent(model.strategy, get_cost("bits"), [options.bits - 1], model.config.candidates, options.bits)
        weights = StochasticWeights(model, way)
        leaves, gates, uppers = [], [], []
        with searching(model):
            weights.start()
            data = endless(run.loaders(options.search_batch_size)["train"])
            for step in range(options.batches):
                uniform = draw(seed, step, len(names))
                hard, _ = gumbel_choice(torch.full_like(uniform, theta), uniform, 1.0)
                weights.choose(dict(zip(names, hard.tolist(), strict=True)))
                images = next(data)["pixel_values"].to(model.device)
                distillation_loss(model, run.network, images, run.accelerator).backward()
                gates.append(weights.gradients().double().cpu())
                leaves.append(uniform)
                uppers.append(hard)
        weights.clear()
        gate, uniform, upper = torch.stack(gates), torch.stack(leaves), torch.stack(uppers)
        noise = {}
        for temperature in TEMPERATURES:
            leaf = torch.full_like(uniform, theta).requires_grad_()
            (gradient,) = torch.autograd.grad(gumbel_choice(leaf, uniform, temperature)[1], leaf, gate)
            noise[f"{temperature:g}"] = (gradient.std(0) / gradient.mean(0).abs()).median().item()
        if theta == 0:
            # The same draws, weighed by sides alone.
            sides = [torch.where(kept, gate, torch.nan) for kept in (upper, ~upper)]
            mean = torch.stack([side.nanmean(0) for side in sides]).mean(0)
            spread = torch.stack([(side - side.nanmean(0)).square().nanmean(0) for side in sides]).mean(0)
            noise["two_sided"] = (spread.sqrt() / mean.abs()).median().item()
        found[f"{theta:g}"] = noise
    return found


def table(cells: list[Cell]) -> str:
    """Markdown: roughness of the surfaces, and noise of the gradients; mean over float networks and standard error."""
    lines = ["| weights trained with | loss under | roughness |", "|---|---|---|"]
    for trained in KINDS:
        for kind in KINDS:
            number = mean_and_error([cell["roughness"][trained][kind] for cell in cells], 3)
            lines.append(f"| {trained} | {kind} | {number} |")
    lines += ["", f"| gradient of a DBP | {' | '.join(f'DBP {_dbp(t):.2f}' for t in LOGITS)} |", "|---" * 3 + "|"]
    for key in (*(f"{t:g}" for t in TEMPERATURES), "two_sided"):
        numbers = [
            mean_and_error([cell["noise"][f"{theta:g}"][key] for cell in cells], 1)
            if cells and key in cells[0]["noise"][f"{theta:g}"]
            else ""
            for theta in LOGITS
        ]
        label = "mean of both sides" if key == "two_sided" else f"Gumbel-softmax, temperature {key}"
        lines.append(f"| {label} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _dbp(theta: float) -> float:
    return float(torch.sigmoid(torch.tensor(theta)))


def draw_surfaces(cell: Cell, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 8), constrained_layout=True, sharex=True, sharey=True)
    levels = [np.array(cell["surfaces"][trained][kind]) for trained in KINDS for kind in KINDS]
    low, high = min(v.min() for v in levels), statistics.median(float(v.max()) for v in levels)
    for axis, (trained, kind) in zip(axes.flat, ((t, k) for t in KINDS for k in KINDS), strict=True):
        values = np.array(cell["surfaces"][trained][kind])
        image = axis.contourf(values.T, levels=np.linspace(low, high, 24), extend="max", cmap="viridis")
        axis.set_title(f"trained with {trained}, loss under {kind}", fontsize=9)
        middle = (len(values) - 1) / 2
        axis.plot(middle, middle, "w+")
        axis.set_xticks([0, middle, 2 * middle], ["-r", "0", "r"])
        axis.set_yticks([0, middle, 2 * middle], ["-r", "0", "r"])
    figure.colorbar(image, ax=axes, label="KL divergence from the float network, nats", format="%.1f")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
