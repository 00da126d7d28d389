"""Kill runs at random moments, go on with --resume, and compare what they leave with a run that was never killed.

    OMP_NUM_THREADS=1 python scripts/kill_runs.py --kills 150 --out docs/benchmarks/kills.json

A small run of `run_sdq.py` (teacher, a search, a fine-tune, test) on the bundled sample is killed, resumed, killed again,
until it comes to its end; then the next one starts, until there were enough kills. They are of three kinds, in turn:

time   SIGKILL after a random time
step   SIGKILL right before the k-th time that the run opens, renames or removes something in its folder
write  in the middle of a file: after a random time the kernel lets no file grow beyond some random bytes (RLIMIT_FSIZE, with
       the signal's own action, which ends the process at once and cannot be caught)

Each attempt is a whole run of the script's `main` in a process of its own. It is forked from a parent that has the modules
imported and has computed nothing, which saves some seconds an attempt.

Equal means: the same files with the same bytes, but for entries of JSON files that tell the time, and pictures and cards that
show it.
"""

import argparse
import importlib
import json
import mmap
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import run_sdq
import torch

from sdq_hf.training import stages
from sdq_hf.writing import write_json

OPTIONS = {
    "model": "resnet8_cifar",
    "max_train_samples": 160,
    "max_eval_samples": 32,
    "img_size": 28,
    "batch_size": 16,
    "teacher_epochs": 2,
    "teacher_lr": 0.05,
    "epochs": 2,
    "target_bits": 3.0,
    "controls": "none",
    "bn_batches": 2,
    "save_steps": 4,
    "cpu": "true",
}
PHASES = ("start", "teacher", "search", "finetune", "evaluate")
KINDS = ("time", "step", "write")
# Entries of JSON files that tell the time, or where and how a run was started.
_IGNORED = ("seconds", "search_seconds", "finetune_seconds", "output_dir", "resume")


class Attempt:
    """One process that runs `main`; `phase`, and how many `steps` it made in its folder, are seen from outside."""

    def __init__(self, folder: Path, options: dict[str, Any], resume: bool, last_step: int | None = None):
        self._shared, self._began = mmap.mmap(-1, 16), time.monotonic()
        argv = [part for key, value in options.items() for part in (f"--{key}", *str(value).split())]
        argv += ["--output_dir", str(folder), *(["--resume", "true"] if resume else [])]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._run(folder, argv, last_step)
                code = run_sdq.main(argv)
            finally:
                os._exit(code)

    def _run(self, folder: Path, argv: list[str], last_step: int | None) -> None:
        """In the child: say nothing, tell the phase, count steps and stop before number `last_step`."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for number, name in enumerate(PHASES[1:4], start=1):
            setattr(stages.Run, name, self._noted(number, getattr(stages.Run, name)))
        run_sdq.report = self._noted(4, run_sdq.report)
        prefix = str(folder)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
            if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and prefix in str(arguments[0]):
                self._shared[1:9] = (self.steps + 1).to_bytes(8, "little")
                if self.steps == last_step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    def _noted(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            self._shared[0] = number
            if not self.start_seconds:
                self._shared[9:13] = round(1e6 * (time.monotonic() - self._began)).to_bytes(4, "little")
            return function(*arguments, **options)

        return noted

    @property
    def phase(self) -> str:
        return PHASES[self._shared[0]]

    @property
    def start_seconds(self) -> float:
        """From the fork to the first stage; 0 before it."""
        return int.from_bytes(self._shared[9:13], "little") / 1e6

    @property
    def steps(self) -> int:
        return int.from_bytes(self._shared[1:9], "little")

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code (minus the signal's number when it was killed), or None when it still runs after `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if end is not None and time.monotonic() >= end:
                return None
            time.sleep(0.002)


def contents(folder: Path) -> dict[str, Any]:
    """File name -> what it holds, without what tells the time."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.suffix not in (".png", ".md"):  # they show the times, too
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def _timeless(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _timeless(v) for k, v in data.items() if k not in _IGNORED}
    return [_timeless(value) for value in data] if isinstance(data, list) else data


