"""Rows of a subsampled plate are inputs of the density; all of them together give it exactly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from reference import log_joint, with_gradient
from torch import Tensor
from zoo import Case

from flowvi.targets import ModelError, Target, from_pyro
from flowvi.targets.subsampling import cover

N = 10


def by_indexing(y: Tensor, size: int | None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        pyro.deterministic("seen", m + y[rows])
        pyro.sample("y", dist.Normal(m, s), obs=y[rows])


def by_subsample(y: Tensor, size: int | None) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    x = torch.stack([y, y.sin(), y.cos()], -1)
    with pyro.plate("row", len(y), subsample_size=size):
        batch = pyro.subsample(x, event_dim=1)
        pyro.sample("y", dist.Normal(batch @ b, 1.0), obs=pyro.subsample(y, event_dim=0))


def crossed_with_a_full_plate(y: Tensor, size: int | None) -> None:
    with pyro.plate("column", 2, dim=-1):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
    columns = pyro.plate("column_again", 2, dim=-1)
    with columns, pyro.plate("row", len(y), subsample_size=size, dim=-2) as rows:
        pyro.sample("y", dist.Normal(m, 1.0), obs=torch.stack([y, y**2], -1)[rows])


def crossed(y: Tensor, size: int | None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    table = torch.outer(y, y[:7])
    down = pyro.plate("down", len(y), subsample_size=size, dim=-2)
    across = pyro.plate("across", 7, subsample_size=size and 3, dim=-1)
    with down as i, across as j:
        pyro.sample("y", dist.Normal(m, 1.0), obs=table[i[:, None], j])
    with down as i:
        pyro.sample("x", dist.Normal(m, 2.0), obs=y[i][:, None])


def two_in_a_row(y: Tensor, size: int | None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    for k in range(2):
        with pyro.plate(f"row_{k}", len(y), subsample_size=size) as rows:
            pyro.sample(f"y_{k}", dist.Normal(m * (k + 1), 1.0), obs=y[rows])


def masked_and_missing(y: Tensor, size: int | None) -> None:
    y = torch.where(y > 1.0, torch.nan, y)
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        batch = y[rows]
        pyro.sample("y", dist.Normal(m, 1.0).mask(batch.isfinite()), obs=batch)


def rows_as_numpy(y: Tensor, size: int | None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    held = y.numpy()
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        batch = torch.as_tensor(held[rows.numpy()])
        pyro.sample("y", dist.Normal(m, 1.0), obs=batch)


def with_a_discrete_site(y: Tensor, size: int | None) -> None:
    w = pyro.sample("w", dist.Beta(1.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        k = pyro.sample("k", dist.Bernoulli(w), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(3 * k, 1.0), obs=y[rows])


def with_local_parameters(y: Tensor, size: int | None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        shift = pyro.param("shift", torch.linspace(0, 1, len(y)), event_dim=0)
        pyro.sample("y", dist.Normal(m + shift, 1.0), obs=y[rows])


MODELS = {
    model.__name__: model
    for model in (
        by_indexing,
        by_subsample,
        crossed_with_a_full_plate,
        crossed,
        two_in_a_row,
        masked_and_missing,
        with_a_discrete_site,
        with_local_parameters,
    )
}


def captured(model, size: int | None) -> tuple[Tensor, Target]:
    y = 2 * torch.rand(N, generator=torch.Generator().manual_seed(1))
    return y, from_pyro(model, y, size)


@pytest.mark.parametrize("size", [5, 4, 3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_all_rows_together_are_the_full_model(name, size):
    _, target = captured(MODELS[name], size)
    _, full = captured(MODELS[name], None)
    z = torch.randn(4, target.dim)

    for _ in range(2):
        expected = with_gradient(lambda z: full.log_prob(z).sum(), z)
        found = with_gradient(lambda z: target.log_prob(z).sum(), z)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_density_of_a_batch_is_the_model_s(name):
    y, target = captured(MODELS[name], 4)
    case = Case(MODELS[name], (torch.where(y > 1.0, 0.0, y) if "masked" in name else y, 4))
    z = torch.randn(3, target.dim)
    if name in ("with_a_discrete_site", "masked_and_missing"):
        pytest.skip("Pyro itself scores no minibatch of it")

    for _ in range(3):
        batch = {k: torch.randint(n, (b,)) for k, (n, b) in target.subsampled.items()}
        found = with_gradient(lambda z: target.log_prob(z, batch).sum(), z)  # noqa: B023
        expected = with_gradient(
            lambda z: sum(log_joint(case, target, row, batch) for row in z),  # noqa: B023
            z,
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_data_and_likelihood_are_those_of_all_rows(name):
    _, target = captured(MODELS[name], 4)
    _, full = captured(MODELS[name], None)
    z = torch.randn(3, target.dim)

    found, expected = target.log_likelihood(z), full.log_likelihood(z)

    assert target.subsampled and not full.subsampled
    torch.testing.assert_close(target.observed, full.observed, equal_nan=True)
    torch.testing.assert_close(found, expected)
    assert {k: target.dims[k] for k in target.observed} == {k: full.dims[k] for k in full.observed}


@pytest.mark.parametrize("name", MODELS)
def test_simulated_data_have_all_rows(name):
    _, target = captured(MODELS[name], 4)

    prior = target.prior(3, seed=0)
    predictive = target.predictive({k: prior[k] for k in target.sites}, seed=1)

    for site, data in target.observed.items():
        assert prior[site].shape == predictive[site].shape == (3, *data.shape)


def test_a_minibatch_is_unbiased():
    _, target = captured(by_indexing, 1)
    z = torch.randn(2)

    batches = [target.log_prob(z, {"row": torch.tensor([i])}) for i in range(N)]

    torch.testing.assert_close(torch.stack(batches).mean(), target.log_prob(z))


def test_discrete_sites_are_summed_out_within_rows():
    """The scale N / B multiplies the log of the sum, so all rows are Pyro's full model."""
    y, target = captured(with_a_discrete_site, 4)
    _, potential, _, _ = initialize_model(with_a_discrete_site, (y, None))
    z = torch.randn(1)

    torch.testing.assert_close(target.log_prob(z), -potential({"w": z[0]}))


