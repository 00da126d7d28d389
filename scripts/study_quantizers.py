"""Which weight quantizer and which grid is best at 1, 2, 3 and 4 bits: short fine-tunes of one pretrained network.

    accelerate launch scripts/run_sdq.py --dataset fashion_mnist --img_size 28 --teacher_epochs 8 --stage teacher \
        --output_dir runs/resnet20
    python scripts/study_quantizers.py --dataset fashion_mnist --teacher runs/resnet20 --out docs/benchmarks/quantizers.json

Every searchable layer has the same bits, activations have 4. All cells of a seed see the same images in the same order,
taken from the whole training split. Cells are kept in the result file: a run that is stopped goes on where it was. Only the
validation split, held out of train, is looked at.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from study_common import read
from torch import nn

from sdq_hf import SDQForImageClassification
from sdq_hf.quantizers import FORMS, GRIDS
from sdq_hf.training.data import load_image_data
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.loaders import build_loaders
from sdq_hf.training.losses import distillation
from sdq_hf.training.optim import OptimizerArguments, create_optimizer, create_scheduler
from sdq_hf.writing import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="as in run_sdq.py; default: the bundled sample")
    parser.add_argument("--model", default="resnet20_cifar")
    parser.add_argument("--teacher", type=Path, required=True, help="output folder of run_sdq.py --stage teacher")
    parser.add_argument("--img_size", type=int, default=28)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=100, help="batches of each fine-tune")
    parser.add_argument("--eval_images", type=int, default=3000, help="validation images that are looked at")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/quantizers.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    result = read(options.out)
    if not options.table:
        run(options, result)
    print(table(result["cells"]))


def run(options: argparse.Namespace, result: dict[str, Any]) -> None:
    datasets.disable_progress_bars()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = load_image_data(options.dataset, max_eval_samples=options.eval_images)
    network = timm.create_model(options.model, num_classes=len(data.label_names), in_chans=data.channels)
    network.load_state_dict(load_file(options.teacher / "teacher" / "model.safetensors"))
    network = network.to(accelerator.device).to(memory_format=torch.channels_last).eval()
    result |= {
        "options": {
            k: v for k, v in vars(options).items() if k in ("model", "updates", "batch_size", "lr", "eval_images")
        },
        "images": len(data.splits["train"]),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {accelerator.device.type}",
    }
    cells = [
        {"seed": seed, "bits": bits, "form": form, "grid": grid}
        for seed in options.seeds
        for bits in options.bits
        for form in FORMS
        # At one bit both grids are {-1, +1}.
        for grid in (GRIDS if bits > 1 else GRIDS[:1])
    ]
    for cell in cells:
        if any(cell.items() <= done.items() for done in result["cells"]):
            continue
        started = time.perf_counter()
        metrics = finetune(cell, options, data, network, accelerator)
        # Read anew: another process may work at other seeds of the same file.
        if options.out.exists():
            result["cells"] = json.loads(options.out.read_text())["cells"]
        result["cells"].append({**cell, **metrics, "seconds": time.perf_counter() - started})
        write_json(options.out, result)
        print({**cell, **{key: round(value, 4) for key, value in metrics.items()}}, flush=True)


def finetune(
    cell: dict[str, Any], options: argparse.Namespace, data: Any, network: nn.Module, accelerator: Accelerator
) -> dict[str, float]:
    """Validation metrics of the network with one quantizer, after distillation from the float network."""
    set_seed(cell["seed"])
    model = SDQForImageClassification.from_float(
        network,
        options.model,
        img_size=options.img_size,
        model_args={"in_chans": data.channels},
        weight_quantizer=cell["form"],
        weight_grid=cell["grid"],
    )
    model.to(accelerator.device).to(memory_format=torch.channels_last)
    loaders = build_loaders(
        data, model.config.pretrained_cfg or {}, batch_size=options.batch_size, aug="light", seed=cell["seed"]
    )
    loaders = {name: accelerator.prepare(loader) for name, loader in loaders.items()}
    model.set_strategy(cell["bits"])
    model.calibrate(loaders["calibration"])
    recipe = OptimizerArguments(epochs=1, lr=options.lr)
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe, options.updates)
    model.train()
    done = 0
    while done < options.updates:
        for batch in loaders["train"]:
            scheduler.step_update(done)
            with torch.no_grad():
                target = network(batch["pixel_values"])
            distillation(model(batch["pixel_values"]).logits, target).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == options.updates:
                break
    model.recalibrate_batch_norm(loaders["calibration"])
    return evaluate(model, loaders["validation"], accelerator, reference=network)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: validation KL to the float network and top-1, mean over seeds and standard deviation."""
    lines = ["| bits | quantizer | grid | KL, nats | top-1, % | seeds |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["bits"], cell["form"], cell["grid"]), []).append(cell)
    ranked = sorted(groups.items(), key=lambda g: (g[0][0], statistics.fmean(c["kl"] for c in g[1])))
    for (bits, form, grid), members in ranked:
        numbers = []
        for key, digits in (("kl", 4), ("top1", 2)):
            values = [cell[key] for cell in members]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            numbers.append(f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {bits} | {form} | {grid if bits > 1 else 'both'} | {' | '.join(numbers)} | {len(members)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
