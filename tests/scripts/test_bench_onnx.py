"""bench_onnx.py at a tiny size: speed, sizes and agreement."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

from sdq_hf import SDQForImageClassification  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_onnx.py"


def test_exports_are_measured_against_the_float_file_and_the_model(tmp_path: Path):
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=10, img_size=28, model_args={"in_chans": 1})
    model.calibrate([torch.randn(8, 1, 28, 28)])
    model.eval().save_pretrained(tmp_path / "model", print_size=False)
    out = tmp_path / "onnx.json"
    command = [sys.executable, str(SCRIPT), "--networks", "resnet8_cifar:16", "--activation_bits", "4"]
    command += ["--batches", "2", "--repeats", "3", "--model", str(tmp_path / "model"), "--images", "50"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["network"], row["activation_bits"], row["batch"], row["turns"]) == ("resnet8_cifar", 4, 2, 3)
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert row["exact_mb"] < row["int8_mb"] < row["float_mb"]
    assert f"| resnet8_cifar | 4 | 2 | {row['float_ms']:.1f} | {row['int8_ms']:.1f} |" in done.stdout
    assert f"| {row['own_ratio']:.2f} |" in done.stdout
    agreement = found["agreement"]
    assert agreement["images"] == 50
    exact, int8 = agreement["rows"]["exact, basic"], agreement["rows"]["int8"]
    assert exact["equal"]
    assert exact["top1"] == agreement["reference_top1"]
    assert not int8["equal"]
    assert 0 < int8["mean_difference"] < int8["largest_difference"]
