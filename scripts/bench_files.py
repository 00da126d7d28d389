"""File sizes, load times and load memory of packed models, beside the same networks in float.

    python scripts/bench_files.py --out docs/benchmarks/files.json

Mixed bits are 1 to 8 in turn, from the last layer to the first. A load runs from the saved folder to the first logits of one
image, imports left out; packed and float loads take turns in one process, CPU time, and the median of the ratios is given.
Peak memory is that of a load in a fresh process, above what it takes after the imports and a first load of a small model;
beside it what the packed file and the float network take together.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import transformers
from bench_memory import reset_peak, resident, trim
from safetensors.torch import load_file, save_file

from sdq_hf import SDQForImageClassification
from sdq_hf.writing import write_json

NETWORKS = (
    "resnet20_cifar:32",
    "resnet18:224",
    "resnet50:224",
    "mobilenetv2_100:224",
    "tf_efficientnet_lite0:224",
    "vit_tiny_patch16_224:224",
)
COLUMNS = {
    "network": "{}",
    "bits": "{}",
    "file, kB": "{:,.1f}",
    "ideal, kB": "{:,.1f}",
    "file / ideal": "{:.3f}",
    "float file / file": "{:.1f}",
    "load, s": "{:.2f}",
    "load / float load": "{:.2f}",
    "peak MB": "{:.1f}",
    "packed + float, MB": "{:.1f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="timm name:image size")
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4", "mixed"], help="1 to 8, or mixed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what a child process measures, and of what
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.child:
        print(memory_in_child(*options.child))
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    rows = []
    for network in options.networks:
        name, size = network.split(":")
        for bits in options.bits:
            rows.append(measure(name, int(size), bits, options.repeats))
            cells = [form.format(value) for form, value in zip(COLUMNS.values(), shown(rows[-1]), strict=True)]
            print(f"| {' | '.join(cells)} |", flush=True)
    if options.out:
        versions = {package: version(package) for package in ("torch", "timm", "transformers", "safetensors")}
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        write_json(options.out, {"rows": rows, "versions": versions, "hardware": hardware})


def measure(name: str, size: int, bits: str, repeats: int) -> dict[str, float | str]:
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=1000).eval()
    image = torch.randn(1, 3, size, size)
    model = SDQForImageClassification.from_float(source, name, img_size=size)
    names = reversed(model.strategy.searchable)
    model.set_strategy({n: 1 + i % 8 for i, n in enumerate(names)} if bits == "mixed" else int(bits))
    model.calibrate([image])
    with tempfile.TemporaryDirectory() as scratch:
        folder, floats = Path(scratch) / "packed", Path(scratch) / "float.safetensors"
        model.save_pretrained(folder, print_size=False)
        save_file(source.state_dict(), floats)
        loads = [
            (seconds(lambda: load_packed(folder, image)), seconds(lambda: load_float(name, floats, image)))
            for _ in range(repeats + 1)
        ][1:]
        file_bytes = (folder / "model.safetensors").stat().st_size
        peak, held = memory("peak", str(folder)), memory("held", name)
        return {
            "network": name,
            "bits": bits,
            "average_bits": model.strategy.average_bits(),
            "file_bytes": file_bytes,
            "ideal_bytes": model.ideal_bytes(),
            "float_bytes": floats.stat().st_size,
            "load_seconds": statistics.median(packed for packed, _ in loads),
            "load_ratio": statistics.median(packed / plain for packed, plain in loads),
            "peak_bytes": peak,
            "float_memory_bytes": held,
        }


def shown(row: dict) -> list[float | str]:
    return [
        row["network"],
        row["bits"],
        row["file_bytes"] / 1e3,
        row["ideal_bytes"] / 1e3,
        row["file_bytes"] / row["ideal_bytes"],
        row["float_bytes"] / row["file_bytes"],
        row["load_seconds"],
        row["load_ratio"],
        row["peak_bytes"] / 1e6,
        (row["file_bytes"] + row["float_memory_bytes"]) / 1e6,
    ]


@torch.no_grad()
def load_packed(folder: Path, image: torch.Tensor) -> None:
    SDQForImageClassification.from_pretrained(folder)(image)


@torch.no_grad()
def load_float(name: str, path: Path, image: torch.Tensor) -> None:
    network = timm.create_model(name, num_classes=1000)
    network.load_state_dict(load_file(path))
    network.eval()(image)


def seconds(run: Callable[[], object]) -> float:
    """CPU time of this process."""
    started = time.process_time()
    run()
    return time.process_time() - started


def memory(kind: str, of: str) -> int:
    """Bytes: "peak" of loading the folder `of`, or "held" by the float network `of`, in a fresh process."""
    child = [sys.executable, __file__, "--child", kind, of]
    return int(subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_in_child(kind: str, of: str) -> int:
    """How far the resident memory of this process grows, at most ("peak") or in the end ("held"). Linux only."""
    with tempfile.TemporaryDirectory() as scratch:
        small = SDQForImageClassification.from_timm("resnet8_cifar", img_size=32)
        small.calibrate([torch.randn(1, 3, 32, 32)])
        small.save_pretrained(scratch, print_size=False)
        SDQForImageClassification.from_pretrained(scratch)
    trim()
    before = resident()
    reset_peak()
    kept = SDQForImageClassification.from_pretrained(of) if kind == "peak" else timm.create_model(of, num_classes=1000)
    after = resident("VmHWM" if kind == "peak" else "VmRSS")
    del kept
    return after - before


if __name__ == "__main__":
    main()
