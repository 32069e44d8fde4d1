"""Likelihoods of images are normalised, have finite gradients, and refuse what they are not of."""

import math

import pytest
import torch
from families import perturbed

from flowvi.vae import LIKELIHOODS
from flowvi.vae.likelihoods import LEVELS, DiscretisedLogisticLevels, StableContinuousBernoulli

SIZE = (3, 2)
# Values at which a pixel's probabilities add up to one; the others are densities.
DISCRETE = {
    "bernoulli": torch.arange(2.0),
    "categorical": torch.arange(256.0),
    "discretised_logistic": torch.arange(256.0),
}
RANGES = {"continuous_bernoulli": (0.0, 1.0), "gaussian": (-9.0, 9.0), "gaussian_fixed": (-9, 9.0)}


def outputs(family, *lead):
    return torch.randn(*lead, family.outputs, *SIZE, requires_grad=True)


def images(family, *lead):
    """Draws of the likelihood, which are images that it is of."""
    with torch.no_grad():
        return family(outputs(family, *lead)).sample().double()


def test_every_likelihood_is_discrete_or_has_a_range():
    assert {*DISCRETE, *RANGES} == set(LIKELIHOODS)


@pytest.mark.parametrize("name", DISCRETE)
def test_probabilities_add_up_to_one(name):
    family = LIKELIHOODS[name]()
    values = DISCRETE[name].double()
    params = 3 * outputs(family)

    pixel = family(params).base_dist.log_prob(values.reshape(-1, 1, 1).expand(-1, *SIZE))

    torch.testing.assert_close(pixel.exp().sum(0), torch.ones(SIZE))


@pytest.mark.parametrize("name", RANGES)
def test_densities_integrate_to_one(name):
    family = LIKELIHOODS[name]()
    values = torch.linspace(*RANGES[name], 20_001)
    params = 2 * outputs(family)

    pixel = family(params).base_dist.log_prob(values.reshape(-1, 1, 1).expand(-1, *SIZE))
    total = torch.trapezoid(pixel.exp(), values, dim=0)

    torch.testing.assert_close(total, torch.ones(SIZE), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_image_scores_the_sum_of_its_pixels(name):
    """The log likelihood adds up over the pixels of an image, and never over images."""
    family = LIKELIHOODS[name]()
    params, x = outputs(family, 4, 5), images(family, 4, 5)

    score = family(params).log_prob(x)

    assert score.shape == (4, 5)
    torch.testing.assert_close(score[1, 2], family(params[1, 2]).log_prob(x[1, 2]))
    torch.testing.assert_close(score, family(params).base_dist.log_prob(x).sum((-2, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_are_finite_for_outputs_of_any_size(name, scale, dtype):
    family = LIKELIHOODS[name]().to(dtype)
    x = images(family, 7).to(dtype)
    params = (scale * outputs(family, 7)).detach().to(dtype).requires_grad_()

    family(params).log_prob(x).sum().backward()

    assert params.grad.isfinite().all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_decoder_starts_at_the_pixel_means(name):
    family = LIKELIHOODS[name]()
    mean = family.top * torch.linspace(0.05, 0.95, 6).reshape(SIZE)

    start = family.start(mean)

    assert start.shape == (family.outputs, *SIZE)
    torch.testing.assert_close(family.mean(start), mean, rtol=0.0, atol=0.12 * family.top)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_mean_image_is_the_mean_of_draws(name):
    family = LIKELIHOODS[name]()
    params = outputs(family).detach()

    draws = family(params.expand(5_000, *params.shape)).sample().double()

    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - family.mean(params)).abs() < 4.5 * error).all()


def test_the_edges_of_a_discretised_logistic_hold_its_tails():
    """Without edge bins a centre far outside would leave no probability at all."""
    for loc, edge in ((-3.0, 0), (4.0, LEVELS - 1)):
        levels = DiscretisedLogisticLevels(torch.tensor(loc), torch.tensor(-3.0))

        torch.testing.assert_close(levels.log_prob(torch.tensor(float(edge))).exp().item(), 1.0)


def test_levels_of_a_logistic_are_differences_of_its_distribution_function():
    loc, scale = 0.4, 0.05
    k = torch.arange(1.0, LEVELS - 1).double()

    found = DiscretisedLogisticLevels(torch.tensor(loc), torch.tensor(math.log(scale))).log_prob(k)
    upper, lower = (torch.sigmoid(((k + s) / 255 - loc) / scale) for s in (0.5, -0.5))

    torch.testing.assert_close(found.exp(), upper - lower)


def test_draws_of_a_discretised_logistic_follow_its_levels():
    levels = DiscretisedLogisticLevels(torch.tensor(0.1), torch.tensor(-2.5))
    n = 50_000

    count = torch.bincount(levels.sample((n,)).long(), minlength=LEVELS)
    expected = n * levels.log_prob(torch.arange(float(LEVELS))).exp()

    assert ((count - expected).abs() < 5 * (expected + 1).sqrt()).all()


def test_a_continuous_bernoulli_is_normalised_where_torch_s_is_not():
    logits = torch.tensor([30.0, -60.0], dtype=torch.float32)
    # In units of its width, which is 1 / |logit|, beside the edge that holds it.
    u = torch.linspace(0, 40, 40_001, dtype=torch.float64)[:, None] / logits.abs().double()
    x = torch.where(logits > 0, 1 - u, u)

    density = StableContinuousBernoulli(logits=logits.double()).log_prob(x.clamp(0, 1)).exp()
    inside = density * (u <= 1)

    total = torch.stack([torch.trapezoid(inside[:, i], u[:, i]) for i in range(2)])
    torch.testing.assert_close(total, torch.ones(2), rtol=1e-4, atol=0.0)
    single = StableContinuousBernoulli(logits=logits).log_prob(logits.sign().clamp_min(0))
    torch.testing.assert_close(single.exp(), logits.abs(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bernoulli", 0.43, "0.43.*cross-entropy.*continuous_bernoulli"),
        ("continuous_bernoulli", 17.0, "17.*divide"),
        ("categorical", 0.5, "0.5.*binarise='levels'"),
        ("discretised_logistic", 256.0, "256.*whole grey levels"),
        ("gaussian", math.nan, "nan.*finite"),
    ],
)
def test_images_of_another_kind_are_refused(name, value, words):
    family = LIKELIHOODS[name]()
    x = images(family, 3)
    family.check(x)
    x[1, 0, 0] = value

    with pytest.raises(ValueError, match=words):
        family.check(x)


def test_the_scale_of_a_gaussian_is_learnt_and_stays_above_its_floor():
    family = LIKELIHOODS["gaussian"](scale=0.2, floor=0.05)
    torch.testing.assert_close(family.scale.item(), 0.2)

    x = torch.zeros(1, *SIZE)
    optimiser = torch.optim.Adam(family.parameters(), lr=0.5)
    for _ in range(100):
        optimiser.zero_grad()
        (-family(torch.zeros(1, 1, *SIZE)).log_prob(x)).sum().backward()
        optimiser.step()

    assert 0.05 <= family.scale < 0.051
    assert not list(LIKELIHOODS["gaussian_fixed"]().parameters())
    with pytest.raises(ValueError, match="above the floor"):
        LIKELIHOODS["gaussian"](scale=0.01, floor=0.05)


def test_the_parameters_of_a_likelihood_can_move():
    """Perturbing a likelihood with parameters changes its density: they are used."""
    family = LIKELIHOODS["gaussian"]()
    params, x = outputs(family, 2), images(family, 2)
    before = family(params).log_prob(x)

    perturbed(family)

    assert (family(params).log_prob(x) != before).all()
