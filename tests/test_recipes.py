"""Each ImageNet recipe, run for a few steps on synthetic images: other data, a tiny size, and no pretrained weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import save_file

from scripts.run_sdq import main
from sdq_hf import SDQForImageClassification

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    features = Features({"image": Image(), "label": ClassLabel(num_classes=4)})
    for name, count in (("train", 40), ("test", 8)):
        images = np.random.default_rng(0).integers(0, 255, (count, 40, 40, 3), dtype=np.uint8)
        columns = {"image": list(images), "label": [i % 4 for i in range(count)]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    teacher = timm.create_model("resnet101", num_classes=4)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe, data, tmp_path):
    changes = {
        "dataset": data,
        "pretrained": "false",
        "kd_teacher_checkpoint": data / "teacher.safetensors",
        "img_size": 32,
        "batch_size": 8,
        "workers": 0,
        "teacher_epochs": 1,
        "epochs": 1,
        # A short way down, and little care: what is tested is that all stages of the recipe fit together.
        "start_bits": 4,
        "search_options": "min_draws=1 max_draws=2",
        "controls": "none",
        "bn_batches": 1,
        "mixed_precision": "no",
        "cpu": "true",
        "output_dir": tmp_path / "run",
    }
    given = [part for key, value in changes.items() for part in (f"--{key}", *str(value).split())]
    assert main([str(recipe), *given]) == 0
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())["rows"][1:]
    target = float(recipe.stem.split("_w")[1].split("_")[0])
    assert target - 0.05 <= row["average_bits"] <= target
    model = SDQForImageClassification.from_pretrained(tmp_path / "run" / "models" / row["name"])
    assert model.config.weight_quantizer == "dorefa"
    assert {layer.activation_bits for layer in model.strategy.values() if not layer.pinned} == {4}
