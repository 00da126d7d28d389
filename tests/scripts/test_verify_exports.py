import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone
from tests.test_hardware_profile import trained_looks

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]


def test_images_of_other_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The accuracy would be of labels that are not the model's."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    main = importlib.import_module("verify_exports").main
    model = SDQForImageClassification.from_float(
        trained_looks(create_backbone("resnet8_cifar", num_classes=12)), "resnet8_cifar", img_size=28
    )
    model.to_hardware_profile([torch.randn(8, 3, 28, 28)]).save_pretrained(tmp_path / "mine", print_size=False)
    command = ["verify_exports.py", "--models", str(tmp_path / "mine"), "--images", "3", "--to", "onnx"]
    command += ["--folder", str(tmp_path / "exports"), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="mine: the data has 10 classes, the model 12"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_it_exports_keeps_the_numbers_and_goes_on(tmp_path: Path):
    torch.manual_seed(0)
    model = SDQForImageClassification.from_float(
        trained_looks(create_backbone("resnet8_cifar", num_classes=10)), "resnet8_cifar", img_size=28
    )
    model.to_hardware_profile([torch.randn(8, 3, 28, 28)]).save_pretrained(tmp_path / "mine", print_size=False)
    command = [sys.executable, "scripts/verify_exports.py", "--models", str(tmp_path / "mine"), "--images", "3", "--to"]
    command += ["onnx", "--folder", str(tmp_path / "exports"), "--out", str(tmp_path / "out.json")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (cell,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    rows = [line for line in first.splitlines() if line.startswith("| mine |")]
    assert [row.split(" | ")[1] for row in rows] == ["model in float64", "model in float32", "onnx"]
    proof = json.loads((tmp_path / "exports" / "mine" / "verification.json").read_text())
    assert cell["comparisons"] == proof["comparisons"]
    assert all(comparison["equal"] for comparison in cell["comparisons"])
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Nothing was measured anew.
    assert "integers:" in first
    assert "integers:" not in again
