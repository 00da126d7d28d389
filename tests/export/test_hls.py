"""hls4ml projects against the integers, compiled with g++ and run."""

import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from sdq_hf.export.graph import Clip, Concat, Flatten, IntegerNetwork, Layer, MaxPool, Node, Quantize, SumPool
from sdq_hf.export.lower import ExportError, _sum_range, integer_network

from .test_lower import profile_of

pytest.importorskip("hls4ml")

from sdq_hf.cli import main
from sdq_hf.export.artefacts import export_model
from sdq_hf.export.hls import Emulation, HLSOptions, export_hls, fixed
from sdq_hf.export.verify import made_images, with_one_weight_changed

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="There is no g++.")
# Depthwise convolutions, ReLU6, and an average that sees where ReLU6 ends.
SMALL_MOBILENET = {"blocks": ("dsa_r1_k3_s1_c32", "dsa_r1_k3_s2_c64")}


def assert_computes_the_integers(network: IntegerNetwork, project: Path, images: torch.Tensor) -> None:
    got = Emulation(project, network)(torch.cat([images, made_images(network)]))
    assert np.array_equal(got, network.logits(torch.cat([images, made_images(network)])).numpy())
    changed, _ = with_one_weight_changed(network, images)
    assert (got[: len(images)] != changed.logits(images).numpy()).any(1).sum() * 2 >= len(images)


def assert_was_built_with(said: dict, project: Path, hls: HLSOptions, strategy: str) -> None:
    """By what the C++ and the script for the vendor's tool say."""
    header = (project / "firmware" / "parameters.h").read_text()
    configs = re.findall(r"struct (\w+) : nnet::(?:dense|depthconv2d|conv2d)_config {(.*?)};", header, re.DOTALL)
    taken = [int(n) for _, body in configs for n in re.findall(r"reuse_factor = (\d+);", body)]
    strategies = {kind for _, body in configs for kind in re.findall(r"strategy = nnet::(\w+);", body)}
    assert strategies == {strategy} == {said["strategy"]}
    # Averages are layers of hls4ml too.
    assert set(said["reuse_factors"].values()) <= set(taken)
    assert said["reuse_factor"] == hls.reuse_factor
    script = (project / "project.tcl").read_text()
    assert f'set part "{said["part"]}"' in script
    assert f"set clock_period {said['clock_period']}" in script
    if hls.part is not None:
        assert (said["part"], said["clock_period"]) == (hls.part, hls.clock_period)


@compiled
def test_a_residual_network_is_exported_and_verified(tmp_path: Path):
    model, images = profile_of("resnet8_cifar", 8)
    hls = HLSOptions(reuse_factor=6, part="xc7z020-clg400-1", clock_period=10)
    report = export_model(model, tmp_path / "out", ["hls4ml"], images, hls=hls)
    found = [c for c in report["comparisons"] if c["what"] == "hls4ml"]
    assert [(c["images"], c["count"], c["equal"]) for c in found] == [("real", 8, True), ("made", 6, True)]
    assert found[0]["differ_from_control"] >= 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert_was_built_with(manifest["targets"]["hls4ml"], tmp_path / "out" / "hls4ml", hls, "resource")
    files = manifest["files"]
    assert {"hls4ml/build_lib.sh", "hls4ml/firmware/sdq.cpp"} <= set(files)
    # Sources alone, and nothing about where they were written.
    assert not [name for name in files if name.endswith((".so", ".o"))]
    for name in files:
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text(errors="replace"), name


@compiled
def test_a_depthwise_network_computes_the_integers(tmp_path: Path):
    model, images = profile_of("mobilenetv1_025_cifar", 8, model_args=SMALL_MOBILENET)
    network = integer_network(model)
    clips = [node for node in network.nodes if isinstance(node, Clip)]
    assert any(node.high < network[node.inputs[0]].high for node in clips)
    export_hls(network, tmp_path / "project")
    assert_computes_the_integers(network, tmp_path / "project", images)


