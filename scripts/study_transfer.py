"""Study G: pretrained ImageNet weights, moved to a small colour data set, searched and fine-tuned.

    make transfer

The network is EfficientNet-Lite0 with the weights of study_pretrained.py and a new head. The data are emoji of 64 pixels,
each as Noto and as Twemoji draw it, which the npm packages `emoji-datasource-google` and `emoji-datasource-twitter` ship; the
classes are Unicode's nine groups. Other skin tones, and joined emoji such as a woman who runs, are near copies and left out.
Both drawings of an emoji are in the same split.

The float network is trained from the pretrained weights as a user would do it, with `--pretrained_path` of run_sdq.py. All
rows are fine-tuned equally long. One descent serves all budgets of a search, and its time is its own column: what it looks at
is not taken off the fine-tune, which it would use up on so few images. The test split is read once for each row.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from study_common import Cell, add_options, as_found, mean_and_error, read, train_float, tuned, work
from study_pretrained import ARCHITECTURE, pretrained_network

from sdq_hf.costs import get_cost
from sdq_hf.strategy import FLOAT_BITS
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.stages import Run
from sdq_hf.writing import remove, save_tensors, writing

DRAWINGS = ("google", "twitter")
SHARES = {"test": 0.25, "validation": 0.15}
JOINER = "200D"  # the code point between joined emoji
# Around an emoji, in pixels: timm's evaluation of this network cuts an eighth off an image.
MARGIN = 4
# (method, cost, target): the rest is left to time, so these come in the order of their worth.
ROWS = (
    ("uniform", "bits", 8.0),
    ("uniform", "bits", 4.0),
    ("uniform", "bits", 3.0),
    ("two_sided", "bitops", 3.0),
    ("uniform", "bits", 2.0),
    ("two_sided", "bitops", 2.0),
    ("greedy", "bitops", 3.0),
    ("greedy", "bitops", 2.0),
)
FIELDS = ("seed", "method", "cost", "target", "activation_bits", "weight_scale", "epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--emoji", type=Path, default=Path(".venv-pretrained/node_modules"), help="of the two packages")
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)), help="numbers of those to measure")
    parser.add_argument("--float_lr", type=float, default=1e-3, help="of the float network's training, at its peak")
    parser.set_defaults(model=ARCHITECTURE, img_size=80, batch_size=32, search_batch_size=16, activation_bits=8)
    parser.set_defaults(seeds=[0], teacher_epochs=8, epochs=2, lr=1e-3)
    options = parser.parse_args()
    if not options.table:
        options.dataset, weights = options.runs / "emoji", options.runs / f"{options.model}.safetensors"
        if not options.dataset.exists():
            write_images(options.emoji, options.dataset)
        if not weights.exists():
            save_tensors(pretrained_network().state_dict(), weights)
        options.float_options = {"pretrained_path": weights, "teacher_opt": "adamw", "teacher_lr": options.float_lr}
        work(options, cells(options), FIELDS, lambda run, cell: measure(options, run, cell))
    print(table(read(options.out)["cells"]))


def write_images(packages: Path, folder: Path) -> None:
    """An image folder with files such as `train/food/google-1f34e.png`: each emoji on white."""
    emoji = json.loads((packages / f"emoji-datasource-{DRAWINGS[0]}" / "emoji.json").read_text())
    beside = folder.with_name(f".{folder.name}.new")
    remove(beside)
    with writing(beside):
        for split, members in splits(emoji).items():
            for label, file in members:
                (beside / split / label).mkdir(parents=True, exist_ok=True)
                for drawing in DRAWINGS:
                    source = packages / f"emoji-datasource-{drawing}" / "img" / drawing / "64" / file
                    on_white(Image.open(source)).save(beside / split / label / f"{drawing}-{file}")
        os.replace(beside, folder)


def splits(emoji: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Split -> [(class, image file)]: the same shares of each class, drawn by the hash of the file's name."""
    groups: dict[str, list[str]] = {}
    for entry in emoji:
        drawn = all(entry[f"has_img_{drawing}"] for drawing in DRAWINGS)
        if drawn and entry["category"] != "Component" and JOINER not in entry["unified"].split("-"):
            groups.setdefault(entry["category"].split()[0].lower(), []).append(entry["image"])
    found: dict[str, list[tuple[str, str]]] = {"train": [], **{split: [] for split in SHARES}}
    for label, files in sorted(groups.items()):
        files.sort(key=lambda file: sha256(file.encode()).digest())
        start = 0
        for split, share in SHARES.items():
            stop = start + round(share * len(files))
            found[split] += [(label, file) for file in files[start:stop]]
            start = stop
        found["train"] += [(label, file) for file in files[start:]]
    return found


