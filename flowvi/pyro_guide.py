"""A fitted guide as a Pyro guide, and any guide as a Pyro distribution."""

from __future__ import annotations

import copy
import itertools
import warnings
from contextlib import ExitStack
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

from flowvi.fit import Fit
from flowvi.guides import Guide, Pushforward
from flowvi.target import ModelError, Target

_NUMBERS = itertools.count()


def pyro_guide(fit: Fit) -> PyroGuide:
    """The best guide of a fit as a guide for Pyro.

    It works in `pyro.infer.Predictive`, in `SVI`, where it trains on, in `poutine.trace`, and, if
    it is one flow and the supports are mapped as Pyro maps them, in `NeuTraReparam`. It is called
    with the model's arguments, and samples the same values and densities as the fit. Training
    it leaves the fit as it was; the model's own parameters are the model's, and start where the
    fit left them.

    Args:
        fit: Fit of a target that `from_pyro` made.

    Raises:
        ModelError: The target is a plain density, or Pyro's parameter store holds other
            values of the model's parameters.
    """
    if not isinstance(fit, Fit):
        raise ModelError(
            f"pyro_guide needs a fit of one vector of latents; got a {type(fit).__name__}. For "
            "latents of rows, use GuideDistribution in a guide of your own: docs/pyro.md shows one."
        )
    if fit.chains is not None:
        warnings.warn(
            "The fit ended in NUTS because no guide was to be trusted; this is the best guide.",
            stacklevel=2,
        )
    return PyroGuide(fit.target, copy.deepcopy(fit.guide))


