import copy
import json
from itertools import cycle, islice
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from sdq_hf import SDQForImageClassification
from sdq_hf.costs import COSTS
from sdq_hf.quantizers.stochastic import draw
from sdq_hf.quantizers.weight import best_scale, fake_quantize
from sdq_hf.search import BudgetError, SearchLog, search
from sdq_hf.search.descent import Descent
from sdq_hf.search.stochastic_weights import StochasticWeights
from sdq_hf.search.units import units_of
from sdq_hf.search.updates import RunningMean, TwoSided
from tests.planted import Images, planted_network
from tests.search.descents import descent


def run_down(way):
    """Step the largest saving down until done, with damages that fall with size."""
    while not way.done:
        name = max(way.movable, key=way.saved)
        way.step_down(name, damage=1 / way.saved(name))
    return way.strategies()


@pytest.mark.parametrize("budget", [1.5, 2.0, 2.7, 3.6])
def test_lands_just_under_the_budget(budget):
    sizes = [900, 700, 500, 300, 200, 100, 50, 40, 30, 20, 10, 5, 4, 3]
    (found,) = run_down(descent([budget], sizes=sizes))
    assert budget - 0.05 <= found.average_bits() <= budget


def test_several_budgets_are_met_on_one_way_down_in_the_order_asked_for():
    budgets = [2.0, 4.0, 3.0]
    found = run_down(descent(budgets, sizes=[900, 700, 500, 300, 200, 100, 50, 40, 30, 20, 10]))
    assert [round(s.average_bits(), 1) for s in found] == budgets


def test_candidates_with_gaps_and_floors_are_kept():
    (found,) = run_down(descent([3.0], sizes=[90, 80, 70, 60, 50], candidates=[2, 4, 8], floors={"l1": 3}))
    assert set(found.weight_bits.values()) <= {2, 4, 8}
    assert found["l1"].weight_bits >= 4


@pytest.mark.parametrize("budget", [0.9, 8.1])
def test_a_budget_out_of_reach_is_refused_with_the_range(budget):
    with pytest.raises(BudgetError, match="between 1 and 8"):
        descent([budget])


def test_starts_at_six_or_above_every_budget():
    assert set(descent([2.0]).start.values()) == {6}
    assert set(descent([6.5]).start.values()) == {7}
    assert set(descent([2.0], candidates=[2, 4, 8]).start.values()) == {8}
    assert set(descent([1.5], candidates=[1, 2, 4]).start.values()) == {4}
    # A budget that uniform bits meet exactly is met by them.
    way = descent([7.0], sizes=(1024, 512))
    assert set(way.start.values()) == {7}
    assert way.done


def test_a_start_below_the_budget_is_refused():
    with pytest.raises(BudgetError, match="start above it"):
        descent([3.0], start_bits=2)


def test_running_mean_is_the_weighted_mean():
    values = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = RunningMean(keep=0.9)
    for value in values.tolist():
        mean.add(value)
    weights = 0.9 ** torch.arange(29, -1, -1, dtype=torch.float64)
    expected = (weights * values).sum() / weights.sum()
    assert mean.mean == pytest.approx(expected.item())
    share = weights.square().sum() / weights.sum() ** 2
    variance = (weights * (values - expected) ** 2).sum() / weights.sum() / (1 - share)
    assert mean.error == pytest.approx((variance * share).sqrt().item())


def test_two_sided_estimate_is_exact_for_a_quadratic_loss():
    """L(low) - L(up) of a quadratic is the mean of the gradients at both ends times the way between them."""
    way = descent([2.0])
    update = TwoSided(way, seed=0)
    curvature, slope = 3.0, -0.4

    def gradient(x):
        return slope + curvature * x

    for step in range(40):
        drawn = update.draw(step)
        assert set(drawn.values()) <= {0.0, 1.0}
        update.observe({n: gradient(drawn[n]) for n in way.names}, drawn)
    truth = -(slope + curvature / 2)
    assert all(damage == pytest.approx(truth) for damage, _ in update.estimates().values())
    assert update.next_moves()


