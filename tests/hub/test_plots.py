"""The pictures: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdq_hf import SDQForImageClassification
from sdq_hf.hub import plots


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=4, img_size=16)
    model.set_strategy(3)
    return model


def test_bars_are_the_bits_and_the_weights_of_the_layers(model):
    strategies = {"sdq-2": model.strategy.with_bits({"layer1.0.conv1": 5}), "greedy-2": model.strategy}
    figure = plots.figure_bits(strategies)
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert heights[:2] == [list(s.weight_bits.values()) for s in strategies.values()]
    assert heights[2] == [layer.num_weights for layer in model.strategy.values()]
    colours = {bar.get_facecolor() for axis in figure.axes[:2] for bar in axis.patches}
    assert len(colours) == 3  # a method each, and grey for pinned layers


def test_the_heat_map_replays_the_moves():
    start = {"a": 6, "b": 6, "c": 3}
    moves = [("b", 2, 5, 9.0, 4.5), ("c", 4, 2, 7.0, 4.0), ("b", 4, 4, 5.0, 3.5)]
    log = {
        "cost": "bits",
        "start": start,
        "start_cost": 10.0,
        "budgets": [5.5],
        "start_average_bits": 5.0,
        "moves": [dict(zip(("layer", "batch", "to", "cost", "average_bits"), move, strict=True)) for move in moves],
    }
    cost, layers = plots.figure_descent({"bits": log}).axes[:2]
    (image,) = layers.get_images()
    assert image.get_array().tolist() == [[6] * 5, [6, 6, 5, 5, 4], [3, 3, 3, 3, 2]]
    line, budget = cost.get_lines()
    assert line.get_xydata().tolist() == [[0, 10], [2, 9], [4, 7], [4, 5]]
    assert list(budget.get_ydata()) == [5.5, 5.5]
    # A search under BitOPs shows the average bits as well.
    axes = plots.figure_descent({"bitops": {**log, "cost": "bitops"}}).axes
    (average,) = next(axis for axis in axes if axis.get_ylabel() == "average bits").get_lines()
    assert average.get_ydata().tolist() == [5.0, 4.5, 4.0, 3.5]


def row(name, method, cost="bits", **values):
    return {"name": name, "method": method, "cost": cost, "top1": 80.0, "kl": 0.1, **values}


def test_points_stand_at_size_bitops_accuracy_and_kl():
    rows = [
        row("full precision", "float", top1=88.0, file_bytes=9e5, bitops=9e9),
        row("sdq-bits-2", "sdq", top1=83.0, kl=0.05, file_bytes=1.2e5, bitops=4e7),
        row("uniform-2", "uniform", top1=81.0, kl=0.2, file_bytes=1.3e5, bitops=2e7),
    ]
    figure = plots.figure_accuracy(rows)
    places = [[line.get_xydata().tolist() for line in axis.get_lines()] for axis in figure.axes]
    assert places[0][:2] == [[[120, 83]], [[130, 81]]]
    assert places[1][:2] == [[[40, 83]], [[20, 81]]]
    assert places[3] == [[[40, 0.05]], [[20, 0.2]]]
    assert figure.axes[3].get_xlabel() == "MBitOPs"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["sdq-bits-2", "uniform-2", "full precision"]
    # A further budget is joined to the first; the first method lies on top.
    rows.append(row("sdq-bits-3", "sdq", top1=85.0, kl=0.02, file_bytes=1.1e5, bitops=9e7))
    figure = plots.figure_accuracy(rows)
    sdq, uniform, _ = figure.axes[0].get_lines()
    assert sdq.get_xydata().tolist() == [[110, 85], [120, 83]]
    assert sdq.get_zorder() > uniform.get_zorder()
    assert figure.legends[0].get_texts()[0].get_text() == "sdq-bits-2, -3"


def test_histograms_hold_all_weights_and_the_lines_are_levels_that_occur(model, tmp_path):
    model.set_strategy(2)
    model.calibrate([torch.randn(4, 3, 16, 16)])
    model.save_pretrained(tmp_path, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path)
    for one in (model, loaded):
        for axis in plots.figure_weights(one, count=2).axes:
            name = axis.get_title(loc="left").split(":")[0]
            heights = [bar.get_height() for bar in axis.patches] if one is loaded else axis.patches[0].get_data().values
            assert sum(heights) == model.strategy[name].num_weights
            (lines,) = axis.collections
            assert [line[0][0] for line in lines.get_segments()] == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    # A loaded model's bars are the counts of its codes.
    layer = loaded.quantized_layers()[name]
    counts = torch.bincount(layer.weight_quantizer.codes(layer.weight).flatten().int(), minlength=4)
    assert [bar.get_height() for bar in axis.patches] == counts.tolist()


def test_pictures_are_written_whole(model, tmp_path):
    plots.plot_bits({"sdq": model.strategy}, tmp_path / "bits.png")
    plots.plot_weights(model, tmp_path / "weights.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bits.png", "weights.png"]
    with Image.open(tmp_path / "bits.png") as picture:
        assert np.asarray(picture).std() > 10
    for empty in (
        lambda: plots.figure_bits({}),
        lambda: plots.figure_accuracy([]),
        lambda: plots.figure_descent({}),
    ):
        with pytest.raises(ValueError, match="to plot"):
            empty()
