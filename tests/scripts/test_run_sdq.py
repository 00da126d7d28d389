"""`run_sdq.py` on a small data set that can be learned: what it leaves, Ctrl-C and resuming, wrong options."""

import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from safetensors.torch import load_file

from sdq_hf import SDQForImageClassification, Strategy
from sdq_hf.checkpoint import DIGEST
from sdq_hf.export.lower import integer_network
from sdq_hf.hub.card import python_snippets
from sdq_hf.hub.publish import revision_of
from sdq_hf.search import SearchLog, search
from sdq_hf.training.arguments import parse_arguments
from sdq_hf.training.interrupt import Interrupt
from sdq_hf.training.stages import Run
from tests.hub_server import HubServer, patch_client
from tests.load import load_script
from tests.stopper import Stopper

# The Hub client's own use of a deprecated argument when it uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_sdq.py"
SIZE, CLASSES = 16, 4


main = load_script("run_sdq").main


@pytest.fixture(autouse=True)
def _new_process():
    """Accelerate keeps the precision of a process's first run; each run here is to be one in a process of its own."""
    _forget_process()
    yield
    _forget_process()


def _forget_process():
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def pictures(count, seed):
    """Grey noise with one bright band, which is the class; flips and small shifts leave it."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = generator.integers(0, 160, (count, SIZE, SIZE), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 90
    return images, labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 320, 0), ("test", 80, 1)):
        images, labels = pictures(count, seed)
        features = Features({"image": Image(), "label": ClassLabel(names=["top", "high", "low", "bottom"])})
        columns = {"image": list(images), "label": labels.tolist()}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def options(data, output_dir, **changes):
    values = {
        "dataset": data,
        "output_dir": output_dir,
        "model": "resnet8_cifar",
        "img_size": SIZE,
        "batch_size": 32,
        "teacher_epochs": 3,
        "teacher_opt": "adamw",
        "teacher_lr": 0.01,
        "teacher_batch_size": 16,
        "epochs": 2,
        "target_bits": 3,
        "target_bitops": 3,
        "ebr_weight": 0.01,
        "cpu": "true",
        **changes,
    }
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", *str(value).split())]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run that was never stopped, and what it printed."""
    folder, out = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with redirect_stdout(out):
        assert main(options(data, folder)) == 0
    return folder, out.getvalue()


