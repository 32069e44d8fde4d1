"""Every function of draws or fits takes every kind of them, or says in one sentence what to do."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import brief
from torch import nn
from torch.distributions import MultivariateNormal

import flowvi
from flowvi import diagnostics, plots
from flowvi.compat.arviz_groups import group_names
from flowvi.guides import MeanField
from flowvi.interop.read_draws import diagnosis_of, draws_of
from flowvi.reporting import page

ROWS, WIDTH = 24, 0.9
DRAWN = (
    "global",
    "subsampled",
    "structured",
    "rows",
    "nested",
    "chains",
    "resampled",
    "resampled rows",
)
FITS = ("global", "subsampled", "structured", "rows", "nested")


def shared(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(y), subsample_size=8) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


def local(y, scale=1.0):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def both(y):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Identity(nn.Module):
    def forward(self, x):
        return x[:, None]


def guide(scale=1.0):
    """The posterior of a row, of prior N(0, scale^2), but for its width."""
    variance = 1 / (1 + scale**-2)
    width = WIDTH * variance**0.5
    one = MeanField(1, context_dim=1)
    one.start(torch.zeros(1), torch.tensor([[width]]))
    with torch.no_grad():
        one.affine.params.weight[0, 0] = variance / width
    return flowvi.Amortised(Identity(), one)


def of_rows(y, scale=1.0):
    target = flowvi.from_pyro(local, y, scale, local="data")
    return flowvi.fit(target, guide(scale), epochs=1, lr=1e-9, progress=False)


def chains_of(draws):
    """Draws of a guide that is exact, as two chains that mixed at once."""

    def halved(array):
        return array.reshape(2, -1, *array.shape[2:])

    return replace(
        draws,
        z=halved(draws.z),
        log_p=halved(draws.log_p),
        log_q=halved(draws.log_q),
        values={name: halved(value) for name, value in draws.values.items()},
        meta={**draws.meta, "mcmc": {"warmup": 0}},
        stats={"diverging": np.zeros((2, len(draws) // 2), bool)},
    )


class Kinds:
    """Fits and draws of every kind, each made once, when it is first asked for."""

    def __init__(self) -> None:
        self.y = torch.linspace(-1.5, 2.5, ROWS)
        self.made: dict[str, Any] = {}

    def fit(self, kind: str) -> Any:
        return self._once(f"{kind} fit", lambda: self._fitted(kind))

    def draws(self, kind: str) -> flowvi.Draws:
        return self._once(kind, lambda: self._drawn(kind))

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
                warnings.simplefilter("ignore")
                brief(patch)
                self.made[key] = make()
        return self.made[key]

    def _fitted(self, kind: str) -> Any:
        y = self.y
        if kind == "rows":
            return of_rows(y)
        if kind == "structured":
            return flowvi.fit(flowvi.from_pyro(both, y), "structured", progress=False)
        if kind == "nested":
            target = flowvi.from_pyro(both, y, local="data")
            return flowvi.nested(target, "fullrank", "fullrank", steps=10)
        target = flowvi.from_pyro(shared if kind == "global" else subsampled, y)
        return flowvi.fit(target, "fullrank", steps=5, progress=False)

    def _drawn(self, kind: str) -> flowvi.Draws:
        if kind == "chains":
            return chains_of(self.draws("global"))
        if kind.startswith("resampled"):
            return flowvi.resample(self.draws("rows" if "rows" in kind else "global"))
        return self.fit(kind).draw(1000, seed=1)

    def evidence(self, kind: str) -> float:
        """In closed form."""
        own = {"rows": 2.0, "nested": 2.0, "structured": 2.0}.get(kind, 1.0)
        common = 0.0 if kind == "rows" else 1.0
        covariance = own * torch.eye(ROWS) + common * torch.ones(ROWS, ROWS)
        normal = MultivariateNormal(torch.zeros(ROWS).double(), covariance.double())
        return float(normal.log_prob(self.y.double()))


@pytest.fixture(scope="module")
def every() -> dict[torch.dtype, Kinds]:
    return {}


@pytest.fixture
def kinds(every: dict[torch.dtype, Kinds]) -> Kinds:
    """Those made in double precision."""
    return every.setdefault(torch.float64, Kinds())


# Kinds under double precision, and those of rows under single too.
SINGLE = ("structured", "rows", "nested")
EVERY = [*((torch.float64, k) for k in DRAWN), *((torch.float32, k) for k in SINGLE)]


# A property of what comes out, by function and kind; None where it is refused.
Check = Callable[[Kinds, str, Any], None]


def near(value: float, se: float, exact: float) -> None:
    assert abs(value - exact) < 4 * se + 1e-5 * abs(exact)


def judged(kinds: Kinds, kind: str, d: flowvi.diagnostics.Diagnosis) -> None:
    assert d.verdict != "do not trust" and d.reasons, str(d)
    assert (d.rows is None) == (kind not in ("rows", "resampled rows"))
    if kind != "chains":
        exact = kinds.evidence("rows" if d.rows else kind.replace("resampled", "global"))
        near(d.log_evidence, d.log_evidence_se, exact)
    if d.rows is not None:
        assert d.elbo == pytest.approx(d.rows.elbo.sum())
        assert d.log_evidence == pytest.approx(d.rows.log_evidence.sum())


def bounded(kinds: Kinds, kind: str, found: Any) -> None:
    low, high = found[0], found[1]
    assert low.bound <= high.bound + 4 * high.se + 1e-9
    assert high.bound <= kinds.evidence(kind) + 4 * high.se + 1e-4
    assert len(found.rows) == (2 if kind == "rows" else 0)
    for whole, each in zip(found, found.rows, strict=False):
        assert each.bound.shape == (ROWS,) and whole.bound == pytest.approx(each.bound.sum())


def equal_weights(kinds: Kinds, kind: str, better: flowvi.Draws) -> None:
    """Resampled draws have the variance of the posterior, where the guide's is 0.81 of it."""
    assert better.resampled and better.log_p.shape == kinds.draws(kind).log_p.shape
    if kind == "rows":
        spread = better["z"].var(axis=(0, 1), ddof=1)
        near(spread.mean(), 0.5 * math.sqrt(2 / (500 * ROWS)), 0.5)
        np.testing.assert_allclose(
            better["z"].mean((0, 1)), kinds.y / 2, atol=4 * math.sqrt(0.5 / 500)
        )


