"""hls4ml projects of whole networks beside the integers: compiled with g++, run on real images, compared by equality.

    python scripts/verify_hls.py runs/hw/resnet20 runs/hw/mobilenet --dataset DATA --out docs/results/hls.json

Models must be in the hardware profile (scripts/to_hardware.py makes them so). The control is the network with the sign of one
weight changed: a comparison that calls it equal too would compare nothing. Times are CPU time. The file is written after each
network; one that stands there with the same integers is not done again.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from sdq_hf import SDQForImageClassification
from sdq_hf.checkpoint import digest
from sdq_hf.export.graph import IntegerNetwork
from sdq_hf.export.hls import Emulation, HLSOptions, export_hls
from sdq_hf.export.images import real_images
from sdq_hf.export.lower import integer_network
from sdq_hf.export.manifest import integers, versions
from sdq_hf.export.verify import cases, compare, with_one_weight_changed
from sdq_hf.writing import write_json

COLUMNS = {
    "network": "{}",
    "image": "{}",
    "layers": "{}",
    "weights": "{:,}",
    "accumulator bits": "{}",
    "reuse factor": "{}",
    "compile, s": "{:.0f}",
    "compile, GB": "{:.2f}",
    "real images": "{}",
    "equal": "{}",
    "made images equal": "{}",
    "differ from control": "{}",
    "an image, s": "{:.3f}",
}
_HEAD = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders of models in the hardware profile")
    parser.add_argument("--dataset", help="of the real images, as in run_sdq.py; default: the bundled sample")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--reuse-factor", type=int, default=1, help="above 1: hls4ml's strategy Resource")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a compiler, wall clock")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())["rows"]
    print(_HEAD)
    for folder in options.models:
        model = SDQForImageClassification.from_pretrained(folder).eval()
        network = integer_network(model)
        known = {
            "network": network.architecture,
            "integers": digest(integers(network)).hex()[:16],
            "reuse factor": options.reuse_factor,
        }
        done = [row for row in rows if known.items() <= row.items() and row["real images"] >= options.images]
        if done:
            row = done[0]
        else:
            row = known | measure(network, real_images(model, options.dataset, count=options.images).images, options)
            rows = [old for old in rows if not known.items() <= old.items()] + [row]
            if options.out:
                command = "python scripts/verify_hls.py MODELS --dataset DATA --out FILE"
                write_json(options.out, {"command": command, "versions": versions(), "rows": rows})
        print(_line(row), flush=True)
    return 0 if all(row["equal"] and row["made images equal"] and row["differ from control"] for row in rows) else 1


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each network and reuse factor."""
    return "\n".join([_HEAD, *(_line(row) for row in rows)])


def _line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(form.format(row[key]) for key, form in COLUMNS.items()) + " |"


def measure(network: IntegerNetwork, images: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        export_hls(network, Path(folder) / "project", HLSOptions(options.reuse_factor))
        emulation = Emulation(Path(folder) / "project", network, options.timeout)
    control, _ = with_one_weight_changed(network, images)
    sets = cases(network, control, images)
    start = time.process_time()
    found = {case.name: compare("hls4ml", emulation, case) for case in sets}
    seconds = time.process_time() - start
    layers = network.layers.values()
    return {
        "image": "x".join(map(str, network.input_size)),
        "layers": len(layers),
        "weights": sum(layer.weight.numel() for layer in layers),
        "accumulator bits": max(layer.width for layer in layers),
        "compile, s": emulation.seconds,
        "compile, GB": emulation.peak_bytes / 1e9,
        "real images": found["real"].count,
        "equal": found["real"].equal,
        "made images equal": found["made"].equal,
        "differ from control": found["real"].differ_from_control,
        "an image, s": seconds / sum(comparison.count for comparison in found.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
