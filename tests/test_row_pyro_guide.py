"""A fit of latents of rows is a Pyro guide: the same values and densities, however rows come."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import perturbed
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import flowvi
from flowvi.guides import MeanField, make_guide
from flowvi.guides.recipes import amortised
from flowvi.guides.registry import mixture

N, B, P = 12, 4, 3


def two_sites(x, size=None):
    """A real vector and a positive number a row; the plate may draw its rows."""
    with pyro.plate("row", N, subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        mean = torch.cat([z, s.unsqueeze(-1)], -1)
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x[i])


def length(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, P]).to_event(1), obs=x)


def unsized(x):
    with pyro.plate("row"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, P), 1.0).to_event(1), obs=x)


def given_rows(x, rows=None):
    """The batch is an argument, and so is where its rows lie among all."""
    with pyro.plate("row", N, subsample_size=len(x), subsample=rows):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, P]).to_event(1), obs=x)


def plate_within(x):
    with pyro.plate("row", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("column", P, dim=-2):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
            b = pyro.sample("b", dist.Dirichlet(torch.ones(2)))
            pyro.sample("x", dist.Normal(z + a * b[..., 0], 1.0), obs=x.T)


def plate_around(x):
    with pyro.plate("row", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("column", P, dim=-1):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + a, 1.0), obs=x)


def dependent_support(x):
    with pyro.plate("row", len(x)):
        low = pyro.sample("low", dist.Exponential(1.0))
        z = pyro.sample("z", dist.Uniform(-low, low + 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, P]).to_event(1), obs=x)


def learned(x):
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        wide = dist.Normal(z.unsqueeze(-1), scale).expand([*z.shape, P])
        pyro.sample("x", wide.to_event(1), obs=x)


MODELS = {
    "two sites": two_sites,
    "rows counted": length,
    "no size": unsized,
    "batch among the arguments": given_rows,
    "plate within": plate_within,
    "plate around": plate_around,
    "dependent support": dependent_support,
    "pyro.param": learned,
}


def fitted(model, *args, guide=None):
    """A fit of no steps, its guide moved off where it starts."""
    target = flowvi.from_pyro(model, *args, local="row")
    if guide is None:
        guide = amortised(target, "realnvp" if target.dim > 1 else "meanfield")
    return flowvi.RowFit(target, perturbed(guide, std=0.1), {})


@pytest.fixture
def x():
    return torch.randn(N, P)


@pytest.fixture
def fit(x):
    return fitted(two_sites, x)


def log_weights(fit, shape, rows=None):
    """Log weights of the fit's own draws for some rows, (*S, B)."""
    batch = fit.target.batch(rows)
    z, log_q = fit.guide.sample(shape, batch)
    return fit.target.log_prob(z, batch) - log_q


@pytest.mark.parametrize("name", MODELS)
def test_pyro_s_elbo_is_that_of_the_fit(name, x):
    fit = fitted(MODELS[name], x)
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -Trace_ELBO(3).loss(MODELS[name], guide, x)
    torch.manual_seed(1)
    expected = sum(log_weights(fit, ()).sum().item() for _ in range(3)) / 3

    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "no size"])
def test_particles_are_drawn_at_once(name, x):
    fit = fitted(MODELS[name], x)
    guide = flowvi.pyro_guide(fit)
    elbo = Trace_ELBO(7, vectorize_particles=True, max_plate_nesting=2)

    torch.manual_seed(1)
    found = -elbo.loss(MODELS[name], guide, x)
    torch.manual_seed(1)
    expected = log_weights(fit, (7,)).sum(-1).mean().item()

    assert found == pytest.approx(expected, rel=1e-9)


def test_many_particles_agree_with_the_bounds_of_rows(fit, x):
    guide = flowvi.pyro_guide(fit)
    own = flowvi.elbo(2000, "total")

    losses = torch.tensor([Trace_ELBO().loss(two_sites, guide, x) for _ in range(200)])
    with torch.no_grad():
        batch = fit.target.batch()
        found = own(lambda z: fit.target.log_prob(z, batch), fit.guide, batch)

    error = (losses.var() / 200 + found.log_w.sum(-1).var() / 2000).sqrt()
    assert abs(losses.mean() + found.bound.sum()) < 4 * error


