"""Tables in README.md and docs are those of their JSON files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.update_results import updated

ROOT = Path(__file__).parents[2]


def test_the_tables_in_the_repository_are_those_of_their_files():
    command = [sys.executable, str(ROOT / "scripts" / "update_results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "README.md").read_text().count("<!-- table:") >= 1


def cell(seed, method, kl, top1):
    fixed = {"activation_bits": 4, "cost": "bits", "target": 2.0, "average_bits": 2.0}
    return {
        **fixed,
        "seed": seed,
        "method": method,
        "kl": kl,
        "top1": top1,
        "found": {"kl": 2 * kl},
        "validation": {"kl": kl},
    }


def test_a_table_is_made_anew_from_its_file_and_the_text_around_it_stays(tmp_path):
    cells = [cell(0, "size", 0.30, 80.0), cell(1, "size", 0.50, 84.0), cell(0, "greedy", 0.1, 90.0)]
    cells.append({**cell(1, "greedy", 0, 0), "error": "budget not met"})
    cells += [cell(seed, "two_sided", kl, 90.0) for seed, kl in ((0, 0.07), (1, 0.05), (2, 0.9))]
    (tmp_path / "a.json").write_text(json.dumps({"cells": cells}))
    text = "before\n<!-- table: search a.json -->\nold | table\n<!-- /table -->\nafter\n"
    new = updated(text, tmp_path)
    assert new.startswith("before\n<!-- table: search a.json -->\n")
    assert new.endswith("<!-- /table -->\nafter\n")
    rows = [line for line in new.splitlines() if line.startswith("| 2 ")]
    # Least KL first; the error is the standard deviation over the root of the number of seeds.
    assert rows[0].startswith("| 2 average bits, A4 | greedy | 0.1000 | 0.0300 |")
    assert rows[1].startswith("| 2 average bits, A4 | two_sided | 0.3400 ± 0.2801 |  |")
    # Differences from SDQ are taken seed by seed, where both have been run: 0.23 and 0.45.
    numbers = "0.4000 ± 0.1000 | 0.3400 ± 0.1100, p = 0.20 | 0.3400 ± 0.1100 | 82.00 ± 2.00 | 0.800 ± 0.200"
    assert rows[2] == f"| 2 average bits, A4 | size | {numbers} | 2.00 | 2 |"
    assert updated(new, tmp_path) == new


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown table 'serch': expected one of demo"):
        updated("<!-- table: serch a.json -->\n<!-- /table -->", tmp_path)
