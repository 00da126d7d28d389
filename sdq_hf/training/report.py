"""The end of a run: test metrics, the table, results.json and the plots."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..hub.card import PICTURES, main_method
from ..modeling_sdq import SDQForImageClassification
from ..packed_files import weight_file_bytes
from ..strategy import FLOAT_BITS, Strategy
from ..writing import write_json, write_text
from .checkpoints import load_json
from .evaluation import evaluate
from .stages import Run

_PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets")


def report(run: Run, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Evaluate every packed model on the test split, loaded from its file, and write what the run has found.

    Returns the rows of the table, which are also in results.json under `rows`.
    """
    accelerator = run.accelerator
    rows = [_float_row(run), *(row_of(run, entry) for entry in entries)]
    if accelerator.is_main_process:
        arguments = run.recorded()
        results = {
            "rows": rows,
            "arguments": arguments.to_dict(),
            "command": arguments.command(accelerator.num_processes),
            "data": _about_data(run),
            "versions": {name: version(name) for name in _PACKAGES},
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
        }
        write_json(run.folder / "results.json", results)
        print("\n" + table(rows) + "\n")
        for picture in plot(run, entries, rows):
            print(f"Picture: {picture}")
        write_cards(run, entries, results)
        print(f"Results: {run.folder / 'results.json'}. Packed models with their cards: {run.folder / 'models'}")
    accelerator.wait_for_everyone()
    return rows


def row_of(run: Run, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the packed model of one strategy gets on the test split, loaded from its file, and what it costs."""
    folder, accelerator = run.folder / "models" / entry["name"], run.accelerator
    run.interrupt.check(accelerator)
    model = SDQForImageClassification.from_pretrained(folder)
    model = model.to(accelerator.device).to(memory_format=torch.channels_last)
    metrics = evaluate(model, run.loaders()["test"], accelerator, reference=run.network)
    tuned = load_json(run.folder / "finetune" / f"{entry['name']}.json")
    strategy = Strategy.from_json(entry["strategy"])
    return {
        "name": entry["name"],
        "method": entry["method"],
        "cost": entry["cost"],
        "budget": entry["budget"],
        **metrics,
        "average_bits": strategy.average_bits(),
        "average_bits_with_pinned": strategy.average_bits(include_pinned=True),
        "compression": strategy.compression(),
        "file_bytes": weight_file_bytes(folder),
        "ideal_bytes": model.ideal_bytes(),
        "bitops": strategy.bitops(),
        "search_seconds": entry["seconds"],
        "finetune_seconds": tuned["seconds"],
        "validation": tuned["validation"],
    }


def _float_row(run: Run) -> dict[str, Any]:
    path = run.folder / "teacher" / "model.safetensors"
    strategy = run.base.strategy
    trained = load_json(path.with_name("teacher.json"))
    return {
        "name": "full precision",
        "method": "float",
        "cost": "bits",
        "budget": FLOAT_BITS,
        **evaluate(run.network, run.loaders()["test"], run.accelerator, reference=run.network),
        "average_bits": float(FLOAT_BITS),
        "average_bits_with_pinned": float(FLOAT_BITS),
        "compression": 1.0,
        "file_bytes": path.stat().st_size,
        "ideal_bytes": path.stat().st_size,
        "bitops": sum(layer.macs for layer in strategy.values()) * FLOAT_BITS**2,
        "search_seconds": 0.0,
        "finetune_seconds": trained["seconds"],
        "validation": trained["validation"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text. Top-1 in percent, KL to the float network in nats per image, file size in kB."""
    head = ["", "top-1", "KL", "avg bits", "weights smaller", "file kB", "GBitOPs", "search s", "train s"]
    lines = [
        [
            row["name"],
            f"{row['top1']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['average_bits']:.2f}",
            f"{row['compression']:.1f}x",
            f"{row['file_bytes'] / 1e3:,.1f}",
            f"{row['bitops'] / 1e9:.4f}",
            f"{row['search_seconds']:.0f}",
            f"{row['finetune_seconds']:.0f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *lines]
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def plot(run: Run, entries: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the run's pictures, and return their paths."""
    from ..hub import plots

    folder = run.folder / "plots"
    logs = _descents(run, entries)
    main = main_method(entries)
    first = next(entry["name"] for entry in entries if entry["method"] == main)
    # A picture of equal bits says nothing, unless the run is about them.
    kept = [entry for entry in entries if entry["method"] != "uniform" or main == "uniform"]
    shown = {entry["name"]: Strategy.from_json(entry["strategy"]) for entry in kept}
    plots.plot_bits(shown, folder / "bits.png")
    if logs:
        plots.plot_descent(logs, folder / "descent.png")
    plots.plot_accuracy(rows, folder / "accuracy.png")
    # Drawn by the stage before, from the real weights, which the packed file has no more.
    shutil.copyfile(run.folder / "models" / first / "plots" / "weights.png", folder / "weights.png")
    return [folder / f"{name}.png" for name in PICTURES if logs or name != "descent"]


def write_cards(run: Run, entries: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> None:
    """Write README.md and its pictures into the folder of each packed model."""
    from ..hub import card, plots

    logs = _descents(run, entries)
    for entry in entries:
        folder = run.folder / "models" / entry["name"]
        model = SDQForImageClassification.from_pretrained(folder)
        plots.plot_bits({entry["name"]: model.strategy}, folder / "plots" / "bits.png")
        cost = entry["cost"]
        if entry["method"] == main_method(entries) and cost in logs:
            plots.plot_descent({cost: logs[cost]}, folder / "plots" / "descent.png")
        shutil.copyfile(run.folder / "plots" / "accuracy.png", folder / "plots" / "accuracy.png")
        text = card.create_card(model, folder, card.RunFacts(results, entry["name"]), run.arguments.run.hub_license)
        write_text(folder / "README.md", str(text))


def _descents(run: Run, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cost -> log of the run's search under it; none for a search that takes no steps."""
    main = main_method(entries)
    costs = dict.fromkeys(entry["cost"] for entry in entries if entry["method"] == main)
    paths = {cost: run.folder / "search" / f"{main}-{cost}.json" for cost in costs}
    logs = {cost: load_json(path) for cost, path in paths.items()}
    return {cost: log for cost, log in logs.items() if log["moves"]}


def _about_data(run: Run) -> dict[str, Any]:
    """Name of the data, its Hub id if it has one, and how many images each split has; of a stream's train nobody knows."""
    dataset, streaming = run.arguments.data.dataset, run.arguments.data.streaming
    local = dataset is not None and Path(dataset).exists()
    name = "a sample of Fashion-MNIST" if dataset is None else Path(dataset).resolve().name if local else dataset
    hub_id = "zalando-datasets/fashion_mnist" if dataset is None else None if local else dataset
    sizes = {f"{split}_images": _count(run, split) for split in run.data.splits if split != "train" or not streaming}
    return {"name": name, "hub_id": hub_id, **sizes}


def _count(run: Run, split: str) -> int:
    images: Any = run.data.splits[split]
    if not run.arguments.data.streaming:
        return len(images)
    # Without the images, which would be decoded.
    return sum(1 for _ in images.select_columns(run.data.label_column))
