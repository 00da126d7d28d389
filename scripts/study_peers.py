"""SDQ beside other quantization tools: the same float network, data, epochs, distillation and size of the weights.

    make peers

Weights have `--target_bits` average bits over the searchable layers (first and last layer at 8), activations have 8 bits,
which all tools offer. SDQ finds its bits by its search. Sony's Model Compression Toolkit (MCT) and NVIDIA's Model Optimizer
choose among 2, 4 and 8 bits with the size that SDQ has, all layers included; Brevitas has no search and gets uniform bits.
Then each tool's model is trained by the same loop for `--epochs`, SDQ's for those less what its search looked at; the epoch
that is nearest to the float network on the validation split is kept. All are trained at each of the learning rates `--lrs`,
and the one with the least KL divergence on the validation split is shown: what suits one tool ruins another.

With `--epochs 0` nothing is trained: each tool calibrates the float network with the same `--images`, and SDQ's search looks
at no others; its activation steps come from four batches of them, its batch norm statistics from all, as MCT corrects biases.
"sdq_channel" is SDQ whose weights have a scale for each output channel, as those of MCT and Model Optimizer have,
"sdq_running" the same with the float network's batch norm statistics, and "sdq_uniform" SDQ's quantizers with uniform bits.

Each row is a process of its own. Time is CPU time from the float network to the trained model. Memory is the peak of the
process above what it had before. The file is what the tool itself saves; the lines are those of the function below that a
user would write, without the training loop.
"""

import argparse
import copy
import inspect
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from study_common import Cell, add_options, mean_and_error, open_run, read, train_float
from torch import Tensor, nn

from sdq_hf import SDQForImageClassification
from sdq_hf.packed_files import weight_file_bytes
from sdq_hf.search import search
from sdq_hf.strategy import Strategy
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.fit import fit
from sdq_hf.training.stages import Run
from sdq_hf.writing import write_json

Images = Iterable[Tensor]


# What a user of each tool writes: the float network in, a model to train out; and what he saves it with.


def sdq(network: SDQForImageClassification, bits: float, images: Images) -> SDQForImageClassification:
    (strategy,) = search(network, [{"pixel_values": batch} for batch in images], [bits])
    network.set_strategy(strategy)
    network.calibrate([{"pixel_values": batch} for batch in images])
    return network


def sdq_calibrated(network: SDQForImageClassification, bits: float, images: Images) -> SDQForImageClassification:
    (strategy,) = search(network, images, [bits], start_bits=8, weight_lr=0)
    network.set_strategy(strategy)
    network.calibrate(images)
    network.recalibrate_batch_norm(images)
    return network


def sdq_running(network: SDQForImageClassification, bits: float, images: Images) -> SDQForImageClassification:
    (strategy,) = search(network, images, [bits], start_bits=8, weight_lr=0, batch_norm="running")
    network.set_strategy(strategy)
    network.calibrate(images)
    return network


def sdq_uniform(network: SDQForImageClassification, bits: int, images: Images) -> SDQForImageClassification:
    network.set_strategy(bits)
    network.calibrate(images)
    network.recalibrate_batch_norm(images)
    return network


def brevitas(network: nn.Module, bits: int, images: Images) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    def layers(weight_bits: int) -> dict[type[nn.Module], Any]:
        options = {
            "weight_quant": Int8WeightPerTensorFloat,
            "weight_bit_width": weight_bits,
            "input_quant": Int8ActPerTensorFloat,
            "return_quant_tensor": False,
        }
        return {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}

    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    network = layerwise_quantize(network, layers(bits), name_blacklist=[names[0], names[-1]])
    network = layerwise_quantize(network, layers(8), name_blacklist=names[1:-1])
    with torch.no_grad(), calibration_mode(network):
        for batch in images:
            network(batch)
    return network


def mct(network: nn.Module, weight_bytes: float, images: Images) -> nn.Module:
    import model_compression_toolkit as toolkit

    model, _ = toolkit.qat.pytorch_quantization_aware_training_init_experimental(
        network,
        lambda: ([batch.numpy()] for batch in images),
        target_resource_utilization=toolkit.core.ResourceUtilization(weights_memory=weight_bytes),
        core_config=toolkit.core.CoreConfig(
            mixed_precision_config=toolkit.core.MixedPrecisionQuantizationConfig(num_of_images=32)
        ),
    )
    return model


def mct_calibrated(network: nn.Module, weight_bytes: float, images: Images) -> nn.Module:
    import model_compression_toolkit as toolkit

    model, _ = toolkit.ptq.pytorch_post_training_quantization(
        network,
        lambda: ([batch.numpy()] for batch in images),
        target_resource_utilization=toolkit.core.ResourceUtilization(weights_memory=weight_bytes),
    )
    return model


