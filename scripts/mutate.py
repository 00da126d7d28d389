"""Break each formula of the mathematical core in turn, and list what no test notices.

    python scripts/mutate.py --out docs/benchmarks/mutants.json
    python scripts/mutate.py --modules packing quantizers/grids --sample 40
    python scripts/mutate.py --again docs/benchmarks/mutants.json       # only those that no test noticed

A mutant is a module with one change: + and - swapped, * and /, < and <=, min and max, `and` and `or`, a constant off by one,
a `detach` or a `not` dropped. Each runs the tests of its module in a fork of one process that has imported all libraries. A
mutant whose tests take longer than --seconds counts as noticed: its loop no longer ends.
"""

import argparse
import ast
import copy
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# The tests of test_search.py that train no network, and all of the other files. (The names of files count for -k too.)
_UNITS = (
    "test_updates or test_descent or test_costs or test_properties or "
    "((budget or candidates or starts or mean or estimate or holds) and not paper and not halfway)"
)
MODULES: dict[str, list[str]] = {
    "packing": [
        "tests/test_packing.py",
        "tests/test_properties.py",
        "tests/search/test_granularity.py",
        "-k",
        "not test_granularity or all_bits",
    ],
    "costs": ["tests/test_costs.py", "tests/search/test_descent.py", "tests/test_properties.py"],
    "strategy": ["tests/test_strategy.py", "tests/test_costs.py", "tests/test_properties.py"],
    "quantizers/grids": ["tests/quantizers/test_weight.py", "tests/test_properties.py"],
    "quantizers/weight": [
        "tests/quantizers/test_weight.py",
        "tests/quantizers/test_power_of_two.py",
        "tests/test_properties.py",
    ],
    "quantizers/bins": ["tests/quantizers/test_weight.py"],
    "quantizers/activation": ["tests/quantizers/test_activation.py", "tests/quantizers/test_power_of_two.py"],
    "quantizers/stochastic": ["tests/quantizers/test_stochastic.py"],
    "quantizers/power_of_two": ["tests/quantizers/test_power_of_two.py"],
    "export/graph": [
        "tests/export/test_graph.py",
        "tests/export/test_lower.py",
        "-k",
        "resnet8 or test_resnet or not agree_exactly",
    ],
    "search/descent": [
        "tests/search/test_descent.py",
        "tests/test_costs.py",
        "tests/search/test_search.py",
        "tests/test_properties.py",
        "-k",
        _UNITS,
    ],
    "search/updates": ["tests/search/test_updates.py", "tests/search/test_search.py", "-k", _UNITS],
}
# Mutants that compute the same, by module and name: why.
_KERNEL = "which of two kernels that give the same numbers computes on a CPU"
_SAMPLE = "a sample of another size, or of all values in another order"
_SHORTCUT = "a shortcut: signed steps are no better without a negative value"
_TIE = "a tie of sums of floats, which a margin is there for"
_UNIFORM = "in `return torch.rand(count, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)`"
_STEPS = "in `steps.append((saved > over, saved if saved > over else damage / saved, name, width))`"
_CLIPS = "in `factors = torch.cat([torch.logspace(0, math.log10(0.04), 48), torch.linspace(1.02, 0.7, 33)])`"
_LEAST = "in `best, least = torch.where(error < least, scale, best), torch.minimum(error, least)`"
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "quantizers/power_of_two",
        "mantissa < math.sqrt(0.5) -> mantissa <= math.sqrt(0.5) in "
        "`return torch.where(mantissa < math.sqrt(0.5), power * 0.5, power)`",
    ): "the float32 nearest to the root of one half may go either way",
    ("packing", "14 -> 15 in `_PART = 2**14`"): "parts of another size",
    ("packing", "2 -> 3 in `_PART = 2**14`"): "parts of another size",
    (
        "packing",
        "count - start -> count + start in `size = min(_PART, count - start)`",
    ): "a slice ends where its tensor ends",
    (
        "packing",
        "-1 -> +1 in `codes[rows] = (stream[:size].view(-1, width) * places).sum(-1, dtype=torch.uint8)"
        ".view(len(rows), *shape[1:])` (2)",
    ): "the last dimension of two is the second",
    (
        "quantizers/activation",
        "0 -> 1 in `generator = torch.Generator().manual_seed(0)`",
    ): "other samples of the same kind",
    (
        "search/updates",
        "sides.error <= sides.damage / 2 -> sides.error < sides.damage / 2 in "
        "`enough = sides.error <= sides.damage / 2 or sum(sides.draws) >= self.max_draws`",
    ): "a tie of measured numbers",
    (
        "search/updates",
        "1.0 -> 2.0 in `whole = sum(sizes.values()) or 1.0`",
    ): "zero divided by either is zero",
    (
        "search/updates",
        "0.0 -> 1.0 in `return self.total / self.weight if self.count else 0.0`",
    ): "nobody looks at a mean of nothing",
    (
        "search/updates",
        "beta[name] < self.threshold -> beta[name] <= self.threshold in "
        "`ready = [name for name in self.descent.movable if beta[name] < self.threshold]`",
    ): "a tie of real numbers",
    (
        "search/updates",
        "u < end -> u <= end in `return 1.0 if u < end else 0.5 if u < 1 - end else 0.0`",
    ): "a draw right at the border, which has probability 0",
    (
        "search/updates",
        "u < 1 - end -> u <= 1 - end in `return 1.0 if u < end else 0.5 if u < 1 - end else 0.0`",
    ): "a draw right at the border, which has probability 0",
    (
        "quantizers/weight",
        "rows and (not w.is_meta) -> rows or not w.is_meta in `if rows and not w.is_meta:`",
    ): "fitting no channels, or on the meta device, changes nothing",
    ("quantizers/weight", f"33 -> 34 {_CLIPS}"): "clips of the same range, a little finer",
    ("quantizers/weight", f"48 -> 49 {_CLIPS}"): "clips of the same range, a little finer",
    ("quantizers/weight", "0 -> 1 in `places = [0] * len(bits)`"): "every entry is written",
    (
        "quantizers/weight",
        "refined > 0 -> refined >= 0 in `scale = torch.where(refined > 0, refined, scale)`",
    ): "a scale of zero has an error that is no number, and is not taken",
    (
        "quantizers/weight",
        "torch.is_grad_enabled() and self.scale.requires_grad -> torch.is_grad_enabled() or self.scale.requires_grad in "
        "`learns = torch.is_grad_enabled() and self.scale.requires_grad`",
    ): "a factor of a gradient that nothing takes",
    (
        "quantizers/weight",
        "missing > 0 -> missing >= 0 in `moving = (x <= low) | (x >= high) if missing > 0 else x != 0`",
    ): "nothing moves where nothing is missing",
    (
        "quantizers/weight",
        "x < 0 -> x <= 0 in `return torch.where(x < 0, -1.0, 1.0) * (x.abs() + moving * (missing / moving.sum()))`",
    ): "zeros may move to either side of zero",
    ("quantizers/weight", "8 -> 9 in `for k in range(1, -8, -1):`"): "one clip more, far below the others",
    ("quantizers/weight", f"error < least -> error <= least {_LEAST}"): "a tie of errors",
    ("quantizers/weight", f"error < least -> error <= least {_LEAST} (2)"): "a tie of errors",
    (
        "quantizers/weight",
        "units * half -> units / half in `best, least = units * half, torch.full_like(units, math.inf)`",
    ): "the first clip takes its place, whose error is finite",
    (
        "search/descent",
        "1 -> 2 in `return max(above[0] if above else self.candidates[-1], usual[0] if usual else self.candidates[-1])`",
    ): "a budget above the top of the ladder is refused before",
    (
        "search/descent",
        "budget - self.total(bits) <= self.cost.tolerance(budget) -> budget - self.total(bits) < self.cost.tolerance(budget) "
        "in `return budget - self.total(bits) <= self.cost.tolerance(budget)`",
    ): _TIE,
    (
        "search/descent",
        "self.total() <= budget * (1 + 1e-09) -> self.total() < budget * (1 + 1e-09) in "
        "`if budget not in self.found and self.total() <= budget * (1 + 1e-9):`",
    ): _TIE,
    (
        "search/descent",
        "-1 -> +1 in `return max(above[0] if above else self.candidates[-1], usual[0] if usual else self.candidates[-1])`",
    ): "a budget above the top of the ladder is refused before",
    ("search/descent", f"saved > over -> saved >= over {_STEPS}"): _TIE,
    ("search/descent", f"saved > over -> saved >= over {_STEPS} (2)"): _TIE,
    (
        "search/descent",
        "self.total(self.start) < max(self.budgets) - cost.tolerance(max(self.budgets)) -> self.total(self.start) <= "
        "max(self.budgets) - cost.tolerance(max(self.budgets)) in "
        "`if self.total(self.start) < max(self.budgets) - cost.tolerance(max(self.budgets)):`",
    ): _TIE,
    (
        "search/descent",
        "self._change(bits, name, upper) <= slack -> self._change(bits, name, upper) < slack in "
        "`if self._change(bits, name, upper) <= slack:`",
    ): _TIE,
    (
        "search/descent",
        "(over := (self.total(bits) - budget * (1 + 1e-09))) > 0 -> (over := (self.total(bits) - budget * (1 + 1e-09))) >= 0 "
        "in `while (over := self.total(bits) - budget * (1 + 1e-9)) > 0:`",
    ): _TIE,
    (
        "quantizers/bins",
        "1 -> 2 in `variance = (squares / count.clamp_min(1) - mean.square()) * (count >= 2)`",
    ): "differs in bins of fewer than two weights, which the last factor drops",
    (
        "quantizers/stochastic",
        "choice.dim() > 0 -> choice.dim() >= 0 in `ctx.per_channel = choice.dim() > 0`",
    ): "autograd adds up a gradient that has more entries than its input",
    (
        "quantizers/stochastic",
        '1 -> 2 in `generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)`',
    ): "other draws of the same kind",
    ("quantizers/stochastic", f"1 - 1e-12 -> 1 + 1e-12 {_UNIFORM}"): "differs in one of 1e12 draws",
    ("quantizers/stochastic", f"1 -> 2 {_UNIFORM}"): "differs in one of 1e12 draws",
    (
        "quantizers/stochastic",
        "logits > 0 -> logits >= 0 in `return logits > 0, torch.sigmoid(logits / temperature)`",
    ): "a tie, which has probability 0 and no right answer",
    (
        "costs",
        '1 -> 2 in `near = get_close_matches(str(cost), known := [*COSTS, "lut"], n=1)`',
    ): "only the first is shown",
    (
        "costs",
        "1 -> 2 in `return sum(strategy[name].num_weights for name in strategy.searchable) or 1`",
    ): "zero divided by either is zero",
    ("quantizers/activation", "65536 -> 65537 in `_FIT_SAMPLES = 65536`"): _SAMPLE,
    (
        "quantizers/activation",
        "x.numel() > _FIT_SAMPLES -> x.numel() >= _FIT_SAMPLES in `if x.numel() > _FIT_SAMPLES:`",
    ): _SAMPLE,
    (
        "quantizers/activation",
        "64 -> 65 in `steps = top / bound * torch.logspace(0, math.log10(0.05), 64, device=x.device)`",
    ): "clips of the same range, a little finer",
    ("quantizers/activation", "0 -> 1 in `if bits > 1 and (x < 0).any():`"): _SHORTCUT,
    ("quantizers/activation", "x < 0 -> x <= 0 in `if bits > 1 and (x < 0).any():`"): _SHORTCUT,
    (
        "quantizers/activation",
        "x.device.type == 'cpu' and (not torch.compiler.is_compiling()) -> x.device.type == 'cpu' or "
        'not torch.compiler.is_compiling() in `if x.device.type == "cpu" and not torch.compiler.is_compiling():`',
    ): _KERNEL,
    (
        "quantizers/activation",
        "x.device.type == 'cpu' -> x.device.type != 'cpu' in "
        '`if x.device.type == "cpu" and not torch.compiler.is_compiling():`',
    ): _KERNEL,
    (
        "quantizers/activation",
        "not torch.compiler.is_compiling() -> not not torch.compiler.is_compiling() in "
        '`if x.device.type == "cpu" and not torch.compiler.is_compiling():`',
    ): _KERNEL,
    (
        "quantizers/activation",
        "x.device.type == 'cpu' -> x.device.type != 'cpu' in `if x.device.type == \"cpu\":`",
    ): _KERNEL,
    (
        "quantizers/activation",
        "a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last) -> a.is_contiguous() and "
        "a.is_contiguous(memory_format=torch.channels_last) in `if a.stride() != b.stride() or not (a.is_contiguous() or "
        "a.is_contiguous(memory_format=torch.channels_last)):`",
    ): "the slower of two sums of the same products",
    (
        "quantizers/activation",
        "torch.is_grad_enabled() and (x.requires_grad or self.step.requires_grad) -> torch.is_grad_enabled() or "
        "(x.requires_grad or self.step.requires_grad) in "
        "`if torch.is_grad_enabled() and (x.requires_grad or self.step.requires_grad):`",
    ): "where no gradients are kept, both ways give the same numbers",
    (
        "quantizers/activation",
        "self.effective_step.detach() -> self.effective_step.view_as(self.effective_step) in "
        "`step, place, shape, dtype = self.effective_step.detach(), y.data_ptr(), y.shape, y.dtype`",
    ): "nothing in it takes a gradient: codes are integers, and are read in a backward pass",
}

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_NAMES = {"min": "max", "max": "min", "clamp_min": "clamp_max", "any": "all", "all": "any"}
_SKIPPED = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)


