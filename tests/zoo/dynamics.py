"""Time: loops, recursions, buffers written in place, hidden states, differential equations."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()


@MODELS
def autoregression() -> Case:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Uniform(-1.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        for t in range(1, len(y)):
            pyro.sample(f"y_{t}", dist.Normal(a * y[t - 1], s), obs=y[t])

    return Case(model, (torch.randn(5),))


@MODELS
def latent_walk() -> Case:
    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
        for t in range(1, len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, s))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])

    return Case(model, (torch.randn(5),))


@MODELS
def walk_by_cumsum() -> Case:
    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("t", len(y)):
            step = pyro.sample("step", dist.Normal(0.0, 1.0))
        level = pyro.deterministic("level", s * step.cumsum(-1))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    return Case(model, (torch.randn(6),))


@MODELS
def buffer_in_a_loop() -> Case:
    def model(y: Tensor) -> None:
        a0 = pyro.sample("a0", dist.Uniform(0.1, 2.0))
        a1 = pyro.sample("a1", dist.Uniform(0.0, 0.5))
        b1 = pyro.sample("b1", dist.Uniform(0.0, 0.5))
        variance = torch.zeros(len(y))
        variance[0] = 1.0
        for t in range(1, len(y)):
            variance[t] = a0 + a1 * y[t - 1] ** 2 + b1 * variance[t - 1]
        with pyro.plate("t", len(y)):
            pyro.sample("y", dist.Normal(0.0, variance.sqrt()), obs=y)

    def twin(y: Tensor) -> None:
        a0 = pyro.sample("a0", dist.Uniform(0.1, 2.0))
        a1 = pyro.sample("a1", dist.Uniform(0.0, 0.5))
        b1 = pyro.sample("b1", dist.Uniform(0.0, 0.5))
        variance = [torch.tensor(1.0)]
        for t in range(1, len(y)):
            variance.append(a0 + a1 * y[t - 1] ** 2 + b1 * variance[t - 1])
        with pyro.plate("t", len(y)):
            pyro.sample("y", dist.Normal(0.0, torch.stack(variance).sqrt()), obs=y)

    # torch itself has no gradient through a buffer that is written to after it was read.
    return Case(model, (torch.randn(6),), twin=twin)


@MODELS
def every_kind_of_write() -> Case:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        empty = torch.empty(4)
        empty.fill_(0.5)
        empty[1:3] = x[:2]
        empty[0] += x[3]
        masked = torch.ones(4)
        masked[torch.tensor([True, False, True, False])] = x[:2]
        masked.masked_fill_(torch.tensor([False, False, False, True]), 2.0)
        put = torch.zeros(2, 4)
        put[torch.tensor([0, 1]), torch.tensor([1, 3])] = x[1:3]
        put[:, 0] = x[0]
        put[1].mul_(2.0).add_(x)
        put.t()[2] = x[2:]
        accumulated = torch.zeros(3)
        accumulated.index_add_(0, torch.tensor([0, 0, 2, 1]), x)
        accumulated.index_put_((torch.tensor([1]),), x[:1], accumulate=True)
        scattered = torch.zeros(4).scatter_(0, torch.tensor([3, 1]), x[:2])
        scattered.scatter_add_(0, torch.tensor([0, 0]), x[2:])
        clamped = x.clone().clamp_(min=-0.5)
        clamped[clamped.new_tensor([0]).long()] = x[1:2].exp()
        out = torch.zeros(4)
        torch.mul(x.detach().clone() * 0.0 + 1.0, 2.0, out=out)
        whole = torch.zeros(4).copy_(x)
        whole[x > 0.3] = 0.25
        whole.unsqueeze_(0).squeeze_(0)
        total = (
            empty.square().sum()
            + masked.sum() * put.sum()
            + accumulated.square().sum()
            + scattered.sin().sum()
            + clamped.sum()
            + out.sum()
            + (whole * x).sum()
        )
        pyro.factor("f", -0.1 * total)

    return Case(model)


@MODELS
def views_of_a_buffer() -> Case:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        grid = torch.zeros(3, 3)
        grid.diagonal().copy_(x)
        row = grid[1]
        row += 1.0
        grid[0, 2] = grid.sum() * x[0]
        flat = grid.view(-1)
        flat[3:5] *= x[1]
        grid.narrow(0, 2, 1)[0, 0] = x[2]
        constant = torch.ones(3)
        kept = constant * 2.0
        constant += x
        pyro.factor("f", -(grid.square().sum() + (kept * constant * constant).sum()))

    def twin() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        zero, one = torch.zeros(()), torch.ones(())
        total = x.sum() + 3.0
        top = [x[0], zero, total * x[0]]
        middle = [x[1], (x[1] + 1.0) * x[1], one]
        bottom = [x[2], zero, x[2]]
        grid = torch.stack([*top, *middle, *bottom])
        pyro.factor("f", -(grid.square().sum() + (2.0 * (1.0 + x) ** 2).sum()))

    return Case(model, twin=twin)


@MODELS
def forward_algorithm() -> Case:
    def model(y: Tensor) -> None:
        trans = pyro.sample("trans", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        log_alpha = torch.full((2,), -0.6931) + dist.Normal(mu, 1.0).log_prob(y[0])
        for t in range(1, len(y)):
            arrive = torch.logsumexp(log_alpha[:, None] + trans.log(), 0)
            log_alpha = arrive + dist.Normal(mu, 1.0).log_prob(y[t])
        pyro.factor("y", torch.logsumexp(log_alpha, 0))

    return Case(model, (torch.randn(5),))


@MODELS
def discrete_hmm() -> Case:
    def model(y: Tensor) -> None:
        init = pyro.sample("init", dist.Dirichlet(torch.ones(2)))
        trans = pyro.sample("trans", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        law = dist.DiscreteHMM(init.log(), trans.log(), dist.Normal(mu, 1.0))
        pyro.sample("y", law, obs=y)

    return Case(model, (torch.randn(5),), simulates=False)


@MODELS
def gaussian_hmm() -> Case:
    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        a = pyro.sample("a", dist.Uniform(-1.0, 1.0))
        law = dist.GaussianHMM(
            dist.Normal(torch.zeros(1), 1.0).to_event(1),
            a * torch.eye(1),
            dist.Normal(torch.zeros(1), s).to_event(1),
            torch.eye(1),
            dist.Normal(torch.zeros(1), 0.5).to_event(1),
            duration=len(y),
        )
        pyro.sample("y", law, obs=y)

    return Case(model, (torch.randn(5, 1),))


@MODELS
def runge_kutta() -> Case:
    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.LogNormal(torch.zeros(4) - 0.5, 0.3).to_event(1))
        start = pyro.sample("start", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))

        def rate(state: Tensor) -> Tensor:
            prey, predator = state[0], state[1]
            return torch.stack(
                [
                    theta[0] * prey - theta[1] * prey * predator,
                    -theta[2] * predator + theta[3] * prey * predator,
                ]
            )

        state, path = start, []
        for _ in range(len(y)):
            k1 = rate(state)
            k2 = rate(state + 0.05 * k1)
            k3 = rate(state + 0.05 * k2)
            k4 = rate(state + 0.1 * k3)
            state = state + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            path.append(state)
        mean = pyro.deterministic("path", torch.stack(path))
        with pyro.plate("t", len(y)):
            pyro.sample("y", dist.LogNormal(mean.log(), 0.3).to_event(1), obs=y)

    return Case(model, (torch.rand(5, 2) + 0.5,))


@MODELS
def recurrent_network() -> Case:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 0.5).to_event(2))
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 0.5).to_event(1))
        h = torch.zeros(2)
        for t in range(len(y)):
            pyro.sample(f"y_{t}", dist.Normal(h.sum(), 1.0), obs=y[t])
            h = torch.tanh(w @ h + u * y[t])

    return Case(model, (torch.randn(4),))


@MODELS
def data_decides_the_branch() -> Case:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        level = torch.zeros(())
        for t in range(len(y)):
            level = level + (a[0] if y[t] > 0 else a[1].exp())
            pyro.sample(f"y_{t}", dist.Normal(level, 1.0), obs=y[t])

    return Case(model, (torch.tensor([0.3, -0.2, 1.0]),))