def test_from_two_bits_the_estimate_is_exact_for_a_loss_of_fourth_order():
    """The step to one bit is long: the mean of both ends would be far off."""
    way = descent([1.5], start_bits=2)
    update, loss = TwoSided(way, seed=0), np.polynomial.Polynomial([0.3, -0.4, 1.5, -2.0, 4.0])
    gradient, shares = loss.deriv(), []
    for step in range(200):
        drawn = update.draw(step)
        shares += drawn.values()
        update.observe({n: gradient(drawn[n]) for n in way.names}, drawn)
    assert all(damage == pytest.approx(loss(0) - loss(1)) for damage, _ in update.estimates().values())
    assert abs(-(gradient(0) + gradient(1)) / 2 - (loss(0) - loss(1))) > 1
    # Both ends a quarter of the time each.
    assert [shares.count(share) / len(shares) for share in (1.0, 0.5, 0.0)] == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.02
    )


@pytest.mark.parametrize(("other", "growth", "expected"), [(0.39, 4.0, "l1"), (0.41, 4.0, None), (0.39, 0.0, None)])
def test_a_layer_that_has_just_stepped_holds_the_others_up_only_while_it_may_be_the_best_again(other, growth, expected):
    """Damage 0.1, so four times that is expected next; all layers save the same."""
    way = descent([2.0], sizes=(100, 100, 100))
    update, damages = TwoSided(way, seed=0, growth=growth), {"l0": 0.1, "l1": other, "l2": 0.9}
    for step in range(40):
        drawn = update.draw(step)
        update.observe({name: -damage for name, damage in damages.items()}, drawn)
    (move,) = update.next_moves()
    assert move.layer == "l0"
    way.step_down("l0", move.damage)
    update.reset("l0")
    # The same after a resume.
    resumed = TwoSided(way, seed=0, growth=growth)
    resumed.load_state_dict(json.loads(json.dumps(update.state_dict())))
    for one in (update, resumed):
        assert [move.layer for move in one.next_moves()] == ([expected] if expected else [])


@pytest.fixture(scope="module")
def planted():
    return planted_network()


DEAD = ("layer3.0.conv1", "layer3.0.conv2")
ALIVE = ("layer1.0.conv1", "layer1.0.conv2")


@pytest.mark.parametrize("seed", [0, 1])
def test_two_sided_search_finds_planted_sensitivities_and_a_size_rule_does_not(planted, seed):
    reference = planted.strategy
    model = copy.deepcopy(planted)
    # At equal cost in BitOPs the shapes of stage 1 and 3 weigh the same, so size alone cannot tell them apart.
    budget = float(reference.with_bits(3).bitops())
    accelerator = Accelerator(cpu=True)
    (learned,) = search(model, Images(), [budget], "bitops", seed=seed, accelerator=accelerator)
    bits = learned.weight_bits
    assert max(bits[name] for name in DEAD) < min(bits[name] for name in ALIVE)
    assert all(bits[name] == 1 for name in DEAD)
    (by_size,) = search(model, None, [budget], "bitops", "greedy")
    dead_by_size = [by_size.weight_bits[name] for name in DEAD]
    assert max(dead_by_size) > 1


def test_search_leaves_the_model_as_it_was_and_is_reproducible(planted):
    model = copy.deepcopy(planted)
    model.calibrate(Images())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    log = SearchLog()
    first = search(model, Images(), [3.0, 2.0], seed=4, log=log, accelerator=Accelerator(cpu=True))
    second = search(model, Images(), [3.0, 2.0], seed=4, accelerator=Accelerator(cpu=True))
    assert first == second
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    # The log tells the way: bits only fall, one layer at a time, and each move continues the one before.
    bits = dict.fromkeys(model.strategy.searchable, 6)
    for move in log.moves:
        assert bits[move["layer"]] == move["from"] > move["to"]
        bits[move["layer"]] = move["to"]
    assert all(a["cost"] > b["cost"] for a, b in zip(log.moves, log.moves[1:], strict=False))
    assert {len(v) for v in log.estimates[-1]["layers"].values()} == {3}


