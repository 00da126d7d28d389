import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from sdq_hf import SDQConfig, SDQForImageClassification, Strategy
from sdq_hf.layers import apply_strategy, input_quantizers
from sdq_hf.quantizers import FORMS, GRIDS
from sdq_hf.quantizers.activation import _tell_of_fitting
from sdq_hf.quantizers.positive import floors


def images(seed=0, size=32):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def create(name="resnet8_cifar", seed=0, size=32, **kwargs):
    torch.manual_seed(seed)
    model = SDQForImageClassification.from_timm(name, num_labels=10, img_size=size, **kwargs)
    model.calibrate([torch.randn(2, *model.config.input_size) if size is None else images(size=size)])
    return model.eval()


@torch.no_grad()
def logits(model, x=None):
    return model(images() if x is None else x).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_loaded_logits_are_bit_identical_and_the_file_is_small(tmp_path, capsys, form, grid, seed):
    model = create("resnet20_cifar", seed, weight_quantizer=form, weight_grid=grid)
    names = list(model.strategy.searchable)
    bits = [*range(1, 9), *random.Random(seed).choices(range(1, 9), k=len(names) - 8)]
    random.Random(seed).shuffle(bits)
    model.set_strategy(dict(zip(names, bits, strict=True)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert f"{size / 1e3:,.1f} kB" in capsys.readouterr().out
    weights = {f"{name}.weight": layer for name, layer in model.strategy.items()}
    ideal = sum(layer.num_weights * layer.weight_bits / 8 for layer in weights.values())
    rest = {k: v for k, v in model.timm_model.state_dict().items() if k not in weights}
    ideal += sum(v.numel() * v.element_size() for v in rest.values())
    assert size <= 1.05 * ideal + 65536
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, SDQForImageClassification)
    assert torch.equal(logits(loaded), expected)
    assert loaded.strategy == model.strategy == Strategy.from_json(AutoConfig.from_pretrained(tmp_path).strategy)
    # Training goes on from the very same function: real weights stand behind the quantized ones.
    loaded.train()
    assert torch.equal(logits(loaded.eval()), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / "again")), expected)


def test_image_processor_is_found(tmp_path):
    create().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.data_config["mean"]) == timm.get_pretrained_cfg("resnet8_cifar").mean


@pytest.mark.parametrize("name", ["resnet8_cifar", "mobilenetv2_050", "tf_efficientnet_lite0"])
def test_float_mode_is_timm(name):
    torch.manual_seed(1)
    float_model = timm.create_model(name, num_classes=10).eval()
    model = SDQForImageClassification.from_float(float_model, name, img_size=32).eval()
    with model.float_mode():
        torch.testing.assert_close(logits(model), float_model(images()), rtol=0, atol=0)
    torch.testing.assert_close(model.float_twin()(images()), float_model(images()), rtol=0, atol=0)


