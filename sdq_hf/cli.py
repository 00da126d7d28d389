"""The command `sdq-hf`: look at models, compare their bits, publish them."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from . import __version__
from .checkpoint import DIGEST
from .configuration_sdq import SDQConfig
from .costs import bitops_text
from .export.report import cost_report, report_text
from .hub.errors import HTTPError, reason_of
from .layers import PACKED, is_quantizer_state
from .strategy import FLOAT_BITS, LayerBits, Strategy, bits_text
from .writing import write_json

# Of sdq_hf.export.artefacts, which is imported when it is used.
EXPORT_TARGETS = ("qonnx", "onnx", "onnx-int8", "hls4ml", "verilog", "da4ml")
_MODEL_HELP = "Folder of a saved model, or Hub id; a revision may follow after @, as in org/resnet18-sdq@w2.5."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code: 0, 2 after one line that says what is wrong, or 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    # What they would say while they load and retry is said in the one line at the end.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as head, has seen enough; nothing is left to be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, ArithmeticError, KeyError) as error:
        print(f"sdq-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sdq-hf: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdq-hf",
        description="Mixed-precision quantized timm models: look at them, compare their bits, publish and export them.",
    )
    parser.add_argument("--version", action="version", version=f"sdq-hf {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="print the bits of every layer and the sizes",
        description="Print the bits of every layer (its strategy) and the sizes of the file. Downloads config.json only.",
    )
    info.add_argument("model", help=_MODEL_HELP)
    info.set_defaults(run=_info)

    diff = commands.add_parser(
        "diff",
        help="compare the bits of two models",
        description="List the layers whose bits differ between two models, and what the difference costs.",
        epilog="Example: sdq-hf diff runs/demo/models/sdq-bits-2 runs/demo/models/greedy-bits-2",
    )
    diff.add_argument("first", help=_MODEL_HELP)
    diff.add_argument("second", help=_MODEL_HELP)
    diff.set_defaults(run=_diff)

    report = commands.add_parser(
        "report",
        help="print what each layer costs on hardware that computes at its bits",
        description="Print the bytes, MACs, BitOPs and estimated LUTs of every layer, and what each number is. Downloads "
        "config.json only.",
    )
    report.add_argument("model", help=_MODEL_HELP)
    report.add_argument("--json", type=Path, metavar="FILE", help="Also write it as JSON.")
    report.add_argument(
        "--zigzag",
        nargs="?",
        const="tpu_like",
        metavar="ACCELERATOR",
        help="Also latency and memory energy by the model ZigZag, a second or two a layer (needs sdq-hf[zigzag]); default "
        "accelerator: tpu_like.",
    )
    report.set_defaults(run=_report)

    push = commands.add_parser(
        "push",
        help="publish a model, or all budgets of a run, on the Hub",
        description="Publish the folder of a saved model in one commit. Of a finished run of run_sdq.py, publish each SDQ "
        "budget on a branch (w2.5, bitops-w2, ...) and the first on main. Log in first: hf auth login.",
    )
    push.add_argument("folder", type=Path, help="Folder of a saved model, or of a run (with results.json).")
    push.add_argument("repo_id", help="Repository, such as org/resnet18-sdq; made when it is missing.")
    push.add_argument("--private", action="store_true", default=None, help="Make the repository private.")
    push.add_argument("--revision", help="Branch to publish on; made when it is missing. Not for a run.")
    push.add_argument("--create-pr", action="store_true", help="Open a pull request in place of a commit.")
    push.add_argument("--commit-message", help="Default: the network and its average bits.")
    push.set_defaults(run=_push)

    export = commands.add_parser(
        "export",
        help="export a model in the hardware profile, with a proof",
        description="Write exports of a model in the hardware profile (scripts/to_hardware.py makes one), its integers, a "
        "manifest of the arithmetic, and verification.json: each export beside the integer reference, equal or "
        "not, on real images and on some made to break it. An export that fails leaves nothing but its report.",
        epilog="Example: sdq-hf export runs/hardware --to qonnx onnx --output runs/exports",
    )
    export.add_argument("model", help=_MODEL_HELP)
    export.add_argument(
        "--to", nargs="+", required=True, metavar="TARGET", help="One or more of: " + ", ".join(EXPORT_TARGETS) + "."
    )
    export.add_argument("--output", type=Path, required=True, help="Folder of the exports.")
    export.add_argument("--dataset", help="Data set of the real images, as in run_sdq.py; default: the bundled sample.")
    export.add_argument("--data-dir", help="As in run_sdq.py.")
    export.add_argument("--images", type=int, default=256, help="Real images, of the test split; default: 256.")
    export.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Compare the exports with the integers; on by default.",
    )
    hls = export.add_argument_group("hls4ml", "How the target hls4ml is built; its numbers stay the same.")
    hls.add_argument("--reuse-factor", type=int, default=1, help="Multiplications that share a multiplier; default: 1.")
    hls.add_argument("--strategy", help="latency or resource; default: resource from a reuse factor of 2 on.")
    hls.add_argument("--part", help="Device; default: hls4ml's.")
    hls.add_argument("--clock-period", type=float, metavar="NS", help="Nanoseconds; default: hls4ml's.")
    export.set_defaults(run=_export)
    return parser


def _info(options: argparse.Namespace) -> int:
    config, files = _config(options.model), _tensors(options.model)
    strategy = _strategy(options.model, config)
    print(f"{options.model}: {config.architecture}, {config.num_labels} classes, images {list(config.input_size)}")
    print(strategy.table())
    whole = sum(size for size, _ in files.values())
    float_bytes = _float_bytes(strategy, files)
    print(
        f"file {whole / 1e3:,.1f} kB: {strategy.weight_bytes() / 1e3:,.1f} kB of packed weights, the rest biases, norms, "
        f"scales and names; {float_bytes / whole:.1f}x smaller than {float_bytes / 1e3:,.1f} kB in float32"
    )
    return 0


def _diff(options: argparse.Namespace) -> int:
    names = (options.first, options.second)
    first, second = (_strategy(name, _config(name)) for name in names)
    layers = [*first, *(name for name in second if name not in first)]
    pairs = {name: (dict(first).get(name), dict(second).get(name)) for name in layers}
    changed = {name: pair for name, pair in pairs.items() if _bits(pair[0]) != _bits(pair[1])}
    print(f"{len(changed)} of {len(layers)} layers differ (W: weight bits, A: input bits)")
    width = max((len(name) for name in changed), default=0)
    for name, (mine, theirs) in changed.items():
        print(f"{name:{width}}  {_bits(mine):>7} -> {_bits(theirs)}")
    for title, strategy in zip(names, (first, second), strict=True):
        print(
            f"{title}: {strategy.average_bits():.2f} average bits, {strategy.weight_bytes() / 1e3:,.1f} kB of weights, "
            f"{bitops_text(strategy.bitops())}"
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    config = _config(options.model)
    strategy, memory = _strategy(options.model, config), None
    if options.zigzag is not None:
        from .configured import timm_backbone
        from .export.zigzag import layer_shapes, memory_model

        memory = memory_model(strategy, layer_shapes(timm_backbone(config), config.input_size), options.zigzag)
    report = cost_report(strategy, memory=memory)
    print(report_text(report))
    if options.json is not None:
        write_json(options.json, report)
    return 0


def _push(options: argparse.Namespace) -> int:
    from .hub.publish import publish_folder, publish_run

    if not options.folder.is_dir():
        raise ValueError(f"{options.folder} is no folder.")
    common = {
        "private": options.private,
        "create_pr": options.create_pr,
        "commit_message": options.commit_message,
    }
    if (options.folder / "results.json").exists():
        if options.revision:
            raise ValueError("--revision is not for a run: each of its budgets has a branch of its own.")
        for revision, address in publish_run(options.folder, options.repo_id, **common).items():
            print(f"Published {revision}: {address}")
    else:
        print(f"Published: {publish_folder(options.folder, options.repo_id, revision=options.revision, **common)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    import datasets

    from .export.artefacts import check_targets, export_model
    from .export.hls import HLSOptions
    from .export.images import real_images
    from .images import DataError
    from .modeling_sdq import SDQForImageClassification
    from .training.data import check_labels

    check_targets(options.to)
    hls = HLSOptions(options.reuse_factor, options.strategy, options.part, options.clock_period)
    if hls != HLSOptions() and "hls4ml" not in options.to:
        raise ValueError(
            "--reuse-factor, --strategy, --part and --clock-period are for the target hls4ml: add it to --to."
        )
    if options.images < 1:
        raise ValueError(f"--images must be at least 1, got {options.images}.")
    model = from_folder_or_hub(SDQForImageClassification, options.model).eval()
    datasets.disable_progress_bars()
    images, labels, calibration, classes = real_images(model, options.dataset, options.data_dir, options.images)
    known: Tensor | None = labels
    try:
        check_labels(classes, model.config.id2label)
    except DataError as error:
        print(f"No accuracy: {error}")
        known = None
    report = export_model(model, options.output, options.to, images, known, calibration, options.verify, print, hls)
    print(f"Exported {', '.join(options.to)} to {options.output}" + ("" if report["verified"] else ", not verified"))
    return 0


def _bits(layer: LayerBits | None) -> str:
    if layer is None:
        return "absent"
    return f"W{bits_text(layer.weight_bits)} A{bits_text(layer.activation_bits)}"


def name_and_revision(model: str) -> tuple[str, str | None]:
    """Of a folder, a Hub id, or `ID@REVISION`. Raises `ValueError` for a folder with a revision, and for that of a run."""
    if os.path.isdir(model):
        found = () if Path(model, "config.json").exists() else Path(model).glob("models/*/config.json")
        if models := sorted(path.parent for path in found):
            raise ValueError(f"{model} is the folder of a run: name one of its models, {', '.join(map(str, models))}.")
        return model, None
    name, _, revision = model.partition("@")
    if revision and os.path.isdir(name):
        raise ValueError(f"{name} is a folder, which has no revision {revision!r}: leave out @{revision}.")
    return name, revision or None


def from_folder_or_hub(cls: Any, model: str) -> Any:
    """`cls.from_pretrained` of a folder, a Hub id, or `ID@REVISION`; an error says where there is no such folder."""
    name, revision = name_and_revision(model)
    try:
        return cls.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        if os.path.isdir(name):
            raise
        raise ValueError(f"There is no folder {name!r}, and as a Hub id: {error}") from error


def _config(model: str) -> SDQConfig:
    config = from_folder_or_hub(AutoConfig, model)
    if not isinstance(config, SDQConfig):
        raise ValueError(f"{model} is a model of type {config.model_type!r}, not 'sdq'.")
    return config


def _strategy(model: str, config: SDQConfig) -> Strategy:
    strategy = Strategy.from_json(config.strategy or [])
    if not strategy:
        raise ValueError(f"{model}: config.json has no strategy.")
    return strategy


def _float_bytes(strategy: Strategy, files: Mapping[str, tuple[int, Mapping[str, int]]]) -> int:
    """What the tensors take in float32, as `SDQForImageClassification.float_bytes` says of a loaded model."""
    values = [item for _, counts in files.values() for item in counts.items()]
    rest = [
        count * (8 if name.endswith("num_batches_tracked") else 4)
        for name, count in values
        if not name.endswith(PACKED) and name != DIGEST and not is_quantizer_state(name)
    ]
    return 4 * sum(layer.num_weights for layer in strategy.values() if layer.weight_bits != FLOAT_BITS) + sum(rest)


def _tensors(model: str) -> dict[str, tuple[int, Mapping[str, int]]]:
    """File -> its size in bytes, and tensor -> number of values; from the headers alone."""
    name, revision = name_and_revision(model)
    if os.path.isdir(name):
        found: dict[str, tuple[int, Mapping[str, int]]] = {}
        for path in sorted(Path(name).glob("model*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    counts = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{path} is no readable safetensors file: {error}") from error
            found[path.name] = (path.stat().st_size, counts)
        if not found:
            raise ValueError(f"{model} has no safetensors file.")
        return found
    api = HfApi()
    try:
        metadata = api.get_safetensors_metadata(name, revision=revision).files_metadata
        sizes = {
            f.rfilename: f.size for f in api.model_info(name, revision=revision, files_metadata=True).siblings or ()
        }
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{model}: {error}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{model}: {reason_of(error)}") from error
    return {
        file: (sizes[file] or 0, {key: tensor.parameter_count for key, tensor in header.tensors.items()})
        for file, header in metadata.items()
    }


if __name__ == "__main__":
    sys.exit(main())
