"""Image data: any data set that `datasets` reads, MNIST-like idx files, and the bundled sample of Fashion-MNIST."""

import gzip
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset

from ..images import SIXTEEN_BITS, DataError, with_channels

logger = logging.getLogger(__name__)
BUNDLED = Path(__file__).parents[2] / "scripts" / "data" / "fashion_mnist_sample"
BUILDERS = ("imagefolder", "parquet", "arrow")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_LABELS = ("label", "labels", "class", "target", "fine_label", "category")


@dataclass(frozen=True)
class ImageData:
    """`splits` "train", "validation" and "test", each with an image column and a ClassLabel column; streams have no length.

    channels: 1 (grey) or 3. image_size: (height, width) of the first image; others may differ.
    """

    splits: dict[str, Dataset] | dict[str, IterableDataset]
    image_column: str
    label_column: str
    label_names: list[str]
    channels: int
    image_size: tuple[int, int]


def load_image_data(
    dataset: str | None = None,
    *,
    data_dir: str | None = None,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    on_bad_image: str = "error",
    on_missing_class: str = "error",
    cache_dir: str | None = None,
    streaming: bool = False,
    shuffle_buffer_size: int = 1000,
) -> ImageData:
    """Load images with labels.

    Args:
        dataset: a Hub id; a local folder of parquet files, arrow files (`save_to_disk`), class folders or MNIST-like
            idx files; or a builder ("imagefolder", "parquet", "arrow") with `data_dir`. None: the bundled sample.
        data_dir, config_name: as in `datasets.load_dataset`.
        image_column, label_column: found by themselves from the features when not given.
        train_split, validation_split, test_split: found by their usual names when not given. Where there is no
            validation split, a part of train is held out, stratified by label. Where there is no test split (or none
            with labels), the validation split is the test split, or another part of train is held out.
        validation_fraction: the part held out. seed: of what is held out, and of the samples taken.
        max_train_samples, max_eval_samples: take so many only, at random.
        on_bad_image: what becomes of an image that cannot be decoded. "error": a `DataError` when it is met. "skip": every
            image is decoded once, before the splits are made, and those that fail are left out, counted and logged.
        on_missing_class: "error" where a class has no image in the training split, or "keep" it, untrained and logged.
        cache_dir: where `datasets` keeps what it downloads and converts; its own default when not given.
        streaming: read the images while they are used, without downloading all first. Nothing is held out of a stream,
            whose length is not known: it must have all three splits, with ClassLabel columns.
        shuffle_buffer_size: images of a stream that wait in memory to be shuffled.

    Raises `DataError`.
    """
    for option, limit in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if limit is not None and limit < 1:
            raise DataError(f"{option} must be at least 1, got {limit}.")
    source = _open(dataset, data_dir, config_name, cache_dir, streaming)
    names = {
        role: _find_split(source, role, given)
        for role, given in (("train", train_split), ("validation", validation_split), ("test", test_split))
    }
    if names["train"] is None:
        raise DataError(f"The data has no training split, only {', '.join(source)}: name it with train_split.")
    taken = [name for name in names.values() if name is not None]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        roles = " and ".join(role for role, name in names.items() if name == twice)
        raise DataError(
            f"The split {twice!r} cannot be {roles} at once: leave one out, and a part of train is held out."
        )
    splits = {role: source[name] for role, name in names.items() if name is not None}
    if streaming:
        limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
        return _streams(splits, image_column, label_column, limits, shuffle_buffer_size, seed)
    for role, split in splits.items():
        if len(split) == 0:
            raise DataError(f"The {role} split ({names[role]!r}) is empty.")
    train = splits["train"]
    images = _image_column(train, image_column)
    labels = _label_column(train, label_column)
    for role, split in splits.items():
        missing = [column for column in (images, labels) if column not in split.column_names]
        if missing:
            columns = ", ".join(split.column_names)
            raise DataError(
                f"The {role} split ({names[role]!r}) has no column {missing[0]!r} as train has, only {columns}."
            )
    if images == labels or isinstance(train.features[labels], Image):
        raise DataError(f"Column {labels!r} holds images, not labels: name another with label_column.")
    splits = {role: _with_image_feature(split, images) for role, split in splits.items()}
    splits, label_names = _with_class_labels(splits, labels)
    if on_bad_image == "skip":
        splits = {role: _without_bad_images(split, role, images) for role, split in splits.items()}
    _check_classes(splits["train"], labels, label_names, on_missing_class)
    splits = _hold_out(splits, labels, validation_fraction, seed)
    for role, limit in (
        ("train", max_train_samples),
        ("validation", max_eval_samples),
        ("test", max_eval_samples),
    ):
        if limit is not None and limit < len(splits[role]):
            splits[role] = splits[role].shuffle(seed=seed).select(range(limit))
    first = row_at(splits["train"], 0, images)[images]
    return ImageData(
        splits, images, labels, label_names, _channels(splits["train"], images), (first.height, first.width)
    )


