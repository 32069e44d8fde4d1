"""Training steps of other libraries, and by hand: functions that take a number of steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_models import Problem
from torch import Tensor, nn

Turn = Callable[[int], object]
DEPTH, HIDDEN, BOUND, LR = 8, 64, 3.0, 1e-3
FLOWS = 3
SPLINES, BINS = 4, 8
BETA1, BETA2, LEAST = 0.9, 0.999, 1e-8


def pyro_svi(kind: str, problem: Problem, draws: int) -> dict[str, Turn]:
    """Pyro's SVI with a guide of the same kind."""
    import pyro
    import pyro.distributions.transforms as T
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer import autoguide as auto

    def transform(dim: int) -> nn.Module:
        order = torch.arange(dim).flip(0)
        layer = {
            "realnvp": lambda: T.affine_coupling(dim, [HIDDEN, HIDDEN]),
            "iaf": lambda: T.affine_autoregressive(dim, [max(HIDDEN, dim)] * 2),
            "nsf_coupling": lambda: T.spline_coupling(dim, dim // 2, [HIDDEN] * 2, BINS, 5.0),
        }[kind]
        depth = {"realnvp": DEPTH, "iaf": FLOWS, "nsf_coupling": SPLINES}[kind]
        return T.ComposeTransformModule(
            [m for _ in range(depth) for m in (layer(), T.Permute(order))]
        )

    made: dict[str, Callable[[], Any]] = {
        "meanfield": lambda: auto.AutoNormal(problem.model),
        "fullrank": lambda: auto.AutoMultivariateNormal(problem.model),
        "realnvp": lambda: auto.AutoNormalizingFlow(problem.model, transform),
        "iaf": lambda: auto.AutoNormalizingFlow(problem.model, transform),
        "nsf_coupling": lambda: auto.AutoNormalizingFlow(problem.model, transform),
    }
    before = torch.get_default_dtype()
    pyro.clear_param_store()
    guide = made[kind]()
    elbo = Trace_ELBO(draws, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": LR}), elbo)

    def turn(steps: int) -> None:
        torch.set_default_dtype(problem.dtype)
        try:
            for _ in range(steps):
                svi.step(*problem.args)
        finally:
            torch.set_default_dtype(before)

    return {"pyro": turn}


class ByHand:
    """A RealNVP on a triangular layer: draws, ELBO, its total gradient, and Adam.

    Args:
        problem: The density and its gradient.
        draws: Draws a step.
    """

    def __init__(self, problem: Problem, draws: int) -> None:
        self.score, self.dim, self.draws = problem.score, problem.dim, draws
        self.dtype = problem.dtype
        generator = torch.Generator().manual_seed(0)
        self.kept = problem.dim - problem.dim // 2
        a, b = self.kept, problem.dim // 2
        shapes = [(HIDDEN, a), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (2 * b, HIDDEN), (2 * b,)]
        self.parameters: list[Tensor] = []
        for i in range(DEPTH):
            # Every other layer acts on the first half.
            sizes = shapes if i % 2 == 0 else _swapped(problem.dim)
            self.parameters += [
                torch.randn(s, generator=generator, dtype=self.dtype) * 0.01 for s in sizes
            ]
        self.parameters += [torch.zeros(problem.dim, dtype=self.dtype) for _ in range(2)]
        self.parameters.append(torch.zeros(problem.dim, problem.dim, dtype=self.dtype))
        self.below = torch.ones(problem.dim, problem.dim, dtype=self.dtype).tril(-1)
        # As in flowvi, one vector for the optimiser.
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = torch.cat([p.reshape(-1) for p in self.parameters])
        views = zip(self.vector.split(self.sizes), self.parameters, strict=True)
        self.parameters = [part.view_as(p) for part, p in views]
        self.mean, self.square = torch.zeros_like(self.vector), torch.zeros_like(self.vector)
        self.count = torch.zeros((), dtype=torch.float32)

    def gradient(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The ELBO on given noise, up to the density of the noise, and the gradient of minus it."""
        x, tape, ladj = eps, [], torch.zeros_like(eps[:, 0])
        for i in range(DEPTH):
            w1, b1, w2, b2, w3, b3 = self.parameters[6 * i : 6 * i + 6]
            a, b = _halves(x, i, self.dim)
            p1 = torch.addmm(b1, a, w1.mT)
            s1 = torch.sigmoid(p1)
            h1 = p1 * s1
            p2 = torch.addmm(b2, h1, w2.mT)
            s2 = torch.sigmoid(p2)
            h2 = p2 * s2
            shift, raw = torch.addmm(b3, h2, w3.mT).chunk(2, 1)
            tanh = torch.tanh(raw / BOUND)
            scale = (BOUND * tanh).exp()
            tape.append((a, b, p1, s1, h1, p2, s2, h2, tanh, scale))
            ladj = ladj + (BOUND * tanh).sum(1)
            x = _joined(a, torch.addcmul(shift, b, scale), i)
        m, log_scale, lower = self.parameters[-3:]
        mixed = x + x @ (lower * self.below).mT
        size = log_scale.exp()
        log_p, g = self.score(m + size * mixed)
        bound = (log_p + ladj).mean() + log_scale.sum()
        # Backwards, for the mean over draws.
        g = g / self.draws
        gradient: list[Tensor] = [g.sum(0), (g * mixed).sum(0) * size + 1]
        g = g * size
        gradient.append((g.mT @ x) * self.below)
        g = g + g @ (lower * self.below)
        each = 1 / self.draws
        for i in reversed(range(DEPTH)):
            w1, _, w2, _, w3, _ = self.parameters[6 * i : 6 * i + 6]
            a, b, p1, s1, h1, p2, s2, h2, tanh, scale = tape[i]
            ga, gb = _halves(g, i, self.dim)
            inner = (gb * b * scale + each) * (1 - tanh.square())
            go = torch.cat([gb, inner], 1)
            g2 = (go @ w3) * (s2 + h2 * (1 - s2))
            g1 = (g2 @ w2) * (s1 + h1 * (1 - s1))
            gradient = [
                *(g1.mT @ a, g1.sum(0), g2.mT @ h1, g2.sum(0), go.mT @ h2, go.sum(0)),
                *gradient,
            ]
            g = _joined(ga + g1 @ w1, gb * scale, i)
        return bound, -torch.cat([x.reshape(-1) for x in gradient])

    @torch.no_grad()
    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            bound, gradient = self.gradient(torch.randn(self.draws, self.dim, dtype=self.dtype))
            bound.item()  # everyone wants to know
            self.count += 1
            torch._fused_adam_(
                [self.vector],
                [gradient],
                [self.mean],
                [self.square],
                [],
                [self.count],
                lr=LR,
                beta1=BETA1,
                beta2=BETA2,
                weight_decay=0.0,
                eps=LEAST,
                amsgrad=False,
                maximize=False,
            )


def _swapped(dim: int) -> list[tuple[int, ...]]:
    a, b = dim - dim // 2, dim // 2
    return [(HIDDEN, b), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (2 * a, HIDDEN), (2 * a,)]


def _halves(x: Any, i: int, dim: int) -> tuple[Any, Any]:
    """What stays in layer i, and what is changed."""
    first, second = x[:, : dim - dim // 2], x[:, dim - dim // 2 :]
    return (first, second) if i % 2 == 0 else (second, first)


def _joined(stays: Tensor, changed: Tensor, i: int) -> Tensor:
    return torch.cat([stays, changed] if i % 2 == 0 else [changed, stays], 1)


def hand(problem: Problem, draws: int) -> dict[str, Turn]:
    """Torch by hand."""
    return {"hand": ByHand(problem, draws)}


def jax_by_hand(problem: Problem, draws: int) -> dict[str, Turn]:
    """The same flow in JAX, its gradient by JAX, all of the step jitted."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", problem.dtype == torch.float64)
    log_p, dim = problem.jax(), problem.dim
    start = [jnp.asarray(p.numpy()) for p in ByHand(problem, draws).parameters]
    below = jnp.tril(jnp.ones((dim, dim)), -1)

    def loss(parameters: list[Any], eps: Any) -> Any:
        x, ladj = eps, 0.0
        for i in range(DEPTH):
            w1, b1, w2, b2, w3, b3 = parameters[6 * i : 6 * i + 6]
            a, b = _halves(x, i, dim)
            h = jax.nn.silu(jax.nn.silu(a @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
            shift, raw = jnp.split(h, 2, axis=1)
            log_scale = BOUND * jnp.tanh(raw / BOUND)
            ladj = ladj + log_scale.sum(1)
            b = b * jnp.exp(log_scale) + shift
            x = jnp.concatenate([a, b] if i % 2 == 0 else [b, a], 1)
        m, log_scale, lower = parameters[-3:]
        z = m + jnp.exp(log_scale) * (x + x @ (lower * below).T)
        return -(log_p(z) + ladj).mean() - log_scale.sum()

    def step(state: Any) -> Any:
        parameters, mean, square, count, key, _ = state
        key, now = jax.random.split(key)
        value, g = jax.value_and_grad(loss)(parameters, jax.random.normal(now, (draws, dim)))
        count = count + 1
        mean = jax.tree.map(lambda m, x: BETA1 * m + (1 - BETA1) * x, mean, g)
        square = jax.tree.map(lambda v, x: BETA2 * v + (1 - BETA2) * x * x, square, g)
        one, two = 1 - BETA1**count, 1 - BETA2**count
        parameters = jax.tree.map(
            lambda p, m, v: p - LR * (m / one) / (jnp.sqrt(v / two) + LEAST),
            *(parameters, mean, square),
        )
        return parameters, mean, square, count, key, value

    zero = [jnp.zeros_like(p) for p in start]
    state = (start, zero, zero, 0.0, jax.random.PRNGKey(0), jnp.zeros(()))
    return _turns("jax", step, state, lambda state: state[-1])


def numpyro_svi(kind: str, problem: Problem, draws: int) -> dict[str, Turn]:
    """NumPyro's SVI with a guide of the same kind."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer import autoguide as auto

    numpyro.enable_x64(problem.dtype == torch.float64)
    model, args = problem.numpyro(), tuple(x.numpy() for x in problem.args)
    widths = [max(HIDDEN, problem.dim)] * 2
    made: dict[str, Callable[[], Any]] = {
        "meanfield": lambda: auto.AutoNormal(model),
        "fullrank": lambda: auto.AutoMultivariateNormal(model),
        "iaf": lambda: auto.AutoIAFNormal(model, num_flows=FLOWS, hidden_dims=widths),
        "bnaf": lambda: auto.AutoBNAFNormal(model),
    }
    svi = SVI(model, made[kind](), numpyro.optim.Adam(LR), Trace_ELBO(num_particles=draws))
    start = svi.init(jax.random.PRNGKey(0), *args)

    def step(state: Any) -> Any:
        return svi.update(state[0], *args)

    name = "BNAF" if kind == "bnaf" else "numpyro"
    return _turns(name, step, (start, jax.numpy.zeros(())), lambda state: state[1])


def _turns(
    name: str, step: Callable[[Any], Any], state: Any, value: Callable[[Any], Any]
) -> dict[str, Turn]:
    """A jitted step, called from Python and in a loop of its own."""
    import jax

    one = jax.jit(step)
    many = jax.jit(lambda n, state: jax.lax.fori_loop(0, n, lambda _, s: step(s), state))
    states = {"called": state, "loop": state}

    def called(steps: int) -> None:
        for _ in range(steps):
            states["called"] = one(states["called"])
            float(value(states["called"]))  # the bound, as flowvi reads it

    def loop(steps: int) -> None:
        states["loop"] = jax.block_until_ready(many(steps, states["loop"]))

    return {f"{name}, called": called, f"{name}, loop": loop}


RIVALS: dict[str, list[partial[dict[str, Turn]]]] = {
    "realnvp": [partial(pyro_svi, "realnvp"), partial(hand), partial(jax_by_hand)],
    "iaf": [partial(pyro_svi, "iaf"), partial(numpyro_svi, "iaf"), partial(numpyro_svi, "bnaf")],
    "nsf_coupling": [partial(pyro_svi, "nsf_coupling")],
    "fullrank": [partial(pyro_svi, "fullrank"), partial(numpyro_svi, "fullrank")],
    "meanfield": [partial(pyro_svi, "meanfield"), partial(numpyro_svi, "meanfield")],
}