def handmade() -> IntegerNetwork:
    """Max pooling, padding and strides that differ by side, groups, 1 x 1, and integers far from the point."""
    generator = torch.Generator().manual_seed(0)

    def layer(name: str, source: Node, shape: tuple[int, ...], weight: torch.Tensor, **geometry) -> Layer:
        bias = torch.randint(-40, 40, weight.shape[:1], generator=generator)
        exponents = torch.randint(2, 5, weight.shape[:1], generator=generator)
        lows, highs = _sum_range(weight, bias, source.low, source.high)
        shifts = exponents - exponents.min()
        return Layer(
            name=name,
            inputs=(source.name,),
            shape=shape,
            exponent=source.exponent + int(exponents.min()),
            low=int((lows << shifts).min()),
            high=int((highs << shifts).max()),
            weight=weight,
            bias=bias,
            exponents=tuple(exponents.tolist()),
            weight_bits=4,
            grid="",
            sum_low=int(lows.min()),
            sum_high=int(highs.max()),
            **geometry,
        )

    def quantize(source: Node | None, name: str, shape: tuple[int, ...], exponent: int, bits: int, signed: bool):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return Quantize(
            name=name,
            inputs=("image" if source is None else source.name,),
            shape=shape,
            exponent=exponent,
            low=low,
            high=high,
            bits=bits,
            signed=signed,
            source_exponent=None if source is None else source.exponent,
        )

    def weights(*shape: int) -> torch.Tensor:
        return torch.randint(-7, 8, shape, generator=generator)

    first = quantize(None, "in", (2, 9, 7), 3, 5, True)
    conv = layer("conv", first, (6, 5, 8), weights(6, 2, 3, 2), padding=(1, 1, 2, 0), stride=(2, 1))
    relu = Clip(
        name="relu",
        inputs=("conv",),
        shape=conv.shape,
        exponent=conv.exponent,
        low=0,
        high=conv.high,
        bounds=(0, None),
    )
    pool = MaxPool(
        name="pool",
        inputs=("relu",),
        shape=(6, 2, 4),
        exponent=relu.exponent,
        low=0,
        high=relu.high,
        kernel=(2, 2),
        stride=(2, 2),
    )
    second = quantize(pool, "second", pool.shape, pool.exponent + 3, 4, False)
    # Every other pixel, in two groups of three channels for two outputs.
    point = layer("point", second, (4, 1, 2), weights(4, 3, 1, 1), stride=(2, 2), groups=2)
    mean = SumPool(
        name="mean",
        inputs=("point",),
        shape=(4, 1, 1),
        exponent=point.exponent - 1,
        low=2 * point.low,
        high=2 * point.high,
        kernel=(1, 2),
        stride=(1, 2),
    )
    flat = Flatten(name="flat", inputs=("mean",), shape=(4,), exponent=mean.exponent, low=mean.low, high=mean.high)
    third = quantize(flat, "third", (4,), flat.exponent + 2, 3, True)
    head = layer("head", third, (5,), weights(5, 4))
    return IntegerNetwork((first, conv, relu, pool, second, point, mean, flat, third, head), "handmade", (2, 9, 7))


@compiled
def test_what_no_small_network_has_computes_the_integers_too(tmp_path: Path):
    network = handmade()
    images = torch.randn(16, 2, 9, 7, generator=torch.Generator().manual_seed(1)) * 100
    values = network.run(images, keep=True)
    for node in network.nodes:
        assert values[node.name].shape[1:] == node.shape, node.name
    export_hls(network, tmp_path / "project", HLSOptions(reuse_factor=2))
    assert_computes_the_integers(network, tmp_path / "project", images)


