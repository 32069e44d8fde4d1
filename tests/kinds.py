"""A small conjugate model for each kind of fit, and what is known of it in closed form.

Every observation has noise of width one around c plus a latent, where c is a parameter of the
model. The evidence is normal, and largest where c is the mean of the data. Functions lie at the
top level, so that other processes find them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import flowvi
from flowvi.guides import MeanField

ROWS, COLUMNS, BATCH = 6, 3, 2
# Widths of the latent that all rows share, and of those of rows.
SHARED, OWN = 0.2, 0.5
# Draws of the posterior that a table of the tests has.
DRAWS = 1000
# Steps at the end of a training whose noise the last parameters average, at least.
AVERAGED = 20


def data(dtype: torch.dtype | None = None, device: str = "cpu") -> Tensor:
    """Six rows of three numbers, (6, 3), in torch's default precision; their mean is 0.6."""
    x = torch.linspace(-1.0, 1.0, ROWS * COLUMNS, dtype=torch.float64)
    x = (2.1 * x).sin().reshape(COLUMNS, ROWS).mT + 0.6
    return x.to(device=device, dtype=dtype or torch.get_default_dtype())


def shift(x: Tensor) -> Tensor:
    """The parameter, in torch's default precision, whatever the data are in."""
    return pyro.param("c", torch.zeros((), device=x.device))


def observed(x: Tensor, mean: Tensor) -> None:
    pyro.sample("x", dist.Normal(mean[..., None].expand(x.shape), 1.0).to_event(1), obs=x)


def whole(x: Tensor) -> None:
    c, m = shift(x), pyro.sample("m", dist.Normal(x.new_zeros(()), SHARED))
    with pyro.plate("row", len(x)):
        observed(x, (m + c).expand(len(x)))


def part(x: Tensor) -> None:
    c, m = shift(x), pyro.sample("m", dist.Normal(x.new_zeros(()), SHARED))
    with pyro.plate("row", len(x), subsample_size=BATCH) as index:
        some = x[index]
        observed(some, (m + c).expand(len(some)))


def alone(x: Tensor) -> None:
    c = shift(x)
    with pyro.plate("row", len(x)):
        observed(x, c + pyro.sample("z", dist.Normal(x.new_zeros(()), OWN)))


def both(x: Tensor) -> None:
    c, m = shift(x), pyro.sample("m", dist.Normal(x.new_zeros(()), SHARED))
    with pyro.plate("row", len(x)):
        observed(x, c + pyro.sample("z", dist.Normal(m, OWN)))


def split(x: Tensor) -> None:
    """Without a parameter: a model that has one has no structure."""
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), SHARED))
    with pyro.plate("row", len(x)):
        observed(x, pyro.sample("z", dist.Normal(m, OWN)))


class Columns(nn.Module):
    """An encoder that leaves rows as they are: the posterior mean of a row is linear in them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def of_rows(seen: int) -> flowvi.Amortised:
    """A guide of a row's latent that begins at its prior, whatever it sees."""
    guide = MeanField(1, context_dim=seen)
    guide.start(torch.zeros(1), torch.tensor([OWN]))
    return flowvi.Amortised(Columns(), guide)


@dataclass(frozen=True)
class Kind:
    """One kind of fit.

    Attributes:
        model: The model.
        run: Fits it.
        counted: Name of the setting that counts what the callback is told of.
        guides: Make guides of its own.
        widths: Of the latent that all rows share, and of those of rows.
        noise: Variance of what one step shows of c: of its draws, and of its rows.
        captured: Settings of the capture.
        more: Settings of the fit.
    """

    model: Callable[[Tensor], None]
    run: Callable[..., Any]
    counted: str
    guides: Mapping[str, Callable[[], Any]]
    widths: tuple[float, float]
    noise: float
    captured: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def target(self, x: Tensor | None = None) -> Any:
        """The model, captured anew: its parameter begins at zero."""
        return flowvi.from_pyro(self.model, data() if x is None else x, **self.captured)

    def fit(self, target: Any, count: int, **settings: Any) -> Any:
        """A fit of so many steps, or epochs."""
        settings = {"lr": 0.05, "seed": 3, self.counted: count, **settings}
        return self.run(target, **self.own_guides(), **self.more, **settings)

    def own_guides(self) -> dict[str, Any]:
        """Guides of its own, for `flowvi.load`."""
        return {name: make() for name, make in self.guides.items()}

    def evidence(self, c: float) -> float:
        """The log evidence of all rows, given the parameter."""
        x, (shared, of_rows) = data().double().reshape(-1), self.widths
        alike = torch.block_diag(*torch.ones(ROWS, COLUMNS, COLUMNS, dtype=x.dtype))
        covariance = shared**2 + of_rows**2 * alike + torch.eye(len(x), dtype=x.dtype)
        return float(dist.MultivariateNormal(torch.full_like(x, c), covariance).log_prob(x))


