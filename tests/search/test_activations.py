"""Bits of inputs, found in the same descent as those of weights."""

import copy

import pytest
import torch
from accelerate import Accelerator

from sdq_hf.costs import get_cost
from sdq_hf.layers import input_quantizers
from sdq_hf.quantizers.activation import activation_range, best_step
from sdq_hf.search import SearchLog, search
from sdq_hf.search.descent import Descent
from sdq_hf.search.stochastic_inputs import StochasticInputs
from sdq_hf.search.units import input_units, layer_units
from sdq_hf.search.updates import Paper
from tests.planted import Images, planted_network


@pytest.fixture(scope="module")
def planted():
    return planted_network()


def way_down(model, budget, cost="bitops", candidates=(2, 4, 6), **options):
    units = layer_units(model.strategy) | input_units(model.strategy)
    return Descent(model.strategy, get_cost(cost), [budget], candidates, units=units, **options)


def uniform(strategy, weights, inputs):
    names = strategy.searchable
    return strategy.with_bits(weights).with_activation_bits(dict.fromkeys(names, inputs))


@pytest.mark.parametrize("cost", ["bitops", "lut"])
def test_what_a_step_saves_depends_on_the_other_bits_of_the_layer(planted, cost):
    candidates = (2, 4, 8)
    way = way_down(planted, get_cost(cost).total(uniform(planted.strategy, 4, 4)), cost, candidates)
    assert len(way.names) == 2 * len(planted.strategy.searchable)
    generator = torch.Generator().manual_seed(0)
    now = way.strategy(way.bits)
    while not way.done:
        assert way.total() == pytest.approx(get_cost(cost).total(now))
        for name in way.movable:
            lower = way.strategy({**way.bits, name: way.next_bits(name)})
            assert way.saved(name) == pytest.approx(get_cost(cost).total(now) - get_cost(cost).total(lower))
        name = way.movable[int(torch.randint(len(way.movable), (), generator=generator))]
        way.step_down(name, damage=1.0)
        now = way.strategy(way.bits)
    (found,) = way.strategies()
    assert get_cost(cost).total(found) <= way.budgets[0]


def test_drawn_inputs_are_the_rounded_ones_and_gradients_those_of_the_choice(planted):
    model, name = copy.deepcopy(planted).eval(), "layer2.0.conv1"
    images = Images().batches[0]["pixel_values"][:4]
    model.calibrate([images])
    layer, seen = model.quantized_layers()[name], {}
    x = torch.randn(2, *[layer.weight.shape[1], 8, 8], generator=torch.Generator().manual_seed(0))
    way = way_down(model, 2.5e7, start_bits=4)
    inputs = StochasticInputs(model, way)
    steps = {bits: best_step(x, bits, True) for bits in way.candidates}
    table = torch.stack([torch.ones(len(steps)), torch.stack(list(steps.values())), torch.zeros(len(steps))])
    inputs.start(dict.fromkeys(way.inputs, table))
    place = list(way.inputs).index(name)
    rounded = {bits: torch.round(x / step).clamp(*activation_range(bits, True)) * step for bits, step in steps.items()}
    for share, expected in ((1.0, rounded[4]), (0.0, rounded[2]), (0.5, (rounded[4] + rounded[2]) / 2)):
        inputs.choose(dict.fromkeys(way.names, share))
        leaf = x.clone().requires_grad_()
        seen = layer.input_source(leaf)
        torch.testing.assert_close(seen, expected)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        (seen * grad).sum().backward()
        slope = (grad * (rounded[4] - rounded[2])).sum().item()
        assert inputs.gradients()[place].item() == pytest.approx(slope, rel=1e-4)
    inputs.clear()
    assert layer.input_source is None


@pytest.mark.parametrize("weight_lr", [0.0, 3e-4])
def test_inputs_are_searched_with_the_weights_and_a_resumed_search_finds_the_same(planted, weight_lr):
    model = copy.deepcopy(planted)
    model.calibrate(Images())
    before = copy.deepcopy(model.state_dict())
    budget = float(uniform(model.strategy, 3, 3).bitops())
    options = {"search_activations": True, "weight_lr": weight_lr, "accelerator": Accelerator(cpu=True)}
    kept = []

    def look(state):
        if state.batch == 15:
            kept.append(copy.deepcopy(state.state_dict()))

    log = SearchLog()
    (found,) = search(model, Images(), [budget], "bitops", on_step=look, log=log, **options)
    assert 0.99 * budget <= found.bitops() <= budget
    for field in ("weight_bits", "activation_bits"):
        assert len({getattr(found[name], field) for name in found.searchable}) > 1
    pinned = [name for name in found if found[name].pinned]
    assert all(found[name] == model.strategy[name] for name in pinned)
    assert any(move["layer"].endswith(".input") for move in log.moves)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(layer.input_source is None for layer in model.quantized_layers().values())
    (resumed,) = search(model, Images(), [budget], "bitops", resume_from=kept[0], **options)
    assert resumed == found
    # What is found can be used.
    model.set_strategy(found)
    model.calibrate(Images())
    for name, layer in model.quantized_layers().items():
        assert layer.input_quantizer.bits == found[name].activation_bits


