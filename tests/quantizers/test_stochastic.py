import pytest
import torch

from sdq_hf.quantizers.stochastic import draw, gumbel_choice, stochastic_choice


def test_gradient_to_the_choice_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    upper, lower, g = (torch.randn(5, 3, generator=generator) for _ in range(3))
    choice = torch.tensor(0.3, requires_grad=True)
    chosen = lower.clone().requires_grad_()
    out = stochastic_choice(choice, chosen, upper - lower)
    assert torch.equal(out, lower)
    (out * g).sum().backward()
    torch.testing.assert_close(choice.grad, (g * (upper - lower)).sum())
    assert torch.equal(chosen.grad, g)


def test_gumbel_choice_is_the_softmax_over_two():
    theta = torch.tensor([0.7, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    hard, soft = gumbel_choice(theta, uniform, temperature=0.5)
    # The difference of two Gumbel variables is logistic: give all of it to the upper choice.
    noise = torch.log(uniform) - torch.log1p(-uniform)
    beta = torch.sigmoid(theta)
    logits = torch.stack([torch.log(beta) + noise, torch.log(1 - beta)])
    expected = torch.softmax(logits / 0.5, dim=0)[0]
    torch.testing.assert_close(soft, expected)
    assert hard.tolist() == (logits[0] > logits[1]).tolist()
    assert torch.autograd.gradcheck(lambda t: gumbel_choice(t, uniform, 0.5)[1], theta)


def test_frequency_of_the_upper_choice_is_beta():
    theta = torch.full((1,), 0.8, dtype=torch.float64)
    hits = sum(gumbel_choice(theta, draw(0, step, 1), 1.0)[0].item() for step in range(4000))
    assert abs(hits / 4000 - torch.sigmoid(theta).item()) < 0.03


def test_draws_depend_on_seed_and_step_alone():
    assert torch.equal(draw(1, 5, 8), draw(1, 5, 8))
    assert not torch.equal(draw(1, 5, 8), draw(1, 6, 8))
    assert not torch.equal(draw(1, 5, 8), draw(2, 5, 8))


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 7)])
def test_channels_have_a_choice_each(shape):
    generator = torch.Generator().manual_seed(0)
    chosen, difference, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    choice = torch.rand(4, generator=generator).requires_grad_()
    drawn = stochastic_choice(choice, chosen.requires_grad_(), difference)
    assert torch.equal(drawn, chosen)
    drawn.backward(grad)
    expected = torch.stack([(grad[c] * difference[c]).sum() for c in range(4)])
    torch.testing.assert_close(choice.grad, expected)
    assert torch.equal(chosen.grad, grad)
