"""Plates: nested, crossed, in sequence, and explicit rows."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()


@MODELS
def eight_schools() -> Case:
    def model(effect: Tensor, error: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(effect)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta)
            pyro.sample("y", dist.Normal(theta, error), obs=effect)

    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Case(model, (effect, error))


@MODELS
def nested_plates() -> Case:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with pyro.plate("row", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    return Case(model, (torch.randn(3, 4),))


@MODELS
def crossed_plates() -> Case:
    def model(y: Tensor) -> None:
        people = pyro.plate("person", 3, dim=-2)
        items = pyro.plate("item", 4, dim=-1)
        with people:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            ease = pyro.sample("ease", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with people, items:
            pyro.sample("y", dist.Bernoulli(logits=ability + ease.sum(-1)), obs=y)

    return Case(model, ((torch.rand(3, 4) > 0.5).to(torch.get_default_dtype()),))


@MODELS
def sequential_plate() -> Case:
    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        for i in pyro.plate("row", len(y)):
            x = pyro.sample(f"x_{i}", dist.Normal(0.0, s))
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=y[i])

    return Case(model, (torch.randn(3),))


@MODELS
def indexed_groups() -> Case:
    def model(group: Tensor, y: Tensor) -> None:
        with pyro.plate("group", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        table = pyro.sample("table", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        with pyro.plate("row", len(y)):
            looked_up = torch.nn.functional.embedding(group, table)
            pyro.sample("y", dist.Normal(a[group] + looked_up.sum(-1), 1.0), obs=y)

    return Case(model, (torch.tensor([0, 2, 1, 1, 0]), torch.randn(5)))


@MODELS
def summed_by_group() -> Case:
    def model(group: Tensor, y: Tensor) -> None:
        with pyro.plate("row", len(group)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        total = torch.zeros(3).index_add(0, group, x)
        other = torch.zeros(3).scatter_add(0, group, x.exp())
        with pyro.plate("group", 3):
            pyro.sample("y", dist.Normal(total + other, 1.0), obs=y)

    return Case(model, (torch.tensor([0, 2, 1, 1, 0]), torch.randn(3)))


@MODELS
def explicit_rows() -> Case:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y), subsample=torch.tensor([1, 4, 2])) as rows:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[rows])

    return Case(model, (torch.randn(6),))


@MODELS
def scalar_observed_in_a_plate() -> Case:
    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(m, 1.0), obs=torch.tensor(0.7))

    return Case(model)


@MODELS
def no_plate_at_all() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    return Case(model, (torch.randn(5, 2), torch.randn(5)))
