"""Random small models with discrete latents, and the sum over all their values in a plain loop."""

import itertools
import random as python_random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from reference import _Substitute
from torch import Tensor

from flowvi.targets import Target

PARALLEL = {"enumerate": "parallel"}


@dataclass
class Choices:
    """What a seed chooses for a model: sizes, distributions, masks and data."""

    seed: int
    random: python_random.Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = python_random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.get_default_dtype())

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.6

    def mask(self, *shape: int) -> Any:
        """No mask, one number, or one entry for each row."""
        kinds = [None, True, False, torch.tensor(True), torch.tensor(False)]
        rows = [self.flags(*shape) for _ in range(5)]
        return self.random.choice([*kinds, *rows])

    def discrete(self, values: int) -> "Discrete":
        kind = self.random.choice(["Bernoulli", "Categorical"]) if values == 2 else "Categorical"
        marked = self.random.choice([PARALLEL, PARALLEL, {"enumerate": "sequential"}])
        return Discrete(kind, self.normal(8, values), marked)


@dataclass
class Discrete:
    """A discrete distribution whose parameters depend on another site's value.

    Args:
        kind: Its name.
        logits: Its logits, for each value of the other site.
        infer: How it is marked.
    """

    kind: str
    logits: Tensor
    infer: dict[str, str]

    def __call__(self, name: str, given: Tensor | int = 0) -> Tensor:
        given = torch.as_tensor(given).long()
        logits = self.logits[given]
        if self.kind == "Bernoulli":
            drawn = pyro.sample(name, dist.Bernoulli(logits=logits[..., 0]), infer=self.infer)
        else:
            drawn = pyro.sample(name, dist.Categorical(logits=logits), infer=self.infer)
        return drawn.long()


def _masked(mask: Any) -> Any:
    return poutine.mask(mask=mask) if mask is not None else poutine.mask(mask=True)


def _levels(values: int) -> Tensor:
    """Continuous latents: a mean for each of some values, with a scale."""
    return pyro.sample("mu", dist.Normal(torch.zeros(values), 2.0).to_event(1))


def _observed(c: Choices, name: str, mean: Tensor, y: Tensor) -> None:
    if c.seed % 3 == 0:
        pyro.sample(name, dist.Bernoulli(logits=mean), obs=(y > 0).to(y))
    else:
        pyro.sample(name, dist.Normal(mean, 0.8), obs=y)


def rows(seed: int) -> Callable[[], None]:
    """One to three discrete sites in each row, each depending on the one before."""
    c = Choices(seed)
    n, k = c.random.choice([1, 2, 3]), c.random.choice([2, 3])
    sites = [c.discrete(k) for _ in range(c.random.choice([1, 1, 2]) if n > 2 else 2)]
    y, mask, beside = c.normal(n), c.mask(n), c.random.random() < 0.4
    twice, own_mask = c.random.random() < 0.3, c.random.random() < 0.2

    def model() -> None:
        mu, z = _levels(k), torch.tensor(0)
        with pyro.plate("n", n), _masked(mask):
            for i, site in enumerate(sites):
                z = site(f"z{i}", z)
            mean = mu[z]
            if beside:
                with poutine.mask(mask=True):
                    mean = mean + pyro.sample("x", dist.Normal(0.3 * mu[z], 1.0))
            _observed(c, "y", mean, y)
            if twice:
                pyro.sample("y2", dist.Normal(mean, 2.0).mask(own_mask), obs=y + 1)

    return poutine.block(model, hide=[]) if beside and mask is False else model


def loops(seed: int) -> Callable[[], None]:
    """Discrete sites one after another, in no plate or a plate that is looped over."""
    c = Choices(seed)
    n, k, plate = c.random.choice([2, 3]), c.random.choice([2, 3]), c.random.random() < 0.5
    sites = [c.discrete(k) for _ in range(n)]
    y, masks, depends = c.normal(n), [c.mask() for _ in range(n)], c.random.random() < 0.5

    def model() -> None:
        mu, z = _levels(k), torch.tensor(0)
        for i in pyro.plate("n", n) if plate else range(n):
            with _masked(masks[i]):
                z = sites[i](f"z{i}", z if depends else 0)
                _observed(c, f"y{i}", mu[z], y[i])

    return model