def estimated(kinds: Kinds, kind: str, e: flowvi.diagnostics.Evidence) -> None:
    near(e.log_evidence, e.log_evidence_se, kinds.evidence(kind))
    assert e.reliable and e.certain < kinds.evidence(kind)
    if kind == "rows":
        exact = dist.Normal(0.0, 2**0.5).log_prob(kinds.y).numpy()
        errors = np.abs(e.rows.log_evidence - exact)
        assert (errors < 4.5 * e.rows.log_evidence_se + 1e-5).all() and e.rows.reliable.all()
        assert e.log_evidence == pytest.approx(e.rows.log_evidence.sum())


def left_out(kinds: Kinds, kind: str, record: Any) -> None:
    """In closed form, the posterior without y_n is normal."""
    y, n = kinds.y.double(), ROWS
    own = 2.0 if kind == "structured" else 1.0
    precision = 1 + (n - 1) / own
    mean = (y.sum() - y) / own / precision
    exact = dist.Normal(mean, math.sqrt(own + 1 / precision)).log_prob(y).sum()
    value = getattr(record, "elpd_loo", None) or record.elpd
    assert value == pytest.approx(float(exact), abs=0.6)


def located(kinds: Kinds, kind: str, found: flowvi.diagnostics.Where) -> None:
    assert np.isfinite(found.displacement).all() and found.heaviest == 95
    names = {label.partition("[")[0].removeprefix("unconstrained ") for label in found.labels}
    assert names == set(kinds.draws(kind).values)
    if kind == "rows":
        draws, place = kinds.draws(kind), found.labels.index("z[5]")
        alone = diagnostics.where(draws.log_weights[..., 5], {"z": draws["z"][..., 5]})
        assert found.displacement[place] == pytest.approx(alone.displacement[0])
        assert found.khat[place] == pytest.approx(alone.khat[0])


