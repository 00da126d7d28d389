"""CPU or GPU time and peak memory of a search step and a fine-tune step, against a float training step.

    python scripts/bench.py --out docs/benchmarks/steps.json
    python scripts/bench.py --networks resnet20_cifar:32:128 --rounds 5
    python scripts/bench.py --device cuda --networks resnet18:224:128 mobilenetv2_100:224:128 --mixed_precision bf16 \
        --torch_compile --ddp

All kinds of steps take turns in one process; the ratio to the float step of the same turn is taken, and its median over the
turns is given, so a machine that slows down now and then does no harm. The search step is the library's own, step-downs
included. The teacher's forward pass is counted apart. With Brevitas installed, its 4-bit QAT of the same network takes part.
Peak memory is measured in one child process for each kind of step. With --torch_compile all but the search is compiled, with
--ddp the trained networks are wrapped in DistributedDataParallel with one rank.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from bench_memory import reset_peak, resident
from torch import Tensor, nn

from sdq_hf import SDQForImageClassification
from sdq_hf.search import SearchState, search
from sdq_hf.training.losses import distillation
from sdq_hf.training.optim import OptimizerArguments, create_optimizer
from sdq_hf.writing import write_json

NETWORKS = ("resnet20_cifar:32:128", "resnet18:128:16", "mobilenetv2_100:128:16")
KINDS = ("float", "finetune", "search", "teacher", "brevitas")


@dataclass(frozen=True)
class Machine:
    """What is measured on, and what is turned on there."""

    device: str = "cpu"
    mixed_precision: str = "no"
    torch_compile: bool = False
    ddp: bool = False
    threads: int = 1

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def options(self) -> list[str]:
        """As options of this script."""
        flags = [f"--{name}" for name in ("torch_compile", "ddp") if getattr(self, name)]
        values = ("device", "mixed_precision", "threads")
        return [*flags, *(part for name in values for part in (f"--{name}", str(getattr(self, name))))]


class Stop(Exception):
    """Ends a search from its own callback."""


class Fixed(nn.Module):
    """A teacher whose logits are known, so that its forward pass costs nothing."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