def shared(seed: int) -> Callable[[], None]:
    """A discrete site that all rows share, with one of each row beside it."""
    c = Choices(seed)
    n, k, own = c.random.choice([2, 3]), c.random.choice([2, 3]), c.random.random() < 0.6
    first, second, y, mask = c.discrete(k), c.discrete(k), c.normal(n), c.mask(n)

    def model() -> None:
        mu, z = _levels(k), first("g")
        with pyro.plate("n", n), _masked(mask):
            if own:
                z = (z + second("z", z)) % k
            _observed(c, "y", mu[z], y)

    return model


def nested(seed: int) -> Callable[[], None]:
    """Groups with a discrete site, and rows with one within the groups."""
    c = Choices(seed)
    g, n, own = 2, 2, c.random.random() < 0.6
    first, second, y = c.discrete(2), c.discrete(2), c.normal(n, g)
    mask, outer = c.mask(n, g), c.mask(g)

    def model() -> None:
        mu = _levels(2)
        with pyro.plate("g", g, dim=-1), _masked(outer):
            a = first("a")
            with pyro.plate("n", n, dim=-2), _masked(mask):
                b = second("b", a) if own else a
                _observed(c, "y", mu[(a + b) % 2] + 0.5 * a, y)

    return model


def crossed(seed: int) -> Callable[[], None]:
    """Discrete sites of rows and of columns, and cells that depend on one or both."""
    c = Choices(seed)
    r, q, both = 2, c.random.choice([2, 3]), c.random.random() < 0.6
    first, second, y, mask = c.discrete(2), c.discrete(2), c.normal(r, q), c.mask(r, q)

    def model() -> None:
        mu = _levels(2)
        across, down = pyro.plate("q", q, dim=-1), pyro.plate("r", r, dim=-2)
        with down:
            a = first("a")
        b = torch.tensor(0)
        if both:
            with across:
                b = second("b")
        with down, across, _masked(mask):
            _observed(c, "y", mu[a] * (1 + b), y)

    return model


def chain(seed: int) -> Callable[[], None]:
    """A Markov chain of first or second order, alone or in a plate, with gaps."""
    c = Choices(seed)
    series, order = c.random.choice([None, 2]), c.random.choice([1, 1, 2])
    steps = 3 if series else 4
    site, y = c.discrete(2), c.normal(steps, series or 1)
    gaps = [c.mask(series) if series else c.mask() for _ in range(steps)]
    whole = c.random.random() < 0.5

    def model() -> None:
        mu, past = _levels(2), [torch.tensor(0)] * order
        context = pyro.plate("series", series) if series else poutine.mask(mask=True)
        with context:
            for t in pyro.markov(range(steps), history=order):
                with _masked(gaps[t] if whole else None):
                    z = site(f"z{t}", sum(2**i * p for i, p in enumerate(past)))
                    with _masked(gaps[t]):
                        _observed(c, f"y{t}", mu[z], y[t] if series else y[t, 0])
                past = [*past[1:], z]

    return model


def selection(seed: int) -> Callable[[], None]:
    """Discrete sites of one plate, or of one event, that all rows of another plate depend on."""
    c = Choices(seed)
    d, n = c.random.choice([2, 3]), 3
    x, y, mask = c.normal(n, d), c.normal(n), c.mask(n)
    how = c.random.choice(["matmul", "broadcast", "event", "rows", "event of y"])
    site = c.discrete(2)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(d), 1.0).to_event(1))
        if how == "event":
            xi = pyro.sample("xi", dist.Bernoulli(0.3 * torch.ones(d)).to_event(1), infer=PARALLEL)
        else:
            with pyro.plate("d", d):
                xi = site("xi").to(w)
        a = w * xi
        mean = (x * a.unsqueeze(-2)).sum(-1) if how == "broadcast" else x @ a
        if how == "event of y":
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)
            return
        with pyro.plate("n", n), _masked(mask):
            if how == "rows":
                mean = mean + pyro.sample("z", dist.Bernoulli(0.4), infer=PARALLEL)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


