"""Each command of README.md and docs is one that its script, or `sdq-hf`, takes."""

import argparse
import re
import runpy
import shlex
from pathlib import Path

import pytest

from sdq_hf.cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
START = re.compile(
    r"(?:^|; do |&& )(?:\w+=\S+ )*(sdq-hf|(?:python|accelerate launch) (?:--\S+ \d+ )*scripts/\w+\.py)(?= |$)"
)


class Parsed(Exception):
    """Ends a script where its options have been read."""


def commands(text):
    """The commands in the indented blocks of a page: (program, arguments), with shell variables filled in."""
    code = [line[4:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    variables = dict(re.match(r"(\w+)=(\S+)$", line).groups() for line in code if re.match(r"\w+=\S+$", line))
    for line in code:
        if "..." in line or "[--" in line or not START.search(line):  # a synopsis, or no command
            continue
        for loop, values in re.findall(r"for (\w+) in (\S+)", line):
            variables[loop] = values
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        found = START.search(line)
        words = shlex.split(re.split(r"; | && | > ", line[found.end() :])[0], comments=True)
        yield found[1].split()[-1], words


def read(program, words, monkeypatch):
    """What the program's own parser makes of the arguments; a SystemExit is its error."""
    if program == "sdq-hf":
        return _parser().parse_args(words)
    known = argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **options):
        _, unknown = known(self, *arguments, **options)
        raise SystemExit(f"unknown: {unknown}") if unknown else Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr("sys.argv", [program, *words])
        patch.syspath_prepend(str(ROOT / "scripts"))
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / program), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documented_commands_are_read(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(page.read_text()))
    if page.stem in ("README", "results", "fpga", "benchmarks"):
        assert len(found) >= 5
    for program, words in found:
        try:
            read(program, words, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{program} {shlex.join(words)}: {error}")


def test_what_counts_as_a_command():
    text = "    python scripts/a.py --b \\\n        --c 1    # why\n\n"
    text += "    for s in 0 1; do X=1 sdq-hf info r/$s; done\n    pip install b\n"
    assert list(commands(text)) == [("scripts/a.py", ["--b", "--c", "1"]), ("sdq-hf", ["info", "r/0"])]


@pytest.mark.parametrize(
    ("program", "words"),
    [("scripts/study_search.py", ["--out", "a", "--metods", "hawq"]), ("scripts/run_sdq.py", ["--targetbits", "2"])],
)
def test_a_wrong_command_is_found(program, words, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        read(program, words, monkeypatch)


def test_no_command_of_a_page_is_wrapped_as_text():
    for page in PAGES:
        assert not re.search(r"\\ {2,}\S", page.read_text()), f"{page.name}: a backslash inside a line"
