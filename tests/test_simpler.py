"""What changes no number is left out of the program of a density, and the numbers stay."""

import pyro.distributions as dist
import pytest
import torch
from torch import fx

from flowvi.targets.recording.rules import aten
from flowvi.targets.recording.simpler import MOST_NUMBERS, simpler
from flowvi.targets.recording.tape import record

Z = torch.linspace(-1.0, 2.0, 12).reshape(3, 4)


def gradient_of(log_prob):
    """A function of z that returns a log density and its gradient, as a program has it."""

    def both(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = log_prob(z)
            (gradient,) = torch.autograd.grad(log_p.sum(), z)
        return log_p.detach(), gradient

    return both


def hierarchy(z):
    mu, tau = z[:, 0], z[:, 1].exp()
    rest = dist.Normal(mu[:, None], tau[:, None]).log_prob(z[:, 2:]).sum(-1)
    return rest + dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfNormal(5.0).log_prob(tau)


def flat_in_part(z):
    """A gradient that is zero whatever z is."""
    return (z[:, :2] ** 2).sum(-1) + 0.0 * z[:, 2]


def transposed(z):
    return ((z.mT @ z).pow(3).tril() * z.new_ones(4, 4)).sum().expand(3)


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("log_prob", [hierarchy, flat_in_part, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_stay_to_the_bit(log_prob, dtype):
    z = Z.to(dtype)
    function = gradient_of(log_prob)
    whole = record(function, [z])
    made = simpler(record(function, [z]), [z])

    with torch.no_grad():
        for other in (z, -z, 3 * z.flip(0)):
            for found, expected in zip(made(other), whole(other), strict=True):
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)
    assert len(targets(made)) < 0.8 * len(targets(whole))


def graph_of(*calls) -> fx.GraphModule:
    """A graph of calls one after the other, the last of which is doubled and returned."""
    graph = fx.Graph()
    node = graph.placeholder("z")
    for function, *more in calls:
        node = graph.call_function(function, (node, *more))
    graph.output((graph.call_function(aten.mul.Tensor, (node, 2.0)),))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    "calls",
    [
        [(torch.reshape, (3, 4))],
        [(aten.detach.default,)],
        [(aten.pow.Tensor_Scalar, 1.0)],
        [(aten.unsqueeze.default, -1), (aten.sum.dim_IntList, [2])],
        [(torch.reshape, (4, 3)), (aten.expand.default, [4, 3]), (torch.reshape, (3, 4))],
        [(aten.slice.Tensor, 1, 0, 4)],
    ],
)
def test_what_changes_nothing_is_left_out(calls):
    made = simpler(graph_of(*calls), [Z])

    assert targets(made) == [torch.mul]
    assert torch.equal(made(Z)[0], 2 * Z)


@pytest.mark.parametrize(
    "calls",
    [
        [(torch.reshape, (4, 3))],
        [(aten.pow.Tensor_Scalar, 2.0)],
        [(aten.sum.dim_IntList, [1], True), (aten.expand.default, [3, 4])],
        [(aten.slice.Tensor, 1, 1, 4)],
        [(aten.permute.default, [1, 0]), (torch.reshape, (3, 4))],
        [(aten.transpose.int, 0, 1), (torch.reshape, (3, 4))],
    ],
)
def test_what_changes_something_stays(calls):
    whole = graph_of(*calls)
    expected = whole(Z)[0]

    made = simpler(whole, [Z])

    assert len(targets(made)) == len(calls) + 1
    assert torch.equal(made(Z)[0], expected)


def test_what_depends_on_shapes_alone_is_computed_once():
    calls = [(aten.zeros_like.default,), (aten.add.Tensor, 3.0), (aten.exp.default,)]

    made = simpler(graph_of(*calls), [Z])

    assert targets(made) == [aten.clone.default]
    assert made(Z)[0].eq(2 * torch.tensor(3.0).exp()).all()
    long = torch.zeros(MOST_NUMBERS + 1)
    assert len(targets(simpler(graph_of(*calls), [long]))) == 4


def test_what_is_returned_can_be_written_to():
    """Neither the input nor a constant, both of which have to be the same the next time."""
    z = torch.ones(3)
    made = simpler(record(lambda z: (z.new_zeros(1, 3)[0], (z + 1).pow(1.0)), [z]), [z])

    for found in made(z):
        found.add_(1)

    assert [float(found.sum()) for found in made(z)] == [0.0, 6.0]