def test_each_layer_takes_the_nearest_reuse_factor_that_divides_it(tmp_path: Path):
    network = handmade()
    for strategy in ("resource", "latency", None):
        hls = HLSOptions(reuse_factor=5, strategy=strategy)
        said = export_hls(network, tmp_path / "project", hls)
        assert_was_built_with(said, tmp_path / "project", hls, strategy or "resource")
        for name, layer in network.layers.items():
            # Of one pixel; groups are zeros among more weights.
            products = layer.weight.numel() * layer.groups
            assert said["reuse_factors"][name] == 5 or products % said["reuse_factors"][name] == 0, name
    assert all(n > 1 for n in said["reuse_factors"].values())
    said = export_hls(network, tmp_path / "project")
    assert_was_built_with(said, tmp_path / "project", HLSOptions(), "latency")
    assert set(said["reuse_factors"].values()) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse_factor": 0}, "reuse_factor must be a whole number of at least 1, got 0; the nearest is 1"),
        ({"reuse_factor": 2.0}, r"got 2\.0"),
        ({"strategy": "resorce"}, "strategy must be one of latency, resource, got 'resorce'. Did you mean 'resource'"),
        ({"part": 'x"; exec rm'}, "part must be the name of a device"),
        ({"clock_period": 0.0}, "clock_period must be a number of nanoseconds above 0, got 0.0"),
        ({"clock_period": float("nan")}, "got nan"),
    ],
)
def test_options_that_hls4ml_cannot_have_are_refused_by_name(options: dict, message: str):
    with pytest.raises(ExportError, match=message):
        HLSOptions(**options)


def test_the_command_takes_them_and_says_which_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture):
    model, _ = profile_of("mobilenetv1_025_cifar", 8, model_args=SMALL_MOBILENET)
    model.config.id2label = {i: str(i) for i in range(5)}
    model.save_pretrained(tmp_path / "model", print_size=False)
    command = [
        "export",
        str(tmp_path / "model"),
        "--output",
        str(tmp_path / "out"),
        "--images",
        "2",
        "--no-verify",
        "--to",
    ]
    assert main([*command, "hls4ml", "--reuse-factor", "0"]) == 2
    assert "reuse_factor must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert main([*command, "onnx", "--reuse-factor", "4"]) == 2
    assert "are for the target hls4ml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "hls4ml", "--reuse-factor", "4", "--strategy", "latency", "--clock-period", "2.5"]) == 0
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())["targets"]["hls4ml"]
    assert (said["reuse_factor"], said["strategy"], said["clock_period"]) == (4, "latency", 2.5)
    assert_was_built_with(said, tmp_path / "out" / "hls4ml", HLSOptions(4), "latency")


@pytest.mark.parametrize("exponent", [-20, -3, 0, 4])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 1), (0, 255), (0, 256), (-1, 0), (-1, 1), (-128, 127), (-129, 5), (-2, 128), (3, 9)]
)
@pytest.mark.parametrize("signed", [None, True])
def test_types_hold_what_they_are_for_and_no_bit_more(low: int, high: int, exponent: int, signed: bool | None):
    text = fixed(low, high, exponent, signed)
    width, whole = map(int, re.fullmatch(r"u?fixed<(\d+),(-?\d+)>", text).groups())
    assert text.startswith("u") == (low >= 0 and not signed)

    def ends(bits: int) -> tuple[int, int]:
        return (0, 2**bits - 1) if text.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    # ap_fixed<W, I> is an integer of W bits in units of 2^(I - W).
    assert Fraction(2) ** (whole - width) == Fraction(2) ** exponent
    least, most = ends(width)
    assert least <= low <= high <= most
    if width > 1:
        least, most = ends(width - 1)
        assert not least <= low <= high <= most


def test_only_roundings_round_and_they_do_it_half_to_even(tmp_path: Path):
    network = handmade()
    export_hls(network, tmp_path / "project")
    text = (tmp_path / "project" / "firmware" / "defines.h").read_text()
    found = {kind for kind in re.findall(r"ap_u?fixed<[^>]*>", text) if "RND" in kind or "SAT" in kind}
    assert found == {
        f"ap_{'' if node.signed else 'u'}fixed<{node.bits},{node.bits + node.exponent},AP_RND_CONV,AP_SAT,0>"
        for node in network.nodes
        if isinstance(node, Quantize)
    }


def changed(name: str, **fields) -> IntegerNetwork:
    network = handmade()
    return replace(
        network, nodes=tuple(replace(node, **fields) if node.name == name else node for node in network.nodes)
    )


