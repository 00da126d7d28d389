"""The sweep over timm's networks: children that die or hang are rows, and tables say what does not work."""

import sys
from pathlib import Path

import pytest

from sdq_hf import SDQForImageClassification
from sdq_hf.export.lower import integer_network

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import study_pretrained
import sweep_timm


def test_a_child_that_dies_or_hangs_is_a_row_and_the_next_network_goes_on():
    # The first job is none: the child ends with an error that it does not catch.
    jobs = [["nonsense"], ["attach", "test_vit"]]
    found = list(sweep_timm.results([list(job) for job in jobs], timeout=200))
    assert [job for job, _ in found] == jobs
    died, row = (row for _, row in found)
    assert died["error"].startswith("the process ended with code 1")
    assert "not enough values to unpack" in died["error"]
    # 26 layers: patch embedding, four in each of six blocks, head.
    assert row["layers"] == 26
    assert row["quantized"] < row["params"] == 371240
    ((_, slow),) = sweep_timm.results([["attach", "test_vit"]], timeout=0.05)
    assert slow == {"error": "took longer than 0.05 s"}


def test_a_network_goes_the_whole_way():
    assert sweep_timm.run("test_resnet", "dorefa", {}) == {"size": 32, "form": "dorefa", "layers": 16}


def test_a_network_has_integers_that_are_the_models_numbers():
    model = SDQForImageClassification.from_timm("test_resnet", num_labels=10, img_size=32)
    macs = sum(layer.macs for layer in model.strategy.values())
    assert sweep_timm.integers("test_resnet") == {"size": 32, "macs": macs, "proven": True}


def test_a_network_whose_integers_are_other_numbers_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def with_another_weight(model: SDQForImageClassification):
        network = integer_network(model)
        weight = network.layers["layer1.0.conv1"].weight
        weight.view(-1)[weight.abs().argmax()] *= -1
        return network

    monkeypatch.setattr(sweep_timm, "integer_network", with_another_weight)
    with pytest.raises(ValueError, match="integers and the model in float64 give other logits"):
        sweep_timm.integers("test_resnet")


def test_a_network_without_integers_has_the_message_of_the_library():
    row = sweep_timm.integers("test_convnext")
    assert (row["size"], row.get("macs")) == (32, None)
    assert row["refused"].startswith("'stem.1' is a LayerNorm2d, which has no integer form here.")


def test_where_the_size_of_images_is_refused_another_one_is_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep_timm, "SIZES", (48,))
    # Averages of 2 x 2 pixels, of 3 x 3 at this size.
    monkeypatch.setattr(sweep_timm, "_MOST_MACS", 0)
    row = sweep_timm.integers("resnet10t")
    assert (row["size"], row["proven"]) == (64, False)
    monkeypatch.setattr(sweep_timm, "_OTHER_SIZES", ())
    refused = sweep_timm.integers("resnet10t")["refused"]
    assert "reach over the end of 3 x 3 pixels" in refused
    assert sweep_timm.reason(refused) == "windows that reach over the end"


def test_patterns_fit_all_of_the_names_and_none_of_the_others():
    names = ["a1_s", "a1_m", "a1_l", "a2", "b1", "b10", "c_x", "c_y", "c_z"]
    found = sweep_timm.patterns(names, ["a2b", "b", "c"])
    assert found == ["`a1*` (3)", "`a2`", "`b1`", "`b10`", "`c_*` (3)"]
    assert sweep_timm.patterns(["a1", "a10", "a11"], ["b1"]) == ["`a*` (3)"]
    # Where one is like the beginning of all others it is named.
    assert sweep_timm.patterns(["a1"], ["a1s"]) == ["`a1`"]


