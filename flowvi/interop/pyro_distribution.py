"""Shared parts of the Pyro guides: distributions, sample sites, plates, parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints, transform_to

from flowvi.guides.guide import Guide
from flowvi.targets import LocalTarget, ModelError, Target

_NUMBERS = itertools.count()


class GuideDistribution(dist.TorchDistribution):
    """A guide as a Pyro distribution over vectors, for guides written by hand.

    ``pyro.sample("z", GuideDistribution(guide, encoder(x)))`` draws from the guide and trains its
    parameters, once ``pyro.module`` has registered them. The density of its own draws is computed
    with the draw; the density of other values needs the guide's inverse.

    Args:
        guide: Density on R^D.
        context: Context of the guide, (*B, C); its rows are the batch shape.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, guide: Guide, context: Tensor | None = None) -> None:
        self.guide = guide
        self.context = context
        rows = Size() if context is None else context.shape[:-1]
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(rows, Size((guide.dim,)), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry the whole gradient; draws of a mixture do not."""
        return self.guide.pathwise

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with gradients. (*S) -> (*S, *B, D)."""
        rows = 0 if self.context is None else self.context.dim() - 1
        lead = self.batch_shape[: len(self.batch_shape) - rows]
        z, log_q = self.guide.sample((*sample_shape, *lead), self.context)
        self._drawn = z, log_q, torch.is_grad_enabled()
        return z

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, without gradients. (*S) -> (*S, *B, D)."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of values. (*S, *B, D) -> (*S, *B)."""
        if self._drawn is not None:
            z, log_q, graph = self._drawn
            if value is z and graph >= torch.is_grad_enabled():
                return log_q
        return self.guide.log_prob(value, self.context)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GuideDistribution:
        """The same distribution for more rows, with independent draws."""
        batch_shape, context = Size(batch_shape), self.context
        if context is not None:
            rows = context.shape[:-1]
            if batch_shape[len(batch_shape) - len(rows) :] != rows:
                context = context.expand(*batch_shape, -1)
        new = GuideDistribution(self.guide, context)
        new._batch_shape = batch_shape
        return new


def own_name() -> str:
    """A unique name for a guide in Pyro's global parameter store."""
    return f"flowvi_{next(_NUMBERS)}"


def sample_site(
    message: Mapping[str, Any],
    value: Tensor,
    ladj: Tensor,
    lead: Size,
    batch: Size,
    plates: Mapping[str, Any],
) -> Tensor:
    """Sample a latent site with a value that was drawn in R^n and mapped to its support.

    Args:
        message: Pyro's message of the site.
        value: (*lead, *batch, *event), or flat after the lead.
        ladj: Log Jacobian of the map, (*lead, *batch).
        lead: Shape of the plates around the guide; plates of the model have size 1.
        batch: Batch shape of the site.
        plates: Plates of the model, by name.
    """
    fn, like = message["fn"], message["value"]
    event = like.shape[like.dim() - fn.event_dim :]
    value = placed(value, lead, batch, event).to(like.dtype)
    log_density = -placed(ladj, lead, batch, Size()).to(like.dtype)
    with ExitStack() as stack:
        for frame in message["cond_indep_stack"]:
            if frame.vectorized:
                stack.enter_context(plates[frame.name])
        drawn: Tensor = pyro.sample(
            message["name"], dist.Delta(value, log_density=log_density, event_dim=fn.event_dim)
        )
    return drawn


def placed(value: Tensor, lead: Size, batch: Size, event: Size) -> Tensor:
    """Reshape values to follow the plates around the guide, with axes of size 1 where needed.

    Args:
        value: (*lead, *batch, *event), or flat after the lead.
        lead: Shape of the plates around the guide; plates of the model have size 1.
        batch: Batch shape of the site.
        event: Event shape of the site.
    """
    return value.reshape((*torch.broadcast_shapes(batch, lead), *event))


def check_store(target: Target | LocalTarget) -> None:
    """Raise a ModelError if Pyro's store holds other values of the model's parameters."""
    store = pyro.get_param_store()
    for name, (leaf, constraint) in target.parameters_of_model.items():
        if name in store and not torch.equal(store[name], transform_to(constraint)(leaf)):
            raise ModelError(
                f"Pyro's parameter store holds another value of '{name}' than the fit. Call "
                "pyro.clear_param_store() before pyro_guide(fit)."
            )


def serve(target: Target | LocalTarget) -> None:
    """Add the model's own parameters to Pyro's store, if they are missing."""
    for name, (leaf, constraint) in target.parameters_of_model.items():
        if constraint is constraints.real:
            pyro.param(name, leaf)
        else:
            pyro.param(name, transform_to(constraint)(leaf).detach(), constraint=constraint)
