"""Folders of exports: what is in them, and that nothing is left of one that fails."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdq_hf import SDQForImageClassification
from sdq_hf.backbones import create_backbone
from sdq_hf.cli import EXPORT_TARGETS, main
from sdq_hf.export import artefacts
from sdq_hf.export.artefacts import VerificationError, Written, export_model
from sdq_hf.export.graph import Layer
from sdq_hf.export.lower import ExportError, integer_network
from sdq_hf.export.verify import made_images
from sdq_hf.image_processing_sdq import SDQImageProcessor
from sdq_hf.search import search

from ..test_hardware_profile import model_of, trained_looks
from .test_lower import profile_of


def test_a_folder_describes_its_integers(tmp_path: Path):
    model, images = profile_of()
    report = export_model(model, tmp_path / "out", [], images)
    assert json.loads((tmp_path / "out" / "verification.json").read_text()) == report
    assert [(c["what"], c["images"], c["equal"]) for c in report["comparisons"]] == [
        ("model in float64", "real", True),
        ("model in float64", "made", True),
        ("model in float32", "real", True),
        ("model in float32", "made", True),
    ]
    assert report["images_sha256"]["real"] == hashlib.sha256(images.numpy().tobytes()).hexdigest()
    described = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name, digest in described["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    tensors = load_file(tmp_path / "out" / "integers.safetensors")
    network = integer_network(model)
    nodes = {node["name"]: node for node in described["nodes"]}
    assert list(nodes) == [node.name for node in network.nodes]
    for name, layer in network.layers.items():
        weight = tensors[f"{name}.weight"]
        assert torch.equal(weight.long(), layer.weight)
        assert hashlib.sha256(weight.numpy().astype(np.int32).tobytes()).hexdigest() == nodes[name]["weight_sha256"]
        assert torch.equal(tensors[f"{name}.bias"].long(), layer.bias)
        # The quantized weights of the model, from what the file holds alone.
        units = 2.0 ** tensors[f"{name}.exponents"].double().view(-1, *[1] * (weight.dim() - 1))
        with torch.no_grad():
            assert torch.equal(weight.double() * units, model.quantized_layers()[name].quantized_weight().double())


def test_a_folder_says_what_becomes_of_pixels(tmp_path: Path):
    model, images = profile_of()
    export_model(model, tmp_path / "out", [], images)
    given = json.loads((tmp_path / "out" / "manifest.json").read_text())["input"]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    taken = SDQImageProcessor(model.config.pretrained_cfg)(Image.fromarray(pixels))["pixel_values"][0]
    expected = (pixels / 255 - given["mean"]) / given["std"]
    np.testing.assert_allclose(taken.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def computed_from(folder: Path, images: np.ndarray) -> np.ndarray:
    """Logits (float64 [B, num_labels]) by numpy from what manifest.json and integers.safetensors say, and nothing else."""
    described = json.loads((folder / "manifest.json").read_text())
    tensors = {
        name: tensor.numpy().astype(np.int64) for name, tensor in load_file(folder / "integers.safetensors").items()
    }
    nodes, values = {node["name"]: node for node in described["nodes"]}, {described["input"]["name"]: images}
    for name, node in nodes.items():
        (x, *_), op = [values[source] for source in node["inputs"]], node["op"]
        if op == "Quantize":
            # Exact in float64, which rounds half to even too.
            unit = 2.0 ** (nodes[node["inputs"][0]]["exponent"] if node["inputs"][0] in nodes else 0)
            y = np.rint(x * (unit / 2.0 ** node["exponent"])).clip(*node["range"]).astype(np.int64)
        elif op == "Layer":
            exponents, weight = tensors[f"{name}.exponents"], tensors[f"{name}.weight"]
            if node["kind"] == "linear":
                y = x @ weight.T
            else:
                patches, groups = windows(x, weight.shape[2:], node, 0), node["groups"]
                parts = zip(np.split(patches, groups, 1), np.split(weight, groups), strict=True)
                y = np.concatenate([np.einsum("nchwij,ocij->nhwo", *part) for part in parts], -1)
            y = (y + tensors[f"{name}.bias"]) << (exponents - exponents.min())
            y = y if node["kind"] == "linear" else y.transpose(0, 3, 1, 2)
        elif op == "Clip":
            y = x.clip(*node["bounds"])
        elif op == "Add":
            y = sum(values[source] << shift for source, shift in zip(node["inputs"], node["shifts"], strict=True))
        elif op == "SumPool":
            y = windows(x, node["kernel"], node, 0).sum((-2, -1))
        elif op == "MaxPool":
            y = windows(x, node["kernel"], node, -(2**62)).max((-2, -1))
        else:
            assert op == "Flatten", op
            y = x.reshape(len(x), -1)
        assert list(y.shape[1:]) == node["shape"]
        values[name] = y
    return values[described["output"]["name"]] * 2.0 ** described["output"]["exponent"]


def windows(x: np.ndarray, kernel: list[int], node: dict, fill: int) -> np.ndarray:
    """[B, C, H, W] -> [B, C, H', W', kh, kw]"""
    left, right, top, bottom = node["padding"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), (2, 3))
    return views[:, :, :: node["stride"][0], :: node["stride"][1]]


@pytest.mark.parametrize(
    ("architecture", "size"),
    # An average over 7 x 7 pixels; a maximum over windows with padding; padding that is not the same on all sides.
    [("resnet8_cifar", 28), ("test_resnet", 32), ("tf_mobilenetv3_small_minimal_100", 32)],
)
def test_a_folder_alone_is_enough_to_compute_the_logits(tmp_path: Path, architecture: str, size: int):
    model, images = profile_of(architecture, size)
    export_model(model, tmp_path / "out", [], images)
    with torch.no_grad():
        expected = model(images).logits.double().numpy()
    assert np.array_equal(computed_from(tmp_path / "out", images.double().numpy()), expected)


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="no Verilog simulator")
@pytest.mark.parametrize("bits", [8, 3])
def test_the_classifier_in_verilog_computes_the_logits(tmp_path: Path, bits: int):
    model, images = profile_of(first_last_bits=bits)
    report = export_model(model, tmp_path / "out", ["verilog"], images)
    found = [c for c in report["comparisons"] if c["what"] == "verilog"]
    assert [c["equal"] for c in found] == [True, True]
    assert found[0]["differ_from_control"] > 0
    names = {path.name for path in (tmp_path / "out" / "verilog").iterdir()}
    layer = {"head.v", "dense.v", "dot.v", "weights.hex", "biases.hex", "dense.json", "outputs.json"}
    assert names == {*layer, "testbench.v", "test_inputs.hex", "test_outputs.hex"}


def test_a_large_classifier_is_simulated_on_fewer_images(tmp_path: Path):
    """The 512 x 1,000 weights of a ResNet-18 take seconds for each, and a simulation has ten minutes."""
    network = integer_network(profile_of()[0])
    source = network[network.output.inputs[0]]
    most = {}
    for outputs, inputs in ((5, 64), (1000, 512)):
        classifier = replace(
            network.output, weight=torch.ones(outputs, inputs).long(), bias=None, exponents=(0,) * outputs
        )
        written = artefacts._simulated(network, classifier, source, tmp_path / str(outputs), simulate=None)
        most[outputs] = written.most_images
    assert most[5] == 1000
    assert 6 <= most[1000] <= 40


def test_bits_of_2_4_and_8_go_from_the_search_to_an_export(tmp_path: Path):
    """As arrays like Bit Fusion's compute with."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = trained_looks(create_backbone("resnet8_cifar", num_classes=5))
    model = SDQForImageClassification.from_float(
        network, "resnet8_cifar", img_size=12, scales="power_of_two", candidates=[2, 4, 8], activation_bits=8
    )
    batches = [{"pixel_values": torch.randn(8, 3, 12, 12)} for _ in range(4)]
    model.calibrate(batches)
    (strategy,) = search(model, batches, budgets=[4.0], max_batches=2000)
    assert {layer.weight_bits for layer in strategy.values()} == {2, 4, 8}
    model.set_strategy(strategy)
    report = export_model(model, tmp_path / "out", ["onnx"], batches[0]["pixel_values"])
    assert all(comparison["equal"] for comparison in report["comparisons"])
    costs = json.loads((tmp_path / "out" / "costs.json").read_text())
    widths = {name: layer.sum_width for name, layer in integer_network(model).layers.items()}
    assert {layer["layer"]: layer["accumulator_bits"] for layer in costs["layers"]} == widths
    assert costs["total"]["weight_bytes"] == strategy.weight_bytes()