def test_the_table_of_integers_names_what_goes_and_what_stops_the_others():
    goes = {"size": 32, "macs": 5, "proven": True}
    silu = {"size": 32, "refused": "'bn1' is a SiLU, which has no integer form here. Networks of"}
    mean = "'mean' is the operation 'mean' in 'layer1.0.se' (SEModule), which has no integer form here."
    rows = {
        "a_1": goes,
        "a_2": {**goes, "proven": False},
        "a_3": goes,
        "b_1": goes,
        "b_2": silu,
        "b_3": {"size": 32, "refused": mean},
        "b_4": silu,
        "c_1": silu,
        "c_2": {"error": "took longer than 300 s"},
        "c_3": silu,
    }
    rows = {name: {"family": name[0], **row} for name, row in rows.items()}
    known = {name: {"family": name[0]} for name in [*rows, "b_5", "a5"]}
    lines = sweep_timm.integers_table({"attach": known, "integers": rows}).splitlines()
    assert lines[2:] == [
        "| a | 3 of 3 | 4 | `a_*` (3) |  |",
        "| b | 1 of 4 | 5 | `b_1` | SiLU (2), squeeze-and-excitation (1) |",
        "| all | 4 of 10 | 12 | 3 compared with the model, all equal | |",
        "",
        "- SiLU: c (3)",
    ]


def test_the_table_of_networks_names_what_does_not_work():
    attach = {
        "a1": {"family": "a", "params": 2_000_000, "quantized": 1_900_000, "layers": 3},
        "a2": {
            "family": "a",
            "params": 1_000_000,
            "quantized": 500_000,
            "layers": 2,
            "pins": {"x": 32},
            "refused": "why",
        },
        "b1": {"family": "b", "error": "took longer than 5 s"},
        "c1": {"family": "c", "params": 100_000, "quantized": 100_000, "layers": 1},
        "d1": {"family": "d", "params": 900_000_000, "quantized": 900_000_000, "layers": 9},
    }
    # Of the two members of a, the one with pins is the smaller.
    assert sweep_timm.smallest(attach, list(attach)) == ["c1", "a2", "d1"]
    ran = {
        "a2": {"family": "a", "size": 64, "form": "lsq", "layers": 2},
        "c1": {"family": "c", "error": "logits differ"},
        "d1": {"family": "d", "error": "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to"},
    }
    lines = sweep_timm.table({"attach": attach, "run": ran}).splitlines()
    assert lines[2:6] == [
        "| a | 2 | 1 | 50.0 to 95.0 | a2 | 1.0 | 64 | lsq | yes |",
        "| b | 1 | 0 |  | | | | | not tried |",
        "| c | 1 | all | 100.0 to 100.0 | c1 | 0.1 |  | | no |",
        "| d | 1 | all | 100.0 to 100.0 | d1 | 900.0 |  | | too large here |",
    ]
    assert lines[7:] == [
        "- `a2`: why",
        "- `b1`: took longer than 5 s",
        "- `c1`, the whole way: logits differ",
        f"- `d1`, the whole way: {ran['d1']['error']}",
    ]


def test_the_table_of_pretrained_weights_counts_the_drop_from_step_to_step():
    def cell(weights, activations, same, scale="layer"):
        fixed = {"bytes": 5_000_000, "centre": 9, "photographs": 10, "views": 50, "kl": 0.25}
        return {"scale": scale, "weights": weights, "activations": activations, "same": same, **fixed}

    cells = [cell(8, 8, 49), cell(8, 32, 50), cell(4, 4, 30), cell(4, 32, 40), cell(8, 8, 45, "channel")]
    table = study_pretrained.table(cells)
    rows = [[field.strip() for field in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [(row[0], row[1], row[2], row[5], row[6]) for row in rows] == [
        ("layer", "8", "8", "49 of 50 (98.0%)", "2.0"),
        ("layer", "4", "4", "30 of 50 (60.0%)", "38.0"),
        ("layer", "8", "float", "50 of 50 (100.0%)", "0.0"),
        ("layer", "4", "float", "40 of 50 (80.0%)", "20.0"),
        ("channel", "8", "8", "45 of 50 (90.0%)", "10.0"),
    ]
