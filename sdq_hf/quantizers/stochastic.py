"""Stochastic quantization between two adjacent bitwidths: the paper's differentiable bitwidth parameter, DBP.

`w_q = Q_upper(w)` with probability beta and `Q_lower(w)` with probability 1 - beta (METHOD 3).
"""

import hashlib

import torch
from torch import Tensor


class _HardChoice(torch.autograd.Function):
    """`chosen` forward; backward as `lower + c (upper - lower)`: dL/dc = <dL/dw_q, upper - lower>."""

    @staticmethod
    def forward(ctx, choice: Tensor, chosen: Tensor, difference: Tensor) -> Tensor:
        ctx.save_for_backward(difference)
        ctx.per_channel = choice.dim() > 0
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (difference,) = ctx.saved_tensors
        product = grad * difference
        return product.flatten(1).sum(1) if ctx.per_channel else product.sum(), grad, None


def stochastic_choice(choice: Tensor, chosen: Tensor, difference: Tensor) -> Tensor:
    """The drawn weights `chosen`, whose backward sees the soft choice.

    `choice` is the soft probability of the upper bitwidth, 0-d or one for each output channel [C] (it takes the gradient),
    `chosen` the quantized weights that were drawn (gradient passes through to them), `difference` = Q_upper - Q_lower,
    detached.
    """
    return _HardChoice.apply(choice, chosen, difference)


def draw(seed: int, step: int, count: int) -> Tensor:
    """`count` uniform numbers in (0, 1) that depend on `seed` and `step` alone: all ranks and resumed runs draw the same."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)


def gumbel_choice(theta: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Gumbel-softmax over (upper, lower) with probabilities (beta, 1 - beta), beta = sigmoid(theta).

    `theta` and `uniform` have shape [L]. Returns the hard choice (bool [L], True is upper: the argmax of
    log pi + Gumbel noise) and the soft one (float [L]: softmax((log pi + g) / temperature)). The difference of two Gumbel
    variables is a logistic one, and log(beta / (1 - beta)) = theta, so both need one uniform number a layer.
    """
    logits = theta + (torch.log(uniform) - torch.log1p(-uniform)).to(theta)
    return logits > 0, torch.sigmoid(logits / temperature)
