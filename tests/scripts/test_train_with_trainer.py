"""Wrong input of `train_with_trainer.py`; `tests/training/test_trainer.py` trains with it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from sdq_hf import SDQForImageClassification
from tests.load import load_script

NAMES = ["ant", "bee"]


@pytest.fixture(scope="module")
def script():
    return load_script("train_with_trainer")


@pytest.fixture(scope="module")
def main(script):
    return script.main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network = SDQForImageClassification.from_timm(
        "resnet8_cifar", id2label=dict(enumerate(NAMES)), img_size=16, model_args={"in_chans": 1}
    )
    network.calibrate([torch.randn(4, 1, 16, 16)])
    network.save_pretrained(folder, print_size=False)
    return folder


def folders(root: Path, names: list[str]) -> Path:
    """Ten grey images of each class in a folder of its name."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "/nope"], "Cannot read the data set '/nope'"),
        (["--aug", "foo"], "--aug: invalid choice: 'foo' (choose from 'none', 'light', 'rand')"),
        (["--agu", "none"], "did you mean --aug?"),
        (["--max_samples", "0"], "--max_samples must be above 0, got 0"),
        (["--learning_rate", "nan"], "--learning_rate must be a finite number, got nan"),
        (["--model", "/nope"], "/nope"),
        (["--teacher", __file__], f"--teacher {__file__} is no file of float weights of resnet8_cifar"),
        (["--teacher", "/nope"], "--teacher /nope is no file of float weights of resnet8_cifar: there is no such file"),
        (["--teacher", ""], "--teacher is no file of float weights of resnet8_cifar: there is no such file"),
        (["--teacher", "WEIGHTS"], "Missing key(s) in state_dict"),
    ],
)
def test_wrong_input_is_one_line_with_exit_code_2(main, model, tmp_path, capsys, options: list[str], message: str):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    options = [str(tmp_path / "weights.safetensors") if option == "WEIGHTS" else option for option in options]
    command = ["--model", str(model), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    data = ["--dataset", str(folders(tmp_path / "data", NAMES))]
    assert main([*command, *data, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train_with_trainer.py: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "cow"], "Class 1 is 'cow' in the data and 'bee' in the model"),
        (["ant", "bee", "cow"], "The data has 3 classes, the model 2"),
    ],
)
def test_data_of_other_classes_are_refused(main, model, tmp_path, capsys, names: list[str], message: str):
    command = ["--model", str(model), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert main([*command, "--dataset", str(folders(tmp_path / "data", names))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options"), [("test_nfnet", {}), ("test_resnet", {}), ("mobileone_s0", {"reparameterize": True})]
)
def test_the_teacher_is_timms_network_whatever_form_the_model_has_it_in(script, tmp_path, name, options):
    """NF-nets standardize weights in each forward, and branches are merged: the model has neither, the file both."""
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=4)
    save_file(source.state_dict(), tmp_path / "float.safetensors")
    model = SDQForImageClassification.from_float(source, name, img_size=64, **options)
    teacher = script.load_teacher(model, str(tmp_path / "float.safetensors"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(teacher.eval()(x), source.eval()(x))
        with model.eval().float_mode():
            torch.testing.assert_close(model(x).logits, teacher(x), rtol=1e-3, atol=1e-4)
