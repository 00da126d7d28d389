"""Every network of timm: does it take quantizers, and does the smallest of each family go the whole way?

    python scripts/sweep_timm.py --out docs/results/networks.json

Part "attach": each architecture of `timm.list_models()` is made quantized on the meta device, without memory for its
weights. Layers that cannot be quantized are named, and the network is made again with these kept float, as the error
says. Part "run": of each family (a file of timm's) the member with the fewest parameters among those that attach gets random
weights, at the smallest image size of `SIZES` that it runs on. It runs forward, takes steps of the search, gets a strategy
of mixed bits, is saved, loaded and dequantized, and all logits must be those from before, bit for bit.

To save hours, networks of more than `--lsq_params` parameters are quantized by `dorefa`, whose scales need no search over
clips, in place of the default `lsq`; the table says which.

Both parts work in a child process. When it dies, or a network takes longer than `--timeout`, that is what the row says,
and another child goes on with the next one. Run again, the script goes on with what is missing.
"""

import argparse
import ast
import fnmatch
import json
import platform
import re
import resource
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor

from sdq_hf import SDQConfig, SDQForImageClassification
from sdq_hf.layers import quantizer_parameters
from sdq_hf.search import SearchState, search
from sdq_hf.writing import write_json

_MOST_MEMORY = 16 * 2**30
# What torch and Python say when a network needs more.
_NO_MEMORY = ("can't allocate memory", "MemoryError")
# Families whose layer scales are set to 1. Where they start, at 1e-5, the first block of a stage, which has no branch
# beside it, gives next to nothing, and the norm behind it has gradients of 1e7 in float and of infinity at few bits.
_SCALES_OF_ONE = ("mobilenetv5",)
SIZES = (32, 64, 96, 128, 192, 224, 256, 384, 512)


class Enough(Exception):
    """Raised after as many batches as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="*", help="pattern of architectures, as in fnmatch")
    parser.add_argument("--parts", nargs="*", default=["attach", "run"], choices=["attach", "run"])
    parser.add_argument(
        "--lsq_params", type=float, default=4e6, help="most parameters with the default weight quantizer"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one network may take")
    parser.add_argument("--retry", action="store_true", help="try again what did not work")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    content = json.loads(options.out.read_text()) if options.out.exists() else {"attach": {}, "run": {}}
    names = [] if options.table else [name for name in architectures() if fnmatch.fnmatchcase(name, options.models)]
    for part in options.parts:
        if part == "run":
            names = [] if options.table else smallest(content["attach"], names)
        done = {name for name, row in content[part].items() if not (options.retry and row.get("error"))}
        names = [name for name in names if name not in done]
        for (_, name, *_), row in results([_job(part, name, content, options) for name in names], options.timeout):
            content[part][name] = {"family": family(name), **row}
            content["versions"] = {name: version(name) for name in ("torch", "timm", "transformers")}
            content["hardware"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
            write_json(options.out, content)
            print(part, name, row, flush=True)
    print(table(content))


def _job(part: str, name: str, content: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    if part == "attach":
        return [part, name]
    row = content["attach"][name]
    return [part, name, "lsq" if row["params"] <= options.lsq_params else "dorefa", row.get("pins", {})]


def architectures() -> list[str]:
    """The names of timm's own networks."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]


def family(name: str) -> str:
    """The file of timm that an architecture is defined in."""
    return timm.model_entrypoint(name).__module__.split(".")[-1]


def smallest(rows: dict[str, Any], names: list[str]) -> list[str]:
    """Of each family the member that attaches and has the fewest parameters; those with the fewest first."""
    found: dict[str, str] = {}
    for name in sorted((n for n in names if "params" in rows.get(n, {})), key=lambda n: rows[n]["params"]):
        if not rows[name].get("error"):
            found.setdefault(rows[name]["family"], name)
    return list(found.values())


# Child processes -------------------------------------------------------------------------------------------------


def results(jobs: list[list[Any]], timeout: float) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Each job and its row, from children that are replaced when they die or hang."""
    while jobs:
        # What a child writes to stderr may be long: a pipe that nobody reads would stop it.
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                [sys.executable, __file__, "--out", "-", "--work"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert child.stdin
            try:
                while jobs:
                    child.stdin.write(json.dumps(jobs[0]) + "\n")
                    child.stdin.flush()
                    line = _line(child, timeout)
                    if line is None:
                        yield jobs.pop(0), {"error": _death(child, errors, timeout)}
                        break
                    yield jobs.pop(0), json.loads(line)
            finally:
                child.kill()
                child.wait()


def _line(child: Any, timeout: float) -> str | None:
    """The next result, or None when the child has died or gives none within `timeout` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(timeout):
            line = child.stdout.readline()
            if not line:
                # Its output is closed a moment before it is gone.
                child.wait()
                return None
            if line.startswith("RESULT "):
                return str(line.removeprefix("RESULT "))
    return None


def _death(child: Any, errors: Any, timeout: float) -> str:
    if child.poll() is None:
        return f"took longer than {timeout:g} s"
    errors.seek(0)
    return f"the process ended with code {child.returncode}: {errors.read().strip()[-300:]}"