def mutants(source: str) -> Iterator[tuple[str, ast.Module]]:
    """(what was changed, changed module) of every change of `source`, one at a time.

    The name holds the line's text, not its number: it stays what it is when other lines change.
    """
    tree, lines, seen = ast.parse(source), source.splitlines(), Counter[str]()
    for place, node in enumerate(_nodes(tree)):
        for kind in _changes(node):
            changed = copy.deepcopy(tree)
            before = ast.unparse(node)
            found = list(_nodes(changed))[place]
            _change(found, kind)
            after = ast.unparse(found)
            name = f"{before} -> {after} in `{lines[getattr(node, 'lineno', 1) - 1].strip()}`"
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} ({seen[name]})", ast.fix_missing_locations(changed)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute: no annotations, messages or docstrings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, _SKIPPED):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            yield child
            yield from _nodes(child)


def _changes(node: ast.AST) -> list[str]:
    operator = getattr(node, "op", None)
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(operator) in _SWAPS:
        return ["op"]
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _SWAPS:
        return ["ops"]
    if isinstance(node, ast.UnaryOp) and isinstance(operator, ast.Not | ast.USub):
        return ["unary"]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return ["constant"]
    if isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return ["name"] if name in _NAMES else ["detach"] if name == "detach" else []
    return []


