"""Matrices: factorisations, solves, Gaussian processes, multivariate normals."""

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()


def _kernel(x: Tensor, length: Tensor, scale: Tensor) -> Tensor:
    gap = (x[:, None] - x) / length
    return scale**2 * torch.exp(-0.5 * gap**2) + 1e-4 * torch.eye(len(x))


@MODELS
def gaussian_process() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        cov = _kernel(x, length, scale) + noise**2 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)

    return Case(model, (torch.linspace(0, 1, 5), torch.randn(5)))


@MODELS
def latent_gaussian_process() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.InverseGamma(5.0, 5.0))
        f = pyro.sample("f", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        mean = torch.linalg.cholesky(_kernel(x, length, torch.tensor(1.0))) @ f
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Poisson(mean.exp()), obs=y)

    return Case(model, (torch.linspace(0, 2, 5), torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0])))


@MODELS
def solves() -> Case:
    def model(b: Tensor) -> None:
        d = pyro.sample("d", dist.LogNormal(torch.zeros(3), 0.3).to_event(1))
        off = pyro.sample("off", dist.Normal(0.0, 0.2))
        a = torch.diag(d) + off * torch.ones(3, 3) + torch.eye(3)
        lower = torch.linalg.cholesky(a @ a.mT)
        x = torch.linalg.solve(a, b)
        y = torch.linalg.solve_triangular(lower, b[:, None], upper=False)[:, 0]
        z = torch.cholesky_solve(b[:, None], lower)[:, 0]
        w = torch.linalg.inv(a) @ b
        sign, logdet = torch.linalg.slogdet(a)
        pyro.deterministic("sign", sign)
        eigenvalues = torch.linalg.eigvalsh(a + a.mT)
        total = (x + y + z + w).square().sum() + eigenvalues.sum() + torch.linalg.det(a)
        pyro.factor("f", -0.1 * total - logdet)

    return Case(model, (torch.tensor([1.0, -0.5, 0.3]),))


@MODELS
def learned_covariance() -> Case:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        chol = pyro.sample("chol", dist.LKJCholesky(2, 1.0))
        tril = torch.diag_embed(scale) @ chol
        with pyro.plate("group", 3):
            a = pyro.sample("a", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
            pyro.sample("y", dist.Normal(a, 1.0).to_event(1), obs=y)

    return Case(model, (torch.randn(3, 2),))


@MODELS
def low_rank_normal() -> Case:
    def model(y: Tensor) -> None:
        factor = pyro.sample("factor", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
        diag = pyro.sample("diag", dist.HalfNormal(torch.ones(4)).to_event(1))
        with pyro.plate("row", len(y)):
            law = dist.LowRankMultivariateNormal(torch.zeros(4), factor, diag)
            pyro.sample("y", law, obs=y)

    return Case(model, (torch.randn(3, 4),))


@MODELS
def pyro_kernel() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        kernel = gp.kernels.Matern32(1, lengthscale=torch.tensor(1.0))
        cov = kernel(x / length) + 0.1 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)

    return Case(model, (torch.linspace(0, 1, 4), torch.randn(4)), params=True)


@MODELS
def factor_analysis() -> Case:
    def model(y: Tensor) -> None:
        w = pyro.sample("W", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("row", len(y)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.einsum("df,nf->nd", w, h)
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    return Case(model, (torch.randn(4, 3),))


@MODELS
def convolution_and_fft() -> Case:
    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        signal = torch.nn.functional.conv1d(y[None, None], k[None, None], padding=1)[0, 0]
        spectrum = torch.fft.rfft(torch.cat([k, torch.zeros(5)])).abs().square()
        with pyro.plate("t", len(y)):
            pyro.sample("y", dist.Normal(signal + spectrum.mean(), 1.0), obs=y)

    return Case(model, (torch.randn(8),))
