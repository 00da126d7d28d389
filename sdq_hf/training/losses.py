"""Losses of the fine-tune: distillation and entropy-aware bin regularization (METHOD 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_sdq import SDQForImageClassification
from ..quantizers import bin_regularization
from ..quantizers.weight import channel_parts


class DivergedError(ValueError):
    """A loss that is not finite any more; names the training, the update and the learning rate."""


def distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`-mean_i sum_c p_teacher log p_student` at temperature 1, soft labels only; logits [B, C] -> 0-d float32."""
    target = F.softmax(teacher_logits.float(), dim=-1)
    return -(target * F.log_softmax(student_logits.float(), dim=-1)).sum(dim=-1).mean()


def kl_divergence(student_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(reference || student) of each image, in nats; logits [B, C] -> float32 [B]."""
    student, reference = (F.log_softmax(x.float(), dim=-1) for x in (student_logits, reference_logits))
    return (reference.exp() * (reference - student)).sum(dim=-1)


def total_bin_regularization(model: SDQForImageClassification) -> Tensor:
    """EBR summed over the layers that the search may change, 0-d float32.

    Pinned layers stand at 8 bits, where bins are narrower than any benefit (our interpretation).
    """
    strategy, terms = model.strategy, []
    for name, layer in model.quantized_layers().items():
        quantizer = layer.weight_quantizer
        if not strategy[name].pinned:
            for weight, bits, scale, _ in channel_parts(layer.weight, quantizer.bits, quantizer.effective_scale):
                terms.append(bin_regularization(weight, quantizer.form, quantizer.grid, bits, scale))
    return torch.stack(terms).sum() if terms else torch.zeros((), device=model.device)


def ramp(progress: float, length: float = 0.5) -> float:
    """Factor of a regularizer at `progress` (0 to 1) of the training: linear from 0 to 1 over the first `length`."""
    return min(1.0, progress / length)
