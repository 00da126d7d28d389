"""How much of a model's KL divergence hangs on the statistics of its batch norm, after study A.

    python scripts/study_batch_norm.py --dataset ../shared/data/fashion-mnist --seeds 0 1 2 3 4 \
        --of docs/results/search-mobilenetv1_025_cifar.json --out docs/results/batch-norm-mobilenetv1_025_cifar.json

Takes the models that `study_search.py` left in `--runs` for one budget, and gathers their statistics anew from `--batches` of
training images: as they are, and augmented as in the training. The weights stay what they are. Nothing is chosen: all three
are evaluated on the test split.
"""

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from study_common import Cell, above_sdq, add_options, mean_and_error, read, run_name, work

from sdq_hf import SDQForImageClassification
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.loaders import endless
from sdq_hf.training.stages import Run

FIELDS = ("seed", "method", "budget")
STATISTICS = {"trained": "as the training left them", "clean": "of clean images", "augmented": "of augmented images"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--of", type=Path, required=True, help="result file of the study whose models are looked at")
    parser.add_argument("--methods", nargs="+", default=["two_sided", "table", "greedy", "hawq"])
    parser.add_argument("--budget", default="bitops-2", help="as in the names of models")
    parser.add_argument("--batches", type=int, default=300)
    options = parser.parse_args()
    if not options.table:
        work(options, cells(options), FIELDS, lambda run, cell: measure(options, run, cell))
    print(table(read(options.out)["cells"]))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        for method in options.methods:
            yield dict(zip(FIELDS, (seed, method, options.budget), strict=True))


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    runs = run_name(options, cell["seed"], options.of, "*")
    found = sorted(options.runs.glob(f"{runs}/models/{cell['method']}-{cell['budget']}"))
    if not found:
        raise SystemExit(
            f"No model {cell['method']}-{cell['budget']} in {options.runs / runs}: run study_search.py first."
        )
    model = SDQForImageClassification.from_pretrained(found[0]).to(run.accelerator.device).eval()
    loaders = run.loaders()
    sources = {"trained": None, "clean": loaders["calibration"], "augmented": loaders["train"]}
    result = {}
    for name, source in sources.items():
        if source is not None:
            model.recalibrate_batch_norm(islice(endless(source), options.batches), options.batches)
        metrics = evaluate(model, loaders["test"], run.accelerator, reference=run.network)
        result[name] = {key: metrics[key] for key in ("kl", "top1")}
    return {**result, "batches": options.batches}


def table(found: list[Cell]) -> str:
    """Markdown: test KL and top-1 with each kind of statistics, mean over seeds and standard error of the mean.

    Also by how much the KL is above that of "two_sided" with the same seed.
    """
    lines = [
        "| search | statistics | test KL, nats | above SDQ's, same seeds | test top-1, % | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(cell["method"] for cell in found):
        members = [cell for cell in found if cell["method"] == method]
        for name, label in STATISTICS.items():
            sdq = {cell["seed"]: cell[name]["kl"] for cell in found if cell["method"] == "two_sided"}
            numbers = [
                mean_and_error([cell[name]["kl"] for cell in members], 4),
                above_sdq(method, {cell["seed"]: cell[name]["kl"] for cell in members}, sdq),
                mean_and_error([cell[name]["top1"] for cell in members], 2),
            ]
            lines.append(f"| {method} | {label} | {' | '.join(numbers)} | {len(members)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
