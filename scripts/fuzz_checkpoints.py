"""Load mutated models, thousands of them: each must load, or end in one clear error, and do nothing else.

    python scripts/fuzz_checkpoints.py --count 10000 --out docs/benchmarks/fuzz.json

A small saved model is damaged in one place: bytes of the weights, the header of the weights, or a field of config.json gets
another value. Then `from_pretrained` loads it. An audit hook watches for code that is run, files that are written and
connections; memory and time are measured. Found by hypothesis, which makes a failing case as small as it can.
"""

import argparse
import copy
import json
import logging
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sdq_hf import SDQForImageClassification
from sdq_hf.writing import write_json

# Errors that a user can read: ours, and transformers' own about files that are missing or no JSON.
READABLE = (ValueError, OSError)
# A word that tells what is wrong; nearly always the name of the field, the layer, the tensor or the file.
TELLING = ("safetensors", "config", "strategy", "architecture", "layer", "tensor", "field", "timm")
# Fields that the model's own config.json lacks and that transformers acts upon.
MORE_FIELDS = ("num_labels", "torch_dtype", "auto_map", "transformers_weights", "fusion_config", "problem_type")
_FORBIDDEN = ("exec", "compile", "subprocess", "os.system", "socket.connect", "os.exec", "os.posix_spawn", "pickle")

