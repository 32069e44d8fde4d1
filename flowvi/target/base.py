"""A model as a log density on R^D, with the names, shapes and dims of its values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from flowvi.target.program import Batched, Density, PointFunction, capture_values

CHUNK_NUMBERS = 20_000_000
Simulator = Callable[..., dict[str, np.ndarray]]


class ModelError(ValueError):
    """The model cannot be written as a density on R^D."""


@dataclass(frozen=True)
class Site:
    """A named value of the model.

    Args:
        shape: Shape of one value, in the space that the user named it in.
        support: Where the value lies.
        dims: A name for each axis; empty to have them made up.
    """

    shape: tuple[int, ...] = ()
    support: Constraint = constraints.real
    dims: tuple[str, ...] = ()


@dataclass
class Facts:
    """What is known of a model beside its density.

    Args:
        name: Name of the model.
        sites: Latent sites, in the model's order.
        slices: Columns of z that belong to each site.
        deterministics: Names of derived values that are reported.
        observed: Data at the observed sites.
        constants: Data that the model was called with and does not observe.
        dims: For each of all these names, a name for each axis.
        coords: Labels along dims.
        improper: Sites whose prior has no integral.
        subsampled: Plates that are subsampled: size and batch size.
    """

    name: str
    sites: dict[str, Site]
    slices: dict[str, slice]
    deterministics: tuple[str, ...] = ()
    observed: dict[str, Tensor] | None = None
    constants: dict[str, Tensor] | None = None
    dims: dict[str, tuple[str, ...]] | None = None
    coords: dict[str, list[Any]] | None = None
    improper: tuple[str, ...] = ()
    subsampled: dict[str, tuple[int, int]] | None = None


def cover(
    subsampled: Mapping[str, tuple[int, int]], device: torch.device | None = None
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Batches and weights whose weighted densities add up to that of all rows.

    A plate of N rows and batches of B scales its rows by N / B. N // B
    disjoint batches, each with weight B / N, leave N % B rows; each of
    these fills a batch alone, with weight 1 / N.

    Args:
        subsampled: Plate -> its size N and batch size B.
        device: Where the indices are wanted.
    """
    parts = []
    for name, (size, batch) in subsampled.items():
        rows = torch.arange(size, device=device)
        whole = size - size % batch
        some = [(batch / size, rows[i : i + batch]) for i in range(0, whole, batch)]
        some += [(1 / size, rows[i].expand(batch)) for i in range(whole, size)]
        parts.append([(name, weight, index) for weight, index in some])
    for combination in itertools.product(*parts):
        weight = float(np.prod([w for _, w, _ in combination]))
        yield weight, {name: index for name, _, index in combination}


