"""Glow starts from data where it is told to, and is the same map on vectors and on images."""

import copy
import math

import pytest
import torch
from families import perturbed
from torch.autograd.functional import jacobian
from torch.func import functional_call, vmap
from torch.nn.functional import conv2d, pixel_unshuffle

from flowvi.flows import ActNorm, Diagonal, InvertibleLinear, glow, image_glow
from flowvi.flows.image import ConvolutionalCoupling, Pixelwise
from flowvi.flows.permute import random_order
from flowvi.guides import FlowGuide
from flowvi.objectives import Renyi

CONTEXT = 3
# shape and levels: no level within, one level within and three channels, sides of their own.
IMAGES = [((1, 2, 2), 1), ((3, 4, 4), 2), ((2, 2, 6), 1)]


def image(shape, levels, context_dim=0, **sizes):
    sizes = {"steps": 2, "hidden": 6, **sizes}
    return image_glow(math.prod(shape), context_dim, shape=shape, levels=levels, **sizes)


# Normalisation and matrix.


def test_actnorm_is_the_identity_until_it_has_seen_data():
    layer, x = ActNorm(3), torch.randn(5, 3)

    y, ladj = layer(x)

    assert torch.equal(y, x) and torch.equal(ladj, torch.zeros(5))


def test_actnorm_gives_data_mean_zero_and_variance_one():
    layer = perturbed(ActNorm(3, CONTEXT))
    y = torch.tensor([5.0, -1.0, 0.0]) + torch.randn(4, 50, 3) * torch.tensor([10.0, 1e-3, 1.0])

    back = layer.initialise(y, torch.randn(CONTEXT))

    torch.testing.assert_close(back, layer.inverse(y, torch.randn(CONTEXT))[0])
    torch.testing.assert_close(back.mean((0, 1)), torch.zeros(3))
    torch.testing.assert_close(back.var((0, 1), correction=0), torch.ones(3))


def test_actnorm_leaves_a_constant_coordinate_its_scale():
    layer = ActNorm(2)

    back = layer.initialise(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))

    torch.testing.assert_close(back, torch.tensor([[0.0, -1.0], [0.0, 1.0]]))


def test_every_normalisation_of_a_flow_starts_from_the_data_that_reach_it():
    flow = perturbed(glow(4, depth=3))
    y = 5 + 3 * torch.randn(200, 4)

    base = flow.initialise(y)
    seen = []
    for layer in flow.modules():
        if isinstance(layer, ActNorm):
            layer.register_forward_hook(lambda layer, x, out: seen.append(x[0]))
    flow(base)

    torch.testing.assert_close(flow(base)[0], y)
    assert len(seen) >= 3
    for x in seen:
        torch.testing.assert_close(x.mean(0), torch.zeros(4))
        torch.testing.assert_close(x.std(0, correction=0), torch.ones(4))


def test_the_matrix_is_its_plu_form():
    layer = perturbed(InvertibleLinear(4, random_order(4, seed=0)))
    matrix = jacobian(lambda x: layer(x)[0], torch.zeros(4))

    p = torch.eye(4)[layer.permutation.order]
    lower = layer.lower.tril(-1) + torch.eye(4)
    upper = layer.upper.triu(1) + layer.log_scale.exp().diag()

    torch.testing.assert_close(matrix, p @ lower @ upper)
    torch.testing.assert_close(layer(torch.zeros(4))[1], matrix.det().abs().log())


def test_a_pixelwise_matrix_is_a_1x1_convolution_whose_determinant_counts_every_pixel():
    matrix = perturbed(InvertibleLinear(3))
    x = torch.randn(2, 3, 4, 5)

    y, ladj = Pixelwise(matrix, 20)(x.movedim(1, -1).flatten(1))
    weight = jacobian(lambda x: matrix(x)[0], torch.zeros(3))

    expected = conv2d(x, weight[..., None, None])
    torch.testing.assert_close(y.unflatten(-1, (4, 5, 3)).movedim(-1, 1), expected)
    torch.testing.assert_close(ladj, (20 * matrix.log_scale.sum()).expand(2))


# Images: the properties of test_flows.py, on shapes that an image can have.


@pytest.fixture(params=[0, CONTEXT], ids=["plain", "conditional"])
def context(request):
    return torch.randn(5, request.param) if request.param else None


def columns(context):
    return 0 if context is None else context.shape[-1]


@pytest.mark.parametrize(("shape", "levels"), IMAGES)
def test_inverse_of_images_undoes_forward(shape, levels, context):
    flow = perturbed(image(shape, levels, columns(context)))
    x = torch.randn(3, 5, math.prod(shape))

    y, forward_ladj = flow(x, context)
    x_back, inverse_ladj = flow.inverse(y, context)

    assert forward_ladj.shape == (3, 5)
    torch.testing.assert_close(x_back, x)
    torch.testing.assert_close(inverse_ladj, -forward_ladj)


@pytest.mark.parametrize(("shape", "levels"), IMAGES)
def test_ladj_of_images_matches_autograd(shape, levels):
    flow = perturbed(image(shape, levels, CONTEXT))
    x, context = torch.randn(math.prod(shape)), torch.randn(CONTEXT)

    _, ladj = flow(x, context)
    expected = torch.linalg.slogdet(jacobian(lambda x: flow(x, context)[0], x)).logabsdet

    torch.testing.assert_close(ladj, expected)