def rows_of(folder):
    """Rows by name, without what depends on the clock."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["name"]: {k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows}


def assert_is_part_of(folder, whole, names):
    """A run of fewer budgets or controls, with the rows `names`, has the same numbers and files for them."""
    found, expected = rows_of(folder), rows_of(whole)
    assert list(found) == names
    assert found == {name: expected[name] for name in names}
    files = sorted(folder.rglob("model.safetensors"))
    assert len(files) == len(names)
    for path in files:
        assert path.read_bytes() == (whole / path.relative_to(folder)).read_bytes(), path


def test_every_row_is_what_its_file_gives_in_a_plain_loop(data, finished):
    folder, printed = finished
    rows = rows_of(folder)
    names = ["sdq-bits-3", "greedy-bits-3", "sdq-bitops-3", "greedy-bitops-3", "uniform-3"]
    assert list(rows) == ["full precision", *names]
    assert all(name in printed for name in names)
    images, labels = pictures(80, 1)
    config = timm.get_pretrained_cfg("resnet8_cifar")
    mean, std = (sum(values) / 3 for values in (config.mean, config.std))
    pixels = ((torch.tensor(images[:, None]) / 255) - mean) / std
    pixels = pixels.to(memory_format=torch.channels_last)
    network = timm.create_model("resnet8_cifar", num_classes=CLASSES, in_chans=1)
    network.load_state_dict(load_file(folder / "teacher" / "model.safetensors"))
    with torch.no_grad():
        reference = network.eval()(pixels).log_softmax(-1)
        for name in names:
            model = SDQForImageClassification.from_pretrained(folder / "models" / name)
            output = model(pixels).logits.log_softmax(-1)
            top1 = 100 * (output.argmax(-1) == torch.tensor(labels)).double().mean().item()
            assert rows[name]["top1"] == pytest.approx(top1)
            kl = F.kl_div(output, reference, reduction="batchmean", log_target=True).item()
            assert rows[name]["kl"] == pytest.approx(kl, rel=1e-2, abs=1e-5)
            assert rows[name]["file_bytes"] == (folder / "models" / name / "model.safetensors").stat().st_size
            assert rows[name]["average_bits"] == model.strategy.average_bits()
            assert rows[name]["bitops"] == model.strategy.bitops()
    assert rows["full precision"]["top1"] > 90


def test_weights_in_place_of_pretrained_ones_get_a_head_that_is_trained(tmp_path, capsys):
    images, labels = pictures(24, 2)
    features = Features({"image": Image(), "label": ClassLabel(names=["top", "high", "low", "bottom"])})
    columns = {"image": list(images), "label": labels.tolist()}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    network = timm.create_model("resnet8_cifar", num_classes=10, in_chans=1)
    torch.save(network.state_dict(), tmp_path / "ten.pth")
    start = {"pretrained_path": tmp_path / "ten.pth", "stage": "teacher", "teacher_lr": 1e-9}
    start |= {"teacher_weight_decay": 0, "teacher_epochs": None, "validation_fraction": 0.2}
    assert main(options(tmp_path, tmp_path / "run", **start)) == 0
    # 30 epochs by default: the head is new, whatever the file has.
    assert "epoch 30/30" in capsys.readouterr().out
    found, given = load_file(tmp_path / "run" / "teacher" / "model.safetensors"), network.state_dict()
    assert found["fc.weight"].shape[0] == CLASSES
    torch.testing.assert_close(found["layer2.0.conv1.weight"], given["layer2.0.conv1.weight"], atol=1e-6, rtol=0)


def test_strategies_are_within_their_budgets(finished):
    folder, _ = finished
    rows = rows_of(folder)
    uniform = rows["uniform-3"]["bitops"]
    for method in ("sdq", "greedy"):
        assert 2.95 <= rows[f"{method}-bits-3"]["average_bits"] <= 3
        assert 0.9 * uniform <= rows[f"{method}-bitops-3"]["bitops"] <= uniform
    for entry in json.loads((folder / "search" / "strategies.json").read_text()):
        model = SDQForImageClassification.from_pretrained(folder / "models" / entry["name"])
        assert model.strategy == Strategy.from_json(entry["strategy"])


def test_pictures_and_models_are_left_and_nothing_unfinished(finished):
    folder, _ = finished
    for path in (folder / "plots").iterdir():
        with PILImage.open(path) as picture:
            assert min(picture.size) > 300
    assert {path.name for path in (folder / "plots").iterdir()} >= {"bits.png", "descent.png", "accuracy.png"}
    leftovers = [p.name for p in folder.rglob("*") if p.name.endswith((".new", ".tmp")) or "checkpoint" in p.name]
    assert leftovers == []


def test_a_run_stopped_in_each_stage_and_resumed_equals_the_one_that_was_not(data, finished, tmp_path, capsys):
    folder, changes = tmp_path / "stopped", {"target_bitops": None}
    resume = {}
    # In the teacher's second epoch, the first search, the second search (the first is not done again), and between the two
    # epochs of a fine-tune.
    for text, number, code in (
        ("teacher: epoch 1/3", signal.SIGINT, 130),
        ("teacher: epoch 3/3", signal.SIGTERM, 143),
        ("greedy-bits: for", signal.SIGINT, 130),
        ("greedy-bits-3: epoch 1/2", signal.SIGTERM, 143),
    ):
        with redirect_stdout(Stopper(text, number)):
            assert main(options(data, folder, **changes, **resume)) == code
        assert "--resume" in capsys.readouterr().err
        assert not (folder / "results.json").exists()
        resume = {"resume": "true"}
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(options(data, folder, **changes, **resume)) == 0
    assert "goes on from update" in out.getvalue()
    whole, _ = finished
    assert_is_part_of(folder, whole, ["full precision", "sdq-bits-3", "greedy-bits-3", "uniform-3"])


def test_a_run_in_the_hardware_profile_is_stopped_and_resumed_to_the_same_integers(data, tmp_path):
    """With images of 24 pixels, whose last average is over 6 x 6, no power of two."""
    changes = {"img_size": 24, "scales": "power_of_two", "weight_scale": "channel", "controls": "none"}
    changes |= {"target_bits": 6, "target_bitops": None, "teacher_epochs": 1, "max_train_samples": 160}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with redirect_stdout(io.StringIO()):
        assert main(options(data, whole, **changes)) == 0
    resume = {}
    for text in ("sdq-bits: for", "sdq-bits-6: epoch 1/2"):
        with redirect_stdout(Stopper(text)):
            assert main(options(data, stopped, **changes, **resume)) == 130
        resume = {"resume": "true"}
    with redirect_stdout(io.StringIO()):
        assert main(options(data, stopped, **changes, **resume)) == 0
    assert rows_of(stopped) == rows_of(whole)
    place = Path("models", "sdq-bits-6")
    model, other = (SDQForImageClassification.from_pretrained(run / place) for run in (whole, stopped))
    assert (whole / place / "model.safetensors").read_bytes() == (stopped / place / "model.safetensors").read_bytes()
    pixels = torch.randn(4, 1, 24, 24)
    with torch.no_grad():
        assert torch.equal(integer_network(other).logits(pixels), model(pixels).logits.double())


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_single_stages_build_on_each_other(data, finished, tmp_path):
    folder = tmp_path / "stages"
    with redirect_stdout(io.StringIO()):
        for stage in ("teacher", "search", "finetune", "evaluate"):
            assert main(options(data, folder, stage=stage, controls="none", target_bitops=None)) == 0
    assert_is_part_of(folder, finished[0], ["full precision", "sdq-bits-3"])


def test_what_a_stage_was_run_with_stays_on_record(data, finished, tmp_path, capsys):
    folder, one = tmp_path / "stages", {"controls": "none", "target_bitops": None, "epochs": None}
    assert main(options(data, folder, **one, stage="teacher", teacher_epochs=1)) == 0
    searched = options(data, folder, **{**one, "epochs": 0}, stage="search", teacher_epochs=1)
    assert main(searched) == 0
    # The search is one for no fine-tune, and goes on as such.
    assert main([*searched, "--resume", "true"]) == 0
    assert main(options(data, folder, **one, stage="finetune", teacher_epochs=1)) == 2
    assert "--epochs 30: the bits in" in capsys.readouterr().err
    assert main(options(data, folder, **{**one, "epochs": 0}, stage="finetune", teacher_epochs=1)) == 0
    assert main(options(data, folder, **one, stage="evaluate", teacher_epochs=1)) == 0
    card = (folder / "models" / "sdq-bits-3" / "README.md").read_text()
    assert "without any training after the quantization" in card
    assert "--epochs 0" in card.split("accelerate launch")[1].splitlines()[0]


def test_mixed_precision_accumulation_and_moving_averages_still_publish_the_float32_function(data, tmp_path):
    changes = {
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 2,
        "model_ema": "true",
        "mixup": 0.2,
        "clip_grad": 1.0,
        "grad_checkpointing": "true",
        "report_to": "tensorboard",
        "controls": "none",
        "target_bitops": None,
    }
    folder, out = tmp_path / "run", io.StringIO()
    with redirect_stdout(out):
        assert main(options(data, folder, **changes)) == 0
    assert "bit-identical" in out.getvalue()
    assert list(rows_of(folder)) == ["full precision", "sdq-bits-3"]
    assert list(folder.rglob("*tfevents*"))


# What the compiler of torch 2.11 says of its own use of functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_run_trains_the_same_teacher_and_finds_the_same_strategy(data, finished, tmp_path):
    """With a backend that traces the graphs and leaves the kernels as they are. Rounded inputs make other sums diverge."""
    changes = {"torch_compile": "true", "torch_compile_backend": "aot_eager", "controls": "none", "target_bitops": None}
    folder, out = tmp_path / "run", io.StringIO()
    with redirect_stdout(out):
        assert main(options(data, folder, **changes)) == 0
    assert "bit-identical" in out.getvalue()
    teachers = [(run / "teacher" / "model.safetensors").read_bytes() for run in (folder, finished[0])]
    assert teachers[0] == teachers[1]
    found, expected = (rows_of(run)["sdq-bits-3"] for run in (folder, finished[0]))
    assert found["bitops"] == expected["bitops"]
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.3)


def test_a_run_with_gradient_checkpointing_is_the_run_without(data, finished, tmp_path):
    changes = {"grad_checkpointing": "true", "controls": "none", "target_bitops": None}
    with redirect_stdout(io.StringIO()):
        assert main(options(data, tmp_path / "run", **changes)) == 0
    assert_is_part_of(tmp_path / "run", finished[0], ["full precision", "sdq-bits-3"])


def test_a_rival_may_be_searched_with_and_others_compared(data, tmp_path):
    changes = {"search": "table", "search_options": "images=48", "controls": "random uniform", "epochs": 1}
    folder = tmp_path / "run"
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, teacher_epochs=1, target_bitops=None, **changes)) == 0
    assert list(rows_of(folder)) == ["full precision", "table-bits-3", "random-bits-3", "uniform-3"]
    # A layer and a bitwidth each, and the float network, on 48 images.
    log = json.loads((folder / "search" / "table-bits.json").read_text())
    assert log["forward_images"] == 48 * (8 * 6 + 1)
    assert not (folder / "plots" / "descent.png").exists()
    assert "a table of the KL divergence" in (folder / "models" / "table-bits-3" / "README.md").read_text()


@pytest.mark.parametrize(("bn_batches", "statistics"), [(200, "batch"), (0, "running")])
def test_without_epochs_the_networks_own_weights_are_packed_at_bits_searched_for_them(
    data, finished, tmp_path, bn_batches, statistics
):
    """Nothing but the weights' codes and the batch norm statistics differs from the float network in its quantizers."""
    folder, weights = tmp_path / "run", finished[0] / "teacher" / "model.safetensors"
    given = options(
        data,
        folder,
        epochs=0,
        max_steps=5,
        bn_batches=bn_batches,
        checkpoint=weights,
        teacher_epochs=0,
        target_bits="4 3",
        target_bitops=None,
        controls="none",
    )
    assert main(given) == 0
    assert list(rows_of(folder)) == ["full precision", "sdq-bits-4", "sdq-bits-3"]
    _forget_process()
    run = Run(parse_arguments([*given, "--resume", "true"]), Interrupt())
    run.teacher()
    for batch_norm in ("batch", "running"):
        equal = batch_norm == statistics
        log = SearchLog()
        set_seed(0)
        found = search(
            run.base,
            run.loaders()["train"],
            [4, 3],
            start_bits=8,
            weight_lr=0,
            batch_norm=batch_norm,
            log=log,
            accelerator=run.accelerator,
        )
        kept = json.loads((folder / "search" / "sdq-bits.json").read_text())
        assert ([s.to_json() for s in found] == kept["strategies"] and log.moves == kept["moves"]) == equal
        if equal:
            strategies = found
    for name, strategy in zip(("sdq-bits-4", "sdq-bits-3"), strategies, strict=True):
        own = run.quantize(run.network)
        own.set_strategy(strategy)
        own.calibrate(run.loaders()["calibration"])
        own.eval().save_pretrained(tmp_path / name, print_size=False)
        left = load_file(folder / "models" / name / "model.safetensors")
        for key, tensor in load_file(tmp_path / name / "model.safetensors").items():
            anew = key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") and bn_batches
            assert anew or key == DIGEST or torch.equal(left[key], tensor), key
        card = (folder / "models" / name / "README.md").read_text()
        assert "without any training after the quantization, seed 0." in card
        assert "The float network came from the file `model.safetensors`." in card
        assert "fine-tuning on" not in card
        assert "on top of the fine-tuning" not in card
        assert json.loads((folder / "finetune" / f"{name}.json").read_text())["history"] == []
    run.close()


