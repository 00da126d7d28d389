"""Saving and loading as transformers' users know it, and files that are damaged or do not fit."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.utils import freeze
from torch import nn
from torch.nn.utils import prune
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from sdq_hf import SDQConfig, SDQForImageClassification, SDQImageProcessor
from sdq_hf.checkpoint import DIGEST, CheckpointError
from sdq_hf.layers import QuantizedLayer

from .test_modeling_sdq import create, images, logits


@pytest.fixture(scope="module")
def model():
    """Every bitwidth from 1 to 8 in one network, and a head for 10 classes."""
    model = create("resnet20_cifar")
    names = model.strategy.searchable
    model.set_strategy({name: 1 + i % 8 for i, name in enumerate(names)})
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, print_size=False)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("keywords", [{"device_map": "cpu"}, {"device_map": "auto"}, {"local_files_only": True}])
def test_logits_stay_bit_identical_whatever_transformers_is_asked_for(model, saved, keywords):
    loaded = AutoModelForImageClassification.from_pretrained(saved, **keywords)
    assert torch.equal(logits(loaded), logits(model))


def test_a_network_that_is_not_the_strategys_is_not_saved(saved, tmp_path):
    def other_head(model):
        model.timm_model.reset_classifier(5)
        model.config.num_labels = 5

    def same_head(model):
        model.timm_model.reset_classifier(10)

    def no_head(model):
        model.timm_model.reset_classifier(0)

    def more(model):
        model.timm_model.more = nn.Linear(2, 3)

    def bits(model):
        model.quantized_layers()["fc"].weight_quantizer.set_bits(3, model.timm_model.fc.weight)

    def inputs(model):
        model.timm_model.fc.input_quantizer = None

    cases = {
        other_head: r"'fc'.*has 320 weights \(bits float, inputs float\), the strategy 640 .*num_labels=5, ignore_mismatched",
        same_head: r"'fc'.*has 640 weights \(bits float, inputs float\), the strategy 640 weights \(bits 8, inputs 8\)",
        no_head: "'fc'.*has no such layer",
        more: "'more'.*the strategy no such layer",
        bits: r"'fc'.*has 640 weights \(bits 3, inputs 8\).*set_strategy",
        inputs: r"'fc'.*has 640 weights \(bits 8, inputs float\)",
    }
    for change, text in cases.items():
        model = SDQForImageClassification.from_pretrained(saved)
        change(model)
        with pytest.raises(ValueError, match=text):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("activation_bits", 8, "with_activation_bits"),
        ("first_last_bits", 4, r"set_strategy\(\{layer: bits\}\)"),
        ("pins", {"fc": 4}, r"set_strategy\(\{layer: bits\}\)"),
        ("weight_quantizer", "dorefa", "from_float"),
        ("weight_grid", "twos_complement", "from_float"),
        ("weight_scale", "channel", "from_float"),
        ("scales", "power_of_two", "to_hardware_profile"),
    ],
)
def test_a_field_that_the_strategy_was_made_with_is_not_changed_at_loading(model, saved, field, value, advice):
    for load in (AutoModelForImageClassification.from_pretrained, SDQConfig.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{field} of a saved model is .*{advice}"):
            load(saved, **{field: value})
    config = SDQConfig.from_pretrained(saved)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"^{field} of a saved model is .*{advice}"):
        SDQForImageClassification.from_pretrained(saved, config=config)
    same = SDQForImageClassification.from_pretrained(saved, **{field: getattr(model.config, field)})
    assert same.config.strategy == model.config.strategy


@pytest.mark.parametrize(
    "written", [None, {"model_type": "sdq", "architecture": "resnet8_cifar", "activation_bits": 8}]
)
def test_a_configuration_that_is_given_is_the_only_one_where_the_folder_has_no_strategy(
    model, saved, tmp_path, written
):
    shutil.copy(saved / "model.safetensors", tmp_path)
    if written:
        (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = SDQForImageClassification.from_pretrained(tmp_path, config=SDQConfig.from_pretrained(saved))
    assert torch.equal(logits(loaded), logits(model))


def test_fields_that_a_search_may_have_otherwise_are_changed_at_loading(model, saved):
    loaded = SDQForImageClassification.from_pretrained(saved, candidates=[2, 4], granularity="block")
    assert (loaded.config.candidates, loaded.config.granularity) == ([2, 4], "block")
    assert torch.equal(logits(loaded), logits(model))


def test_the_name_of_a_field_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no field 'activation_bit'\. Did you mean 'activation_bits'"):
        SDQForImageClassification.from_timm("resnet8_cifar", activation_bit=3)
    with pytest.raises(ValueError, match=r"no field 'qqqqqq'\. Arguments of timm"):
        SDQForImageClassification.from_timm("resnet8_cifar", qqqqqq=3)
    model = SDQForImageClassification.from_timm("resnet8_cifar", activation_bits=3, problem_type="regression")
    assert (model.config.activation_bits, model.config.problem_type) == (3, "regression")


@pytest.mark.parametrize("pins", [{"layer2.*": 8, "*": 3}, {"*": 3, "layer2.*": 8}])
def test_the_last_pin_that_matches_decides_in_a_file_too(tmp_path, pins):
    config = SDQConfig(architecture="resnet20_cifar", num_labels=10, pins=pins)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert list(loaded.pins.items()) == list(pins.items())
    assert loaded.pinned_bits("layer2.0.conv1") == config.pinned_bits("layer2.0.conv1") == list(pins.values())[-1]
    assert SDQConfig(**config.to_dict()).pins == pins


def test_weights_that_are_computed_from_other_tensors_are_not_saved(model, saved, tmp_path):
    pruned = copy.deepcopy(model)
    layer = pruned.timm_model.conv1
    prune.l1_unstructured(layer, "weight", 0.3)
    with pytest.raises(ValueError, match=r"'conv1': its weight is computed.*prune\.remove"):
        pruned.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    prune.remove(layer, "weight")
    pruned.save_pretrained(tmp_path / "model", print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(pruned))
    assert not torch.equal(logits(loaded), logits(model))


def test_sharded_files(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB", print_size=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path)), logits(model))
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    save_file({key: value for key, value in load_file(first).items() if not key.endswith("packed")}, first)
    with pytest.raises(CheckpointError, match="missing"):
        SDQForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("sizes", [("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "20KB")])
def test_a_model_takes_the_place_of_an_earlier_one_in_whole_files_or_shards(model, tmp_path, sizes):
    earlier = copy.deepcopy(model)
    for layer in earlier.quantized_layers().values():
        layer.weight_quantizer.scale.data *= 1.5
    for one, size in zip((earlier, model), sizes, strict=True):
        one.save_pretrained(tmp_path, max_shard_size=size, print_size=False)
        assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path)), logits(one))
    assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()


def test_the_footprint_counts_what_is_in_memory(saved):
    loaded = SDQForImageClassification.from_pretrained(saved)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert loaded.get_memory_footprint() == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_reads_16_bits_by_their_upper_half_and_refuses_an_unknown_range(channels):
    values = np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16)
    eight = np.array([[int(value) // 256 for value in row] for row in values], np.uint8)
    processor = SDQImageProcessor({"input_size": [channels, 28, 28], "mean": [0.5] * channels, "std": [0.2] * channels})
    got = processor(Image.fromarray(values))["pixel_values"]
    assert got.shape == (1, channels, 28, 28)
    assert torch.equal(got, processor(Image.fromarray(eight))["pixel_values"])
    assert len(got.unique()) > 200
    # An array of two dimensions is a grey image.
    assert torch.equal(processor(eight)["pixel_values"], got)
    assert torch.equal(processor([eight, eight])["pixel_values"], torch.cat([got, got]))
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        with pytest.raises(ValueError, match=rf"\(mode {mode}\), whose range is not known"):
            processor([Image.fromarray(values.astype(kind))])


@pytest.mark.parametrize("channels", [1, 3])
def test_pipeline_and_processor(tmp_path, channels):
    names = {i: f"class {i}" for i in range(10)}
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm(
        "resnet8_cifar", id2label=names, img_size=32, model_args={"in_chans": channels}
    )
    picture = Image.fromarray((255 * torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(0))).byte().numpy())
    model.calibrate([torch.randn(4, channels, 32, 32)])
    model.save_pretrained(tmp_path, print_size=False)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture)["pixel_values"]
    assert pixels.shape == (1, channels, 32, 32)
    expected = logits(model.eval(), pixels).softmax(-1)[0]
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    for answer in classify(picture, top_k=10):
        assert answer["score"] == pytest.approx(expected[int(answer["label"][-1])].item(), abs=1e-6)
    # An image of another mode is brought to the network's channels.
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        assert len(classify(picture.convert(mode))) == 5


def test_without_the_import_transformers_refuses(saved):
    code = "import sys; from transformers import AutoModelForImageClassification as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "`sdq`" in done.stderr


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3, None])
def test_an_index_that_names_files_elsewhere_is_refused(model, tmp_path, name):
    model.save_pretrained(tmp_path, max_shard_size="20KB", print_size=False)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json must name the files of its folder"):
        SDQForImageClassification.from_pretrained(tmp_path)
    for text in ("{", "[]", "{}", '{"metadata": {}, "weight_map": []}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is no index"):
            SDQForImageClassification.from_pretrained(tmp_path)


# Quantized citizenship -----------------------------------------------------------------------------------------------


def test_a_model_is_quantized_before_and_after_loading(model, saved):
    for one in (model, SDQForImageClassification.from_pretrained(saved)):
        assert one.is_quantized
        assert one.quantization_method == "sdq"
        assert one.config.quantization_config.quant_method == "sdq"
    assert json.loads((saved / "config.json").read_text())["quantization_config"] == {"quant_method": "sdq"}


@pytest.mark.parametrize("activation_bits", [4, 32])
def test_dequantize_gives_a_float_model_with_the_same_logits(tmp_path, activation_bits):
    model = create("resnet20_cifar", activation_bits=activation_bits)
    model.set_strategy({name: 1 + i % 8 for i, name in enumerate(model.strategy.searchable)})
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed", print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path / "packed")
    plain = loaded.dequantize()
    assert plain is loaded
    assert not plain.is_quantized
    assert not any("weight_quantizer" in name for name, _ in plain.named_modules())
    assert torch.equal(logits(plain), expected)
    assert {layer.weight_bits for layer in plain.strategy.values()} == {32}
    plain.save_pretrained(tmp_path / "float", print_size=False)
    weights = 4 * sum(p.numel() for p in plain.parameters())
    assert (tmp_path / "float" / "model.safetensors").stat().st_size > weights
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "float")
    if activation_bits == 4:
        for value in (0.0, float("nan")):
            broken = shutil.copytree(tmp_path / "float", tmp_path / f"broken {value}")
            state = load_file(broken / "model.safetensors")
            state["timm_model.layer1.0.conv1.input_quantizer.step"].fill_(value)
            save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1'.*step"):
                SDQForImageClassification.from_pretrained(broken)
    assert torch.equal(logits(again), expected)
    again.train()
    assert torch.equal(logits(again.eval()), expected)
    assert again.half().dtype == torch.float16
    # A weight is now an ordinary parameter that training moves.
    again.float().train()(images()).logits.sum().backward()
    assert again.timm_model.fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "cast", ["half", "bfloat16", lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.bfloat16)]
)
def test_casting_that_would_change_the_numbers_is_refused(saved, cast):
    loaded = SDQForImageClassification.from_pretrained(saved)
    expected = logits(loaded)
    with pytest.raises(ValueError, match=r"dequantize|not supported for quantized"):
        getattr(loaded, cast)() if isinstance(cast, str) else cast(loaded)
    assert torch.equal(logits(loaded.float()), expected)


def test_a_model_loaded_in_bfloat16_has_the_same_codes(model, saved, tmp_path):
    loaded = SDQForImageClassification.from_pretrained(saved, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    layer = loaded.quantized_layers()["layer1.0.conv1"]
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight_quantizer.scale.dtype == layer.input_quantizer.step.dtype == torch.float32
    output = logits(loaded, images().bfloat16())
    assert output.dtype == torch.bfloat16
    reference = logits(model)
    # bfloat16 keeps 8 bits of a number.
    assert (output.float() - reference).abs().max() < 0.1 * reference.abs().max()
    loaded.save_pretrained(tmp_path, print_size=False)
    before, after = (load_file(path / "model.safetensors") for path in (saved, tmp_path))
    for key, value in before.items():
        if key.endswith(("packed", "scale", "step", "signed")):
            assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("form", ["dorefa", "entropy"])
def test_a_model_whose_weights_stay_in_float32_says_what_it_computes_in(tmp_path, form):
    create("resnet8_cifar", weight_quantizer=form).save_pretrained(tmp_path, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.quantized_layers()["layer1.0.conv1"].weight.dtype == torch.float32
    assert loaded.dtype == logits(loaded, images().to(loaded.dtype)).dtype == torch.bfloat16
    expected = logits(loaded, images().bfloat16())
    assert torch.equal(logits(loaded.dequantize(), images().bfloat16()), expected)
    assert loaded.dtype == loaded.timm_model.conv1.weight.dtype == torch.bfloat16
    assert SDQForImageClassification.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ from version to version
@pytest.mark.parametrize(
    ("grad", "options"), [(True, {}), (False, {"scales": "power_of_two"}), (False, {"weight_quantizer": "entropy"})]
)
def test_a_loaded_model_is_one_graph_for_export_and_compile(tmp_path, grad, options):
    model, x = create("resnet8_cifar", size=8, **options), images(size=8)
    model.save_pretrained(tmp_path, print_size=False)
    expected = logits(model, x)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(SDQForImageClassification.from_pretrained(tmp_path), (x,), strict=False)
        torch.testing.assert_close(exported.module()(x).logits.detach(), expected)
        # Anew: what a forward pass reads from the state once would be there already.
        loaded = SDQForImageClassification.from_pretrained(tmp_path)
        compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x).logits.detach(), expected)


def test_a_graph_of_a_model_that_is_not_calibrated_is_refused():
    model = create("resnet8_cifar", size=8).eval()
    model._forget_steps()
    with pytest.raises(Exception, match=r"call model\.calibrate\(images\) before exporting"), torch.no_grad():
        torch.export.export(model, (images(size=8),), strict=False)


def test_a_model_loaded_in_inference_mode_computes_the_same(model, saved):
    with torch.inference_mode():
        assert torch.equal(logits(SDQForImageClassification.from_pretrained(saved)), logits(model))


def test_a_new_head_is_made_when_asked_for_and_all_else_stays(model, saved, tmp_path):
    with pytest.raises(ValueError, match=r"head 'timm_model\.fc'.*4 classes.*ignore_mismatched_sizes"):
        SDQForImageClassification.from_pretrained(saved, num_labels=4)
    loaded = AutoModelForImageClassification.from_pretrained(saved, num_labels=4, ignore_mismatched_sizes=True)
    head = loaded.timm_model.fc
    assert logits(loaded).shape == (4, 4)
    assert head.weight.isfinite().all()
    assert head.weight.std() > 0.01
    assert head.bias.abs().max() < 1
    assert loaded.strategy["fc"].num_weights == head.weight.numel() == 4 * 64
    with torch.no_grad():
        assert torch.equal(loaded.timm_model.forward_features(images()), model.timm_model.forward_features(images()))
    loaded.train()(images(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    loaded.eval().save_pretrained(tmp_path, print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path)), logits(loaded))


@pytest.mark.parametrize(
    "options", [{"weight_scale": "channel"}, {"scales": "power_of_two", "weight_scale": "channel"}]
)
def test_so_it_is_where_each_class_has_a_scale_of_its_own(tmp_path, options):
    model = create("resnet8_cifar", 0, **options)
    model.save_pretrained(tmp_path, print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True).eval()
    head = loaded.timm_model.fc
    assert head.weight_quantizer.scale.shape == (4,)
    weight = head.quantized_weight()
    assert (weight - head.weight).norm() < 0.02 * head.weight.norm()
    with torch.no_grad():
        assert torch.equal(loaded.timm_model.forward_features(images()), model.timm_model.forward_features(images()))
    loaded.save_pretrained(tmp_path / "new", print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / "new")), logits(loaded))


@pytest.mark.parametrize("form", ["lsq", "dorefa", "entropy"])
def test_load_state_dict_takes_the_tensors_of_a_packed_file(tmp_path, form):
    model, other = (create("resnet8_cifar", seed, weight_quantizer=form) for seed in (0, 1))
    for one in (model, other):
        one.set_strategy({name: 1 + i for i, name in enumerate(model.strategy.searchable)})
    model.save_pretrained(tmp_path, print_size=False)
    result = other.train().load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(other.eval()), logits(model))
    # They are real weights to train, quantized in the forward pass.
    other.train()(images()).logits.sum().backward()


@pytest.mark.parametrize("dequantized", [False, True])
def test_a_model_whose_norms_timm_has_frozen_is_saved_and_loaded(tmp_path, dequantized):
    model = create("test_efficientnet", size=32)
    freeze(model.timm_model, ["conv_stem", "bn1", "blocks.0"])
    model = model.dequantize() if dequantized else model
    model.save_pretrained(tmp_path, print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("options", [{}, {"weight_quantizer": "dorefa"}, {"weight_scale": "channel"}])
def test_a_state_dict_is_saved_in_place_of_the_models_own(tmp_path, options):
    """As of a moving average, or of the shards that a distributed training has gathered."""
    model, other = (create("resnet8_cifar", seed, **options) for seed in (0, 1))
    expected = logits(model)
    model.save_pretrained(tmp_path / "own", True, model.state_dict(), print_size=False)
    model.save_pretrained(tmp_path / "other", state_dict=other.state_dict(), print_size=False)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / "own")), expected)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / "other")), logits(other))
    state = other.state_dict()
    weight = state.pop("timm_model.fc.weight")
    with pytest.raises(ValueError, match=r"state_dict lacks 'timm_model\.fc\.weight'"):
        model.save_pretrained(tmp_path / "none", state_dict=state)
    with pytest.raises(ValueError, match=r"'timm_model\.fc\.weight' has the shape \[9, 64\], expected \[10, 64\]"):
        model.save_pretrained(tmp_path / "none", state_dict={**state, "timm_model.fc.weight": weight[:9]})
    for name, what in (("weight_quantizer.scale", "scale"), ("input_quantizer.step", "step")):
        key = f"timm_model.layer1.0.conv1.{name}"
        damaged = {**other.state_dict(), key: -other.state_dict()[key]}
        with pytest.raises(ValueError, match=rf"'timm_model\.layer1\.0\.conv1': its {what} must be above 0"):
            model.save_pretrained(tmp_path / "none", state_dict=damaged)
    # What is saved is fitted, whether the model is or not.
    model._forget_steps()
    model.save_pretrained(tmp_path / "unfitted", state_dict=other.state_dict(), print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / "unfitted")), logits(other))
    model.save_pretrained(tmp_path / "none", False, other.state_dict())
    assert not list((tmp_path / "none").glob("*"))


@pytest.mark.parametrize("form", ["lsq", "dorefa", "entropy"])
def test_a_loaded_model_stays_quantized_whatever_happens_to_its_weights(tmp_path, form):
    """Training in eval mode, another state dict, a moving average: what is computed is what a file of it gives."""
    model, other = (create("resnet8_cifar", seed, weight_quantizer=form) for seed in (0, 1))
    for one in (model, other):
        one.set_strategy({name: 1 + i % 4 for i, name in enumerate(model.strategy.searchable)})
    model.save_pretrained(tmp_path / "a", print_size=False)
    loaded = SDQForImageClassification.from_pretrained(tmp_path / "a")
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.01)
    average = torch.optim.swa_utils.AveragedModel(loaded)
    for _ in range(3):
        loaded.eval()(images()).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(loaded)
    replaced = SDQForImageClassification.from_pretrained(tmp_path / "a")
    replaced.load_state_dict(other.state_dict())
    assert torch.equal(logits(replaced), logits(other))
    for i, one in enumerate((loaded, average.module, replaced, copy.deepcopy(loaded))):
        one.eval().save_pretrained(tmp_path / str(i), print_size=False)
        assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / str(i))), logits(one))
        layer = one.quantized_layers()["layer1.0.conv1"]
        assert len(layer.quantized_weight().unique()) <= 2


def test_training_only_the_scales_of_a_loaded_model_changes_what_it_computes(saved, tmp_path):
    loaded = SDQForImageClassification.from_pretrained(saved)
    before = logits(loaded)
    with torch.no_grad():
        for layer in loaded.quantized_layers().values():
            layer.weight_quantizer.scale.mul_(0.7)
    assert not torch.equal(logits(loaded), before)
    loaded.save_pretrained(tmp_path, print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path)), logits(loaded))


@pytest.mark.parametrize(
    ("name", "shallow"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": [2, 2], "num_heads": [3, 6]}),
        ("vit_small_patch16_dinov3", {"depth": 2}),
        ("vit_tiny_patch16_224", {"depth": 2}),
    ],
)
def test_buffers_that_no_file_holds_are_filled(tmp_path, name, shallow):
    model = create(name, size=None, model_args=shallow)
    size = model.config.input_size
    pixels = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path, print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path), pixels), logits(model, pixels))


def test_every_layer_of_a_deep_copy_keeps_its_own_quantizers(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(isinstance(layer, QuantizedLayer) for layer in layers)


# Damaged files -------------------------------------------------------------------------------------------------------


def edit(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    state.pop(DIGEST)
    save_file(state, path, metadata={"format": "pt"})


def _reshape(state):
    state["timm_model.fc.weight_packed"] = state["timm_model.fc.weight_packed"][:-1]


def _retype(state):
    state["timm_model.fc.weight_packed"] = state["timm_model.fc.weight_packed"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("timm_model.layer1.0.conv1.weight_packed"), r"layer1\.0\.conv1\.weight_packed"),
        (lambda s: s.update(extra=torch.zeros(1)), "'extra' has no place"),
        (_reshape, r"fc\.weight_packed' has shape \(639,\), expected \(640,\)"),
        (_retype, r"fc\.weight_packed' is of type F32, expected U8"),
        (lambda s: s["timm_model.fc.weight_quantizer.scale"].fill_(float("nan")), r"fc'.*scale.*nan"),
        (lambda s: s["timm_model.fc.weight_quantizer.scale"].fill_(-1.0), r"fc'.*scale.*-1"),
        (lambda s: s["timm_model.conv1.input_quantizer.step"].fill_(float("inf")), r"conv1'.*step.*inf"),
        (lambda s: s["timm_model.conv1.input_quantizer.signed"].fill_(7), r"conv1'.*sign.*7"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(folder, change, message):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        SDQForImageClassification.from_pretrained(folder)


def test_the_same_model_gives_the_same_bytes(model, saved, tmp_path):
    for i in range(5):
        model.save_pretrained(tmp_path / str(i), print_size=False)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / str(i) / name).read_bytes() == (saved / name).read_bytes()


def test_truncated_and_flipped_files_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no readable"):
        SDQForImageClassification.from_pretrained(folder)
    for place in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="digest"):
            SDQForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("value", [0, 9, -1, 2.5, "3", float("nan"), float("inf"), None, True, [3], 10**400])
def test_bits_that_no_layer_can_have_are_refused(folder, value):
    path = folder / "config.json"
    for field in ("activation_bits", "first_last_bits", "candidates", "pins", "weight_bits"):
        config = json.loads(path.read_text())
        if field == "weight_bits":
            config["strategy"][3][field] = value
        else:
            config[field] = {"candidates": [2, value], "pins": {"fc": value}}.get(field, value)
        with pytest.raises(ValueError, match=field):
            SDQConfig.from_dict(config)
        path.with_name("other").mkdir(exist_ok=True)
        (path.with_name("other") / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=field):
            AutoConfig.from_pretrained(path.with_name("other"))


def _set(**fields):
    return lambda config: config.update(fields)


def _layer(index, **fields):
    return lambda config: config["strategy"][index].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(architecture="/etc/passwd"), "architecture"),
        (_set(architecture="hf-hub:org/model"), "architecture"),
        (_set(architecture="https://example.org/net.pth"), "architecture"),
        (_set(architecture="../../net"), "architecture"),
        (_set(architecture="resnet20_cifar.nowhere"), "resnet20_cifar.nowhere"),
        (_set(architecture="resnet21_cifar"), "resnet20_cifar"),
        (_set(architecture=None), "architecture"),
        (_set(model_args={"checkpoint_path": "/etc/passwd"}), "checkpoint_path"),
        (_set(model_args={"pretrained_cfg": {"url": "https://example.org"}}), "pretrained_cfg"),
        (_set(model_args={"num_classes": 3}), "num_labels"),
        (_set(model_args={"width": 10**9}), "width"),
        (_set(model_args={"nonsense": 1}), "nonsense"),
        (_set(model_args=[1]), "model_args"),
        (_set(model_args={"width": 64}), r"conv1.*weights"),
        (_set(num_labels=10**12), "num_labels"),
        (_set(id2label={"0": "a", "5": "b"}), "id2label"),
        (_set(pretrained_cfg={"input_size": [3, 10**9, 10**9]}), "input_size"),
        (_set(pretrained_cfg={"input_size": [3, 32, 32], "mean": ["a"]}), "mean"),
        (_set(pretrained_cfg={"input_size": [3, 32, 32], "std": [0, 0, 0]}), "std"),
        (_set(pretrained_cfg={"interpolation": "cubic"}), "interpolation.*bicubic"),
        (_set(pretrained_cfg={"crop_mode": [1]}), "crop_mode"),
        (_set(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quant_method"),
        (_set(model_args={"blocks_per_stage": 16384}), "blocks_per_stage.*at most 256"),
        (_set(model_args={"blocks": ["ds_r999999999_k3_s1_c16"]}), "blocks.*four digits"),
        (_set(architecture="vit_tiny_patch16_224", model_args={"depth": 5000}), "depth.*at most 256"),
        (_set(architecture="vit_tiny_patch16_224", model_args={"num_heads": 0}), "vit_tiny_patch16_224.*num_heads"),
        (_set(pins={f"layer{i}": 8 for i in range(20_000)}), "pins must be at most 1000"),
        (_set(pretrained_cfg={"input_size": [3, 1500, 1500], "crop_pct": 0.05}), "30000 pixels, at most 4096"),
        (_set(attn_implementation="org/kernel"), "attn_implementation"),
        (_set(_attn_implementation="org/kernel"), "attn_implementation"),
        (_layer(3, layer="conv\x1b[2J"), "printable"),
        (_layer(3, macs=10**400), "macs"),
        (_set(strategy={}), "list of layers"),
        (_layer(3, layer="layer9.0.conv1"), r"layer9\.0\.conv1"),
        (_layer(3, layer="conv1"), r"conv1.*again"),
        (_layer(3, num_weights=10**15), "weights"),
        (_layer(3, num_weights=-5), "num_weights"),
        (_layer(3, surprise=1), "fields"),
        (lambda c: c["strategy"].pop(3), "lacks the layer"),
        (lambda c: c["strategy"].extend({**c["strategy"][0], "layer": f"x{i}"} for i in range(9000)), "No layer 'x0'"),
        (lambda c: c["strategy"].extend(c["strategy"][:1] * 10**6), "at most 10000 layers, got 1000022"),
        (_layer(3, weight_bits=7), r"weight_packed' has shape"),
    ],
)
def test_a_configuration_that_describes_no_network_of_the_file_is_refused(folder, change, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        SDQForImageClassification.from_pretrained(folder)
