"""Proof that an export computes the integers: by equality, on real images and on inputs made to break it."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..modeling_sdq import SDQForImageClassification
from .graph import BATCH, IntegerNetwork, Quantize
from .lower import ExportError

REAL, MADE = "real", "made"
# Images that are compared with the control.
CONTROLLED = 64
# Images (float32 [B, C, H, W]) -> logits (float [B, num_labels]).
Runner = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One way to compute the logits beside the integer reference, on one set of images.

    accuracy: top-1 in percent, where the labels are known.
    exact: whether equality is claimed, and so asked for; of others same_top1 says how often the first guess is the same, in
    percent, which must be so for half of the real images. Logits that are no finite numbers are never accepted.
    differ_from_control: of the first 64 images those whose logits are not those of the network with one weight changed; none
    that differ would mean that nothing was compared.
    """

    what: str
    images: str
    count: int
    equal: bool
    max_difference: float
    same_top1: float
    accuracy: float | None
    differ_from_control: int
    exact: bool

    @property
    def failed(self) -> bool:
        if (self.exact and not self.equal) or not math.isfinite(self.max_difference):
            return True
        return self.images == REAL and (not self.differ_from_control or self.same_top1 < 50)


@dataclass(frozen=True)
class Case:
    """Images (float32 [B, C, H, W]) and their logits (float64 [B, num_labels]) by the integers.

    control: those by the network with one weight changed, of the first images.
    """

    name: str
    images: Tensor
    reference: Tensor
    control: Tensor
    labels: Tensor | None = None

    def first(self, count: int) -> "Case":
        labels = None if self.labels is None else self.labels[:count]
        return Case(self.name, self.images[:count], self.reference[:count], self.control[:count], labels)


def cases(network: IntegerNetwork, control: IntegerNetwork, images: Tensor, labels: Tensor | None = None) -> list[Case]:
    """The real images, with their labels (int64 [B]), and those made to break an export.

    control: what `with_one_weight_changed` makes of `network`.
    """
    sets = {REAL: images, MADE: made_images(network)}
    return [
        Case(name, batch, network.logits(batch), control.logits(batch[:CONTROLLED]), labels if name == REAL else None)
        for name, batch in sets.items()
    ]


def compare(what: str, run: Runner, case: Case, exact: bool = True) -> Comparison:
    """Compare what `run` computes of the images of `case` with the integers."""
    got = torch.as_tensor(np.asarray(run(case.images))).double()
    if got.shape != case.reference.shape:
        raise ExportError(f"{what}: logits of shape {list(got.shape)}, expected {list(case.reference.shape)}.")
    return Comparison(
        what=what,
        images=case.name,
        count=len(case.images),
        equal=bool((got == case.reference).all()),
        max_difference=float((got - case.reference).abs().max()),
        same_top1=_share(got.argmax(1) == case.reference.argmax(1)),
        accuracy=None if case.labels is None else _share(got.argmax(1) == case.labels),
        differ_from_control=int((got[: len(case.control)] != case.control[: len(got)]).any(dim=1).sum()),
        exact=exact,
    )


def _share(which: Tensor) -> float:
    """Of the images, in percent."""
    return 100 * float(which.double().mean())


def made_images(network: IntegerNetwork, seed: int = 0) -> Tensor:
    """Images made to break an export (float32 [6, C, H, W]).

    Nothing, all at either end of the first layer's range and far beyond it, halves between its integers, and noise.
    """
    first = network.nodes[0]
    assert isinstance(first, Quantize)
    generator, size, unit = torch.Generator().manual_seed(seed), network.input_size, 2.0**first.exponent
    integers = torch.randint(first.low, first.high, size, generator=generator)
    return torch.stack(
        [
            torch.zeros(size),
            torch.full(size, first.low * unit),
            torch.full(size, first.high * unit),
            torch.full(size, 1000.0 * first.high * unit),
            (integers + 0.5) * unit,
            torch.randn(size, generator=generator) * first.high * unit,
        ]
    )


def simulation(model: SDQForImageClassification, dtype: torch.dtype) -> Runner:
    """The model's own forward pass, computed in `dtype`: float32 as ever, or float64, which holds every integer there is."""
    model = copy.deepcopy(model).to(dtype).eval()

    @torch.no_grad()
    def run(images: Tensor) -> np.ndarray:
        return np.concatenate([model(part.to(model.device, dtype)).logits.cpu() for part in images.split(BATCH)])

    return run


def with_one_weight_changed(network: IntegerNetwork, images: Tensor) -> tuple[IntegerNetwork, str]:
    """A negative control: a copy with the sign of one weight changed, and the name of that weight's layer.

    It is the largest weight of the first layer, from the middle of the network on, where the change shows in the logits of
    at least half of the first `images`; further in front it may vanish in the rounding behind it. Of a linear layer it may be
    the one that counts in the most images too: the first of many equal ones, say, may stand at an input that is always zero.
    """
    images = images[:CONTROLLED]
    reference, layers = network.logits(images), list(network.layers.values())
    for layer in layers[len(layers) // 2 :]:
        sizes = [layer.weight.abs()]
        if layer.is_linear:
            sizes.append(sizes[0] * (network.integers_of(layer.inputs[0], images) != 0).sum(0))
        for place in dict.fromkeys(int(size.argmax()) for size in sizes):
            weight = layer.weight.clone()
            weight.view(-1)[place] *= -1
            changed = replace(layer, weight=weight)
            copy = replace(network, nodes=tuple(changed if node is layer else node for node in network.nodes))
            if 2 * int((copy.logits(images) != reference).any(dim=1).sum()) >= len(images):
                return copy, layer.name
    raise ExportError(
        "No single weight shows in the logits of half of the images: are they images, and is this a trained model?"
    )