def test_the_paper_weighs_the_errors_of_inputs_with_those_of_weights(planted, monkeypatch):
    """What a unit of inputs loses at fewer bits is the error of the inputs; a resumed search has the same."""
    model, name, seen, kept = copy.deepcopy(planted), "layer2.0.conv1", [], []
    observe = Paper.observe

    def look(self, *arguments):
        seen.append(dict(self.errors))
        return observe(self, *arguments)

    monkeypatch.setattr(Paper, "observe", look)
    options = {"method": "paper", "search_activations": True, "accelerator": Accelerator(cpu=True), "lr": 30.0}
    budget = float(uniform(model.strategy, 5, 5).bitops())
    (found,) = search(
        model, Images(), [budget], "bitops", on_step=lambda state: kept.append(state.state_dict()), **options
    )
    (resumed,) = search(model, Images(), [budget], "bitops", resume_from=kept[3], **options)
    assert resumed == found
    assert all(errors == seen[0] for errors in seen)
    assert set(seen[0]) == {*model.strategy.searchable, *(f"{layer}.input" for layer in model.strategy.searchable)}
    # By hand: the inputs that calibration shows the layer.
    probe, inputs = copy.deepcopy(planted), []
    probe.set_strategy(probe.strategy.with_bits(6).with_activation_bits(dict.fromkeys(probe.strategy.searchable, 6)))
    probe.quantized_layers()[name].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    probe.calibrate(Images())
    (x,) = inputs
    for bits, error in seen[0][f"{name}.input"].items():
        by_hand = []
        for signed in (False, True):
            step = best_step(x, bits, signed)
            rounded = torch.round(x / step).clamp(*activation_range(bits, signed)) * step
            by_hand.append(((rounded - x).square().sum() / x.square().sum()).item())
        assert error == pytest.approx(by_hand[0] if bits == 1 else min(by_hand), rel=1e-3)


@pytest.mark.parametrize("weight_lr", [0.0, 1e-3])
@pytest.mark.parametrize("search_activations", [False, True])
def test_a_model_without_steps_gets_those_of_its_own_bits_and_a_resumed_search_leaves_the_same(
    planted, search_activations, weight_lr
):
    assert not planted.is_calibrated()
    expected, model, resumed = (copy.deepcopy(planted) for _ in range(3))
    expected.set_strategy(6)
    expected.calibrate(Images())
    budget = float(uniform(model.strategy, 5, 4).bitops())
    options = {"search_activations": search_activations, "accelerator": Accelerator(cpu=True)}
    options["weight_lr"] = weight_lr
    kept = []
    search(model, Images(), [budget], "bitops", on_step=lambda state: kept.append(state.state_dict()), **options)
    search(resumed, Images(), [budget], "bitops", resume_from=kept[3], **options)
    for name, quantizer in input_quantizers(expected).items():
        for found in (model, resumed):
            own = input_quantizers(found)[name]
            assert (own.bits, own.step.item(), own.range) == (quantizer.bits, quantizer.step.item(), quantizer.range)


def test_a_layer_whose_inputs_do_not_matter_loses_their_bits(planted):
    """The branch of the last stage is multiplied by almost zero, so neither its weights nor its inputs matter."""
    budget = float(uniform(planted.strategy, 4, 4).bitops())
    (found,) = search(
        copy.deepcopy(planted), Images(), [budget], "bitops", search_activations=True, accelerator=Accelerator(cpu=True)
    )
    dead = [found[name].activation_bits for name in ("layer3.0.conv1", "layer3.0.conv2")]
    others = [found[name].activation_bits for name in found.searchable if not name.startswith("layer3.0")]
    assert max(dead) < min(max(others), sum(others) / len(others))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budgets": [3.0], "cost": "bits"},
            "cannot be searched for a budget in average bits, which does not count them",
        ),
        (
            {"budgets": [1e8], "cost": "bitops", "method": "table"},
            "search_activations is for the methods two_sided and paper",
        ),
    ],
)
def test_what_cannot_be_is_refused(planted, options, message):
    with pytest.raises(ValueError, match=message):
        search(planted, Images(), search_activations=True, **options)
