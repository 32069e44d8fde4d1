"""Ways of writing and calling a model."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam, TransformReparam
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()


def _regression(x: Tensor, y: Tensor, *, prior: float = 1.0) -> None:
    b = pyro.sample("b", dist.Normal(0.0, prior))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


@MODELS
def partial_with_keywords() -> Case:
    model = functools.partial(_regression, prior=2.0)
    return Case(model, (torch.randn(4),), {"y": torch.randn(4)})


@MODELS
def callable_object() -> Case:
    class Model:
        def __init__(self, prior: float) -> None:
            self.prior = prior

        def __call__(self, x: Tensor, y: Tensor) -> None:
            _regression(x, y, prior=self.prior)

    return Case(Model(3.0), (torch.randn(4), torch.randn(4)))


@MODELS
def numpy_arguments() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        _regression(torch.as_tensor(x), torch.as_tensor(y))

    return Case(model, (np.linspace(0.0, 1.0, 4), np.arange(4.0)))


@MODELS
def dictionary_of_data() -> Case:
    def model(data: dict[str, Tensor]) -> None:
        _regression(data["x"], data["y"])

    return Case(model, ({"x": torch.randn(4), "y": torch.randn(4)},))


@MODELS
def data_from_outside() -> Case:
    x, y = torch.randn(4), torch.randn(4)

    return Case(lambda: _regression(x, y))


@MODELS
def numbers_observed() -> Case:
    def model(number: bool = True) -> None:
        wrap = (lambda v: v) if number else torch.tensor
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("float", dist.Normal(m, 1.0), obs=wrap(0.5))
        pyro.sample("int", dist.Poisson(m.exp()), obs=wrap(3))
        pyro.sample("whole", dist.Normal(m, 1.0), obs=wrap(2))
        pyro.sample("bool", dist.Bernoulli(logits=m), obs=1.0 if not number else True)
        pyro.sample("array", dist.Normal(m, 1.0), obs=np.float64(0.3) if number else wrap(0.3))

    def twin() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("float", dist.Normal(m, 1.0), obs=torch.tensor(0.5))
        pyro.sample("int", dist.Poisson(m.exp()), obs=torch.tensor(3.0))
        pyro.sample("whole", dist.Normal(m, 1.0), obs=torch.tensor(2.0))
        pyro.sample("bool", dist.Bernoulli(logits=m), obs=torch.tensor(1.0))
        pyro.sample("array", dist.Normal(m, 1.0), obs=torch.tensor(0.3))

    return Case(model, twin=twin)


@MODELS
def integers_and_booleans() -> Case:
    def model(y: Tensor, hit: Tensor, cast: bool = False) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y * 1.0 if cast else y)
            pyro.sample("hit", dist.Bernoulli(logits=m), obs=hit * 1.0 if cast else hit)

    def twin(y: Tensor, hit: Tensor) -> None:
        model(y, hit, cast=True)

    return Case(model, (torch.tensor([1, 3, 2]), torch.tensor([True, False, True])), twin=twin)


@MODELS
def odd_names() -> Case:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("a.b", dist.Normal(a, 1.0))
        c = pyro.sample("x/y", dist.LogNormal(b, 1.0))
        d = pyro.sample("μ prime", dist.Normal(c, 1.0))
        e = pyro.sample("class", dist.Normal(d, 1.0))
        pyro.deterministic("log p(x)", a + e)
        with pyro.plate("row of data", len(y)):
            pyro.sample("y hat", dist.Normal(e, 1.0), obs=y)

    return Case(model, (torch.randn(3),))


@MODELS
def conditioned_model() -> Case:
    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(m, s))

    return Case(poutine.condition(model, data={"y": torch.randn(3)}))


@MODELS
def intervened_model() -> Case:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(m, 1.0))
        pyro.sample("y", dist.Normal(m, s), obs=y)

    return Case(poutine.do(model, data={"s": torch.tensor(2.0)}), (torch.tensor(0.4),))


@MODELS
def reparametrised_model() -> Case:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", dist.Normal(m, s))
            w = pyro.sample("w", dist.LogNormal(x, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    config = {"x": LocScaleReparam(0.0), "w": TransformReparam()}
    return Case(poutine.reparam(model, config=config), (torch.randn(3),))


@MODELS
def submodels() -> Case:
    def scale(name: str) -> Tensor:
        return pyro.sample(f"{name}/scale", dist.HalfNormal(1.0))

    def model(y: Tensor) -> Tensor:
        first, second = scale("one"), scale("two")
        m = pyro.sample("m", dist.Normal(0.0, first))
        with pyro.plate("row", len(y)):
            return pyro.sample("y", dist.Normal(m, second), obs=y)

    return Case(model, (torch.randn(3),))


@MODELS
def no_data_only_a_prior() -> Case:
    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("dim", 3):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    return Case(model)


@MODELS
def single_inside_double() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x.double() @ b, 1.0), obs=y)

    return Case(model, (torch.randn(4, 2, dtype=torch.float32), torch.randn(4)))


@MODELS
def sparse_design() -> Case:
    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(torch.sparse.mm(design, b[:, None])[:, 0], 1.0), obs=y)

    design = torch.randn(4, 3).relu().to_sparse()
    return Case(model, (torch.randn(4),), holds=True)


@MODELS
def stopped_gradient() -> Case:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        still = x.detach()
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x * still + still[0] + x[0], 1.0), obs=y)

    return Case(model, (torch.randn(3),), twice=False)


@MODELS
def directions() -> Case:
    def model(y: Tensor) -> None:
        one = pyro.sample("one", dist.ProjectedNormal(torch.zeros(3)))
        with pyro.plate("row", 2):
            many = pyro.sample("many", dist.ProjectedNormal(torch.ones(3)))
            pyro.sample("y", dist.Normal(many @ one, 1.0), obs=y)

    config = {name: ProjectedNormalReparam() for name in ("one", "many")}
    return Case(poutine.reparam(model, config=config), (torch.randn(2),))


@MODELS
def functions_of_every_kind() -> Case:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        top, _ = x.topk(2)
        ordered, order = x.sort()
        largest = x.max(0)
        pieces = x.unfold(0, 2, 1).prod(-1)
        chosen = torch.where(x > 0, x, x.exp())
        gathered = x.gather(0, torch.tensor([3, 1])) + x.flip(0)[:2] + x.roll(1)[:2]
        rounded = torch.outer(x, x).tril().sum() + torch.kron(x[:2], x[2:]).sum()
        norm = torch.linalg.vector_norm(x) + y.sum()
        special = torch.special.expit(x).sum() + torch.lgamma(x.exp()).sum() + torch.erf(x).sum()
        mixed = torch.logaddexp(x[0], x[1]) + torch.nn.functional.softmax(x, 0)[2]
        total = (
            top.sum()
            + ordered[0]
            + largest.values
            + pieces.sum()
            + chosen.sum()
            + gathered.sum()
            + rounded
            + norm
            + special
            + mixed
            + x[order].cumsum(0)[1]
        )
        pyro.factor("f", -0.05 * total.square())

    return Case(model, (torch.randn(3),))
