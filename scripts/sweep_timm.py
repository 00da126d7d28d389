"""Every network of timm: does it take quantizers, does the smallest of each family go the whole way, has it integers?

    python scripts/sweep_timm.py --out docs/results/networks.json

Part "attach": each architecture of `timm.list_models()` is made quantized on the meta device, without memory for its
weights. Layers that cannot be quantized are named, and the network is made again with these kept float, as the error
says. Part "run": of each family (a file of timm's) the member with the fewest parameters among those that attach gets random
weights, at the smallest image size of `SIZES` that it runs on. It runs forward, takes steps of the search, gets a strategy
of mixed bits, is saved, loaded and dequantized, and all logits must be those from before, bit for bit.

To save hours, networks of more than `--lsq_params` parameters are quantized by `dorefa`, whose scales need no search over
clips, in place of the default `lsq`; the table says which.

Part "integers": each architecture of at most `--most_params` parameters is made in the hardware profile, at the smallest
image size that it runs on, and at 64 and 224 pixels where that size is what is refused. "refused" is what the library says of
the first thing that has no integer form. What timm can merge for inference is tried merged then ("reparameterize"). Where all
has one and an image takes at most `_MOST_MACS`, two images are computed by integers and by the model in float64, and the
logits must be equal. Weights are random, and scales are those of the largest weights, without a search.

All parts work in a child process. When it dies, or a network takes longer than `--timeout`, that is what the row says,
and another child goes on with the next one. Run again, the script goes on with what is missing.
"""

import argparse
import ast
import fnmatch
import json
import math
import platform
import re
import resource
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor

from sdq_hf import SDQConfig, SDQForImageClassification
from sdq_hf.export.lower import integer_network
from sdq_hf.layers import input_quantizers, quantizer_parameters
from sdq_hf.search import SearchState, search
from sdq_hf.writing import write_json

PARTS = ("attach", "run", "integers")
_MOST_MEMORY = 16 * 2**30
# What torch and Python say when a network needs more.
_NO_MEMORY = ("can't allocate memory", "MemoryError")
# Families whose layer scales are set to 1. Where they start, at 1e-5, the first block of a stage, which has no branch
# beside it, gives next to nothing, and the norm behind it has gradients of 1e7 in float and of infinity at few bits.
_SCALES_OF_ONE = ("mobilenetv5",)
SIZES = (32, 64, 96, 128, 192, 224, 256, 384, 512)
# Tried too where the hardware profile refuses the smallest of them.
_OTHER_SIZES = (64, 224)
# Of one image, in layers: int64 takes seconds for more.
_MOST_MACS = 1e8