@pytest.mark.parametrize("weight_lr", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("method", "start", "budget"), [("two_sided", 6, 4.0), ("two_sided", 2, 1.5), ("paper", 6, 4.0)]
)
def test_a_resumed_search_equals_the_uninterrupted_one(planted, method, start, budget, weight_lr):
    model = copy.deepcopy(planted)
    model.calibrate(Images())
    kwargs = {"method": method, "weight_lr": weight_lr, "start_bits": start, "seed": 1}
    kwargs["accelerator"] = Accelerator(cpu=True)
    kwargs |= {"lr": 30.0} if method == "paper" else {}
    whole = SearchLog()
    expected = search(model, Images(), [budget], log=whole, **kwargs)
    kept = SimpleNamespace(state=None)

    def stop(step):
        if step.batch == 12:
            kept.state = copy.deepcopy(step.state_dict())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, Images(), [budget], on_step=stop, **kwargs)
    log = SearchLog()
    assert search(model, Images(), [budget], log=log, resume_from=kept.state, **kwargs) == expected
    assert log == whole
    trained = {name for name in kept.state["tensors"] if name.endswith(".weight")}
    assert bool(trained) == (weight_lr > 0)
    kwargs["weight_lr"] = 1e-3 - weight_lr
    with pytest.raises(ValueError, match="resume it with the weight_lr that it had"):
        search(model, Images(), [budget], resume_from=kept.state, **kwargs)


@pytest.mark.parametrize("trained", [False, True])
def test_drawn_weights_are_the_quantized_ones_and_gradients_are_those_of_the_choice(planted, trained):
    model = copy.deepcopy(planted).eval()
    name, names = "layer2.0.conv1", list(planted.strategy.searchable)
    layer, images = model.quantized_layers()[name], Images().batches[0]["pixel_values"][:4]
    model.calibrate([images])
    way = Descent(model.strategy, COSTS["bits"], [2.0], model.config.candidates, start_bits=3)
    weights = StochasticWeights(model, way, trained=trained)
    weights.start()
    for upper in (True, False):
        weights.choose(dict.fromkeys(names, upper))
        model.zero_grad()
        model(images).logits.square().sum().backward()
        gate = dict(zip(names, weights.gradients(), strict=True))[name]
        # The same network at fixed bits: its gradient to the quantized weight is what both gradients come from.
        fixed = copy.deepcopy(planted).eval()
        fixed.set_strategy(3 if upper else 2)
        fixed.timm_model.load_state_dict(
            {k: v for k, v in model.timm_model.state_dict().items() if "weight_quantizer" not in k}, strict=False
        )
        sides = {}
        for bits in (3, 2):
            scale = best_scale(layer.weight, "lsq", "midrise", bits)
            sides[bits] = fake_quantize(layer.weight.detach(), "lsq", "midrise", bits, scale)
        leaf = sides[3 if upper else 2].clone().requires_grad_()
        fixed.quantized_layers()[name].weight_source = lambda _, leaf=leaf: leaf
        fixed(images).logits.square().sum().backward()
        torch.testing.assert_close(gate, (leaf.grad * (sides[3] - sides[2])).sum(), rtol=1e-3, atol=1e-5)
        if trained:
            scale = best_scale(layer.weight, "lsq", "midrise", 3 if upper else 2)
            inside = layer.weight.detach().abs() <= scale
            torch.testing.assert_close(layer.weight.grad, leaf.grad * inside, rtol=1e-3, atol=1e-5)
        elif layer.weight.grad is not None:
            assert layer.weight.grad.abs().max() == 0
    weights.clear()