def missing(seed: int) -> Callable[[], None]:
    """A discrete observation of which some rows are missing, and what depends on it."""
    c = Choices(seed)
    n, seen = 3, c.flags(3)
    y, x, marked = c.flags(n).float(), c.normal(n), c.random.choice([PARALLEL, {}])
    below = c.random.random() < 0.7

    def model() -> None:
        mu = _levels(2)
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("n", n):
            z = pyro.sample("z", dist.Bernoulli(p), obs=y.to(mu), obs_mask=seen, infer=marked)
            if below:
                pyro.sample("x", dist.Normal(mu[z.long()], 1.0), obs=x)

    return model


def scaled(seed: int) -> Callable[[], None]:
    """A mixture whose rows are weighted, all by one number or each by its own."""
    c = Choices(seed)
    n, k = 3, c.random.choice([2, 3])
    site, y, mask = c.discrete(k), c.normal(n), c.mask(n)
    weights: Any = c.random.choice([0.5, torch.tensor(2.0), c.normal(n).exp()])

    def model() -> None:
        mu = _levels(k)
        with pyro.plate("n", n), poutine.scale(scale=weights), _masked(mask):
            _observed(c, "y", mu[site("z")], y)

    return model


def subsampled(seed: int) -> Callable[[], None]:
    """A mixture on a part of its rows."""
    c = Choices(seed)
    n, k = 4, c.random.choice([2, 3])
    site, y, keep = c.discrete(k), c.normal(n), c.flags(n)
    masked = c.random.random() < 0.5

    def model() -> None:
        mu = _levels(k)
        plate = pyro.plate("n", n, subsample_size=2)
        with plate as rows, _masked(keep[rows] if masked else None):
            _observed(c, "y", mu[site("z")], y[rows])

    return model


KINDS: dict[str, Callable[[int], Callable[[], None]]] = {
    kind.__name__: kind
    for kind in (
        rows,
        loops,
        shared,
        nested,
        crossed,
        chain,
        selection,
        missing,
        scaled,
        subsampled,
    )
}