bad_numbers = st.sampled_from([0, -1, 9, 2.5, 10**12, 10**400, -(2**63), float("nan"), float("inf"), 1e308, True])
bad_texts = st.sampled_from(
    ["", "3", "../../x", "/etc/passwd", "https://example.org/x", "hf-hub:a/b", "\x00", "a" * 5000, "é"]
)
values = st.recursive(
    st.none() | st.booleans() | bad_numbers | bad_texts | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


class Watch:
    """Counts what must not happen while a model is loaded."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
        # Python compiles and runs its own modules when they are imported for the first time, and dataclasses' methods.
        ours = event in ("exec", "compile") and _is_library(arguments)
        if (event.startswith(_FORBIDDEN) and not ours) or (writes and str(arguments[0]) != "/dev/null"):
            self.seen.append(f"{event} {arguments!r}"[:200])


def _is_library(arguments: tuple[Any, ...]) -> bool:
    code = arguments[0]
    name = getattr(code, "co_filename", None) or str(arguments[1] if len(arguments) > 1 else "")
    return name.startswith(("<", sys.prefix, sys.base_prefix)) or "site-packages" in name


@st.composite
def mutated(draw: st.DrawFn, weights: bytes, config: bytes) -> tuple[str, bytes, bytes]:
    """What was done, and the two files after it."""
    kind = draw(st.sampled_from(["bytes", "truncate", "header", "config field", "config layer", "config bytes"]))
    if kind == "bytes":
        return kind, _flipped(draw, weights), config
    if kind == "truncate":
        return kind, weights[: draw(st.integers(0, len(weights) - 1))], config
    if kind == "header":
        return kind, _with_other_header(draw, weights), config
    if kind == "config bytes":
        return kind, weights, _flipped(draw, config)
    changed = json.loads(config)
    if kind == "config layer":
        layers = changed["strategy"]
        at = draw(st.integers(0, len(layers) - 1))
        what = draw(st.sampled_from([*layers[at], "drop", "twice"]))
        if what == "drop":
            del layers[at]
        elif what == "twice":
            layers.insert(at, copy.deepcopy(layers[at]))
        else:
            layers[at][what] = draw(values)
    else:
        name = draw(st.sampled_from([*changed, *MORE_FIELDS]))
        changed[name] = draw(values)
    return kind, weights, json.dumps(changed).encode()


def _flipped(draw: st.DrawFn, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        result[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(result)


def _with_other_header(draw: st.DrawFn, data: bytes) -> bytes:
    """Another shape, type, place or name of one tensor; a tensor twice; a size that no machine has."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    what = draw(st.sampled_from(["shape", "dtype", "data_offsets", "rename", "drop", "add", "twice", "length"]))
    text = None
    if what == "shape":
        header[name]["shape"] = draw(st.lists(st.integers(-5, 2**62), max_size=4))
    elif what == "dtype":
        header[name]["dtype"] = draw(st.sampled_from(["F64", "F16", "I64", "BOOL", "U8", "F8_E4M3", "X", 3]))
    elif what == "data_offsets":
        header[name]["data_offsets"] = draw(st.lists(st.integers(-5, 2**62), min_size=1, max_size=3))
    elif what == "rename":
        header[draw(st.text(max_size=20))] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "add":
        header[draw(st.text(max_size=20))] = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    elif what == "twice":
        text = json.dumps(header)
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
    encoded = (text or json.dumps(header)).encode()
    size = draw(st.integers(0, 2**64 - 1)) if what == "length" else len(encoded)
    return struct.pack("<Q", size) + encoded + rest


class Fuzz:
    """Loads mutated copies of one model; `outcomes` counts how they ended, `slowest` is in seconds."""

    def __init__(self, folder: Path, architecture: str = "resnet8_cifar"):
        torch.manual_seed(0)
        model = SDQForImageClassification.from_timm(architecture, num_labels=10, img_size=32)
        model.set_strategy({name: 1 + i % 8 for i, name in enumerate(model.strategy.searchable)})
        model.calibrate([torch.randn(4, 3, 32, 32)])
        model.save_pretrained(folder / "whole", print_size=False)
        self.folder, self.watch = folder / "mutated", Watch()
        self.folder.mkdir()
        self.weights, self.config = ((folder / "whole" / f).read_bytes() for f in ("model.safetensors", "config.json"))
        self.telling = (*TELLING, *MORE_FIELDS, *json.loads(self.config))
        self.outcomes, self.messages, self.slowest = Counter[str](), dict[str, str](), 0.0
        self.expected: torch.Tensor | None = None
        # First uses of a module happen before anything is watched.
        self.load("whole", self.weights, self.config)
        self.outcomes.clear()

    def load(self, kind: str, weights: bytes, config: bytes) -> None:
        """Write, load, and check the end. Raises `AssertionError` for an end that is not allowed."""
        (self.folder / "model.safetensors").write_bytes(weights)
        (self.folder / "config.json").write_bytes(config)
        started, self.watch.on = time.perf_counter(), True
        try:
            model = SDQForImageClassification.from_pretrained(self.folder)
            outcome = "loaded"
        except READABLE as error:
            outcome = "refused"
            message = str(error)
            assert any(word in message for word in self.telling), f"not telling: {message!r}"
            self.messages[f"{kind}: {message[:60]}"] = message[:300]
        finally:
            self.watch.on = False
            self.slowest = max(self.slowest, time.perf_counter() - started)
        assert not self.watch.seen, self.watch.seen
        assert sorted(path.name for path in self.folder.iterdir()) == ["config.json", "model.safetensors"]
        if outcome == "loaded":
            with torch.no_grad():
                logits = model(torch.ones(1, *model.config.input_size)).logits
            assert logits.isfinite().all()
            if config == self.config:
                # Weights that load are those that were saved: a damage that matters does not go unnoticed.
                self.expected = logits if self.expected is None else self.expected
                assert torch.equal(logits, self.expected), "other weights were loaded"
        self.outcomes[f"{kind}: {outcome}"] += 1

    def run(self, count: int, number: int = 0) -> None:
        """`count` mutations, drawn from seed `number`."""

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(mutated(self.weights, self.config))
        def check(case: tuple[str, bytes, bytes]) -> None:
            self.load(*case)

        check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz.json"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        fuzz = Fuzz(Path(scratch))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fuzz.run(options.count, options.seed)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result = {
        "count": sum(fuzz.outcomes.values()),
        "seed": options.seed,
        "outcomes": dict(sorted(fuzz.outcomes.items())),
        "slowest_seconds": round(fuzz.slowest, 2),
        "more_peak_memory_mb": round(memory / 1e3, 1),
        "messages": dict(sorted(fuzz.messages.items())[:: max(1, len(fuzz.messages) // 40)]),
        "versions": {name: version(name) for name in ("transformers", "safetensors", "timm", "torch", "hypothesis")},
    }
    write_json(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "messages"}, indent=1))


if __name__ == "__main__":
    main()
