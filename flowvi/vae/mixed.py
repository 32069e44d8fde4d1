"""The likelihood of a row of a table, whose columns are of different kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from flowvi.vae.columns import BINARY, CATEGORY, COUNT, FLOAT, Column
from flowvi.vae.likelihoods import Likelihood

# Least scale of a float column, in units of its standard deviation: densities have no bound
# otherwise.
FLOOR = 0.01
# Limits of the log mean of a count, and of the log size of a negative binomial.
LARGEST_MEAN, LARGEST_SIZE = 20.0, 12.0
# Fewest rows of a level that its initial probability counts.
HALF = 0.5


class MixedLikelihood(Likelihood):
    r"""Independent columns given a code, each of a family of its own.

    Floats are normal with a learnt scale, binary columns Bernoulli, categories categorical, and
    counts negative binomial with a learnt size r, or Poisson where the column varies no more than
    that: with mean m,

    .. math:: \mathrm{Var} = m + m^2 / r.

    Args:
        columns: The columns.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.columns = tuple(columns)
        ends = torch.tensor([c.outputs for c in columns]).cumsum(0).tolist()
        self.parts = [slice(e - c.outputs, e) for c, e in zip(columns, ends, strict=True)]
        self.outputs = ends[-1]
        floats = [c for c in columns if c.kind == FLOAT]
        sizes = [c for c in columns if c.kind == COUNT and c.likelihood != "Poisson"]
        self.register_buffer("mean_of_floats", torch.tensor([c.mean for c in floats]))
        self.register_buffer("sd_of_floats", torch.tensor([c.sd for c in floats]))
        self.log_scale = nn.Parameter(torch.zeros(len(floats)))
        start = [c.mean**2 / (c.sd**2 - c.mean) for c in sizes]
        self.log_size = nn.Parameter(torch.tensor([math.log(r) for r in start]).clamp(-5, 5))

    mean_of_floats: Tensor
    sd_of_floats: Tensor

    def forward(self, params: Tensor) -> MixedRow:
        """Outputs (*S, P) to a distribution with batch shape S and event shape (C)."""
        return MixedRow(self, params)

    def places(self, *kinds: str) -> list[int]:
        """Columns of some likelihoods, by their names."""
        return [i for i, c in enumerate(self.columns) if c.likelihood in kinds]

    def first(self, places: Sequence[int]) -> list[int]:
        """Outputs of columns that have one each."""
        return [self.parts[i].start for i in places]

    @property
    def scale(self) -> Tensor:
        """Standard deviations of float columns given a code, in the units of the columns."""
        return self.sd_of_floats * (FLOOR + (1 - FLOOR) * softplus(self.log_scale + _ONE))

    def marginal(self, x: Tensor) -> Tensor:
        """Outputs that make each column's own distribution in rows (N, C). (P)."""
        found = []
        for i, column in enumerate(self.columns):
            values = x[:, i].double()
            if column.kind == FLOAT:
                found.append((values.mean(0, True) - column.mean) / column.sd)
            elif column.kind == BINARY:
                share = (values.sum(0, True) + HALF) / (len(values) + 2 * HALF)
                found.append(share.logit())
            elif column.kind == CATEGORY:
                seen = torch.bincount(values.long(), minlength=len(column.levels)) + HALF
                found.append((seen / seen.sum()).log())
            else:
                found.append(values.mean(0, True).clamp_min(1e-3).log())
        return torch.cat(found).to(x.dtype)

    def mean(self, params: Tensor) -> Tensor:
        """The most likely level of categories, the mean of the others. (*S, P) -> (*S, C)."""
        found = []
        for column, part in zip(self.columns, self.parts, strict=True):
            out = params[..., part]
            if column.kind == FLOAT:
                out = column.mean + column.sd * out
            elif column.kind == BINARY:
                out = out.sigmoid()
            elif column.kind == CATEGORY:
                out = out.argmax(-1, True).to(params.dtype)
            else:
                out = out.clamp_max(LARGEST_MEAN).exp()
            found.append(out)
        return torch.cat(found, -1)


