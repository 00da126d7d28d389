"""A small, seeded part of `scripts/fuzz_checkpoints.py`."""

import pytest

from tests.load import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("fuzz_checkpoints")


def test_mutated_models_load_or_end_in_one_clear_error(script, tmp_path):
    fuzz = script.Fuzz(tmp_path)
    fuzz.run(400, number=1)
    kinds = {"bytes", "truncate", "header", "config field", "config layer", "config bytes"}
    assert {kind.split(":")[0] for kind in fuzz.outcomes} == kinds
    assert sum(fuzz.outcomes.values()) >= 400
    assert sum(count for kind, count in fuzz.outcomes.items() if kind.endswith("refused")) > 300


def test_the_watch_sees_what_must_not_happen(script, tmp_path):
    fuzz = script.Fuzz(tmp_path)
    fuzz.watch.on = True
    try:
        (tmp_path / "left").write_text("x")
        exec("1")
    finally:
        fuzz.watch.on = False
    assert len(fuzz.watch.seen) >= 1
    with pytest.raises(AssertionError, match="left"):
        fuzz.load("whole", fuzz.weights, fuzz.config)