def predicted(kinds: Kinds, kind: str, found: flowvi.Prediction) -> None:
    lead = kinds.draws(kind).log_p.shape[:2]
    assert found["y"].shape == (*lead, ROWS)
    rest = 0.5 if "rows" in kind else 0.0
    if rest:
        # Given its latent, which has seen it.
        near(float(found["y"].var((0, 1)).mean()), 0.05, 1 + rest * (1 if "res" in kind else 0.81))
    np.testing.assert_allclose(found["y"].mean(), float(kinds.y.mean()) / (1 + rest), atol=0.25)
    assert np.isfinite(found.log_density("y")).all()


def compared(kinds: Kinds, kind: str, found: Any) -> None:
    a, b = found.models
    if kind in ("chains", "resampled", "resampled rows"):
        assert "have no weights" in a.note and math.isnan(a.log_evidence)
    else:
        near(a.log_evidence, a.log_evidence_se, kinds.evidence(kind))
        assert b.difference == 0.0 and a.probability == pytest.approx(0.5)
    assert (found.loo is None) == (kind in ("rows", "nested", "resampled rows"))


def grouped(kinds: Kinds, kind: str, idata: Any) -> None:
    draws = kinds.draws(kind)
    names = group_names(idata)
    assert {"posterior", "sample_stats", "observed_data"} <= set(names)
    assert ("row_diagnosis" in names) == ("rows" in kind)
    np.testing.assert_array_equal(np.sort(np.ravel(idata["observed_data"]["y"])), kinds.y.numpy())
    back = draws_of(idata)
    np.testing.assert_array_equal(back.log_p, draws.log_p)
    assert back.dims == {n: draws.dims[n] for n in draws.values}
    assert back.by_row == draws.by_row and back.labels == draws.labels
    d, again = flowvi.diagnose(draws), diagnosis_of(idata)
    assert again.verdict == d.verdict and again.reasons == d.reasons
    if d.rows is not None:
        assert again.rows.labels == d.rows.labels
        np.testing.assert_array_equal(again.rows.khat, d.rows.khat)


def drawn(kinds: Kinds, kind: str, ax: Any) -> None:
    assert ax is not None


def calibrated(kinds: Kinds, kind: str, calibration: Any) -> None:
    assert len(calibration.plain) + len(calibration.failures) == 2
    assert ((calibration.plain >= 0) & (calibration.plain <= 9)).all()


FUNCTIONS: dict[str, tuple[Callable[[Kinds, Any], Any], Check, set[str]]] = {
    # Call, property, and the kinds that are refused.
    "diagnose": (lambda k, d: flowvi.diagnose(d), judged, set()),
    "bounds": (
        lambda k, d: flowvi.bounds(d, (1, 20)),
        bounded,
        {"chains", "resampled", "resampled rows"},
    ),
    "resample": (
        lambda k, d: flowvi.resample(d, seed=3),
        equal_weights,
        {"chains", "resampled", "resampled rows"},
    ),
    "evidence": (
        lambda k, d: flowvi.evidence(d),
        estimated,
        {"chains", "resampled", "resampled rows"},
    ),
    "loo": (lambda k, d: flowvi.loo(d), left_out, {"rows", "nested", "resampled rows"}),
    "where": (lambda k, d: flowvi.where(d), located, {"chains", "resampled", "resampled rows"}),
    "predict": (lambda k, d: flowvi.predict(d, k.y), predicted, set()),
    "compare": (lambda k, d: flowvi.compare({"a": d, "b": d}), compared, set()),
    "to_inference_data": (lambda k, d: flowvi.to_inference_data(d, particles=10), grouped, set()),
    "plot_khat": (
        lambda k, d: plots.plot_khat(d),
        drawn,
        {"chains", "resampled", "resampled rows"},
    ),
    "neutra": (lambda k, d: flowvi.neutra(d), drawn, {*DRAWN}),
    "pyro_guide": (lambda k, d: flowvi.pyro_guide(d), drawn, {*DRAWN}),
    "report": (lambda k, d: flowvi.report(d, "report.html"), drawn, {*DRAWN}),
    "sbc": (
        lambda k, d: flowvi.sbc(
            d, fits=2, draws=100, levels=9, guide="meanfield", steps=20, progress=False
        ),
        calibrated,
        {"subsampled", "rows", "nested", "resampled rows"},
    ),
}
OF_DRAWS = [name for name in FUNCTIONS if name not in ("neutra", "pyro_guide", "report", "sbc")]