def wrong(network, folder: Path, images: torch.Tensor) -> Written:
    (folder / "wrong.onnx").write_text("looks like an export")
    return Written(lambda batch: network.logits(batch).numpy() + 2.0**-20)


def test_an_export_that_is_not_the_integers_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, images = profile_of()
    monkeypatch.setitem(artefacts.TARGETS, "wrong", wrong)
    export_model(model, tmp_path / "out", [], images)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(VerificationError, match="Not the integers of the model: wrong") as error:
        export_model(model, tmp_path / "out", ["wrong"], images)
    # The earlier export is what it was.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    (failed,) = tmp_path.glob("out.failed-*")
    assert {path.name for path in tmp_path.iterdir()} == {"out", failed.name}
    assert [path.name for path in failed.iterdir()] == ["verification.json"]
    assert str(failed / "verification.json") in str(error.value)
    report = json.loads((failed / "verification.json").read_text())
    assert (report["verified"], report["failed"]) == (False, ["wrong"])


def test_an_approximation_that_guesses_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, images = profile_of()
    network = integer_network(model)
    for name, run in (("near", lambda x: network.logits(x) + 1e-4), ("far", lambda x: network.logits(x).flip(1))):
        monkeypatch.setitem(artefacts.TARGETS, name, lambda *_, run=run: Written(lambda x: run(x).numpy(), exact=False))
    export_model(model, tmp_path / "near", ["near"], images)
    with pytest.raises(VerificationError, match="far"):
        export_model(model, tmp_path / "far", ["far"], images)


