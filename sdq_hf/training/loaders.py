"""Batches from image data: timm's transforms, and a fast path for small images that fit in memory."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from timm.data import Mixup, create_transform
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms

from .data import ImageData, row_at, with_channels

Batch = Mapping[str, Tensor]
AUGMENTATIONS = ("none", "light", "rand")
_SMALL = 96
_CACHE_BYTES = 512 * 2**20


def _sizes(pretrained_cfg: dict[str, Any], img_size: int | None) -> tuple[int, int, int]:
    channels, height, width = pretrained_cfg["input_size"]
    return (channels, img_size, img_size) if img_size else (channels, height, width)


def build_transforms(
    pretrained_cfg: dict[str, Any], *, img_size: int | None = None, aug: str = "light"
) -> tuple[Any, Any]:
    """Training and evaluation transforms, PIL image -> float tensor [C, H, W], with the model's own mean, std and size.

    aug "none": as in evaluation. "light": random crop and horizontal flip; below 96 pixels the crop is padded by an
    eighth (CIFAR's recipe), above it is timm's random resized crop. "rand": timm's RandAugment and random erasing.
    """
    if aug not in AUGMENTATIONS:
        raise ValueError(f"aug must be one of {', '.join(AUGMENTATIONS)}, got {aug!r}.")
    size = _sizes(pretrained_cfg, img_size)
    common = {"mean": tuple(pretrained_cfg["mean"]), "std": tuple(pretrained_cfg["std"])}
    interpolation = pretrained_cfg.get("interpolation", "bilinear")
    evaluation = create_transform(
        size,
        interpolation=interpolation,
        crop_pct=pretrained_cfg.get("crop_pct"),
        crop_mode=pretrained_cfg.get("crop_mode"),
        is_training=False,
        **common,
    )
    if aug == "none":
        return evaluation, evaluation
    if aug == "rand":
        train = create_transform(
            size,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            interpolation=interpolation,
            **common,
        )
    elif size[1] >= _SMALL:
        train = create_transform(size, is_training=True, color_jitter=None, interpolation=interpolation, **common)
    else:
        head = transforms_imagenet_eval(size[1:], crop_pct=1.0, interpolation=interpolation, normalize=False)
        train = transforms.Compose(
            [
                *head.transforms[:-1],
                transforms.RandomCrop(size[1:], padding=size[1] // 8),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(common["mean"], common["std"]),
            ]
        )
    return train, evaluation


def build_mixup(mixup: float, cutmix: float, label_smoothing: float, num_classes: int) -> Mixup | None:
    """timm's Mixup, None when neither mixup nor cutmix is asked for."""
    if mixup <= 0 and cutmix <= 0:
        return None
    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes)


def _seed_of(*parts: int) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


class EpochSampler(Sampler):
    """Yields (epoch, row) in an order that depends on seed and epoch alone; `fixed` stays at the first epoch."""

    def __init__(self, count: int, seed: int, fixed: bool = False):
        self.count, self.seed, self.fixed, self.epoch = count, seed, fixed, 0

    def set_epoch(self, epoch: int) -> None:
        # Accelerate counts the passes over a loader and sets the epoch by itself.
        self.epoch = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, self.epoch))
        return ((self.epoch, row) for row in torch.randperm(self.count, generator=generator).tolist())


def _split_key(key: int | tuple[int, int]) -> tuple[int, int]:
    return key if isinstance(key, tuple) else (0, key)


class TransformedImages(torch.utils.data.Dataset):
    """Images decoded and transformed one by one.

    Each image's augmentation is seeded by (seed, epoch, row): the same for any number of workers, and after a resume.
    """

    def __init__(self, split: Dataset, data: ImageData, channels: int, transform: Any, seed: int):
        self.split, self.data, self.channels, self.transform, self.seed = split, data, channels, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = _split_key(key)
        entry = row_at(self.split, row, self.data.image_column)
        with _seeded(_seed_of(self.seed, epoch, row)):
            return _transformed(entry, self.data, self.channels, self.transform)