def refused(name: str, error: Exception) -> None:
    """One sentence, which names the function and what to do."""
    assert type(error) in (ValueError, TypeError, flowvi.ModelError), repr(error)
    text = str(error)
    assert text.startswith(f"{name} ") and "got" in text
    assert text.endswith(".") and ". " not in text and "\n" not in text


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat", "ignore:The number of draws")
@pytest.mark.parametrize(("precision", "kind"), EVERY, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_draws_of_every_kind_are_taken_or_refused(every, name, precision, kind):
    torch.set_default_dtype(precision)
    kinds = every.setdefault(precision, Kinds())
    call, check, refuses = FUNCTIONS[name]
    draws = kinds.draws(kind)
    if kind not in refuses:
        check(kinds, kind, call(kinds, draws))
        return

    with pytest.raises((ValueError, TypeError)) as caught:
        call(kinds, draws)

    refused(name, caught.value)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("name", OF_DRAWS)
def test_fits_are_not_draws(kinds, name, kind):
    fit = kinds.fit(kind)
    with pytest.raises(TypeError, match=rf"got a {type(fit).__name__}.*{name}\(fit\.draw\(") as e:
        FUNCTIONS[name][0](kinds, fit)

    refused(name, e.value)


@pytest.mark.parametrize("name", OF_DRAWS)
def test_bounds_of_rows_are_not_draws(kinds, name):
    found = kinds.fit("rows").iw_bound(particles=10)

    with pytest.raises(TypeError, match=r"got a RowBounds.*\.minus\(other\)") as caught:
        FUNCTIONS[name][0](kinds, found)

    refused(name, caught.value)


OF_FITS: dict[str, tuple[Callable[[Any, Any], Any], set[str]]] = {
    # Call, and the kinds that are refused.
    "neutra": (lambda fit, _: flowvi.neutra(fit, 0), {"structured", "rows", "nested"}),
    "pyro_guide": (lambda fit, _: flowvi.pyro_guide(fit), {"nested"}),
    "sbc": (
        lambda fit, _: flowvi.sbc(fit, fits=4, draws=100, levels=9),
        {"global", "subsampled", "structured", "nested"},
    ),
}


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("name", OF_FITS)
def test_fits_of_every_kind_are_taken_or_refused(kinds, name, kind):
    """To sample takes long: that neutra takes a fit shows in what it says of no warmup."""
    call, refuses = OF_FITS[name]
    fit = kinds.fit(kind)
    if kind not in refuses and name != "neutra":
        call(fit, None)
        return

    with pytest.raises((TypeError, ValueError)) as caught:
        call(fit, None)

    if kind in refuses:
        refused(name, caught.value)
    else:
        assert "warmup must be a whole number of at least 100" in str(caught.value)


@pytest.mark.parametrize("kind", FITS)
def test_every_kind_of_fit_is_reported(kinds, kind, tmp_path, monkeypatch):
    """Pictures are of the same tables, and take most of the time: one kind has them."""
    if kind != "rows":
        monkeypatch.setattr(page, "pictures", lambda contents: [])

    file = flowvi.report(kinds.fit(kind), tmp_path / "report.html", draws=2000)

    text = file.read_text()
    assert "log evidence" in text and "do not trust" not in text
    assert ("Rows that are trusted least" in text) == (kind == "rows")
    assert ('id="units"' in text) == (kind == "structured")
    if kind == "rows":
        assert "<td>trust</td>" in text and text.count("<figure>") == 6
