"""A mask takes the prior of latent values away: it is refused by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

import flowvi

MASK = torch.tensor([True, False, True, False])
Y = torch.tensor([0.3, 1.0, -0.2, 0.7])


def padded(y, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def moved(y, mask):
    """The way out: latents keep their prior."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def of_distribution(y, mask):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).mask(mask).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("guide", ["meanfield", "fullrank"])
@pytest.mark.parametrize(
    ("mask", "count"),
    [(MASK, "2 of its 4 values"), (torch.tensor(False), "4 of its 4"), (False, "4 of its 4")],
)
def test_masked_latents_that_no_data_tell_are_refused_by_name(mask, count, guide):
    with pytest.raises(flowvi.ModelError, match=f"'z' is latent, and a mask covers {count}") as e:
        flowvi.fit(flowvi.from_pyro(padded, Y, mask), guide, steps=1)
    assert "is improper" in str(e.value)
    assert "sample 'z' outside of poutine.mask" in str(e.value)


def test_a_mask_of_the_distribution_itself_is_named_too():
    def model(y, mask):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
            pyro.sample("y", dist.Normal(z, 1.0).mask(mask), obs=y)

    words = flowvi.from_pyro(model, Y, MASK).masked["z"]

    assert words.startswith("Site 'z' is latent, and a mask covers 2 of its 4 values")


@pytest.mark.parametrize("mask", [MASK, False])
def test_a_masked_prior_is_a_flat_one_where_data_tell(mask):
    """Models that are translated from Stan have `.mask(False)` on priors that are flat there."""
    fit = flowvi.fit(flowvi.from_pyro(of_distribution, Y, mask), "fullrank", steps=5)

    flat = ~torch.as_tensor(mask).expand(4)
    precision = torch.where(flat, 1.0, 2.0)
    draws = fit.draw(4000)
    values, n = torch.as_tensor(draws["z"]).reshape(-1, 4), 4000
    sd = precision.to(values) ** -0.5
    assert ((values.mean(0) - Y / precision).abs() < 4.5 * sd / n**0.5).all()
    assert ((values.std(0) / sd - 1).abs() < 4.5 / (2 * n) ** 0.5).all()


def test_what_a_reparametrisation_samples_is_refused_too():
    model = poutine.reparam(padded, config={"z": LocScaleReparam(0.0)})
    with pytest.raises(flowvi.ModelError, match="'z_decentered' is latent, and a mask covers 2"):
        flowvi.fit(flowvi.from_pyro(model, Y, MASK))


def test_rows_are_looked_through():
    late = torch.ones(40, dtype=torch.bool)
    late[30] = False
    with pytest.raises(flowvi.ModelError, match="'z' is latent, and a mask covers 1 of its 40"):
        flowvi.from_pyro(padded, torch.zeros(40), late, local="row")


@pytest.mark.parametrize("mask", [True, torch.tensor(True), torch.ones(4, dtype=torch.bool)])
def test_a_mask_that_covers_nothing_is_none(mask):
    target = flowvi.from_pyro(padded, Y, mask)
    z = torch.randn(2, 5)
    plain = flowvi.from_pyro(moved, Y, True)
    torch.testing.assert_close(target.log_prob(z), plain.log_prob(z))


def test_latents_outside_of_the_mask_keep_their_prior():
    target = flowvi.from_pyro(moved, Y, MASK)
    z = torch.randn(3, 5)
    mu, rows = z[:, :1], z[:, 1:]
    fn = dist.Normal(0.0, 1.0)
    expected = fn.log_prob(mu).sum(-1) + fn.log_prob(rows - mu).sum(-1)
    expected = expected + (fn.log_prob(Y.to(z) - rows) * MASK).sum(-1)
    torch.testing.assert_close(target.log_prob(z), expected, rtol=1e-5, atol=1e-5)


def gaps(y, seen, mask, used):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        with poutine.mask(mask=mask):
            x = pyro.sample("x", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)
        with poutine.mask(mask=torch.ones_like(mask) if used else mask):
            pyro.sample("w", dist.Normal(x, 1.0), obs=torch.zeros(len(y)))


def test_missing_values_behind_a_mask_are_no_latents_if_nothing_reads_them():
    seen = torch.tensor([True, False, False, False])
    target = flowvi.from_pyro(gaps, Y, seen, MASK, False)
    # Missing at 1, 2 and 3, of which the mask covers 1 and 3.
    assert target.sites["x_unobserved"].shape == (1,)
    assert target.coords["x_missing"] == [2]
    with pytest.raises(flowvi.ModelError, match="'x_unobserved' is latent, and a mask covers"):
        flowvi.from_pyro(gaps, Y, seen, MASK, True)
