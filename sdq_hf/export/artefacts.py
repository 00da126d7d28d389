"""Exports of a model in one folder, with their description and their proof.

integers.safetensors   integers of weights and biases
manifest.json          everything that is done with them, sha256 of the files, versions
costs.json             bytes, BitOPs, LUTs and accumulators of each layer
verification.json      each export beside the integer reference
model.qonnx.onnx, hls4ml/, verilog/, ...  the exports asked for
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling_sdq import SDQForImageClassification
from ..writing import folder_beside, replace_folder, save_tensors, write_json
from .graph import BATCH, IntegerNetwork, Layer, Quantize
from .hls import Emulation, HLSOptions, export_hls
from .lower import ExportError, integer_network
from .manifest import integers, manifest, sha256, versions
from .optional import needed
from .report import cost_report, report_text
from .verify import REAL, Comparison, Runner, cases, compare, made_images, simulation, with_one_weight_changed

# Real images of a Verilog test bench.
_TESTED = 32
# Products that iverilog computes of one export, in about a minute.
_SIMULATED = 2**23


class VerificationError(ExportError):
    """An export that does not compute the integers."""


@dataclass(frozen=True)
class Settings:
    """What a target may need beside the network: images to fit ranges to, images for a test bench (both float32
    [B, C, H, W]), and hls4ml's options."""

    calibration: Tensor
    tests: Tensor
    hls: HLSOptions


@dataclass(frozen=True)
class Written:
    """What a target has left: how to run it, and what is claimed of it.

    most_images: so many are enough, as it is slow. facts: what it was written with, for the manifest.
    """

    run: Runner
    exact: bool = True
    most_images: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def _qonnx(network: IntegerNetwork, folder: Path, settings: Settings) -> Written:
    needed("onnx", "fpga")
    from .qonnx import export_qonnx, run_qonnx

    path = folder / "model.qonnx.onnx"
    export_qonnx(network, path)
    return Written(lambda batch: run_qonnx(path, batch), most_images=256)


def _onnx(network: IntegerNetwork, folder: Path, settings: Settings) -> Written:
    needed("onnx", "onnx")
    needed("onnxruntime", "onnx")
    from .onnx_qdq import export_onnx

    path = folder / "model.onnx"
    export_onnx(network, path)
    # A sum that float32 cannot hold may come out otherwise in another order.
    return Written(lambda batch: run_onnx(path, batch), exact=not network.inexact_in_float32())


def _onnx_int8(network: IntegerNetwork, folder: Path, settings: Settings) -> Written:
    needed("onnx", "onnx")
    needed("onnxruntime", "onnx")
    from .onnx_int8 import SESSION, export_onnx_int8

    path = folder / "model.int8.onnx"
    export_onnx_int8(network, path, [settings.calibration])
    # Every tensor has 8 bits there, and the kernels that are worth it are fused.
    return Written(lambda batch: run_onnx(path, batch, True, SESSION), exact=False, facts={"session": SESSION})


def run_onnx(
    path: Path, images: Tensor, fused: bool = False, session_entries: Mapping[str, str] | None = None
) -> np.ndarray:
    """Logits (float32 [B, num_labels]) of images (float32 [B, C, H, W]) by ONNX Runtime on a CPU.

    fused: with all of its optimisations. Without, with the basic ones, which keep every operation: the others put numbers
    together that were rounded apart. session_entries: of the session's configuration.
    """
    ort = needed("onnxruntime", "onnx")
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_ENABLE_BASIC
    for key, value in (session_entries or {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {source: part.numpy()})[0] for part in images.split(BATCH)])


def _verilog(network: IntegerNetwork, folder: Path, settings: Settings) -> Written:
    """The classifier as a Verilog module that uses one unit again and again."""
    from .verilog import simulate_dense, write_dense, write_dense_check

    head, source = _classifier(network, "verilog")
    if not isinstance(head.weight_bits, int):
        raise ExportError(f"Layer {head.name!r} has no one bitwidth: the target verilog writes layers that have.")
    path = folder / "verilog"
    bias = None if head.bias is None else head.bias.numpy()
    write_dense(path, head.weight.numpy(), bias, head.weight_bits, source.bits, source.signed, grid=head.grid)
    write_dense_check(path, *_test_vectors(network, head, source, settings))
    return _simulated(network, head, source, path, simulate_dense)


