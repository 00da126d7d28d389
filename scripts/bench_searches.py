"""Time and peak memory of each search, and how they grow with the number of layers.

    python scripts/bench_searches.py --out docs/results/searches.json

Every search runs in a process of its own, on synthetic images and a network with random weights, down to the BitOPs of
uniform 2 bits. Its CPU time is given in training steps: divided by that of one float training step on a batch of the same
size in the same process. Memory is the peak of the process above what it had with the network loaded; the rows "float" are
such training steps alone, and "two_sided_frozen" is SDQ whose weights stay what they are while it searches.

Parts: all searches on one network; SDQ and the table on networks of growing depth; and one batch of SDQ beside one entry
of the table on a large network, from which the cost of a whole table follows.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from bench_memory import reset_peak, resident, trim

from sdq_hf import SDQForImageClassification
from sdq_hf.search import METHODS, SearchLog, SearchState, search
from sdq_hf.writing import write_json

FROZEN = "two_sided_frozen"


class Enough(Exception):
    """Raised after as many batches as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenetv1_025_cifar", help="network of the first part")
    parser.add_argument(
        "--depths", nargs="*", default=["resnet8_cifar", "resnet20_cifar", "resnet32_cifar", "resnet56_cifar"]
    )
    parser.add_argument("--large", default="resnet50", help="network of the last part")
    parser.add_argument("--img_size", type=int, default=28)
    parser.add_argument("--large_img_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT", json.dumps(one(**json.loads(options.one))))
        return
    content = json.loads(options.out.read_text()) if options.out.exists() else {"cells": []}
    small = {"img_size": options.img_size, "batch_size": options.batch_size, "batches": 0}
    jobs = [
        {"part": "methods", "model": options.model, "method": method, **small} for method in ("float", *METHODS, FROZEN)
    ]
    jobs += [
        {"part": "depth", "model": model, "method": method, **small}
        for model in options.depths
        for method in ("float", "two_sided", FROZEN, "table")
    ]
    large = {"img_size": options.large_img_size, "batch_size": options.batch_size, "batches": 20}
    jobs += [
        {"part": "large", "model": options.large, "method": m, **large} for m in ("float", "two_sided", FROZEN, "table")
    ]
    for job in [] if options.table else jobs:
        if any(job.items() <= cell.items() for cell in content["cells"]):
            continue
        child = [sys.executable, __file__, "--out", str(options.out), "--one", json.dumps(job)]
        done = subprocess.run(child, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(found[0].removeprefix("RESULT ")) if found else {"error": done.stderr.strip()[-300:]}
        content["cells"].append({**job, **result})
        content["cells"].sort(
            key=lambda cell: next((i for i, j in enumerate(jobs) if j.items() <= cell.items()), len(jobs))
        )
        content |= {
            "versions": {name: version(name) for name in ("torch", "timm", "scipy")},
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        write_json(options.out, content)
        print({**job, **result}, flush=True)
    print(table(content["cells"]))


def one(part: str, model: str, method: str, img_size: int, batch_size: int, batches: int) -> dict[str, Any]:
    """Measure one search; `batches` > 0: stop after so many (or after so many entries of a table)."""
    torch.manual_seed(0)
    network = SDQForImageClassification.from_timm(model, num_labels=10, img_size=img_size)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = [
        {"pixel_values": torch.randn(batch_size, 3, img_size, img_size).to(memory_format=torch.channels_last)}
        for _ in range(8)
    ]
    network.set_strategy(6)
    network.calibrate(data, num_batches=1)
    trim()
    reset_peak()
    loaded = resident()
    log = SearchLog()
    budget = float(network.strategy.with_bits(2).bitops())

    def stop(state: SearchState) -> None:
        if batches and state.batch >= batches:
            raise Enough

    options: dict[str, Any] = {"max_batches": 3000}
    if method == "table" and batches:
        options["images"] = batch_size
    if method == FROZEN:
        method, options["weight_lr"] = "two_sided", 0.0
    started = time.process_time()
    result: dict[str, Any] = {"layers": len(network.strategy.searchable)}
    accelerator = Accelerator(cpu=True)
    try:
        if method != "float":
            search(network, data, [budget], "bitops", method, log=log, on_step=stop, accelerator=accelerator, **options)
    except Enough:
        pass
    except ValueError as error:
        result["error"] = str(error)
    seconds, peak = time.process_time() - started, resident("VmHWM")
    step = float_step(network, data[0]["pixel_values"])
    peak = resident("VmHWM") if method == "float" else peak
    return {
        **result,
        "seconds": round(step if method == "float" else seconds, 3),
        "steps": 1.0 if method == "float" else round(seconds / step, 1),
        "search_batches": log.batches,
        "forward_images": log.forward_images,
        "backward_images": log.backward_images,
        "memory_mb": round((peak - loaded) / 1e6, 1),
    }


def float_step(model: SDQForImageClassification, images: torch.Tensor, repeats: int = 5) -> float:
    """CPU seconds (the least of `repeats`) of one AdamW step of the float network."""
    network = model.float_twin().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    labels = torch.zeros(len(images), dtype=torch.long)
    times = []
    for _ in range(repeats):
        started = time.process_time()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - started)
    return min(times)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: cost of each search in float training steps, and its memory beyond that of the loaded network."""
    lines = [
        "| part | network | layers | search | batches | images forward / with backward | CPU s | float steps | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if "seconds" not in cell:
            continue
        lines.append(
            f"| {cell['part']} | {cell['model']} | {cell['layers']} | {cell['method']} | {cell['search_batches']} | "
            f"{cell['forward_images']:,} / {cell['backward_images']:,} | {cell['seconds']:.1f} | {cell['steps']:,.0f} | "
            f"{cell['memory_mb']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
