"""Write the bundled sample of Fashion-MNIST from the full set: 8,000 training and 2,000 test images, stratified.

    python scripts/make_fashion_mnist_sample.py --source FOLDER

FOLDER holds the idx files of the full set, as Debian's package dataset-fashion-mnist or the original publication have
them. The sample is the same on each run with the same seed.
"""

import argparse
import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from sdq_hf.training.data import BUNDLED, read_idx_file

NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of `count` images, as many of each class, in random order."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    each = [rng.choice(np.flatnonzero(labels == c), count // len(classes), replace=False) for c in classes]
    return rng.permutation(np.concatenate(each))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=BUNDLED)
    parser.add_argument("--train", type=int, default=8000, help="training images, a multiple of 10")
    parser.add_argument("--test", type=int, default=2000, help="test images, a multiple of 10")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    args.output.mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", args.train), ("test", "t10k", args.test)):
        images, labels = (
            read_idx_file(next(iter(sorted(args.source.glob(f"{prefix}-{kind}-idx*")))))
            for kind in ("images", "labels")
        )
        rows = stratified(labels, count, args.seed)
        table = {"image": [{"bytes": png(images[i])} for i in rows], "label": labels[rows].tolist()}
        path = args.output / f"{split}.parquet"
        beside = path.with_suffix(".new")
        # `to_parquet` leaves images uncompressed; what is alike in all the small PNG files is a tenth of them.
        arrow = datasets.Dataset.from_dict(table, features=features).data.table
        arrow = arrow.replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(arrow, beside, compression="zstd", use_dictionary=False)
        os.replace(beside, path)
        print(f"{path}: {count} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