def test_weights_halfway_are_the_mean_and_train_through_both(planted):
    model, name = copy.deepcopy(planted).eval(), "layer2.0.conv1"
    way = Descent(model.strategy, COSTS["bits"], [1.0], model.config.candidates, start_bits=2)
    layer, weights = model.quantized_layers()[name], StochasticWeights(model, way, trained=True)
    weights.start()
    weights.choose(dict.fromkeys(way.names, 0.5))
    halfway = layer.quantized_weight()
    scales = {bits: best_scale(layer.weight, "lsq", "midrise", bits) for bits in (2, 1)}
    sides = [fake_quantize(layer.weight.detach(), "lsq", "midrise", bits, scales[bits]) for bits in (2, 1)]
    torch.testing.assert_close(halfway, (sides[0] + sides[1]) / 2)
    grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    (halfway * grad).sum().backward()
    inside = sum((layer.weight.detach().abs() <= scale).float() for scale in scales.values()) / 2
    torch.testing.assert_close(layer.weight.grad, grad * inside)
    gate = dict(zip(way.names, weights.gradients().tolist(), strict=True))[name]
    assert gate == pytest.approx((grad * (sides[0] - sides[1])).sum().item(), rel=1e-4)
    weights.clear()


@pytest.mark.parametrize("granularity", ["layer", "kernel"])
def test_the_backward_pass_is_left_one_copy_of_a_layers_weights(granularity):
    model = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=10, granularity=granularity)
    layer, images = model.quantized_layers()["layer2.0.conv1"], Images().batches[0]["pixel_values"][:4]
    model.calibrate([images])
    units = units_of(model.timm_model, model.strategy, granularity)
    way = Descent(model.strategy, COSTS["bits"], [2.0], model.config.candidates, start_bits=3, units=units)
    weights, kept = StochasticWeights(model, way, trained=True), []
    weights.start()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(images)
    copies = {x.data_ptr() for x in kept if x.shape == layer.weight.shape} - {layer.weight.data_ptr()}
    assert len(copies) == 1
    weights.clear()


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_batch_norm_has_the_statistics_that_are_asked_for(planted, batch_norm):
    """The loss of the first batch is that of the network in that mode, at the bits drawn."""
    model, images, seen = copy.deepcopy(planted), Images().batches[0]["pixel_values"][:5] + 1, []
    model.calibrate([images])
    before = copy.deepcopy(model.state_dict())
    options = {"weight_lr": 0.0, "start_bits": 3, "accelerator": Accelerator(cpu=True), "on_step": seen.append}
    with pytest.raises(BudgetError):
        search(model, [images], [2.0], batch_norm=batch_norm, max_batches=1, **options)
    fixed, names = copy.deepcopy(model).eval(), model.strategy.searchable
    uniform = draw(0, 0, len(names)).tolist()
    fixed.set_strategy({name: 3 if u < 0.5 else 2 for name, u in zip(names, uniform, strict=True)})
    for module in fixed.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.training = batch_norm == "batch"
    with torch.no_grad():
        target, output = model.float_twin().eval()(images), fixed(images).logits
    kl = F.kl_div(output.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    assert seen[0].loss == pytest.approx(kl.item(), rel=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_so_it_has_in_the_relaxed_searches(planted, batch_norm):
    model, modes = copy.deepcopy(planted), set()

    def look(state):
        modes.update(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))

    options = {"batches": 2, "accelerator": Accelerator(cpu=True), "on_step": look}
    search(model, Images(), [3.0], method="fracbits", batch_norm=batch_norm, **options)
    assert modes == {batch_norm == "batch"}


def test_weights_follow_the_search_and_frozen_ones_give_another_answer(planted):
    """With a teacher that the float weights are far from, training along lowers the loss."""
    model = copy.deepcopy(planted)
    model.calibrate(Images())
    other = timm.create_model("resnet8_cifar", num_classes=10).eval()
    losses = {}
    for lr in (0.0, 3e-3):
        seen = []
        search(
            copy.deepcopy(model),
            Images(),
            [4.0],
            teacher=other,
            weight_lr=lr,
            on_step=lambda step, seen=seen: seen.append(step.loss),
            accelerator=Accelerator(cpu=True),
        )
        losses[lr] = sum(seen[-10:]) / 10
    assert losses[3e-3] < 0.5 * losses[0.0]


def test_paper_search_moves_and_meets_its_budget(planted):
    model = copy.deepcopy(planted)
    (found,) = search(model, Images(), [3.0], method="paper", lr=30.0, accelerator=Accelerator(cpu=True))
    assert 2.5 <= found.average_bits() <= 3.0


def test_wrong_arguments_are_named(planted):
    with pytest.raises(ValueError, match="Did you mean 'two_sided'"):
        search(planted, Images(), [2.0], method="two_side")
    with pytest.raises(ValueError, match="no searchable layer matches 'stem"):
        search(planted, Images(), [2.0], floors={"stem*": 3})
    with pytest.raises(ValueError, match="no batch"):
        search(copy.deepcopy(planted), [], [2.0], accelerator=Accelerator(cpu=True))
    for budgets in (2.0, "2.0", None, [], [2.0, "3"], [True]):
        with pytest.raises(ValueError, match="budgets must be a list of numbers"):
            search(planted, Images(), budgets)
    for bits in ("4", 4.0, None, True):
        with pytest.raises(ValueError, match=r"floors\['\*'\] must be a whole number of bits"):
            search(planted, Images(), [4.0], floors={"*": bits})
    with pytest.raises(ValueError, match="floors must map patterns"):
        search(planted, Images(), [4.0], floors=4)
    for rate in (-1, float("nan"), float("inf"), "0.1", None):
        with pytest.raises(ValueError, match="weight_lr must be a number of at least 0"):
            search(planted, Images(), [2.0], weight_lr=rate)
    with pytest.raises(ValueError, match="batch_norm must be 'batch' or 'running', got 'eval'"):
        search(planted, Images(), [2.0], batch_norm="eval")


def test_numbers_of_numpy_are_numbers(planted):
    expected = search(planted, None, [3.0, 2.0], method="greedy", floors={"*": 2})
    assert search(planted, None, np.array([3.0, 2.0]), method="greedy", floors={"*": np.int64(2)}) == expected
    assert search(planted, None, (np.float32(3), 2), method="greedy", floors={"*": 2}) == expected


@pytest.mark.parametrize(
    ("method", "options"), [("two_sided", {}), ("table", {"images": 8}), ("fracbits", {"batches": 4})]
)
def test_images_alone_give_what_batches_with_labels_give(planted, method, options):
    batches = [{**batch, "labels": torch.zeros(len(batch["pixel_values"]))} for batch in islice(Images(), 4)]
    alone = [batch["pixel_values"] for batch in batches]
    expected, found = (
        search(copy.deepcopy(planted), data, [5.5], method=method, accelerator=Accelerator(cpu=True), **options)
        for data in (batches, alone)
    )
    assert found == expected


def test_an_iterator_without_end_can_be_searched_with(planted):
    (found,) = search(copy.deepcopy(planted), cycle(Images()), [5.5], accelerator=Accelerator(cpu=True))
    assert 5.45 <= found.average_bits() <= 5.5


def test_batches_that_a_search_cannot_use_are_named(planted):
    def run(data, budget=2.0):
        return search(copy.deepcopy(planted), data, [budget], accelerator=Accelerator(cpu=True))

    x = next(iter(Images()))["pixel_values"]
    with pytest.raises(ValueError, match="'pixel_values'; got a mapping with 'images'"):
        run([{"images": x}])
    with pytest.raises(ValueError, match="'pixel_values'; got list"):
        run([["cat", "dog"]])
    # Images with their labels, as timm's loaders give them, can be used.
    assert run([(x, torch.zeros(len(x)))], 5.5) == run([{"pixel_values": x}], 5.5)
    with pytest.raises(ValueError, match="batches are used up"):
        run(x for _ in range(6))