class Target(nn.Module):
    r"""A log density on R^D: the log joint plus the log Jacobian of the map to the supports.

    .. math:: \log p(x, \theta(z)) + \log|\det \partial \theta / \partial z|

    Made by `from_pyro` and `from_density`. Parameters that the model itself
    has (`pyro.param`, `pyro.module`) are parameters of the target and are
    trained in a fit.

    Args:
        facts: Names and shapes.
        density: The log density.
        point_values: z (D,) -> reported values, latents and deterministics.
        point_inverse: Site values -> z (D,).
        point_likelihood: z (D,) -> pointwise log likelihood of each observed site.
        points: A few points of finite density, to check against, (P, D).
        own_inputs: Tensors that the functions take behind z.
        simulate: Draws from the prior, or given latent values the data.
    """

    def __init__(
        self,
        facts: Facts,
        density: Density,
        point_values: PointFunction,
        point_inverse: PointFunction,
        point_likelihood: PointFunction | None,
        points: Tensor,
        own_inputs: Sequence[Tensor] = (),
        simulate: Simulator | None = None,
    ) -> None:
        super().__init__()
        self.name = facts.name
        self.sites = facts.sites
        self.slices = facts.slices
        self.deterministics = facts.deterministics
        self.observed = facts.observed or {}
        self.constants = facts.constants or {}
        self.dims = facts.dims or {}
        self.coords = facts.coords or {}
        self.improper = facts.improper
        self.subsampled = facts.subsampled or {}
        self.dim = points.shape[-1]
        self.density = density
        self._functions = {
            "values": point_values,
            "inverse": point_inverse,
            "likelihood": point_likelihood,
        }
        self._maps: dict[str, Batched] = {}
        self._points = points
        self._own = [p for p in own_inputs if isinstance(p, nn.Parameter)]
        self._simulate = simulate
        for i, p in enumerate(self._own):
            self.register_parameter(f"own_{i}", p)

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the density is evaluated."""
        return self.density.batched.dtype

    @property
    def device(self) -> torch.device:
        """Where the density is evaluated."""
        return self._points.device

    def log_prob(self, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Evaluate the log density, Jacobian included. (*S, D) -> (*S).

        Args:
            z: Points of R^D.
            batch: For models with subsampled plates, plate -> indices (B,), for
                an unbiased estimate from those rows. Without it, all rows.
        """
        self._check(z)
        if not self.subsampled:
            return self.density(z, *self._own).to(z.dtype)
        if batch is not None:
            return self.density(z, *self._own, *self._indices(batch)).to(z.dtype)
        parts = (
            weight * self.density(z, *self._own, *self._indices(rows))
            for weight, rows in self.cover()
        )
        return torch.stack(list(parts)).sum(0).to(z.dtype)

    def cover(self) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Batches and weights whose weighted densities add up to that of all rows."""
        return cover(self.subsampled, self.device)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map points to the values of latent and deterministic sites. (*S, D) -> (*S, *shape)."""
        self._check(z)
        out: dict[str, Tensor] = self._map("values")(z, *self._own, *self._first_rows())
        return out

    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """Map values of the latent sites to points. Each (*S, *shape) -> (*S, D).

        Raises:
            ValueError: A site is missing or a shape does not fit.
        """
        columns, lead = [], None
        for name, site in self.sites.items():
            if name not in values:
                raise ValueError(
                    f"unconstrain needs a value for site '{name}'; got {', '.join(values) or 'none'}."
                )
            value = torch.as_tensor(values[name], device=self.device).to(self.dtype)
            cut = value.dim() - len(site.shape)
            if cut < 0 or tuple(value.shape[cut:]) != site.shape:
                raise ValueError(
                    f"Site '{name}' has shape {site.shape}; got a value of shape "
                    f"{tuple(value.shape)}, whose last axes should be that."
                )
            if lead is not None and lead != value.shape[:cut]:
                raise ValueError(
                    f"All sites need the same leading shape; '{name}' has {tuple(value.shape[:cut])}, "
                    f"those before it {tuple(lead)}."
                )
            lead = value.shape[:cut]
            columns.append(value.reshape(*lead, -1))
        z: Tensor = self._map("inverse")(
            torch.cat(columns, -1), *self._own, *self._first_rows()
        )
        return z

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Pointwise log likelihood of every observed site. (*S, D) -> (*S, *rows).

        Empty where the model has no observed sites, or sums out discrete ones.
        """
        self._check(z)
        if self._functions["likelihood"] is None:
            return {}
        function = self._map("likelihood")
        if not self.subsampled:
            out: dict[str, Tensor] = function(z, *self._own)
            return out
        return self._assembled(
            z.shape[:-1], (function(z, *self._own, *self._indices(b)) for _, b in self.cover())
        )

    def prior(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """Draw all sites from the prior: name -> (n, *shape).

        Raises:
            ModelError: The model has no proper prior to draw from.
        """
        if self._simulate is None:
            raise ModelError(f"{self.name} is a plain density; it has no prior to draw from.")
        if self.improper:
            raise ModelError(f"The prior of '{self.improper[0]}' is improper: it has no draws.")
        return self._simulate(None, n, seed)

    def predictive(self, values: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Simulate the observed sites given latent values. (n, *shape) each -> (n, *shape)."""
        if self._simulate is None:
            raise ModelError(f"{self.name} is a plain density; it cannot simulate data.")
        n = len(next(iter(values.values())))
        return self._simulate({name: values[name] for name in self.sites}, n, seed)

    def label(self, coords: Mapping[str, Sequence[Any]]) -> Target:
        """Give labels to dims; returns the target itself."""
        sizes = self._dim_sizes()
        for dim, labels in coords.items():
            if dim not in sizes:
                raise ValueError(f"No dim named '{dim}'; {self.name} has {', '.join(sizes)}.")
            if len(labels) != sizes[dim]:
                raise ValueError(
                    f"dim '{dim}' has size {sizes[dim]}; got {len(labels)} labels for it."
                )
            self.coords[dim] = list(labels)
        return self

    def starts(self, generator: torch.Generator) -> Tensor:
        """Points to start from: draws from the prior where there are any, zero, random ones.

        Returns:
            Points of R^D, (P, D).
        """
        some = torch.randn(2, self.dim, generator=generator, dtype=self.dtype, device=self.device)
        return torch.cat([self._points.to(self.dtype)[:2], 0 * some[:1], 0.5 * some])

    def chunk(self) -> int:
        """How many points to evaluate at a time, so that memory stays bounded."""
        rows = sum(t.numel() for t in self.observed.values())
        return int(np.clip(CHUNK_NUMBERS // (self.dim + rows + 1), 1, 2000))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k} {s.stop - s.start}" for k, s in self.slices.items())
        return f"Target({self.name}: D = {self.dim}; {sizes})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _map(self, which: str) -> Batched:
        """The batched form of one of the target's functions, made when first asked for."""
        if which not in self._maps:
            function = self._functions[which]
            assert function is not None
            inputs = [*self._own, *self._first_rows()]
            points = self._points
            if which == "inverse":
                values = self.constrain(points)
                rows = [values[name].reshape(len(points), -1) for name in self.sites]
                points = torch.cat([r.to(points.dtype) for r in rows], -1)
            self._maps[which] = capture_values(function, points, inputs, self.density.batched)
        return self._maps[which]

    def _indices(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        for name, (_, size) in self.subsampled.items():
            if name not in batch or len(batch[name]) != size:
                raise ValueError(f"batch needs {size} indices for plate '{name}'.")
        return [batch[name] for name in self.subsampled]

    def _first_rows(self) -> list[Tensor]:
        return self._indices(next(self.cover())[1]) if self.subsampled else []

    def _assembled(
        self, lead: tuple[int, ...], parts: Iterator[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Put rows that came batch by batch into their places."""
        out: dict[str, Tensor] = {}
        for (_, batch), part in zip(self.cover(), parts, strict=True):
            for name, value in part.items():
                dims = self.dims[name][: value.dim() - len(lead)]
                places = [batch.get(d, torch.arange(value.shape[len(lead) + i]))
                          for i, d in enumerate(dims)]
                shape = [self.subsampled.get(d, (value.shape[len(lead) + i],))[0]
                         for i, d in enumerate(dims)]
                whole = out.setdefault(name, value.new_zeros((*lead, *shape)))
                whole[(..., *torch.meshgrid(*places, indexing="ij"))] = value
        return out

    def _dim_sizes(self) -> dict[str, int]:
        shapes = {name: site.shape for name, site in self.sites.items()}
        shapes |= {name: tuple(t.shape) for name, t in (self.observed | self.constants).items()}
        point = self._points[0]
        shapes |= {n: tuple(v.shape) for n, v in self.constrain(point).items()}
        return {
            d: size
            for name, dims in self.dims.items()
            for d, size in zip(dims, shapes.get(name, ()), strict=False)
        }

    def _check(self, z: Tensor) -> None:
        if z.shape[-1] != self.dim:
            sizes = ", ".join(f"{k} {s.stop - s.start}" for k, s in self.slices.items())
            raise ValueError(
                f"z has {z.shape[-1]} columns but {self.name} has D = {self.dim} ({sizes})."
            )
