"""Likelihoods and hierarchical priors that users write."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()


@MODELS
def horseshoe() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("feature", x.shape[1]):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        beta = pyro.deterministic("beta", raw * lam * tau)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return Case(model, (torch.randn(6, 3), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])))


@MODELS
def counts() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
        with pyro.plate("row", len(y)):
            rate = (a + x).exp()
            pyro.sample("poisson", dist.Poisson(rate), obs=y)
            pyro.sample("nb", dist.NegativeBinomial(r, logits=a + x), obs=y)
            pyro.sample("gp", dist.GammaPoisson(r, r / rate), obs=y)
            pyro.sample("zip", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)
            pyro.sample("zinb", dist.ZeroInflatedNegativeBinomial(r, logits=a, gate=gate), obs=y)
            pyro.sample("geometric", dist.Geometric(gate), obs=y)
            pyro.sample("binomial", dist.Binomial(10, logits=a + x), obs=y)
            pyro.sample("bb", dist.BetaBinomial(r, 1 + gate, total_count=10), obs=y)

    return Case(model, (torch.randn(4), torch.tensor([0.0, 3.0, 1.0, 0.0])))


@MODELS
def categories() -> Case:
    def model(y: Tensor, one_hot: Tensor, counts: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        conc = pyro.sample("conc", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)
            pyro.sample("one_hot", dist.OneHotCategorical(p), obs=one_hot)
            pyro.sample("counts", dist.DirichletMultinomial(conc, 5), obs=counts)

    one_hot = torch.eye(3)[torch.tensor([0, 2])]
    return Case(model, (torch.tensor([2, 1]), one_hot, torch.tensor([[1.0, 2, 2], [5, 0, 0]])))


@MODELS
def multinomial_of_one_vector() -> Case:
    def model(y: Tensor) -> None:
        logits = pyro.sample("logits", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Multinomial(logits=logits, total_count=int(y.sum())), obs=y)

    return Case(model, (torch.tensor([3.0, 0.0, 2.0, 5.0]),))


@MODELS
def ordinal_predictor() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        gaps = pyro.sample("gaps", dist.HalfNormal(torch.ones(2)).to_event(1))
        cut = torch.cat([first[None], first + gaps.cumsum(0)])
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.OrderedLogistic(x * b, cut), obs=y)

    return Case(model, (torch.randn(4), torch.tensor([0, 3, 1, 2])))


@MODELS
def mixture_same_family() -> Case:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(torch.ones(2)).to_event(1))
        with pyro.plate("row", len(y)):
            parts = dist.Normal(mu, s)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), parts), obs=y)

    return Case(model, (torch.randn(6),))


@MODELS
def stick_breaking() -> Case:
    def model(y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Gamma(1.0, 1.0))
        with pyro.plate("stick", 3):
            v = pyro.sample("v", dist.Beta(1.0, alpha))
        rest = (1 - v).cumprod(-1)
        w = torch.cat([v, torch.ones(1)]) * torch.cat([torch.ones(1), rest])
        with pyro.plate("part", 4):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)):
            parts = dist.Normal(mu, 0.5)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), parts), obs=y)

    return Case(model, (torch.randn(5),))


@MODELS
def marginalised_by_hand() -> Case:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Exponential(torch.ones(2)).to_event(1))
        t = torch.arange(len(y) + 1)
        early = torch.cat([torch.zeros(1), dist.Poisson(rate[0]).log_prob(y).cumsum(0)])
        late = dist.Poisson(rate[1]).log_prob(y).flip(0).cumsum(0).flip(0)
        late = torch.cat([late, torch.zeros(1)])
        pyro.factor("switch", torch.logsumexp(early + late + 0.0 * t, 0))

    return Case(model, (torch.tensor([4.0, 5.0, 1.0, 0.0, 1.0]),))


@MODELS
def robust_regression() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(nu, x @ b, s), obs=y)

    return Case(model, (torch.randn(6, 3), torch.randn(6)))


@MODELS
def survival() -> Case:
    def model(time: Tensor, censored: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        law = dist.Weibull(scale, shape)
        with pyro.plate("row", len(time)):
            log_survival = -((time / scale) ** shape)
            log_density = law.log_prob(time)
            pyro.factor("time", torch.where(censored, log_survival, log_density))

    return Case(model, (torch.rand(5) + 0.5, torch.tensor([True, False, False, True, False])))