def check_labels(names: Sequence[str], id2label: Mapping[int, str]) -> None:
    """`DataError` where the classes of the data, `names`, are not those of a model, in their order.

    Where only one of the two has names (the other has numbers, or transformers' LABEL_0, ...), their count is compared.
    """
    known = [id2label[i] for i in range(len(id2label))]
    anew = f"give the model a new head (from_pretrained(..., num_labels={len(names)}, ignore_mismatched_sizes=True))"
    if len(names) != len(known):
        raise DataError(f"The data has {len(names)} classes, the model {len(known)}: take other data, or {anew}.")
    numbers = [all(name.isdigit() for name in each) for each in (names, known)]
    if numbers[0] != numbers[1] or known == [f"LABEL_{i}" for i in range(len(known))]:
        return
    for i, (name, own) in enumerate(zip(names, known, strict=True)):
        if name != own:
            raise DataError(
                f"Class {i} is {name!r} in the data and {own!r} in the model: take data with the model's classes in their "
                f"order, or {anew}; if both mean the same, write the data's names into id2label of its config.json."
            )


def _streams(
    splits: dict[str, IterableDataset],
    image_column: str | None,
    label_column: str | None,
    limits: dict[str, int | None],
    buffer_size: int,
    seed: int,
) -> ImageData:
    missing = [role for role in ("train", "validation", "test") if role not in splits]
    if missing:
        raise DataError(
            f"A stream needs its own {missing[0]} split: nothing is held out of data whose length is not known. Name it with "
            f"{missing[0]}_split, or leave streaming off."
        )
    # A builder that does not say what its columns are is asked for its first example.
    splits = {role: split if split.features else split._resolve_features() for role, split in splits.items()}
    train = splits["train"]
    images, labels = _image_column(train, image_column), _label_column(train, label_column)
    feature = train.features[labels]
    for role, split in splits.items():
        features = split.features
        if not isinstance(features.get(images), Image):
            raise DataError(f"The {role} split of a stream must have images in the column {images!r}.")
        if not isinstance(feature, ClassLabel) or features.get(labels) != feature:
            raise DataError(
                f"Column {labels!r} of the {role} split of a stream must be a ClassLabel, the same as in train, got "
                f"{features.get(labels)}: leave streaming off."
            )
    streams = {role: split.select_columns([images, labels]) for role, split in splits.items()}
    streams["train"] = streams["train"].shuffle(seed=seed, buffer_size=buffer_size)
    streams = {role: split if limits[role] is None else split.take(limits[role]) for role, split in streams.items()}
    for role, split in streams.items():
        first = next(iter(split), None)
        if first is None:
            raise DataError(f"The {role} split is empty.")
        if not _in_range(first[labels], feature.num_classes):
            raise DataError(
                f"Column {labels!r} of the {role} split holds no labels, but {first[labels]!r}: name another."
            )
    seen = [entry[images] for entry in splits["train"].take(64)]
    size = (seen[0].height, seen[0].width)
    return ImageData(streams, images, labels, feature.names, _channels_of(seen), size)


def _channels(train: Dataset, images: str) -> int:
    places = range(0, len(train), max(1, len(train) // 64))
    return _channels_of([row_at(train, i, images)[images] for i in places])


def _channels_of(images: list[Any]) -> int:
    """1 when 64 images from all over a split are grey, else 3: a colour set may well hold a grey image here and there."""
    return 1 if {image.mode for image in images} <= {"1", "L", "LA", "I", *SIXTEEN_BITS, "F"} else 3


def _open(
    dataset: str | None, data_dir: str | None, config_name: str | None, cache_dir: str | None, streaming: bool = False
) -> DatasetDict:
    if dataset is None:
        if not BUNDLED.exists():
            raise DataError(
                "The bundled sample is part of a checkout of the repository, not of the package: name a dataset."
            )
        dataset = str(BUNDLED)
    path = Path(dataset) / data_dir if data_dir and Path(dataset).is_dir() else Path(dataset)
    try:
        if dataset in BUILDERS:
            if not data_dir or not Path(data_dir).is_dir():
                raise DataError(f"The data set {dataset!r} needs data_dir, a folder that exists; got {data_dir!r}.")
            loaded = datasets.load_dataset(dataset, data_dir=data_dir, cache_dir=cache_dir, streaming=streaming)
        elif not streaming and path.is_dir() and (idx := _read_idx(path)) is not None:
            loaded = idx
        elif path.is_dir() and any((path / f).exists() for f in ("dataset_dict.json", "state.json")):
            if streaming:
                raise DataError(f"{dataset!r} is read from disk as it is used, and needs no streaming: leave it off.")
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), cache_dir=cache_dir, streaming=streaming)
        else:
            loaded = datasets.load_dataset(
                dataset, config_name, data_dir=data_dir, cache_dir=cache_dir, streaming=streaming
            )
    except DataError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds of errors, many of several lines
        kind = "folder" if path.is_dir() else "Hub id (and there is no local folder of that name)"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, IndexError):  # what `load_from_disk` says about a split without rows
            reason = "a split is empty, or a file is missing."
        raise DataError(f"Cannot read the data set {dataset!r} as a {kind}: {reason}") from error
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({"train": loaded})
    return cast(DatasetDict, loaded)


