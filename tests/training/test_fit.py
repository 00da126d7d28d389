"""The training loop against a plain loop in torch, optimizer groups, losses and schedules against formulas."""

import copy
import json
import math
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from torch import nn
from torch.utils.data import DataLoader

from sdq_hf import SDQForImageClassification
from sdq_hf.training.checkpoints import DamagedError
from sdq_hf.training.data import load_image_data
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.fit import fit, recalibrate
from sdq_hf.training.interrupt import Interrupt, Interrupted
from sdq_hf.training.loaders import build_loaders
from sdq_hf.training.losses import DivergedError, distillation, kl_divergence, ramp, total_bin_regularization
from sdq_hf.training.optim import (
    OptimizerArguments,
    create_optimizer,
    create_scheduler,
    parameter_groups,
)
from sdq_hf.writing import WriteError

BATCH, CLASSES = 8, 3


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 5, generator=generator)
        self.y = self.x[:, :CLASSES].argmax(dim=1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def cross_entropy(model, images, labels, progress):
    return F.cross_entropy(model(images), labels)


def loaders(accelerator, batch=BATCH):
    return {
        "train": accelerator.prepare(DataLoader(Rows(40), batch_size=batch)),
        "validation": accelerator.prepare(DataLoader(Rows(20, seed=1), batch_size=batch)),
    }


RECIPE = OptimizerArguments(epochs=3, opt="sgd", lr=0.2, weight_decay=0.01, momentum=0.9, warmup_epochs=0)


def plain_loop(epochs=3, clip=None):
    """The same training with torch alone; weights after each of the five updates an epoch."""
    model, states = network(), []
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.2,
        momentum=0.9,
        nesterov=True,
    )
    data = Rows(40)
    updates = round(5 * epochs)
    for step in range(updates):
        rows = slice(step % 5 * BATCH, (step % 5 + 1) * BATCH)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * 0.2 * (1 + math.cos(math.pi * step / updates))
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def same(model, state, **kwargs):
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], **kwargs)


def best_epoch(states, metric):
    """Index of the first state with the best validation accuracy, loss, or KL divergence from an untrained network."""
    data, model = Rows(20, seed=1), network()
    scores = []
    for state in states:
        model.load_state_dict(state)
        if metric == "loss":
            scores.append(-F.cross_entropy(model(data.x), data.y).item())
        elif metric == "kl":
            target = network()(data.x).log_softmax(1)
            scores.append(-(target.exp() * (target - model(data.x).log_softmax(1))).sum(1).mean().item())
        else:
            scores.append((model(data.x).argmax(1) == data.y).sum().item())
    return scores.index(max(scores))