def test_budgets_may_be_in_any_cost_and_in_a_table_of_ones_own(data, tmp_path):
    start = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=CLASSES, img_size=SIZE).strategy
    cycles = {name: {str(b): start[name].macs * -(-b // 2) for b in range(1, 9)} for name in start.searchable}
    table = tmp_path / "cycles.json"
    table.write_text(json.dumps({"name": "cycles", "unit": "cycles", "layers": cycles}))
    changes = {"target_bits": None, "target_bitops": None, "teacher_epochs": 1, "epochs": 1, "search": "greedy"}
    changes |= {"budgets": f"compression=8 compression=12 lut=uniform3 {table}=uniform4", "controls": "uniform"}
    folder = tmp_path / "run"
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, **changes)) == 0
    rows = rows_of(folder)
    found = ["greedy-compression-8", "greedy-compression-12", "greedy-lut-uniform3", "greedy-cycles-uniform4"]
    assert list(rows) == ["full precision", *found, "uniform-3", "uniform-4"]
    for name, least in zip(found[:2], (8, 12), strict=True):
        assert least <= rows[name]["compression"] < 1.03 * least
    strategies = {
        name: SDQForImageClassification.from_pretrained(folder / "models" / name).strategy
        for name in rows
        if "-" in name
    }
    spent = {
        name: sum(cycles[layer][str(x.weight_bits)] for layer, x in strategy.items() if layer in cycles)
        for name, strategy in strategies.items()
    }
    assert 0.95 * spent["uniform-4"] <= spent["greedy-cycles-uniform4"] <= spent["uniform-4"]
    # Odd bits cost what one bit more costs.
    bits = strategies["greedy-cycles-uniform4"]
    assert all(bits[name].weight_bits % 2 == 0 for name in bits.searchable)
    assert [revision_of(rows[name]) for name in found] == [
        *("compression-8", "compression-12", "lut-uniform3", "cycles-uniform4")
    ]
    assert (folder / "plots" / "descent.png").exists()


def test_channels_may_have_bits_of_their_own(data, tmp_path):
    changes = {"granularity": "kernel", "candidates": "2 4 6", "target_bits": 5, "target_bitops": None}
    folder = tmp_path / "run"
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, teacher_epochs=1, epochs=1, controls="greedy", **changes)) == 0
    assert list(rows_of(folder)) == ["full precision", "sdq-bits-5", "greedy-bits-5"]
    for name in ("sdq-bits-5", "greedy-bits-5"):
        model = SDQForImageClassification.from_pretrained(folder / "models" / name)
        assert 4.95 <= model.strategy.average_bits() <= 5
        bits = model.strategy["layer3.0.conv2"].weight_bits
        assert set(bits) <= {2, 4, 6}
        assert f"~{sum(bits) / len(bits):.2f}" in (folder / "models" / name / "README.md").read_text()


