"""File sizes and reload times of packed models.

    python scripts/bench_files.py --out docs/benchmarks/files.json

The load time runs from `from_pretrained` to the first logits of one image, imports left out; the median of five.
"""

import argparse
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from sdq_hf import SDQForImageClassification
from sdq_hf.training.stages import write_json

NETWORKS = ("resnet20_cifar:32", "resnet18:224", "mobilenetv2_100:224")
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="timm name:image size")
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print("| network | bits | file, kB | ideal, kB | file / ideal | float file / file | load, s | float load, s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for network in options.networks:
        name, size = network.split(":")
        torch.manual_seed(0)
        source = timm.create_model(name).eval()
        image = torch.randn(1, 3, int(size), int(size))
        model = SDQForImageClassification.from_float(source, name, img_size=int(size))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.safetensors"
            save_file(source.state_dict(), path)
            float_bytes = path.stat().st_size
            float_seconds = statistics.median(_load_float(name, path, image) for _ in range(REPEATS))
        for bits in options.bits:
            model.set_strategy(bits)
            model.calibrate([image])
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                row = {
                    "network": name,
                    "bits": bits,
                    "file_bytes": (Path(folder) / "model.safetensors").stat().st_size,
                    "ideal_bytes": model.ideal_bytes(),
                    "float_bytes": float_bytes,
                    "load_seconds": statistics.median(_load(folder, image) for _ in range(REPEATS)),
                    "float_load_seconds": float_seconds,
                }
            rows.append(row)
            print(
                f"| {name} | {bits} | {row['file_bytes'] / 1e3:,.1f} | {row['ideal_bytes'] / 1e3:,.1f} "
                f"| {row['file_bytes'] / row['ideal_bytes']:.3f} | {float_bytes / row['file_bytes']:.1f} "
                f"| {row['load_seconds']:.2f} | {float_seconds:.2f} |",
                flush=True,
            )
    if options.out:
        versions = {package: version(package) for package in ("torch", "timm", "transformers")}
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        write_json(options.out, {"rows": rows, "versions": versions, "hardware": hardware})


@torch.no_grad()
def _load(folder: str, image: torch.Tensor) -> float:
    started = time.perf_counter()
    SDQForImageClassification.from_pretrained(folder)(image)
    return time.perf_counter() - started


@torch.no_grad()
def _load_float(name: str, path: Path, image: torch.Tensor) -> float:
    started = time.perf_counter()
    network = timm.create_model(name)
    network.load_state_dict(load_file(path))
    network.eval()(image)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