def modelopt(
    network: nn.Module, average_bits: float, batches: Iterable[tuple[Tensor, Tensor]], algorithm: str = "max"
) -> nn.Module:
    import modelopt.torch.quantization as mtq

    def form(bits: int) -> dict[str, Any]:
        config = copy.deepcopy(mtq.INT8_DEFAULT_CFG) | {"algorithm": algorithm}
        config["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}})
        return config

    # Its sensitivities are gradients: those of a distance to itself would be 0.
    model, _ = mtq.auto_quantize(
        network,
        constraints={"effective_bits": average_bits},
        quantization_formats=[form(bits) for bits in (2, 4, 8)],
        data_loader=list(batches),
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
    )
    return model


PEERS: dict[str, Callable[..., nn.Module]] = {
    "sdq": sdq,
    "sdq_channel": sdq,
    "sdq_uniform": sdq_uniform,
    "brevitas": brevitas,
    "mct": mct,
    "modelopt": modelopt,
}
# What stands in their place where nothing is trained.
CALIBRATED = PEERS | {
    "sdq": sdq_calibrated,
    "sdq_channel": sdq_calibrated,
    "sdq_running": sdq_running,
    "mct": mct_calibrated,
}
PACKAGES = {"brevitas": "brevitas", "mct": "model-compression-toolkit", "modelopt": "nvidia-modelopt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--target_bits", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=["sdq", "brevitas", "mct", "modelopt"], choices=list(CALIBRATED))
    parser.add_argument("--images", type=int, default=512, help="for calibration and the peers' sensitivities")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 1e-3, 3e-4, 1e-4])
    parser.set_defaults(activation_bits=8, epochs=2)
    options = parser.parse_args()
    if options.epochs and "sdq_running" in options.peers:
        parser.error("--peers sdq_running: only with --epochs 0, as training moves batch norm's statistics")
    if options.one:
        print("RESULT", json.dumps(one(options, options.one)))
        return
    for seed in [] if options.table else options.seeds:
        # Here, so that its memory is in no row.
        train_float(options, seed, options.teacher_epochs)
        # SDQ comes first: its size is the budget of the others.
        peers = ("sdq", *(peer for peer in options.peers if peer != "sdq"))
        for lr, peer in itertools.product(options.lrs if options.epochs else options.lrs[:1], peers):
            content = read(options.out)
            if any((cell["seed"], cell["peer"], cell["lr"]) == (seed, peer, lr) for cell in content["cells"]):
                continue
            child = [sys.executable, __file__, *sys.argv[1:], "--seeds", str(seed), "--one", peer, "--lr", str(lr)]
            done = subprocess.run(child, capture_output=True, text=True)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            result = json.loads(found[0].removeprefix("RESULT ")) if found else {"error": done.stderr.strip()[-500:]}
            content["cells"].append(
                {"seed": seed, "peer": peer, "lr": lr, "target_bits": options.target_bits, **result}
            )
            content |= {
                "options": {
                    key: getattr(options, key) for key in ("model", "epochs", "lrs", "teacher_epochs", "images")
                },
                "versions": {
                    name: version(name)
                    for name in ("torch", "timm", *(PACKAGES[p] for p in options.peers if p in PACKAGES))
                },
                "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
            }
            write_json(options.out, content)
            print(content["cells"][-1], flush=True)
    print(table(read(options.out)["cells"]))


