"""Every flow is a bijection with the right determinant, from its first step to extreme inputs."""

import copy

import pytest
import safetensors.torch
import torch
from families import FIXED, FLOWS, perturbed
from torch.autograd.functional import jacobian
from torch.func import functional_call, vmap

from flowvi.flows.spline import RationalQuadratic

CONTEXT = 3
DIMS = [1, 2, 5, 64]


@pytest.fixture(params=[0, CONTEXT], ids=["plain", "conditional"])
def context(request):
    return torch.randn(5, request.param) if request.param else None


def columns(context):
    return 0 if context is None else context.shape[-1]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", FLOWS)
def test_inverse_undoes_forward(name, dim, context):
    flow = perturbed(FLOWS[name](dim, columns(context)))
    x = torch.randn(7, 5, dim)

    y, forward_ladj = flow(x, context)
    x_back, inverse_ladj = flow.inverse(y, context)

    torch.testing.assert_close(x_back, x)
    torch.testing.assert_close(inverse_ladj, -forward_ladj)


@pytest.mark.parametrize("name", FLOWS)
def test_forward_undoes_inverse_of_outside_points(name):
    flow = perturbed(FLOWS[name](4))
    y = 3 * torch.randn(50, 4)

    x, _ = flow.inverse(y)

    torch.testing.assert_close(flow(x)[0], y)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", FLOWS)
def test_ladj_matches_autograd(name, dim):
    flow = perturbed(FLOWS[name](dim, CONTEXT))
    x, context = torch.randn(dim), torch.randn(CONTEXT)

    _, ladj = flow(x, context)
    expected = torch.linalg.slogdet(jacobian(lambda x: flow(x, context)[0], x)).logabsdet

    torch.testing.assert_close(ladj, expected)


@pytest.mark.parametrize("name", FLOWS)
def test_inverse_has_the_jacobian_of_an_inverse(name):
    """The derivative of a solved inverse is exact, for context and parameters."""
    flow = perturbed(FLOWS[name](3, CONTEXT))
    context = torch.randn(CONTEXT, requires_grad=True)
    leaves = [context, *flow.parameters()]
    x = torch.randn(3)

    there_and_back, ladj = flow.inverse(flow(x, context)[0], context)
    total = there_and_back.sum() + ladj + flow(x, context)[1]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []

    assert all(g is None or g.abs().max() < 1e-9 for g in gradients)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", FLOWS)
def test_a_fresh_flow_is_the_identity_up_to_order(name, dim, context):
    flow = FLOWS[name](dim, columns(context))
    x = torch.randn(4, 5, dim)

    y, ladj = flow(x, context)

    torch.testing.assert_close(y.sort().values, x.sort().values)
    torch.testing.assert_close(ladj, torch.zeros(4, 5))


@pytest.mark.parametrize("name", [n for n in FLOWS if n not in FIXED])
def test_a_fresh_flow_can_leave_the_identity(name):
    """At the identity some parameter has a gradient: the start is no stationary point."""
    flow = FLOWS[name](3)

    y, ladj = flow(torch.randn(20, 3))
    gradients = torch.autograd.grad((y.square().sum(-1) + ladj).sum(), list(flow.parameters()))

    assert any(g.abs().max() > 1e-3 for g in gradients)


@pytest.mark.parametrize("name", FLOWS)
def test_context_matters_and_broadcasts(name):
    flow = perturbed(FLOWS[name](3, CONTEXT))
    context = torch.randn(2, 5, CONTEXT)
    x = torch.randn(4, 2, 5, 3)

    y, ladj = flow(x, context)
    row, row_ladj = flow(x[:, 1, 2], context[1, 2])

    torch.testing.assert_close(y[:, 1, 2], row)
    torch.testing.assert_close(ladj[:, 1, 2], row_ladj)
    assert (name in FIXED) == torch.equal(y, flow(x, context + 1)[0])


