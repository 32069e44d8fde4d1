"""Generalized linear and hierarchical models made at random, whose posteriors have one mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

LIKELIHOODS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "normal": lambda eta, s: dist.Normal(eta, s),
    "student_t": lambda eta, s: dist.StudentT(4.0, eta, s),
    "gamma": lambda eta, s: dist.Gamma(1 / s, (-eta).exp() / s),
    "bernoulli": lambda eta, s: dist.Bernoulli(logits=eta),
    "binomial": lambda eta, s: dist.Binomial(12, logits=eta),
    "poisson": lambda eta, s: dist.Poisson(eta.exp()),
    "negative_binomial": lambda eta, s: dist.NegativeBinomial(1 / s, logits=eta + s.log()),
}
SCALED = ("normal", "student_t", "gamma", "negative_binomial")
SCALES: dict[str, Callable[[], Any]] = {
    "half_normal": lambda: dist.HalfNormal(1.0),
    "half_cauchy": lambda: dist.HalfCauchy(1.0),
    "exponential": lambda: dist.Exponential(1.0),
}
GROUPS = ("none", "intercepts", "centred", "slopes")


def random_model(seed: int) -> tuple[str, Callable[..., None], tuple[Any, ...]]:
    """A name, a model and its arguments; data are drawn from the model itself."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        options = list(options)
        return options[int(torch.randint(len(options), (), generator=generator))]

    kind, scale, grouping = pick(LIKELIHOODS), pick(SCALES), pick(GROUPS)
    rows, columns, groups = pick((30, 100, 240)), pick((1, 2, 4)), pick((4, 10))
    x = torch.randn(rows, columns, generator=generator)
    group = torch.randint(groups, (rows,), generator=generator)

    def model(x: Tensor, group: Tensor, y: Tensor | None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        s = pyro.sample("s", SCALES[scale]()) if kind in SCALED else torch.tensor(1.0)
        eta = a + x @ b
        if grouping == "intercepts":
            tau = pyro.sample("tau", SCALES[scale]())
            z = pyro.sample("z", dist.Normal(torch.zeros(groups), 1.0).to_event(1))
            eta = eta + tau * z[group]
        elif grouping == "centred":
            tau = pyro.sample("tau", SCALES[scale]())
            theta = pyro.sample("theta", dist.Normal(torch.zeros(groups), tau).to_event(1))
            eta = eta + theta[group]
        elif grouping == "slopes":
            tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
            factor = pyro.sample("L", dist.LKJCholesky(2, 2.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(groups, 2), 1.0).to_event(2))
            theta = z @ (tau[:, None] * factor).mT
            eta = eta + theta[group, 0] + theta[group, 1] * x[:, 0]
        with pyro.plate("row", rows):
            pyro.sample("y", LIKELIHOODS[kind](eta.clamp(-20.0, 20.0), s), obs=y)

    truth = {
        "a": 0.5 * torch.randn((), generator=generator),
        "b": 0.5 * torch.randn(columns, generator=generator),
        "s": torch.tensor(0.7),
        "tau": torch.tensor([0.6, 0.4]) if grouping == "slopes" else torch.tensor(0.6),
        "z": torch.randn((groups, 2) if grouping == "slopes" else (groups,), generator=generator),
        "theta": 0.6 * torch.randn(groups, generator=generator),
        "L": torch.tensor([[1.0, 0.0], [0.4, 0.84**0.5]]),
    }
    with torch.random.fork_rng(), pyro.poutine.block():
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(pyro.condition(model, truth)).get_trace(x, group, None)
    y = trace.nodes["y"]["value"]
    return f"{kind}, {grouping}, {scale}, {rows} rows", model, (x, group, y)