class GuideDistribution(dist.TorchDistribution):
    """A guide as a Pyro distribution over vectors, for guides written by hand.

    ``pyro.sample("z", GuideDistribution(guide, encoder(x)))`` draws from the guide and trains its
    parameters, once ``pyro.module`` has registered them. The density of a draw is the one that
    came with it; that of any other value takes the guide's inverse.

    Args:
        guide: Density on R^D.
        context: What it is conditioned on, (*B, C); its rows are the batch shape.
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
        """Whether draws carry the whole gradient; those of a mixture do not."""
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
        """Score values. (*S, *B, D) -> (*S, *B)."""
        if self._drawn is not None:
            z, log_q, graph = self._drawn
            if value is z and graph >= torch.is_grad_enabled():
                return log_q
        return self.guide.log_prob(value, self.context)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GuideDistribution:
        """The same distribution at more rows, whose draws are independent."""
        batch_shape, context = Size(batch_shape), self.context
        if context is not None:
            rows = context.shape[:-1]
            if batch_shape[len(batch_shape) - len(rows) :] != rows:
                context = context.expand(*batch_shape, -1)
        new = GuideDistribution(self.guide, context)
        new._batch_shape = batch_shape
        return new


class PyroGuide(AutoContinuous):
    """A guide on R^D as a Pyro guide for the model of a target.

    Args:
        target: From `from_pyro`.
        guide: Density on R^D; it is trained in place.
    """

    def __init__(self, target: Target, guide: Guide) -> None:
        if not target.messages:
            raise ModelError(
                f"{target.name} is a plain density and has no Pyro sites: use "
                "GuideDistribution(fit.guide) with target.constrain."
            )
        AutoGuide.__init__(self, None)
        # Pyro's parameter store is one for all: guides of two fits must not share names.
        self._pyro_name = f"flowvi_{next(_NUMBERS)}"
        self._target = (target,)  # the model's parameters are not this module's
        self.density = guide
        self.prototype_trace = poutine.Trace()
        self.latent_dim = target.dim
        for name, message in target.messages.items():
            self.prototype_trace.add_node(name, **{**message, "name": name})
            for frame in message["cond_indep_stack"]:
                if frame.vectorized:
                    self._prototype_frames[frame.name] = frame
        self._create_plates()  # NeuTraReparam asks for them before the first call
        _check_store(target)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the model's arguments are taken and not needed."""
        (target,) = self._target
        _serve(target)
        z = self.sample_latent()
        with poutine.block():  # the target may run the model
            values, ladjs = target.latents(z)
        plates = self._create_plates(*args, **kwargs)
        out = {}
        for name, message in target.messages.items():
            fn, like = message["fn"], message["value"]
            batch = Size(like.shape[: like.dim() - fn.event_dim])
            event = like.shape[len(batch) :]
            value = _placed(values[name], z.shape[:-1], batch, event).to(like.dtype)
            log_density = -_placed(ladjs[name], z.shape[:-1], batch, Size()).to(like.dtype)
            delta = dist.Delta(value, log_density=log_density, event_dim=fn.event_dim)
            with ExitStack() as stack:
                for frame in message["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                out[name] = pyro.sample(name, delta)
        return out

    def get_posterior(self, *args: Any, **kwargs: Any) -> GuideDistribution:
        """The density on R^D."""
        return GuideDistribution(self.density)

    def get_base_dist(self) -> dist.TorchDistribution:
        """Standard normal noise, where NUTS in the guide's space starts."""
        like = torch.zeros(self.latent_dim, dtype=self._target[0].dtype)
        return dist.Normal(like, 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The map from noise to R^D, for `NeuTraReparam`.

        Raises:
            NotImplementedError: The guide is no single flow, or a support is mapped to R^n in
                another way than Pyro's.
        """
        if not isinstance(self.density, Pushforward):
            raise NotImplementedError(f"A {type(self.density).__name__} is no map from noise.")
        for name, message in self._target[0].messages.items():
            if not _maps_as_pyro(self._target[0], name, message):
                raise NotImplementedError(f"The support of '{name}' is mapped by flowvi's own map.")
        return Transport(self.density)

    def _unpack_latent(self, latent: Tensor) -> Any:
        (target,) = self._target
        for name, message in target.messages.items():
            like = biject_to(message["fn"].support).inv(message["value"])
            fn_event = message["fn"].event_dim + like.dim() - message["value"].dim()
            batch, event = like.shape[: like.dim() - fn_event], like.shape[like.dim() - fn_event :]
            piece = latent[..., target.slices[name]]
            yield message, _placed(piece, latent.shape[:-1], batch, event).to(like.dtype)


class Transport(Transform):
    """The map of a flow guide from noise to R^D.

    Args:
        guide: The guide.
    """

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, guide: Pushforward) -> None:
        super().__init__(cache_size=0)
        self.guide = guide

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.guide.transport(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.guide.transport(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x, _ = self.guide.affine.inverse(y)
        return self.guide.flow.inverse(x)[0]


def _placed(value: Tensor, lead: Size, batch: Size, event: Size) -> Tensor:
    """Put values behind the plates that the guide is called in: axes of size 1 make room.

    Args:
        value: (*lead, *batch, *event), or flat behind the lead.
        lead: Shape of the plates around the guide, those of the model included as 1.
        batch: Batch shape of the site.
        event: Its event shape.
    """
    return value.reshape((*torch.broadcast_shapes(batch, lead), *event))


def _maps_as_pyro(target: Target, name: str, message: Any) -> bool:
    """Whether a site's columns of z are what Pyro makes of its value."""
    theirs = biject_to(message["fn"].support).inv(message["value"]).reshape(-1)
    values = {n: m["value"] for n, m in target.messages.items()}
    with poutine.block():
        ours = target.unconstrain(values)[target.slices[name]].to(theirs.dtype)
    return ours.shape == theirs.shape and bool(torch.isclose(ours, theirs, 1e-4, 1e-4).all())


def _check_store(target: Target) -> None:
    """Refuse parameters of the model that another training has left in Pyro's store."""
    store = pyro.get_param_store()
    for name, (leaf, constraint) in target.parameters_of_model.items():
        if name in store and not torch.equal(store[name], transform_to(constraint)(leaf)):
            raise ModelError(
                f"Pyro's parameter store holds another value of '{name}' than the fit. Call "
                "pyro.clear_param_store() before pyro_guide(fit)."
            )


def _serve(target: Target) -> None:
    """Put the model's own parameters into Pyro's store, where they are not there yet."""
    for name, (leaf, constraint) in target.parameters_of_model.items():
        if constraint is constraints.real:
            pyro.param(name, leaf)
        else:
            pyro.param(name, transform_to(constraint)(leaf).detach(), constraint=constraint)
