"""What the studies share: float networks of several seeds, a cell's fine-tune, and results that are kept cell by cell."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from scipy.stats import ttest_rel
from torch import nn

from sdq_hf import SDQForImageClassification
from sdq_hf.strategy import Strategy
from sdq_hf.training.arguments import Arguments, parse_arguments
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.fit import recalibrate
from sdq_hf.training.interrupt import Interrupt
from sdq_hf.training.report import row_of
from sdq_hf.training.stages import Run
from sdq_hf.writing import write_json

Cell = dict[str, Any]
# Searches that train weights or DBPs.
TRAINED = ("two_sided", "paper", "fracbits", "edmips")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that all studies have."""
    parser.add_argument("--dataset", help="as in run_sdq.py; default: the bundled sample")
    parser.add_argument("--model", default="mobilenetv1_025_cifar")
    parser.add_argument("--img_size", type=int, default=28)
    parser.add_argument("--activation_bits", type=int, default=4, help="32: float")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher_epochs", type=int, default=15)
    parser.add_argument("--epochs", type=float, default=4, help="of the fine-tune; 0: networks are calibrated only")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the fine-tune, at its peak")
    parser.add_argument("--freeze_bn", type=float, default=1.0, help="of the fine-tune, as in run_sdq.py")
    parser.add_argument("--weight_scale", choices=["layer", "channel"], default="layer")
    parser.add_argument("--batch_size", type=int, help="of all training but the search; default: that of run_sdq.py")
    parser.add_argument("--start_bits", type=int, help="of searches, as in run_sdq.py")
    parser.add_argument("--search_batch_size", type=int, default=64)
    parser.add_argument("--max_search_batches", type=int, default=20_000)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int, help="validation and test images each")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], help="of all training and evaluation")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of networks and searches")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="which of N processes this is")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    # Options of run_sdq.py for the float networks alone, by name.
    parser.set_defaults(float_options={})


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"cells": []}


def work(
    options: argparse.Namespace,
    cells: Iterable[Cell],
    fields: Sequence[str],
    measure: Callable[[Run, Cell], Cell],
    change: Callable[[nn.Module, int], None] | None = None,
) -> None:
    """Measure the cells that are missing from the result file and that are this process's, in their order.

    A cell is known by its `fields`; one of them is `seed`, that of the float network and all else of its run. `change`:
    what is done to the float network of a seed before anything else.
    """
    datasets.disable_progress_bars()
    shard, shards = (int(part) for part in options.shard.split("/"))
    run: Run | None = None
    for number, cell in enumerate(cells):
        known = read(options.out)["cells"]
        if number % shards != shard or any(all(done[f] == cell[f] for f in fields) for done in known):
            continue
        if run is None or run.arguments.run.seed != cell["seed"]:
            run = open_run(options, cell["seed"], change)
        started = time.perf_counter()
        # Other instructions give other digits, and other float networks: rows are compared with those of the same ones.
        processor = torch.backends.cpu.get_cpu_capability()
        result = {
            **cell,
            **measure(run, cell),
            "seconds": round(time.perf_counter() - started, 1),
            "processor": processor,
            "mixed_precision": run.accelerator.mixed_precision,
        }
        # Read anew: another process may have written meanwhile.
        content = read(options.out)
        content |= {
            "options": {
                key: getattr(options, key)
                for key in (
                    "model",
                    "epochs",
                    "lr",
                    "freeze_bn",
                    "search_batch_size",
                    "teacher_epochs",
                    "mixed_precision",
                    "weight_scale",
                    "start_bits",
                )
            },
            "images": {name: len(split) for name, split in run.data.splits.items()},
            "versions": {name: version(name) for name in ("torch", "timm", "scipy")},
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {run.accelerator.device.type}",
        }
        content["cells"].append(result)
        write_json(options.out, content)
        shown = (*fields, "top1", "kl", "average_bits", "search_batches", "error")
        print({key: result[key] for key in shown if key in result}, flush=True)


def open_run(options: argparse.Namespace, seed: int, change: Callable[[nn.Module, int], None] | None = None) -> Run:
    """The run whose float network, data and searches the cells of one seed share; its network is trained when missing."""
    # Each process has a folder of its own, and one for each kind of quantizers, on which searches depend.
    own = {
        "checkpoint": train_float(options, seed, options.teacher_epochs),
        "activation_bits": options.activation_bits,
        "weight_scale": options.weight_scale,
        "search_batch_size": options.search_batch_size,
        "max_search_batches": options.max_search_batches,
        "lr": options.lr,
        "freeze_bn": options.freeze_bn,
        "start_bits": options.start_bits,
    }
    if not options.epochs:
        # Searches then look at the network as it is.
        own["epochs"] = 0
    part = run_name(options, seed, options.out, options.shard.replace("/", "of"))
    run = Run(_arguments(options, seed, options.runs / part, own), Interrupt())
    if change is not None and not (run.folder / "teacher").exists():
        change(run.network, seed)
    run.teacher()
    run.arguments.run.resume = True
    return run


