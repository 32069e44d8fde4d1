"""The network: an encoder of data sets, and a conditional guide of the latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.amortized.encoders import CONTEXT, OWN, Encoder, kind_for, make_encoder
from flowvi.amortized.features import Input, levels_of
from flowvi.amortized.problem import Problem, Simulated
from flowvi.amortized.regression import start_at_regression
from flowvi.guides.guide import Draw, Guide
from flowvi.guides.registry import make_guide

# Guides that are tried: affine ones are quick to train, splines have several modes.
GUIDES: tuple[dict[str, Any], ...] = (
    {"name": "maf", "depth": 4, "hidden": 64},
    {"name": "nsf_coupling", "depth": 4, "hidden": 64, "bins": 8},
)
# Fewest numbers of the context beside mean and log scale of each latent.
FREE = 32
# Of one latent.
SINGLE: tuple[dict[str, Any], ...] = ({"name": "spline", "depth": 2, "bins": 12},)


class Network(nn.Module):
    r"""q(z | data): a guide of standardised latents whose context is an encoder's output.

    .. math:: q(z \mid y) = q_\phi\!\left((z - m) / s \mid h(y)\right) \prod_i s_i^{-1}

    Args:
        encoder: Reads data sets, {name: (B, *shape)} -> (B, C).
        guide: Density of D numbers with a context of length C.
        guide_spec: Arguments of `make_guide` that build it.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, encoder: Encoder, guide: Guide, guide_spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.guide, self.guide_spec = encoder, guide, dict(guide_spec)
        self.register_buffer("loc", torch.zeros(guide.dim))
        self.register_buffer("scale", torch.ones(guide.dim))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return self.loc.dtype

    @torch.no_grad()
    def fit(self, pairs: Simulated) -> None:
        """Standardise latents and data by simulated ones."""
        low, middle, high = pairs.z.quantile(torch.tensor([0.16, 0.5, 0.84]).to(pairs.z), 0)
        self.loc.copy_(middle)
        self.scale.copy_((0.5 * (high - low)).clamp(min=1e-12))
        self.encoder.fit(pairs.data)

    def unit(self, z: Tensor) -> Tensor:
        """Standardised latents, in the precision of the network."""
        return ((z.to(self.loc.device) - self.loc.to(z)) / self.scale.to(z)).to(self.dtype)

    def log_prob(self, pairs: Simulated, *others: Simulated) -> Tensor:
        """Log density of the latents of data sets, (B), of several numbers of rows in turn."""
        groups = (pairs, *others)
        z = torch.cat([self.unit(group.z) for group in groups])
        context = torch.cat([self.encoder(group.data) for group in groups])
        return self.guide.log_prob(z, context) - self.scale.log().sum()


class AtData(Guide):
    """The density of the latents given one data set: a guide without context.

    Args:
        network: The network.
        context: Its reading of the data set, (C).
    """

    context: Tensor

    def __init__(self, network: Network, context: Tensor) -> None:
        super().__init__()
        self.dim = network.guide.dim
        self.network = network
        self.register_buffer("context", context)

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        net = self.network
        z, log_q = net.guide.sample(shape, self.context)
        log_q = log_q.double() - net.scale.double().log().sum()
        return Draw(net.loc.double() + net.scale.double() * z.double(), log_q)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        net = self.network
        inner = net.guide.log_prob(net.unit(z), self.context)
        return inner.to(z) - net.scale.to(z).log().sum()


def build(
    problem: Problem,
    pairs: Simulated,
    guide: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    encoder: nn.Module | None = None,
) -> list[Network]:
    """Networks for a problem, standardised by simulated data sets.

    Args:
        problem: The model and its data sets.
        pairs: Simulated data sets.
        guide: Name of the guide; several are built by default.
        sizes: Sizes of the guide.
        encoder: A module of the user's, {name: (B, *shape)} -> (B, C).
    """
    inputs = [_input(problem, name, value) for name, value in pairs.data.items()]
    spec: dict[str, Any] = {
        "inputs": [i.state() for i in inputs],
        "context": max(CONTEXT, 2 * problem.target.dim + FREE),
    }
    spec["kind"] = kind_for(inputs, problem.exchangeable)
    if encoder is not None:
        spec["kind"] = OWN
        spec["context"] = _length(encoder, {n: v[:2] for n, v in pairs.data.items()})
    kinds: Sequence[Mapping[str, Any]] = SINGLE if problem.target.dim == 1 else GUIDES
    if encoder is not None:
        # A module of the user's is one, which two networks cannot train.
        kinds = kinds[:1]
    if guide is not None or sizes is not None:
        own = {"name": guide} if guide else dict(kinds[0])
        kinds = [{**own, **(sizes or {})}]
    return [make_network(spec, kind, encoder, pairs) for kind in kinds]


def make_network(
    encoder: Mapping[str, Any],
    guide: Mapping[str, Any],
    module: nn.Module | None = None,
    pairs: Simulated | None = None,
    dim: int = 0,
) -> Network:
    """Build a network from specifications, standardised by simulated data sets if given."""
    made = make_encoder(encoder, module)
    size = dim or (pairs.z.shape[-1] if pairs is not None else 0)
    network = Network(made, make_guide(dim=size, context_dim=made.size, **guide), guide)
    network = network.to(torch.get_default_dtype())
    if pairs is not None:
        network.fit(pairs)
        start_at_regression(network, network.encoder, pairs)
    return network


def _input(problem: Problem, name: str, value: Tensor) -> Input:
    rows = name in problem.by_row and problem.exchangeable
    observed = name in problem.sites
    shape = tuple(value.shape[2:] if rows else value.shape[1:])
    index = rows and not observed and _is_index(problem.leaves[name])
    levels = levels_of(value, observed) if observed or index else 0
    return Input(name, shape, rows, levels, index and levels > 0)


def _is_index(column: Tensor) -> bool:
    """Whether whole numbers number groups: each from 0 on occurs."""
    if column.is_floating_point() or column.dtype == torch.bool:
        return False
    found = column.unique()
    return torch.equal(found, torch.arange(len(found)).to(found))


def _length(encoder: nn.Module, data: Mapping[str, Tensor]) -> int:
    found: Any = None
    try:
        with torch.no_grad():
            found = encoder({n: t.to(torch.get_default_dtype()) for n, t in data.items()})
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{_ENCODES}; it failed: {type(error).__name__}: {why}") from error
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{_ENCODES}, one vector for each data set; it returned {came} for 2.")
    return found.shape[1]


_ENCODES = "encoder must map {name: tensor (B, *shape)} to a tensor (B, C)"