def test_gradients_reach_encoder_and_flow(fit, x):
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    Trace_ELBO().differentiable_loss(two_sites, guide, x).backward()
    torch.manual_seed(1)
    expected = torch.autograd.grad(-log_weights(fit, ()).sum(), list(fit.guide.parameters()))

    assert any(gradient.abs().max() > 0 for gradient in expected)
    for p, gradient in zip(guide.density.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_density_in_the_trace_is_scored_by_the_inverse_too(fit, x):
    """What `log_prob` says of the values of a trace is what the trace says."""
    trace = poutine.trace(flowvi.pyro_guide(fit)).get_trace(x)
    values = {name: trace.nodes[name]["value"] for name in ("z", "s")}
    z = fit.target.unconstrain(values)

    log_q = fit.guide.log_prob(z, fit.target.batch())
    ladj = z[:, 2].sum()  # s is the exponential of the last coordinate

    torch.testing.assert_close(trace.log_prob_sum(), log_q.sum() - ladj)


def test_rows_that_the_plate_draws_are_scaled(fit, x):
    """The model sees the rows that the guide drew, and all of it is multiplied by N / B."""
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    drawn = poutine.trace(guide).get_trace(x, B)
    model = poutine.trace(poutine.replay(two_sites, trace=drawn)).get_trace(x, B)
    found = model.log_prob_sum() - drawn.log_prob_sum()
    torch.manual_seed(1)
    rows = torch.randperm(N)[:B]
    expected = N / B * log_weights(fit, (), rows).sum()

    assert torch.equal(drawn.nodes["row"]["value"], rows)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model", [length, given_rows])
def test_batches_may_be_arguments(model, x):
    fit = fitted(model, x)
    guide, rows = flowvi.pyro_guide(fit), torch.tensor([7, 1, 4])
    args = (x[rows],) if model is length else (x[rows], rows)
    scale = 1 if model is length else N / 3

    torch.manual_seed(1)
    found = -Trace_ELBO().loss(model, guide, *args)
    torch.manual_seed(1)
    expected = scale * log_weights(fit, (), rows).sum().item()

    assert found == pytest.approx(expected, rel=1e-9)


def test_rows_that_were_not_fitted_have_a_guide_too(fit, x):
    new = torch.randn(N, P)
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -Trace_ELBO().loss(two_sites, guide, new)
    torch.manual_seed(1)
    batch = fit.target.as_batch(new)
    z, log_q = fit.guide.sample((), batch)

    expected = (fit.target.log_prob(z, batch) - log_q).sum().item()
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gradient", ["dreg", "total"])
def test_the_importance_weighted_bound_is_that_of_the_fit(gradient, fit, x):
    """Each row has weights of its own; bound and gradient are flowvi's, to rounding."""
    guide = flowvi.pyro_guide(fit)
    loss = flowvi.IWELBO(5, gradient, vectorize_particles=True, max_plate_nesting=1)

    torch.manual_seed(1)
    found = loss.differentiable_loss(two_sites, guide, x)
    ours = torch.autograd.grad(found, list(guide.density.parameters()))
    torch.manual_seed(1)
    batch = fit.target.batch()
    estimate = flowvi.iwelbo(5, gradient)(lambda z: fit.target.log_prob(z, batch), fit.guide, batch)
    expected = torch.autograd.grad(-estimate.bound.sum(), list(fit.guide.parameters()))

    torch.testing.assert_close(found, -estimate.bound.sum())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_importance_weighted_bound_of_subsamples_is_unbiased(fit, x):
    guide = flowvi.pyro_guide(fit)
    loss = flowvi.IWELBO(5, vectorize_particles=True, max_plate_nesting=1)

    parts = torch.tensor([loss.loss(two_sites, guide, x, B) for _ in range(200)])
    wholes = torch.tensor([loss.loss(two_sites, guide, x) for _ in range(50)])

    error = (parts.var() / 200 + wholes.var() / 50).sqrt()
    assert abs(parts.mean() - wholes.mean()) < 4 * error


def test_further_training_improves_the_bound_and_leaves_the_fit_alone(fit, x):
    guide = flowvi.pyro_guide(fit)
    before = [p.clone() for p in fit.guide.parameters()]
    elbo = Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(two_sites, guide, Adam({"lr": 0.01}), elbo)

    first = torch.tensor([elbo.loss(two_sites, guide, x) for _ in range(20)])
    for _ in range(40):
        svi.step(x, B)
    last = torch.tensor([elbo.loss(two_sites, guide, x) for _ in range(20)])

    assert first.mean() - last.mean() > 10 * ((first.var() + last.var()) / 20).sqrt()
    assert all(map(torch.equal, before, fit.guide.parameters()))
    moved = zip(before, guide.density.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in moved)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_simulates_rows_from_their_latents(parallel, fit, x):
    free = poutine.uncondition(two_sites)

    predictive = Predictive(free, guide=flowvi.pyro_guide(fit), num_samples=6, parallel=parallel)
    draws = predictive(x)

    assert {name: tuple(t.shape) for name, t in draws.items()} == {
        "z": (6, N, 2),
        "s": (6, N),
        "x": (6, N, P),
    }
    assert (draws["s"] > 0).all()
    assert not torch.equal(draws["x"][0], draws["x"][1])


def test_a_trace_holds_every_site_once_in_the_plates_of_the_model(x):
    trace = poutine.trace(flowvi.pyro_guide(fitted(plate_within, x))).get_trace(x)

    frames = {
        name: {f.name for f in site["cond_indep_stack"]}
        for name, site in poutine.util.prune_subsample_sites(trace).iter_stochastic_nodes()
    }
    (auxiliary,) = (name for name in frames if name.endswith("_latent"))
    both = {"row", "column"}
    assert frames == {auxiliary: {"row"}, "z": {"row"}, "a": both, "b": both}


def test_enumerated_sites_are_summed_out():
    def model(x):
        with pyro.plate("row", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=x)

    x = torch.randn(N)
    fit = fitted(model, x)
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    torch.manual_seed(1)
    expected = log_weights(fit, ()).sum().item()

    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [TensorDataset, lambda *t: DataLoader(TensorDataset(*t))])