def test_a_layer_multiplies_quantized_input_and_weight():
    model = create()
    layer = model.quantized_layers()["layer2.0.conv1"]
    x = images(3)[:, :1].repeat(1, 16, 1, 1).relu()
    w = layer.weight_quantizer.from_codes(layer.weight_quantizer.codes(layer.weight))
    low, high = layer.input_quantizer.range
    step = layer.input_quantizer.step
    a = torch.round(x / step).clamp(low, high) * step
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.conv2d(a, w, stride=2, padding=1))


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels", "loss"),
    [
        (None, 3, torch.tensor([0, 2, 2, 1]), F.cross_entropy),
        ("single_label_classification", 3, torch.tensor([0, 2, 2, 1]), F.cross_entropy),
        (
            "multi_label_classification",
            3,
            torch.eye(4)[:, :3] + torch.eye(4)[:, 1:],
            F.binary_cross_entropy_with_logits,
        ),
        (None, 3, torch.eye(4)[:, :3], F.binary_cross_entropy_with_logits),
        ("regression", 3, torch.arange(12.0).view(4, 3), F.mse_loss),
        (None, 1, torch.tensor([0.5, 1.0, -2.0, 3.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
    ],
)
def test_the_loss_is_that_of_the_problem_type(tmp_path, problem, num_labels, labels, loss):
    model = SDQForImageClassification.from_timm(
        "resnet8_cifar", num_labels=num_labels, img_size=32, problem_type=problem
    ).eval()
    model.calibrate([images()])
    model.save_pretrained(tmp_path, print_size=False)
    before = (tmp_path / "config.json").read_text()
    output = model(images(), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    assert output.loss > 0
    # What transformers finds out about the labels of one batch is not for the file.
    model.save_pretrained(tmp_path, print_size=False)
    assert (tmp_path / "config.json").read_text() == before


def test_outputs_are_a_tuple_where_that_is_asked_for_and_hidden_states_are_refused():
    model = create()
    labels = torch.tensor([0, 3, 9, 1])
    expected = model(images(), labels=labels)
    for keywords in ({"return_dict": False}, {}):
        output = model(images(), labels=labels, **keywords)
        assert type(output) is tuple
        assert torch.equal(output[0], expected.loss)
        assert torch.equal(output[1], expected.logits)
        model.config.return_dict = False
    model.config.return_dict = True
    for field in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{field} is not possible"):
            model(images(), **{field: True})
        setattr(model.config, field, True)
        with pytest.raises(ValueError, match=f"{field} is not possible"):
            model(images())
        assert torch.equal(model(images(), **{field: False}).logits, expected.logits)
        setattr(model.config, field, False)


def test_strategies_are_set_in_three_ways_and_errors_name_the_layer():
    model = create()
    model.set_strategy(3)
    assert model.strategy.average_bits() == 3
    model.set_strategy({"layer1.0.conv1": 5})
    assert model.strategy["layer1.0.conv1"].weight_bits == 5
    model.set_strategy(model.strategy.with_bits(2))
    assert {model.strategy[name].weight_bits for name in model.strategy.searchable} == {2}
    with pytest.raises(KeyError, match=r"layer1\.0\.conv1"):
        model.set_strategy({"layer1.0.conv": 5})
    with pytest.raises(ValueError, match="1 to 8"):
        model.set_strategy(9)
    other = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=100).strategy
    with pytest.raises(ValueError, match=r"'fc' has 640 weights, 6400 in the strategy"):
        model.set_strategy(other)
    with pytest.raises(ValueError, match=r"pins: no layer .*'typo\*'"):
        create(pins={"fc": 8, "typo*": 32})


def test_of_a_strategy_only_the_bits_are_taken(tmp_path):
    small, large = create(size=32), create(size=64)
    own = {name: (x.num_weights, x.macs, x.pinned) for name, x in large.strategy.items()}
    foreign = {name: replace(x, pinned=not x.pinned) for name, x in reversed(small.strategy.with_bits(3).layers)}
    large.set_strategy(Strategy.of(foreign).with_activation_bits({"layer1.0.conv1": 2}))
    large.calibrate([images(size=64)])
    large.save_pretrained(tmp_path, print_size=False)
    for model in (large, SDQForImageClassification.from_pretrained(tmp_path)):
        assert {name: (x.num_weights, x.macs, x.pinned) for name, x in model.strategy.items()} == own
        assert list(model.strategy) == list(own)
        assert {x.weight_bits for x in model.strategy.values() if not x.pinned} == {3}
        assert model.strategy["layer1.0.conv1"].activation_bits == 2
        assert model.quantized_layers()["layer1.0.conv1"].input_quantizer.bits == 2


def test_bits_are_whole_numbers_of_any_type_and_what_else_is_given_is_named():
    model = create()
    for bits in (np.int64(3), np.uint8(4), {"layer1.0.conv1": np.int32(5)}):
        model.set_strategy(bits)
        expected = bits["layer1.0.conv1"] if isinstance(bits, dict) else bits
        width = model.strategy["layer1.0.conv1"].weight_bits
        assert type(width) is int
        assert width == expected
    assert Strategy.from_json(json.dumps(model.strategy.to_json())) == model.strategy
    before = model.strategy
    cases = {
        r"whole number, or layer name -> bits, got 3\.0": 3.0,
        "layer name -> bits, got None": None,
        "layer name -> bits, got True": True,
        "layer name -> bits, got 'three'": "three",
        r"'layer1\.0\.conv1'.*1 to 8.*got 2\.0": {"layer1.0.conv1": 2.0},
        r"'layer1\.0\.conv1'.*1 to 8.*got '2'": {"layer2.0.conv1": 2, "layer1.0.conv1": "2"},
        r"'fc': whether its inputs are float": before.with_activation_bits({"fc": 32}),
    }
    for text, bits in cases.items():
        with pytest.raises(ValueError, match=text):
            model.set_strategy(bits)
    with pytest.raises(KeyError, match="The strategy lacks the layer 'fc' of the network"):
        model.set_strategy(Strategy(before.layers[:-1]))
    with pytest.raises(KeyError, match="No layer 'more' in the network"):
        model.set_strategy(Strategy((*before.layers, ("more", before["fc"]))))
    assert model.strategy == before
    with pytest.raises(KeyError, match="The strategy lacks the layer 'fc'"):
        apply_strategy(model.timm_model, Strategy(before.layers[:-1]))


def test_a_dequantized_model_has_no_bits_to_change():
    model = create().dequantize()
    for bits in (2, {"fc": 2}, model.strategy):
        with pytest.raises(ValueError, match="dequantized"):
            model.set_strategy(bits)


def test_float_mode_inside_float_mode_stays_until_the_outer_one_ends():
    model = create()
    quantized = logits(model)
    with model.float_mode():
        expected = logits(model)
        with model.float_mode():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), quantized)
    assert not torch.equal(expected, quantized)