def _da4ml(network: IntegerNetwork, folder: Path, settings: Settings) -> Written:
    """The classifier as pipelined adders in Verilog."""
    from .unrolled import simulate_unrolled, write_unrolled, write_unrolled_check

    head, source = _classifier(network, "da4ml")
    path = folder / "da4ml"
    bias = None if head.bias is None else head.bias.numpy()
    facts = write_unrolled(path, head.weight.numpy(), bias, source.low, source.high)
    write_unrolled_check(path, *_test_vectors(network, head, source, settings))
    # A simulation of so many adders takes a tenth of a second for an image.
    return replace(_simulated(network, head, source, path, simulate_unrolled), most_images=64, facts=facts)


def _classifier(network: IntegerNetwork, target: str) -> tuple[Layer, Quantize]:
    """The last layer and the rounding of its input. Raises `ExportError` where `target` cannot write it."""
    head = network.output
    if not (isinstance(head, Layer) and head.is_linear):
        raise ExportError(
            f"The last node {head.name!r} is no linear layer: the target {target} writes the classifier only."
        )
    source = network[head.inputs[0]]
    assert isinstance(source, Quantize)
    return head, source


def _test_vectors(
    network: IntegerNetwork, head: Layer, source: Quantize, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [N, inputs] and outputs [N, outputs] of the classifier `head` by the integers, for a test bench."""
    values = network.run(torch.cat([settings.tests, made_images(network)]), keep=True)
    # The Verilog gives sums, before they are brought to one unit.
    return values[source.name].numpy(), (values[head.name] >> head.shifts).numpy()


def _simulated(
    network: IntegerNetwork,
    head: Layer,
    source: Quantize,
    path: Path,
    simulate: Callable[[Path, np.ndarray], np.ndarray],
) -> Written:
    """The classifier in Verilog in the folder `path`; what stands before it is computed by the integers."""
    # Of each output: a logit is its integer times 2^exponent.
    exponents = [source.exponent + exponent for exponent in head.exponents]
    write_json(path / "outputs.json", {"exponents": exponents})

    def run(batch: Tensor) -> np.ndarray:
        inputs = network.integers_of(source.name, batch)
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(shutil.copytree(path, Path(scratch) / "verilog"))
            return simulate(copy, inputs.numpy()) * 2.0 ** np.array(exponents)

    return Written(run, most_images=min(1000, max(1, _SIMULATED // head.weight.numel())))


def _hls4ml(network: IntegerNetwork, folder: Path, settings: Settings) -> Written:
    project = folder / "hls4ml"
    facts = export_hls(network, project, settings.hls)
    # Compiled when it is run: a project that is not verified needs no compiler.
    emulation = cache(lambda: Emulation(project, network))
    return Written(lambda batch: emulation()(batch), most_images=256, facts=facts)


# What can be exported.
TARGETS: dict[str, Callable[[IntegerNetwork, Path, Settings], Written]] = {
    "qonnx": _qonnx,
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "hls4ml": _hls4ml,
    "verilog": _verilog,
    "da4ml": _da4ml,
}


def check_targets(targets: Sequence[str]) -> None:
    """`ExportError` with near names for a target that is unknown."""
    for target in targets:
        if target not in TARGETS:
            near = get_close_matches(target, TARGETS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ExportError(f"Unknown target {target!r}: expected one of {', '.join(TARGETS)}.{hint}")


def export_model(
    model: SDQForImageClassification,
    folder: str | Path,
    targets: Sequence[str],
    images: Tensor,
    labels: Tensor | None = None,
    calibration: Tensor | None = None,
    verify: bool = True,
    say: Callable[[str], Any] = lambda text: None,
    hls: HLSOptions | None = None,
) -> Mapping[str, Any]:
    """Write the exports of `model`, which must be in the hardware profile, into `folder`, and compare them with the integers.

    Args:
        targets: names of `TARGETS`.
        images: real ones, as the model takes them (float32 [B, C, H, W]). labels: theirs (int64 [B]), for the accuracy.
        calibration: images that exports which round more than the model fit their ranges to; default: the first `images`.
        verify: run each export on the images and on ones made to break it. Without it verification.json says so.
        say: called with a line about each step.
        hls: options of the target hls4ml.

    Gives what stands in verification.json. Raises `ExportError` for what cannot be exported, and `VerificationError` where
    an export does not compute the integers: then `folder` is left as it was, and the report of what differs is in a folder of
    its own beside it, which the error names.
    """
    check_targets(targets)
    _check_images(images, labels, model.config.input_size)
    # A name to put an end behind, also of "." and of a link.
    folder = Path(folder).resolve()
    _check_folder(folder)
    network = integer_network(model)
    with folder_beside(folder) as beside:
        settings = Settings(
            images[:BATCH] if calibration is None else calibration, images[:_TESTED], hls or HLSOptions()
        )
        return _export(model, network, beside, folder, targets, images, labels, settings, verify, say)


def _check_folder(folder: Path) -> None:
    """Whatever is there will be removed, so it must be an earlier export and nothing else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        own = {"manifest.json", *json.loads((folder / "manifest.json").read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{folder} is not empty and holds no earlier export: choose another folder.") from None
    # Also inside of projects: a vendor's tool leaves the work of hours there.
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in own and (path.is_symlink() or not path.is_dir()):
            raise ExportError(f"{folder} holds {name!r} beside an earlier export: choose another folder.")


def _check_images(images: Tensor, labels: Tensor | None, size: tuple[int, int, int]) -> None:
    shape = list(images.shape)
    if images.dtype != torch.float32 or len(shape) != 4 or shape[1:] != list(size) or not shape[0]:
        raise ExportError(
            f"images must be float32 [B, {size[0]}, {size[1]}, {size[2]}], at least one, got {images.dtype} {shape}."
        )
    if not images.isfinite().all():
        raise ExportError("images must be finite: some have NaN or infinite values.")
    got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    if labels is not None and got != shape[:1]:
        raise ExportError(f"labels must be a tensor with one for each of the {len(images)} images, got {got}.")


def _export(
    model: SDQForImageClassification,
    network: IntegerNetwork,
    beside: Path,
    folder: Path,
    targets: Sequence[str],
    images: Tensor,
    labels: Tensor | None,
    settings: Settings,
    verify: bool,
    say: Callable[[str], Any],
) -> Mapping[str, Any]:
    save_tensors(integers(network), beside / "integers.safetensors")
    costs = cost_report(model.strategy, {name: layer.sum_width for name, layer in network.layers.items()})
    write_json(beside / "costs.json", costs)
    say(report_text(costs))
    written = {}
    for target in targets:
        say(f"{target}: writing")
        written[target] = TARGETS[target](network, beside, settings)
    report: dict[str, Any] = {"verified": False, "versions": versions()}
    if verify:
        report = _verification(model, network, written, images, labels, say)
    if report.get("failed"):
        failed = Path(tempfile.mkdtemp(prefix=f"{folder.name}.failed-", dir=folder.parent)) / "verification.json"
        write_json(failed, report)
        raise VerificationError(
            f"Not the integers of the model: {', '.join(report['failed'])}. Nothing was exported; {failed} has the numbers."
        )
    write_json(beside / "verification.json", report)
    files = {path.relative_to(beside).as_posix(): path for path in sorted(beside.rglob("*")) if path.is_file()}
    facts = {target: dict(export.facts) for target, export in written.items()}
    described = manifest(network, model.strategy, files, facts, model.config.pretrained_cfg or {})
    write_json(beside / "manifest.json", described)
    replace_folder(beside, folder)
    return report


@torch.no_grad()
def _verification(
    model: SDQForImageClassification,
    network: IntegerNetwork,
    written: Mapping[str, Written],
    images: Tensor,
    labels: Tensor | None,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    say(f"integers: {len(images)} images")
    found: list[Comparison] = []
    control, layer = with_one_weight_changed(network, images)
    sets = cases(network, control, images, labels)
    # Where the integers may be longer than what float32 holds, the model as it is used is not claimed to be equal.
    own = {
        "model in float64": Written(simulation(model, torch.float64)),
        "model in float32": Written(simulation(model, torch.float32), exact=not network.inexact_in_float32()),
    }
    for name, export in {**own, **written}.items():
        for case in sets:
            few = case if export.most_images is None else case.first(export.most_images)
            found.append(compare(name, export.run, few, export.exact))
            result = found[-1]
            verdict = (
                "equal" if result.equal else f"same top-1 {result.same_top1:.2f} %, off by {result.max_difference:.3g}"
            )
            accuracy = "" if result.accuracy is None else f", accuracy {result.accuracy:.2f} %"
            say(f"{name}: {result.count} {case.name} images, {verdict}{accuracy}")
    failed = sorted({c.what for c in found if c.failed})
    return {
        "verified": not failed,
        "reference": "int64 arithmetic (sdq_hf.export.graph)",
        "control": f"the sign of one weight of layer {layer} changed",
        "comparisons": [asdict(comparison) for comparison in found],
        "failed": failed,
        "inexact_in_float32": network.inexact_in_float32(),
        "images": {REAL: len(images)},
        # Of the images as the model takes them, float32 in C order: who has the same can repeat the comparison.
        "images_sha256": {case.name: sha256(case.images.contiguous().numpy().astype("<f4").tobytes()) for case in sets},
        "versions": versions(),
    }
