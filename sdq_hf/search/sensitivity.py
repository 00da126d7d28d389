"""Rivals that measure sensitivities first and then choose all bits at once by an integer program.

All measure the same loss, the KL divergence from the float network's outputs, so that signals are compared and not losses
(our choice; the papers use the loss of the task). `table` and `clado` do it as SDQ's search does: inputs quantized, batch
norm with the batch's statistics, layers that are not searched as they are. `hawq` does it in the float network.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers import quantized_layers
from ..strategy import Strategy
from ..training.evaluation import logits_of
from ..training.losses import kl_divergence
from .assignment import Damages, choices, least_quadratic, least_sum
from .errors import scale_at, weight_at
from .stochastic_weights import searching
from .task import Task, distillation_loss, float_copy

# Bits of the units that are quantized, by name -> loss.
Loss = Callable[[Mapping[str, int]], float]


def table(task: Task, images: int = 512) -> list[Strategy]:
    """A table of the KL that each layer costs at each bitwidth, all others in float, measured on `images` images.

    Bits have the least sum of the table within the budget. Takes a forward pass per layer and bitwidth.
    """
    with probing(task, images) as loss:
        damages = _single_damages(task, loss, loss({}))
    return _choose(task, damages)


def _single_damages(task: Task, loss: Loss, whole: float) -> Damages:
    """Loss above `whole`, that of no layer quantized, of each layer quantized alone at each of its bitwidths."""
    rungs = {name: task.descent.rungs(name) for name in task.descent.names}
    return {name: {bits: loss({name: bits}) - whole for bits in ladder} for name, ladder in rungs.items()}


def hawq(task: Task, images: int = 512, probes: int = 8) -> list[Strategy]:
    """HAWQ-V2's sensitivity, with HAWQ-V3's integer program (Dong et al. 2020; Yao et al. 2021).

    The damage of a layer at b bits is the average trace of its Hessian times `|Q_b(w) - w|^2`. Traces are estimated by
    Hutchinson's method in the float network, with `probes` random sign vectors for each batch.
    """
    traces = hessian_traces(task, images, probes)
    layers = quantized_layers(task.model.timm_model)

    def damage(name: str, bits: int) -> float:
        weight = layers[name].weight.detach().float()
        error = (weight_at(layers[name], bits).detach() - weight).square().sum().item()
        return max(traces[name], 0.0) / weight.numel() * error

    damages = {
        name: {bits: sum(damage(layer, bits) for layer in unit.layers) for bits in task.descent.rungs(name)}
        for name, unit in task.descent.units.items()
    }
    return _choose(task, damages)


def hessian_traces(task: Task, images: int, probes: int) -> dict[str, float]:
    """Layer -> trace of the loss's Hessian in its weights, by Hutchinson's method (mean of v'Hv, v of random signs)."""
    names, network = task.descent.layers, float_copy(task.model)
    teacher = network if task.teacher is None else task.teacher
    layers = quantized_layers(network.timm_model)
    weights = [layers[name].weight.requires_grad_() for name in names]
    generator = torch.Generator().manual_seed(task.seed)
    sums, count = torch.zeros(len(names), dtype=torch.float64), 0
    for batch in _images(task, images):
        loss = distillation_loss(network, teacher, batch, task.accelerator)
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        task.log.batches += 1
        for probe in range(probes):
            signs = [torch.randint(2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
            products = torch.autograd.grad(gradients, weights, signs, retain_graph=probe + 1 < probes)
            sums += torch.stack([(v * hv).sum() for v, hv in zip(signs, products, strict=True)]).double().cpu()
            # Through the graph twice: about the work of two backward passes.
            task.log.backward_images += 2 * len(batch)
            count += 1
    traces = cast(Tensor, task.accelerator.reduce(sums.to(task.model.device) / count, reduction="mean"))
    return dict(zip(names, traces.tolist(), strict=True))


def clado(task: Task, images: int = 256, cross_bits: int = 3) -> list[Strategy]:
    """CLADO (Deng et al. 2023): pairwise loss changes of layers, and an integer quadratic program.

    `c_ij = L(i and j quantized) - L(i) - L(j) + L(none)` for each two choices of different layers; bits have the least
    `sum d_i + sum_{i<j} c_ij`, whose matrix is made positive semidefinite first, as in the paper. Takes a forward pass for
    each two choices: at more than `cross_bits` bits, where damages are small, cross terms are taken for 0 (our
    interpretation, to bound the work).
    """
    with probing(task, images) as loss:
        matrix, damages = pairwise_damages(task, loss, cross_bits)
    values, vectors = np.linalg.eigh(matrix)
    matrix = (vectors * values.clip(min=0)) @ vectors.T
    return [
        task.descent.strategy(least_quadratic(task.descent, budget, damages, matrix, seed=task.seed))
        for budget in task.descent.budgets
    ]


def pairwise_damages(task: Task, loss: Loss, cross_bits: int) -> tuple[NDArray[np.float64], Damages]:
    """The symmetric matrix M of clado, with `x' M x = sum d_i + sum_{i<j} c_ij`, and its diagonal as a table."""
    whole = loss({})
    damages = _single_damages(task, loss, whole)
    options = choices(task.descent, damages)
    matrix = np.diag([damages[name][bits] for name, bits in options])
    for (i, (name, bits)), (j, (other, other_bits)) in combinations(enumerate(options), 2):
        if name != other and max(bits, other_bits) <= cross_bits:
            both = loss({name: bits, other: other_bits}) - whole
            matrix[i, j] = matrix[j, i] = (both - damages[name][bits] - damages[other][other_bits]) / 2
    return matrix, damages


def _choose(task: Task, damages: Damages) -> list[Strategy]:
    return [task.descent.strategy(least_sum(task.descent, budget, damages)) for budget in task.descent.budgets]


def _images(task: Task, count: int) -> Iterator[Tensor]:
    """Batches of `count` images in all, on the model's device."""
    for batch in task.batches():
        images = batch["pixel_values"][:count].to(task.model.device)
        yield images
        count -= len(images)
        if count <= 0:
            return


@contextmanager
def probing(task: Task, images: int) -> Iterator[Loss]:
    """Inside, the function it gives is the KL divergence when some layers are quantized and the others are in float."""
    task.calibrate()
    model, teacher = task.model, task.float_network()
    layers = quantized_layers(model.timm_model)
    batches = list(_images(task, images))
    count = sum(len(batch) for batch in batches)
    scales: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def loss(bits: Mapping[str, int]) -> float:
        quantized = {layer: width for name, width in bits.items() for layer in task.descent.units[name].layers}
        for name, width in quantized.items():
            if (name, width) not in scales:
                scales[name, width] = scale_at(layers[name], width)
            weight = weight_at(layers[name], width, scales[name, width])
            layers[name].weight_source = lambda _, weight=weight: weight
        losses = []
        for batch, target in zip(batches, targets, strict=True):
            with task.accelerator.autocast():
                logits = logits_of(model(pixel_values=batch))
            losses.append(kl_divergence(logits, target).sum())
        for name in quantized:
            layers[name].weight_source = _float_weight
        task.log.forward_images += count
        mean = cast(Tensor, task.accelerator.reduce(torch.stack(losses).sum() / count, reduction="mean"))
        return mean.item()

    try:
        with searching(model, batch_norm=task.batch_norm):
            with torch.no_grad(), task.accelerator.autocast():
                targets = [logits_of(teacher(batch)) for batch in batches]
            task.log.batches += len(batches)
            for name in task.descent.layers:
                layers[name].weight_source = _float_weight
            yield loss
    finally:
        for name in task.descent.layers:
            layers[name].weight_source = None


def _float_weight(weight: Tensor) -> Tensor:
    return weight
