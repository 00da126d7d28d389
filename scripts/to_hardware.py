"""Put a quantized model in the hardware profile, train it there for a while, and say what that costs.

    python scripts/to_hardware.py --model runs/demo/models/sdq-bits-2 --output_dir runs/hardware
    accelerate launch scripts/to_hardware.py --model org/resnet18-sdq@w2 --dataset FOLDER_OR_HUB_ID --output_dir runs/hardware

In the profile batch norm is folded, scales are powers of two, biases are whole numbers. The model learns there from the
outputs of the model that it was made from (or of `--teacher`, a file of float weights); bits stay what they are. It is saved
in output_dir, ready for `sdq-hf export`, with hardware.json: validation and test metrics of the model before, in the profile
without training, and trained. The epoch is chosen on the validation split; the test split is only reported.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone
from sdq_hf.cli import from_folder_or_hub
from sdq_hf.export.lower import integer_network
from sdq_hf.training.arguments import ArgumentError, DataArguments, parse_groups
from sdq_hf.training.data import check_labels
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.fit import fit
from sdq_hf.training.loaders import build_loaders
from sdq_hf.training.optim import OptimizerArguments
from sdq_hf.training.ranges import SEED
from sdq_hf.training.stages import end, load_data, loss_of_teacher, share_steps
from sdq_hf.writing import remove, write_json


@dataclass
class HardwareArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a quantized model; a revision may follow after @."})
    output_dir: str = field(metadata={"help": "Folder for the model in the profile."})
    teacher: str | None = field(
        default=None, metadata={"help": "File with float weights of the same network to learn from."}
    )
    weight_scale: str | None = field(
        default=None, metadata={"help": "layer or channel; default: channel, where the weight quantizer can."}
    )
    seed: int = field(
        default=0, metadata={"help": "Of data order, augmentation and the validation split.", "range": SEED}
    )
    cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})


def main(argv: list[str]) -> int:
    """Run with the options `argv`; returns the exit code."""
    try:
        groups = (HardwareArguments, DataArguments, OptimizerArguments)
        description = str(__doc__).split("\n", 1)[0]
        options, data, training = parse_groups(
            groups, argv, "to_hardware.py", description, epochs=1.0, warmup_epochs=0, lr=3e-4
        )
        run(options, data, training)
    except (ValueError, OSError) as error:
        print(f"to_hardware.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: HardwareArguments, data: DataArguments, training: OptimizerArguments) -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    set_seed(options.seed)
    accelerator = Accelerator(cpu=options.cpu)
    if Path(options.output_dir).resolve() == Path(options.model).resolve():
        raise ValueError(f"--output_dir {options.output_dir} is the folder of the model itself: choose another one.")
    checkpoints = Path(options.output_dir) / "training"
    for path in sorted(checkpoints.glob("*")):
        if not path.name.startswith(("checkpoint", "best.safetensors")):
            raise ValueError(
                f"{path} is no checkpoint, and {checkpoints} is removed in the end: choose another --output_dir."
            )
    model = from_folder_or_hub(SDQForImageClassification, options.model).eval().to(accelerator.device)
    loaders = load(model, options, data, accelerator)
    teacher: nn.Module = model
    if options.teacher:
        arguments = {"num_classes": model.config.num_labels, **model.config.model_args}
        teacher = create_backbone(model.config.architecture, checkpoint_path=options.teacher, **arguments)
        teacher = teacher.eval().to(accelerator.device)
    rows = {"before": metrics_of(model, loaders, accelerator, teacher)}
    profile = model.to_hardware_profile(loaders["calibration"], weight_scale=options.weight_scale)
    share_steps(profile)
    # What has no integer form is better known before the training than after it.
    integer_network(profile)
    rows["profile"] = metrics_of(profile, loaders, accelerator, teacher)
    if training.epochs:
        fit(
            profile,
            loss_of_teacher(teacher),
            loaders,
            training,
            accelerator,
            checkpoints,
            name="hardware",
            eval_metric="kl",
            reference=teacher,
        )
        rows["trained"] = metrics_of(profile, loaders, accelerator, teacher)
    if accelerator.is_main_process:
        remove(checkpoints)
        profile.eval().save_pretrained(options.output_dir)
        write_json(Path(options.output_dir) / "hardware.json", {"model": Path(options.model).name, "rows": rows})
        print(table(rows))
    end(accelerator)


# Options of run_sdq.py that have no place here: the model has its own size, and learns from outputs of whole images.
_NOT_HERE = ("streaming", "img_size", "mixup", "cutmix", "label_smoothing", "prefetch_factor", "pin_memory")


def load(
    model: SDQForImageClassification, options: HardwareArguments, data: DataArguments, accelerator: Accelerator
) -> dict[str, Any]:
    """Loaders of all splits, with the sizes and the normalisation of the model."""
    for name in _NOT_HERE:
        if getattr(data, name) != getattr(DataArguments(), name):
            raise ArgumentError(f"--{name} has no place in to_hardware.py: leave it out")
    images = load_data(data, options.seed)
    check_labels(images.label_names, model.config.id2label)
    config = model.config.pretrained_cfg or {}
    loaders = build_loaders(
        images, config, batch_size=data.batch_size, aug=data.aug, num_workers=data.workers, seed=options.seed
    )
    return {split: accelerator.prepare(loader) for split, loader in loaders.items()}


def metrics_of(
    model: nn.Module, loaders: dict[str, Any], accelerator: Accelerator, reference: nn.Module
) -> dict[str, dict[str, float]]:
    return {
        split: evaluate(model, loaders[split], accelerator, reference=reference) for split in ("validation", "test")
    }


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A line for each state of the model, KL in nats from the teacher."""
    lines = [f"{'':8}  {'validation top-1':>16}  {'KL':>6}  {'test top-1':>10}  {'KL':>6}"]
    for name, splits in rows.items():
        seen, unseen = splits["validation"], splits["test"]
        lines.append(f"{name:8}  {seen['top1']:16.2f}  {seen['kl']:6.4f}  {unseen['top1']:10.2f}  {unseen['kl']:6.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