class _Values(Messenger):
    """Give discrete sites values."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


@dataclass
class Oracle:
    """The sum over all joint values of a model's discrete sites, one run of it for each.

    Args:
        model: The model.
        target: What flowvi made of it: the places of continuous latents in z.
        rows: Rows of subsampled plates.
    """

    model: Callable[[], None]
    target: Target
    rows: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with pyro.validation_enabled(False):
            drawn = poutine.trace(_Substitute(self.target, self._zero(), self.rows)(self.model))
            nodes = drawn.get_trace().nodes
        self.discrete = {n: s for n, s in nodes.items() if _is_discrete(s)}
        self.plate = next((n for n in self.rows), None)

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density at a point, (D,) -> ()."""
        free, terms, ladj = self._terms(z)
        return free + self._sum(terms) + ladj

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """The log likelihood of each row, summed over the values of discrete sites alone."""
        found: dict[str, list[Tensor]] = {}
        for values in self._all():
            trace, _ = self._run(z, values)
            prior = sum(_log_p(trace.nodes[n]).sum() for n in self.discrete)
            for name in self.target.observed:
                found.setdefault(name, []).append(prior + _log_p(trace.nodes[name]))
        return {name: torch.logsumexp(torch.stack(each), 0) for name, each in found.items()}

    def probabilities(self, z: Tensor) -> dict[str, Tensor]:
        """The probability of each value of each discrete site given the data, (*shape, K)."""
        weights = torch.softmax(torch.stack([t.sum() for t in self._terms(z, 1.0)[1]]), 0)
        out = {}
        for name, site in self.discrete.items():
            support = _support(site)
            hot = [(values[name].unsqueeze(-1) == support).to(weights) for values in self._all()]
            out[name] = torch.tensordot(weights, torch.stack(hot), 1)
        return out

    def adds_up(self, z: Tensor) -> bool:
        """Whether the log density is the sum over its rows."""
        free, terms, _ = self._terms(z, 1.0)
        rows = sum(value.sum() for value in self.log_likelihood(z).values())
        trace, _ = self._run(z, next(self._all()))
        prior = sum(_log_p(trace.nodes[name]).sum() for name in self.target.sites)
        whole = free + self._sum(terms)
        return bool((rows + prior - whole).abs() < 1e-6 * (1 + whole.abs()))

    def _terms(self, z: Tensor, scale: float | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """What does not depend on discrete sites; the rest for each joint value; log Jacobian.

        The rest has an axis for rows where these have scales of their own.
        """
        runs = [self._run(z, values) for values in self._all()]
        names = [n for n, s in runs[0][0].nodes.items() if _scored(s)]
        each = {n: torch.stack([_log_p(t.nodes[n]) for t, _ in runs]) for n in names}
        varies = {n for n in names if n in self.discrete or (each[n] - each[n][0]).abs().max() > 0}
        first = runs[0][0].nodes
        factors = {n: torch.as_tensor(first[n]["scale"] if scale is None else scale) for n in names}
        free = sum((factors[n] * each[n][0]).sum() for n in names if n not in varies)
        self.scale = next(iter(factors[n] for n in names if n in varies))
        by_row = self.scale.dim() > 0
        terms = [
            sum(each[n][i] if by_row else each[n][i].sum() for n in names if n in varies)
            for i in range(len(runs))
        ]
        return torch.as_tensor(free), terms, runs[0][1]

    def _sum(self, terms: list[Tensor]) -> Tensor:
        if not self.scale.dim():
            return self.scale * torch.logsumexp(torch.stack(terms), 0)
        # Rows stand for themselves: each row's values, with the others' at their first value.
        total = torch.zeros(())
        for n in range(len(self.scale)):
            alone = [
                t[n]
                for values, t in zip(self._all(), terms, strict=True)
                if all(
                    value[i] == _support(self.discrete[name])[0]
                    for name, value in values.items()
                    for i in range(len(value))
                    if i != n
                )
            ]
            total = total + self.scale[n] * torch.logsumexp(torch.stack(alone), 0)
        return total

    def _run(self, z: Tensor, values: dict[str, Tensor]) -> tuple[poutine.Trace, Tensor]:
        handler = _Substitute(self.target, z, self.rows)
        with pyro.validation_enabled(False):
            trace = poutine.trace(handler(_Values(values)(self.model))).get_trace()
            trace.compute_log_prob()
        return trace, handler.ladj

    def _all(self) -> Iterator[dict[str, Tensor]]:
        elements = [
            (name, _support(site))
            for name, site in self.discrete.items()
            for _ in range(site["value"].numel())
        ]
        for chosen in itertools.product(*(support for _, support in elements)):
            flat: dict[str, list[Tensor]] = {}
            for (name, _), value in zip(elements, chosen, strict=True):
                flat.setdefault(name, []).append(value)
            yield {
                name: torch.stack(each).reshape(self.discrete[name]["value"].shape)
                for name, each in flat.items()
            }

    def _zero(self) -> Tensor:
        return torch.zeros(self.target.dim)


def _is_discrete(site: Any) -> bool:
    latent = site["type"] == "sample" and not site["is_observed"]
    return latent and hasattr(site["fn"], "support") and site["fn"].support.is_discrete


def _support(site: Any) -> Tensor:
    fn = site["fn"]
    while not fn.has_enumerate_support:
        fn = fn.base_dist
    return fn.enumerate_support(expand=False).reshape(-1)


def _scored(site: Any) -> bool:
    return site["type"] == "sample" and "log_prob" in site and "_Subsample" not in str(site["fn"])


def _log_p(site: Any) -> Tensor:
    """Unscaled, masked unless the site is discrete and latent itself."""
    log_p: Tensor = site["unscaled_log_prob"]
    mask = site["mask"]
    if mask is None or _is_discrete(site):
        return log_p
    return torch.where(torch.as_tensor(mask), log_p, torch.zeros_like(log_p))