def test_rows_that_leave_torch_are_not_taken_for_constants():
    """A recorded graph would hold the rows that were there when it was recorded."""
    _, target = captured(rows_as_numpy, 4)
    _, full = captured(rows_as_numpy, None)
    z = torch.randn(2, 1)

    assert target.density.batched.how == "vmap"
    torch.testing.assert_close(target.log_prob(z), full.log_prob(z))


def test_the_caller_s_rows_are_kept():
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        rows = torch.tensor([7, 1, 2])
        with pyro.plate("row", N, subsample_size=3, subsample=rows) as kept:
            assert torch.equal(kept, rows)
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[kept])

    target = from_pyro(model, torch.arange(10.0))

    assert target.subsampled == {}
    assert target.observed["y"].tolist() == [7.0, 1.0, 2.0]


def test_bad_data_are_found_in_rows_that_the_first_run_did_not_see():
    y = torch.zeros(N)
    y[8] = torch.inf
    torch.manual_seed(3)

    with pytest.raises(ModelError, match=r"Site 'y'.*infinite"):
        from_pyro(by_indexing, y, 2)


def test_local_latents_are_refused():
    def model(y: Tensor) -> None:
        with pyro.plate("row", len(y), subsample_size=2) as rows:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])

    with pytest.raises(ModelError, match="Site 'x' is local to plate 'row'"):
        from_pyro(model, torch.zeros(5))


def test_a_loop_over_random_rows_is_refused():
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        for i in pyro.plate("row", len(y), subsample_size=2):
            pyro.sample(f"y_{i}", dist.Normal(m, 1.0), obs=y[i])

    with pytest.raises(ModelError, match="'row' is subsampled and looped over"):
        from_pyro(model, torch.zeros(5))


def test_scales_that_a_sum_cannot_carry_are_refused():
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("row", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(m + k, 1.0), obs=y[rows])

    with pytest.raises(ModelError, match=r"'k' and 'y'.*different scales"):
        from_pyro(model, torch.zeros(5))


def test_wrong_batches_are_refused():
    _, target = captured(by_indexing, 4)

    with pytest.raises(ValueError, match="4 indices for plate 'row'"):
        target.log_prob(torch.zeros(2), {"row": torch.arange(3)})


@pytest.mark.parametrize("batch", range(1, 13))
def test_a_cover_counts_every_row_once(batch):
    size = 12
    counts = torch.zeros(size)
    weights = 0.0

    for weight, rows in cover({"row": (size, batch)}):
        assert len(rows["row"]) == batch
        counts.index_add_(0, rows["row"], torch.full((batch,), weight * size / batch))
        weights += weight

    torch.testing.assert_close(counts, torch.ones(size))
    assert weights == pytest.approx(1.0)