def _change(node: Any, kind: str) -> None:
    if kind == "op":
        node.op = _SWAPS[type(node.op)]()
    elif kind == "ops":
        node.ops = [_SWAPS[type(node.ops[0])]()]
    elif kind == "constant":
        node.value = node.value + 1
    elif kind == "unary":
        # `not x` -> `not not x`, `-x` -> `+x`.
        node.operand = ast.UnaryOp(ast.Not(), node.operand) if isinstance(node.op, ast.Not) else node.operand
        node.op = ast.Not() if isinstance(node.op, ast.Not) else ast.UAdd()
    elif kind == "name":
        called = node.func
        field = "attr" if isinstance(called, ast.Attribute) else "id"
        setattr(called, field, _NAMES[getattr(called, field)])
    elif kind == "detach":
        # x.detach() -> x.view_as(x), in which the gradient stays.
        node.func.attr, node.args = "view_as", [node.func.value]


def survives(path: Path, tree: ast.Module | None, tests: list[str], seconds: float) -> bool:
    """Whether the tests pass with `tree` in the place of the module at `path` (None: as it is), in a fork."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        _run(path, tree, tests)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run(path: Path, tree: ast.Module | None, tests: list[str]) -> None:
    original = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if tree is not None and Path(self.path).resolve() == path:
            return compile(tree, str(path), "exec")
        return original(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    # Plugins of pytest that the libraries have imported already.
    options = ["-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = 1
    try:
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


def import_libraries() -> None:
    """All that the package and its tests import, once for all forks; the package itself is imported by each of them."""
    code = "import hypothesis.strategies, pytest, sdq_hf.modeling_sdq, sdq_hf.search, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in done.stdout.split():
        if name.partition(".")[0] != "sdq_hf":
            # Some are there under a name that cannot be imported.
            with suppress(ImportError):
                importlib.import_module(name)


def table(modules: dict[str, Any]) -> str:
    """Markdown: a row for each module."""
    lines = ["| module | changes tried | compute the same | unnoticed |", "|---|---|---|---|"]
    for module in (name for name in MODULES if name in modules):
        row = modules[module]
        lines.append(
            f"| {module} | {row['tried']} of {row['mutants']} | {len(row['equivalent'])} | {len(row['survived'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--sample", type=int, help="so many mutants of each module, at random (seed 0); default: all")
    parser.add_argument("--again", type=Path, help="result of an earlier run: only what survived in it")
    parser.add_argument("--seconds", type=float, default=120, help="for the tests of one mutant")
    parser.add_argument("--out", type=Path, help="result; other modules that it has stay in it")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import_libraries()
    earlier = json.loads(options.again.read_text())["modules"] if options.again else {}
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"modules": {}}
    result["versions"] = {name: version(name) for name in ("torch", "pytest", "hypothesis")}
    for module in options.modules:
        path = (ROOT / "sdq_hf" / f"{module}.py").resolve()
        tests = [test for test in MODULES[module] if not test.endswith(".py") or (ROOT / test).exists()]
        if not survives(path, None, tests, 10 * options.seconds):
            raise SystemExit(f"{module}: its tests fail without any change.")
        found = list(mutants(path.read_text()))
        before = earlier.get(module, {"tried": 0, "equivalent": {}, "survived": []})
        chosen = [(name, tree) for name, tree in found if not options.again or name in before["survived"]]
        # In random order, so that a run that is stopped leaves a sample.
        chosen = random.Random(0).sample(chosen, min(options.sample or len(chosen), len(chosen)))
        row: dict[str, Any] = {"command": " ".join(["python", "scripts/mutate.py", *sys.argv[1:]])}
        row |= {"mutants": len(found), "tried": before["tried"], "survived": []}
        row["equivalent"] = dict(before["equivalent"])
        result["modules"][module] = row
        for name, tree in chosen:
            row["tried"] += not options.again
            if survives(path, tree, tests, options.seconds):
                if (module, name) in EQUIVALENT:
                    row["equivalent"][name] = EQUIVALENT[module, name]
                else:
                    row["survived"].append(name)
                    print(f"{module}: {name}", flush=True)
            if options.out:
                # Not by the package's own function: each fork imports the package anew.
                beside = options.out.with_suffix(".tmp")
                beside.write_text(json.dumps(result, indent=2) + "\n")
                beside.replace(options.out)
        print(f"{module}: {row['tried']} of {len(found)} mutants, {len(row['survived'])} survived", flush=True)


if __name__ == "__main__":
    main()
