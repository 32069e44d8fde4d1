"""Masks, scales, factors, missing data."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()
NAN = float("nan")


@MODELS
def masked_block() -> Case:
    def model(y: Tensor, keep: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=keep):
            x = pyro.sample("x", dist.Normal(m, 1.0).mask(True))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return Case(model, (torch.randn(4), torch.tensor([True, True, False, True])))


@MODELS
def masked_distribution() -> Case:
    def model(y: Tensor, keep: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0).mask(keep), obs=y)
            pyro.sample("w", dist.Normal(m, 1.0).mask(False), obs=y)

    return Case(model, (torch.randn(4), torch.tensor([True, True, False, True])))


@MODELS
def scaled() -> Case:
    @poutine.scale(scale=0.5)
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.scale(scale=torch.tensor([1.0, 2.0, 0.5])):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    return Case(model, (torch.randn(3),))


@MODELS
def factors() -> Case:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("scalar", -a.abs())
        with pyro.plate("row", 3):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.factor("rows", -((b - x) ** 4))
        pyro.deterministic("half", a / 2)
        pyro.deterministic("fixed", x)

    return Case(model, (torch.randn(3),))


@MODELS
def nan_behind_poutine_mask() -> Case:
    def model(y: Tensor, replace: bool = False) -> None:
        keep = y.isfinite()
        y = torch.where(keep, y, 0.5) if replace else y
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=keep):
            pyro.sample("y", dist.Gamma(s, m.exp()), obs=y)

    def twin(y: Tensor) -> None:
        model(y, replace=True)

    return Case(model, (torch.tensor([1.0, NAN, 2.0]),), twin=twin)


@MODELS
def nan_behind_mask_of_vectors() -> Case:
    def model(y: Tensor, replace: bool = False) -> None:
        keep = y.isfinite().all(-1)
        y = torch.where(keep[:, None], y, 0.0) if replace else y
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        tril = pyro.sample("L", dist.LKJCholesky(2, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(m, scale_tril=tril).mask(keep), obs=y)

    def twin(y: Tensor) -> None:
        model(y, replace=True)

    return Case(model, (torch.tensor([[1.0, 0.2], [NAN, 1.0], [0.4, NAN]]),), twin=twin)


@MODELS
def imputed_by_obs_mask() -> Case:
    def model(y: Tensor, keep: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, s), obs=y, obs_mask=keep)

    def twin(y: Tensor, keep: Tensor) -> None:
        # The missing rows are latent, and they alone.
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=keep):
            pyro.sample("y_observed", dist.Normal(m, s), obs=torch.where(keep, y, 0.0))
        free = pyro.sample("y_unobserved", dist.Normal(m, s).expand([2]).to_event(1))
        pyro.deterministic("y", y.masked_scatter(~keep, free))

    return Case(
        model,
        (torch.tensor([1.0, NAN, 2.0, NAN]), torch.tensor([True, False, True, False])),
        twin=twin,
    )


@MODELS
def out_of_support_behind_mask() -> Case:
    def model(y: Tensor, replace: bool = False) -> None:
        keep = y > -99
        y = torch.where(keep, y, 1.0) if replace else y
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=keep):
            pyro.sample("time", dist.LogNormal(rate, 1.0), obs=y)

    def twin(y: Tensor) -> None:
        model(y, replace=True)

    return Case(model, (torch.tensor([1.0, -99.0, 2.0]),), twin=twin)