_ONE = math.log(math.expm1(1.0))


class MixedRow(TorchDistribution):
    """Rows of a table given the outputs of a decoder.

    Args:
        family: The likelihood.
        params: Outputs, (*S, P).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, family: MixedLikelihood, params: Tensor) -> None:
        self.family, self.params = family, params
        event = torch.Size([len(family.columns)])
        super().__init__(params.shape[:-1], event, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> MixedRow:
        return MixedRow(self.family, self.params.expand(*batch_shape, self.params.shape[-1]))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_of_columns(value).sum(-1)

    def log_prob_of_columns(self, value: Tensor) -> Tensor:
        """The log density of each column, (*S, C)."""
        family, params = self.family, self.params
        found: dict[int, Tensor] = {}

        def add(places: list[int], log_p: Tensor) -> None:
            found.update(zip(places, log_p.to(params.dtype).unbind(-1), strict=True))

        if places := family.places("Gaussian"):
            loc = family.mean_of_floats + family.sd_of_floats * params[..., family.first(places)]
            scale = family.scale
            square = ((value[..., places] - loc) / scale).square()
            add(places, -0.5 * (square + math.log(2 * math.pi)) - scale.log())
        if places := family.places("Bernoulli"):
            logits = params[..., family.first(places)]
            add(places, value[..., places] * logits - softplus(logits))
        for place in family.places("categorical"):
            log_p = params[..., family.parts[place]].log_softmax(-1)
            code = value[..., place : place + 1].long()
            lead = torch.broadcast_shapes(code.shape[:-1], log_p.shape[:-1])
            log_p = log_p.expand(*lead, log_p.shape[-1])
            add([place], log_p.gather(-1, code.expand(*lead, 1)))
        # Differences of large log gamma functions lose single precision.
        if places := family.places("Poisson"):
            k, log_mean = value[..., places].double(), self._log_mean(places)
            add(places, k * log_mean - log_mean.exp() - torch.lgamma(k + 1))
        if places := family.places("negative binomial"):
            k, log_mean = value[..., places].double(), self._log_mean(places)
            log_size = family.log_size.double().clamp_max(LARGEST_SIZE)
            size, logits = log_size.exp(), log_mean - log_size
            count = torch.lgamma(size + k) - torch.lgamma(k + 1) - torch.lgamma(size)
            add(places, count + size * logsigmoid(-logits) + k * logsigmoid(logits))
        return torch.stack([found[i] for i in range(len(family.columns))], -1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        family = self.family
        with torch.no_grad():
            params = self.params.expand(*sample_shape, *self.params.shape)
            out = params.new_empty(*params.shape[:-1], len(family.columns))
            if places := family.places("Gaussian"):
                loc = family.sd_of_floats * params[..., family.first(places)]
                out[..., places] = dist.Normal(family.mean_of_floats + loc, family.scale).sample()
            if places := family.places("Bernoulli"):
                logits = params[..., family.first(places)]
                out[..., places] = dist.Bernoulli(logits=logits).sample()
            for place in family.places("categorical"):
                logits = params[..., family.parts[place]]
                out[..., place] = dist.Categorical(logits=logits).sample().to(out.dtype)
            if places := family.places("Poisson"):
                mean = params[..., family.first(places)].clamp_max(LARGEST_MEAN).exp()
                out[..., places] = dist.Poisson(mean).sample()
            if places := family.places("negative binomial"):
                log_mean = params[..., family.first(places)].clamp_max(LARGEST_MEAN)
                size = family.log_size.clamp_max(LARGEST_SIZE).exp()
                rate = dist.Gamma(size, size / log_mean.exp()).sample()
                out[..., places] = dist.Poisson(rate).sample()
        return out

    def _log_mean(self, places: list[int]) -> Tensor:
        outputs = self.params[..., self.family.first(places)]
        return outputs.double().clamp_max(LARGEST_MEAN)