def on_white(emoji: Image.Image) -> Image.Image:
    """A picture with transparent places on a white one, with a margin all around."""
    emoji = emoji.convert("RGBA")
    canvas = Image.new("RGBA", (emoji.width + 2 * MARGIN, emoji.height + 2 * MARGIN), "white")
    canvas.alpha_composite(emoji, (MARGIN, MARGIN))
    return canvas.convert("RGB")


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        yield dict(zip(FIELDS, (seed, "float", "float", float(FLOAT_BITS), FLOAT_BITS, "float", 0), strict=True))
        for number in options.rows:
            kind = (options.activation_bits, options.weight_scale, options.epochs)
            yield dict(zip(FIELDS, (seed, *ROWS[number], *kind), strict=True))


def float_row(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    """The float network itself."""
    network = train_float(options, cell["seed"], options.teacher_epochs)
    test, validation = (
        evaluate(run.network, run.loaders()[split], run.accelerator, reference=run.network)
        for split in ("test", "validation")
    )
    return {
        **test,
        "validation": validation,
        "average_bits": float(FLOAT_BITS),
        "bitops": sum(layer.macs for layer in run.base.strategy.values()) * FLOAT_BITS**2,
        "file_bytes": network.stat().st_size,
        "finetune_seconds": json.loads(network.with_name("teacher.json").read_text())["seconds"],
    }


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    """Fine-tune at the bits that one descent of the method found for its budgets, and read the test split."""
    method, cost, target = cell["method"], cell["cost"], cell["target"]
    if method == "float":
        return float_row(options, run, cell)
    targets = [t for m, c, t in ROWS if (m, c) == (method, cost)]
    budgets = targets if cost == "bits" else [get_cost(cost).of_uniform(run.base.strategy, t) for t in targets]
    # Made by the first of its cells, and read by the others.
    strategies, seconds, log = run.search_one(f"{method}-{cost}", budgets, cost, method)
    strategy = strategies[targets.index(target)]
    about = {"method": method, "cost": cost, "budget": budgets[targets.index(target)], "seconds": seconds}
    return {
        **tuned(run, f"{method}-{cost}-{target:g}-{options.epochs:g}", strategy, about, options.epochs),
        "found": as_found(run, strategy),
        "search_images": log.backward_images,
        "search_seconds": round(seconds, 1),
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each kind of cell, in their order in the file; mean over seeds and its standard error."""
    lines = [
        "| weights | activation bits | a scale for each | epochs | test top-1, % | test KL, nats | "
        "validation KL before training | average bits | file, kB | MBitOPs | seconds: search, training | seeds |",
        "|" + "---|" * 12,
    ]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in found:
        if "error" not in cell:
            groups.setdefault(tuple(cell[field] for field in FIELDS[1:]), []).append(cell)

    def mean(values: Iterable[float], digits: int) -> str:
        return f"{statistics.fmean(values):,.{digits}f}"

    for (method, cost, target, activation_bits, scale, epochs), members in groups.items():
        is_float = method == "float"
        budget = {"float": "", "bits": f" {target:g}", "bitops": f" at {target:g} bits' BitOPs"}[cost]
        columns = [
            method + budget,
            "float" if is_float else activation_bits,
            "" if is_float else scale,
            "" if is_float else f"{epochs:g}",
            mean_and_error([cell["top1"] for cell in members], 2),
            mean_and_error([cell["kl"] for cell in members], 4),
            "" if is_float else mean_and_error([cell["found"]["kl"] for cell in members], 3),
            mean((cell["average_bits"] for cell in members), 2),
            mean((cell["file_bytes"] / 1e3 for cell in members), 0),
            mean((cell["bitops"] / 1e6 for cell in members), 0),
            f"{mean((cell.get('search_seconds', 0) for cell in members), 0)}, "
            f"{mean((cell['finetune_seconds'] for cell in members), 0)}",
            len(members),
        ]
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
