"""Gradient and curvature of a log density with known sparsity, for many points at a time."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.runtime import memory
from flowvi.runtime.clock import Interrupted
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.recording.products import merge_products
from flowvi.targets.recording.simpler import simpler
from flowvi.targets.recording.tape import record
from flowvi.targets.structure.colouring import Colouring, colouring
from flowvi.targets.structure.structure import CHAIN, Structure
from flowvi.targets.structure.terms import Terms
from flowvi.targets.structure.walk import Walk

# Directions that are written into a program one by one; more are batched by autograd.
WRITTEN = 8
# To write a program takes longer than to run it. One for a single point serves a few points, and
# the largest one serves fewer, until a number of points has come so often.
FEW, OFTEN = 16, 20
MOST_AT_ONCE = 64
# Largest number of programs that are kept.
PROGRAMS_KEPT = 32
# Most points in one evaluation of a gradient.
GROUP = 64
# Numbers of one operation that stay in a processor's cache; more points gain no speed.
CACHED = 300_000


class Curvature(NamedTuple):
    """Value, gradient, and products of the Hessian with the probing directions.

    The L = G d local latents are in the order of the units; the shared ones are held fixed.

    Attributes:
        log_p: Log density, (S).
        slope: Its gradient by the local latents, (S, L).
        products: Products of its Hessian with each probe, (S, C, L).
    """

    log_p: Tensor
    gradient: Tensor
    products: Tensor


class Derivatives:
    """Derivatives of a log density whose Hessian has a known sparsity among local latents.

    The Hessian of independent units of d latents is found from at most d products: probe k is one
    at latent k of every unit, or at several latents that no element ties (see `colouring`). A chain
    of order b needs 2 b + 1, a dense field one for each latent (Curtis, Powell and Reid, 1974,
    doi:10.1093/imamat/13.1.117).

    Args:
        target: The log density.
        structure: Its structure.

    Units with fewer latents than others are filled up by standard normal latents, on which nothing
    else depends: the D of these functions counts them. The increments of a walk are replaced by
    their sums.

    Attributes:
        dim: Number D of latents.
        probes: Probing directions, (C, L) with L = G d.
        columns: Columns of the local latents, (G, d).
        colouring: Which products have the elements of a unit's Hessian; None for a chain.
        filled: Which of them fill up units with fewer latents, (G, d).
        walk: The map of the target's points to those of these functions.
    """

    def __init__(self, target: GlobalTarget, structure: Structure) -> None:
        self.target, self.structure = target, structure
        self.columns = structure.columns.to(target.device)
        size, self.dim = structure.size, target.dim + structure.padding
        self.filled = self.columns >= target.dim
        options: dict[str, Any] = {"dtype": target.dtype, "device": target.device}
        self.colouring: Colouring | None = None
        if structure.kind == CHAIN:
            colours = min(2 * structure.order + 1, size)
            self.probes = torch.zeros(colours, size, **options)
            for c in range(colours):
                self.probes[c, c::colours] = 1
        else:
            pattern = structure.pattern
            full = torch.ones(size, size, dtype=torch.bool)
            self.colouring = colouring(pattern if pattern.numel() else full)
            self.probes = torch.zeros(self.colouring.products, structure.units, size, **options)
            for k, colour in enumerate(self.colouring.colour.tolist()):
                self.probes[colour, :, k] = 1
            self.probes = self.probes.flatten(1)
        self._shared = _Columns(structure.shared.to(target.device))
        self._local = _Columns(self.columns.flatten())
        order = torch.cat([self._shared.columns, self._local.columns]).argsort()
        self._back = None if bool((order.diff() == 1).all()) else order
        self._programs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._uses: dict[tuple[str, int], int] = {}
        self._element = structure.element.to(target.device)
        self.walk = Walk(self.columns.flatten(), structure.sums)

    @cached_property
    def terms(self) -> Terms:
        """The elements of the log density."""
        return Terms(self.target.density.batched, (self._trial, *self._behind))

    def curvature(self, z: Tensor) -> Curvature:
        """Value, gradient and curvature by the local latents. (S, D) -> (S), (S, L), (S, C, L)."""
        if len(self.probes) > WRITTEN:
            parts = [self._batched_curvature(one) for one in z.split(1)]
            return Curvature(*(torch.cat(p) for p in zip(*parts, strict=True)))
        return Curvature(*self._run("curvature", self._curvature, z))

    def gradient(self, z: Tensor) -> Tensor:
        """Gradient of the log density. (S, D) -> (S, D)."""
        (found,) = self._run("gradient", self._gradient, z)
        return found

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and its gradient. (S, D) -> (S), (S, D).

        Points go in groups of one size, so that few programs are written.
        """
        size = min(self.at_once, GROUP)
        missing = -len(z) % size
        padded = torch.cat([z, z[-1:].expand(missing, -1)]) if missing else z
        parts = [self._run("value", self._value_and_gradient, one) for one in padded.split(size)]
        value, gradient = (torch.cat(some)[: len(z)] for some in zip(*parts, strict=True))
        return value, gradient

    def trace_gradient(self, z: Tensor, weights: Tensor) -> Tensor:
        """Gradient of the sum over probes of <weights, H probe>. (S, D), (S, C, L) -> (S, D)."""
        (found,) = self._run("trace", self._trace_gradient, z, weights)
        return found

    def product(self, z: Tensor, direction: Tensor) -> Tensor:
        """Product of the Hessian with a direction of each point. (S, D), (S, D) -> (S, D)."""
        (found,) = self._run("product", self._product, z, direction)
        return found

    def by_unit(self, z: Tensor) -> Tensor:
        """Parts of the log density that belong to units. (*S, D) -> (*S, G + 1).

        The last part is that of the shared latents alone.
        """
        flat = z.reshape(-1, z.shape[-1])
        size = max(1, CACHED // len(self._element))
        if len(flat) <= size:
            (found,) = self._run("units", self._by_unit, flat)
        else:
            # Pieces of one shape need one program.
            pieces = -(-len(flat) // size)
            parts = flat.split(-(-len(flat) // pieces))
            found = torch.cat([self._run("units", self._by_unit, one)[0] for one in parts])
        return found.reshape(*z.shape[:-1], -1)

    def from_target(self, z: Tensor) -> Tensor:
        """Points of the target, filled up by zeros; a walk is summed. (*S, D_target) -> (*S, D)."""
        return self.walk.summed(
            torch.cat([z, z.new_zeros(*z.shape[:-1], self.structure.padding)], -1)
        )

    def to_target(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Points of the target, and the log density of what filled them up. (*S, D), (*S)."""
        dim = self.target.dim
        return self.walk.differenced(z[..., :dim]), _standard_normal(z[..., dim:]).sum(-1)

    @cached_property
    def cost(self) -> memory.Cost:
        """Memory of the curvature at some points."""

        def evaluate(n: int) -> object:
            z = self._point.to(self.target.dtype).expand(n, -1).clone()
            return self._curvature(z) if len(self.probes) <= WRITTEN else self._plain(z)

        return memory.measure_cost(evaluate)

    @property
    def at_once(self) -> int:
        """Number of points whose curvature fits in memory."""
        fits = self.cost.points_within(memory.evaluation_bytes())
        return max(1, min(fits, MOST_AT_ONCE, CACHED // len(self._element)))

    @property
    def _trial(self) -> Tensor:
        return self.target._trial.points[0]

    @property
    def _point(self) -> Tensor:
        return self.from_target(self._trial)

    @property
    def _behind(self) -> list[Tensor]:
        return self.target._behind

    def _log_prob(self, z: Tensor) -> Tensor:
        found: Tensor
        if not self.structure.padding:
            found = self.target.density.batched(self.walk.differenced(z), *self._behind)
            return found
        z, filling = self.to_target(z)
        found = self.target.density.batched(z, *self._behind)
        return found + filling

    def _plain(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = self._log_prob(z)
            (gradient,) = torch.autograd.grad(log_p.sum(), z, create_graph=True)
        return log_p, gradient

    def _joined(self, theta: Tensor, u: Tensor) -> Tensor:
        """Points of shared and of local latents. (S, p), (S, L) -> (S, D)."""
        z = torch.cat([theta, u], -1)
        return z if self._back is None else z[:, self._back]

    def _curvature(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # What depends on the shared latents alone has no part in the derivatives.
        theta, u = self._shared.of(z.detach()), self._local.of(z.detach())
        with torch.enable_grad():
            u = u.requires_grad_()
            log_p = self._log_prob(self._joined(theta, u))
            slope = _grad(log_p.sum(), u, create_graph=True)
            products = [_grad((slope * v).sum(), u, retain_graph=True) for v in self.probes]
        return log_p.detach(), slope.detach(), torch.stack(products, 1)

    def _batched_curvature(self, z: Tensor) -> Curvature:
        """The same for many probes at one point: the value and gradient are computed once."""
        theta, u = self._shared.of(z.detach()), self._local.of(z.detach())
        with torch.enable_grad():
            u = u.requires_grad_()
            log_p = self._log_prob(self._joined(theta, u))
            slope = _grad(log_p.sum(), u, create_graph=True)
            (products,) = torch.autograd.grad(
                slope, u, self.probes.unsqueeze(1), is_grads_batched=True
            )
        return Curvature(log_p.detach(), slope.detach(), products.movedim(0, 1))

    def _gradient(self, z: Tensor) -> tuple[Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return (_grad(self._log_prob(z).sum(), z),)

    def _value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = self._log_prob(z)
            gradient = _grad(log_p.sum(), z)
        return log_p.detach(), gradient

    def _trace_gradient(self, z: Tensor, weights: Tensor) -> tuple[Tensor]:
        theta, u = self._shared.of(z.detach()), self._local.of(z.detach())
        with torch.enable_grad():
            theta, u = theta.requires_grad_(), u.requires_grad_()
            log_p = self._log_prob(self._joined(theta, u))
            slope = _grad(log_p.sum(), u, create_graph=True)
            total = slope.new_zeros(())
            for k, probe in enumerate(self.probes):
                product = _grad((slope * probe).sum(), u, create_graph=True)
                total = total + (product * weights[:, k]).sum()
            by_theta = _grad(total, theta, retain_graph=True)
            return (self._joined(by_theta, _grad(total, u)),)

    def _product(self, z: Tensor, direction: Tensor) -> tuple[Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            gradient = _grad(self._log_prob(z).sum(), z, create_graph=True)
            return (_grad((gradient * direction.detach()).sum(), z),)

    def _by_unit(self, z: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            elements = self.terms(self.to_target(z)[0], *self._behind)
            total = elements.new_zeros(len(z), self.structure.units + 1)
            total = total.index_add(1, self._element, elements)
            if self.structure.padding:
                units = self.filled.nonzero()[:, 0]
                filled = z[..., self.columns[self.filled]]
                total = total.index_add(1, units, _standard_normal(filled).to(total))
            return (total,)

    def _run(self, name: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """Call a function of tensors by a program for that number of points, or for another."""
        count = len(inputs[0])
        size = self._size(name, count)
        parts = [
            self._by_program((name, size), function, tuple(_extended(x, size) for x in some))
            for some in zip(*(x.detach().split(size) for x in inputs), strict=True)
        ]
        if len(parts) == 1:
            return parts[0] if size == count else tuple(x[:count] for x in parts[0])
        return tuple(torch.cat(some)[:count] for some in zip(*parts, strict=True))

    def _size(self, name: str, count: int) -> int:
        """Number of points of the program that evaluates so many."""
        full = min(MOST_AT_ONCE, CACHED // max(1, len(self._element)))
        uses = self._uses[name, count] = self._uses.get((name, count), 0) + 1
        if not 1 < count < full or uses > OFTEN or (name, count) in self._programs:
            return count
        return 1 if count <= FEW and (name, full) not in self._programs else full

    def _by_program(
        self, key: tuple[str, int], function: Callable[..., Any], inputs: tuple[Tensor, ...]
    ) -> Any:
        """Call a function by its program for these shapes, which is written at the first call."""
        if key not in self._programs:
            try:
                graph = simpler(merge_products(record(function, list(inputs))), list(inputs))
            except Interrupted:
                raise
            except Exception as error:
                warnings.warn(f"Keeping the slower curvature: {error}", stacklevel=4)
                self._programs[key] = function
            else:
                self._programs[key] = graph
            while len(self._programs) > PROGRAMS_KEPT:
                # The least recently used one; shapes that were only tried must not stay.
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        with torch.no_grad():
            return self._programs[key](*inputs)


class _Columns:
    """Some columns of points; a slice where they are next to each other.

    Args:
        columns: Their numbers.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        together = len(columns) > 0 and bool((columns.diff() == 1).all())
        self._part = slice(int(columns[0]), int(columns[-1]) + 1) if together else None

    def of(self, z: Tensor) -> Tensor:
        """The columns of points, (S, D) -> (S, n)."""
        return z[:, self.columns] if self._part is None else z[:, self._part].contiguous()


def _standard_normal(x: Tensor) -> Tensor:
    """Log density of each element."""
    return -0.5 * (x.square() + math.log(2 * math.pi))


def _extended(x: Tensor, size: int) -> Tensor:
    """Inputs with their last one repeated, so that there are as many as asked for."""
    return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]).contiguous()


def _grad(value: Tensor, z: Tensor, **options: Any) -> Tensor:
    """Gradient at z; zero if the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(z)
    (found,) = torch.autograd.grad(value, z, allow_unused=True, **options)
    return torch.zeros_like(z) if found is None else found
