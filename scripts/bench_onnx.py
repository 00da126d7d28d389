"""Speed and size of the ONNX exports beside the float network and ONNX Runtime's own 8-bit form of it, and how near ours
comes to its model.

    python scripts/bench_onnx.py --out docs/benchmarks/onnx.json
    python scripts/bench_onnx.py --networks --model runs/demo/models/sdq-bits-2 --dataset fashion_mnist

Speed: networks with random weights of 4 bits and 8-bit first and last layers. The float file is the same network with batch
norm folded, by torch.onnx; what ONNX Runtime's static quantization makes of it has int8 weights for each channel and uint8
activations. All run in one process, on one thread, in turns; the medians of the ratios of CPU time are given.
Agreement: a trained packed model is put in the hardware profile, without training there, and compared on test images.
It needs the packages onnx, onnxruntime and, for the float file, onnxscript.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers

from sdq_hf import SDQForImageClassification
from sdq_hf.batch_norm import fold_batch_norm
from sdq_hf.export.lower import integer_network
from sdq_hf.folding import fold
from sdq_hf.training.data import load_image_data
from sdq_hf.training.loaders import build_loaders
from sdq_hf.writing import write_json

NETWORKS = ("resnet18:224", "mobilenetv2_100:224")
INPUT = "pixel_values"
COLUMNS = {
    "network": "{network}",
    "activation bits": "{activation_bits}",
    "batch": "{batch}",
    "float, ms": "{float_ms:.1f}",
    "int8, ms": "{int8_ms:.1f}",
    "float / int8": "{ratio:.2f}",
    "quartiles": "{quartiles[0]:.2f}-{quartiles[1]:.2f}",
    "float / ONNX Runtime's own": "{own_ratio:.2f}",
    "float file, MB": "{float_mb:.1f}",
    "int8 file, MB": "{int8_mb:.1f}",
    "exact file, MB": "{exact_mb:.2f}",
    "exact file / ideal": "{exact_over_ideal:.3f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="timm name:image size")
    parser.add_argument("--activation_bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=160, help="turns at batch 1; fewer with more images, but 20")
    parser.add_argument("--model", help="packed model for the agreement")
    parser.add_argument("--dataset", help="its data; default: the bundled sample of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    content: dict[str, Any] = {"rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        for network in options.networks:
            for bits in options.activation_bits:
                content["rows"] += speed(network, bits, options.batches, options.repeats, Path(scratch))
        if options.model:
            content["agreement"] = agreement(options.model, options.dataset, options.images, Path(scratch))
            print(content["agreement"])
    print(table(content))
    if options.out:
        packages = ("torch", "timm", "onnx", "onnxruntime")
        content["versions"] = {package: version(package) for package in packages}
        content["hardware"] = f"{platform.machine()} CPU, 1 thread"
        write_json(options.out, content)


def table(content: dict[str, Any]) -> str:
    """The rows of speed and size as markdown."""
    lines = [COLUMNS, *([form.format(**row) for form in COLUMNS.values()] for row in content["rows"])]
    header, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([header, f"|{'---|' * len(COLUMNS)}", *rows])


# Speed and size ------------------------------------------------------------------------------------------------------


def speed(network: str, activation_bits: int, batches: list[int], repeats: int, scratch: Path) -> list[dict[str, Any]]:
    """A row for each number of images in `batches`."""
    name, size = network.split(":")
    paths = {kind: scratch / f"{kind}.onnx" for kind in ("float", "int8", "own", "exact")}
    export_all(name, int(size), activation_bits, paths)
    sizes = {f"{kind}_mb": paths[kind].stat().st_size / 1e6 for kind in ("float", "int8", "exact")}
    sizes["exact_over_ideal"] = paths["exact"].stat().st_size / stored_bytes(paths["exact"])
    runs = [runner(paths[kind]) for kind in ("float", "int8", "own")]
    rows = []
    for batch in batches:
        images = np.random.default_rng(0).standard_normal((batch, 3, int(size), int(size)), dtype=np.float32)
        count = max(repeats // batch, min(repeats, 20))
        times = [[seconds(run, images) for run in runs] for _ in range(count + 1)][1:]
        ratios = [plain / int8 for plain, int8, _ in times]
        rows.append(
            {
                "network": name,
                "activation_bits": activation_bits,
                "batch": batch,
                "float_ms": 1e3 * statistics.median(plain for plain, _, _ in times),
                "int8_ms": 1e3 * statistics.median(int8 for _, int8, _ in times),
                "own_ms": 1e3 * statistics.median(own for _, _, own in times),
                "ratio": statistics.median(ratios),
                "own_ratio": statistics.median(plain / own for plain, _, own in times),
                "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
                "turns": count,
                **sizes,
            }
        )
    return rows


def export_all(name: str, size: int, activation_bits: int, paths: dict[str, Path]) -> None:
    # Here and below, since the table of the results is made without these packages.
    from sdq_hf.export.onnx_int8 import export_onnx_int8
    from sdq_hf.export.onnx_qdq import export_onnx

    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=1000).eval()
    images = torch.randn(4, 3, size, size)
    # The quantizer that is fitted fastest: the weights are random anyway.
    model = SDQForImageClassification.from_float(
        source,
        name,
        img_size=size,
        activation_bits=activation_bits,
        scales="power_of_two",
        weight_quantizer="dorefa",
        weight_scale="layer",
    ).eval()
    model.set_strategy(4)
    model.calibrate([images])
    network = integer_network(model)
    export_onnx(network, paths["exact"])
    export_onnx_int8(network, paths["int8"], [images])
    folded = fold_batch_norm(fold(source), (3, size, size))
    torch.onnx.export(
        folded,
        (images,),
        str(paths["float"]),
        input_names=[INPUT],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        external_data=False,
        verbose=False,
    )
    quantize_by_runtime(paths["float"], images, paths["own"])


def quantize_by_runtime(source: Path, images: torch.Tensor, path: Path) -> None:
    """ONNX Runtime's static quantization of a float file, of the kind that is fast on x86-64."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([{INPUT: images.numpy()}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(source), str(path), Reader(), per_channel=True, **types)


