"""Fine-tune a quantized model with transformers' `Trainer`, with or without distillation.

    python scripts/train_with_trainer.py --model runs/demo/models/sdq-bits-2 --output_dir runs/trainer
    python scripts/train_with_trainer.py --model org/resnet18-sdq --dataset FOLDER_OR_HUB_ID --output_dir runs/trainer \
        --teacher runs/demo/teacher/model.safetensors

All options of `TrainingArguments` are taken: --learning_rate, --num_train_epochs, --bf16, --report_to, --push_to_hub, ...
Bits stay what they are. A training that was stopped goes on with --resume_from_checkpoint true. Wrong input ends in one line
and exit code 2.
"""

import logging
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone
from sdq_hf.cli import from_folder_or_hub
from sdq_hf.training.arguments import parse_groups
from sdq_hf.training.data import check_labels, load_image_data, with_channels
from sdq_hf.training.loaders import StreamedImages, build_transforms
from sdq_hf.training.losses import distillation
from sdq_hf.training.metrics import compute_metrics
from sdq_hf.training.optim import OptimizerArguments, create_optimizer
from sdq_hf.training.ranges import POSITIVE
from sdq_hf.training.trainer import QATCallback


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a quantized model."})
    dataset: str | None = field(default=None, metadata={"help": "As in run_sdq.py; default: the bundled sample."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "File with float weights of the same timm network, to distil from; default: labels."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read images while they are used; needs --max_steps, as in run_sdq.py."}
    )
    aug: Literal["none", "light", "rand"] = field(default="light", metadata={"help": "Augmentation, as in run_sdq.py."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Use so many images of each split only.", "range": POSITIVE}
    )


class DistillationTrainer(Trainer):
    """`Trainer` whose loss is the distance to a teacher's outputs."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(inputs["pixel_values"])
        loss = distillation(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


def main(argv: list[str]) -> int:
    """Run with the options `argv`; returns the exit code."""
    try:
        description = str(__doc__).split("\n", 1)[0]
        run(*parse_groups((ScriptArguments, TrainingArguments), argv, "train_with_trainer.py", description))
    except (ValueError, OSError) as error:
        print(f"train_with_trainer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: ScriptArguments, training: TrainingArguments) -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    training.remove_unused_columns = False  # the images become pixel_values only when they are asked for
    model = from_folder_or_hub(SDQForImageClassification, options.model)
    train_transform, transform = build_transforms(model.config.pretrained_cfg, aug=options.aug)
    limits: dict[str, Any] = {"max_train_samples": options.max_samples, "max_eval_samples": options.max_samples}
    data = load_image_data(options.dataset, **limits, streaming=options.streaming)
    check_labels(data.label_names, model.config.id2label)
    channels = model.config.input_size[0]

    def transformed(split: str, transform: Callable[..., Any]) -> datasets.Dataset | StreamedImages:
        images = data.splits[split]
        if isinstance(images, datasets.IterableDataset):
            return StreamedImages(images, data, channels, transform, training.seed)

        def apply(batch: dict[str, Any]) -> dict[str, Any]:
            pixels = [transform(with_channels(image, channels)) for image in batch[data.image_column]]
            return {"pixel_values": pixels, "labels": batch[data.label_column]}

        return images.with_transform(apply)

    recipe = OptimizerArguments(lr=training.learning_rate, weight_decay=training.weight_decay)
    common: dict[str, Any] = {
        "model": model,
        "args": training,
        "train_dataset": transformed("train", train_transform),
        "eval_dataset": transformed("validation", transform),
        "compute_metrics": compute_metrics,
        "callbacks": [QATCallback()],
        # Scales and steps learn without weight decay.
        "optimizers": (create_optimizer(model, recipe), None),
    }
    if options.teacher is None:
        trainer = Trainer(**common)
    else:
        trainer = DistillationTrainer(teacher=load_teacher(model, options.teacher), **common)
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    print(trainer.evaluate())
    print("test:", trainer.evaluate(transformed("test", transform), metric_key_prefix="test"))
    if training.push_to_hub:
        print("Published:", model.push_to_hub(trainer.hub_model_id or training.hub_model_id))


def load_teacher(model: SDQForImageClassification, path: str) -> nn.Module:
    """timm's network of `model` with the weights of a file; `ValueError` where they do not fit."""
    config = model.config
    what = f"--teacher {path} is no file of float weights of {config.architecture}"
    if not Path(path).is_file():
        raise ValueError(f"{what}: there is no such file")
    try:
        return create_backbone(
            config.architecture, num_classes=config.num_labels, checkpoint_path=path, **config.model_args
        )
    except ValueError as error:
        # torch lists every tensor that is missing.
        raise ValueError(f"{what}: {textwrap.shorten(str(error.__cause__ or error), 200)}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
