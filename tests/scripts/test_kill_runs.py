"""A few kills by `scripts/kill_runs.py`, and whether it would see a difference."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.load import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_runs.py"


def test_killed_runs_leave_what_one_leaves_that_was_not_killed(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(SCRIPT),
        "--kills",
        "3",
        "--folder",
        str(tmp_path),
        "--out",
        str(tmp_path / "o.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["kills"] >= 3
    assert result["kinds"].keys() == {"time", "step", "write"}
    assert sum(result["kinds"].values()) == sum(result["phases"].values()) == result["kills"]
    # What it compares by: another weight, another metric, a file left over.
    script = load_script("kill_runs")
    whole = script.contents(tmp_path / "whole")
    assert script.contents(shutil.copytree(tmp_path / "run-0", tmp_path / "copy")) == whole
    weights = tmp_path / "copy" / "models" / "sdq-bits-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    results = json.loads((tmp_path / "copy" / "results.json").read_text())
    results["rows"][1]["kl"] += 1e-9
    (tmp_path / "copy" / "results.json").write_text(json.dumps(results))
    (tmp_path / "copy" / "left.new").write_text("")
    found = script.contents(tmp_path / "copy")
    wrong = {name for name in found | whole if found.get(name, 0) != whole.get(name, 0)}
    assert wrong == {"models/sdq-bits-3/model.safetensors", "results.json", "left.new"}
