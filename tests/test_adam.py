"""The optimiser takes torch's steps, and goes on where it was."""

import copy

import pytest
import torch

from flowvi.training.adam import Adam
from flowvi.training.flat import Flat


def gradients():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, generator=generator) for _ in range(9)]


def parameters():
    return [
        torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)),
        torch.nn.Parameter(torch.ones(())),
    ]


def test_steps_are_those_of_torch():
    mine, theirs = parameters(), parameters()
    optimiser, reference = Adam(mine), torch.optim.Adam(theirs, fused=True)

    for i, gradient in enumerate(gradients()):
        optimiser.step(gradient, 0.1 / (1 + i))
        reference.param_groups[0]["lr"] = 0.1 / (1 + i)
        theirs[0].grad, theirs[1].grad = gradient[:6].reshape(2, 3), gradient[6]
        reference.step()

    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)


def test_in_one_vector_steps_are_the_same():
    apart, together = parameters(), parameters()
    flat = Flat(together)
    first, second = Adam(apart), Adam(together)

    for gradient in gradients():
        first.step(gradient, 0.1)
        second.step(gradient, 0.1, flat.vector.detach())

    flat.release()
    assert all(torch.equal(p, q) for p, q in zip(apart, together, strict=True))
    for name, held in first.state_dict().items():
        assert all(torch.equal(a, b) for a, b in zip(held, second.state_dict()[name], strict=True))


@pytest.mark.parametrize("taken", [0, 4])
def test_a_state_is_gone_on_from(taken):
    """The state is a copy: later steps do not change it."""
    whole, cut = parameters(), parameters()
    first = Adam(whole)
    for gradient in gradients()[:taken]:
        first.step(gradient, 0.1)
    kept, values = first.state_dict(), [p.detach().clone() for p in whole]
    before = copy.deepcopy(kept)
    for gradient in gradients()[taken:]:
        first.step(gradient, 0.1)

    second = Adam(cut)
    second.load_state_dict(kept)
    with torch.no_grad():
        for p, value in zip(cut, values, strict=True):
            p.copy_(value)
    for gradient in gradients()[taken:]:
        second.step(gradient, 0.1)

    assert all(torch.equal(a, b) for a, b in zip(kept["means"], before["means"], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(whole, cut, strict=True))
