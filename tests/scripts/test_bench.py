"""bench.py at a tiny size: steps are timed and weighed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


def test_steps_are_measured_against_the_float_step(tmp_path):
    out = tmp_path / "steps.json"
    command = [sys.executable, str(SCRIPT), "--networks", "resnet8_cifar:16:4", "--rounds", "2", "--threads", "1"]
    command += ["--device", "cpu", "--out", str(out), "--steps", "finetune", "search"]
    command += ["--mixed_precision", "bf16", "--ddp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    rows = {row["step"]: row for row in found["rows"]}
    assert list(rows) == ["finetune", "search"]
    for row in rows.values():
        images = 4 / (row["time_ratio"] * row["float_seconds"])
        assert row["images_per_second"] == pytest.approx(images, rel=0.5)
        assert row["memory_ratio"] > 0
    assert (found["ddp"], found["mixed_precision"], found["device"]) == (True, "bf16", "cpu")