def test_costs_are_sums_over_layers():
    strategy = create().strategy.with_bits({"layer3.0.conv1": 1, "layer1.0.conv2": 5})
    free = [x for x in strategy.values() if not x.pinned]
    assert strategy.average_bits() == sum(x.num_weights * x.weight_bits for x in free) / sum(
        x.num_weights for x in free
    )
    assert strategy.bitops() == sum(x.macs * x.weight_bits * x.activation_bits for x in strategy.values())
    assert strategy["layer1.0.conv1"].macs == 16 * 16 * 9 * 32 * 32
    assert Strategy.from_json(strategy.to_json()) == strategy
    assert strategy.diff(strategy.with_bits({"layer3.0.conv1": 4})) == {"layer3.0.conv1": (1, 4)}


def test_only_running_statistics_change_when_batch_norm_is_recalibrated():
    model = create()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.recalibrate_batch_norm([images(5), images(6)])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.endswith(("running_mean", "running_var", "num_batches_tracked")) for k in changed)


def test_batch_norm_is_recalibrated_with_the_means_over_batches_of_what_eval_mode_computes():
    """Norms that were frozen stay frozen, with statistics of the images all the same."""
    model = create().train()
    model.timm_model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    batches, seen = [images(5), images(6), images(7)], []
    model.timm_model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.recalibrate_batch_norm(batches)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(seen) == 3
    norm = model.timm_model.bn1
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))


def test_what_is_drawn_inside_of_norms_is_not_while_they_are_recalibrated():
    """timm's DropBlock stands inside of some norms."""
    model, seen = create().train(), []
    norm = model.timm_model.bn1
    norm.drop = torch.nn.Dropout(0.5)
    norm.register_forward_hook(lambda *_: seen.append((norm.training, norm.drop.training)))
    model.recalibrate_batch_norm([images(5)])
    assert seen == [(True, False)]
    assert norm.drop.training


