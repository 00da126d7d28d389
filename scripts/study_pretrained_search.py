"""Which search finds the bits of real pretrained weights where nothing is trained?

    make pretrained-search

The photographs are those of study_pretrained.py, and so is the network with its ImageNet weights, unless `--network` asks for
another one. One half of the photographs, five crops each, is searched with and calibrates activations of 8 bits; the network
at the bits found is judged by the other half, and the other way round. All searches start at 8 bits; one descent serves all
budgets. As nothing is trained afterwards, SDQ's search leaves the weights as they are (`weight_lr=0`), and batch norm has its
running statistics (`batch_norm="running"`).

Measured is the KL divergence from the float network, and how often the first guess is the float network's. The photographs
are few, and say nothing about accuracy on ImageNet.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from study_common import read
from study_pretrained import ARCHITECTURE, PACKAGES, crops, nearness, photographs, pretrained_network
from torch import Tensor, nn

from sdq_hf import SDQForImageClassification
from sdq_hf.costs import get_cost
from sdq_hf.search import SearchLog, search
from sdq_hf.strategy import Strategy
from sdq_hf.writing import write_json

# Row -> method, and what it is called with beyond that. The measured ones look at each crop of a half once, not at 512
# images; "hawq_40" draws five times as many signs as by default.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("two_sided", "greedy", "size", "uniform")},
    "table": ("table", {"images": 70}),
    "hawq": ("hawq", {"images": 70}),
    "hawq_40": ("hawq", {"images": 70, "probes": 40}),
}


class Crops:
    """Batches of a half's crops in another order in each epoch, every second batch mirrored."""

    def __init__(self, images: Tensor, batch_size: int):
        self.images, self.batch_size, self.epoch = images, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        for number, rows in enumerate(order.split(self.batch_size)):
            yield self.images[rows].flip(-1) if (self.epoch + number) % 2 else self.images[rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default=ARCHITECTURE, choices=list(PACKAGES))
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--cost", choices=["bits", "bitops"], default="bits")
    parser.add_argument("--targets", type=float, nargs="+", default=[6, 5, 4], help="budgets: the cost of so many bits")
    parser.add_argument("--scale", choices=["layer", "channel"], default="layer")
    parser.add_argument("--halves", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch_size", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("docs/results/pretrained-search.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    if not options.table:
        run(options)
    print(table(read(options.out)["cells"]))


def run(options: argparse.Namespace) -> None:
    network = pretrained_network(options.network)
    views = torch.stack([crops(path, options.network) for path in photographs()])
    with torch.no_grad():
        target = torch.stack([network(batch) for batch in views])
    for half in options.halves:
        seen = views[1 - half :: 2].flatten(0, 1)
        for method in options.methods:
            key = {
                "network": options.network,
                "half": half,
                "method": method,
                "cost": options.cost,
                "scale": options.scale,
            }
            known = read(options.out)["cells"]
            targets = [t for t in options.targets if not any({**key, "target": t}.items() <= c.items() for c in known)]
            if not targets:
                continue
            model, started = quantized(network, options.network, options.scale), time.process_time()
            cost, log, (name, more) = get_cost(options.cost), SearchLog(), ROWS[method]
            found = search(
                model,
                Crops(seen, options.batch_size),
                [cost.of_uniform(model.strategy, target) for target in targets],
                cost,
                name,
                start_bits=8,
                weight_lr=0.0,
                batch_norm="running",
                log=log,
                accelerator=Accelerator(cpu=True),
                **more,
            )
            about = {"cpu_seconds": round(time.process_time() - started, 1), "batches": log.batches}
            for number, strategy in zip(targets, found, strict=True):
                cell = {**key, "target": number, **judge(network, strategy, seen, views[half::2], target[half::2], key)}
                content = read(options.out)
                content["cells"].append({**cell, **about})
                content["versions"] = {package: version(package) for package in ("torch", "timm")}
                content["hardware"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
                write_json(options.out, content)
                print({key: value for key, value in cell.items() if key != "bits"}, flush=True)


def quantized(network: nn.Module, architecture: str, scale: str) -> SDQForImageClassification:
    return SDQForImageClassification.from_float(network, architecture, activation_bits=8, weight_scale=scale)


@torch.no_grad()
def judge(
    network: nn.Module, strategy: Strategy, seen: Tensor, views: Tensor, target: Tensor, key: dict[str, Any]
) -> dict[str, Any]:
    """The network at the bits of `strategy`, calibrated with `seen`, beside its logits in float on `views`.

    seen: [M, 3, H, W]; views: [N, 5, 3, H, W]; target: [N, 5, classes].
    """
    model = quantized(network, key["network"], key["scale"]).eval()
    model.set_strategy(strategy)
    model.calibrate([seen])
    logits = torch.stack([model(batch).logits for batch in views])
    return {
        **nearness(logits, target),
        "average_bits": strategy.average_bits(),
        "bitops": strategy.bitops(),
        "weight_bytes": strategy.weight_bytes(),
        "bits": [strategy[name].weight_bits for name in strategy.searchable],
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: KL divergence and first guesses of each method at each budget, for both halves."""
    lines = [
        "| network | a scale for each | budget | search | KL, nats | same top-1, of both halves | average bits | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["network"], cell["scale"], cell["cost"], -cell["target"], cell["method"]), []).append(
            cell
        )
    ranked = sorted(
        groups.items(),
        key=lambda g: (g[0][0], g[0][1] == "channel", *g[0][2:4], statistics.fmean(c["kl"] for c in g[1])),
    )
    for (network, scale, cost, target, method), members in ranked:
        members = sorted(members, key=lambda cell: cell["half"])
        same, of = (sum(cell[key] for cell in members) for key in ("same", "views"))
        unit = "average bits" if cost == "bits" else "bits' BitOPs"
        average, seconds = (statistics.fmean(cell[key] for cell in members) for key in ("average_bits", "cpu_seconds"))
        kl = ", ".join(f"{cell['kl']:.3f}" for cell in members)
        name = network.removeprefix("tf_efficientnet_")
        lines.append(
            f"| {name} | {scale} | {-target:g} {unit} | {method} | {kl} | {same} of {of} ({same / of:.1%}) | "
            f"{average:.2f} | {seconds:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