class Enough(Exception):
    """Raised after as many batches as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="*", help="pattern of architectures, as in fnmatch")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--lsq_params", type=float, default=4e6, help="most parameters with the default weight quantizer"
    )
    parser.add_argument("--most_params", type=float, default=60e6, help="most parameters in part integers")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one network may take")
    parser.add_argument("--retry", action="store_true", help="try again what did not work")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    content = {**{part: {} for part in PARTS}, **content}
    asked = [] if options.table else [name for name in architectures() if fnmatch.fnmatchcase(name, options.models)]
    for part in options.parts:
        names = asked
        if part == "run":
            names = smallest(content["attach"], asked)
        if part == "integers":
            params = {name: content["attach"].get(name, {}).get("params", math.inf) for name in asked}
            names = sorted((name for name in asked if params[name] <= options.most_params), key=lambda n: params[n])
        done = {name for name, row in content[part].items() if not (options.retry and row.get("error"))}
        names = [name for name in names if name not in done]
        for (_, name, *_), row in results([_job(part, name, content, options) for name in names], options.timeout):
            content[part][name] = {"family": family(name), **row}
            content["versions"] = {name: version(name) for name in ("torch", "timm", "transformers")}
            content["hardware"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
            write_json(options.out, content)
            print(part, name, row, flush=True)
    print(table(content))
    print(integers_table(content))


def _job(part: str, name: str, content: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    if part != "run":
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
    functions: dict[str, Callable[..., dict[str, Any]]] = {"attach": attach, "run": run, "integers": integers}
    for line in sys.stdin:
        part, name, *rest = json.loads(line)
        try:
            row = functions[part](name, *rest)
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


# Integers --------------------------------------------------------------------------------------------------------


def integers(name: str) -> dict[str, Any]:
    """Whether a network can be made in the hardware profile and has an integer form; `ValueError` where logits differ."""
    smallest, arguments = small_images(name)
    refused, model = "", None
    for size in dict.fromkeys((smallest, *_OTHER_SIZES)):
        try:
            model = profile(name, size, dict.fromkeys(arguments, size))
            integer_network(model)
            break
        except ValueError as error:
            refused, model = str(error), None
            if "image size" not in refused:
                model = merged_profile(name, size, dict.fromkeys(arguments, size))
                break
    if model is None:
        return {"size": size, "refused": refused[:500]}
    macs = sum(layer.macs for layer in model.strategy.values())
    row = {"size": size, "macs": macs, "proven": macs <= _MOST_MACS}
    if row["proven"]:
        images = torch.randn(2, 3, size, size)
        model.calibrate(images)
        found = integer_network(model).logits(images)
        if not torch.equal(found, _logits(model.double(), images.double())) or not found.any():
            raise ValueError("integers and the model in float64 give other logits")
    return {**row, "reparameterize": True} if model.config.reparameterize else row


def merged_profile(name: str, size: int, arguments: dict[str, Any]) -> SDQForImageClassification | None:
    """The model with the branches of its training merged; None where it has none, or no integer form with them merged."""
    try:
        model = profile(name, size, arguments, reparameterize=True)
        integer_network(model)
    except ValueError:
        return None
    return model


@torch.no_grad()
def profile(name: str, size: int, arguments: dict[str, Any], **fields: Any) -> SDQForImageClassification:
    """A model in the hardware profile, in eval mode, whose layers have random weights; everything else is zero."""
    with torch.device("meta"):
        config = SDQConfig(
            name,
            model_args=arguments,
            pretrained_cfg={"input_size": [3, size, size]},
            num_labels=10,
            scales="power_of_two",
            weight_scale="channel",
            **fields,
        )
        model = SDQForImageClassification(config).eval()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.zero_()
    for layer in model.quantized_layers().values():
        layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)
        layer.weight_quantizer.scale.copy_(layer.weight.abs().flatten(1).amax(1))
        if layer.bias is not None:
            layer.bias.normal_(std=0.1)
    for quantizer in input_quantizers(model).values():
        quantizer.step.fill_(0.25)
    return model


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


# Pattern of what the library says of the first thing in the way -> how the table calls it; \\1 is its group.
_REASONS = (
    (r"^Batch norm .* stands behind no", "batch norm without a convolution before it"),
    (r"^Batch norm .* is used elsewhere", "batch norm whose input is used elsewhere"),
    (r"computes no fixed sequence|the operation '(?:getattr|size)'", "steps that depend on sizes or values"),
    (r" is a \w*LayerNorm\w*,|\(\w*LayerNorm\w*\)", "layer norm"),
    (r" is a \w*GroupNorm\w*,|\(\w*GroupNorm\w*\)", "group norm"),
    (r" is a \w*(?:Rms|Simple)Norm\w*,|\(\w*(?:Rms|Simple)Norm\w*\)", "RMS norm"),
    (r" is a (\w+),", r"\1"),
    (r"the operation 'mean' in .* \(\w*(?:SE|Ese|SqueezeExcite)\w*\)", "squeeze-and-excitation"),
    (r"the operation '(?:getitem|split|chunk)'", "split tensors"),
    (r"the operation '(?:permute|reshape|view|transpose)'", "reordered tensors"),
    (r"the operation '(\w+)' in .* \((\w+)\)", r"\1 in \2"),
    (r"the parameter ", "parameters outside of layers"),
    (r"an average over", "averages with padding"),
    (r"reach over the end", "windows that reach over the end"),
)


def reason(message: str) -> str:
    """A refusal of the hardware profile in a few words."""
    for pattern, words in _REASONS:
        match = re.search(pattern, message)
        if match:
            return match.expand(words)
    return message


def patterns(names: list[str], others: list[str]) -> list[str]:
    """`names`, with patterns for three or more of them that fit none of `others`."""
    left, found = sorted(names), list[str]()
    while left:
        # Up to where a word or a number ends; the shortest first.
        ends = (match.end() for match in re.finditer(r"[a-z]+|\d+|_", left[0]))
        starts = (left[0][:end] for end in ends)
        start = next((start for start in starts if not any(other.startswith(start) for other in others)), left[0])
        fit = [name for name in left if name.startswith(start)]
        found += [f"`{start}*` ({len(fit)})"] if len(fit) > 2 else [f"`{name}`" for name in fit]
        left = [name for name in left if name not in fit]
    return found


def integers_table(content: dict[str, Any]) -> str:
    """Markdown: the families with architectures that have integers, and which; below the others, by what stops them."""
    rows, known = content["integers"], content["attach"]
    families: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        families.setdefault(row["family"], {})[name] = row
    sizes = Counter(row["family"] for row in known.values())
    lines = [
        "| family | go, of tried | in timm | these | what stops the others |",
        "|---|---|---|---|---|",
    ]
    none: dict[str, list[str]] = {}
    for family, tried in sorted(families.items()):
        goes = [name for name, row in tried.items() if "macs" in row]
        reasons = Counter(reason(row.get("refused") or row["error"]) for row in tried.values() if "macs" not in row)
        if goes:
            stops = ", ".join(f"{words} ({count})" for words, count in reasons.most_common())
            merged = [name for name in goes if tried[name].get("reparameterize")]
            names = ", ".join(
                ("merged: " * (some is merged))
                + ", ".join(patterns(some, [name for name in known if name not in some]))
                for some in ([name for name in goes if name not in merged], merged)
                if some
            )
            lines.append(f"| {family} | {len(goes)} of {len(tried)} | {sizes[family]} | {names} | {stops} |")
        else:
            none.setdefault(reasons.most_common(1)[0][0], []).append(f"{family} ({len(tried)})")
    going = [row for row in rows.values() if "macs" in row]
    proven = sum(row["proven"] for row in going)
    lines.append(
        f"| all | {len(going)} of {len(rows)} | {len(known)} | {proven} compared with the model, all equal | |"
    )
    worst = sorted(none.items(), key=lambda item: -len(item[1]))
    return "\n".join([*lines, "", *(f"- {words}: {', '.join(names)}" for words, names in worst)])


if __name__ == "__main__":
    main()