def test_bits_of_inputs_may_be_searched_too(data, tmp_path):
    changes = {"search_activations": "true", "candidates": "3 4 6", "target_bits": None, "target_bitops": 4}
    folder = tmp_path / "run"
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, teacher_epochs=1, epochs=1, controls="greedy", **changes)) == 0
    rows, found = rows_of(folder), {}
    for name in ("sdq-bitops-4", "greedy-bitops-4"):
        model = SDQForImageClassification.from_pretrained(folder / "models" / name)
        found[name] = {model.strategy[layer].activation_bits for layer in model.strategy.searchable}
        assert rows[name]["bitops"] == model.strategy.bitops() <= rows[name]["budget"]
    assert found["greedy-bitops-4"] == {4}
    assert len(found["sdq-bitops-4"]) > 1


@pytest.mark.parametrize(("kd", "learns"), [("false", True), ("true", False)])
def test_without_distillation_labels_are_learned_whatever_the_teacher_says(data, tmp_path, kd, learns):
    """The teacher is not trained: who learns from it stays at chance, 25 %."""
    changes = {"teacher_epochs": 1, "teacher_lr": 1e-9, "search": "uniform", "controls": "none", "target_bitops": None}
    changes |= {"kd": kd, "epochs": 8, "batch_size": 16, "lr": 0.01, "ebr_weight": 0}
    with redirect_stdout(io.StringIO()):
        assert main(options(data, tmp_path / "run", **changes)) == 0
    top1 = rows_of(tmp_path / "run")["uniform-bits-3"]["top1"]
    assert top1 > 90 if learns else top1 < 50
    card = (tmp_path / "run" / "models" / "uniform-bits-3" / "README.md").read_text()
    assert (
        f"with\n{'the same distillation' if kd == 'true' else 'labels alone'} for every quantized row, seed 0." in card
    )


