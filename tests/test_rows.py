"""Guides for local latents: bounds that are bounds, gradients that are right, training."""

import dataclasses
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from families import gradients, perturbed
from torch import nn
from torch.distributions import MultivariateNormal

import flowvi
from flowvi.draws.row_bounds import RowBounds
from flowvi.guides import FullRank, MeanField, make_guide
from flowvi.guides.amortized import Encoder
from flowvi.guides.recipes import amortised
from flowvi.objectives import Renyi, WakeSleep
from flowvi.objectives.rows import row_step
from flowvi.runtime import distributed
from flowvi.runtime.clock import Clock
from flowvi.training.minibatch import Minibatch
from flowvi.training.row_gradient import RowGradient
from flowvi.training.trainer import Trainer

N, D, P = 40, 2, 3


def length(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture
def normal():
    """z ~ N(0, 1), x ~ N(z, 1): every row's evidence is N(0, 2)."""
    x = torch.randn(N)
    return flowvi.from_pyro(length, x, local="data"), dist.Normal(0.0, 2**0.5).log_prob(x)


class Identity(nn.Module):
    def forward(self, x):
        return x[:, None]


def exact_guide():
    """The posterior N(x / 2, 1 / 2) of the model above."""
    guide = MeanField(1, context_dim=1)
    guide.start(torch.zeros(1), torch.tensor([[0.5**0.5]]))
    with torch.no_grad():
        # In units of the width: shift x / 2 over sqrt(1 / 2).
        guide.affine.params.weight[0, 0] = 0.5 / 0.5**0.5
    return flowvi.Amortised(Identity(), guide)


def test_the_exact_posterior_gives_the_evidence_of_every_row(normal):
    target, evidence = normal
    guide, places = exact_guide(), torch.tensor([3, 17, 5])

    for objective in (flowvi.elbo(2), flowvi.iwelbo(8), flowvi.renyi(0.5, 4), flowvi.wake_sleep(4)):
        batch = target.batch(places)
        found = objective(lambda z, b=batch: target.log_prob(z, b), guide, batch)
        torch.testing.assert_close(found.bound, evidence[places])


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_gradients_land_through_the_encoder(normal, alpha):
    target, _ = normal
    encoder = nn.Linear(1, 1)
    with torch.no_grad():
        encoder.weight.fill_(1.0)
        encoder.bias.zero_()
    guide = flowvi.Amortised(nn.Sequential(Identity(), encoder), exact_guide().guide)

    found = row_step(target, guide, Renyi(alpha, 4), target.batch())

    assert gradients(found.objective, guide).abs().max() < 1e-9


def subsampled(x):
    with pyro.plate("data", N, subsample_size=4) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def prior(x):
    with pyro.plate("data", N, subsample_size=4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_the_bound_of_minibatches_is_that_of_all_rows(normal):
    """N / B outside the bound: unbiased, and below the evidence, where Pyro's is far above it."""
    target, evidence = normal
    guide = perturbed(exact_guide(), std=0.5)
    objective, x = flowvi.iwelbo(5), target.batch().data[0]

    def of(batch):
        with torch.no_grad():
            return N * objective(lambda z: target.log_prob(z, batch), guide, batch).bound.mean()

    parts = torch.stack([of(target.batch(torch.randperm(N)[:4])) for _ in range(400)])
    wholes = torch.stack([of(target.batch()) for _ in range(100)])
    se = (parts.var() / 400 + wholes.var() / 100).sqrt()
    assert abs(parts.mean() - wholes.mean()) < 4 * se
    assert wholes.mean() < evidence.sum()

    theirs = pyro.infer.RenyiELBO(alpha=0, num_particles=10, vectorize_particles=False)
    losses = torch.tensor([-theirs.loss(subsampled, prior, x) for _ in range(20)])
    assert losses.mean() > evidence.sum() + 4 * losses.std() / 20**0.5


@pytest.fixture
def ppca():
    w = torch.randn(P, D)
    x = torch.randn(N, D) @ w.T + 0.5 * torch.randn(N, P)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, 0.5).to_event(1), obs=x)

    evidence = MultivariateNormal(torch.zeros(P), w @ w.T + 0.25 * torch.eye(P)).log_prob(x)
    return flowvi.from_pyro(model, x, local="data"), evidence