# idx files ---------------------------------------------------------------------------------------------------------


def _read_idx(folder: Path) -> DatasetDict | None:
    """The splits of a folder of MNIST-like files (`train-images-idx3-ubyte`, .gz or not), None without such."""
    result = {}
    for split, prefixes in (("train", ("train",)), ("test", ("t10k", "test"))):
        for prefix in prefixes:
            images = sorted(folder.glob(f"{prefix}-images*idx*"))
            labels = sorted(folder.glob(f"{prefix}-labels*idx*"))
            if images and labels:
                x, y = read_idx_file(images[0]), read_idx_file(labels[0])
                if len(x) != len(y):
                    raise DataError(f"{images[0].name} holds {len(x)} images, {labels[0].name} {len(y)} labels.")
                features = datasets.Features({"image": Image(), "label": datasets.Value("int64")})
                result[split] = Dataset.from_dict(
                    {"image": list(x), "label": y.astype(int).tolist()}, features=features
                )
    return DatasetDict(result) if result else None


def read_idx_file(path: Path) -> np.ndarray:
    """The uint8 array of an idx file (LeCun's format): images [N, H, W] or [N, H, W, 3], labels [N]."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(
            f"{path.name} is not an idx file of bytes: it must begin with 00 00 08, got {data[:3].hex(' ')}."
        )
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise DataError(
            f"{path.name} announces {shape.prod()} values in shape {shape.tolist()} and holds {values.size}."
        )
    return values.reshape(shape)


# Splits and columns --------------------------------------------------------------------------------------------------


def _find_split(source: DatasetDict, role: str, given: str | None) -> str | None:
    if given is not None:
        if given not in source:
            raise DataError(f"{role}_split: the data has no split {given!r}; {_near(given, list(source))}.")
        return given
    return next((name for name in _SPLITS[role] if name in source), None)


def _near(given: str, names: list[str]) -> str:
    close = get_close_matches(given, names, n=1)
    return (f"did you mean {close[0]!r}? It has " if close else "it has ") + ", ".join(names)


def _known(split: Dataset, column: str, option: str) -> str:
    if column not in split.column_names:
        raise DataError(f"{option}: the data has no column {column!r}; {_near(column, split.column_names)}.")
    return column


def _image_column(split: Dataset, given: str | None) -> str:
    if given is not None:
        return _known(split, given, "image_column")
    found = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    found += [name for name in ("image", "img", "pixel_values") if name in split.column_names and name not in found]
    if not found:
        raise DataError(f"No column of images found among {', '.join(split.column_names)}: name it with image_column.")
    return found[0]


def _label_column(split: Dataset, given: str | None) -> str:
    if given is not None:
        return _known(split, given, "label_column")
    found = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    found = sorted(found, key=lambda name: name not in _LABELS)
    found += [name for name in _LABELS if name in split.column_names and name not in found]
    if not found:
        raise DataError(f"No column of labels found among {', '.join(split.column_names)}: name it with label_column.")
    return found[0]


def _with_image_feature(split: Dataset, column: str) -> Dataset:
    if isinstance(split.features[column], Image):
        return split
    try:
        split = split.cast_column(column, Image())
        split[0][column].load()
        return split
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"Column {column!r} does not hold images: {reason}") from error


def _with_class_labels(splits: dict[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """The splits with a ClassLabel column, and its names. A test split whose labels are all -1 (hidden) is left out."""
    feature = splits["train"].features[column]
    values = {role: _labels(split, column, feature) for role, split in splits.items()}
    if set(values.get("test", [])) == {-1}:
        splits = {role: split for role, split in splits.items() if role != "test"}
        values.pop("test")
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif all(isinstance(v, str) for v in values["train"]):
        names = sorted(values["train"])
    elif all(isinstance(v, int) for v in values["train"]):
        names = [str(i) for i in range(max(values["train"], default=0) + 1)]
    else:
        odd = next(v for v in values["train"] if not isinstance(v, str | int))
        raise DataError(f"Column {column!r} of the train split must hold class numbers or names, got {odd!r}.")
    position = {name: i for i, name in enumerate(names)}
    result = {}
    for role, split in splits.items():
        wrong = [v for v in values[role] if (v not in position if isinstance(v, str) else not _in_range(v, len(names)))]
        if wrong:
            near = get_close_matches(wrong[0], names, n=1) if isinstance(wrong[0], str) else []
            raise DataError(
                f"Column {column!r} of the {role} split has the label {wrong[0]!r}; expected one of the {len(names)} "
                f"classes of train (0 to {len(names) - 1}, {names[0]!r} to {names[-1]!r})."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        if not isinstance(feature, ClassLabel) or split.features[column] != feature:
            new = [position[v] if isinstance(v, str) else v for v in _labels(split, column, feature, unique=False)]
            split = split.remove_columns(column).add_column(column, new)  # type: ignore[call-arg]
            split = split.cast_column(column, ClassLabel(names=names))
        result[role] = split
    return result, names


def _labels(split: Dataset, column: str, train: Any, *, unique: bool = True) -> list[Any]:
    """The labels of a split, as names where the split numbers its classes in another way than `train` (its feature)."""
    values = list(split.unique(column) if unique else split[column])
    feature = split.features[column]
    named = isinstance(train, ClassLabel) or getattr(train, "dtype", None) in ("string", "large_string")
    if not isinstance(feature, ClassLabel) or feature == train or not named:
        return values
    return [feature.names[v] if _in_range(v, len(feature.names)) else v for v in values]


def _in_range(value: Any, count: int) -> bool:
    return isinstance(value, int) and 0 <= value < count


def _hold_out(splits: dict[str, Dataset], column: str, fraction: float, seed: int) -> dict[str, Dataset]:
    splits = dict(splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    for role in ("test", "validation"):
        if role not in splits:
            try:
                parts = splits["train"].train_test_split(fraction, stratify_by_column=column, seed=seed)
            except ValueError as error:
                raise DataError(
                    f"Cannot hold out {fraction:g} of {len(splits['train'])} training images for {role}, stratified by "
                    f"{column!r}: {error}"
                ) from error
            splits["train"], splits[role] = parts["train"], parts["test"]
    return {role: splits[role] for role in ("train", "validation", "test")}


# Images ------------------------------------------------------------------------------------------------------------------

_SKIP = " --on_bad_image skip leaves out such images."


def row_at(split: Dataset, row: int, column: str) -> dict[str, Any]:
    """A row of a split, with its image in `column` decoded; `DataError` where that cannot be done."""
    try:
        entry = split[row]
        if entry[column] is None:
            raise ValueError("it is empty")
        return entry
    except Exception as error:  # Pillow has many kinds
        raw = split.cast_column(column, Image(decode=False))[row][column] or {}
        place = f"row {row}" + (f" ({raw['path']})" if raw.get("path") else "")
        # Pillow quotes the address of an object.
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].split(" <_io")[0]
        raise DataError(f"The image in {place} cannot be decoded: {reason}.{_SKIP}") from error


def _without_bad_images(split: Dataset, role: str, column: str) -> Dataset:
    bad: dict[int, str] = {}
    for row in range(len(split)):
        try:
            with_channels(row_at(split, row, column)[column], 3)
        except DataError as error:
            bad[row] = str(error)
    if not bad:
        return split
    if len(bad) == len(split):
        raise DataError(f"None of the {len(split)} images of the {role} split can be used: {bad[0]}")
    logger.warning(
        f"{len(bad)} of {len(split)} images of the {role} split are left out, in rows {_few(list(bad))}. The first: "
        f"{next(iter(bad.values())).removesuffix(_SKIP)}"
    )
    return split.select([row for row in range(len(split)) if row not in bad])


def _check_classes(train: Dataset, column: str, names: list[str], on_missing: str) -> None:
    """Names the classes that no image of the split has: an error, or a warning where they are to be kept."""
    present = set(train.unique(column))
    missing = [f"{i} ({name!r})" if name != str(i) else name for i, name in enumerate(names) if i not in present]
    if not missing:
        return
    text = f"{len(missing)} of {len(names)} classes have no image in the training split: {_few(missing)}"
    if on_missing == "error":
        hint = " Are the labels counted from 1?" if missing[0].split()[0] == "0" and len(missing) == 1 else ""
        raise DataError(f"{text}.{hint} --on_missing_class keep leaves them in the head, untrained.")
    logger.warning(f"{text}. They stay in the head, untrained.")


def _few(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")
