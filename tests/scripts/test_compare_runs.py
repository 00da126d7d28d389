"""Mean and spread over runs, against numbers worked out by hand."""

from tests.load import load_script

compare_runs = load_script("compare_runs")


def row(name, top1, kl):
    return {"name": name, "top1": top1, "kl": kl, "average_bits": 2.0, "file_bytes": 4000, "bitops": 3e6}


def test_rows_that_all_runs_have_are_averaged():
    runs = [[row("a", 80, 0.1), row("only here", 1, 1)], [row("a", 84, 0.3)]]
    *_, line = compare_runs.compare(runs).splitlines()
    # Standard deviations with n - 1: |80 - 84| / sqrt(2) and |0.1 - 0.3| / sqrt(2).
    assert line == "| a | 82.00 ± 2.83 | 0.2000 ± 0.1414 | 2.00 | 4.0 | 3.0 |"
    assert "only here" not in compare_runs.compare(runs)