def test_a_fit_of_a_data_set_takes_tensors(kind, x):
    def model(x, y):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    fit = fitted(model, kind(x[:, 0], x[:, 1]))
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -Trace_ELBO().loss(model, guide, x[2:5, 0], y=x[2:5, 1])
    torch.manual_seed(1)
    expected = log_weights(fit, (), [2, 3, 4]).sum().item()

    assert found == pytest.approx(expected, rel=1e-9)


def test_guides_with_parameters_for_each_row_follow_the_plate(x):
    own = flowvi.PerRow(N, make_guide("fullrank", 3, context_dim=4), 4)
    fit = fitted(two_sites, x, guide=own)
    guide = flowvi.pyro_guide(fit)

    torch.manual_seed(1)
    found = -Trace_ELBO().loss(two_sites, guide, x, B)
    torch.manual_seed(1)
    expected = N / B * log_weights(fit, (), torch.randperm(N)[:B]).sum().item()

    assert found == pytest.approx(expected, rel=1e-9)


def test_guides_with_parameters_for_each_row_need_to_know_them(x):
    own = flowvi.PerRow(N, MeanField(1, context_dim=4), 4)
    guide = flowvi.pyro_guide(fitted(given_rows, x, guide=own))
    rows = torch.tensor([7, 1, 4])

    z = guide(x[rows], rows)["z"]
    with pytest.raises(ValueError, match="needs to know which rows these are"):
        guide(x[rows])

    assert z.shape == (3,)


def test_parameters_start_where_the_fit_left_them(x):
    fit = fitted(learned, x)
    with torch.no_grad():
        fit.target.own_0.add_(0.5)

    svi = SVI(learned, flowvi.pyro_guide(fit), Adam({"lr": 1e-6}), Trace_ELBO())
    svi.step(x)

    assert pyro.param("scale").item() == pytest.approx(2.0 * torch.tensor(0.5).exp().item(), 1e-4)


def test_parameters_of_another_training_are_refused(x):
    fit = fitted(learned, x)
    pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)

    with pytest.raises(flowvi.ModelError, match=r"another value of 'scale'.*clear_param_store"):
        flowvi.pyro_guide(fit)