@pytest.mark.parametrize(("name", "epochs"), [("auto", 120), ("fullrank", 150)])
def test_a_fit_reaches_the_evidence(ppca, name, epochs):
    target, evidence = ppca
    fit = flowvi.fit(target, name, flowvi.elbo(4), epochs=epochs, batch_size=20, lr=1e-2)

    found = fit.iw_bound(particles=500)

    assert found.minus(found).value == 0.0
    error = torch.from_numpy(found.values) - evidence
    assert abs(error.mean()) < 4 * error.std() / N**0.5 + 1e-3
    assert -0.05 < found.elbo_mean - evidence.mean() < 0.02
    assert (fit.draw(400, rows=[0, 3, 5]).khat < 0.7).all()


def test_bounds_of_rows_are_compared_row_by_row():
    """What rows have in common, here nearly all of the scatter, is no error of a difference."""
    rng = np.random.default_rng(0)
    common, apart = 10 * rng.normal(size=50), rng.normal(size=50)
    one, two = RowBounds(common + apart, common, 5), RowBounds(common, common, 5)

    value, se = one.minus(two)

    assert value == pytest.approx(apart.mean())
    assert se == pytest.approx(apart.std(ddof=1) / 50**0.5)
    assert one.mean == pytest.approx((common + apart).mean())
    assert two.se == two.elbo_se == pytest.approx(common.std(ddof=1) / 50**0.5)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_a_weighted_prior_is_for_training_only(ppca, beta):
    """The objective is E[log p(x | z) + beta (log p(z) - log q)]; what is told is the bound."""
    target, _ = ppca
    guide, batch = perturbed(amortised(target, "fullrank"), std=0.1), target.batch(range(7))

    torch.manual_seed(1)
    found = row_step(target, guide, flowvi.elbo(3, "total"), batch, beta=beta)
    torch.manual_seed(1)
    z, log_q = guide.sample((3,), batch)
    likelihood, log_prior = target.terms(z, batch).unbind(-1)
    expected = (likelihood + beta * (log_prior - log_q)).mean()

    torch.testing.assert_close(found.objective, expected)
    torch.testing.assert_close(gradients(found.objective, guide), gradients(expected, guide))
    torch.testing.assert_close(found.bound, (likelihood + log_prior - log_q).mean().detach())
    torch.testing.assert_close(found.divergence, (log_q - log_prior).mean().detach())


def test_free_bits_take_the_divergence_out_of_the_gradient_while_it_is_small(ppca):
    target, _ = ppca
    guide, batch = perturbed(amortised(target, "fullrank"), std=0.1), target.batch(range(7))

    def one(free_bits):
        torch.manual_seed(1)
        return row_step(target, guide, flowvi.elbo(2, "total"), batch, free_bits=free_bits)

    divergence = float(one(0.0).divergence)
    torch.manual_seed(1)
    z, _ = guide.sample((2,), batch)
    likelihood = target.terms(z, batch)[..., 0].mean()

    free, paid = one(divergence + 1.0), one(divergence - 0.1)
    torch.testing.assert_close(free.objective, likelihood - divergence - 1.0)
    torch.testing.assert_close(gradients(free.objective, guide), gradients(likelihood, guide))
    torch.testing.assert_close(paid.objective, one(0.0).objective)
    torch.testing.assert_close(free.bound, paid.bound)


def test_wake_sleep_has_the_gradients_of_its_two_halves():
    """The model follows the IW bound, the guide weighted maximum likelihood."""
    shift = torch.zeros(2, requires_grad=True)
    guide, k = perturbed(FullRank(2)), 6

    def log_p(z):
        return -(z - shift).pow(2).sum(-1)

    torch.manual_seed(3)
    found = WakeSleep(k)(log_p, guide).bound
    ours = torch.autograd.grad(found, [shift, *guide.parameters()])
    torch.manual_seed(3)
    z = guide.sample((k,)).z.detach()
    log_w = log_p(z) - guide.log_prob(z)
    v = torch.softmax(log_w, 0).detach()
    models = torch.autograd.grad((v * log_p(z)).sum(), shift)
    guides = torch.autograd.grad((v * guide.log_prob(z)).sum(), list(guide.parameters()))

    torch.testing.assert_close(found, log_w.logsumexp(0) - math.log(k))
    for a, b in zip(ours, [*models, *guides], strict=True):
        torch.testing.assert_close(a, b)


