"""A dense layer of whole numbers as pipelined adders without a multiplier, by da4ml: one input vector a clock cycle.

da4ml takes the weights apart into shifts and adders that outputs share (distributed arithmetic), and unrolls all of them: it
is for small layers. It is under the LGPL, and so are the Verilog modules of its own that a project has in src/static.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantizers.activation import activation_range
from ..writing import write_json, write_text
from .lower import ExportError
from .optional import needed
from .verilog import CHECKS, WRITES, Bench, check_vectors, hex_words, run_bench, values_of

# The search for adders that outputs share takes seconds for a thousand weights, and grows with the square of their number.
MOST_WEIGHTS = 8192
# Adders in a row between two registers.
_ADDERS = 5


def write_unrolled(
    folder: str | Path, weights: NDArray[np.int64], bias: NDArray[np.int64] | None, low: int, high: int
) -> dict[str, Any]:
    """Write a dense layer `y = weights @ x + bias` as a project of da4ml: its top module is `head_wrapper` in `folder`/src.

    weights: integers [outputs, inputs]. bias: integers [outputs], in units of weight times input. low, high: ends of the
    integers x.

    Gives what is known of it, which is in `folder`/head.json too: widths of inputs and outputs, cycles of latency, and what
    da4ml takes for the LUTs. Raises `ExportError` where da4ml is not installed, and for a layer that is too large.
    """
    outputs, inputs = weights.shape
    if weights.size > MOST_WEIGHTS:
        raise ExportError(
            f"The classifier has {outputs} x {inputs} weights; da4ml unrolls all of them, and up to {MOST_WEIGHTS} are "
            "exported. The target verilog has a unit that is used again and again."
        )
    needed("da4ml", "da4ml")
    from da4ml.codegen import VerilogModel
    from da4ml.trace import FixedVariableArray, HWConfig, comb_trace, to_pipeline
    from da4ml.types import minimal_kif

    x = FixedVariableArray.from_lhs(
        low=np.full(inputs, float(low)),
        high=np.full(inputs, float(high)),
        step=np.ones(inputs),
        hwconf=HWConfig(1, -1, -1),
        # The other way takes eight times as long, for a tenth fewer adders.
        solver_options={"search_all_decompose_dc": False},
    )
    y = x @ weights.T.astype(np.float64)
    circuit = comb_trace(x, y if bias is None else y + bias.astype(np.float64))
    pipeline = to_pipeline(circuit, _ADDERS, verbose=False)
    VerilogModel(pipeline, "head", str(folder), print_latency=False).write()
    (sign, whole, _), (out_sign, out_whole, out_fraction) = (
        [max(column) for column in zip(*map(minimal_kif, intervals), strict=True)]
        for intervals in (circuit.inp_qint, circuit.out_qint)
    )
    known = {
        "inputs": inputs,
        "input_bits": int(sign + whole),
        "range": [low, high],
        "outputs": outputs,
        "output_bits": int(out_sign + out_whole + out_fraction),
        "output_signed": bool(out_sign),
        # Of even integers alone the last bits are not there.
        "output_shift": -int(out_fraction),
        "cycles": len(pipeline.solutions) + 1,
        "luts": {"count": int(circuit.cost), "what": "da4ml's estimate, no synthesis"},
    }
    write_json(Path(folder) / "head.json", known)
    return known


def simulate_unrolled(folder: str | Path, x: NDArray[np.int64], *, simulator: str | None = None) -> NDArray[np.int64]:
    """Outputs [N, outputs] that the Verilog in `folder`, written by `write_unrolled`, computes for integers `x` [N, inputs].

    A vector goes in with each clock cycle. simulator: as in `simulate_dense`. The bench is written into `folder`.
    """
    folder = Path(folder)
    head = json.loads((folder / "head.json").read_text())
    _bench(folder, head, x, WRITES)
    sources = sorted(path.relative_to(folder).as_posix() for path in (folder / "src").rglob("*.v"))
    lines = run_bench(folder, ["bench.v", *sources], simulator, len(x))
    return values_of(lines, head["output_bits"], head["outputs"], head["output_signed"]) * 2 ** head["output_shift"]


def write_unrolled_check(folder: str | Path, x: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
    """Write a bench beside a layer of `write_unrolled` that sends `x` [N, inputs] and prints PASS or FAIL.

    As `write_dense_check` of the other layer. expected: integers [N, outputs].
    """
    folder = Path(folder)
    head = json.loads((folder / "head.json").read_text())
    _bench(folder, head, x, CHECKS)
    bits, codes = head["output_bits"], expected >> head["output_shift"]
    check_vectors(codes, head["outputs"], activation_range(bits, head["output_signed"]), "expected")
    write_text(folder / CHECKS.outputs, hex_words(codes & (2**bits - 1), bits))


def _bench(folder: Path, head: Mapping[str, Any], x: NDArray[np.int64], bench: Bench) -> None:
    check_vectors(x, head["inputs"], tuple(head["range"]), "x")
    width, out = head["input_bits"], head["output_bits"] * head["outputs"]
    write_text(folder / bench.inputs, hex_words(x & (2**width - 1), width))
    text = bench.of(_BENCH, IN=width * head["inputs"], OUT=out, RESULTS=len(x), CYCLES=head["cycles"])
    write_text(folder / f"{bench.name}.v", text)


_BENCH = """\
// Sends a line of {INPUTS} with each cycle; {OUTPUTS} has what comes out {CYCLES} cycles later.
module {NAME};
  reg clk = 0;
  reg [{IN}-1:0] stimulus[0:{RESULTS}-1];
  reg [{IN}-1:0] inputs = 0;
  wire [{OUT}-1:0] out_values;
  integer cycle = 0, got = 0;
  {DECLARE}

  head_wrapper head (
      .clk(clk),
      .model_inp(inputs),
      .model_out(out_values)
  );

  always #1 clk = ~clk;
  initial begin
    $readmemh("{INPUTS}", stimulus);
    {START}
  end

  always @(negedge clk) begin
    if (cycle >= {CYCLES}) begin
      {TAKE}
      got = got + 1;
    end
    inputs <= cycle < {RESULTS} ? stimulus[cycle] : 0;
    cycle = cycle + 1;
    if (got == {RESULTS}) begin
      {END}
      $finish;
    end
  end
endmodule
"""