@pytest.mark.parametrize(("shape", "levels"), IMAGES)
def test_a_fresh_image_flow_is_the_identity_up_to_order(shape, levels):
    flow = image(shape, levels)
    x = torch.randn(4, math.prod(shape))

    y, ladj = flow(x)

    torch.testing.assert_close(y.sort().values, x.sort().values)
    torch.testing.assert_close(ladj, torch.zeros(4))


def test_rows_of_a_context_do_not_mix():
    flow = perturbed(image((1, 4, 4), 2, CONTEXT))
    x, context = torch.randn(3, 2, 5, 16), torch.randn(2, 5, CONTEXT)

    y, ladj = flow(x, context)
    row, row_ladj = flow(x[:, 1, 2], context[1, 2])

    torch.testing.assert_close(y[:, 1, 2], row)
    torch.testing.assert_close(ladj[:, 1, 2], row_ladj)
    assert not torch.equal(y, flow(x, context + 1)[0])


def test_a_context_may_be_a_feature_map():
    """What it says about one corner acts on that corner first."""
    coupling = perturbed(ConvolutionalCoupling((2, 8, 8), 6, (CONTEXT, 4, 4)))
    x, context = torch.randn(128), torch.randn(CONTEXT, 4, 4)
    other = context.clone()
    other[:, 0, 0] += 1

    moved = coupling(x, context.flatten())[0] != coupling(x, other.flatten())[0]
    moved = moved.unflatten(-1, (8, 8, 2)).any(-1)

    # One pixel of the context is 2 x 2 here, and the last convolution reaches one further.
    assert moved[:3, :3].all() and not moved[3:].any() and not moved[:, 3:].any()


@pytest.mark.parametrize("size", [1e3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_images_stay_finite(dtype, size):
    flow = perturbed(image((1, 4, 4), 2), std=0.1).to(dtype)
    x = (size * torch.randn(20, 16, dtype=dtype)).requires_grad_()

    for direction in (flow, flow.inverse):
        y, ladj = direction(x)
        gradient = torch.autograd.grad((y.sum() + ladj.sum()), x)[0]

        assert y.dtype == ladj.dtype == dtype
        assert y.isfinite().all() and ladj.isfinite().all() and gradient.isfinite().all()


def test_image_flows_are_copied_saved_and_mapped():
    flow, other = (perturbed(image((1, 4, 4), 2, CONTEXT)) for _ in range(2))
    x, context = torch.randn(2, 6, 16), torch.randn(2, CONTEXT)
    expected = [f(x[i], context[i]) for i, f in enumerate((flow, other))]

    loaded = image((1, 4, 4), 2, CONTEXT)
    loaded.load_state_dict(flow.state_dict())
    states = [flow.state_dict(), other.state_dict()]
    stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    y, ladj = vmap(lambda s, x, c: functional_call(flow, s, (x, c)))(stacked, x, context)

    torch.testing.assert_close(loaded(x[0], context[0]), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(flow)(x[0], context[0]), expected[0], rtol=0, atol=0)
    for i in range(2):
        torch.testing.assert_close((y[i], ladj[i]), expected[i])


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_gradients_of_an_image_guide_land(alpha):
    guide = perturbed(FlowGuide(16, image((1, 4, 4), 2, CONTEXT), Diagonal(16)), std=0.1)
    target, context = copy.deepcopy(guide), torch.randn(2, CONTEXT)

    bound, _ = Renyi(alpha, 3)(lambda z: target.log_prob(z, context), guide, context)
    zero = torch.autograd.grad(bound.sum(), list(guide.parameters()))

    assert all(g.abs().max() < 1e-9 for g in zero)


def test_channels_of_a_pixel_are_the_square_it_came_from():
    """The squeeze of a fresh level is torch's pixel_unshuffle, as a set of channels."""
    flow = image((1, 4, 4), 1, steps=1)
    picture = torch.arange(16.0)

    base = flow.inverse(picture)[0].reshape(2, 2, 4)
    squares = pixel_unshuffle(picture.reshape(1, 4, 4), 2).movedim(0, -1)

    assert torch.equal(base.sort().values, squares.sort().values)


def test_images_start_from_data():
    """Pixels of different means and widths, which a convolution cannot tell, are all standard."""
    flow = perturbed(image((1, 4, 4), 2))
    pictures = 7 * torch.randn(16) + torch.linspace(0.5, 4.0, 16) * torch.randn(100, 16)

    base = flow.initialise(pictures)

    torch.testing.assert_close(flow(base)[0], pictures)
    torch.testing.assert_close(base.mean(0), torch.zeros(16), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(base.std(0, correction=0), torch.ones(16))


@pytest.mark.parametrize(
    ("dim", "sizes", "message"),
    [
        (784, {"levels": 3}, r"28 x 28 cannot be halved 3 times"),
        (49, {"levels": 1}, r"7 x 7 cannot be halved 1 times"),
        (16, {"levels": 0}, r"at least 1"),
        (15, {}, r"shape=\(C, H, W\) with C \* H \* W = dim = 15; got \(1, 3, 3\)"),
        (16, {"shape": (1, 4, 8)}, r"dim = 16; got \(1, 4, 8\)"),
        (16, {"context_dim": 5, "context_shape": (1, 2, 2)}, r"does not hold context_dim = 5"),
    ],
)
def test_images_that_do_not_fit_are_refused(dim, sizes, message):
    with pytest.raises(ValueError, match=message):
        image_glow(dim, **sizes)
