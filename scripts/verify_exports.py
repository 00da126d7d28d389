"""Export models to all targets, compare all of a test split with the integers, and keep the numbers in one file.

    python scripts/verify_exports.py --models runs/hardware/resnet20 runs/hardware/mobilenet \
        --dataset ../shared/data/fashion-mnist --folder runs/exports --out docs/results/exports.json

The models are in the hardware profile (`scripts/to_hardware.py`). Exports go to a folder for each model, with their proof;
the result file has what each verification.json says, the accuracy of the model before it was put in the profile and after
(its hardware.json), and the widths of its integers. A model that is in the file already is left out.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import datasets
import torch
from study_common import read

from sdq_hf import SDQForImageClassification
from sdq_hf.cli import EXPORT_TARGETS
from sdq_hf.export.artefacts import export_model
from sdq_hf.export.images import real_images
from sdq_hf.export.lower import integer_network
from sdq_hf.export.verify import CONTROLLED
from sdq_hf.writing import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of models in the hardware profile")
    parser.add_argument("--dataset", help="as in run_sdq.py; default: the bundled sample")
    parser.add_argument("--to", nargs="+", default=list(EXPORT_TARGETS))
    parser.add_argument("--images", type=int, help="test images; default: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/exports"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    content = read(options.out)
    for folder in [] if options.table else options.models:
        if any(cell["model"] == folder.name for cell in content["cells"]):
            continue
        content["hardware"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
        content["cells"].append(measure(options, folder))
        write_json(options.out, content)
    print(table(content["cells"]))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = SDQForImageClassification.from_pretrained(folder).eval()
    images, labels, calibration, classes = real_images(model, options.dataset, count=options.images)
    if len(classes) != model.config.num_labels:
        raise SystemExit(f"{folder}: the data has {len(classes)} classes, the model {model.config.num_labels}.")
    report = export_model(model, options.folder / folder.name, options.to, images, labels, calibration, say=print)
    network, profile = integer_network(model), folder / "hardware.json"
    return {
        "model": folder.name,
        "architecture": model.config.architecture,
        "bits": {name: layer.weight_bits for name, layer in model.strategy.items()},
        "average_bits": round(model.strategy.average_bits(), 3),
        "accumulator_bits": max(layer.sum_width for layer in network.layers.values()),
        "widest": max(node.width for node in network.nodes),
        "profile": json.loads(profile.read_text())["rows"] if profile.exists() else None,
        **report,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: each model and target, beside the integers."""
    lines = [
        "| model | computed by | test images | equal | top-1, % | made images | equal | see the changed weight |",
        "|" + "---|" * 8,
    ]
    for cell in cells:
        found: dict[str, dict[str, Any]] = {}
        for comparison in cell["comparisons"]:
            found.setdefault(comparison["what"], {})[comparison["images"]] = comparison
        for what, sets in found.items():
            real, made = sets["real"], sets["made"]
            seen = f"{real['differ_from_control']} of {min(CONTROLLED, real['count'])}"
            columns = (
                cell["model"],
                what,
                f"{real['count']:,}",
                _equal(real),
                f"{real['accuracy']:.2f}",
                made["count"],
            )
            lines.append("| " + " | ".join(str(column) for column in (*columns, _equal(made), seen)) + " |")
    return "\n".join(lines)


def profiles(cells: list[dict[str, Any]]) -> str:
    """Markdown: what the hardware profile does to the accuracy of each model, and the widths of its integers."""
    lines = [
        "| model | network | average bits | top-1 before, % | in the profile, % | trained there, % | accumulators, bits | "
        "widest tensor, bits |",
        "|" + "---|" * 8,
    ]
    for cell in cells:
        rows = cell["profile"] or {}
        tests = [
            f"{rows[name]['test']['top1']:.2f}" if name in rows else "" for name in ("before", "profile", "trained")
        ]
        if not rows:
            # Trained in the profile from the start.
            tests[2] = f"{cell['comparisons'][0]['accuracy']:.2f}"
        columns = [cell["model"], cell["architecture"], f"{cell['average_bits']:.2f}", *tests]
        lines.append(f"| {' | '.join(columns)} | {cell['accumulator_bits']} | {cell['widest']} |")
    return "\n".join(lines)


def _equal(comparison: dict[str, Any]) -> str:
    if comparison["equal"]:
        return "all"
    return f"no: first guess in {comparison['same_top1']:.2f} %, off by {comparison['max_difference']:.2g}"


if __name__ == "__main__":
    main()