def stored_bytes(path: Path) -> int:
    """Bytes of all initializers: weights at the bits of their types, and what else is stored."""
    import onnx

    return sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)


def runner(path: Path, level: str = "ALL") -> Callable[[np.ndarray], np.ndarray]:
    """Images -> logits of the file, by ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def seconds(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    start = time.process_time()
    run(images)
    return time.process_time() - start


# Agreement -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def agreement(name: str, dataset: str | None, count: int, scratch: Path) -> dict[str, Any]:
    """Logits of the exports against those of the model in the hardware profile, on `count` test images."""
    from sdq_hf.export.onnx_int8 import export_onnx_int8
    from sdq_hf.export.onnx_qdq import export_onnx

    model = SDQForImageClassification.from_pretrained(name).eval()
    data = load_image_data(dataset)
    loaders = build_loaders(data, model.config.pretrained_cfg or {}, batch_size=128)
    profile = model.to_hardware_profile(loaders["calibration"]).eval()
    network = integer_network(profile)
    batches = iter(loaders["calibration"])
    export_onnx(network, scratch / "exact.onnx")
    export_onnx_int8(network, scratch / "int8.onnx", [next(batches) for _ in range(4)])
    runs = {
        "exact, basic": runner(scratch / "exact.onnx", "BASIC"),
        "exact, all": runner(scratch / "exact.onnx"),
        "int8": runner(scratch / "int8.onnx"),
    }
    wanted, labels = [], []
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in runs}
    for batch in loaders["test"]:
        pixels = batch["pixel_values"]
        wanted.append(network.logits(pixels))
        labels.append(batch["labels"])
        for kind, run in runs.items():
            found[kind].append(torch.from_numpy(run(pixels.numpy())).double())
        if sum(map(len, labels)) >= count:
            break
    reference, label = torch.cat(wanted)[:count], torch.cat(labels)[:count]
    rows: dict[str, Any] = {}
    for kind, parts in found.items():
        logits = torch.cat(parts)[:count]
        rows[kind] = {
            "equal": bool(torch.equal(logits, reference)),
            "largest_difference": (logits - reference).abs().max().item(),
            "mean_difference": (logits - reference).abs().mean().item(),
            "top1_agreement": (logits.argmax(1) == reference.argmax(1)).double().mean().item(),
            "top1": (logits.argmax(1) == label).double().mean().item(),
        }
    return {
        "model": Path(name).name,
        "architecture": model.config.architecture,
        "images": len(label),
        "reference_top1": (reference.argmax(1) == label).double().mean().item(),
        "largest_logit": reference.abs().max().item(),
        "inexact_in_float32": network.inexact_in_float32(),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
