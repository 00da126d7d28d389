"""mutate.py makes every change it announces, one at a time, and tells a test that notices from one that does not."""

from pathlib import Path

import pytest

from tests.load import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "mutate.py"
mutate = load_script("mutate")


def results(source, *arguments):
    found = {}
    for name, tree in mutate.mutants(source):
        scope = {}
        exec(compile(tree, "mutant", "exec"), scope)
        found[name.split(" in `")[0]] = scope["f"](*arguments)
    return found


def test_each_mutant_has_one_change():
    source = 'def f(a: int = 0, b=5):\n    """1 + 1."""\n    assert a > 0, "2 + 2"\n    return a + b * max(a, 2)\n'
    assert results(source, 3, 4) == {
        "0 -> 1": 15,
        "5 -> 6": 15,
        "a + b * max(a, 2) -> a - b * max(a, 2)": -9,
        "b * max(a, 2) -> b / max(a, 2)": 3 + 4 / 3,
        "max(a, 2) -> min(a, 2)": 11,
        "2 -> 3": 15,
    }
    source = "def f(a, b):\n    return not a < b and -a\n"
    assert results(source, 3, 3) == {
        "not a < b and -a -> not a < b or -a": True,
        "not a < b -> not not a < b": False,
        "a < b -> a <= b": False,
        "-a -> +a": 3,
    }


def test_names_stay_when_other_lines_change_and_differ_within_a_line():
    source = "def f(a):\n    return a + 1, a + 1\n"
    names = [name for name, _ in mutate.mutants(source)]
    line = "`return a + 1, a + 1`"
    changes = ["a + 1 -> a - 1", "1 -> 2"]
    assert names == [f"{change} in {line}{again}" for again in ("", " (2)") for change in changes]
    assert [name for name, _ in mutate.mutants("b = None\n\n" + source)] == names


def test_the_table_counts_what_was_tried_and_what_was_left():
    row = {"mutants": 9, "tried": 4, "equivalent": {"a": "why"}, "survived": ["b", "c"]}
    assert mutate.table({"search/descent": row, "packing": {**row, "survived": []}}).splitlines()[2:] == [
        "| packing | 4 of 9 | 1 | 0 |",
        "| search/descent | 4 of 9 | 1 | 2 |",
    ]


@pytest.mark.parametrize("module", mutate.MODULES)
def test_modules_and_their_tests_are_there(module):
    root = SCRIPT.parents[1]
    assert (root / "sdq_hf" / f"{module}.py").is_file()
    assert all((root / test).is_file() for test in mutate.MODULES[module] if test.endswith(".py"))
