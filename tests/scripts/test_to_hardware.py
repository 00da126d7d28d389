"""`to_hardware.py` on a model of the small data set of the other run tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone
from sdq_hf.export.lower import integer_network
from sdq_hf.training.data import load_image_data
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.loaders import build_loaders
from tests.hub_server import HubServer, patch_client
from tests.load import load_script
from tests.test_hardware_profile import trained_looks

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")
SCRIPT = Path(__file__).parents[2] / "scripts" / "to_hardware.py"
SIZE, CLASSES = 16, 4


@pytest.fixture(scope="module")
def main():
    return load_script("to_hardware").main


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares, each class in a corner of its own, under noise."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")

    def rows(count: int) -> Dataset:
        labels = [i % CLASSES for i in range(count)]
        pictures = []
        for label in labels:
            picture = random.integers(0, 60, (SIZE, SIZE), dtype=np.uint8)
            row, column = 8 * (label // 2), 8 * (label % 2)
            picture[row : row + 8, column : column + 8] += 120
            pictures.append(PILImage.fromarray(picture))
        features = Features({"image": Image(), "label": ClassLabel(names=list("abcd"))})
        return Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    DatasetDict({"train": rows(256), "validation": rows(64), "test": rows(64)}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def model(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = SDQForImageClassification.from_float(
        trained_looks(create_backbone("resnet8_cifar", num_classes=CLASSES, in_chans=1)),
        "resnet8_cifar",
        id2label=dict(enumerate("abcd")),
        img_size=SIZE,
        model_args={"in_chans": 1},
    ).eval()
    network.set_strategy(2)
    network.calibrate([torch.randn(16, 1, SIZE, SIZE)])
    network.save_pretrained(folder, print_size=False)
    return folder


def test_it_leaves_a_model_in_the_profile_and_its_metrics(main, images: Path, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = ["--model", str(model), "--output_dir", str(out), "--dataset", str(images), "--cpu", "true"]
    assert main([*command, "--epochs", "3", "--lr", "0.001", "--batch_size", "32", "--aug", "none"]) == 0
    rows = json.loads((out / "hardware.json").read_text())["rows"]
    # It learns from the model that it was made from.
    assert rows["before"]["validation"]["kl"] == 0
    assert 0 < rows["trained"]["validation"]["kl"] < rows["profile"]["validation"]["kl"]
    loaded = SDQForImageClassification.from_pretrained(out)
    assert loaded.strategy == SDQForImageClassification.from_pretrained(model).strategy
    pixels = torch.randn(3, 1, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(integer_network(loaded.eval()).logits(pixels), loaded(pixels).logits.double())
    assert {path.name for path in out.iterdir()} == {"config.json", "hardware.json", "model.safetensors"}


def test_two_processes_leave_one_model(images: Path, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
        "--model",
        str(model),
    ]
    command += ["--output_dir", str(out), "--dataset", str(images), "--cpu", "true", "--epochs", "2", "--lr", "0.001"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test top-1") == 1
    rows = json.loads((out / "hardware.json").read_text())["rows"]
    # What was saved is what was evaluated, on whichever rank; all 64 images of the split count once.
    loaded, data = SDQForImageClassification.from_pretrained(out).eval(), load_image_data(str(images))
    loaders = build_loaders(data, loaded.config.pretrained_cfg)
    reference = SDQForImageClassification.from_pretrained(model).eval()
    found = evaluate(loaded, loaders["test"], Accelerator(cpu=True), reference=reference)
    assert found == pytest.approx(rows["trained"]["test"], rel=1e-5)
    assert {path.name for path in out.iterdir()} == {"config.json", "hardware.json", "model.safetensors"}


def test_a_model_of_the_hub_may_have_a_revision(main, images, model, tmp_path, capsys, monkeypatch):
    loaded = SDQForImageClassification.from_pretrained(model)
    with HubServer(tokens={"hf_good": "org-user"}) as hub:
        patch_client(monkeypatch, hub, tmp_path / "home")
        loaded.push_to_hub("org-user/net", revision="w2")
        command = ["--output_dir", str(tmp_path / "out"), "--dataset", str(images), "--cpu", "true", "--epochs", "0"]
        assert main(["--model", "org-user/net@w2", *command]) == 0
        profile = SDQForImageClassification.from_pretrained(tmp_path / "out")
        assert profile.config.scales == "power_of_two"
        assert profile.strategy == loaded.strategy
        assert main(["--model", "org-user/net@w3", *command]) == 2
    assert "w3" in capsys.readouterr().err
    assert main(["--model", f"{model}@w2", *command]) == 2
    assert "is a folder, which has no revision 'w2'" in capsys.readouterr().err


def test_a_network_without_an_integer_form_is_refused_before_it_is_trained(main, images, tmp_path, capsys):
    network = create_backbone("resnet8_cifar", num_classes=CLASSES, in_chans=1, act_layer="silu")
    arguments = {"in_chans": 1, "act_layer": "silu"}
    model = SDQForImageClassification.from_float(network, "resnet8_cifar", img_size=SIZE, model_args=arguments).eval()
    model.calibrate([torch.randn(8, 1, SIZE, SIZE)])
    model.save_pretrained(tmp_path / "silu", print_size=False)
    command = ["--model", str(tmp_path / "silu"), "--output_dir", str(tmp_path / "out"), "--dataset", str(images)]
    assert main([*command, "--cpu", "true"]) == 2
    assert "'act1' is a SiLU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixup", "0.2"], "--mixup has no place in to_hardware.py"),
        (["--epochss", "2"], "did you mean --epochs?"),
        (["--epochs", "-1"], "--epochs must be 0 or more, got -1.0"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--min_lr", "5"], "--min_lr must be at most --lr, 0.0003, got 5"),
        (["--opt", "adamv"], "near names: adam"),
        (["--weight_scale", "row"], "weight_scale must be one of layer, channel, got 'row'"),
    ],
)
def test_a_wrong_option_is_one_line(main, images, model, tmp_path, capsys, options: list[str], message: str):
    out = tmp_path / "out"
    command = ["--model", str(model), "--output_dir", str(out), "--dataset", str(images), "--cpu", "true"]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_data_of_other_classes_are_refused(main, images, model, tmp_path, capsys):
    found = DatasetDict.load_from_disk(str(images))
    other = found.cast_column("label", ClassLabel(names=list("abdc")))
    other.save_to_disk(tmp_path / "other")
    command = ["--model", str(model), "--output_dir", str(tmp_path / "out"), "--dataset", str(tmp_path / "other")]
    assert main([*command, "--cpu", "true"]) == 2
    assert "Class 2 is 'd' in the data and 'c' in the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_user_is_not_taken_for_checkpoints(main, images, model, tmp_path, capsys):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "photo.png").write_text("keep me")
    command = ["--model", str(model), "--output_dir", str(tmp_path), "--dataset", str(images), "--cpu", "true"]
    assert main(command) == 2
    assert "photo.png is no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "training" / "photo.png").read_text() == "keep me"


def test_the_model_itself_is_not_written_over(main, images, model, capsys):
    before = (model / "config.json").read_bytes()
    command = ["--model", str(model), "--dataset", str(images), "--cpu", "true", "--epochs", "0"]
    assert main([*command, "--output_dir", str(model / ".." / model.name)]) == 2
    assert "is the folder of the model itself: choose another one" in capsys.readouterr().err
    assert (model / "config.json").read_bytes() == before