def test_an_export_that_compares_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that would call the control equal too."""
    model, images = profile_of()
    changed, layer = artefacts.with_one_weight_changed(integer_network(model), images)
    assert isinstance(changed[layer], Layer)
    monkeypatch.setitem(
        artefacts.TARGETS, "control", lambda *_: Written(lambda x: changed.logits(x).numpy(), exact=False)
    )
    with pytest.raises(VerificationError, match="control"):
        export_model(model, tmp_path / "out", ["control"], images)


def test_a_network_of_one_bit_has_a_control(tmp_path: Path):
    """Its weights are all as large, and the first of the classifier stands at an input that is always zero."""
    model, images = model_of(first_last_bits=1, activation_bits=1)
    model.set_strategy(1)
    model = model.to_hardware_profile([images]).eval()
    network = integer_network(model)
    inputs = network.integers_of("fc.input", images)
    assert not inputs[:, 0].any()
    report = export_model(model, tmp_path / "out", [], images)
    assert all(c["differ_from_control"] >= 4 for c in report["comparisons"] if c["images"] == "real")


@pytest.mark.parametrize("exact", [True, False])
def test_an_export_that_gives_no_numbers_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool):
    """Also one that need not be exact."""
    model, images = profile_of()
    monkeypatch.setitem(
        artefacts.TARGETS, "nan", lambda *_: Written(lambda x: np.full((len(x), 5), np.nan), exact=exact)
    )
    with pytest.raises(VerificationError, match="nan"):
        export_model(model, tmp_path / "out", ["nan"], images)


def test_an_export_with_logits_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, images = profile_of()
    network = integer_network(model)
    monkeypatch.setitem(artefacts.TARGETS, "turned", lambda *_: Written(lambda x: network.logits(x).T.numpy()))
    with pytest.raises(ExportError, match=r"turned: logits of shape \[5, 8\], expected \[8, 5\]"):
        export_model(model, tmp_path / "out", ["turned"], images)
    assert not list(tmp_path.iterdir())


def test_images_that_are_none_are_refused(tmp_path: Path):
    model, images = profile_of()
    for wrong, message in (
        (images[:0], r"at least one, got torch\.float32 \[0, 3, 16, 16\]"),
        (images[:, :, :8], r"must be float32 \[B, 3, 16, 16\], .*got torch\.float32 \[8, 3, 8, 16\]"),
        (images.double(), "got torch.float64"),
        (images / 0, "must be finite"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model(model, tmp_path / "out", [], wrong)
    # Of shape [8, 1] they would be compared with each image's guess, all with all.
    for labels, got in ((torch.zeros(3), r"\[3\]"), (torch.zeros(8, 1), r"\[8, 1\]"), ([0] * 8, "list")):
        with pytest.raises(ExportError, match=f"one for each of the 8 images, got {got}"):
            export_model(model, tmp_path / "out", [], images, labels)


def test_made_images_reach_both_ends_and_every_tie():
    model, _ = profile_of()
    network = integer_network(model)
    first = network.nodes[0]
    integers = first.run(made_images(network))
    assert integers.min() == first.low
    assert integers.max() == first.high
    zero, low, high, far, ties, _ = integers
    assert not zero.any()
    assert (low == first.low).all()
    assert torch.equal(high, far)
    assert not (ties % 2).any()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    model, images = profile_of()
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ExportError, match="is not empty and holds no earlier export"):
        export_model(model, tmp_path, [], images)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    # Nor is one whose manifest is of something else, nor what was put beside an export.
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ExportError, match="is not empty and holds no earlier export"):
        export_model(model, tmp_path, [], images)
    export_model(model, tmp_path / "out", [], images)
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ExportError, match=r"out holds 'mine\.txt' beside an earlier export"):
        export_model(model, tmp_path / "out", [], images)
    assert (tmp_path / "out" / "mine.txt").read_text() == (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("place", ["project/synthesis.rpt", "project/solution/synthesis.rpt"])
def test_what_was_made_inside_of_an_export_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    model, images = profile_of()
    network = integer_network(model)

    def project(_, folder: Path, settings: object) -> Written:
        (folder / "project" / "src").mkdir(parents=True)
        (folder / "project" / "src" / "sdq.cpp").write_text("int main() {}")
        (folder / "project" / "empty").mkdir()
        return Written(lambda batch: network.logits(batch).numpy())

    monkeypatch.setitem(artefacts.TARGETS, "project", project)
    for _ in range(2):
        export_model(model, tmp_path / "out", ["project"], images)
    made = tmp_path / "out" / place
    made.parent.mkdir(exist_ok=True)
    made.write_text("the work of hours")
    with pytest.raises(ExportError, match=r"out holds 'project/.* beside an earlier export: choose another folder"):
        export_model(model, tmp_path / "out", ["project"], images)
    assert made.read_text() == "the work of hours"


def test_what_stands_beside_a_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, images = profile_of()
    monkeypatch.setitem(artefacts.TARGETS, "wrong", wrong)
    for end in ("new", "failed", "old"):
        (tmp_path / f"out.{end}").mkdir()
        (tmp_path / f"out.{end}" / "mine.txt").write_text(end)
    export_model(model, tmp_path / "out", [], images)
    for _ in range(2):
        with pytest.raises(VerificationError):
            export_model(model, tmp_path / "out", ["wrong"], images)
    for end in ("new", "failed", "old"):
        assert (tmp_path / f"out.{end}" / "mine.txt").read_text() == end
    # A report for each failure, the export, and no half of one.
    assert len(list(tmp_path.glob("out.failed-*/verification.json"))) == 2
    assert len(list(tmp_path.iterdir())) == 6


def test_an_export_that_cannot_be_put_in_its_place_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, images = profile_of()
    export_model(model, tmp_path / "out", [], images[:4])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    replace, moved = os.replace, []

    def fail_for_the_new_one(source, target):
        if Path(target) == tmp_path / "out" and not moved:
            moved.append(source)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_new_one)
    with pytest.raises(OSError, match="No space left"):
        export_model(model, tmp_path / "out", [], images)
    assert moved
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_open_to_those_that_folders_are_open_to(tmp_path: Path):
    """Not like a temporary one. So are its files, those that safetensors writes too."""
    model, images = profile_of()
    export_model(model, tmp_path / "out", [], images)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    mode = (tmp_path / "plain" / "file").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert "integers.safetensors" in modes
    assert set(modes.values()) == {mode}


def test_a_folder_may_be_a_link_or_the_present_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, images = profile_of()
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out")
    for folder in (".", tmp_path / "link", tmp_path / "out"):
        export_model(model, folder, [], images)
        assert (tmp_path / "out" / "manifest.json").exists()
        monkeypatch.chdir(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}
    assert (tmp_path / "link").is_symlink()


def test_the_command_knows_the_targets():
    assert tuple(artefacts.TARGETS) == EXPORT_TARGETS


def test_the_command_exports_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("qonnx")
    model, _ = profile_of("resnet8_cifar", 28)
    model.config.id2label = {i: str(i) for i in range(5)}
    model.save_pretrained(tmp_path / "model", print_size=False)
    command = ["export", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--images", "2"]
    assert main([*command, "--to", "qonnx"]) == 0
    out = capsys.readouterr().out
    assert "qonnx: 2 real images, equal" in out
    assert "No accuracy: The data has 10 classes, the model 5" in out
    assert ", accuracy" not in out
    assert (tmp_path / "out" / "model.qonnx.onnx").exists()
    assert main([*command, "--to", "qonx"]) == 2
    assert "Did you mean 'qonnx'?" in capsys.readouterr().err
    command[1] += "@w2"
    assert main([*command, "--to", "qonnx"]) == 2
    assert "is a folder, which has no revision 'w2'" in capsys.readouterr().err


def test_the_command_tells_no_accuracy_on_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of which there may be as many."""
    pytest.importorskip("onnxruntime")
    model, _ = profile_of("resnet8_cifar", 28)
    names, generator = ["ant", "bee", "cat", "dog", "elk"], np.random.default_rng(0)
    for path in [tmp_path / "data" / split / name for split in ("train", "validation", "test") for name in names]:
        path.mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path / "0.png")
    for folder, classes in (("same", names), ("other", names[::-1])):
        model.config.id2label = dict(enumerate(classes))
        model.save_pretrained(tmp_path / folder, print_size=False)
        command = ["export", str(tmp_path / folder), "--output", str(tmp_path / f"of {folder}"), "--to", "onnx"]
        assert main([*command, "--dataset", str(tmp_path / "data")]) == 0
        assert ("No accuracy: Class 0 is 'ant' in the data and 'elk'" in capsys.readouterr().out) == (folder == "other")
        report = json.loads((tmp_path / f"of {folder}" / "verification.json").read_text())
        known = {c["accuracy"] is not None for c in report["comparisons"] if c["images"] == "real"}
        assert known == {folder == "same"}


def test_the_command_refuses_a_model_that_is_not_in_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture):
    model, _ = model_of("resnet8_cifar", 28)
    model.save_pretrained(tmp_path / "model", print_size=False)
    assert main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--to", "qonnx"]) == 2
    assert "not in the hardware profile" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