def streamed_images(folder):
    """Options of a run on a stream, whose images are put in `folder`."""
    for split, count in (("train", 160), ("validation", 40), ("test", 40)):
        for place, (image, label) in enumerate(zip(*pictures(count, seed=count), strict=True)):
            of_class = folder / split / f"class{label}"
            of_class.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(image).save(of_class / f"{place}.png")
    changes = {"dataset": folder, "streaming": "true", "controls": "none", "target_bits": 5, "target_bitops": None}
    return {**changes, "teacher_epochs": None, "epochs": None}


def test_a_stream_is_searched_and_trained_by_updates_and_resumes(data, tmp_path, capsys):
    streamed = streamed_images(tmp_path / "images")
    steps = {"teacher_max_steps": 25, "max_steps": 8, "eval_steps": 3, "gradient_accumulation_steps": 2}
    assert main(options(data, tmp_path / "run", **streamed)) == 2
    assert "give --max_steps instead of --epochs" in capsys.readouterr().err
    assert main(options(data, tmp_path / "run", **streamed, max_steps=8)) == 2
    assert "give --teacher_max_steps" in capsys.readouterr().err
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with redirect_stdout(io.StringIO()):
        assert main(options(data, whole, **streamed, **steps)) == 0
    with redirect_stdout(Stopper("sdq-bits-5: epoch 1")):
        assert main(options(data, stopped, **streamed, **steps)) == 130
    with redirect_stdout(io.StringIO()):
        assert main(options(data, stopped, **streamed, **steps, resume="true")) == 0
    assert rows_of(whole) == rows_of(stopped)
    assert rows_of(whole)["full precision"]["top1"] > 60
    # A pass of the stream has five batches, the training sixteen; validated after 3, 6 and 8 updates.
    history = json.loads((whole / "finetune" / "sdq-bits-5.json").read_text())["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    card = (whole / "models" / "sdq-bits-5" / "README.md").read_text()
    assert "On 40 test images" in card
    assert "8 updates of fine-tuning on streamed images" in card


def launch(arguments, script=SCRIPT, environment=(), timeout=None):
    """The run in two processes; one that takes more than `timeout` seconds fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}
    return subprocess.run(
        [*launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=timeout,
    )


# A run of two processes.
OF_TWO = {"batch_size": 16, "teacher_batch_size": None, "teacher_epochs": 2, "epochs": 1, "controls": "none"}
OF_TWO |= {"target_bits": 5, "target_bitops": None}


@pytest.fixture(scope="module")
def finished_by_two(data, tmp_path_factory):
    """The folder of a run that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    done = launch(options(data, folder, **OF_TWO))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_two_processes_find_one_strategy_and_write_one_result(finished_by_two):
    folder, printed = finished_by_two
    assert json.loads((folder / "results.json").read_text())["processes"] == 2
    # Ranks that disagree about a step-down would hang or print twice.
    assert printed.count("sdq-bits: for 5 average bits") == 1
    model = SDQForImageClassification.from_pretrained(folder / "models" / "sdq-bits-5")
    assert rows_of(folder)["sdq-bits-5"]["average_bits"] == model.strategy.average_bits() <= 5


def test_two_processes_share_a_stream_to_the_end(data, tmp_path):
    streamed = streamed_images(tmp_path / "images")
    steps = {"batch_size": 16, "teacher_batch_size": None, "teacher_max_steps": 4, "max_steps": 2, "search": "uniform"}
    steps |= {"mean": 0.5, "std": 0.25}
    done = launch(options(data, tmp_path / "run", **streamed, **steps), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2
    model = SDQForImageClassification.from_pretrained(tmp_path / "run" / "models" / "uniform-bits-5")
    assert model.strategy.average_bits() == 5
    assert (model.config.pretrained_cfg["mean"], model.config.pretrained_cfg["std"]) == ([0.5], [0.25])


def test_two_processes_that_get_a_sigterm_leave_a_checkpoint_and_resume_exactly(data, finished_by_two, tmp_path):
    stopping, stopped = tmp_path / "stopping.py", tmp_path / "stopped"
    stopping.write_text(
        f"""import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run_sdq import main
from sdq_hf.training.interrupt import Interrupt
call, whom = int(os.environ["CALL"]), os.environ["WHOM"]
asked, calls = Interrupt.requested, []
def requested(self, accelerator):
    calls.append(1)
    if len(calls) == call and (whom == "ranks" or accelerator.is_main_process):
        for _ in range(2):
            os.kill(os.getpid() if whom == "ranks" else os.getppid(), signal.SIGTERM)
    return asked(self, accelerator)
Interrupt.requested = requested
code = main(sys.argv[1:])
pathlib.Path({str(tmp_path)!r}, "code" + os.environ["RANK"]).write_text(str(code))
sys.exit(code)
"""
    )

    def stop(call, whom, place, **resume):
        environment = {"CALL": str(call), "WHOM": whom}
        done = launch(options(data, stopped, **OF_TWO, **resume), script=stopping, environment=environment)
        assert done.returncode not in (0, 2)
        codes = [tmp_path / f"code{rank}" for rank in (0, 1)]
        assert [code.read_text() for code in codes] == ["143", "143"]
        for code in codes:
            code.unlink()
        return max((stopped / place).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))

    # The launcher passes the signal on in the third update of the teacher's second epoch.
    newest = stop(12, "launcher", "teacher/training")
    state = json.loads((newest / "state.json").read_text())
    assert state["processes"] == 2
    assert state["state"]["update"] % 9 not in (0, 8)
    assert not (stopped / "teacher" / "model.safetensors").exists()
    # Both ranks get it in a batch of the search.
    stop(16, "ranks", "search/sdq-bits", resume="true")
    assert (stopped / "teacher" / "model.safetensors").exists()
    assert not (stopped / "search" / "sdq-bits.json").exists()
    done = launch(options(data, stopped, **OF_TWO, resume="true"))
    assert done.returncode == 0, done.stderr[-2000:]
    whole, _ = finished_by_two
    assert rows_of(stopped) == rows_of(whole)
    for path in sorted(whole.rglob("model.safetensors")):
        assert path.read_bytes() == (stopped / path.relative_to(whole)).read_bytes(), path
    logs = [json.loads((folder / "search" / "sdq-bits.json").read_text()) for folder in (whole, stopped)]
    assert {**logs[0], "seconds": 0} == {**logs[1], "seconds": 0}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(tokens={"hf_good": "org-user"}) as server:
        patch_client(monkeypatch, server, tmp_path / "home")
        yield server


def test_a_run_is_published_with_a_branch_for_each_budget(data, finished, hub, tmp_path, monkeypatch):
    folder, out = shutil.copytree(finished[0], tmp_path / "run"), io.StringIO()
    changes = {"stage": "evaluate", "push_to_hub": "true", "hub_model_id": "org-user/net", "hub_license": "mit"}
    with redirect_stdout(out):
        assert main(options(data, folder, **changes)) == 0
    rows = rows_of(folder)
    assert [line.split(":")[0] for line in out.getvalue().splitlines()[-3:]] == [
        "Published w3",
        "Published bitops-w3",
        "Published main",
    ]
    for revision, name in (("main", "sdq-bits-3"), ("w3", "sdq-bits-3"), ("bitops-w3", "sdq-bitops-3")):
        files = hub.files("org-user/net", revision)
        assert files["model.safetensors"] == (folder / "models" / name / "model.safetensors").read_bytes()
        text = files["README.md"].decode()
        card = ModelCard(text).data
        assert card.license == "mit"
        assert [result.metric_value for result in card.eval_results] == [
            round(rows[name][key] / 100, 4) for key in ("top1", "top5")
        ]
        for row in rows.values():
            assert f"{row['top1']:.2f} | {row['kl']:.4f} | {row['average_bits']:.2f} |" in text
        assert "https://huggingface.co/org-user/net/tree/bitops-w3" in text
        pictures = {line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
        assert pictures == {f"plots/{picture}.png" for picture in ("bits", "descent", "accuracy", "weights")}
        assert pictures <= set(files)
        # The command in the card, with a folder of data to fill in, is the one that was run.
        command = next(line for line in text.splitlines() if "accelerate launch" in line).split("run_sdq.py")[1]
        again = parse_arguments(shlex.split(command)).to_dict()
        assert {k: v for k, v in again.items() if v != parse_arguments(options(data, folder)).to_dict()[k]} == {
            "dataset": data.name,
            "output_dir": "runs/sdq",
            "cpu": False,
        }
        PILImage.new("RGB", (30, 40)).save(tmp_path / "photo.png")
        monkeypatch.chdir(tmp_path)
        for snippet in python_snippets(text):
            exec(snippet, {})
    revision = SDQForImageClassification.from_pretrained("org-user/net", revision="bitops-w3")
    assert revision.strategy.bitops() == rows["sdq-bitops-3"]["bitops"]


def test_a_publication_that_fails_leaves_the_result_and_says_how_to_publish_it(data, finished, hub, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    changes = {"stage": "evaluate", "push_to_hub": "true", "hub_model_id": "org-user/net"}
    hub.fail = lambda method, path: 503 if "/commit/" in path else None
    assert main(options(data, folder, **changes)) == 1
    captured = capsys.readouterr()
    assert "503" in captured.err
    assert f"sdq-hf push {folder} org-user/net" in captured.out
    assert rows_of(folder) == rows_of(finished[0])


def test_a_wrong_token_is_told_before_the_run(data, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    changes = {"push_to_hub": "true", "hub_model_id": "org-user/net"}
    assert main(options(data, tmp_path / "run", **changes)) == 2
    assert "does not know the token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": "true"}, "--push_to_hub needs --hub_model_id"),
        ({"model": "resnet8_cifr"}, "resnet8_cifar"),
        ({"img_sise": 3}, "did you mean --img_size"),
        ({"search": "hawk"}, "did you mean hawq"),
        ({"controls": "uniform greed"}, "did you mean greedy"),
        ({"search": "table", "search_options": "lr=1"}, "'table' has no option 'lr'; its options are: images"),
        ({"search_options": "caution"}, "takes NAME=VALUE"),
        ({"search_options": "caution=high"}, "'two_sided': caution must be a number, such as 2.0, got 'high'"),
        ({"search_options": "min_draws=2.5"}, "min_draws must be a whole number, such as 3, got 2.5"),
        ({"search_options": "keep=0"}, "'two_sided': keep must be above 0 and at most 1, such as 0.99, got 0"),
        ({"search": "hawq", "search_options": "probes=0"}, "'hawq': probes must be above 0, such as 8, got 0"),
        ({"mean": "0.5 0.5"}, "--mean takes one number, or one for each of the 1 channels, got 2"),
        ({"std": "0"}, "--std must be above 0, got 0"),
        ({"target_bits": 9}, "between 1 and 8"),
        ({"target_bits": 0.5}, "between 1 and 8"),
        ({"target_bitops": 11}, "out of reach"),
        ({"budgets": "bytes"}, "takes COST=VALUE"),
        ({"granularity": "kernel", "controls": "hawq"}, "The method 'hawq' does not search"),
        ({"search_activations": "true"}, "a budget in average bits, which does not count them"),
        ({"search_activations": "true", "search": "table"}, "is for the methods two_sided and paper"),
        ({"budgets": "bitop=3"}, "Did you mean 'bitops'"),
        ({"budgets": "lut=uniform"}, "takes COST=VALUE"),
        ({"budgets": "compression=90"}, "What binds most: layer3.0.conv2 (at least 1 bits"),
        ({"budgets": "none.json=3"}, "none.json cannot be read"),
        ({"image_column": "picture"}, "picture"),
        ({"label_column": "etiquette"}, "etiquette"),
        ({"opt": "adamv"}, "near names: adam"),
        ({"teacher_opt": "sdg"}, "sgd"),
        ({"sched": "cosin"}, "cosine"),
        ({"activation_bits": 9}, "activation_bits"),
        ({"candidates": "2 4 9"}, "candidates"),
        ({"pins": "layer7.*=8"}, "layer7"),
        ({"floors": "layer7.*=2"}, "layer7"),
        ({"floors": "layer1"}, "PATTERN=BITS"),
        ({"kd_teacher": "resnot18"}, "resnet18"),
        ({"kd_teacher": "resnet18"}, "nothing to teach"),
        ({"checkpoint": "/nowhere.pth"}, "--checkpoint /nowhere.pth is no file"),
        ({"pretrained_path": "/nowhere.pth"}, "--pretrained_path /nowhere.pth is no file"),
        ({"pretrained_path": SCRIPT, "checkpoint": SCRIPT}, "give one of them"),
        ({"pretrained_path": SCRIPT}, "timm cannot make 'resnet8_cifar'"),
        ({"start_bits": 2}, "start above it"),
        ({"mixup": 0.2, "batch_size": 15}, "even --batch_size"),
        ({"mixup": 0.2, "max_train_samples": 25}, "the only one has the "),
        (
            {"mixup": 0.2, "max_train_samples": 25, "batch_size": 16, "teacher_batch_size": 32},
            "the only one has the ",
        ),
        ({"batch_size": 0}, "--batch_size must be above 0"),
        ({"freeze_bn": 1.5}, "--freeze_bn must be from 0 to 1, got 1.5"),
        ({"report_to": "wandbb"}, "did you mean 'wandb'"),
        ({"test_split": "tset"}, "tset"),
        ({"dataset": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"resume": "true"}, "holds no run to go on with: start one without --resume"),
        ({"stage": "finetune"}, "holds no run to go on with: run --stage teacher there first"),
    ],
)
def test_a_wrong_option_is_one_line_with_exit_code_2_and_nothing_is_written(data, tmp_path, capsys, changes, message):
    assert main(options(data, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file", ["arguments.json", "teacher/model.safetensors", "search/strategies.json", "search/sdq-bits.json"]
)
def test_a_damaged_file_of_a_run_is_named_and_the_rest_left_alone(data, finished, tmp_path, capsys, file):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    if file == "search/sdq-bits.json":
        (folder / "search" / "strategies.json").unlink()
    damaged = (folder / file).read_bytes()
    (folder / file).write_bytes(damaged[: len(damaged) // 2])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = options(data, finished[0], resume="true")
    arguments[arguments.index("--output_dir") + 1] = str(folder)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"{folder / file} cannot be read" in error[0]
    assert ("start anew" if file == "arguments.json" else "remove it, and --resume makes it anew") in error[0]
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before if path.name != "arguments.json"} == {
        path: text for path, text in before.items() if path.name != "arguments.json"
    }


@pytest.mark.parametrize("most", [100, 60_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(data, finished, tmp_path, capsys, most):
    """The kernel lets no file grow beyond `most` bytes: the options, or a checkpoint, find no room."""
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            assert main(options(data, folder, stage="teacher")) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert str(folder) in error
        assert "MB are free there). What is there is still good: make room, and --resume goes on." in error
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["arguments.json"] * (most > 100)
        resume = {"resume": "true"} if most > 100 else {}
        assert main(options(data, folder, stage="teacher", **resume)) == 0
    weights = [(run / "teacher" / "model.safetensors").read_bytes() for run in (folder, finished[0])]
    assert weights[0] == weights[1]


def test_a_folder_that_cannot_be_made_is_one_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(options(data, tmp_path / "file" / "run")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path / 'file' / 'run'}" in error
    assert "Not a directory" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_lr": 1e30, "teacher_opt": "sgd"}, "teacher: the loss is no finite number any more at update"),
        ({"search_weight_lr": 1e30}, "The search's gradients are not finite any more"),
        (
            {"search": "uniform", "lr": 1e30, "opt": "sgd"},
            "uniform-bits-3: the loss is no finite number any more at update",
        ),
    ],
)
def test_a_learning_rate_that_explodes_is_one_line(data, tmp_path, capsys, changes, message):
    short = {"teacher_epochs": 1, "target_bitops": None, "controls": "none", "ebr_weight": 0}
    with redirect_stdout(io.StringIO()):
        assert main(options(data, tmp_path / "run", **{**short, **changes})) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert "take a lower one" in error


def test_resuming_with_other_options_is_refused_and_a_strange_folder_left_alone(data, finished, tmp_path, capsys):
    folder, _ = finished
    before = sorted(folder.rglob("*"))
    assert main(options(data, folder, resume="true", epochs=5)) == 2
    assert "--epochs was 2" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(options(data, tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_removed_only_when_that_is_asked_for(data, finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = {"teacher_epochs": 1, "seed": 3}
    for stage in ("all", "teacher"):
        assert main(options(data, folder, stage=stage, **other)) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert f"--output_dir {folder} holds a run" in error
        assert all(way in error for way in ("--resume true", "--overwrite true", "(--output_dir)"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # What goes on with a run removes nothing of it.
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, resume="true", overwrite="true")) == 0
    assert rows_of(folder) == rows_of(finished[0])
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, stage="teacher", overwrite="true", **other)) == 0
    assert {path.name for path in folder.iterdir()} == {"arguments.json", "teacher"}
    weights = [(run / "teacher" / "model.safetensors").read_bytes() for run in (folder, finished[0])]
    assert weights[0] != weights[1]
    # One that ended before it had left anything is in nobody's way.
    shutil.rmtree(folder / "teacher")
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, stage="teacher", **other)) == 0
    assert (folder / "teacher" / "model.safetensors").read_bytes() == weights[0]
    # The same command goes on with --resume.
    with redirect_stdout(io.StringIO()):
        assert main(options(data, folder, stage="teacher", overwrite="true", resume="true", **other)) == 0
    assert (folder / "teacher" / "model.safetensors").read_bytes() == weights[0]


def test_a_stage_with_another_network_or_without_its_predecessor_leaves_everything(data, finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(options(data, folder, stage="evaluate", model="resnet14_cifar")) == 2
    assert "--model was 'resnet8_cifar'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "search" / "strategies.json").unlink()
    assert main(options(data, folder, stage="finetune")) == 2
    assert "no result of the stage 'search'" in capsys.readouterr().err
    assert (folder / "models" / "uniform-3").exists()


def test_options_come_from_a_yaml_file_and_the_command_line_overrides_them(data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset: {data}\nmodel: resnet8_cifar\nimg_size: 16\ntarget_bits: [9.0]\n")
    assert main([str(file), "--output_dir", str(tmp_path / "run")]) == 2
    assert "9 average bits" in capsys.readouterr().err
    assert main([str(file), "--target_bits", "0.25", "--output_dir", str(tmp_path / "run")]) == 2
    assert "0.25 average bits" in capsys.readouterr().err
    file.write_text("modle: resnet8_cifar\n")
    assert main([str(file)]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err


def test_the_script_exits_with_2(tmp_path):
    command = [sys.executable, str(SCRIPT), "--model", "resnet8_cifr", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Near names: resnet8_cifar" in done.stderr
    assert done.stderr.count("\n") == 1
