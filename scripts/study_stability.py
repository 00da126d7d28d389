"""Studies D and E: does one descent serve all budgets, and how much do draws and options of the search change?

    python scripts/study_stability.py --dataset ../shared/data/fashion-mnist --epochs 2 --seeds 0 \
        --out docs/results/stability-mobilenetv1_025_cifar.json

On the float network of each seed the search is run with other draws (`--search_seeds`), with each of its options a third
and three times its default, and with other draws and several times the images ("thorough"). One strategy is fine-tuned with
images in other orders ("order"), which is the noise of all the others. Each strategy is fine-tuned, and
judged on the validation split: the test split chooses no default. Agreement is Spearman's correlation between the bits of two
searches, mean over pairs; what cost alone explains is taken out in a second number (partial correlation, given the rank of
the layer's cost of a bit).

With the same draws, the strategies that one descent leaves at several budgets are compared with those of a search for each.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr
from study_common import Cell, add_options, mean_and_error, other_order, read, tuned, work

from sdq_hf.costs import get_cost
from sdq_hf.search import SearchLog, search
from sdq_hf.training.stages import Run

FIELDS = ("seed", "option", "value", "search_seed", "activation_bits")
OPTIONS: dict[str, tuple[float, ...]] = {
    "min_draws": (1, 9),
    "max_draws": (5, 39),
    "caution": (0.67, 6),
    # Of what is forgotten, 1 - keep, a third and three times.
    "keep": (0.97, 0.9967),
    "weight_lr": (1e-4, 9e-4),
    "batch_size": (21, 192),
}
# Three times the draws of three times the images.
THOROUGH = {"min_draws": 9, "max_draws": 39, "batch_size": 192}
# Options of which searches with other draws are compared.
DRAWN = ("default", "thorough")
LABELS = {
    "default": "default, other draws",
    "thorough": "thorough, other draws",
    "order": "default, one strategy, other orders of images",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--target_bitops", type=float, default=2.0, help="budget: BitOPs of so many uniform bits")
    parser.add_argument("--several_bits", type=float, nargs="*", default=[1.5, 2.0, 2.5, 3.0, 3.6])
    parser.add_argument("--search_seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--orders", type=int, nargs="*", default=[101, 102, 103, 104], help="seeds of the images' order"
    )
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=list(OPTIONS))
    options = parser.parse_args()
    if not options.table:
        work(options, cells(options), FIELDS, lambda run, cell: measure(options, run, cell))
    print(table(read(options.out)["cells"]))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        rows = [("default", 0.0, search_seed) for search_seed in options.search_seeds]
        rows += [(option, value, options.search_seeds[0]) for option in options.options for value in OPTIONS[option]]
        rows += [("thorough", 0.0, search_seed) for search_seed in options.search_seeds]
        rows += [("order", float(order), options.search_seeds[0]) for order in options.orders]
        rows.append(("budgets", 0.0, options.search_seeds[0]))
        for row in rows:
            yield dict(zip(FIELDS, (seed, *row, options.activation_bits), strict=True))


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    option, value, search_seed = cell["option"], cell["value"], cell["search_seed"]
    if option == "budgets":
        return one_descent(options, run, search_seed)
    given: dict[str, Any] = {"default": {}, "thorough": THOROUGH, "order": {}}.get(option, {option: value})
    given = {"batch_size": options.search_batch_size, **given}
    batch_size = int(given.pop("batch_size"))
    log, budget = SearchLog(), get_cost("bitops").of_uniform(run.base.strategy, options.target_bitops)
    data = run.loaders(batch_size)["train"]
    (strategy,) = search(
        run.base, data, [budget], "bitops", seed=search_seed, log=log, accelerator=run.accelerator, **given
    )
    about = {"method": "two_sided", "cost": "bitops", "budget": budget, "seconds": 0.0}
    macs = [strategy[name].macs for name in strategy.searchable]
    name = f"{option}-{value}-{search_seed}"
    with other_order(run, int(value)) if option == "order" else nullcontext():
        result = tuned(run, name, strategy, about, options.epochs)
    return {**result, "macs": macs, "search_batches": log.batches, "search_images": log.backward_images}


def one_descent(options: argparse.Namespace, run: Run, search_seed: int) -> Cell:
    """Bits at several budgets, of one descent and of a search for each."""
    budgets, data = options.several_bits, run.loaders(options.search_batch_size)["train"]
    names = run.base.strategy.searchable
    found, images = {}, {}
    for label, groups in (("one", [budgets]), ("separate", [[budget] for budget in budgets])):
        bits, images[label] = [], 0
        for group in groups:
            log = SearchLog()
            for strategy in search(run.base, data, group, seed=search_seed, log=log, accelerator=run.accelerator):
                bits.append([strategy[name].weight_bits for name in names])
            images[label] += log.backward_images
        found[label] = bits
    return {"budgets": budgets, "bits_of": found, "images_of": images}


def agreement(bits: Sequence[Sequence[int]], costs: Sequence[float]) -> tuple[float, float]:
    """Mean rank correlation over pairs of strategies, and the same given the layers' costs."""
    pairs = list(itertools.combinations(bits, 2))
    plain = [spearmanr(a, b).statistic for a, b in pairs]
    design = np.stack([np.ones(len(costs)), rankdata(costs)], axis=1)

    def residual(values: Sequence[int]) -> np.ndarray[Any, Any]:
        ranks = rankdata(values)
        return ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]

    partial = [np.corrcoef(residual(a), residual(b))[0, 1] for a, b in pairs]
    return statistics.fmean(plain), statistics.fmean(partial)


def table(cells: list[Cell]) -> str:
    """Markdown: validation KL of each setting, agreement of the draws, and equality of the descents."""
    lines = [
        "| float network | search | validation KL, nats | validation top-1, % | average bits | images searched | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    # A row is of one float network: they differ more than searches do.
    groups: dict[tuple[int, str, float], list[Cell]] = {}
    for cell in cells:
        if cell["option"] != "budgets":
            value = 0.0 if cell["option"] == "order" else cell["value"]
            groups.setdefault((cell["seed"], cell["option"], value), []).append(cell)
    for (seed, option, value), members in groups.items():
        kl, top1 = (
            mean_and_error([c["validation"][key] for c in members], digits) for key, digits in (("kl", 4), ("top1", 2))
        )
        bits = statistics.fmean(c["average_bits"] for c in members)
        images = statistics.fmean(c["search_images"] for c in members)
        label = LABELS.get(option, f"{option} {value:g}")
        lines.append(f"| {seed} | {label} | {kl} | {top1} | {bits:.2f} | {images:,.0f} | {len(members)} |")
    for seed in sorted({cell["seed"] for cell in cells}):
        for option in DRAWN:
            draws = [c for c in cells if c["seed"] == seed and c["option"] == option]
            if len(draws) > 1:
                plain, partial = agreement([c["bits"] for c in draws], draws[0]["macs"])
                lines += [
                    "",
                    f"Float network {seed}, {option}: agreement of {len(draws)} searches with other draws {plain:.2f}, "
                    f"given cost {partial:.2f}.",
                ]
    for cell in cells:
        if cell["option"] == "budgets":
            same = sum(a == b for a, b in zip(cell["bits_of"]["one"], cell["bits_of"]["separate"], strict=True))
            images = cell["images_of"]
            lines += [
                "",
                f"Float network {cell['seed']}: of {len(cell['budgets'])} budgets, one descent ({images['one']:,} images) "
                f"and a search for each ({images['separate']:,} images) give the same strategy at {same}.",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
