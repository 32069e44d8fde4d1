"""The log density of the shared latents, with the local ones integrated by Laplace's formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.structure.adapt import adapt
from flowvi.targets.structure.adapt_path import adapt_path
from flowvi.targets.structure.annealed import Path
from flowvi.targets.structure.correction import Correction, Weighted
from flowvi.targets.structure.field import laplace_of
from flowvi.targets.structure.laplace import Laplace
from flowvi.targets.structure.modes import Modes, search_modes
from flowvi.targets.structure.shape import Shape
from flowvi.targets.structure.structure import UNITS, Structure, structure
from flowvi.targets.target import Target

# Parts of the state with as many rows as units have further modes.
VARYING = ("other_modes", "other_slopes")
# Step of a central difference of a dense field, whose third derivatives take too much memory.
DIFFERENCE = 1e-4
# Products with the Hessian beyond which differences are cheaper than the third derivatives.
DENSE_GRADIENT = 16


class MarginalTarget(Target):
    """A log density over the shared latents theta; local latents are integrated by `Laplace`.

    Args:
        target: The log density of all latents.
        structure: Its structure.

    Attributes:
        whole: The log density of all latents.
        laplace: The normal approximation of local latents.
        shape: The map of normal noise of each unit, which `adapt` fits.
        particles: Number of draws K of each unit in `corrected`.
        modes: Modes of the units, which `adapt` searches.
        others: Normal approximations at further modes of some units.
        path: Steps of the draws of a chain or a field, which `adapt` chooses.
    """

    whole: GlobalTarget

    def __init__(self, target: GlobalTarget, structure: Structure) -> None:
        super().__init__()
        self.__dict__["whole"], self.structure = target, structure
        self.laplace = laplace_of(target, structure)
        self.shape, self.particles = Shape(Shape.identity(self.laplace.mode)), 1
        self.modes: Modes | None = None
        self.others: list[Laplace] = []
        self.path = Path()
        if target.made is not None:
            self.made = partial(_made_again, target.made)
        self.name, self.dim = target.name, len(structure.shared)
        names = [n for n in target.slices if n in structure.shared_sites]
        self.sites = {n: target.sites[n] for n in names}
        self.dims = {n: target.dims[n] for n in names}
        self.coords, self.observed = target.coords, target.observed
        self.improper = target.improper
        self.messages = {n: m for n, m in target.messages.items() if n in names}
        place = torch.full((target.dim,), -1)
        place[structure.shared] = torch.arange(self.dim)
        self.slices = {}
        for n in names:
            part = place[target.slices[n]]
            start = int(part[0]) if len(part) else 0
            self.slices[n] = slice(start, start + len(part))

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def log_prob(self, z: Tensor, batch: Any = None) -> Tensor:
        """Evaluate Laplace's formula. (*S, p) -> (*S)."""
        theta = z.reshape(z.shape[:-1].numel(), self.dim)
        if theta.requires_grad and torch.is_grad_enabled():
            found: Tensor = _LogMarginal.apply(theta, self)
        else:
            found = self.evaluate(theta)
        return found.reshape(z.shape[:-1]).to(z.dtype)

    def evaluate(self, theta: Tensor) -> Tensor:
        """Laplace's formula without gradients. (S, p) -> (S)."""
        parts = [
            self.laplace.at(one).log_marginal.expand(len(one))
            for one in theta.detach().to(self.dtype).split(self.chunk())
        ]
        return torch.cat(parts).nan_to_num(nan=-torch.inf)

    def adapt(self, theta: Tensor, seed: int, say: Callable[[str], object]) -> None:
        """Fit the conditionals of units at values of theta (S, p), and choose K.

        For a chain or a field, choose the steps of its draws.
        """
        if self.modes is None or not torch.equal(self.modes.reference, self.laplace.reference):
            self.modes = search_modes(self.laplace, seed)
            self.others = self.modes.components()
        if self.structure.kind != UNITS:
            _, self.path = adapt_path(self.laplace, theta, seed, say)
            return
        self.shape, self.particles = adapt(self.laplace, theta, self.others, seed, say)

    @property
    def correction(self) -> Correction:
        """The estimates of the density of theta by draws of each unit."""
        return Correction(self.laplace, self.shape, self.path, self.others)

    def corrected(
        self, theta: Tensor, generator: torch.Generator, particles: int | None = None
    ) -> Iterator[Weighted]:
        """Unbiased estimates of the density of theta (S, p), in pieces that fit in memory."""
        particles, correction = particles or self.particles, self.correction
        for one in theta.split(correction.pieces(particles)):
            yield correction(one, particles, generator)

    def own_state(self) -> dict[str, Tensor]:
        return {
            "reference": self.laplace.reference,
            "mode": self.laplace.mode,
            "slope": self.laplace.slope,
            "shape": self.shape.coefficients,
            "particles": torch.tensor([self.particles]),
            "other_modes": self._stacked([other.mode for other in self.others], self.laplace.mode),
            "other_slopes": self._stacked(
                [other.slope for other in self.others], self.laplace.slope
            ),
            "refined": torch.tensor([self.laplace.refined]),
            "path": self.path.state(),
        }

    def set_own_state(self, values: Mapping[str, Tensor]) -> None:
        kept = {name: value.to(self.device) for name, value in values.items()}
        self.laplace.reference, self.laplace.mode = kept["reference"], kept["mode"]
        self.laplace.slope = kept["slope"]
        self.laplace.refined = bool(kept["refined"])
        self.laplace.forget()
        self.path = Path.of_state(kept["path"])
        self.shape = Shape(kept["shape"])
        self.particles = int(kept["particles"])
        self.others = []
        for mode, slope in zip(kept["other_modes"], kept["other_slopes"], strict=True):
            other = copy.copy(self.laplace)
            other.mode, other.slope = mode, slope
            self.others.append(other)

    @staticmethod
    def _stacked(parts: Sequence[Tensor], like: Tensor) -> Tensor:
        return torch.stack(list(parts)) if parts else like.new_zeros(0, *like.shape)

    @property
    def dense(self) -> bool:
        """Whether a value takes a large matrix, and a gradient several of them."""
        return len(self.laplace.derivatives.probes) > DENSE_GRADIENT

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Laplace's formula and its gradient. (S, p) -> (S), (S, p)."""
        if self.dense:
            return self._differences(theta)
        values, gradients = [], []
        for one in theta.split(self.chunk()):
            found = self.laplace.at(one)
            values.append(found.log_marginal.nan_to_num(nan=-torch.inf))
            gradients.append(self.laplace.marginal_gradient(found))
        return torch.cat(values), torch.cat(gradients)

    def _differences(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and the gradient by central differences; all points in one call."""
        n = len(theta)
        step = DIFFERENCE * torch.eye(self.dim, dtype=theta.dtype, device=theta.device)
        around = torch.stack([theta.unsqueeze(1) + step, theta.unsqueeze(1) - step])
        points = torch.cat([theta, around.reshape(2 * theta.numel(), self.dim)])
        values = self.evaluate(points)
        up, down = values[n:].view(2, n, self.dim)
        return values[:n], (up - down) / (2 * DIFFERENCE)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the shared sites. (*S, p) -> (*S, *shape)."""
        theta = z.reshape(z.shape[:-1].numel(), self.dim)
        values: dict[str, list[Tensor]] = {}
        for one in theta.split(self.chunk()):
            mode = self.laplace.mode.expand(len(one), -1, -1)
            points = self.laplace.points(one.to(self.dtype), mode)
            found = self.whole.constrain(self.laplace.derivatives.to_target(points)[0])
            for name in self.sites:
                values.setdefault(name, []).append(found[name])
        return {
            name: torch.cat(parts).reshape((*z.shape[:-1], *parts[0].shape[1:]))
            for name, parts in values.items()
        }

    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        raise self._lacks("an inverse for the shared latents alone")

    def prior(self, n: int, seed: int) -> dict[str, np.ndarray]:
        drawn = self.whole.prior(n, seed)
        return {name: drawn[name] for name in self.sites}

    def starts(self, generator: torch.Generator) -> Tensor:
        return self.whole.starts(generator)[:, self.laplace.shared]

    def begin(self, uses: Any = ()) -> None:
        self.whole.begin(uses)

    def uses(self) -> Any:
        return self.whole.uses()

    def chunk(self) -> int:
        return self.laplace.derivatives.at_once

    def __repr__(self) -> str:
        return f"MarginalTarget({self.name}: D = {self.dim} shared; {self.structure})"


class _LogMarginal(torch.autograd.Function):
    """Laplace's formula, whose gradient is computed together with its value."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, target: MarginalTarget) -> Tensor:
        value, gradient = target.value_and_gradient(theta.detach().to(target.dtype))
        ctx.save_for_backward(gradient.to(theta.dtype))
        return value.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.unsqueeze(-1) * gradient, None


def _made_again(make: Any) -> MarginalTarget:
    """Create the target in another process."""
    whole = make()
    return MarginalTarget(whole, structure(whole))
