"""transformers' Trainer and evaluate's evaluator on SDQ models."""

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from evaluate import evaluator
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments, pipeline

from sdq_hf import SDQForImageClassification
from sdq_hf.export.lower import integer_network
from sdq_hf.layers import quantizer_parameters
from sdq_hf.training.metrics import Accuracy, TopKEvaluator, compute_metrics
from sdq_hf.training.optim import OptimizerArguments, create_optimizer
from sdq_hf.training.trainer import QATCallback
from tests.hub_server import HubServer, patch_client
from tests.load import load_script
from tests.test_modeling_sdq import create, images, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning"),
    # Trainer's notes about its own arguments and about torch's, on machines without a GPU.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
CLASSES = 10


def examples(count=48):
    generator = torch.Generator().manual_seed(5)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator) + i % CLASSES / 5, "labels": i % CLASSES}
        for i in range(count)
    ]


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **changes,
    }
    return TrainingArguments(**values)


def trained(model):
    model.set_strategy({name: 1 + i % 4 for i, name in enumerate(model.strategy.searchable)})
    return model


def state_of(model):
    """All tensors, and the weights as the forward pass uses them."""
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "form",
    [
        {"weight_quantizer": "lsq"},
        {"weight_quantizer": "dorefa"},
        {"scales": "power_of_two", "weight_scale": "channel"},
    ],
    ids=["lsq", "dorefa", "hardware"],
)
def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path, form):
    whole = trained(create("resnet8_cifar", **form))
    before = state_of(whole)
    Trainer(whole, arguments(tmp_path / "a"), train_dataset=examples(), callbacks=[QATCallback()]).train()
    # Learned quantizers take part: every scale and step has moved.
    moved = [name for name, p in quantizer_parameters(whole) if not torch.equal(p, before[name])]
    assert len(moved) == len(list(quantizer_parameters(whole)))
    resumed = trained(create("resnet8_cifar", seed=3, **form))
    trainer = Trainer(resumed, arguments(tmp_path / "a"), train_dataset=examples(), callbacks=[QATCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for key, value in state_of(whole).items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    # What it has come to is a model in a file, too.
    whole.save_pretrained(tmp_path / "model", print_size=False)
    assert torch.equal(logits(SDQForImageClassification.from_pretrained(tmp_path / "model")), logits(whole.eval()))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("ours", [False, True])
def test_weight_decay_of_scales_is_told(tmp_path, caplog, decay, ours):
    model = trained(create("resnet8_cifar"))
    changes = {"weight_decay": decay, "max_steps": 1, "save_strategy": "no"}
    optimizer = create_optimizer(model, OptimizerArguments(lr=1e-3, weight_decay=decay)) if ours else None
    Trainer(
        model,
        arguments(tmp_path, **changes),
        train_dataset=examples(8),
        callbacks=[QATCallback()],
        optimizers=(optimizer, None),
    ).train()
    assert ("shrinks the learned scales" in caplog.text) == (decay > 0 and not ours)


def test_a_model_in_the_hardware_profile_is_trained_pushed_and_loaded_with_its_integers(tmp_path, monkeypatch):
    model = trained(create("resnet8_cifar")).to_hardware_profile([images()])
    before = state_of(model)
    changes = {"push_to_hub": True, "hub_model_id": "org-user/net", "save_strategy": "no", "max_steps": 2}
    with HubServer(tokens={"hf_good": "org-user"}) as hub:
        patch_client(monkeypatch, hub, tmp_path / "home")
        trainer = Trainer(model, arguments(tmp_path / "run", **changes), train_dataset=examples())
        trainer.train()
        trainer.push_to_hub()
        model.push_to_hub("org-user/other")
        loaded = [SDQForImageClassification.from_pretrained(name) for name in ("org-user/net", "org-user/other")]
    assert not torch.equal(model.state_dict()["timm_model.conv1.bias"], before["timm_model.conv1.bias"])
    expected = logits(model.eval())
    for other in loaded:
        assert torch.equal(logits(other), expected)
        assert torch.equal(integer_network(other).logits(images()), expected.double())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # in transformers 5.2x only
def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path):
    models = []
    for enabled in (False, True):
        model = trained(create("resnet8_cifar"))
        changes = {"gradient_checkpointing": enabled, "max_steps": 2, "save_strategy": "no"}
        Trainer(model, arguments(tmp_path / str(enabled), **changes), train_dataset=examples()).train()
        assert model.timm_model.grad_checkpointing == enabled
        models.append(model)
    # Running statistics of batch norm, too.
    for (name, one), (_, other) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert torch.equal(one, other), name


def test_real_weights_of_another_training_are_not_taken(tmp_path, caplog):
    """`output_dir` holds another run's checkpoint of the same step: the function that is resumed is the checkpoint's."""
    for folder, seed in (("a", 0), ("b", 1)):
        model = trained(create("resnet8_cifar", seed=seed))
        Trainer(model, arguments(tmp_path / folder), train_dataset=examples(), callbacks=[QATCallback()]).train()
    checkpoint = tmp_path / "a" / "checkpoint-6"
    for folder in ("b", "c"):
        resumed = trained(create("resnet8_cifar", seed=3))
        Trainer(resumed, arguments(tmp_path / folder), train_dataset=examples(), callbacks=[QATCallback()]).train(
            resume_from_checkpoint=str(checkpoint)
        )
        assert torch.equal(logits(resumed.eval()), logits(SDQForImageClassification.from_pretrained(checkpoint)))
        assert "missing or of another training" in caplog.text
        caplog.clear()


def test_a_checkpoint_of_trainer_is_a_model_with_the_function_of_that_step(tmp_path):
    model = trained(create("resnet8_cifar"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=examples(), eval_dataset=examples())
    trainer.train()
    loaded = SDQForImageClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        torch.stack(
            [
                nn.functional.cross_entropy(logits(model, e["pixel_values"][None]), torch.tensor([e["labels"]]))
                for e in examples()
            ]
        )
        .mean()
        .item(),
        rel=1e-4,
    )
    # Without the callback it goes on from the checkpoint's function.
    other = trained(create("resnet8_cifar", seed=3))
    Trainer(other, arguments(tmp_path, max_steps=6), train_dataset=examples()).train(resume_from_checkpoint=True)
    assert torch.equal(logits(other.eval()), logits(loaded))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = trained(create("resnet8_cifar"))
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.1}
    trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=examples(), eval_dataset=examples())
    trainer.train()
    best = SDQForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(logits(model.eval()), logits(best))


