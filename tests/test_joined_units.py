"""Classes in schools, and plates side by side: units that are joined from several groups."""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import gammaln, logsumexp
from torch.distributions import constraints

import flowvi
from flowvi.guides.structured import NoLatents, StructuredGuide
from flowvi.targets.structure import MarginalTarget, structure
from flowvi.targets.structure.colouring import colouring

SCHOOLS = 12
# Schools have one to four classes.
SIZES = torch.arange(SCHOOLS) % 4 + 1
SCHOOL = torch.arange(SCHOOLS).repeat_interleave(SIZES)
CLASSES = len(SCHOOL)
SCALES = (0.9, 0.6)


def classes_in_schools(school, y, mean=None):
    """Counts of classes; the mean is known, or a latent."""
    if mean is None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("school", SCHOOLS):
        a = pyro.sample("a", dist.Normal(0.0, SCALES[0]))
    with pyro.plate("class", CLASSES):
        b = pyro.sample("b", dist.Normal(0.0, SCALES[1]))
        pyro.sample("y", dist.Poisson((mean + a[school] + b).exp()), obs=y)


def counts():
    rng = np.random.default_rng(0)
    eta = 1.0 + SCALES[0] * rng.normal(size=SCHOOLS)[SCHOOL] + SCALES[1] * rng.normal(size=CLASSES)
    return torch.tensor(rng.poisson(np.exp(eta)), dtype=torch.get_default_dtype())