def test_model_and_guide_are_trained_together():
    """A decoder in the model, whose prior and guide are made of one encoder."""
    encoder, decoder = nn.Linear(P, 2), nn.Linear(1, P)

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("encoder", encoder)
        with pyro.plate("row", len(x)):
            mean = encoder(torch.zeros(1, P))[..., :1]
            z = pyro.sample("z", dist.Normal(mean.expand(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    x = torch.randn(N, P) + 3
    target = flowvi.from_pyro(model, x, local="row")
    fit = flowvi.RowFit(target, flowvi.Amortised(encoder, MeanField(1, context_dim=2)), {})
    guide = flowvi.pyro_guide(fit)
    before = decoder.bias.clone()
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(10))

    losses = [svi.step(x) for _ in range(30)]

    assert sum(losses[-5:]) < sum(losses[:5]) - 10
    assert guide.density.encoder.weight is encoder.weight
    assert guide.density.guide is not fit.guide.guide
    assert (decoder.bias - before).abs().min() > 0.1


def test_a_guide_without_gradients_of_draws_trains_by_the_score(x):
    own = flowvi.Amortised(nn.Linear(P, 4), mixture(1, 4, components=2, component="meanfield"))
    guide = flowvi.pyro_guide(fitted(length, x, guide=own))

    Trace_ELBO().differentiable_loss(length, guide, x).backward()

    trace = poutine.trace(guide).get_trace(x)
    (auxiliary,) = (name for name in trace.nodes if name.endswith("_latent"))
    assert not trace.nodes[auxiliary]["fn"].has_rsample
    assert guide.density.encoder.weight.grad.abs().max() > 0


def shared_mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_latents_that_rows_share_are_refused():
    fit = fitted(shared_mean, torch.randn(N))

    with pytest.raises(flowvi.ModelError, match=r"all rows share \(mu\).*Leave local= out"):
        flowvi.pyro_guide(fit)


def test_a_fit_of_both_kinds_of_latents_is_refused():
    fit = flowvi.NestedFit.__new__(flowvi.NestedFit)

    with pytest.raises(flowvi.ModelError, match=r"got a NestedFit.*GuideDistribution"):
        flowvi.pyro_guide(fit)


def test_plain_densities_are_refused(x):
    target = flowvi.from_density(
        lambda v, row: -((v["z"] - row.sum()) ** 2), {"z": flowvi.Site()}, data=x, local="row"
    )

    with pytest.raises(flowvi.ModelError, match=r"plain density and has no Pyro sites: use fit"):
        flowvi.pyro_guide(flowvi.RowFit(target, amortised(target, "meanfield"), {}))


def test_guides_that_read_no_rows_are_refused(x):
    with pytest.raises(flowvi.ModelError, match="Amortised or PerRow; got a MeanField"):
        flowvi.pyro_guide(fitted(length, x, guide=MeanField(1)))


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (length, (torch.zeros(N, 5),), r"shapes \('N', 3\); got \(12, 5\)"),
        (two_sites, (torch.zeros(7, P), 4), "holds 4 of 12 rows; the arguments have 7"),
        (given_rows, ([0.0] * N,), "argument 'x'.*got no tensor there.*uncondition"),
    ],
)
def test_rows_of_a_wrong_kind_are_told(model, args, message, x):
    guide = flowvi.pyro_guide(fitted(model, x))

    with pytest.raises(ValueError, match=message):
        guide(*args)


def test_a_missing_argument_is_named():
    def model(x, y=None):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    x = torch.randn(N)
    guide = flowvi.pyro_guide(fitted(model, x, x + 1))

    with pytest.raises(flowvi.ModelError, match=r"argument 'y'.*got no tensor there"):
        guide(x)


def test_a_model_without_its_plate_is_told(x):
    def model(x, empty=False):
        if not empty:
            length(x)

    guide = flowvi.pyro_guide(fitted(model, x))

    with pytest.raises(flowvi.ModelError, match="does not come to its plate 'row'"):
        guide(x, empty=True)


def test_no_rows_are_refused_by_their_plate(fit):
    words = r"Plate '.*' has size 0: the data has no rows"
    for call in (flowvi.pyro_guide(fit), fit.iw_bound, lambda x: fit.draw(10, data=x)):
        with pytest.raises(ValueError, match=words):
            call(fit.target.batch([0]).data[0][:0])