def test_schedules():
    linear = flowvi.Minibatch(epochs=10, warmup_epochs=5, decay=0.5, lr=1.0)
    cyclical = flowvi.Minibatch(epochs=8, warmup_epochs=1, warmup="cyclical")

    assert [linear.beta(e) for e in (0, 2.5, 5, 9)] == [1e-3, 0.5, 1.0, 1.0]
    assert [cyclical.beta(e) for e in (0.5, 1.0, 1.5, 2.5)] == [0.5, 1.0, 1.0, 0.5]
    assert [linear.rate(s, 1000) for s in (0, 99, 499)] == [0.01, 1.0, 1.0]
    assert linear.rate(999, 1000) == pytest.approx(0.02, abs=0.002)
    assert flowvi.Minibatch(decay=0.0).rate(999, 1000) == 1e-3


def test_same_seed_same_bits_and_the_callers_numbers_stay(normal):
    target, _ = normal
    torch.manual_seed(5)
    before = torch.get_rng_state()

    one, two = (flowvi.fit(target, "meanfield", epochs=2, seed=3) for _ in range(2))
    other = flowvi.fit(target, "meanfield", epochs=2, seed=4)

    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.guide.parameters(), two.guide.parameters(), strict=True)
    )
    assert one.history["bound"][0] != other.history["bound"][0]


def test_the_best_epoch_is_kept_and_training_ends_when_it_stays_so(normal):
    """At a huge step size the bound soon falls."""
    target, _ = normal
    fit = flowvi.fit(
        target,
        "meanfield",
        epochs=60,
        batch_size=8,
        lr=0.1,
        validation=0.25,
        minibatch=flowvi.Minibatch(patience=3, decay=0.0),
    )
    history = fit.history["validation"]

    assert len(history) - 1 - np.argmax(history) == 3 and len(history) < 60
    assert fit.meta["rows"] == 30 and fit.meta["validation"] == 10


PLATEAU = Minibatch.to_plateau(patience=2, batch_size=8, lr=0.1)


def to_plateau(target, **more):
    settings = {"validation": 0.25, "minibatch": PLATEAU, "progress": False, **more}
    return flowvi.fit(target, "meanfield", **settings)


def test_training_ends_at_the_plateau_after_two_smaller_step_sizes(normal):
    """The best epoch is kept, with its parameters, not those after it."""
    target, _ = normal
    fit = to_plateau(target, seed=1)
    history, kept = fit.history["validation"], fit.meta["kept"]

    assert kept == np.argmax(history) + 1 < len(history) < PLATEAU.epochs
    assert fit.meta["stopped"].startswith("no rise of the validation bound in 2 epochs")
    assert sum(line.startswith("step size") for line in fit.log) == 2
    assert any(line.startswith(f"kept epoch {kept}:") for line in fit.log)
    steps = 4 * len(history)
    planned = PLATEAU.rate(steps - 1, 4 * PLATEAU.epochs)
    np.testing.assert_allclose(fit.history["lr"][-1], planned * 0.3**2, rtol=1e-12)

    cut = to_plateau(target, seed=1, callback=lambda epoch: epoch.epoch == kept)
    assert cut.meta["stopped"] == "the callback" and len(cut.history["bound"]) == kept
    for a, b in zip(fit.guide.parameters(), cut.guide.parameters(), strict=True):
        assert torch.equal(a, b)


def test_epochs_of_the_warm_up_are_no_reason_to_stop(normal):
    """At this step size the second epoch is the best: two more end the training, or ten and two."""
    target, _ = normal
    settings = Minibatch(patience=2, batch_size=8, lr=0.3)

    fits = [
        to_plateau(target, minibatch=dataclasses.replace(settings, warmup_epochs=epochs))
        for epochs in (0, 10)
    ]

    assert len(fits[0].history["bound"]) == fits[0].meta["kept"] + 2 < 10
    assert len(fits[1].history["bound"]) >= 11