def work() -> None:
    """Do the jobs that come on stdin, one line each."""
    # A network that needs more than this machine has is to fail by itself, not to take others along.
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    for line in sys.stdin:
        part, name, *rest = json.loads(line)
        try:
            row = attach(name) if part == "attach" else run(name, *rest)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        print("RESULT", json.dumps(row), flush=True)


def attach(name: str) -> dict[str, Any]:
    """Make a network quantized on the meta device; again with the pins of the error, if there is one."""
    settings: Any = timm.get_pretrained_cfg(name)
    config = {
        "architecture": name,
        "num_labels": settings.num_classes,
        "pretrained_cfg": {"input_size": settings.input_size},
    }
    row: dict[str, Any] = {}
    with torch.device("meta"):
        try:
            model = SDQForImageClassification(SDQConfig(**config))
        except ValueError as error:
            pins = re.search(r"pins=(\{.*\})", str(error))
            if pins is None:
                raise
            row |= {"pins": ast.literal_eval(pins[1]), "refused": str(error)[:500]}
            model = SDQForImageClassification(SDQConfig(**config, pins=row["pins"]))
    quantized = model.quantized_layers()
    own = {id(parameter) for _, parameter in quantizer_parameters(model)}
    return {
        "params": sum(p.numel() for p in model.parameters() if id(p) not in own),
        "quantized": sum(layer.weight.numel() for layer in quantized.values()),
        "layers": len(quantized),
        **row,
    }


# The whole way ---------------------------------------------------------------------------------------------------


def small_images(name: str) -> tuple[int, dict[str, Any]]:
    """The smallest side that a network runs on, in pixels, and the arguments for timm that this takes."""
    errors = []
    for size in SIZES:
        for arguments in ({}, {"img_size": size}):
            try:
                with torch.device("meta"):
                    timm.create_model(name, num_classes=10, **arguments).eval()(torch.zeros(1, 3, size, size))
                return size, arguments
            except Exception as error:
                errors.append(str(error))
    raise ValueError(f"runs on no square images of {SIZES} pixels: {errors[-1]}")


def run(name: str, form: str, pins: dict[str, int]) -> dict[str, Any]:
    """Forward, search, strategy, save, load, dequantize; `ValueError` where logits differ."""
    size, arguments = small_images(name)
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm(
        name, num_labels=10, img_size=size, model_args=arguments, weight_quantizer=form, pins=pins
    ).eval()
    if family(name) in _SCALES_OF_ONE:
        for key, parameter in model.named_parameters():
            if key.endswith("layer_scale.gamma"):
                torch.nn.init.ones_(parameter)
    batches = [{"pixel_values": torch.randn(4, 3, size, size)} for _ in range(2)]
    model.calibrate(batches)

    def stop(state: SearchState) -> None:
        if state.batch >= 2:
            raise Enough

    with suppress(Enough):
        search(model, batches, [2.0], on_step=stop, accelerator=Accelerator(cpu=True))
    bits = {layer: 1 + i % 8 for i, layer in enumerate(model.strategy.searchable)}
    model.set_strategy(bits)
    model.calibrate(batches)
    images = batches[1]["pixel_values"]
    expected = _logits(model, images)
    if not expected.isfinite().all():
        raise ValueError("the logits are not finite")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, print_size=False)
        loaded = SDQForImageClassification.from_pretrained(folder).eval()
    for what, other in (("loaded", loaded), ("dequantized", loaded.dequantize())):
        if not torch.equal(_logits(other, images), expected):
            raise ValueError(f"the {what} model has other logits")
    return {"size": size, "form": form, "layers": len(model.quantized_layers())}


@torch.no_grad()
def _logits(model: SDQForImageClassification, images: Tensor) -> Tensor:
    return model(images).logits


def table(content: dict[str, Any]) -> str:
    """Markdown: a row for each family, and below what does not work, by name and with its reason."""
    families: dict[str, list[str]] = {}
    for name, row in content["attach"].items():
        families.setdefault(row["family"], []).append(name)
    smallest = {row["family"]: (name, row) for name, row in content["run"].items()}
    lines = [
        "| family | architectures | quantized | share of parameters, % | smallest | parameters, M | pixels | quantizer | "
        "bit-identical |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for family, names in sorted(families.items()):
        rows = [content["attach"][name] for name in names]
        works = [row for row in rows if not row.get("error") and not row.get("pins")]
        shares = [100 * row["quantized"] / row["params"] for row in rows if "params" in row]
        share = f"{min(shares):.1f} to {max(shares):.1f}" if shares else ""
        line = f"| {family} | {len(names)} | {'all' if len(works) == len(rows) else len(works)} | {share} |"
        if family in smallest:
            name, row = smallest[family]
            line += f" {name} | {content['attach'][name]['params'] / 1e6:.1f} | "
            too_large = any(sign in row.get("error", "") for sign in _NO_MEMORY)
            failed = " | | too large here |" if too_large else " | | no |"
            line += failed if row.get("error") else f"{row['size']} | {row['form']} | yes |"
            notes += [f"- `{name}`, the whole way: {row['error']}"] if row.get("error") else []
        else:
            line += " | | | | not tried |"
        notes += [
            f"- `{name}`: {row.get('error') or row['refused']}"
            for name, row in zip(names, rows, strict=True)
            if row.get("error") or row.get("pins")
        ]
        lines.append(line)
    return "\n".join([*lines, *(["", *notes] if notes else [])])


if __name__ == "__main__":
    main()