class Bench:
    """One network's steps. `network` is "timm name:image size:batch size"."""

    def __init__(self, network: str, machine: Machine):
        name, size, batch = network.split(":")
        self.machine, self.device = machine, torch.device(machine.device)
        self.accelerator = Accelerator(cpu=not machine.is_cuda, mixed_precision=machine.mixed_precision)
        torch.manual_seed(0)
        self.network = timm.create_model(name, num_classes=10).to(self.device).to(memory_format=torch.channels_last)
        self.name, self.size = name, int(size)
        images = torch.randn(int(batch), 3, int(size), int(size), device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (int(batch),), device=self.device)
        with torch.no_grad():
            self.target = self.network.eval()(self.images)

    def quantized(self) -> SDQForImageClassification:
        model = SDQForImageClassification.from_float(self.network, self.name, img_size=self.size)
        model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.set_strategy(4)
        model.calibrate([self.images])
        return model

    def training(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
        optimizer = create_optimizer(model.train(), OptimizerArguments(opt="sgd", lr=1e-4))
        model = self.prepared(model)

        def step() -> None:
            with self.accelerator.autocast():
                value = loss(model)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def prepared(self, model: nn.Module) -> nn.Module:
        if self.machine.ddp:
            model = nn.parallel.DistributedDataParallel(model, device_ids=[0] if self.machine.is_cuda else None)
        return cast(nn.Module, torch.compile(model)) if self.machine.torch_compile else model

    def step(self, kind: str) -> Callable[[], None]:
        """A step of every kind but "search", which runs by itself."""
        if kind == "float":
            return self.training(self.network, lambda m: F.cross_entropy(m(self.images), self.labels))
        if kind == "finetune":
            return self.training(self.quantized(), lambda m: distillation(m(self.images).logits, self.target))
        if kind == "brevitas":
            return self.training(brevitas_twin(self.network), lambda m: F.cross_entropy(m(self.images), self.labels))
        teacher = timm.create_model(self.name, num_classes=10).to(self.device)
        teacher = teacher.to(memory_format=torch.channels_last).eval()
        teacher = cast(nn.Module, torch.compile(teacher)) if self.machine.torch_compile else teacher

        @torch.no_grad()
        def forward() -> None:
            with self.accelerator.autocast():
                teacher(self.images)

        return forward

    def search(self, on_step: Callable[[SearchState], None]) -> None:
        """The library's search on one batch again and again, until `on_step` raises `Stop`."""
        data = [{"pixel_values": self.images}]
        with suppress(Stop):
            search(
                self.quantized(),
                data,
                [1.5],
                teacher=Fixed(self.target),
                accelerator=self.accelerator,
                on_step=on_step,
            )


def now(machine: Machine) -> float:
    """CPU time of this process; wall time on a GPU, after what was sent there is done."""
    if not machine.is_cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def times(network: str, kinds: list[str], rounds: int, machine: Machine) -> dict[str, list[float]]:
    """Seconds of each kind of step, `rounds` turns, the first two thrown away."""
    bench = Bench(network, machine)
    steps = {kind: bench.step(kind) for kind in kinds if kind != "search"}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    begin = [now(machine)]

    def turn(state: SearchState | None = None) -> None:
        if state is not None:
            found["search"].append(now(machine) - begin[0])
        for kind, step in steps.items():
            started = now(machine)
            step()
            found[kind].append(now(machine) - started)
        if len(found["float"]) == rounds + 2:
            raise Stop
        begin[0] = now(machine)

    if "search" in kinds:
        bench.search(turn)
    else:
        with suppress(Stop):
            while True:
                turn()
    return {kind: values[2:] for kind, values in found.items()}


def peak_memory(network: str, kind: str, machine: Machine) -> int:
    """Bytes that a step of `kind` takes at its peak, model and optimizer included, in this (fresh) process."""
    bench = Bench(network, machine)
    before = torch.cuda.memory_allocated() if machine.is_cuda else resident()
    if kind == "search":
        count = [0]

        def third(state: SearchState) -> None:
            count[0] += 1
            if count[0] == 2:
                _reset_peak(machine)
            if count[0] == 4:
                raise Stop

        bench.search(third)
    else:
        step = bench.step(kind)
        for _ in range(2):
            step()
        _reset_peak(machine)
        step()
    return (torch.cuda.max_memory_allocated() if machine.is_cuda else resident("VmHWM")) - before


def _reset_peak(machine: Machine) -> None:
    if machine.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def brevitas_twin(network: nn.Module) -> nn.Module:
    """The network with Brevitas' 4-bit weights and activations on each conv and linear layer but the first and last."""
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat

    twin = copy.deepcopy(network)
    layers = [(n, m) for n, m in twin.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for i, (name, old) in enumerate(layers):
        bits = 8 if i in (0, len(layers) - 1) else 4
        options = {
            "bias": old.bias is not None,
            "weight_bit_width": bits,
            "input_quant": Int8ActPerTensorFloat,
            "input_bit_width": bits,
            # Percentiles are gathered in the first step only, so that its learned scale is what is measured.
            "input_collect_stats_steps": 1,
        }
        new: nn.Module
        if isinstance(old, nn.Conv2d):
            geometry = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups")}
            new = QuantConv2d(old.in_channels, old.out_channels, old.kernel_size, **geometry, **options)
        else:
            new = QuantLinear(old.in_features, old.out_features, **options)
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, new)
    return twin.to(next(network.parameters()).device).to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="timm name:image size:batch size")
    parser.add_argument("--steps", nargs="+", choices=KINDS[1:], default=list(KINDS[1:]), help="beside the float step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--ddp", action="store_true", help="DistributedDataParallel with one rank")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=KINDS, help="only print the peak memory of this kind, in bytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = Machine(options.device, options.mixed_precision, options.torch_compile, options.ddp, options.threads)
    if machine.ddp:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if machine.is_cuda else "gloo", store=store, rank=0, world_size=1)
    if options.memory:
        print(peak_memory(options.networks[0], options.memory, machine))
        return
    kinds = ["float", *(kind for kind in options.steps if kind != "brevitas" or find_spec("brevitas"))]
    versions = {name: version(name) for name in ("torch", "timm", *(["brevitas"] if "brevitas" in kinds else []))}
    hardware = (
        torch.cuda.get_device_name() if machine.is_cuda else f"{platform.machine()} CPU, {options.threads} threads"
    )
    print(f"{hardware}; {versions}\n")
    print("| network | step | time / float | spread | images/s | float step, ms | memory / float | float memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        found = times(network, kinds, options.rounds, machine)
        memory = {kind: _memory_in_child(network, kind, machine) for kind in kinds}
        for kind in kinds[1:]:
            ratios = [a / b for a, b in zip(found[kind], found["float"], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            row = {
                "network": network,
                "step": kind,
                "time_ratio": statistics.median(ratios),
                "time_quartiles": [quartiles[0], quartiles[2]],
                "images_per_second": int(network.split(":")[2]) / statistics.median(found[kind]),
                "float_seconds": statistics.median(found["float"]),
                "memory_ratio": memory[kind] / memory["float"],
                "float_bytes": memory["float"],
            }
            rows.append(row)
            print(
                f"| {network} | {kind} | {row['time_ratio']:.2f} | {quartiles[0]:.2f}-{quartiles[2]:.2f} "
                f"| {row['images_per_second']:,.0f} "
                f"| {1e3 * row['float_seconds']:.0f} | {row['memory_ratio']:.2f} | {memory['float'] / 1e6:.0f} |",
                flush=True,
            )
    if options.out:
        facts = {"rows": rows, "rounds": options.rounds, "versions": versions, "hardware": hardware}
        write_json(options.out, {**facts, **asdict(machine)})


def _memory_in_child(network: str, kind: str, machine: Machine) -> int:
    command = [sys.executable, __file__, "--networks", network, "--memory", kind, *machine.options()]
    # Freed blocks go back to the system at once, so that the resident size follows what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {kind!r} on {network} failed: {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