@pytest.mark.parametrize("cut", [3, 1000])
def test_a_training_to_the_plateau_is_resumed(normal, tmp_path, cut):
    """A fit that was cut off goes on to the same end; one that is over takes no more epochs."""
    target, _ = normal
    whole = to_plateau(target)
    folder = {"checkpoint": tmp_path / "c"}
    to_plateau(target, callback=lambda epoch: epoch.epoch == cut, **folder)

    fit = to_plateau(target, resume=True, **folder)

    assert fit.meta["stopped"] == whole.meta["stopped"] and fit.log == whole.log
    np.testing.assert_array_equal(fit.history["validation"], whole.history["validation"])
    for a, b in zip(fit.guide.parameters(), whole.guide.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_plateau_needs_rows_that_are_held_out(normal):
    target, _ = normal
    with pytest.raises(ValueError, match="validation=, rows or a share"):
        to_plateau(target, validation=None)
    with pytest.raises(ValueError, match="set patience"):
        Minibatch(drops=1)


def test_parameters_have_memory_of_their_own_after_a_fit():
    decoder = nn.Linear(D, P)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    target = flowvi.from_pyro(model, torch.randn(N, P), local="data")
    before = decoder.weight.detach().clone()
    fit = flowvi.fit(target, "fullrank", epochs=2)

    assert not torch.equal(decoder.weight, before)
    for p in [*fit.guide.parameters(), *decoder.parameters()]:
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size() and p.grad is None


def test_an_interrupt_keeps_what_was_learnt(normal):
    target, _ = normal

    def press(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    fit = flowvi.fit(target, "meanfield", epochs=9, callback=press)

    assert fit.meta["interrupted"] and fit.meta["epochs"] == 2
    assert "interrupted after 2 epochs" in fit.log


def test_bounds_do_not_depend_on_the_pieces(normal, monkeypatch):
    target, evidence = normal
    fit = flowvi.fit(target, exact_guide(), epochs=1, lr=1e-9)

    whole = fit.iw_bound(particles=7)
    monkeypatch.setattr(flowvi.runtime.memory, "PIECE", 60)
    small = fit.iw_bound(particles=7)

    np.testing.assert_allclose(small.values, evidence, atol=1e-5)
    np.testing.assert_allclose(whole.values, small.values, atol=1e-5)


def test_bounds_and_draws_do_not_depend_on_the_limit(normal, monkeypatch):
    """The same draws to the bit, evaluated in other parts."""
    target, _ = normal
    fit = flowvi.fit(target, "meanfield", epochs=1)

    bound, draws = fit.iw_bound(particles=50), fit.draw(30)
    monkeypatch.setattr(flowvi.runtime.memory, "EVALUATED", 1e-5)
    same, again = (
        fit.iw_bound(particles=50, max_memory="32MB"),
        fit.draw(30, max_memory="32MB"),
    )

    np.testing.assert_array_equal(again.z, draws.z)
    np.testing.assert_allclose(again.log_p, draws.log_p, rtol=1e-6)
    np.testing.assert_allclose(same.values, bound.values, rtol=1e-6)


def test_draws_are_of_the_posterior(normal):
    target, _ = normal
    fit = flowvi.fit(target, exact_guide(), epochs=1, lr=1e-9)
    x = target.batch().data[0]

    draws = fit.draw(2000, rows=[4, 9], seed=1)
    new = fit.draw(2000, torch.tensor([3.0]), seed=1)

    assert draws["z"].shape == (1, 2000, 2) and draws.log_weights.shape == (1, 2000, 2)
    tolerance = 4 * (0.5 / 2000) ** 0.5
    np.testing.assert_allclose(draws["z"].mean((0, 1)), x[[4, 9]] / 2, atol=tolerance)
    np.testing.assert_allclose(new["z"].mean(), 1.5, atol=tolerance)


@pytest.mark.parametrize(("scale", "right"), [(1.0, True), (0.7, False)])
def test_one_fit_serves_all_simulated_rows(normal, scale, right):
    """Ranks under the exact posterior are uniform; under one too narrow they are not."""
    target, _ = normal
    guide = exact_guide()
    with torch.no_grad():
        guide.guide.affine.params.value[1] += math.log(scale)
    fit = flowvi.fit(target, guide, epochs=1, lr=1e-9)

    found = flowvi.sbc(fit, fits=300, draws=200, levels=99)

    assert found.plain.shape == (300, 1) and found.labels == ("z",)
    assert (found.uniform["plain"] > 0.01) == right
    assert found.uniform["resampled"] > 0.001


def test_draws_for_rows_reach_arviz(normal, tmp_path):
    target, evidence = normal
    fit = flowvi.fit(target, exact_guide(), epochs=1, lr=1e-9)
    draws = fit.draw(30, rows=[4, 9])

    idata = flowvi.to_inference_data(draws, predictive=True, particles=10)
    idata.to_netcdf(tmp_path / "rows.nc")

    assert idata.posterior["z"].dims == ("chain", "draw", "data")
    assert list(idata.posterior["data"]) == [4, 9]
    chains, each, rows = idata.sample_stats["log_weight"].shape
    assert (chains * each, rows) == (30, 2)
    assert idata.posterior_predictive["x"].shape == (chains, each, 2)
    np.testing.assert_allclose(idata.observed_data["x"], target.batch([4, 9]).data[0])
    np.testing.assert_allclose(idata.log_likelihood["x"][0, 0], evidence[[4, 9]], atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_saved_fits_come_back(ppca, tmp_path, own):
    target, _ = ppca
    guide = flowvi.Amortised(Encoder(P, 4), make_guide("iaf", D, 4)) if own else "meanfield"
    fit = flowvi.fit(target, guide, epochs=2)

    fit.save(tmp_path)
    back = flowvi.load(tmp_path, target, guide if own else None)

    np.testing.assert_array_equal(back.draw(5).z, fit.draw(5).z)
    assert back.meta == fit.meta and back.log == fit.log
    np.testing.assert_array_equal(back.history["bound"], fit.history["bound"])
    if own:
        with pytest.raises(ValueError, match="guide of your own making"):
            flowvi.load(tmp_path, target)


def test_a_guide_without_an_encoder_learns_every_row(normal):
    target, evidence = normal
    guide = flowvi.PerRow(N, MeanField(1, context_dim=2), context_dim=2)

    fit = flowvi.fit(target, guide, flowvi.elbo(4), epochs=400, batch_size=N, lr=3e-2)

    assert abs(fit.iw_bound(particles=100).elbo_mean - evidence.mean()) < 0.02
    with pytest.raises(ValueError, match="For new rows use Amortised"):
        fit.guide.sample((2,), torch.zeros(3))
    for call in (fit.iw_bound, lambda x: fit.draw(10, data=x)):
        with pytest.raises(ValueError, match="For new rows use Amortised"):
            call(torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 10}, "has latents for each row: steps has no meaning"),
        ({"validation": 1.5}, "share of them to hold out; got 1.5"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1; got 0"),
        ({"objective": "iw"}, "No objective for rows named 'iw'"),
        ({"guide": MeanField(3)}, "has D = 3 but each row of length has D = 1"),
        ({"guide": flowvi.PerRow(7, MeanField(1, 2), 2)}, "parameters for 7 rows but"),
        (
            {"guide": flowvi.PerRow(N, MeanField(1, 2), 2), "validation": 0.2},
            "rows that were not trained on; PerRow has none",
        ),
        (
            {"objective": flowvi.iwelbo(2), "minibatch": flowvi.Minibatch(free_bits=1.0)},
            "free_bits are for the ELBO",
        ),
    ],
)
def test_settings_without_meaning_are_refused(normal, settings, words):
    with pytest.raises(ValueError, match=words):
        flowvi.fit(normal[0], **{"guide": "meanfield", **settings})


def test_settings_of_rows_are_refused_for_other_targets():
    target = flowvi.from_density(lambda v: -v["a"].square(), {"a": flowvi.Site()})

    with pytest.raises(ValueError, match=r"no latents for each row.*: epochs has no meaning"):
        flowvi.fit(target, epochs=3)
    with pytest.raises(ValueError, match="wake_sleep is for latents of rows"):
        flowvi.fit(target, objective="wake_sleep")


@pytest.mark.parametrize("rows", [7, 1])
def test_processes_share_the_rows_of_a_batch(normal, monkeypatch, rows):
    """The mean of two processes' gradients is that of one with all rows, parts equal or not."""
    target, _ = normal
    guide = perturbed(exact_guide(), std=0.3)
    step = RowGradient(target, guide, flowvi.elbo(2000), flowvi.Minibatch(), Clock())
    batch = target.batch(range(rows))

    def gradient():
        found = []
        for _ in range(20):
            bound, flat = step(batch, 1.0)
            found.append(torch.cat([bound.reshape(1), flat]))
        return torch.stack(found)

    whole = gradient()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_mean", lambda b, g, told, dtype: (b, g, [*told]))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(gradient())
    both = (parts[0] + parts[1]) / 2

    se = (whole.var(0) / 20 + both.var(0) / 20).sqrt()
    assert ((whole - both).mean(0).abs() < 4.5 * se + 1e-12).all()


def test_a_batch_in_parts_has_the_gradient_of_the_whole(normal):
    """Parts that fit memory, of unequal sizes: their sum is the mean over the batch."""
    target, _ = normal
    guide = perturbed(exact_guide(), std=0.3)
    step = RowGradient(target, guide, flowvi.elbo(2000), flowvi.Minibatch(), Clock())
    batch = target.batch(range(7))

    def gradient():
        found = []
        for _ in range(20):
            bound, flat = step(batch, 1.0)
            found.append(torch.cat([bound.reshape(1), flat]))
        return torch.stack(found)

    whole = gradient()
    step._fits = 3
    parts = gradient()

    assert [len(part.places) for part in step.parts(batch)] == [3, 3, 1]
    se = (whole.var(0) / 20 + parts.var(0) / 20).sqrt()
    assert ((whole - parts).mean(0).abs() < 4.5 * se + 1e-12).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Training of length ended early")
def test_rows_go_back_where_their_bound_collapses(normal):
    """Steps that are far too large: the last good state, with half the step."""
    target, _ = normal

    fit = flowvi.fit(target, "meanfield", epochs=100, batch_size=2, lr=0.3, progress=False)

    assert any("restored the last good state" in line for line in fit.log)
    assert fit.history["bound"].min() < -1000
    assert fit.iw_bound(particles=200).elbo_mean > -5


@pytest.mark.parametrize("workers", [0, 1])
def test_items_come_from_a_data_set(workers):
    """Worker processes fetch the same rows in the same order."""
    x = torch.randn(30)
    by_items = flowvi.from_pyro(length, torch.utils.data.TensorDataset(x), local="data")
    by_tensor = flowvi.from_pyro(length, x, local="data")
    settings = flowvi.Minibatch(epochs=1, batch_size=10, workers=workers)

    one = flowvi.fit(by_items, "meanfield", minibatch=settings)
    two = flowvi.fit(by_tensor, "meanfield", minibatch=settings)

    np.testing.assert_allclose(one.history["bound"], two.history["bound"])


@pytest.mark.parametrize("cut", [1, 3])
def test_a_fit_of_rows_goes_on_where_it_was_cut_off(ppca, tmp_path, cut):
    """To the bit, validation and the best epoch included."""
    target, _ = ppca
    settings = {"epochs": 5, "batch_size": 9, "validation": 0.2, "seed": 2}
    whole = flowvi.fit(target, "realnvp", **settings)

    def crash(epoch):
        if epoch.epoch == cut + 1:
            raise SystemError

    with pytest.raises(SystemError):
        flowvi.fit(target, "realnvp", **settings, checkpoint=tmp_path, callback=crash)
    back = flowvi.fit(target, "realnvp", **settings, checkpoint=tmp_path, resume=True)

    for key in ("bound", "validation", "lr"):
        np.testing.assert_array_equal(back.history[key], whole.history[key])
    for a, b in zip(back.guide.parameters(), whole.guide.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="checkpoint of another fit: 'seed' was 2"):
        flowvi.fit(target, "realnvp", **{**settings, "seed": 3}, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("at", [3, 6])
def test_a_fit_of_rows_goes_on_from_within_an_epoch(ppca, tmp_path, monkeypatch, at):
    """An interrupt ends the present step; a fit that goes on has the bits of a whole one."""
    target, _ = ppca
    settings = {"epochs": 3, "batch_size": 9, "validation": 0.2, "seed": 2, "progress": False}
    whole = flowvi.fit(target, "realnvp", **settings)
    taken, step = [], Trainer._step

    def pressed(trainer, *rest):
        taken.append(rest)
        if len(taken) == at:
            trainer.session.clock.interrupt()
        return step(trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", pressed)
        cut = flowvi.fit(target, "realnvp", **settings, checkpoint=tmp_path)
    back = flowvi.fit(target, "realnvp", **settings, checkpoint=tmp_path, resume=True)

    assert cut.meta["interrupted"] and len(taken) == at
    np.testing.assert_array_equal(back.history["bound"], whole.history["bound"])
    for a, b in zip(back.guide.parameters(), whole.guide.parameters(), strict=True):
        assert torch.equal(a, b)