class Kills:
    """Runs in `folder` that are killed; `counts` of kills by kind and phase, `faults` in words."""

    def __init__(self, folder: Path, options: dict[str, Any], seed: int = 0):
        self.folder, self.options, self.draw = folder, options, random.Random(seed)
        self.counts, self.faults = Counter[tuple[str, str]](), list[str]()
        self.runs = self.most = 0
        started = time.monotonic()
        whole = Attempt(folder / "whole", options, resume=False)
        if whole.wait() != 0:
            raise RuntimeError(f"The run failed without being killed: {(folder / 'whole.log').read_text()[-500:]}")
        self.seconds, self.start_seconds, self.steps = time.monotonic() - started, whole.start_seconds, whole.steps
        self.expected = contents(folder / "whole")
        sizes = [path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file()]
        self.largest = max(sizes)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def one(self, kinds: tuple[str, ...] = KINDS, most: int = 10**9) -> None:
        """A run from its start to its end, killed up to `most` times on the way."""
        folder, before, streak = self.folder / f"run-{self.runs}", self.total, 0
        self.runs += 1
        while True:
            kind = kinds[self.total % len(kinds)] if self.total - before < most else "none"
            # Short attempts are the most frequent: each goes on where the one before it was killed.
            way = self.draw.random() ** 2
            last_step = round(1 + way * (self.steps - 1)) if kind == "step" else None
            resume = (folder / "arguments.json").exists()
            attempt = Attempt(folder, self.options, resume, last_step)
            code = None if kind in ("time", "write") else attempt.wait()
            if code is None:
                start = 0.8 * self.start_seconds
                code = attempt.wait(start + way * (self.seconds - start))
            if code is None and kind == "time":
                os.kill(attempt.pid, signal.SIGKILL)
                code = attempt.wait()
            elif code is None:
                # Small files are cut too: the sizes are spread over all orders of magnitude.
                limit = round(self.largest ** self.draw.uniform(0.2, 1))
                resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE, (limit, limit))
                code = attempt.wait()
            if code is None or code >= 0:
                break
            self.counts[kind, attempt.phase] += 1
            streak += 1
        self.most = max(self.most, streak)
        found = contents(folder) if code == 0 else {}
        if code != 0:
            self.faults.append(f"{folder.name}: exit code {code} after {streak} kills, the last by {kind}")
        elif wrong := [n for n in sorted(found.keys() | self.expected) if found.get(n, 0) != self.expected.get(n, 0)]:
            self.faults.append(f"{folder.name}: differs after {streak} kills: {', '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where the runs lie; default: a temporary folder.")
    parser.add_argument("--out", type=Path, default=Path("runs/kills.json"))
    options = parser.parse_args()
    # What an attempt would import on its way.
    importlib.import_module("sdq_hf.hub.plots")
    importlib.import_module("sdq_hf.hub.card")
    with tempfile.TemporaryDirectory() as scratch:
        kills = Kills(options.folder or Path(scratch), OPTIONS, options.seed)
        print(f"A run takes {kills.seconds:.1f} s and {kills.steps} steps in its folder.", flush=True)
        while kills.total < options.kills:
            kills.one()
            print(f"{kills.runs} runs, {kills.total} kills, {len(kills.faults)} faults", flush=True)
    by_kind = {kind: sum(n for (k, _), n in kills.counts.items() if k == kind) for kind in KINDS}
    by_phase = {phase: sum(n for (_, p), n in kills.counts.items() if p == phase) for phase in PHASES}
    result = {
        "kills": kills.total,
        "runs": kills.runs,
        "most_kills_of_a_run": kills.most,
        "kinds": by_kind,
        "phases": by_phase,
        "faults": kills.faults,
        "seed": options.seed,
        "files_compared": len(kills.expected),
        "versions": {name: version(name) for name in ("torch", "accelerate", "timm", "transformers", "safetensors")},
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
    write_json(options.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(1 if kills.faults else 0)


if __name__ == "__main__":
    main()