def run_name(options: argparse.Namespace, seed: int, results: Path, process: str) -> str:
    """The folder, in `options.runs`, of what the study with the file `results` does in one process, `0of1` or another."""
    kind = f"a{options.activation_bits}" + "-channel" * (options.weight_scale == "channel")
    kind += "-calibrated" * (not options.epochs) + (f"-from{options.start_bits}" if options.start_bits else "")
    return f"{options.model}-{seed}-{results.stem}-{kind}-{process}"


def train_float(options: argparse.Namespace, seed: int, epochs: int) -> Path:
    """The file of a float network of so many epochs; the first process trains it, the others wait."""
    folder = options.runs / f"{options.model}-{seed}-{epochs}epochs"
    network = folder / "teacher" / "model.safetensors"
    while not options.shard.startswith("0/") and not network.exists():
        time.sleep(5)
    if not network.exists():
        trained = Run(
            _arguments(options, seed, folder, {"teacher_epochs": epochs, **options.float_options}), Interrupt()
        )
        trained.teacher()
        trained.close()
    return network


def _arguments(options: argparse.Namespace, seed: int, folder: Path, more: Mapping[str, Any]) -> Arguments:
    values = {
        "dataset": options.dataset,
        "model": options.model,
        "img_size": options.img_size,
        "batch_size": options.batch_size,
        "max_train_samples": options.max_train_samples,
        "max_eval_samples": options.max_eval_samples,
        "mixed_precision": options.mixed_precision,
        "seed": seed,
        "cpu": str(not torch.cuda.is_available()),
        "stage": "teacher",
        "output_dir": folder,
        "resume": (folder / "arguments.json").exists(),
        **more,
    }
    return parse_arguments([f"--{key}={value}" for key, value in values.items() if value is not None])


def tuned(
    run: Run,
    name: str,
    strategy: Strategy,
    about: Mapping[str, Any],
    epochs: float,
    look: Callable[[SDQForImageClassification], Cell] = lambda model: {},
    **changes: Any,
) -> Cell:
    """Fine-tune at the bits of `strategy`, and what the packed model gets on the test split.

    about: method, cost, budget and seconds of the search. look: more to keep of the model before it was packed. changes:
    options of the fine-tune.
    """
    model = run.finetune_one(name, strategy, replace(run.arguments.finetune, epochs=epochs, **changes))
    row = row_of(run, {**about, "name": name, "strategy": strategy.to_json()})
    return {
        **{k: row[k] for k in ("top1", "top5", "loss", "kl", "validation", "average_bits", "bitops", "file_bytes")},
        "bits": [strategy[layer].weight_bits for layer in run.base.strategy.searchable],
        "finetune_epochs": epochs,
        "finetune_seconds": round(row["finetune_seconds"], 1),
        **look(model),
    }


@contextmanager
def other_order(run: Run, seed: int) -> Iterator[None]:
    """Inside, trainings of `run` draw images and augmentations in another order; splits and networks stay its own."""
    own, loaders = run.arguments.run.seed, dict(run._loaders)
    run.arguments.run.seed = seed
    run._loaders.clear()
    try:
        yield
    finally:
        run.arguments.run.seed = own
        run._loaders.clear()
        run._loaders.update(loaders)


def as_found(run: Run, strategy: Strategy) -> dict[str, float]:
    """Metrics of a strategy on the validation split without any training, batch norm recalibrated on clean images."""
    model, loaders = run.quantize(run.network), run.loaders()
    model.set_strategy(strategy)
    model.calibrate(loaders["calibration"])
    recalibrate(model, loaders, run.accelerator, 50, run.network, sources=("calibration",))
    return evaluate(model, loaders["validation"], run.accelerator, reference=run.network)


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Mean and its standard error as text, `0.123 ± 0.004`; no error where there is one value, and nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def above_sdq(method: str, kl: Mapping[int, float], sdq: Mapping[int, float], p_value: bool = False) -> str:
    """By how much `kl` of a method is above SDQ's with the same seed, as `mean_and_error` writes it; seed -> KL in both.

    p_value: with that of a paired t test, two-sided.
    """
    seeds = [seed for seed in kl if seed in sdq]
    if method == "two_sided":
        return ""
    text = mean_and_error([kl[seed] - sdq[seed] for seed in seeds], 4)
    if not p_value or len(seeds) < 2:
        return text
    p = ttest_rel([kl[seed] for seed in seeds], [sdq[seed] for seed in seeds]).pvalue
    return f"{text}, p = {p:.2f}" if p >= 0.01 else f"{text}, p < 0.01"
