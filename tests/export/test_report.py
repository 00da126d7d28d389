"""The cost report: its numbers are those of the strategy and of the table, and it says what they are."""

import json
from pathlib import Path

import pytest

from sdq_hf import LayerBits, Strategy
from sdq_hf.cli import main
from sdq_hf.costs import LUT_TABLE
from sdq_hf.export.report import cost_report, report_text

STRATEGY = Strategy.of(
    {
        "stem": LayerBits(8, 8, 99, 700, pinned=True),
        "wide": LayerBits(3, 4, 1001, 500),
        "mixed": LayerBits((1, 2, 2, 4), 4, 400, 1200),
        "first": LayerBits(4, 32, 400, 1200),
    }
)


def test_each_layer_has_what_the_strategy_and_the_table_say():
    per_mac = json.loads(LUT_TABLE.read_text())["per_mac"]
    report = cost_report(STRATEGY)
    stem, wide, mixed, first = report["layers"]
    assert (stem["layer"], stem["weight_bytes"], stem["macs"], stem["bitops"]) == ("stem", 99, 700, 700 * 64)
    assert wide["weight_bytes"] == (1001 * 3 + 7) // 8
    assert wide["lut_cycles"] == pytest.approx(500 * per_mac["4"]["3"])
    # Each channel has a fourth of the work.
    assert mixed["lut_cycles"] == pytest.approx(300 * sum(per_mac["4"][bits] for bits in "1224"))
    assert first["lut_cycles"] is None
    total = report["total"]
    assert total["weight_bytes"] == STRATEGY.weight_bytes()
    assert total["bitops"] == STRATEGY.bitops()
    assert total["lut_cycles"] == pytest.approx(sum(x["lut_cycles"] for x in (stem, wide, mixed)))
    assert report["layers_lacking"] == {"weight_bytes": 0, "macs": 0, "bitops": 0, "lut_cycles": 1}
    assert json.loads(json.dumps(report)) == report


def test_the_text_says_what_each_number_is_and_which_layers_lack_one():
    memory = {"tool": "zigzag 0", "accelerator": "abacus", "layers": {"stem": {"cycles": 1234.0, "memory_energy": 5e6}}}
    text = report_text(cost_report(STRATEGY, {"wide": 17}, memory))
    lines = {line.split()[0]: line.split() for line in text.split("\n") if line}
    assert lines["wide"][1:6] == ["3", "4", "376", "500", "6,000"]
    assert lines["wide"][-3:] == ["17", "-", "-"]
    assert lines["stem"][-3:] == ["-", "1,234", "5,000"]
    assert lines["total"][-2:] == ["1,234", "5,000"]
    assert lines["mixed"][1] == "~2.25"
    assert lines["first"][1:3] == ["4", "float"]
    assert lines["first"][6] == "-"
    assert "LUT cycles: synthesis estimate" in text
    assert "acc. bits: bound" in text
    assert json.loads(LUT_TABLE.read_text())["about"]["tool"] in text
    assert "cycles: model" in text
    assert "ZigZag: zigzag 0, accelerator abacus" in text
    assert "The total of LUT cycles is without 1 of 4 layers (-)." in text
    assert "The total of cycles is without 3 of 4 layers (-)." in text
    plain = report_text(cost_report(STRATEGY))
    assert "acc. bits" not in plain
    assert "model" not in plain


def test_numbers_of_no_layer_are_refused():
    with pytest.raises(ValueError, match=r"accumulator_bits: No layer 'wyde'.*wide"):
        cost_report(STRATEGY, {"wyde": 17})
    with pytest.raises(ValueError, match=r"cycles: No layer 'wyde'.*wide"):
        cost_report(STRATEGY, memory={"layers": {"wyde": {"cycles": 1, "memory_energy": 1}}})


def test_the_command_prints_the_report_of_a_published_model(tmp_path, capsys):
    model = Path(__file__).parents[2] / "model_cards" / "mobilenetv1_025_cifar-sdq" / "w2"
    assert main(["report", str(model), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert capsys.readouterr().out == report_text(report) + "\n"
    strategy = Strategy.from_json(json.loads((model / "config.json").read_text())["strategy"])
    assert report == cost_report(strategy)
    assert report != cost_report(strategy.with_bits({"blocks.0.0.conv_pw": 1}))


def test_luts_grow_with_the_bits_of_weights_and_of_inputs():
    """Synthesis is a heuristic: between neighbouring bits of inputs it may be off by some percent, not more."""
    table = json.loads(LUT_TABLE.read_text())["per_mac"]
    luts = {(w, int(a)): value for a, row in table.items() for w, value in ((int(w), v) for w, v in row.items())}
    assert {(w, a) for w in range(1, 9) for a in (2, 4, 8)} <= set(luts)
    for (w, a), value in luts.items():
        assert value < luts.get((w + 1, a), float("inf"))
        assert value < 1.05 * luts.get((w, a + 1), float("inf"))
        assert a not in (2, 4) or value < luts[w, 2 * a]