def snapshot(model):
    """Everything that a failed call could have changed: tensors, momenta, modes, and what the quantizers remember."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: (m.training, getattr(m, "momentum", None)) for name, m in model.named_modules()}
    return state, modules, floors(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", ["recalibrate_batch_norm", "calibrate"])
def test_a_failed_calibration_changes_nothing(call, training):
    model = create().train(training)
    model.timm_model.layer1.eval()
    before = snapshot(model)
    x = images(5)

    def interrupted():
        yield x
        raise KeyboardInterrupt("stopped")

    used_up = iter([x])
    list(used_up)
    cases = [
        (([],), ValueError, "has no batch"),
        ((used_up,), ValueError, "used up"),
        (([x], 0), ValueError, "num_batches must be at least 1, got 0"),
        (([x, {"images": x}],), ValueError, r"'pixel_values'; got a mapping with 'images'"),
        (([["cat", "dog"]],), ValueError, "got list"),
        (([],), ValueError, "has no batch"),
        (([x[:, :1]],), RuntimeError, "channels"),
        ((interrupted(),), KeyboardInterrupt, "stopped"),
    ]
    for arguments, error, text in cases:
        with pytest.raises(error, match=text):
            getattr(model, call)(*arguments)
        state, modules, least = snapshot(model)
        assert (modules, least) == before[1:]
        assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())


def test_one_batch_calibrates_as_a_list_of_it_does():
    x, steps = images(5), []
    for batches in ([x], x, {"pixel_values": x}, [(x, torch.zeros(len(x)))]):
        model = create()
        model.calibrate(batches)
        steps.append(torch.stack([quantizer.step for quantizer in input_quantizers(model).values()]))
    assert steps[0].all()
    assert all(torch.equal(steps[0], other) for other in steps[1:])


@pytest.mark.parametrize("call", ["calibrate", "dequantize"])
def test_what_depends_on_quantizers_is_refused_in_float_mode(call):
    model = create()
    before = snapshot(model)
    with model.float_mode(), pytest.raises(ValueError, match=rf"{call}\(\) depends on the quantizers.*call it outside"):
        model.calibrate(images(5)) if call == "calibrate" else model.dequantize()
    state, modules, least = snapshot(model)
    assert (modules, least) == before[1:]
    assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())


def test_images_that_are_not_finite_or_no_batch_calibrate_nothing():
    model, x = create(), images(5)
    before = snapshot(model)[0]
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\], got 3 dimensions"):
        model.calibrate(x[0])
    x[3, 1, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        model.calibrate([x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saving_before_calibration_names_the_layer(tmp_path):
    model = SDQForImageClassification.from_timm("resnet8_cifar")
    with pytest.raises(ValueError, match=r"conv1.*calibrate"):
        model.save_pretrained(tmp_path)


def test_unknown_models_and_wrong_fields_are_named():
    with pytest.raises(ValueError, match="resnet20_cifar"):
        SDQForImageClassification.from_timm("resnet20_cifr")
    wrong = {
        "candidates": [0],
        "activation_bits": 9,
        "weight_grid": "mid",
        "granularity": "nett",
        "problem_type": "multi",
    }
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=field):
            SDQConfig(**{field: value})


def test_labels_are_told_by_either_map_or_a_list():
    names = ["ant", "bee", "cow"]
    number_of, expected = {name: i for i, name in enumerate(names)}, dict(enumerate(names))
    for labels in (
        {"id2label": names},
        {"id2label": expected, "label2id": number_of},
        {"label2id": number_of},
    ):
        config = SDQForImageClassification.from_timm("resnet8_cifar", img_size=16, **labels).config
        assert (config.id2label, config.label2id, config.num_labels) == (expected, number_of, 3)


def test_what_images_weights_were_trained_with_can_be_told():
    own = {"mean": [0.5], "std": [0.25]}
    options = {"num_labels": 3, "img_size": 16, "model_args": {"in_chans": 1}}
    model = SDQForImageClassification.from_timm("resnet8_cifar", **options, pretrained_cfg=own)
    assert {key: list(model.config.pretrained_cfg[key]) for key in own} == own
    with pytest.raises(ValueError, match="pretrained_cfg has no field 'maen'"):
        SDQForImageClassification.from_timm("resnet8_cifar", **options, pretrained_cfg={"maen": [0.5]})
    with pytest.raises(ValueError, match="must be one number for each channel"):
        SDQForImageClassification.from_timm("resnet8_cifar", **options, pretrained_cfg={"mean": [0.5, 0.5]})


def test_a_source_is_taken_out_of_its_wrapper_and_another_network_is_named():
    source = timm.create_model("resnet8_cifar", num_classes=10, in_chans=1).eval()
    options = {"img_size": 16, "model_args": {"in_chans": 1}}
    plain, wrapped, compiled = (
        SDQForImageClassification.from_float(one, "resnet8_cifar", **options).state_dict()
        for one in (source, torch.nn.DataParallel(source), torch.compile(source))
    )
    assert all(torch.equal(tensor, wrapped[name]) for name, tensor in plain.items())
    assert all(torch.equal(tensor, compiled[name]) for name, tensor in plain.items())
    with pytest.raises(ValueError, match=r"not those of 'resnet8_cifar' with 10 classes and model_args=\{\}"):
        SDQForImageClassification.from_float(source, "resnet8_cifar", img_size=16)
    assert (
        SDQForImageClassification.from_float(source, "resnet8_cifar", num_labels=10, **options).config.num_labels == 10
    )
    with pytest.raises(ValueError, match=r"not those of 'resnet8_cifar' with 9 classes"):
        SDQForImageClassification.from_float(source, "resnet8_cifar", num_labels=9, **options)
    with pytest.raises(ValueError, match=r"not those of 'resnet20_cifar'"):
        SDQForImageClassification.from_float(source, "resnet20_cifar", **options)


def test_a_first_batch_that_fits_steps_is_told_once(caplog):
    _tell_of_fitting.cache_clear()
    models = [SDQForImageClassification.from_timm("resnet8_cifar", num_labels=10, img_size=16) for _ in range(2)]
    models[0].calibrate(images(5))
    assert not caplog.text
    for model in models:
        model._forget_steps()
        model(images(5))
    assert caplog.text.count("are fitted to the first images that come by") == 1


def test_import_is_light():
    code = "import sys, sdq_hf; print([m for m in ('matplotlib', 'evaluate', 'tensorboard') if m in sys.modules], "
    code += "[m for m in sys.modules if m.startswith(('sdq_hf.training', 'sdq_hf.search', 'sdq_hf.hub'))])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] []"
