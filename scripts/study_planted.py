"""Does a search find sensitivities that neither sizes nor relative errors tell?

    python scripts/study_planted.py --dataset ../shared/data/fashion-mnist --epochs 1 \
        --out docs/results/planted-mobilenetv1_025_cifar.json

Half of the searched layers of a trained network, drawn at random, are made sensitive: one output channel in eight gets
weights `--factor` times as large, and the batch norm behind it undoes that, so the float network computes what it did. The
levels of such a layer serve its large channels, and the small ones are lost; its relative error even falls. How much that
hurts is measured: the growth of the KL divergence with one layer alone at `--probe_bits` and all others at 8.

Each search starts at 8 bits and then spends the same BitOPs. The table shows how many bits it gives to the planted layers and
to the others, how surely a planted layer gets more bits than another one (area under the curve; 0.5 is chance), and the KL
divergence on the validation split as found, with batch norm recalibrated, and on the test split after a fine-tune of
`--epochs`, equally long for all: this study asks who sees the planting, and study A what a search is worth in all.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from study_common import Cell, add_options, as_found, mean_and_error, read, tuned, work
from torch import nn

from sdq_hf.costs import get_cost
from sdq_hf.search import METHODS, BudgetError
from sdq_hf.search.stochastic_weights import searching
from sdq_hf.training.evaluation import logits_of
from sdq_hf.training.losses import kl_divergence
from sdq_hf.training.stages import Run

FIELDS = ("seed", "method", "target", "activation_bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--target_bitops", type=float, default=3.5, help="budget: BitOPs of so many uniform bits")
    parser.add_argument("--factor", type=float, default=8.0, help="by which weights of some channels grow")
    parser.add_argument("--probe_bits", type=int, default=4, help="at which sensitivities are measured")
    options = parser.parse_args()
    if not options.table:
        cells = _cells(options)
        work(
            options,
            cells,
            FIELDS,
            lambda run, cell: measure(options, run, cell),
            lambda network, seed: plant(network, seed, options.factor),
        )
    print(table(read(options.out)["cells"]))


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        for method in options.methods:
            yield dict(zip(FIELDS, (seed, method, options.target_bitops, options.activation_bits), strict=True))


def pairs(network: nn.Module) -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions that a batch norm follows, but for the first, with it."""
    found: dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]] = {}
    last: tuple[str, nn.Conv2d] | None = None
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            last = (name, module)
        elif isinstance(module, nn.BatchNorm2d) and last is not None:
            found[last[0]] = (last[1], module)
            last = None
    return dict(list(found.items())[1:])


def planted_layers(names: list[str], seed: int) -> list[str]:
    """Half of the layers, in the network's order."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [names[i] for i in sorted(order[: len(names) // 2])]


@torch.no_grad()
def plant(network: nn.Module, seed: int, factor: float) -> None:
    """Enlarge one channel in eight of half of the layers; the batch norm behind takes it back."""
    found = pairs(network)
    generator = torch.Generator().manual_seed(seed + 1)
    for name in planted_layers(list(found), seed):
        conv, norm = found[name]
        channels = torch.randperm(conv.out_channels, generator=generator)[: max(1, conv.out_channels // 8)]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight[channels] *= factor
        norm.running_mean[channels] *= factor
        # Its epsilon is not enlarged; what that changes is far below what quantization does.
        norm.running_var[channels] *= factor**2


@torch.no_grad()
def sensitivities(run: Run, network: nn.Module, bits: int, images: int = 512) -> dict[str, float]:
    """Layer -> growth of the KL divergence when it alone is at `bits`, all others at 8; images of the train split."""
    model = copy.deepcopy(run.base)
    model.load_float_state(network.state_dict())
    batches = [batch["pixel_values"] for _, batch in zip(range(images // 64), run.loaders(64)["train"], strict=False)]

    def loss(changed: Mapping[str, int]) -> float:
        model.set_strategy(model.strategy.with_bits(8).with_bits(changed))
        with searching(model):
            kl = [kl_divergence(logits_of(model(pixel_values=x)), network(x)).mean() for x in batches]
            return torch.stack(kl).mean().item()

    whole = loss({})
    return {name: loss({name: bits}) - whole for name in model.strategy.searchable}


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    method, budget = cell["method"], get_cost("bitops").of_uniform(run.base.strategy, cell["target"])
    names = list(run.base.strategy.searchable)
    planted = planted_layers(list(pairs(run.network)), cell["seed"])
    run.arguments.search.start_bits = 8
    try:
        (strategy,), seconds, log = run.search_one(method, [budget], "bitops", method)
    except BudgetError as error:
        return {"error": str(error)}
    found = as_found(run, strategy)
    about = {"method": method, "cost": "bitops", "budget": budget, "seconds": seconds}
    result = tuned(run, method, strategy, about, options.epochs)
    bits = {name: round(strategy[name].average_bits) for name in names}
    damage = sensitivities(run, run.network, options.probe_bits)
    return {
        **result,
        "planted": [names.index(name) for name in planted],
        "auc": auc([bits[n] for n in names if n in planted], [bits[n] for n in names if n not in planted]),
        "sensitivity": {
            label: statistics.median(damage[name] for name in names if (name in planted) == which)
            for label, which in (("planted", True), ("others", False))
        },
        "found": found,
        "search_seconds": round(seconds, 1),
        "search_forward_images": log.forward_images,
        "search_backward_images": log.backward_images,
    }


def auc(positives: list[int], negatives: list[int]) -> float:
    """Probability that a planted layer has more bits than another one; ties count half."""
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    return sum(wins) / len(wins)


def table(found: list[Cell]) -> str:
    """Markdown: bits of planted and other layers, how surely they are told apart, and KL; mean and standard error."""
    lines = [
        "| search | bits, planted | bits, others | area under the curve | validation KL as found | test KL | seeds |",
        "|" + "---|" * 7,
    ]
    groups: dict[str, list[Cell]] = {}
    for cell in found:
        if "error" not in cell:
            groups.setdefault(cell["method"], []).append(cell)
    for method, members in sorted(groups.items(), key=lambda g: statistics.fmean(c["kl"] for c in g[1])):
        columns = [
            ([statistics.fmean(c["bits"][i] for i in c["planted"]) for c in members], 2),
            (
                [statistics.fmean(b for i, b in enumerate(c["bits"]) if i not in c["planted"]) for c in members],
                2,
            ),
            ([c["auc"] for c in members], 2),
            ([c["found"]["kl"] for c in members], 3),
            ([c["kl"] for c in members], 4),
        ]
        lines.append(f"| {method} | {' | '.join(mean_and_error(v, d) for v, d in columns)} | {len(members)} |")
    sides = [
        mean_and_error(
            [c["sensitivity"][side] for c in found if "sensitivity" in c and c["method"] == found[0]["method"]], 4
        )
        for side in ("planted", "others")
    ]
    lines += ["", f"Median damage of a layer alone at few bits: planted {sides[0]}, others {sides[1]} nats."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