def _transformed(entry: Any, data: ImageData, channels: int, transform: Any) -> dict[str, Any]:
    image = with_channels(entry[data.image_column], channels)
    return {"pixel_values": transform(image), "labels": entry[data.label_column]}


class StreamedImages(torch.utils.data.IterableDataset):
    """Images of a stream, in its order, transformed one by one.

    `set_epoch` shuffles the stream anew; `fixed` stays at the first epoch. Augmentations are seeded by (seed, epoch, place
    in the stream), and where several workers share its files, by the worker.
    """

    def __init__(
        self, split: IterableDataset, data: ImageData, channels: int, transform: Any, seed: int, fixed: bool = False
    ):
        self.split, self.data, self.channels, self.transform, self.seed = split, data, channels, transform, seed
        self.fixed, self.epoch = fixed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.fixed else epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        self.split.set_epoch(self.epoch)
        for place, entry in enumerate(self.split):
            with _seeded(_seed_of(self.seed, self.epoch, place, 0 if worker is None else worker.id)):
                example = _transformed(entry, self.data, self.channels, self.transform)
            yield example


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators of random, numpy and torch (CPU) start from `seed`; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would seed the generators of all GPUs too, and where there is none take a millisecond to note it.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class CachedImages(torch.utils.data.Dataset):
    """Small images decoded once, transformed a whole batch at a time: crop, flip and normalise as tensor operations."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool,
        seed: int,
    ):
        self.pixels, self.labels, self.augment, self.seed = pixels, labels, augment, seed
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        pairs = [_split_key(key) for key in keys]
        rows = torch.tensor([row for _, row in pairs])
        images = self.pixels[rows]
        if self.augment:
            generator = torch.Generator().manual_seed(_seed_of(self.seed, *pairs[0]))
            images = random_crop_and_flip(images, images.shape[-1] // 8, generator)
        # As torchvision's ToTensor and Normalize do it, so that both paths give the same numbers.
        values = images.float().div_(255).sub_(self.mean).div_(self.std)
        return {"pixel_values": values, "labels": self.labels[rows]}


def random_crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """CIFAR's augmentation on a batch [B, C, H, W]: zero padding, one random crop and flip for each image."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = (torch.randint(2 * padding + 1, (count, 1), generator=generator) for _ in range(2))
    columns = torch.arange(width).repeat(count, 1)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, width - 1 - columns, columns) + left
    rows = torch.arange(height) + top
    # Indexing puts the batch, row and column axes first and the channels last.
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _identity(batch: Any) -> Any:
    return batch


def _cache(split: Dataset, data: ImageData, channels: int) -> tuple[Tensor, Tensor] | None:
    """All images of a split as uint8 [N, C, H, W], and the labels; None where sizes differ."""
    pixels = np.empty((len(split), channels, *data.image_size), np.uint8)
    for start in range(0, len(split), 1000):
        rows = range(start, min(start + 1000, len(split)))
        try:
            pictures = split[start : rows.stop][data.image_column]
        except Exception:  # one of them is bad: which?
            pictures = [row_at(split, row, data.image_column)[data.image_column] for row in rows]
        for row, picture in zip(rows, pictures, strict=True):
            image = with_channels(picture, channels)
            if (image.height, image.width) != data.image_size:
                return None
            pixels[row] = np.asarray(image).reshape(*data.image_size, channels).transpose(2, 0, 1)
    return torch.from_numpy(pixels), torch.tensor(split[data.label_column])