# Draws of a step share a latent of this variance, and rows scatter around their mean.
_LATENT = 1 / (SHARED**-2 + ROWS * COLUMNS)
_OWN = 1 / (OWN**-2 + COLUMNS)
_ROWS = float(data(torch.float64).mean(1).var())

GAUSSIAN = {"guide": "fullrank"}
KINDS = {
    "global": Kind(whole, flowvi.fit, "steps", {}, (SHARED, 0.0), _LATENT / 64, more=GAUSSIAN),
    "subsampled": Kind(
        part,
        flowvi.fit,
        "steps",
        {},
        (SHARED, 0.0),
        _LATENT / 64 + (_ROWS + 1 / COLUMNS) / BATCH,
        more=GAUSSIAN,
    ),
    "structured": Kind(
        split, flowvi.fit, "steps", {}, (SHARED, OWN), 0.0, more={"guide": "structured"}
    ),
    "rows": Kind(
        alone,
        flowvi.fit,
        "epochs",
        {"guide": partial(of_rows, COLUMNS)},
        (0.0, OWN),
        (_OWN + _ROWS) / BATCH,
        {"local": "row"},
        {"batch_size": BATCH},
    ),
    "nested": Kind(
        both,
        flowvi.nested,
        "steps",
        {"inner": partial(of_rows, COLUMNS + 1)},
        (SHARED, OWN),
        (_LATENT + _OWN) / 4,
        {"local": "row"},
        GAUSSIAN,
    ),
}


def own(target: Any) -> float:
    """The parameter of the model; zero if it has none."""
    return float(sum(c.detach() for c in target.parameters()))


def moved(target: Any) -> bool:
    """Whether the parameter of the model is no longer where it began, if there is one."""
    return own(target) != 0.0 or not [*target.parameters()]


def error_of(kind: Kind) -> float:
    """Standard error of the parameter after a training."""
    return math.sqrt(kind.noise / AVERAGED)


def estimate(log_weights: np.ndarray) -> tuple[float, float]:
    """The log evidence by importance weights of one chain, and its standard error.

    Args:
        log_weights: Of draws (1, S), or of draws of rows (1, S, N), whose evidences add up.
    """
    table = log_weights[0].reshape(log_weights.shape[1], -1)
    top = table.max(0)
    weights = np.exp(table - top)
    mean = weights.mean(0)
    error = weights.std(0, ddof=1) / mean / math.sqrt(len(table))
    return float((np.log(mean) + top).sum()), float(np.sqrt(np.square(error).sum()))


def bits(fit: Any, target: Any) -> dict[str, Any]:
    """All that a fit came to: its history, the parameter of the model, and draws."""
    draws = fit.draw(50, seed=1)
    found = {"z": draws.z, "log p": draws.log_p, "log q": draws.log_q, **draws.values}
    return {"c": own(target), "history": fit.history["bound"], **found}


def checksum(found: Mapping[str, Any]) -> str:
    """One word for bits."""
    whole = hashlib.sha256()
    for name, value in found.items():
        whole.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return whole.hexdigest()


def prepared() -> None:
    """Have another process do as the tests do: double precision by default, and brief fits."""
    import pytest
    from conftest import brief

    torch.set_default_dtype(torch.float64)
    brief(pytest.MonkeyPatch())
