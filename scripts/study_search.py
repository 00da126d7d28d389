"""Study A: SDQ and its rivals at the same budgets, epochs and distillation, over several float networks.

    python scripts/study_search.py --dataset ../shared/data/fashion-mnist --model mobilenetv1_025_cifar \
        --out docs/results/search-mobilenetv1_025_cifar.json

A cell is one search method at one budget with one seed, which is that of the float network, the validation split, the search
and the fine-tune. Cells are kept in the result file, in the order of their worth; a study that is stopped goes on where it
was. `--shard 0/2` and `--shard 1/2` share the cells between two processes.

Searches that train (SDQ, fracbits, edmips) get `--search_epochs` fewer epochs of fine-tune than the others, more than what
SDQ's search takes. The epoch that is kept is chosen on the validation split, held out of train; the test split is read once
for each cell, and nothing is chosen by it.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch

from sdq_hf.search import METHODS, BudgetError
from sdq_hf.training.arguments import Arguments, parse_arguments
from sdq_hf.training.interrupt import Interrupt
from sdq_hf.training.report import row_of
from sdq_hf.training.stages import Run, bitops_of_uniform
from sdq_hf.writing import write_json

TRAINED = ("two_sided", "paper", "fracbits", "edmips")
FIELDS = ("seed", "method", "cost", "target", "activation_bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="as in run_sdq.py; default: the bundled sample")
    parser.add_argument("--model", default="mobilenetv1_025_cifar")
    parser.add_argument("--img_size", type=int, default=28)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--target_bits", type=float, nargs="*", default=[2.0])
    parser.add_argument("--target_bitops", type=float, nargs="*", default=[2.0, 3.0])
    parser.add_argument("--activation_bits", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher_epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=4, help="of the fine-tune")
    parser.add_argument("--search_epochs", type=int, default=1, help="fewer for searches that train")
    parser.add_argument("--search_batch_size", type=int, default=64)
    parser.add_argument("--max_search_batches", type=int, default=20_000)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of networks and searches")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="which of N processes this is")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    if not options.table:
        datasets.disable_progress_bars()
        study(options)
    print(table(read(options.out)["cells"]))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"cells": []}


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seeds come last, so that a study that is cut off has the same seeds for all methods but the last."""
    budgets = [("bits", t) for t in options.target_bits] + [("bitops", t) for t in options.target_bitops]
    for seed in options.seeds:
        for cost, target in budgets:
            for method in options.methods:
                if method == "uniform" and (target % 1 or (cost == "bitops" and ("bits", target) in budgets)):
                    # Whole numbers only, and the same strategy in both costs.
                    continue
                yield dict(zip(FIELDS, (seed, method, cost, target, options.activation_bits), strict=True))


def study(options: argparse.Namespace) -> None:
    shard, shards = (int(part) for part in options.shard.split("/"))
    run: Run | None = None
    for number, cell in enumerate(cells(options)):
        known = read(options.out)["cells"]
        if number % shards != shard or any(all(done[f] == cell[f] for f in FIELDS) for done in known):
            continue
        if run is None or run.arguments.run.seed != cell["seed"]:
            run = open_run(options, shard, cell["seed"])
        started = time.perf_counter()
        result = {**cell, **measure(options, run, cell), "seconds": round(time.perf_counter() - started, 1)}
        # Read anew: another process may have written meanwhile.
        content = read(options.out)
        content |= {
            "model": options.model,
            "epochs": options.epochs,
            "search_epochs": options.search_epochs,
            "search_batch_size": options.search_batch_size,
            "teacher_epochs": options.teacher_epochs,
            "images": {name: len(split) for name, split in run.data.splits.items()},
            "versions": {name: version(name) for name in ("torch", "timm", "scipy")},
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {run.accelerator.device.type}",
        }
        content["cells"].append(result)
        write_json(options.out, content)
        shown = {
            k: result[k] for k in (*FIELDS, "top1", "kl", "average_bits", "search_batches", "error") if k in result
        }
        print(shown, flush=True)


