"""Evaluation on a split: top-1, top-5, cross-entropy and the KL divergence from a reference network."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..layers import modes_restored
from .losses import kl_divergence

Forward = Callable[[Tensor], Tensor]


def logits_of(output: Any) -> Tensor:
    """The logits of a timm model's tensor or a transformers model's output."""
    return cast(Tensor, output if isinstance(output, Tensor) else output.logits)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    accelerator: Accelerator,
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Metrics of `model` in eval mode over all images of `batches`, the same on every rank; computed as the model does.

    top1 and top5 in percent, loss (cross-entropy) and kl in nats per image; kl is KL(reference || model), there only with
    a `reference` network.
    """
    sums: Tensor | None = None
    with modes_restored(model):
        model.eval()
        for batch in batches:
            images, labels = batch["pixel_values"].to(accelerator.device), batch["labels"].to(accelerator.device)
            logits = logits_of(model(images)).float()
            expected = logits if reference is None else logits_of(reference.eval()(images)).float()
            top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            rows = torch.stack(
                [
                    top[:, 0].float(),
                    top.any(dim=1).float(),
                    F.cross_entropy(logits, labels, reduction="none"),
                    kl_divergence(logits, expected),
                    torch.ones_like(labels, dtype=torch.float32),
                ],
                dim=1,
            )
            # Drops the images that a distributed sampler repeats to fill its last batch.
            total = accelerator.gather_for_metrics(rows).double().sum(dim=0)
            sums = total if sums is None else sums + total
    if sums is None:
        raise ValueError("Nothing to evaluate: the split has no image.")
    top1, top5, loss, kl, count = sums.tolist()
    metrics = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
    return metrics if reference is None else {**metrics, "kl": kl / count}