def test_trainer_pushes_and_the_model_pushes_itself(tmp_path, monkeypatch):
    with HubServer(tokens={"hf_good": "org-user"}) as hub:
        patch_client(monkeypatch, hub, tmp_path / "home")
        model = trained(create("resnet8_cifar"))
        changes = {"push_to_hub": True, "hub_model_id": "org-user/net", "save_strategy": "no", "max_steps": 2}
        trainer = Trainer(model, arguments(tmp_path / "run", **changes), train_dataset=examples())
        trainer.train()
        trainer.push_to_hub()
        expected = logits(model.eval())
        assert torch.equal(logits(SDQForImageClassification.from_pretrained("org-user/net")), expected)
        model.push_to_hub("org-user/net")
        assert "library_name: sdq_hf" in hub.files("org-user/net")["README.md"].decode()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_example_script_distils_resumes_and_reports(tmp_path, capsys, streaming):
    """It resumes in another process."""
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=10, img_size=28, model_args={"in_chans": 1})
    model.calibrate([torch.randn(4, 1, 28, 28)])
    model.save_pretrained(tmp_path / "model", print_size=False)
    save_file(model.float_twin().state_dict(), tmp_path / "teacher.safetensors")
    script = Path(__file__).parents[2] / "scripts" / "train_with_trainer.py"
    module = load_script("train_with_trainer")
    command = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    command += ["--teacher", str(tmp_path / "teacher.safetensors"), "--max_samples", "32", "--use_cpu", "true"]
    if streaming:
        folder = tmp_path / "data"
        for i in range(40):
            for split in ("train", "validation", "test"):
                path = folder / split / str(i % 10) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                PILImage.fromarray(np.full((28, 28), 6 * i, np.uint8)).save(path)
        command += ["--dataset", str(folder), "--streaming", "true"]
    command += ["--max_steps", "4", "--save_steps", "2", "--disable_tqdm", "true", "--report_to", "none"]
    assert module.main(command) == 0
    printed = capsys.readouterr().out
    assert "test_accuracy" in printed
    assert "test_top_5_accuracy" in printed
    command = [sys.executable, str(script), *command, "--max_steps", "6", "--resume_from_checkpoint", "true"]
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert (tmp_path / "out" / "checkpoint-6").exists()
    loaded = SDQForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.strategy == model.strategy
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert any(not torch.equal(before[key], after[key]) for key in before)


# Metrics -------------------------------------------------------------------------------------------------------------


def test_accuracies_are_those_of_a_plain_loop():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(200, 12)), generator.integers(0, 12, 200)
    first = five = 0
    for row, label in zip(scores, labels, strict=True):
        better = sum(score > row[label] for score in row)
        first += better < 1
        five += better < 5
    expected = {"accuracy": first / 200, "top_5_accuracy": five / 200}
    assert compute_metrics(EvalPrediction(scores, labels)) == pytest.approx(expected)
    ranked = np.argsort(-scores, axis=1)
    assert Accuracy().compute(predictions=ranked.tolist(), references=labels.tolist()) == pytest.approx(expected)
    single = Accuracy().compute(predictions=ranked[:, 0].tolist(), references=labels.tolist())
    assert single == pytest.approx({"accuracy": first / 200})


@pytest.mark.parametrize("make", [lambda: evaluator("image-classification"), TopKEvaluator])
def test_the_evaluator_measures_a_loaded_model_through_the_pipeline(tmp_path, make):
    names = [f"class {i}" for i in range(CLASSES)]
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", id2label=dict(enumerate(names)), img_size=32)
    model.calibrate([torch.randn(8, 3, 32, 32)])
    model.save_pretrained(tmp_path, print_size=False)
    generator = np.random.default_rng(1)
    pictures = [PILImage.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(40)]
    labels = [i % CLASSES for i in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    measured = classify if make is TopKEvaluator else str(tmp_path)
    result = make().compute(measured, data, metric=Accuracy(), label_mapping=model.config.label2id)
    pixels = classify.image_processor(pictures)["pixel_values"]
    ranked = logits(model.eval(), pixels).argsort(dim=1, descending=True)
    hits = ranked == torch.tensor(labels)[:, None]
    assert result["accuracy"] == pytest.approx(hits[:, 0].double().mean().item())
    if make is TopKEvaluator:
        assert result["top_5_accuracy"] == pytest.approx(hits[:, :5].any(1).double().mean().item())