def open_run(options: argparse.Namespace, shard: int, seed: int) -> Run:
    """The run whose float network, data and searches the cells of one seed share; its network is trained when missing."""
    common = {
        "dataset": options.dataset,
        "model": options.model,
        "img_size": options.img_size,
        "max_train_samples": options.max_train_samples,
        "seed": seed,
        "cpu": str(not torch.cuda.is_available()),
        "stage": "teacher",
    }
    folder = options.runs / f"{options.model}-{seed}"
    network = folder / "teacher" / "model.safetensors"
    while shard and not network.exists():
        time.sleep(5)
    if not network.exists():
        trained = Run(_arguments(folder, {**common, "teacher_epochs": options.teacher_epochs}), Interrupt())
        trained.teacher()
        trained.close()
    # Each process has a folder of its own, and one for each kind of activations, on which searches depend.
    own = {
        "checkpoint": network,
        "activation_bits": options.activation_bits,
        "search_batch_size": options.search_batch_size,
        "max_search_batches": options.max_search_batches,
    }
    work = folder.with_name(f"{folder.name}-a{options.activation_bits}-{options.shard.replace('/', 'of')}")
    run = Run(_arguments(work, common | own), Interrupt())
    run.teacher()
    run.arguments.run.resume = True
    return run


def _arguments(folder: Path, values: Mapping[str, Any]) -> Arguments:
    values = {**values, "output_dir": folder, "resume": (folder / "arguments.json").exists()}
    return parse_arguments([f"--{key}={value}" for key, value in values.items() if value is not None])


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Search, fine-tune, and read the test split."""
    method, cost, target = cell["method"], cell["cost"], cell["target"]
    base = run.base.strategy
    budget = target if cost == "bits" else bitops_of_uniform(base, target)
    name = f"{method}-{cost}-{target:g}"
    try:
        (strategy,), seconds, log = run.search_one(name, [budget], cost, method)
    except BudgetError as error:
        return {"error": str(error)}
    fewer = options.search_epochs if method in TRAINED else 0
    tuning = replace(run.arguments.finetune, epochs=options.epochs - fewer)
    run.finetune_one(name, strategy, tuning)
    entry = {"name": name, "method": method, "cost": cost, "budget": budget, "seconds": seconds}
    row = row_of(run, {**entry, "strategy": strategy.to_json()})
    names = base.searchable
    return {
        **{k: row[k] for k in ("top1", "top5", "loss", "kl", "validation", "average_bits", "bitops", "file_bytes")},
        "bits": [strategy[layer].weight_bits for layer in names],
        "finetune_epochs": tuning.epochs,
        "search_batches": log.batches,
        "search_forward_images": log.forward_images,
        "search_backward_images": log.backward_images,
        "search_seconds": round(seconds, 1),
        "finetune_seconds": round(row["finetune_seconds"], 1),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: test KL and top-1 of each method at each budget, mean over seeds and standard error of the mean."""
    lines = ["| budget | search | test KL, nats | test top-1, % | average bits | seeds |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in found:
        if "error" not in cell:
            groups.setdefault((cell["activation_bits"], cell["cost"], cell["target"], cell["method"]), []).append(cell)
    ranked = sorted(groups.items(), key=lambda g: (*g[0][:3], statistics.fmean(c["kl"] for c in g[1])))
    for (activation_bits, cost, target, method), members in ranked:
        unit = "average bits" if cost == "bits" else "bits' BitOPs"
        numbers = []
        for key, digits in (("kl", 4), ("top1", 2)):
            values = [cell[key] for cell in members]
            number = f"{statistics.fmean(values):.{digits}f}"
            if len(values) > 1:
                number += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
            numbers.append(number)
        bits = statistics.fmean(cell["average_bits"] for cell in members)
        lines.append(
            f"| {target:g} {unit}, A{activation_bits} | {method} | {' | '.join(numbers)} | {bits:.2f} | {len(members)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