def extremes(dim, dtype):
    """Points as far as 1e3 in all directions, next to zero, and beside the knots of splines."""
    knots = torch.cat([torch.linspace(-5, 5, 9), torch.linspace(-4, 4, 17)]).to(dtype)
    sides = [knots, *(knots.nextafter(torch.full_like(knots, far)) for far in (-9.0, 9.0))]
    signs = torch.randint(0, 2, (6, dim)) * 2.0 - 1
    far = [torch.ones(1, dim), -torch.ones(1, dim), signs, torch.eye(dim)[:3]]
    rows = [1e3 * torch.cat(far), 1e-30 * signs, torch.zeros(1, dim), 300 * torch.randn(6, dim)]
    return torch.cat([torch.cat(sides)[:, None].expand(-1, dim), *(r.to(dtype) for r in rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOWS)
def test_extreme_inputs_stay_finite(name, dtype):
    # The knots of splines that have not moved yet are those of the points.
    for dim, std in ((2, 0.0), (1, 0.3), (2, 0.3), (5, 0.3), (50, 0.3)):
        flow = perturbed(FLOWS[name](dim), std).to(dtype)
        x = extremes(dim, dtype).requires_grad_()

        for direction in (flow, flow.inverse):
            y, ladj = direction(x)
            gradient = torch.autograd.grad((y.sum() + ladj.sum()), x)[0]

            assert y.dtype == ladj.dtype == dtype
            assert y.isfinite().all() and ladj.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_spline_is_smooth_across_its_knots(direction, dtype):
    """Value, slope and gradient agree on both sides of a knot, one rounding step away."""
    spline = RationalQuadratic(bins=8)
    params = torch.randn(spline.size, 1).to(dtype)
    grid = torch.linspace(-spline.bound, spline.bound, 4001, dtype=dtype)[:, None]
    # Lower corners of the bins, where the spline is read.
    corners = spline._bin(grid, params, axis=0)[2:4]
    at = corners[direction == "inverse"].unique()[:, None]
    assert len(at) == spline.bins
    up, down = (at.nextafter(torch.full_like(at, far)) for far in (9.0, -9.0))
    apply = getattr(spline, direction)

    (y_up, slope_up), (y, slope), (y_down, slope_down) = (apply(x, params) for x in (up, at, down))

    tolerance = 100 * torch.finfo(dtype).eps
    for found in (y_up, y_down):
        torch.testing.assert_close(found, y, rtol=tolerance, atol=tolerance)
    for found in (slope_up, slope_down):
        torch.testing.assert_close(found, slope, rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    assert (y.diff(dim=0) > 0).all()


@pytest.mark.parametrize("name", FLOWS)
def test_float32_round_trip(name):
    flow = perturbed(FLOWS[name](5), std=0.1).float()
    x = torch.randn(20, 5, dtype=torch.float32)

    x_back, _ = flow.inverse(flow(x)[0])

    torch.testing.assert_close(x_back, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_copies_agree_and_are_independent(name):
    flow = perturbed(FLOWS[name](3, CONTEXT))
    x, context = torch.randn(6, 3), torch.randn(CONTEXT)
    expected = flow(x, context)

    copied, loaded = copy.deepcopy(flow), perturbed(FLOWS[name](3, CONTEXT))
    loaded.load_state_dict(flow.state_dict())
    perturbed(flow)

    torch.testing.assert_close(copied(x, context), expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded(x, context), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_survives_a_file_without_pickle(name):
    flow, other = (perturbed(FLOWS[name](3, CONTEXT)) for _ in range(2))
    x, context = torch.randn(6, 3), torch.randn(CONTEXT)

    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(flow.state_dict())))

    torch.testing.assert_close(other(x, context), flow(x, context), rtol=0, atol=0)


def test_a_permutation_is_saved_with_its_flow():
    saved, other = FLOWS["permutation"](6, seed=1), FLOWS["permutation"](6, seed=2)
    x = torch.randn(6)

    other.load_state_dict(saved.state_dict())

    assert torch.equal(other(x)[0], saved(x)[0])


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", FLOWS)
def test_a_push_is_the_map_and_carries_the_score_along(name, dim, context):
    """Values and gradients are those of `forward`; the score is that of the new density."""
    flow = perturbed(FLOWS[name](dim, columns(context)))
    x = torch.randn(7, 5, dim, requires_grad=True)
    if context is not None:
        context.requires_grad_()
    weights = torch.randn(7, 5, dim), torch.randn(7, 5)
    leaves = [x, *([] if context is None else [context]), *flow.parameters()]

    def gradients(y, ladj):
        value = (weights[0] * y).sum() + (weights[1] * ladj).sum()
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return list(found)

    y, ladj, score = flow.push(x, -x.detach(), context)
    expected = flow(x, context)

    torch.testing.assert_close((y, ladj), expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(gradients(y, ladj), gradients(*expected))
    assert not score.requires_grad
    outside = y.detach().requires_grad_()
    back, inverse_ladj = flow.inverse(outside, context)
    log_q = inverse_ladj - back.square().sum(-1) / 2
    torch.testing.assert_close(score, torch.autograd.grad(log_q.sum(), outside)[0])


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", FLOWS)
def test_functional_call_and_vmap(name, inverse):
    """A stack of parameter sets and of points gives what a loop gives."""

    class Direction(torch.nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x, context):
            return self.flow.inverse(x, context) if inverse else self.flow(x, context)

    flows = [perturbed(Direction(FLOWS[name](3, CONTEXT))) for _ in range(2)]
    states = [f.state_dict() for f in flows]
    x, context = torch.randn(2, 6, 3), torch.randn(2, CONTEXT)

    stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    y, ladj = vmap(lambda s, x, c: functional_call(flows[0], s, (x, c)))(stacked, x, context)

    for i in range(2):
        torch.testing.assert_close((y[i], ladj[i]), flows[i](x[i], context[i]))


# These take the compiler longest.
LONG = ("naf", "realnvp_clamped", "glow", "ffjord")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in FLOWS]
)
def test_a_flow_compiles_to_one_graph(name):
    flow = perturbed(FLOWS[name](3, CONTEXT))
    x, context = torch.randn(6, 3), torch.randn(CONTEXT)

    torch.compiler.reset()
    for direction in (flow.forward, flow.inverse):
        compiled = torch.compile(direction, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, context), direction(x, context))


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_by_transform_and_by_backward_agree(name):
    flow = perturbed(FLOWS[name](3))
    x = torch.randn(4, 3, requires_grad=True)

    def density(x):
        y, ladj = flow.inverse(x)
        return ladj - y.square().sum(-1)

    mapped = vmap(torch.func.grad(density))(x.detach())

    torch.testing.assert_close(mapped, torch.autograd.grad(density(x).sum(), x)[0])


@pytest.mark.parametrize("name", [n for n in FLOWS if n not in FIXED])
def test_a_conditional_flow_asks_for_its_context(name):
    with pytest.raises(ValueError, match=r"pass context=, a tensor \(\*B, 3\)"):
        FLOWS[name](2, CONTEXT)(torch.randn(2))
    with pytest.raises(ValueError, match=r"context has 4 columns but .* context_dim=3"):
        FLOWS[name](2, CONTEXT)(torch.randn(2), torch.randn(4))