def build_loaders(
    data: ImageData,
    pretrained_cfg: dict[str, Any],
    *,
    batch_size: int = 128,
    eval_batch_size: int | None = None,
    img_size: int | None = None,
    aug: str = "light",
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool | None = None,
    seed: int = 0,
) -> dict[str, DataLoader]:
    """Loaders "train", "validation", "test" and "calibration" (training images, shuffled, without augmentation).

    Batches are `{"pixel_values": float32 [B, C, H, W], "labels": int64 [B]}`. `train` drops an incomplete last batch
    unless it is the only one, and has `sampler.set_epoch`. Grey images become colour and colour ones grey as the model's
    `input_size` asks for. Images below 512 MiB in all that already have the model's size are decoded once. Streams have
    neither a length nor a sampler, but `set_epoch` on their dataset.
    """
    size = _sizes(pretrained_cfg, img_size)
    train_transform, eval_transform = build_transforms(pretrained_cfg, img_size=img_size, aug=aug)
    streamed = isinstance(data.splits["train"], IterableDataset)
    images = math.inf if streamed else sum(len(split) for split in data.splits.values())
    total = images * size[0] * data.image_size[0] * data.image_size[1]
    resized = int(size[1] / (pretrained_cfg.get("crop_pct") or 0.875))
    same_size = data.image_size == size[1:] and resized == size[1]
    caches: dict[str, tuple[Tensor, Tensor]] | None = None
    if same_size and total <= _CACHE_BYTES:
        caches = {}
        for name, split in data.splits.items():
            cache = _cache(split, data, size[0])
            if cache is None:
                caches = None
                break
            caches[name] = cache
    workers: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        # Workers that stay would go on with the epoch in which a stream began.
        workers |= {"prefetch_factor": prefetch_factor or 2, "persistent_workers": not streamed}
    workers["pin_memory"] = torch.cuda.is_available() if pin_memory is None else pin_memory

    def loader(name: str, shuffled: bool, augmented: bool, batch: int) -> DataLoader:
        split = data.splits[name]
        dataset: Any
        arguments: dict[str, Any] = dict(workers)
        transform = train_transform if augmented else eval_transform
        if isinstance(split, IterableDataset):
            dataset = StreamedImages(split, data, size[0], transform, seed, fixed=not augmented)
            return DataLoader(dataset, batch_size=batch, drop_last=shuffled, **arguments)
        if caches is not None and not (augmented and aug == "rand"):
            mean, std = pretrained_cfg["mean"], pretrained_cfg["std"]
            dataset = CachedImages(*caches[name], mean, std, augmented and aug == "light", seed)
            # Nothing is left to do for workers: sending batches between processes would take longer.
            arguments = {"collate_fn": _identity, "pin_memory": workers["pin_memory"]}
        else:
            dataset = TransformedImages(split, data, size[0], transform, seed)
        # Calibration sees the same images whenever it is done, so a resumed run calibrates as the uninterrupted one.
        sampler = EpochSampler(len(split), seed, fixed=not augmented) if shuffled else None
        drop = shuffled and len(split) >= batch
        # Each pass over a loader draws a number. From the global generator it would change what dropout draws after a resume.
        own = torch.Generator()
        return DataLoader(dataset, batch_size=batch, sampler=sampler, drop_last=drop, generator=own, **arguments)

    return {
        "train": loader("train", True, True, batch_size),
        "validation": loader("validation", False, False, eval_batch_size or 2 * batch_size),
        "test": loader("test", False, False, eval_batch_size or 2 * batch_size),
        "calibration": loader("train", True, False, batch_size),
    }


def endless(data: Iterable[Batch], start: int = 0) -> Iterator[Batch]:
    """The batches of `data` again and again, from batch number `start` on; each pass is an epoch of its own.

    `set_epoch` is called where the loader, its sampler or its dataset has it, so a resumed run sees the order that it would
    have seen.
    """
    number, epoch = 0, 0
    while True:
        parts = (data, getattr(data, "sampler", None), getattr(data, "dataset", None))
        ordered: Any = next((part for part in parts if hasattr(part, "set_epoch")), None)
        if ordered is not None:
            ordered.set_epoch(epoch)
        before = number
        for batch in data:
            if number >= start:
                yield batch
            number += 1
        if number == before:
            raise ValueError("The data has no batch: is the split empty, or smaller than one batch?")
        epoch += 1