def with_concat() -> IntegerNetwork:
    network = handmade()
    relu = network["relu"]
    concat = Concat(
        name="both",
        inputs=("relu", "conv"),
        shape=(12, 5, 8),
        exponent=relu.exponent,
        low=network["conv"].low,
        high=relu.high,
        shifts=(0, 0),
    )
    return replace(network, nodes=(*network.nodes[:3], concat))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (changed("conv", dilation=(2, 2)), r"'conv' is dilated by \(2, 2\)"),
        (changed("pool", stride=(1, 1)), r"'pool' pools windows of \(2, 2\) at a stride of \(1, 1\)"),
        (changed("pool", padding=(0, 1, 0, 1)), r"'pool' pools windows .* with padding \(0, 1, 0, 1\)"),
        (changed("relu", bounds=(0, 5), high=5), "'relu' ends at .*; ReLU and ReLU6 are exported"),
        (changed("second", high=14), r"'second' saturates at 0 and 14; hls4ml's types do at \(0, 15\)"),
        (changed("flat", inputs=("point",)), r"'flat' flattens \(4, 1, 2\)"),
        (changed("mean", stride=(2, 2)), "'mean' skips rows with windows of one row"),
        (changed("head", high=2**60), "'head' takes 62 bits"),
        (with_concat(), "'both' concatenates channels"),
    ],
)
def test_what_hls4ml_has_no_exact_form_of_is_refused_by_name(tmp_path: Path, network: IntegerNetwork, message: str):
    with pytest.raises(ExportError, match=message):
        export_hls(network, tmp_path / "project")
    assert not list(tmp_path.iterdir())


def test_a_project_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path: Path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.txt").write_text("keep me")
    with pytest.raises(ExportError, match="project holds something else than an earlier hls4ml project"):
        export_hls(handmade(), tmp_path / "project")
    assert (tmp_path / "project" / "mine.txt").read_text() == "keep me"
    for reuse_factor in (1, 2):
        export_hls(handmade(), tmp_path / "other", HLSOptions(reuse_factor))
    assert {path.name for path in tmp_path.iterdir()} == {"project", "other"}


def test_a_type_that_is_not_the_one_asked_for_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hls4ml.model.graph import ModelGraph

    original = ModelGraph.from_layer_list

    def narrower(*args):
        graph = original(*args)
        graph.graph["n1_conv"].get_attr("accum_t").precision.width -= 1
        return graph

    monkeypatch.setattr(ModelGraph, "from_layer_list", narrower)
    with pytest.raises(ExportError, match="'n1_conv' a accum of type"):
        export_hls(handmade(), tmp_path / "project")


@compiled
def test_an_emulation_has_room_for_large_layers(tmp_path: Path):
    """hls4ml's C++ has all products of a layer on the stack: here a function with 200 MB there."""
    (tmp_path / "firmware").mkdir()
    (tmp_path / "large.cpp").write_text(
        """extern "C" void sdq_double(double *image, double *logits) {
            volatile char room[200 << 20];
            for (int i = 0; i < 200 << 20; i += 1024) room[i] = 1;
            for (int i = 0; i < 5; i++) logits[i] = room[0] * image[i];
        }"""
    )
    (tmp_path / "build_lib.sh").write_text("g++ -shared -fPIC large.cpp -o firmware/large.so")
    images = torch.randn(2, 2, 9, 7)
    emulation = Emulation(tmp_path, handmade())
    got = emulation(images)
    # The pixels come row by row, the channels of each together.
    assert np.array_equal(got, images.double().permute(0, 2, 3, 1).flatten(1)[:, :5].numpy())
    with pytest.raises(ValueError, match=r"takes images \[B, 2, 9, 7\], got \[2, 2, 9, 6\]"):
        emulation(images[..., :6])


@compiled
def test_what_g_plus_plus_says_is_passed_on(tmp_path: Path):
    network = handmade()
    export_hls(network, tmp_path / "project")
    (tmp_path / "project" / "firmware" / "sdq.cpp").write_text("nonsense;")
    with pytest.raises(ExportError, match=r"g\+\+ cannot compile the hls4ml project: .*nonsense"):
        Emulation(tmp_path / "project", network)
