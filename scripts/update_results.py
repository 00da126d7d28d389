"""Put the tables of README.md and docs/*.md in the place of the old ones, from the JSON files of their runs.

    python scripts/update_results.py            # write
    python scripts/update_results.py --check    # exit code 1 where a table is not that of its files

A table stands between `<!-- table: KIND FILE ... -->` and `<!-- /table -->`; the kinds are those of `TABLES` below.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# As when a script is run: its folder is where its neighbours are imported from.
sys.path.insert(0, str(Path(__file__).parent))

import bench_onnx  # noqa: E402
import bench_searches  # noqa: E402
import compare_runs  # noqa: E402
import make_lut_table  # noqa: E402
import mutate  # noqa: E402
import study_ablations  # noqa: E402
import study_batch_norm  # noqa: E402
import study_bins  # noqa: E402
import study_landscape  # noqa: E402
import study_peers  # noqa: E402
import study_planted  # noqa: E402
import study_pretrained  # noqa: E402
import study_pretrained_search  # noqa: E402
import study_quantizers  # noqa: E402
import study_search  # noqa: E402
import study_signal  # noqa: E402
import study_stability  # noqa: E402
import study_transfer  # noqa: E402
import sweep_timm  # noqa: E402
import verify_exports  # noqa: E402
import verify_hls  # noqa: E402

from sdq_hf.writing import write_text  # noqa: E402

# Contents of the files -> markdown.
TABLES: dict[str, Callable[[list[Any]], str]] = {
    "demo": lambda files: compare_runs.compare([results["rows"] for results in files]),
    "quantizers": lambda files: study_quantizers.table(files[0]["cells"]),
    "costs": lambda files: bench_searches.table(files[0]["cells"]),
    "ablations": lambda files: study_ablations.table(files[0]["cells"]),
    "batch_norm": lambda files: study_batch_norm.table(files[0]["cells"]),
    "bins": lambda files: study_bins.table(files[0]["cells"]),
    "peers": lambda files: study_peers.table(files[0]["cells"]),
    "planted": lambda files: study_planted.table(files[0]["cells"]),
    "landscape": lambda files: study_landscape.table(files[0]["cells"]),
    "stability": lambda files: study_stability.table(files[0]["cells"]),
    "signal": lambda files: study_signal.table(files[0]["cells"]),
    "mutants": lambda files: mutate.table(files[0]["modules"]),
    "onnx": lambda files: bench_onnx.table(files[0]),
    "networks": lambda files: sweep_timm.table(files[0]),
    "integers": lambda files: sweep_timm.integers_table(files[0]),
    "pretrained": lambda files: study_pretrained.table(files[0]["cells"]),
    "pretrained_search": lambda files: study_pretrained_search.table(files[0]["cells"]),
    "exports": lambda files: verify_exports.table(files[0]["cells"]),
    "profiles": lambda files: verify_exports.profiles(files[0]["cells"]),
    "hls": lambda files: verify_hls.table(files[0]["rows"]),
    "luts": lambda files: make_lut_table.markdown(files[0]),
    "transfer": lambda files: study_transfer.table(files[0]["cells"]),
    "search": lambda files: study_search.table([cell for content in files for cell in content["cells"]]),
}
_BLOCK = re.compile(r"<!-- table: (\w+) ([^>]+?) -->\n.*?<!-- /table -->", re.DOTALL)


def updated(text: str, root: Path = ROOT) -> str:
    """`text` with its tables made anew. Raises `ValueError` for a kind of table that there is not."""

    def block(match: re.Match[str]) -> str:
        kind, paths = match[1], match[2].split()
        if kind not in TABLES:
            raise ValueError(f"Unknown table {kind!r}: expected one of {', '.join(TABLES)}.")
        table = TABLES[kind]([json.loads((root / path).read_text()) for path in paths])
        return f"<!-- table: {kind} {' '.join(paths)} -->\n\n{table}\n\n<!-- /table -->"

    return _BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = updated(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                write_text(path, new)
    print(f"{'Out of date' if check else 'Updated'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
