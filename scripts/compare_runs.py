"""One table from several runs that differ in their seed: mean and standard deviation of each row.

for s in 0 1 2; do accelerate launch scripts/run_sdq.py scripts/demo.yaml --seed $s --output_dir runs/demo-$s; done
python scripts/compare_runs.py runs/demo-0 runs/demo-1 runs/demo-2
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

COLUMNS = (
    ("top-1, %", "top1", 1, 2),
    ("KL to float, nats", "kl", 1, 4),
    ("average bits", "average_bits", 1, 2),
    ("file, kB", "file_bytes", 1e3, 1),
    ("MBitOPs", "bitops", 1e6, 1),
)


def compare(runs: list[list[dict[str, Any]]]) -> str:
    """Markdown; `runs` holds the rows of each run's results.json. Rows that not all runs have are left out."""
    lines = [f"| | {' | '.join(title for title, *_ in COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for first in runs[0]:
        same = [[row for row in rows if row["name"] == first["name"]] for rows in runs]
        if not all(same):
            continue
        cells = []
        for _, key, scale, digits in COLUMNS:
            values = [found[0][key] / scale for found in same]
            cell = f"{statistics.fmean(values):,.{digits}f}"
            if len(values) > 1 and max(values) > min(values):
                cell += f" ± {statistics.stdev(values):,.{digits}f}"
            cells.append(cell)
        lines.append(f"| {first['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of run_sdq.py")
    folders = parser.parse_args().folders
    print(compare([json.loads((folder / "results.json").read_text())["rows"] for folder in folders]))


if __name__ == "__main__":
    main()