def one(options: argparse.Namespace, peer: str) -> Cell:
    """Quantize with one tool, and train unless there are no epochs."""
    (seed,) = options.seeds
    if peer in ("sdq_channel", "sdq_running"):
        options.weight_scale = "channel"
    # Of all learning rates: the run's own has none.
    options_of_run = argparse.Namespace(**{**vars(options), "lr": options.lrs[0]})
    run = open_run(options_of_run, seed)
    batches = [
        (batch["pixel_values"].contiguous(), batch["labels"])
        for _, batch in zip(range(options.images // 64), run.loaders(64)["train"], strict=False)
    ]
    images = [pixels for pixels, _ in batches]
    known = [cell for cell in read(options.out)["cells"] if cell["seed"] == seed and cell["peer"] == "sdq"]
    epochs, before, started = options.epochs, _peak(), time.process_time()
    model: nn.Module
    of_user = (PEERS if options.epochs else CALIBRATED)[peer]
    if of_user is sdq:
        model, epochs = searched(run, options)
    elif peer.startswith("sdq"):
        model = of_user(run.quantize(run.network), options.target_bits, images)
    elif peer == "brevitas":
        model = of_user(copy.deepcopy(run.network), options.target_bits, images)
    elif peer == "mct":
        network = copy.deepcopy(run.network).to(memory_format=torch.contiguous_format)
        model = of_user(network, known[0]["weight_bytes"], images)
    else:
        # Clipped weights are better where nothing is trained.
        algorithm = "max" if options.epochs else "mse"
        model = of_user(copy.deepcopy(run.network), known[0]["average_bits_of_all"], batches, algorithm)
    prepared = time.process_time() - started
    bits = bits_of(model)
    sizes = {name: m.weight.numel() for name, m in run.network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    # MCT's names are those of its graph.
    bits = {name: bits.get(name, bits.get(name.replace(".", "_"), 32)) for name in sizes}
    if epochs:
        train(run, model, epochs, options.lr, peer)
    seconds, peak = time.process_time() - started, _peak()
    if peer == "mct" and epochs:
        import model_compression_toolkit as toolkit

        model = toolkit.qat.pytorch_quantization_aware_training_finalize_experimental(model)
    validation, test = (
        evaluate(model, run.loaders()[split], run.accelerator, reference=run.network)
        for split in ("validation", "test")
    )
    names = list(sizes)
    inner = names[1:-1]

    def average(of: list[str]) -> float:
        return sum(sizes[name] * bits[name] for name in of) / sum(sizes[name] for name in of)

    return {
        **test,
        "validation": validation,
        "bits": [bits[name] for name in names],
        "average_bits": average(inner),
        "average_bits_of_all": average(names),
        "weight_bytes": sum(sizes[name] * bits[name] for name in names) / 8,
        "seconds": round(seconds, 1),
        "seconds_before_training": round(prepared, 1),
        "memory_mb": round((peak - before) / 1e6),
        "file_bytes": saved_bytes(model, peer),
        "lines": len([line for line in inspect.getsource(of_user).splitlines()[1:] if line.strip()]),
        "epochs": epochs,
    }


def searched(run: Run, options: argparse.Namespace) -> tuple[SDQForImageClassification, float]:
    """As `sdq` above, with the loaders and the log of the run; what the search looked at is taken off the epochs."""
    (strategy,), _, log = run.search_one("sdq", [float(options.target_bits)], "bits", "two_sided")
    model = run.quantize(run.network)
    model.set_strategy(strategy)
    model.calibrate(run.loaders()["calibration"])
    return model, round(options.epochs - log.backward_images / len(run.data.splits["train"]), 2)


def train(run: Run, model: nn.Module, epochs: float, lr: float, name: str) -> None:
    """The training loop of all rows: distillation from the float network."""
    options = replace(run.arguments.finetune, epochs=epochs, lr=lr)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            run.distillation_loss(run.network),
            run.loaders(),
            options,
            run.accelerator,
            Path(folder),
            name=name,
            eval_metric="kl",
            reference=run.network,
        )


def bits_of(model: nn.Module) -> dict[str, int]:
    """Layer -> bits of its weights, as the tool's own quantizers say."""
    if isinstance(model, SDQForImageClassification):
        strategy: Strategy = model.strategy
        return cast(dict[str, int], strategy.weight_bits)
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if hasattr(module, "weight_quant"):
            found[name] = int(module.weight_quant.bit_width().item())
        elif hasattr(module, "weights_quantizers"):
            # Of a kind to train, or to use.
            of = next(iter(module.weights_quantizers.values()))
            trained = getattr(of, "quantization_config", None)
            found[name.removesuffix("_bn")] = trained.weights_n_bits if trained else of.num_bits
        elif quantizer is not None and hasattr(quantizer, "num_bits"):
            found[name] = quantizer.num_bits
    return found


def saved_bytes(model: nn.Module, peer: str) -> int:
    """Bytes of the file that the tool itself saves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if isinstance(model, SDQForImageClassification):
            model.eval().save_pretrained(path, print_size=False)
            return weight_file_bytes(path)
        if peer == "modelopt":
            import modelopt.torch.opt as mto

            mto.save(model, path)
        else:
            torch.save(model.state_dict(), path)
        return path.stat().st_size


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(cells: list[Cell]) -> str:
    """Markdown: a row for each tool at its best learning rate, mean over float networks and standard error."""
    lines = [
        "| tool | learning rate | average bits | test KL, nats | test top-1, % | CPU s, before training | MB | file, kB | "
        "lines | seeds |",
        "|" + "---|" * 10,
    ]
    best: dict[tuple[str, int], Cell] = {}
    prepared: dict[tuple[str, int], float] = {}
    for cell in cells:
        key = cell["peer"], cell["seed"]
        if "error" in cell:
            continue
        # SDQ's run finds the search of an earlier learning rate in its folder.
        prepared[key] = max(prepared.get(key, 0.0), cell["seconds_before_training"])
        if key not in best or cell["validation"]["kl"] < best[key]["validation"]["kl"]:
            best[key] = cell
    for key, cell in best.items():
        training = cell["seconds"] - cell["seconds_before_training"]
        best[key] = {**cell, "seconds": training + prepared[key], "seconds_before_training": prepared[key]}
    groups: dict[str, list[Cell]] = {}
    for (peer, _), cell in best.items():
        groups.setdefault(peer, []).append(cell)
    for peer, members in groups.items():
        columns = [
            mean_and_error([c[key] for c in members], d) for key, d in (("average_bits", 2), ("kl", 4), ("top1", 2))
        ]
        means = {
            key: sum(c[key] for c in members) / len(members)
            for key in ("seconds", "seconds_before_training", "memory_mb", "file_bytes", "lines")
        }
        rates = ", ".join(sorted({f"{c['lr']:g}" if c["epochs"] else "not trained" for c in members}))
        lines.append(
            f"| {peer} | {rates} | {' | '.join(columns)} | {means['seconds']:.0f}, {means['seconds_before_training']:.0f} | "
            f"{means['memory_mb']:.0f} | {means['file_bytes'] / 1e3:.0f} | {means['lines']:.0f} | {len(members)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