def log_evidence(y, mean):
    """By Gauss-Hermite quadrature: over each class given its school, then over the school."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    log_w = np.log(weights) - 0.5 * np.log(2 * np.pi)
    eta = mean + SCALES[0] * nodes[:, None] + SCALES[1] * nodes
    value = (
        np.asarray(y)[:, None, None] * eta - np.exp(eta) - gammaln(np.asarray(y) + 1)[:, None, None]
    )
    of_class = logsumexp(value + log_w, -1)
    of_school = np.zeros((SCHOOLS, len(nodes)))
    np.add.at(of_school, SCHOOL.numpy(), of_class)
    return logsumexp(of_school + log_w, -1).sum()


def marginal(target):
    found = MarginalTarget(target, structure(target))
    found.laplace.centre(torch.zeros(found.dim, dtype=target.dtype))
    return found


def test_classes_are_joined_with_their_schools(default):
    found = structure(flowvi.from_pyro(classes_in_schools, SCHOOL, counts()))
    assert (found.kind, found.plate, found.sites) == ("units", "school", ("a", "b"))
    assert (found.units, found.size, found.local) == (SCHOOLS, 4 + 1, SCHOOLS + CLASSES)
    assert found.shared.tolist() == [0]
    assert "12 units of 'school' (a, b, up to 5 latents each)" in str(found)
    for school, row in enumerate(found.columns):
        own = row[row < 1 + SCHOOLS + CLASSES] - 1
        expected = [school, *(SCHOOLS + (school == SCHOOL).nonzero().flatten()).tolist()]
        assert sorted(own.tolist()) == expected
    filled = found.columns[found.columns > SCHOOLS + CLASSES]
    assert sorted(filled.tolist()) == list(range(1 + SCHOOLS + CLASSES, found.columns.max() + 1))


def test_the_evidence_of_units_of_unequal_size_is_the_exact_one(default):
    y = counts()
    target = marginal(flowvi.from_pyro(classes_in_schools, SCHOOL, y, mean=1.0))
    target.adapt(torch.zeros(8, 0), 0, lambda line: None)
    estimates = torch.cat(
        [
            found.log_p
            for found in target.corrected(
                torch.zeros(400, 0), torch.Generator().manual_seed(1), particles=32
            )
        ]
    ).double()
    ratio = (estimates - log_evidence(y, 1.0)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5 + 1e-6
    assert ratio.std() / len(ratio) ** 0.5 < 0.02


def test_a_drawn_point_has_the_density_that_was_given(default):
    target = flowvi.from_pyro(classes_in_schools, SCHOOL, counts(), mean=1.0)
    found = marginal(target)
    found.adapt(torch.zeros(8, 0), 0, lambda line: None)
    assert found.shape.bent
    filled = found.laplace.derivatives.filled
    identity = found.shape.identity(found.laplace.mode)
    assert torch.equal(found.shape.coefficients[:, filled], identity[:, filled])
    guide = StructuredGuide(found, NoLatents())
    z, log_q = guide.sample((7,))
    assert z.shape == (7, target.dim)
    close = {"rtol": 0, "atol": 1e-8 if z.dtype == torch.float64 else 1e-3}
    torch.testing.assert_close(guide.log_prob(z), log_q, check_dtype=False, **close)
    (weighted,) = found.corrected(torch.zeros(5, 0), torch.Generator().manual_seed(0), 8)
    torch.testing.assert_close(
        weighted.log_joint, target.log_prob(weighted.z), check_dtype=False, **close
    )


def test_a_default_fit_has_the_posterior_of_nested_quadrature():
    y = counts()
    target = flowvi.from_pyro(classes_in_schools, SCHOOL, y)
    fit = flowvi.fit(target, "structured", progress=False)
    draws = fit.draw(2000, seed=1)
    found = flowvi.diagnose(draws)
    grid = np.linspace(-2, 3, 400)
    log_p = (
        np.array([log_evidence(y, mean) for mean in grid]) - 0.5 * grid**2 - 0.5 * np.log(2 * np.pi)
    )
    exact = logsumexp(log_p) + np.log(grid[1] - grid[0])
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_se + 1e-3
    p = np.exp(log_p - logsumexp(log_p))
    mean = (p * grid).sum()
    sd = np.sqrt((p * grid**2).sum() - mean**2)
    assert abs(draws["mean"].mean() - mean) < 4 * sd / 2000**0.5 + 0.05 * sd
    assert draws.units.plate == "school" and len(draws.units.bad) == SCHOOLS
    assert draws["b"].shape == (1, 2000, CLASSES)
    scores = flowvi.loo(draws, units=True)
    assert scores["n_data_points"] == SCHOOLS


def test_plates_side_by_side_are_units_of_one_kind():
    def model(x, y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("counts", len(x)):
            a = pyro.sample("a", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Poisson(a.exp()), obs=x)
        with pyro.plate("shares", len(y)):
            b = pyro.sample("b", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Binomial(10, logits=b), obs=y)

    data = torch.arange(40) % 5 + 1.0, torch.arange(30) % 7 + 1.0
    target = flowvi.from_pyro(model, *data)
    found = structure(target)
    assert (found.units, found.size, found.padding) == (70, 1, 0)
    assert found.plate == "counts, shares" and found.shared.tolist() == [0]
    draws = flowvi.fit(target, "structured", progress=False).draw(500, seed=0)
    names = draws.units.names
    assert names[0] == "counts[0]" and names[39:41] == ["counts[39]", "shares[0]"]
    idata = flowvi.to_inference_data(draws)
    assert idata.posterior["b"].dims == ("chain", "draw", "shares")
    assert flowvi.diagnose(draws).verdict == "trust"


@pytest.mark.parametrize("reason", ["crossed", "large"])
def test_units_that_all_hang_together_or_are_large_are_not_joined(reason):
    a, b = 12, 60
    which = torch.arange(b) % a if reason == "large" else None

    def model(y):
        with pyro.plate("few", a):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        if reason == "crossed":
            with pyro.plate("many", b):
                v = pyro.sample("v", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(u[:, None] + v, 1.0).to_event(2), obs=y)
        else:
            with pyro.plate("many", b):
                v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
                pyro.sample("y", dist.Normal(v, 1.0 + u[which, None].exp()).to_event(1), obs=y)

    y = torch.randn(a, b) if reason == "crossed" else torch.randn(b, 8)
    found = structure(flowvi.from_pyro(model, y))
    assert (found.plate, found.sites, len(found.shared)) == ("many", ("v",), a)


def test_a_third_level_is_joined_too():
    district = torch.arange(SCHOOLS) // 2

    def model(y):
        with pyro.plate("district", SCHOOLS // 2):
            d = pyro.sample("d", dist.Normal(0.0, 1.0))
        with pyro.plate("school", SCHOOLS):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("class", 2 * SCHOOLS):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            school = torch.arange(2 * SCHOOLS) // 2
            pyro.sample("y", dist.Normal(b + a[school] + d[district[school]], 1.0), obs=y)

    found = structure(flowvi.from_pyro(model, torch.randn(2 * SCHOOLS)))
    # Fewer than ten districts stay with the shared latents.
    assert (found.plate, found.units, len(found.shared)) == ("school", SCHOOLS, SCHOOLS // 2)


def test_a_density_of_its_own_without_plates_is_joined():
    sites = {
        "a": flowvi.Site(shape=(SCHOOLS,), support=constraints.real),
        "b": flowvi.Site(shape=(CLASSES,), support=constraints.real),
    }

    def log_prob(values):
        a, b = values["a"], values["b"]
        return -0.5 * (a**2).sum(-1) - 0.5 * ((b - a[..., SCHOOL]) ** 2).sum(-1)

    found = structure(flowvi.from_density(log_prob, sites))
    assert (found.units, found.local, len(found.shared)) == (SCHOOLS, SCHOOLS + CLASSES, 0)


def arrow(d):
    pattern = torch.eye(d, dtype=torch.bool)
    pattern[0] = pattern[:, 0] = True
    return pattern


def band(d, width=1):
    place = torch.arange(d)
    return (place[:, None] - place).abs() <= width


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (arrow(2), 2),
        (arrow(30), 2),
        (band(30), 3),
        (band(30, 2), 5),
        (torch.eye(9, dtype=torch.bool), 1),
        (torch.ones(6, 6, dtype=torch.bool), 6),
    ],
)
def test_few_products_have_all_elements_of_a_sparse_matrix(pattern, most):
    assert colouring(pattern).products <= most


def test_elements_and_traces_of_any_sparse_matrix_are_found():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        d = int(torch.randint(1, 15, (), generator=generator))
        share = float(torch.rand((), generator=generator))
        some = torch.rand(d, d, generator=generator) < share
        found = colouring(some | some.T)
        matrix = torch.randn(d, d, generator=generator, dtype=torch.float64)
        matrix = (matrix + matrix.T) * found.pattern
        products = torch.stack(
            [matrix @ (found.colour == c).double() for c in range(found.products)]
        )
        torch.testing.assert_close(found.elements(products), matrix)
        other = torch.randn(d, d, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(
            (found.weights(other) * products).sum(), (other @ matrix).trace()
        )


def test_walks_of_subjects_need_three_products():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("subject", 20):
            walk = pyro.sample("walk", dist.Normal(0.0, 9.0).expand([8]).to_event(1))
            steps = walk[..., 1:] - walk[..., :-1]
            pyro.factor("steps", dist.Normal(0.0, scale).log_prob(steps).sum(-1))
            pyro.sample("y", dist.Poisson(walk.exp()).to_event(1), obs=y)

    target = flowvi.from_pyro(model, torch.ones(20, 8))
    found = structure(target)
    assert (found.units, found.size) == (20, 8)
    assert torch.equal(found.pattern, band(8))
    few, all_ = (
        MarginalTarget(target, s) for s in (found, replace(found, pattern=torch.empty(0, 0)))
    )
    assert (len(few.laplace.derivatives.probes), len(all_.laplace.derivatives.probes)) == (3, 8)
    theta = torch.linspace(-1, 1, 3)[:, None]
    for one, two in zip(few.value_and_gradient(theta), all_.value_and_gradient(theta), strict=True):
        torch.testing.assert_close(one, two)
