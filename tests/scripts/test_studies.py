"""The studies: a small run of each, on images of the bundled sample, and what they compute beside the library."""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from sdq_hf import SDQForImageClassification
from sdq_hf.training.data import BUNDLED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import study_ablations  # noqa: E402
import study_batch_norm  # noqa: E402
import study_bins  # noqa: E402
import study_landscape  # noqa: E402
import study_peers  # noqa: E402
import study_planted  # noqa: E402
import study_pretrained_search  # noqa: E402
import study_search  # noqa: E402
import study_signal  # noqa: E402
import study_stability  # noqa: E402
import study_transfer  # noqa: E402

TINY = (
    "--model resnet8_cifar --img_size 12 --max_train_samples 120 --max_eval_samples 300 --teacher_epochs 1 --epochs 1 "
    "--seeds 0"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which the float network is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with some of the sample, in the size of the runs: such images are kept decoded."""
    folder = tmp_path_factory.mktemp("images")
    for name, count in (("train", 600), ("test", 300)):
        split = Dataset.from_parquet(str(BUNDLED / f"{name}.parquet")).select(range(count))
        split.map(lambda row: {"image": row["image"].resize((12, 12))}).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture
def study(runs, images, monkeypatch, capsys):
    """A study is run as from the command line; gives what it printed and its cells."""

    def run(module, options, out):
        folders = ["--dataset", str(images), "--runs", str(runs), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["study", *TINY.split(), *folders, *options.split()])
        module.main()
        return capsys.readouterr().out, json.loads(out.read_text())["cells"]

    return run


def test_statistics_of_batch_norm_are_gathered_from_both_kinds_of_images(study, runs, tmp_path):
    out, options = tmp_path / "statistics-of.json", "--target_bits 5 --target_bitops --methods greedy"
    _, (cell,) = study(study_search, options, out)
    models = f"--of {out} --budget bits-5 --methods greedy --batches 2"
    printed, (found,) = study(study_batch_norm, models, tmp_path / "statistics.json")
    # The model as it was left is that of the study; two batches of images tell something else, of either kind.
    assert found["trained"] == {"kl": pytest.approx(cell["kl"], rel=1e-5), "top1": cell["top1"]}
    assert len({found[name]["kl"] for name in study_batch_norm.STATISTICS}) == 3
    assert f"| greedy | of clean images | {found['clean']['kl']:.4f} |  | {found['clean']['top1']:.2f} | 1 |" in printed
    with pytest.raises(SystemExit, match=r"No model table-bits-5 in .*run study_search\.py first"):
        study(study_batch_norm, models.replace("--methods greedy", "--methods table"), tmp_path / "statistics.json")


def test_a_search_study_goes_on_where_it_stopped_and_takes_the_search_off_the_finetune(study, tmp_path):
    out = tmp_path / "search.json"
    options = "--epochs 8 --target_bits 5 --target_bitops --search_batch_size 4 --methods"
    _, first = study(study_search, f"{options} two_sided", out)
    (cell,) = first
    train = json.loads(out.read_text())["images"]["train"]
    assert cell["search_backward_images"] == 4 * cell["search_batches"]
    assert cell["finetune_epochs"] == pytest.approx(8 - cell["search_backward_images"] / train, abs=0.006)
    assert cell["average_bits"] <= 5
    # A search that leaves nothing to train with is no result.
    _, (none,) = study(study_search, f"{options} two_sided --epochs 0.1", tmp_path / "none.json")
    assert "error" in none
    assert "kl" not in none
    printed, both = study(study_search, f"{options} two_sided greedy", out)
    assert both[0] == cell
    assert [c["method"] for c in both] == ["two_sided", "greedy"]
    assert printed.count("| 5 average bits, A4 |") == 2


def test_a_search_study_without_a_finetune_leaves_the_weights_alone(study, tmp_path):
    options = "--epochs 0 --start_bits 8 --target_bits 5 --target_bitops --search_batch_size 4 --methods two_sided"
    printed, (cell,) = study(study_search, options, tmp_path / "calibrated.json")
    assert cell["finetune_epochs"] == cell["finetune_seconds"] == 0
    # As it was found and as it was left differ in nothing but the images that batch norm statistics may come from.
    assert cell["validation"]["kl"] <= cell["found"]["kl"] * (1 + 1e-4)
    assert "| 5 average bits, A4 | two_sided |" in printed


def test_a_search_study_may_find_the_bits_of_inputs_too(study, tmp_path):
    options = "--epochs 4 --target_bits 5 --target_bitops 5 --search_batch_size 4 --methods two_sided_activations"
    # In average bits of weights, inputs have nothing to save: one cell for two budgets.
    printed, (cell,) = study(study_search, options, tmp_path / "activations.json")
    assert cell["cost"] == "bitops"
    assert len(set(cell["input_bits"])) > 1
    network = SDQForImageClassification.from_timm(
        "resnet8_cifar", img_size=12, num_labels=10, model_args={"in_chans": 1}
    )
    assert 0.95 < cell["bitops"] / network.strategy.with_bits(5).bitops() <= 1
    assert 0 < cell["finetune_epochs"] < 4
    assert "| 5 bits' BitOPs, A4 | two_sided_activations |" in printed


def test_differences_are_between_the_same_seeds_and_tested_in_pairs():
    def cell(method, seed, kl, validation):
        about = {"cost": "bits", "target": 2.0, "activation_bits": 4, "top1": 90.0, "average_bits": 2.0}
        return {"method": method, "seed": seed, "kl": kl, "validation": {"kl": validation}, **about}

    cells = [cell("two_sided", 0, 0.01, 0.02), cell("two_sided", 1, 0.02, 0.04), cell("two_sided", 2, 0.5, 0.5)]
    cells += [cell("hawq", 1, 0.023, 0.038), cell("hawq", 0, 0.011, 0.02), cell("hawq", 3, 0.9, 0.9)]
    # Differences of 0.001 and 0.003: t = 2, whose p-value has a closed form at one degree of freedom.
    p = 1 - 2 / math.pi * math.atan(2)
    (row,) = [line for line in study_search.table(cells).splitlines() if "hawq" in line]
    assert f"| 0.0020 ± 0.0010, p = {p:.2f} | -0.0010 ± 0.0010 |" in row


def test_ablations_are_compared_with_the_learned_strategy_of_the_same_seeds():
    def cell(value, seed, kl, top1):
        return {"part": "strategy", "value": value, "seed": seed, "kl": kl, "top1": top1, "average_bits": 2.0}

    cells = [cell("learned", 0, 0.01, 90.0), cell("learned", 1, 0.03, 91.0), cell("learned", 2, 0.9, 10.0)]
    cells += [cell("uniform", 1, 0.05, 89.0), cell("uniform", 0, 0.014, 89.0)]
    learned, uniform = study_ablations.table(cells).splitlines()[2:]
    # Differences of 0.02 and 0.004 nats, and of 2 points and 1.
    assert uniform == (
        "| uniform strategy | 0.0320 ± 0.0180 | 0.0120 ± 0.0080 | 89.00 ± 0.00 | -1.50 ± 0.50 | 2.00 | 2 |"
    )
    assert learned.count("|  |") == 2


@pytest.mark.parametrize("study", [study_search, study_planted, study_landscape, study_ablations, study_signal])
def test_a_study_without_results_has_a_table_of_none(study, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["study", "--table", "--out", str(tmp_path / "none.json")])
    study.main()
    assert "|---|" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_float_rows_of_a_search_study_are_the_float_network_trained_on(study, tmp_path):
    options = "--epochs 2 --methods float float_kd --target_bits --target_bitops"
    printed, (labels, distilled) = study(study_search, options, tmp_path / "float.json")
    # Away from the network that it was, and less so where it learned from that network alone.
    assert labels["kl"] > 2 * distilled["kl"] >= 0
    assert "| float | float_kd |" in printed


def test_the_study_of_signals_ranks_them_against_the_true_damage(study, tmp_path):
    printed, (cell,) = study(
        study_signal, "--bits 2 --batches 12 --search_batch_size 20", tmp_path / "study_signal.json"
    )
    assert set(cell["rank"]) >= {"two_sided", "upper", "lower", "table", "hawq", "greedy", "size"}
    assert all(-1 <= value <= 1 for value in cell["rank"].values())
    assert "| mean of both sides (SDQ) |" in printed


def test_the_study_of_landscapes_has_four_surfaces_and_a_picture(study, tmp_path):
    options = "--updates 2 --points 3 --draws 2 --images 20 --batches 12 --search_batch_size 20"
    picture = tmp_path / "surfaces.png"
    _, (cell,) = study(study_landscape, f"{options} --picture {picture}", tmp_path / "study_landscape.json")
    for trained in cell["surfaces"].values():
        for kind, rows in trained.items():
            assert np.shape(rows) == (3, 3), kind
    assert picture.stat().st_size > 10_000
    # A plane has no roughness; noise has that of second differences of white noise, root 6.
    plane = np.add.outer(np.arange(9.0), 2 * np.arange(9.0))
    assert study_landscape.roughness(plane) < 1e-12
    noise = np.random.default_rng(0).normal(size=(200, 200))
    assert study_landscape.roughness(noise) == pytest.approx(math.sqrt(6), rel=0.05)


def test_one_descent_gives_the_strategies_of_a_search_for_each_budget(study, tmp_path):
    options = "--several_bits 4.5 5 --target_bitops 5 --search_seeds 0 --orders 7 --options --search_batch_size 8"
    printed, cells = study(study_stability, options, tmp_path / "study_stability.json")
    default, thorough, order, descents = cells
    # The same strategy, fine-tuned with images in another order.
    assert order["bits"] == default["bits"]
    assert order["validation"]["kl"] != default["validation"]["kl"]
    assert thorough["search_images"] > 3 * default["search_images"]
    assert descents["bits_of"]["one"] == descents["bits_of"]["separate"]
    assert descents["images_of"]["one"] < descents["images_of"]["separate"]
    assert "give the same strategy at 2." in printed


def test_ablations_change_what_they_say(study, runs, tmp_path):
    _, cells = study(
        study_ablations,
        "--parts strategy ebr_dorefa --ebr 0 1 --target_bits 4 --epochs 2 --search_batch_size 8",
        tmp_path / "study_ablations.json",
    )
    by_name = {(cell["part"], cell["value"]): cell for cell in cells}
    assert set(by_name["strategy", "uniform"]["bits"]) == {4}
    assert by_name["strategy", "learned"]["bits"] != by_name["strategy", "reversed"]["bits"]
    assert by_name["ebr_dorefa", "0"]["kl"] != by_name["strategy", "learned"]["kl"]
    # The regularizer is in the loss of the training, from its second update on.
    folder = runs / "resnet8_cifar-0-study_ablations-a4-0of1" / "finetune"
    records = [json.loads((folder / f"ebr_dorefa-{value}.json").read_text()) for value in ("0", "1")]
    without, heavy = (record["history"][-1]["train_loss"] for record in records)
    assert heavy > without + 0.01


def test_planting_changes_no_output_and_hides_the_small_channels(study, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet8_cifar", num_classes=10).eval()
    planted = copy.deepcopy(network)
    study_planted.plant(planted, seed=3, factor=8.0)
    images = torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(planted(images), network(images), atol=1e-3, rtol=1e-3)
    names = study_planted.planted_layers(list(study_planted.pairs(network)), seed=3)
    assert len(names) == len(study_planted.pairs(network)) // 2
    for name, (conv, _) in study_planted.pairs(planted).items():
        rows = (conv.weight / study_planted.pairs(network)[name][0].weight).flatten(1).mean(1)
        large = (rows - 8).abs() < 1e-4
        assert int(large.sum()) == (conv.out_channels // 8 if name in names else 0)
    printed, cells = study(study_planted, "--methods greedy uniform --target_bitops 3", tmp_path / "planted.json")
    assert [len(cell["planted"]) for cell in cells] == [4, 4]
    assert cells[1]["auc"] == 0.5
    assert set(cells[1]["bits"]) == {3}
    assert "| greedy |" in printed


def test_the_study_of_peers_measures_sdq_where_no_peer_is_installed(study, tmp_path):
    options = "--peers sdq --target_bits 5 --search_batch_size 4 --epochs 8 --lrs 0.003"
    printed, (cell,) = study(study_peers, options, tmp_path / "peers.json")
    sizes = {
        name: layer.num_weights
        for name, layer in SDQForImageClassification.from_timm(
            "resnet8_cifar", img_size=12, num_labels=10
        ).strategy.items()
    }
    inner = list(zip(sizes.values(), cell["bits"], strict=True))[1:-1]
    assert cell["average_bits"] == pytest.approx(sum(n * b for n, b in inner) / sum(n for n, _ in inner))
    assert 4.9 <= cell["average_bits"] <= 5
    assert cell["file_bytes"] > cell["weight_bytes"]
    assert 0 < cell["epochs"] < 8
    assert "| sdq |" in printed


def test_the_study_of_peers_may_leave_out_the_training(study, tmp_path):
    options = "--peers sdq_channel --target_bits 5 --epochs 0 --lrs 0.1 0.2 --images 128"
    printed, (layer, channel) = study(study_peers, options, tmp_path / "calibrated-peers.json")
    assert (layer["peer"], channel["peer"]) == ("sdq", "sdq_channel")
    assert layer["epochs"] == channel["epochs"] == 0
    # A scale for each output channel is in the file.
    assert channel["file_bytes"] > layer["file_bytes"]
    assert printed.count("| not trained |") == 2


def test_the_area_under_the_curve_counts_pairs():
    assert study_planted.auc([3, 2], [1, 1]) == 1
    assert study_planted.auc([1, 3], [2, 1]) == pytest.approx((0 + 0.5 + 1 + 1) / 4)


def test_bins_are_described_as_a_plain_loop_finds_them(study, tmp_path):
    picture = tmp_path / "bins.png"
    printed, _ = study(study_bins, f"--quantizers dorefa --ebr 0 30 --picture {picture}", tmp_path / "study_bins.json")
    assert picture.stat().st_size > 10_000
    assert "| dorefa, 3 | 30 |" in printed
    model = SDQForImageClassification.from_timm("resnet8_cifar", img_size=12)
    model.set_strategy(2)
    found = study_bins.bins_of(model)
    for name in model.strategy.searchable:
        layer = model.quantized_layers()[name]
        scale, weights = layer.weight_quantizer.scale.item(), layer.weight.flatten().tolist()
        levels = [-scale, -scale / 3, scale / 3, scale]
        nearest = [min(range(4), key=lambda n: abs(w - levels[n])) for w in weights]
        shares = [nearest.count(n) / len(weights) for n in range(4)]
        entropy = -sum(p * math.log2(p) for p in shares if p) / 2
        assert found["entropy"][name] == pytest.approx(entropy, abs=1e-3)
        # Weights beyond the clip count as standing on it.
        squares = [(min(max(w, -scale), scale) - levels[n]) ** 2 for w, n in zip(weights, nearest, strict=True)]
        rms = math.sqrt(sum(squares) / len(squares)) / (2 * scale / 3)
        assert found["distance"][name] == pytest.approx(rms, rel=1e-3)
    assert set(found["histograms"]) <= set(found["entropy"])


def test_reversed_bits_have_the_same_average_and_the_opposite_order():
    model = SDQForImageClassification.from_timm("resnet20_cifar", img_size=16)
    names = model.strategy.searchable
    learned = model.strategy.with_bits({name: 2 + index % 4 for index, name in enumerate(names)})
    turned = study_ablations.reversed_bits(learned, model.config.candidates)
    assert 0 <= learned.average_bits() - turned.average_bits() < 0.15
    pairs = [
        (learned[a].weight_bits - learned[b].weight_bits, turned[a].weight_bits - turned[b].weight_bits)
        for a in names
        for b in names
    ]
    assert sum(x * y for x, y in pairs) < 0


def test_agreement_beyond_cost_is_none_where_cost_explains_all():
    costs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    falling = [8, 7, 6, 5, 4, 3]
    noisy = [[7, 8, 6, 5, 4, 3], [8, 7, 5, 6, 4, 3], [8, 7, 6, 5, 3, 4]]
    plain, partial = study_stability.agreement(noisy, costs)
    assert plain > 0.85
    assert abs(partial) < 0.5
    # The same deviation from what cost says, in all of them.
    same = [3, 7, 6, 5, 4, 8]
    plain, partial = study_stability.agreement([same, same, same], costs)
    assert (plain, partial) == (pytest.approx(1), pytest.approx(1))
    assert np.isfinite(study_stability.agreement([falling, noisy[0]], costs)[0])


@pytest.fixture
def emoji(tmp_path):
    """Two packages with red and green pictures of 8 pixels, and files that are not wanted."""
    files = [(f"1f{number:03x}.png", ("Food & Drink", "Flags")[number % 2]) for number in range(60)]
    entries = [{"image": file, "unified": file[:-4].upper(), "category": group} for file, group in files]
    entries += [{"image": "1f3fb.png", "unified": "1F3FB", "category": "Component"}]
    entries += [{"image": "1f3c3-200d.png", "unified": "1F3C3-200D-2640", "category": "Flags"}]
    entries = [{**entry, "has_img_google": True, "has_img_twitter": True} for entry in entries]
    entries += [{**entries[0], "image": "1ffff.png", "has_img_twitter": False}]
    for drawing in ("google", "twitter"):
        folder = tmp_path / "packages" / f"emoji-datasource-{drawing}"
        (folder / "img" / drawing / "64").mkdir(parents=True)
        (folder / "emoji.json").write_text(json.dumps(entries))
        for file, group in files:
            color = (200, 0, 0, 255) if group == "Flags" else (0, 200, 0, 255)
            Image.new("RGBA", (8, 8), color).save(folder / "img" / drawing / "64" / file)
    return tmp_path / "packages"


def test_no_emoji_is_in_two_splits_and_each_class_has_its_share_in_all(emoji, tmp_path):
    study_transfer.write_images(emoji, tmp_path / "images")
    names: dict[str, set[str]] = {}
    for split, count in (("train", 18), ("validation", 4), ("test", 8)):
        for group in ("food", "flags"):
            found = sorted(path.name for path in (tmp_path / "images" / split / group).iterdir())
            assert len(found) == 2 * count
            google, twitter = (
                {name.removeprefix(f"{drawing}-") for name in found if name.startswith(drawing)}
                for drawing in ("google", "twitter")
            )
            assert google == twitter
            names.setdefault(split, set()).update(google)
    assert len(set.union(*names.values())) == sum(map(len, names.values())) == 60
    assert {path.name for path in (tmp_path / "images").iterdir()} == set(names)


def test_transparent_places_of_an_emoji_are_white():
    emoji = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    emoji.putpixel((1, 0), (10, 20, 30, 0))
    pixels = np.asarray(study_transfer.on_white(emoji))
    margin = study_transfer.MARGIN
    assert pixels.shape == (1 + 2 * margin, 2 + 2 * margin, 3)
    assert pixels[margin, margin].tolist() == [10, 20, 30]
    pixels = pixels.reshape(-1, 3)
    assert (pixels == 255).all(1).sum() == len(pixels) - 1


def test_a_transfer_study_starts_from_the_weights_of_its_file(study, runs, emoji, tmp_path):
    torch.manual_seed(5)
    network = timm.create_model("resnet8_cifar", num_classes=10)
    save_file(network.state_dict(), tmp_path / "resnet8_cifar.safetensors")
    options = f"--emoji {emoji} --runs {tmp_path} --batch_size 8 --search_batch_size 8 --float_lr 1e-9 --rows 1 3"
    printed, cells = study(study_transfer, options, tmp_path / "transfer.json")
    trained = load_file(tmp_path / "resnet8_cifar-0-1epochs" / "teacher" / "model.safetensors")
    torch.testing.assert_close(trained["layer2.0.conv1.weight"], network.layer2[0].conv1.weight, atol=1e-4, rtol=0)
    assert [cell["method"] for cell in cells] == ["float", "uniform", "two_sided"]
    assert cells[0]["kl"] == 0
    assert set(cells[1]["bits"]) == {4}
    assert cells[2]["bitops"] < cells[1]["bitops"] < cells[0]["bitops"]
    assert [cell["finetune_epochs"] for cell in cells[1:]] == [1, 1]
    # One descent for all budgets of the method: that of 2 bits is passed on the way.
    log = json.loads(next(tmp_path.glob("*-a8-*/search/two_sided-bitops.json")).read_text())
    assert len(log["strategies"]) == 2
    assert cells[2]["search_images"] == log["backward_images"] > 0
    assert "| two_sided at 3 bits' BitOPs | 8 | layer | 1 |" in printed


def test_bits_of_pretrained_weights_are_judged_by_the_other_half(tmp_path, monkeypatch, capsys):
    """With random weights and images in place of those of the packages."""
    torch.manual_seed(0)
    architecture = "tf_efficientnet_lite1"
    network = timm.create_model(architecture).eval()
    images = torch.randn(4, 5, 3, 32, 32)
    monkeypatch.setattr(study_pretrained_search, "pretrained_network", {architecture: network}.__getitem__)
    monkeypatch.setattr(study_pretrained_search, "photographs", lambda: range(4))
    monkeypatch.setattr(study_pretrained_search, "crops", lambda number, name: {architecture: images}[name][number])
    out = tmp_path / "found.json"
    options = ["--methods", "uniform", "--targets", "6", "4", "--halves", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["study", "--network", architecture, *options])
    study_pretrained_search.main()
    printed, cells = capsys.readouterr().out, json.loads(out.read_text())["cells"]
    places = [(cell["method"], cell["target"], cell["half"]) for cell in cells]
    assert places == [("uniform", 6, 1), ("uniform", 4, 1)]
    model = SDQForImageClassification.from_float(network, architecture, activation_bits=8)
    model.set_strategy(4)
    model.calibrate([images[::2].flatten(0, 1)])
    with torch.no_grad():
        output, target = (net(images[1::2].flatten(0, 1)) for net in (model.eval(), network))
    output, target = output.logits.double().log_softmax(-1), target.double().log_softmax(-1)
    kl = (target.exp() * (target - output)).sum(-1).mean().item()
    same = (output.argmax(-1) == target.argmax(-1)).sum().item()
    assert cells[1]["kl"] == pytest.approx(kl, rel=1e-3)
    assert (cells[1]["same"], cells[1]["views"]) == (same, 10)
    assert f"| lite1 | layer | 4 average bits | uniform | {kl:.3f} | {same} of 10" in printed
    # What is there is not made again.
    monkeypatch.setattr(study_pretrained_search, "search", None)
    study_pretrained_search.main()
    assert json.loads(out.read_text())["cells"] == cells


def test_crops_are_seen_in_another_order_in_each_epoch():
    images = torch.arange(5.0).view(5, 1, 1, 1) + torch.tensor([0.0, 0.5])
    batches = study_pretrained_search.Crops(images, 2)
    first, again = list(batches), list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert all(map(torch.equal, first, again))
    values = [torch.cat([batch[:, 0, 0].floor().amax(1) for batch in epoch]) for epoch in (first, second)]
    assert not torch.equal(*values)
    assert all(torch.equal(v.sort().values, torch.arange(5.0)) for v in values)
    assert [batch[0, 0, 0, 0] % 1 for batch in first] == [0, 0.5, 0]