@pytest.mark.parametrize("metric", ["top1", "loss", "kl"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_fit_is_the_plain_loop_and_ends_with_its_best_epoch(tmp_path, clip, metric):
    accelerator, model = Accelerator(cpu=True), network()
    recipe = OptimizerArguments(**{**vars(RECIPE), "clip_grad": clip})
    reference = network() if metric == "kl" else None
    state = fit(
        model,
        cross_entropy,
        loaders(accelerator),
        recipe,
        accelerator,
        tmp_path,
        eval_metric=metric,
        reference=reference,
    )
    expected = plain_loop(clip=clip)[4::5]
    best = best_epoch(expected, metric)
    assert (state.update, state.best_epoch) == (15, best + 1)
    if metric == "kl":
        # The farther the training gets, the farther it is from where it began.
        assert best == 0
    same(model, expected[best])
    assert [row["epoch"] for row in state.history] == [1, 2, 3]
    # The first epoch's mean loss: of each batch before its update.
    before, data, losses = network(), Rows(40), []
    for step, weights in enumerate([before.state_dict(), *plain_loop(clip=clip)[:4]]):
        before.load_state_dict(weights)
        rows = slice(step * BATCH, (step + 1) * BATCH)
        losses.append(F.cross_entropy(before(data.x[rows]), data.y[rows]).item())
    assert state.history[0]["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_batch_norm_keeps_its_statistics_after_a_part_of_the_training(tmp_path, part):
    def norm_network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    accelerator, model, plain, data = Accelerator(cpu=True), norm_network(), norm_network(), Rows(40)
    recipe = OptimizerArguments(epochs=2, opt="sgd", lr=0.2, warmup_epochs=0, freeze_bn=part)
    optimizer = create_optimizer(plain, recipe)
    for step in range(10):
        plain.train()
        # Half of ten updates is the end of the first epoch: the second has none of its own.
        plain[1].train(step < 10 * part)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * 0.2 * (1 + math.cos(math.pi * step / 10))
        optimizer.zero_grad()
        rows = slice(step % 5 * BATCH, (step % 5 + 1) * BATCH)
        F.cross_entropy(plain(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
    state = fit(model, cross_entropy, loaders(accelerator), recipe, accelerator, tmp_path, eval_metric="loss")
    assert state.best_epoch == 2
    same(model, plain.state_dict())


class ChannelStatistics(nn.Module):
    """A batch norm between two layers, gathered anew as the model's are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, pixel_values):
        return self.layers(pixel_values)

    recalibrate_batch_norm = SDQForImageClassification.recalibrate_batch_norm
    device = torch.device("cpu")


@pytest.mark.parametrize("right", ["running", "calibration", "train"])
def test_the_statistics_that_are_best_on_validation_are_left(right):
    accelerator = Accelerator(cpu=True)
    sources = {name: DataLoader(Rows(40, seed), batch_size=BATCH) for seed, name in enumerate(("calibration", "train"))}
    model = ChannelStatistics()
    # Of 3 of 5 batches, as asked below. The reference has the right ones, so that only they have no divergence.
    expected = {"running": (torch.zeros(8), torch.ones(8))}
    for name, source in sources.items():
        values = model.layers[0](source.dataset.x[: 3 * BATCH]).view(3, BATCH, 8)
        expected[name] = values.mean(1).mean(0), values.var(1).mean(0)
    reference = copy.deepcopy(model).eval()
    reference.layers[1].running_mean, reference.layers[1].running_var = expected[right]
    validation = accelerator.prepare(DataLoader(Rows(20, seed=2), batch_size=10))
    recalibrate(model, {**sources, "validation": validation}, accelerator, 3, reference)
    torch.testing.assert_close((model.layers[1].running_mean, model.layers[1].running_var), expected[right])


def test_a_part_of_an_epoch_is_trained_and_a_training_that_goes_on_from_there_is_whole(tmp_path):
    accelerator, model = Accelerator(cpu=True), network()
    recipe = OptimizerArguments(**{**vars(RECIPE), "epochs": 2.4})
    prepared = loaders(accelerator)
    state = fit(model, cross_entropy, prepared, recipe, accelerator, tmp_path, eval_metric="loss")
    expected = plain_loop(epochs=2.4)
    ends = [expected[4], expected[9], expected[11]]
    best = best_epoch(ends, "loss")
    assert (state.update, state.best_epoch, len(state.history)) == (12, best + 1, 3)
    same(model, ends[best])
    # The loader that was left in the middle of a pass gives whole passes afterwards.
    again = network()
    fit(again, cross_entropy, prepared, RECIPE, accelerator, tmp_path / "again", eval_metric="loss")
    whole = plain_loop()[4::5]
    same(again, whole[best_epoch(whole, "loss")])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (row for row in Rows(40))


def test_updates_in_place_of_epochs_of_data_with_a_length_and_of_a_stream(tmp_path):
    accelerator = Accelerator(cpu=True)
    prepared = loaders(accelerator)
    recipe = OptimizerArguments(**{**vars(RECIPE), "epochs": 99, "max_steps": 12, "eval_steps": 5})
    expected = plain_loop(epochs=2.4)
    ends = [expected[4], expected[9], expected[11]]
    for name in ("length", "stream"):
        if name == "stream":
            prepared["train"] = accelerator.prepare(DataLoader(Stream(), batch_size=BATCH))
        model = network()
        state = fit(model, cross_entropy, prepared, recipe, accelerator, tmp_path / name, eval_metric="loss")
        assert (state.update, len(state.history)) == (12, 3)
        same(model, ends[best_epoch(ends, "loss")])
    with pytest.raises(ValueError, match="give max_steps instead of epochs"):
        fit(network(), cross_entropy, prepared, RECIPE, accelerator, tmp_path)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), network()
    recipe = OptimizerArguments(**{**vars(RECIPE), "epochs": 1})
    state = fit(model, cross_entropy, loaders(accelerator, BATCH // 2), recipe, accelerator, tmp_path)
    reference, one = network(), Accelerator(cpu=True, gradient_accumulation_steps=1)
    fit(reference, cross_entropy, loaders(one), recipe, one, tmp_path / "one")
    assert state.update == 5
    same(model, reference.state_dict())


def test_moving_average_is_the_formula(tmp_path):
    accelerator, model = Accelerator(cpu=True), network()
    recipe = OptimizerArguments(**{**vars(RECIPE), "epochs": 1})
    fit(model, cross_entropy, loaders(accelerator), recipe, accelerator, tmp_path, model_ema=True, model_ema_decay=0.6)
    average, *states = plain_loop(epochs=1)
    for step, state in enumerate(states, start=1):
        # timm's warm-up of the decay.
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))
        average = {key: average[key] * decay + value * (1 - decay) for key, value in state.items()}
    same(model, average)


class Stop(Interrupt):
    """Asks for a stop at its `at`-th question."""

    def __init__(self, at):
        super().__init__()
        self.at, self.asked = at, 0

    def requested(self, accelerator):
        self.asked += 1
        return self.asked == self.at


def restartable(tmp_path):
    """A function that trains a network with dropout on small images, and gives its state dict and history."""
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    labels = {"label": [i % 3 for i in range(80)]}
    source = Dataset.from_dict({"image": list(images), **labels}, features=features)
    DatasetDict({"train": source}).save_to_disk(tmp_path / "data")
    data = load_image_data(str(tmp_path / "data"))
    config = {"input_size": (1, 8, 8), "mean": (0.3,), "std": (0.4,), "crop_pct": 1.0}
    accelerator = Accelerator(cpu=True)

    def train(folder, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        prepared = {k: accelerator.prepare(v) for k, v in build_loaders(data, config, batch_size=BATCH).items()}
        state = fit(model, cross_entropy, prepared, RECIPE, accelerator, folder, eval_metric="top1", **options)
        return model.state_dict(), state.history

    return train


def test_a_training_stopped_within_an_epoch_equals_the_whole_one_with_dropout_and_in_what_it_logs(tmp_path):
    train = restartable(tmp_path)
    whole, history = train(tmp_path / "whole")
    # Eight updates an epoch: the fourth update of the first epoch, and the second of the second.
    for at in (4, 6):
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", resume=at == 6, interrupt=Stop(at))
    parts, again = train(tmp_path / "parts", resume=True)
    assert again == history
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", "cut"),
        ("optimizer.bin", "flipped"),
        ("random_states_0.pkl", "missing"),
        ("best.safetensors", "flipped"),
        ("state.json", "cut"),
        ("state.json", "missing"),
    ],
)
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(tmp_path, capsys, file, damage):
    train = restartable(tmp_path)
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", interrupt=Stop(12), save_steps=2)
    kept = sorted(path.name for path in (tmp_path / "parts").glob("checkpoint*"))
    assert kept == ["checkpoint-10", "checkpoint-12"]
    spoil(tmp_path / "parts" / "checkpoint-12" / file, damage)
    capsys.readouterr()
    assert_same(train(tmp_path / "parts", resume=True), whole)
    printed = capsys.readouterr().out
    assert file in printed
    assert "going on from the checkpoint before" in printed
    assert "goes on from update 10 of" in printed


def spoil(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def assert_same(parts, whole):
    assert parts[1] == whole[1]
    assert all(torch.equal(value, parts[0][key]) for key, value in whole[0].items())


def test_without_a_whole_checkpoint_the_damaged_files_are_named(tmp_path):
    train = restartable(tmp_path)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", interrupt=Stop(5), save_steps=2, save_total_limit=1)
    (kept,) = (tmp_path / "parts").glob("checkpoint*")
    spoil(kept / "optimizer.bin", "flipped")
    with pytest.raises(
        DamagedError, match=r"optimizer.bin is damaged, and no other checkpoint is whole: remove "
    ) as caught:
        train(tmp_path / "parts", resume=True)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_processes_is_refused(tmp_path):
    train = restartable(tmp_path)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", interrupt=Stop(5))
    (state,) = tmp_path.glob("parts/checkpoint*/state.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 3}))
    with pytest.raises(DamagedError, match="written by 3 processes, and this run has 1"):
        train(tmp_path / "parts", resume=True)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path):
    train = restartable(tmp_path)
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", interrupt=Stop(4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"checkpoint.new cannot be written: .* MB are free there"):
            train(tmp_path / "parts", resume=True, interrupt=Stop(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-4"]
    assert_same(train(tmp_path / "parts", resume=True), whole)


@pytest.mark.parametrize("when", ["at once", "late", "validation"])
def test_a_loss_that_is_not_finite_ends_the_training_in_one_line(tmp_path, when):
    accelerator, prepared = Accelerator(cpu=True), loaders(Accelerator(cpu=True))
    model, recipe = network(), OptimizerArguments(**{**vars(RECIPE), "lr": 1e30 if when == "at once" else 0.1})
    if when == "validation":
        prepared["validation"].dataset.x[3] = math.inf

    def loss(model, images, labels, progress):
        return F.cross_entropy(model(images), labels) * (math.nan if when == "late" and progress > 0.7 else 1)

    with pytest.raises(DivergedError, match=r"train: the .*loss is no finite number any more at update") as caught:
        fit(model, loss, prepared, recipe, accelerator, tmp_path / "fit")
    assert "\n" not in str(caught.value)
    assert ("validation" in str(caught.value)) == (when == "validation")
    # What was saved before it is still there, and still good.
    assert (tmp_path / "fit" / "checkpoint-10").exists() == (when == "late")


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=4, img_size=16)
    model.set_strategy(3)
    model.calibrate([torch.randn(4, 3, 16, 16)])
    return model


def test_scales_and_norms_are_not_decayed_and_scales_have_their_own_rate(quantized):
    names = {id(p): name for name, p in quantized.named_parameters()}
    groups = parameter_groups(quantized, lr=0.1, weight_decay=0.3, scale_lr=0.05)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, group in found.items():
        if "quantizer" in name:
            assert (group["weight_decay"], group["lr"]) == (0.0, pytest.approx(0.005))
        elif name.endswith(("conv1.weight", "conv2.weight", "fc.weight", "downsample.0.weight")):
            assert (group["weight_decay"], group["lr"]) == (0.3, 0.1)
        else:
            assert (group["weight_decay"], group["lr"]) == (0.0, 0.1)
    # timm's optimizer keeps the groups.
    optimizer = create_optimizer(quantized, OptimizerArguments(opt="adamw", lr=0.1, weight_decay=0.3, scale_lr=0.05))
    assert sorted({g["weight_decay"] for g in optimizer.param_groups}) == [0.0, 0.3]
    assert sorted({round(g["lr"], 6) for g in optimizer.param_groups}) == [0.005, 0.1]


@pytest.mark.parametrize("use", ["forward", "save"])
def test_scales_stay_positive_whatever_the_optimizer_does(quantized, tmp_path, use):
    model = copy.deepcopy(quantized)
    images = torch.randn(2, *model.config.input_size)
    model.train()(images)
    scales = {n: p for n, p in model.named_parameters() if n.endswith((".scale", ".step"))}
    before = {n: p.item() for n, p in scales.items()}
    with torch.no_grad():
        for parameter in scales.values():
            parameter.sub_(1.0)
        scales["timm_model.fc.weight_quantizer.scale"].fill_(5.0)
    if use == "forward":
        model(images)
    else:
        model.save_pretrained(tmp_path, print_size=False)
    for name, parameter in scales.items():
        expected = 5.0 if name == "timm_model.fc.weight_quantizer.scale" else max(before[name] - 1, 0.01 * before[name])
        assert parameter.item() == pytest.approx(expected)


def test_least_scales_are_those_of_the_whole_training_after_a_resume(quantized, tmp_path):
    """Steps so long that the optimizer takes scales to their least values, which stay a hundredth of the fitted ones."""
    accelerator, generator = Accelerator(cpu=True), torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(quantized.config.input_size, generator=generator), "labels": torch.tensor(i % 4)}
        for i in range(24)
    ]
    prepared = {name: accelerator.prepare(DataLoader(rows, batch_size=4)) for name in ("train", "validation")}
    recipe = OptimizerArguments(epochs=1, opt="adamw", lr=0.02, warmup_epochs=0)

    def loss(model, images, labels, progress):
        return F.cross_entropy(model(pixel_values=images).logits, labels)

    def train(folder, **options):
        model = copy.deepcopy(quantized)
        fit(model, loss, prepared, recipe, accelerator, folder, eval_metric="loss", **options)
        return model

    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", interrupt=Stop(3))
    parts = train(tmp_path / "parts", resume=True)
    scales = {n: p.item() for n, p in whole.named_parameters() if n.endswith((".scale", ".step"))}
    fitted = dict(quantized.named_parameters())
    assert any(value == pytest.approx(0.01 * fitted[n].item(), rel=1e-5) for n, value in scales.items())
    assert all(torch.equal(value, parts.state_dict()[key]) for key, value in whole.state_dict().items())


def test_cosine_with_warm_up_keeps_the_ratio_of_the_rates(quantized):
    options = OptimizerArguments(epochs=10, lr=0.1, warmup_epochs=1, scale_lr=0.1)
    optimizer = create_optimizer(quantized, options)
    scheduler = create_scheduler(optimizer, options, updates_per_epoch=20)
    for step in range(200):
        scheduler.step_update(step)
        expected = 0.1 * step / 20 if step < 20 else 0.05 * (1 + math.cos(math.pi * step / 200))
        rates = sorted({g["lr"] for g in optimizer.param_groups})
        assert rates[-1] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert rates[0] == pytest.approx(expected / 10, rel=1e-6, abs=1e-9)


def test_distillation_and_kl_are_the_sums():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    loss, kl = 0.0, []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in t) for x in t]
        q = [math.exp(x) / sum(math.exp(y) for y in s) for x in s]
        loss -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / 6
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert distillation(student, teacher).item() == pytest.approx(loss, rel=1e-5)
    assert kl_divergence(student, teacher).tolist() == pytest.approx(kl, rel=1e-4)


def test_bin_regularization_counts_the_searchable_layers_once(quantized):
    total = total_bin_regularization(quantized)
    total.backward()
    touched = {name for name, layer in quantized.quantized_layers().items() if layer.weight.grad is not None}
    assert touched == set(quantized.strategy.searchable)
    assert all(layer.weight_quantizer.scale.grad is None for layer in quantized.quantized_layers().values())
    quantized.zero_grad()
    assert [ramp(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]


def test_evaluate_counts_every_image_once_and_puts_the_modes_back():
    data, model, accelerator = Rows(21, seed=3), network().train(), Accelerator(cpu=True)
    metrics = evaluate(model, accelerator.prepare(DataLoader(data, batch_size=8)), accelerator)
    with torch.no_grad():
        logits = model(data.x)
    assert model.training
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == data.y).double().mean().item())
    assert metrics["top5"] == 100
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, data.y).item(), rel=1e-5)
    with pytest.raises(ValueError, match="no image"):
        evaluate(model, [], accelerator)
