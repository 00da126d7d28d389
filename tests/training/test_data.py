"""Loading of image data, transforms and loaders, each against real files or timm's own code."""

import gzip
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from timm.data import Mixup, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from sdq_hf.training.data import BUNDLED, DataError, check_labels, load_image_data, read_idx_file, with_channels
from sdq_hf.training.loaders import (
    CachedImages,
    StreamedImages,
    TransformedImages,
    build_loaders,
    build_mixup,
    build_transforms,
    endless,
    random_crop_and_flip,
)

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cat", "dog"]
GREY: dict[str, Any] = {
    "input_size": (1, 8, 8),
    "mean": (0.3,),
    "std": (0.4,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
COLOUR: dict[str, Any] = {**GREY, "input_size": (3, 8, 8), "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4)}


def pictures(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> np.ndarray:
    shape = (count, size, size) if channels == 1 else (count, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make(count: int = 80, labels: Any = None, feature: Any = None, seed: int = 0, **kwargs: int) -> Dataset:
    """Random images, labelled 0, 1, 2, 3, 0, ... with the names of `NAMES` when nothing else is said."""
    labels = [i % 4 for i in range(count)] if labels is None else labels
    features = Features({"image": Image(), "label": feature or ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": list(pictures(count, seed=seed, **kwargs)), "label": labels}, features=features)


def save(folder: Path, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def contents(split: Dataset, column: str = "image") -> list[bytes]:
    return [np.asarray(image).tobytes() for image in split[column]]


def write_idx(path: Path, values: np.ndarray) -> None:
    data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_idx_folder(folder: Path, suffix: str = ".gz", channels: int = 1, train: int = 80, test: int = 40) -> str:
    folder.mkdir(exist_ok=True)
    for prefix, count, seed in (("train", train, 0), ("t10k", test, 1)):
        kind = "idx3" if channels == 1 else "idx4"
        write_idx(folder / f"{prefix}-images-{kind}-ubyte{suffix}", pictures(count, channels, seed=seed))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", (np.arange(count) % 4).astype(np.uint8))
    return str(folder)


# Formats -------------------------------------------------------------------------------------------------------------


def write_parquet(folder: Path) -> str:
    folder.mkdir()
    make(80).to_parquet(folder / "train.parquet")
    make(40, seed=1).to_parquet(folder / "test.parquet")
    return str(folder)


def write_folders(folder: Path) -> str:
    for split, source in (("train", make(80)), ("test", make(40, seed=1))):
        for i, row in enumerate(source):
            path = folder / split / NAMES[row["label"]] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return str(folder)


FORMATS = {
    "parquet": write_parquet,
    "save_to_disk": lambda folder: save(folder, train=make(80), test=make(40, seed=1)),
    "imagefolder": write_folders,
    "idx": lambda folder: write_idx_folder(folder, ""),
    "idx_gz": write_idx_folder,
    "idx_colour": lambda folder: write_idx_folder(folder, channels=3),
}


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_gives_the_images_and_labels_that_were_written(form: str, tmp_path: Path) -> None:
    data = load_image_data(FORMATS[form](tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    channels = 3 if form == "idx_colour" else 1
    assert {role: len(split) for role, split in data.splits.items()} == {"train": 72, "validation": 8, "test": 40}
    assert data.label_names == (["0", "1", "2", "3"] if form.startswith("idx") else NAMES)
    assert (data.image_column, data.label_column, data.channels, data.image_size) == (
        "image",
        "label",
        channels,
        (8, 8),
    )
    label_of = {image.tobytes(): i % 4 for i, image in enumerate(pictures(40, channels, seed=1))}
    read = dict(zip(contents(data.splits["test"]), data.splits["test"]["label"], strict=True))
    assert read == label_of


def test_imagefolder_builder_takes_data_dir(tmp_path: Path) -> None:
    write_folders(tmp_path / "data")
    data = load_image_data("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert data.label_names == NAMES
    assert len(data.splits["test"]) == 40
    alone = load_image_data("imagefolder", data_dir=str(tmp_path / "data" / "train"), cache_dir=str(tmp_path / "cache"))
    assert {role: len(split) for role, split in alone.splits.items()} == {"train": 64, "validation": 8, "test": 8}
    with pytest.raises(DataError, match="'imagefolder' needs data_dir"):
        load_image_data("imagefolder")


def test_string_labels_are_numbered_in_order_of_their_names(tmp_path: Path) -> None:
    words = [("zebra", "ant", "fox")[i % 3] for i in range(60)]
    folder = save(tmp_path / "data", train=make(60, words, Value("string")))
    data = load_image_data(folder)
    assert data.label_names == ["ant", "fox", "zebra"]
    expected = dict(zip((p.tobytes() for p in pictures(60)), words, strict=True))
    for split in data.splits.values():
        got = {image: data.label_names[label] for image, label in zip(contents(split), split["label"], strict=True)}
        assert got.items() <= expected.items()


def test_splits_that_number_their_classes_differently_agree_by_name(tmp_path: Path) -> None:
    other = make(40, feature=ClassLabel(names=NAMES[::-1]), seed=1)
    data = load_image_data(save(tmp_path / "data", train=make(), test=other))
    assert data.label_names == NAMES
    assert data.splits["test"]["label"] == [3 - i % 4 for i in range(40)]


def test_columns_can_be_named(tmp_path: Path) -> None:
    source = make().rename_columns({"image": "photo", "label": "species"}).add_column("label", [0] * 80)
    data = load_image_data(save(tmp_path / "data", train=source), image_column="photo", label_column="species")
    assert (data.image_column, data.label_column, data.label_names) == ("photo", "species", NAMES)


# Splits --------------------------------------------------------------------------------------------------------------


def test_validation_is_held_out_of_train_stratified_and_by_seed(tmp_path: Path) -> None:
    folder = save(tmp_path / "data", train=make(200), test=make(20, seed=1))
    first, again, other = (load_image_data(folder, validation_fraction=0.2, seed=seed) for seed in (0, 0, 1))
    train, validation = (contents(first.splits[role]) for role in ("train", "validation"))
    assert Counter(first.splits["validation"]["label"]) == {0: 10, 1: 10, 2: 10, 3: 10}
    assert sorted(train + validation) == sorted(p.tobytes() for p in pictures(200))
    assert contents(again.splits["validation"]) == validation
    assert contents(other.splits["validation"]) != validation


def test_without_a_test_split_validation_is_the_test_split(tmp_path: Path) -> None:
    data = load_image_data(save(tmp_path / "data", train=make(80), validation=make(40, seed=1)))
    assert contents(data.splits["test"]) == [p.tobytes() for p in pictures(40, seed=1)]
    assert len(data.splits["train"]) == 72


def test_with_train_alone_validation_and_test_are_both_held_out(tmp_path: Path) -> None:
    data = load_image_data(save(tmp_path / "data", train=make(200)))
    parts = [contents(data.splits[role]) for role in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [162, 18, 20]
    assert sorted(itertools.chain(*parts)) == sorted(p.tobytes() for p in pictures(200))


def test_a_test_split_with_hidden_labels_is_not_used(tmp_path: Path) -> None:
    hidden = make(40, [-1] * 40, Value("int64"), seed=1)
    data = load_image_data(save(tmp_path / "data", train=make(200, feature=Value("int64")), test=hidden))
    assert len(data.splits["test"]) == 20


def test_limits_take_a_random_part(tmp_path: Path) -> None:
    folder = save(tmp_path / "data", train=make(200), test=make(40, seed=1))
    full = load_image_data(folder)
    part = load_image_data(folder, max_train_samples=30, max_eval_samples=5)
    assert {role: len(split) for role, split in part.splits.items()} == {"train": 30, "validation": 5, "test": 5}
    for role, split in part.splits.items():
        assert set(contents(split)) < set(contents(full.splits[role]))
        assert contents(split) != contents(full.splits[role])[: len(split)]


# Errors --------------------------------------------------------------------------------------------------------------


def rows(count: int, label: Any, feature: Any = None) -> Dataset:
    return make(count, [label] * count, feature or Value("int64"))


NUMBERS = Value("int64")
WORDS = Value("string")
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "image column": ({"train": make()}, {"image_column": "imgae"}, "no column 'imgae'; did you mean 'image'"),
    "label column": ({"train": make()}, {"label_column": "lable"}, "no column 'lable'; did you mean 'label'"),
    "split": ({"train": make()}, {"train_split": "trian"}, "no split 'trian'; did you mean 'train'"),
    "no train": ({"test": make()}, {}, "no training split, only test"),
    "same split": ({"train": make()}, {"test_split": "train"}, "'train' cannot be train and test at once"),
    "no labels": ({"train": make().remove_columns("label")}, {}, "No column of labels found among image"),
    "no images": ({"train": make().remove_columns("image")}, {}, "No column of images found among label"),
    "test labels": ({"train": make(), "test": make().remove_columns("label")}, {}, "test split .* no column 'label'"),
    "label is image": ({"train": make()}, {"label_column": "image"}, "'image' holds images, not labels"),
    "image is label": ({"train": make()}, {"image_column": "label", "label_column": "image"}, "holds images"),
    "range": ({"train": make(feature=NUMBERS), "test": rows(9, 7)}, {}, "test split has the label 7; .* 4 classes"),
    "negative": ({"train": make(80, [-1, 0, 1, 2] * 20, NUMBERS)}, {}, "train split has the label -1"),
    "unseen": (
        {"train": make(80, NAMES * 20, WORDS), "test": rows(9, "bees", WORDS)},
        {},
        "'bees'.*Did you mean 'bee'",
    ),
    "float": ({"train": rows(80, 0.5, Value("float32"))}, {}, "must hold class numbers or names, got 0.5"),
    "too few": ({"train": make(5)}, {}, "Cannot hold out 0.1 of 5 training images"),
    "limit": ({"train": make()}, {"max_train_samples": 0}, "max_train_samples must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_data_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    splits, options, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        load_image_data(save(tmp_path / "data", **splits), **options)
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    write_parquet(folder)
    pq.write_table(make(8).features.arrow_schema.empty_table(), folder / "test.parquet")
    with pytest.raises(DataError, match="Cannot read the data set"):  # in words of each version's own
        load_image_data(str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"The test split \('test'\) is empty"):
        load_image_data(write_idx_folder(tmp_path / "idx", test=0))


def test_an_empty_split_saved_to_disk_is_an_error(tmp_path: Path) -> None:
    try:
        folder = save(tmp_path, train=make(), test=make(8).select([]))
    except ZeroDivisionError:
        pytest.skip("this version of datasets cannot save an empty split")
    with pytest.raises(DataError, match="a split is empty"):
        load_image_data(folder)


def test_data_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'nobody/nothing' as a Hub id"):
        load_image_data("nobody/nothing", cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="as a folder"):
        load_image_data(str(tmp_path))


def test_broken_idx_files_are_errors(tmp_path: Path) -> None:
    folder = Path(write_idx_folder(tmp_path / "data", ""))
    labels = folder / "train-labels-idx1-ubyte"
    write_idx(labels, np.zeros(79, np.uint8))
    with pytest.raises(DataError, match="holds 80 images, train-labels-idx1-ubyte 79 labels"):
        load_image_data(str(folder))
    labels.write_bytes(labels.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"announces 79 values .* holds 76"):
        read_idx_file(labels)
    labels.write_bytes(b"\0\0\x0d\1" + bytes(8))
    with pytest.raises(DataError, match="must begin with 00 00 08, got 00 00 0d"):
        read_idx_file(labels)


# Bad images, odd modes, missing classes ------------------------------------------------------------------------------


def spoiled(bad: tuple[int, ...], count: int = 80, seed: int = 0) -> Dataset:
    """As `make`, but that the PNG files of some rows are cut in half."""
    buffers = []
    for i, image in enumerate(pictures(count, seed=seed)):
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, "PNG")
        whole = buffer.getvalue()
        buffers.append({"bytes": whole[: len(whole) // 2] if i in bad else whole, "path": f"{i:03}.png"})
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": buffers, "label": [i % 4 for i in range(count)]}, features=features)


@pytest.mark.parametrize(("crop_pct", "workers"), [(1.0, 0), (0.8, 0), (0.8, 1)])
def test_a_bad_image_is_named_in_one_line_when_it_is_met(crop_pct: float, workers: int, tmp_path: Path) -> None:
    splits = {"train": make(80), "validation": spoiled((7,), 16), "test": make(40)}
    data = load_image_data(save(tmp_path / "data", **splits))

    def read() -> None:
        loaders = build_loaders(data, {**GREY, "crop_pct": crop_pct}, batch_size=16, num_workers=workers)
        list(loaders["validation"])

    with pytest.raises(DataError, match=r"row 7 \(007.png\) cannot be decoded: .*--on_bad_image skip") as caught:
        read()
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_bad_images_are_skipped_counted_and_named_before_the_splits_are_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = (0, 3, 50)
    folder = save(tmp_path / "data", train=spoiled(bad), test=make(40, seed=1))
    with pytest.raises(DataError, match="row 0"):
        load_image_data(folder)
    assert not caplog.messages
    data = load_image_data(folder, on_bad_image="skip")
    (message,) = caplog.messages
    assert message.startswith("3 of 80 images of the train split are left out, in rows 0, 3, 50. The first: ")
    good = [p.tobytes() for i, p in enumerate(pictures(80)) if i not in bad]
    assert sorted(contents(data.splits["train"]) + contents(data.splits["validation"])) == sorted(good)
    # What is left is split as a data set that never had them.
    clean = make(80).select([i for i in range(80) if i not in bad])
    same = load_image_data(save(tmp_path / "clean", train=clean, test=make(40, seed=1)))
    assert contents(data.splits["train"]) == contents(same.splits["train"])
    with pytest.raises(DataError, match="None of the 8 images of the train split can be used"):
        load_image_data(save(tmp_path / "none", train=spoiled(tuple(range(8)), 8)), on_bad_image="skip")


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
MODES = {
    "L": PILImage.fromarray(RAMP),
    "LA": PILImage.fromarray(np.stack([RAMP, RAMP[::-1]], -1)),
    "RGB": PILImage.fromarray(np.stack([RAMP] * 3, -1)),
    "RGBA": PILImage.fromarray(np.stack([RAMP] * 3 + [RAMP[::-1]], -1)),
    "P": PILImage.fromarray(np.stack([RAMP] * 3, -1)).quantize(256),
    "I;16": PILImage.fromarray(RAMP.astype(np.uint16) * 256 + RAMP[::-1]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_picture(mode: str, channels: int) -> None:
    image = MODES[mode]
    assert image.mode == mode
    got = np.asarray(with_channels(image, channels))
    assert got.shape == ((16, 16) if channels == 1 else (16, 16, 3))
    assert np.array_equal(got.reshape(16, 16, channels), np.repeat(RAMP[..., None], channels, -1))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_of_unknown_range_are_refused(kind: Any) -> None:
    with pytest.raises(DataError, match=r"\(mode [IF]\), whose range is not known"):
        with_channels(PILImage.fromarray(RAMP.astype(kind)), 1)


def test_a_set_of_mixed_modes_is_read_in_colour_image_by_image(tmp_path: Path) -> None:
    images = [*MODES.values()] * 8
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    mixed = Dataset.from_dict({"image": images, "label": [i % 4 for i in range(len(images))]}, features=features)
    data = load_image_data(save(tmp_path / "data", train=mixed, validation=mixed, test=mixed))
    assert data.channels == 3
    cfg = {**COLOUR, "input_size": (3, 16, 16)}
    got = torch.cat([batch["pixel_values"] for batch in build_loaders(data, cfg, batch_size=16)["test"]])
    expected = (torch.tensor(RAMP / 255.0)[None] - torch.tensor(COLOUR["mean"])[:, None, None]) / torch.tensor(
        COLOUR["std"]
    )[:, None, None]
    torch.testing.assert_close(got.double(), expected.expand(len(images), 3, 16, 16), rtol=0, atol=1e-6)


def test_a_class_without_images_is_an_error_unless_it_is_to_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = [i % 3 + (i % 3 > 0) for i in range(80)]
    folder = save(tmp_path / "data", train=make(80, labels), test=make(40, seed=1))
    text = r"1 of 4 classes have no image in the training split: 1 \('bee'\)"
    with pytest.raises(DataError, match=rf"{text}\. --on_missing_class keep"):
        load_image_data(folder)
    assert load_image_data(folder, on_missing_class="keep").label_names == NAMES
    assert re.match(text, caplog.messages[0])
    counted = save(tmp_path / "from_one", train=make(80, [1 + i % 4 for i in range(80)], NUMBERS))
    with pytest.raises(DataError, match="Are the labels counted from 1"):
        load_image_data(counted)


# The bundled sample --------------------------------------------------------------------------------------------------


def test_the_bundled_sample_is_small_balanced_and_the_default() -> None:
    data = load_image_data()
    assert {role: len(split) for role, split in data.splits.items()} == {
        "train": 7200,
        "validation": 800,
        "test": 2000,
    }
    for split in data.splits.values():
        assert set(Counter(split["label"]).values()) == {len(split) // 10}
    assert len(data.label_names) == 10
    assert data.label_names[9] == "Ankle boot"
    assert data.image_size == (28, 28)
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 5_000_000
    licence = (BUNDLED / "LICENSE").read_text()
    assert "MIT License" in licence
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "without restriction" in licence


def test_the_sample_script_takes_as_many_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    full = {}
    for prefix, seed in (("train", 0), ("t10k", 1)):
        images, labels = pictures(200, size=28, seed=seed), (np.arange(200) % 10).astype(np.uint8)
        write_idx(source / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(source / f"{prefix}-labels-idx1-ubyte.gz", labels)
        full[prefix] = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    spec = importlib.util.spec_from_file_location("sample", ROOT / "scripts" / "make_fashion_mnist_sample.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("sample", "again"):
        arguments = ["--source", str(source), "--train", "100", "--test", "50", "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["make_fashion_mnist_sample.py", *arguments])
        script.main()
    for split in ("train", "test"):
        same = [(tmp_path / name / f"{split}.parquet").read_bytes() for name in ("sample", "again")]
        assert same[0] == same[1]
    loaded = datasets.load_dataset(str(tmp_path / "sample"), cache_dir=str(tmp_path / "cache"))
    for split, prefix, each in (("train", "train", 10), ("test", "t10k", 5)):
        assert isinstance(loaded[split].features["label"], ClassLabel)
        assert Counter(loaded[split]["label"]) == dict.fromkeys(range(10), each)
        got = dict(zip(contents(loaded[split]), loaded[split]["label"], strict=True))
        assert len(got) == 10 * each
        assert got.items() <= full[prefix].items()


# Transforms ----------------------------------------------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    cfg = get_pretrained_cfg(name)
    assert cfg
    return cfg.to_dict()


def oracle(name: str) -> Any:
    """timm's own evaluation transform of a pretrained model."""
    return create_transform(**resolve_data_config({}, pretrained_cfg=config_of(name)))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.a1_in1k",
        "vit_base_patch16_224.augreg_in1k",
        "mobilenetv3_large_100.ra_in1k",
        "coat_lite_medium_384.in1k",
    ],
)
def test_evaluation_equals_timm(name: str) -> None:
    image = PILImage.fromarray(pictures(1, 3, 300)[0]).resize((320, 260))
    _, evaluation = build_transforms(config_of(name))
    assert torch.equal(evaluation(image), oracle(name)(image))


def test_augmentations() -> None:
    image = PILImage.fromarray(pictures(1, 3)[0])
    train, evaluation = build_transforms(COLOUR, aug="none")
    assert torch.equal(train(image), evaluation(image))
    large = {**COLOUR, "input_size": (3, 96, 96)}
    for cfg, aug, part in (
        (COLOUR, "light", "RandomCrop"),
        (large, "light", "RandomResized"),
        (large, "rand", "RandAug"),
    ):
        train, _ = build_transforms(cfg, aug=aug)
        assert part in repr(train)
        assert train(image).shape == cfg["input_size"]
    assert build_transforms(COLOUR, img_size=12)[1](image).shape == (3, 12, 12)
    with pytest.raises(ValueError, match="one of none, light, rand, got 'heavy'"):
        build_transforms(COLOUR, aug="heavy")


def test_batch_crop_and_flip_equals_a_loop_over_images() -> None:
    images = torch.from_numpy(pictures(64, 3)).permute(0, 3, 1, 2)
    got = random_crop_and_flip(images, 2, torch.Generator().manual_seed(3))
    kinds = set()
    for image, result in zip(images, got, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        options = {
            (top, left, flip): crop.flip(-1) if flip else crop
            for top in range(5)
            for left in range(5)
            for crop in [padded[:, top : top + 8, left : left + 8]]
            for flip in (False, True)
        }
        found = [kind for kind, crop in options.items() if torch.equal(crop, result)]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) > 25


def test_batch_crop_and_flip_draws_all_offsets_evenly() -> None:
    # The position of one bright pixel tells the offsets and the flip.
    images = torch.zeros(20_000, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 2] = 255
    got = random_crop_and_flip(images, 1, torch.Generator().manual_seed(0))
    assert (got.flatten(1) > 0).sum(1).unique().tolist() == [1]
    counts = torch.bincount(got.flatten(1).float().argmax(1), minlength=64).view(8, 8)
    hit = counts[3:6][:, [1, 2, 3, 4, 5, 6]]
    assert hit.sum() == 20_000
    assert (hit / 20_000 - 1 / 18).abs().max() < 0.007


# Loaders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["same", "mixed"])
@pytest.mark.parametrize(("channels", "cfg"), [(1, GREY), (3, COLOUR), (1, COLOUR), (3, GREY)])
def test_loaders_agree_with_timm_image_by_image(channels: int, cfg: dict[str, Any], size: str, tmp_path: Path) -> None:
    """Grey and colour images for grey and colour networks, by the fast path and by the plain one."""
    source = make(40, channels=channels)
    if size == "mixed":
        features = source.features
        more = [np.asarray(image.resize((9, 9))) for image in source.select(range(4))["image"]]
        source = Dataset.from_dict(
            {"image": [*map(np.asarray, source["image"]), *more], "label": [*source["label"], 0, 1, 2, 3]},
            features=features,
        )
    data = load_image_data(save(tmp_path / "data", train=source, validation=make(20), test=source), seed=1)
    loaders = build_loaders(data, cfg, batch_size=16, eval_batch_size=7)
    assert isinstance(loaders["test"].dataset, CachedImages if size == "same" else TransformedImages)
    transform = create_transform(
        cfg["input_size"], mean=cfg["mean"], std=cfg["std"], interpolation="bilinear", crop_pct=1.0
    )
    mode = "L" if cfg["input_size"][0] == 1 else "RGB"
    expected = torch.stack([transform(image.convert(mode)) for image in data.splits["test"]["image"]])
    batches = list(loaders["test"])
    got = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert got.dtype == torch.float32
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == data.splits["test"]["label"]


def test_a_colour_set_may_begin_with_a_grey_image(tmp_path: Path) -> None:
    source = make(40, channels=3)
    pictures = [source[0]["image"].convert("L"), *source.select(range(1, 40))["image"]]
    mixed = Dataset.from_dict({"image": pictures, "label": source["label"]}, features=source.features)
    data = load_image_data(save(tmp_path / "data", train=mixed, validation=make(20), test=mixed), seed=1)
    assert data.channels == 3
    got = torch.cat([batch["pixel_values"] for batch in build_loaders(data, COLOUR, batch_size=16)["test"]])
    transform = create_transform(
        COLOUR["input_size"], mean=COLOUR["mean"], std=COLOUR["std"], interpolation="bilinear", crop_pct=1.0
    )
    torch.testing.assert_close(got, torch.stack([transform(p.convert("RGB")) for p in pictures]), rtol=0, atol=1e-6)


@pytest.fixture
def data(tmp_path: Path) -> Any:
    return load_image_data(save(tmp_path / "data", train=make(200), validation=make(40), test=make(30, seed=1)))


def epoch(loader: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return torch.cat([b["pixel_values"] for b in batches]), torch.cat([b["labels"] for b in batches])


@pytest.mark.parametrize("crop_pct", [1.0, 0.8], ids=["fast", "plain"])
def test_order_and_augmentation_depend_on_seed_and_epoch_alone(data: Any, crop_pct: float) -> None:
    cfg = {**GREY, "crop_pct": crop_pct}
    train = build_loaders(data, cfg, batch_size=16)["train"]
    assert isinstance(train.dataset, CachedImages if crop_pct == 1 else TransformedImages)
    zero, one = epoch(train, 0), epoch(train, 1)
    torch.manual_seed(99)  # the global generator plays no part
    other = build_loaders(data, cfg, batch_size=16)["train"]
    assert torch.equal(epoch(other, 1)[0], one[0])
    assert torch.equal(epoch(other, 0)[0], zero[0])
    assert not torch.equal(zero[1], one[1])
    assert not torch.equal(epoch(build_loaders(data, cfg, batch_size=16, seed=1)["train"], 0)[0], zero[0])


@pytest.mark.parametrize("crop_pct", [1.0, 0.8], ids=["fast", "plain"])
def test_an_image_is_augmented_anew_in_each_epoch(data: Any, crop_pct: float) -> None:
    images = build_loaders(data, {**GREY, "crop_pct": crop_pct}, batch_size=16)["train"].dataset

    def augmented(number: int) -> torch.Tensor:
        keys = [(number, row) for row in range(64)]
        if isinstance(images, CachedImages):
            return images.__getitems__(keys)["pixel_values"]
        return torch.stack([images[key]["pixel_values"] for key in keys])

    same = (augmented(0) == augmented(1)).flatten(1).all(1).sum()
    assert same < 16
    assert torch.equal(augmented(1), augmented(1))


def test_augmentation_leaves_every_global_generator_as_it_is(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = []
    # What torch.manual_seed does to GPUs, which a network may draw its noise on.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    images = build_loaders(data, {**COLOUR, "crop_pct": 0.8}, aug="rand", batch_size=16)["train"].dataset

    def states() -> Any:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    assert isinstance(images, TransformedImages)
    assert images[0, 3]["pixel_values"].isfinite().all()
    assert states() == before
    assert seeded == []


def test_workers_change_nothing(data: Any) -> None:
    cfg = {**COLOUR, "crop_pct": 0.8}
    alone = build_loaders(data, cfg, aug="rand", batch_size=16)["train"]
    workers = build_loaders(data, cfg, aug="rand", batch_size=16, num_workers=2)["train"]
    assert torch.equal(epoch(alone, 1)[0], epoch(workers, 1)[0])


def test_calibration_is_train_without_augmentation(data: Any) -> None:
    loaders = build_loaders(data, GREY, batch_size=16, aug="light")
    images, _ = epoch(loaders["calibration"], 0)
    mean, std = GREY["mean"][0], GREY["std"][0]
    got = Counter(x.tobytes() for x in ((images * std + mean) * 255).round().to(torch.uint8).numpy())
    train = contents(data.splits["train"])
    assert got.keys() <= set(train)
    assert [image.tobytes() for image in images.numpy()] != sorted(image.tobytes() for image in images.numpy())
    augmented, _ = epoch(loaders["train"], 0)
    drawn = {x.tobytes() for x in ((augmented * std + mean) * 255).round().to(torch.uint8).numpy()}
    assert len(drawn & set(train)) < len(drawn) / 2


def test_train_drops_a_last_batch_that_is_not_full_unless_it_is_the_only_one(data: Any) -> None:
    assert [len(b["labels"]) for b in build_loaders(data, GREY, batch_size=64)["train"]] == [64, 64, 64]
    assert [len(b["labels"]) for b in build_loaders(data, GREY, batch_size=500)["train"]] == [200]
    assert sum(len(b["labels"]) for b in build_loaders(data, GREY, batch_size=16)["test"]) == 30


def test_set_epoch_reaches_the_sampler_through_accelerate(data: Any) -> None:
    plain = build_loaders(data, GREY, batch_size=16)["train"]
    prepared = Accelerator(cpu=True).prepare(build_loaders(data, GREY, batch_size=16)["train"])
    prepared.set_epoch(3)
    images = torch.cat([batch["pixel_values"] for batch in prepared])
    assert torch.equal(images, epoch(plain, 3)[0])


# Streams -------------------------------------------------------------------------------------------------------------


def write_three_splits(folder: Path) -> str:
    write_folders(folder)
    shutil.copytree(folder / "test", folder / "validation")
    return str(folder)


def test_a_stream_has_the_images_of_the_data_and_another_order_in_each_epoch(tmp_path: Path) -> None:
    folder = write_three_splits(tmp_path / "data")
    data, whole = load_image_data(folder, streaming=True), load_image_data(folder)
    assert (data.label_names, data.channels, data.image_size) == (NAMES, 1, (8, 8))
    streamed, plain = (build_loaders(d, GREY, batch_size=16, aug="none") for d in (data, whole))
    for ours, theirs in zip(streamed["test"], plain["test"], strict=True):
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])
    order = []
    for number in (0, 1, 0):
        streamed["train"].dataset.set_epoch(number)
        order.append(torch.cat([batch["labels"] for batch in streamed["train"]]).tolist())
    assert order[0] == order[2] != order[1]
    assert Counter(order[0]) == Counter(order[1]) == Counter(whole.splits["train"]["label"])
    limited = load_image_data(folder, streaming=True, max_train_samples=20, max_eval_samples=10)
    assert [len(list(limited.splits[role])) for role in ("train", "validation", "test")] == [20, 10, 10]


def test_what_a_stream_cannot_be_used_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs its own validation split"):
        load_image_data(write_parquet(tmp_path / "two"), streaming=True)
    with pytest.raises(DataError, match="read from disk as it is used"):
        load_image_data(save(tmp_path / "saved", train=make(20)), streaming=True)
    folder = tmp_path / "numbers"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        make(8).cast_column("label", datasets.Value("int64")).to_parquet(folder / f"{split}.parquet")
    with pytest.raises(DataError, match="must be a ClassLabel"):
        load_image_data(str(folder), streaming=True)


def test_an_endless_stream_begins_anew_and_goes_on_where_it_is_told_to(tmp_path: Path) -> None:
    loader = build_loaders(load_image_data(write_three_splits(tmp_path / "data"), streaming=True), GREY, batch_size=32)
    assert isinstance(loader["train"].dataset, StreamedImages)

    def labels(start: int, count: int) -> list[list[int]]:
        return [batch["labels"].tolist() for batch in itertools.islice(endless(loader["train"], start), count)]

    # Two whole batches of 32 in 80 images.
    first = labels(0, 6)
    assert len({tuple(batch) for batch in first}) == 6
    assert labels(3, 3) == first[3:]


def test_two_processes_take_turns_with_the_batches_of_a_stream(tmp_path: Path) -> None:
    folder, script = write_three_splits(tmp_path / "data"), tmp_path / "rank.py"
    script.write_text(
        f"""import itertools, json, pathlib
from accelerate import Accelerator
from tests.training.test_data import GREY, build_loaders, endless, load_image_data
accelerator = Accelerator(cpu=True)
loaders = build_loaders(load_image_data({folder!r}, streaming=True), GREY, batch_size=16)
train, test = accelerator.prepare(loaders["train"], loaders["test"])
seen = {{str(start): [b["pixel_values"].tolist() for b in itertools.islice(endless(train, start), 4 - start)]
    for start in (0, 3)}}
seen["test"] = [accelerator.gather_for_metrics(b["labels"]).tolist() for b in test]
seen["processes"] = accelerator.num_processes
pathlib.Path({str(tmp_path)!r}, f"rank{{accelerator.process_index}}.json").write_text(json.dumps(seen))
accelerator.end_training()
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launcher, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    loaders = build_loaders(load_image_data(folder, streaming=True), GREY, batch_size=16)
    # An epoch has five batches, of which the last is left over.
    plain = [batch["pixel_values"].tolist() for batch in itertools.islice(endless(loaders["train"]), 10)]
    assert ranks[0]["0"] == [plain[0], plain[2], plain[5], plain[7]]
    assert ranks[1]["0"] == [plain[1], plain[3], plain[6], plain[8]]
    assert [rank["3"] for rank in ranks] == [rank["0"][3:] for rank in ranks]
    labels = [label for batch in loaders["test"] for label in batch["labels"].tolist()]
    for rank in ranks:
        assert sorted(itertools.chain(*rank["test"])) == sorted(labels)


def test_mixup() -> None:
    assert build_mixup(0.0, 0.0, 0.1, 10) is None
    mixup = build_mixup(0.2, 1.0, 0.1, 4)
    assert isinstance(mixup, Mixup)
    images, targets = mixup(torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert targets.shape == (6, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert images.shape == (6, 1, 8, 8)


def test_importing_the_package_does_not_import_datasets() -> None:
    code = "import sys, sdq_hf; sys.exit('datasets' in sys.modules or 'sdq_hf.training' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# Classes of the data and of a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        (NAMES, NAMES, None),
        (NAMES[:3], NAMES, "The data has 3 classes, the model 4"),
        (["ant", "cat", "bee", "dog"], NAMES, "Class 1 is 'cat' in the data and 'bee' in the model"),
        # Without names on one side, only their number is known.
        (NAMES, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], None),
        (NAMES, list("0123"), None),
        (list("0123"), NAMES, None),
        (list("012"), NAMES, "The data has 3 classes, the model 4"),
        # Folders are sorted as text.
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], "Class 2 is '10' in the data and '2' in the model"),
    ],
)
def test_classes_of_the_data_are_those_of_the_model_by_name(names: list[str], own: list[str], message: str | None):
    if message is None:
        check_labels(names, dict(enumerate(own)))
    else:
        with pytest.raises(DataError, match=f"^{re.escape(message)}.* new head"):
            check_labels(names, dict(enumerate(own)))
