"""Modules and parameters: networks with random weights, learned constants."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from zoo.case import Case, Family

MODELS = Family()


class Bayesian(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.one = PyroModule[nn.Linear](2, 3)
        self.one.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.one.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.two = PyroModule[nn.Linear](3, 1)
        self.two.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.two.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.scale = PyroSample(lambda self: dist.HalfNormal(1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean: Tensor = self.two(torch.tanh(self.one(x))).squeeze(-1)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)
        return mean


@MODELS
def bayesian_network() -> Case:
    return Case(Bayesian(), (torch.randn(5, 2), torch.randn(5)))


class Mixed(PyroModule):
    """Random weights, learned weights, learned constants and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = PyroModule[nn.Linear](2, 1, bias=False)
        self.head.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.body = nn.Linear(3, 2)
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.shift = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("centre", torch.ones(3))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.head(torch.relu(self.body(x - self.centre))).squeeze(-1) + self.shift
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


@MODELS
def learned_and_random_weights() -> Case:
    return Case(Mixed(), (torch.randn(4, 3), torch.randn(4)), params=True, holds=True)


@MODELS
def registered_module() -> Case:
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 4))

    def model(y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=y)

    seen = (torch.rand(3, 4) > 0.5).to(torch.get_default_dtype())
    return Case(model, (seen,), params=True, holds=True)


@MODELS
def constrained_parameters() -> Case:
    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        w = pyro.param("w", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
        shift = pyro.param("shift", lambda: torch.zeros(2))
        low = pyro.param("low", torch.eye(2), constraint=constraints.lower_cholesky)
        tau = pyro.sample("tau", dist.Gamma(2.0, scale))
        with pyro.plate("row", len(y)):
            mean = (w * torch.arange(3.0)).sum() + shift[0] * low.sum() + shift[1]
            pyro.sample("y", dist.Normal(mean, tau), obs=y)

    return Case(model, (torch.randn(4),), params=True)


@MODELS
def frozen_network() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 1)).eval()
    net.requires_grad_(False)

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(net(z).squeeze(-1), 1.0), obs=y)

    return Case(model, (torch.randn(3),), holds=True)


@MODELS
def attention() -> Case:
    net = nn.MultiheadAttention(4, 2, batch_first=True).eval().requires_grad_(False)

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
        seen, _ = net(z[None], z[None], z[None], need_weights=False)
        pyro.sample("y", dist.Normal(seen.sum(), 1.0), obs=y)

    return Case(model, (torch.tensor(0.3),), twice=False, holds=True)


@MODELS
def recurrent_layer() -> Case:
    net = nn.GRUCell(2, 3)

    def model(y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("row", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(net(z).sum(-1), 1.0), obs=y)

    return Case(model, (torch.randn(4),), params=True, holds=True)


@MODELS
def dropout_in_eval_mode() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 1)).eval()

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net.requires_grad_(False)(z)[0], 1.0), obs=y)

    return Case(model, (torch.tensor(0.3),), holds=True)
