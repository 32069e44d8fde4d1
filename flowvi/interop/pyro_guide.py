"""Convert a fit to a Pyro guide."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast, overload

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.utils._pytree import tree_leaves

from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.guides.guide import Guide
from flowvi.guides.pushforward import Pushforward
from flowvi.interop.pyro_distribution import (
    GuideDistribution,
    check_store,
    own_name,
    placed,
    sample_site,
    serve,
)
from flowvi.interop.pyro_row_guide import RowPyroGuide
from flowvi.runtime.arguments import require_fit
from flowvi.targets import GlobalTarget, ModelError


@overload
def pyro_guide(fit: Fit) -> PyroGuide: ...


@overload
def pyro_guide(fit: RowFit) -> RowPyroGuide: ...


def pyro_guide(fit: Fit | RowFit) -> PyroGuide | RowPyroGuide:
    """Convert the best guide of a fit to a Pyro guide.

    It works in `pyro.infer.Predictive`, in `SVI`, which continues the training, in
    `poutine.trace`, and, if it is one flow and the supports are mapped as in Pyro, in
    `NeuTraReparam`. It takes the model's arguments, and has the distribution of the fit's guide.
    Training it does not change the fit. The model's own parameters remain the model's, and start
    at their fitted values. The guide of a fit with `local=` reads the rows from these arguments,
    all rows or a batch, and draws in the model's plate.

    Args:
        fit: Fit of a target that `from_pyro` made.

    Raises:
        ModelError: The target is a plain density, the model has shared and row latents, or Pyro's
            parameter store holds other values of the model's parameters.
    """
    if isinstance(fit, RowFit):
        # Parameters that model and guide share stay shared.
        kept = {id(p): p for p in fit.target.parameters()}
        return RowPyroGuide(fit.target, copy.deepcopy(fit.guide, kept))
    if isinstance(fit, NestedFit):
        raise ModelError(
            "pyro_guide needs a fit of one vector of latents, or of one for each row; got a "
            "NestedFit, which has both: use GuideDistribution in a guide of your own, which "
            "docs/pyro.md shows."
        )
    require_fit("pyro_guide", fit, Fit, "what flowvi.fit returned")
    target = cast(GlobalTarget, fit.target)
    if fit.chains is not None:
        warnings.warn(
            "The fit ended in NUTS because no guide was to be trusted; this is the best guide.",
            stacklevel=2,
        )
    return PyroGuide(target, copy.deepcopy(fit.guide))


class PyroGuide(AutoContinuous):
    """A guide on R^D as a Pyro guide for the model of a target.

    Args:
        target: From `from_pyro`.
        guide: Density on R^D; it is trained in place.
    """

    def __init__(self, target: GlobalTarget, guide: Guide) -> None:
        if not target.messages:
            raise ModelError(
                f"{target.name} is a plain density and has no Pyro sites: use "
                "GuideDistribution(fit.guide) with target.constrain."
            )
        AutoGuide.__init__(self, None)
        self._pyro_name = own_name()
        self._target = (target,)  # the model's parameters are not this module's
        self.density = guide
        self.prototype_trace = poutine.Trace()
        self.latent_dim = target.dim
        for name, message in target.messages.items():
            self.prototype_trace.add_node(name, **{**message, "name": name})
            for frame in message["cond_indep_stack"]:
                if frame.vectorized:
                    self._prototype_frames[frame.name] = frame
        self._seen: set[tuple[tuple[int, ...], ...]] = {()}
        self._create_plates()  # NeuTraReparam needs them before the first call
        check_store(target)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; only the shapes of the model's arguments are used.

        Raises:
            ModelError: With these arguments the latents have other shapes than in the fit.
        """
        (target,) = self._target
        serve(target)
        self._check_shapes(args, kwargs)
        z = self.sample_latent()
        with poutine.block():  # the target may run the model
            values, ladjs = target.latents(z)
        plates = self._create_plates(*args, **kwargs)
        out = {}
        for name, message in target.messages.items():
            batch = Size(message["value"].shape[: message["value"].dim() - message["fn"].event_dim])
            lead = z.shape[:-1]
            out[name] = sample_site(message, values[name], ladjs[name], lead, batch, plates)
        return out

    def get_posterior(self, *args: Any, **kwargs: Any) -> GuideDistribution:
        """The density on R^D."""
        return GuideDistribution(self.density)

    def get_base_dist(self) -> dist.TorchDistribution:
        """Standard normal noise, the initial distribution of NUTS in the guide's space."""
        like = torch.zeros(self.latent_dim, dtype=self._target[0].dtype)
        return dist.Normal(like, 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The map from noise to R^D, for `NeuTraReparam`.

        Raises:
            NotImplementedError: The guide is no single flow, or a support is mapped to R^n in
                another way than in Pyro.
        """
        if not isinstance(self.density, Pushforward):
            raise NotImplementedError(f"A {type(self.density).__name__} is no map from noise.")
        for name, message in self._target[0].messages.items():
            if not _maps_as_pyro(self._target[0], name, message):
                raise NotImplementedError(f"The support of '{name}' is mapped by flowvi's own map.")
        return Transport(self.density)

    def _check_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model once for arguments of new shapes, whose rows may differ from the fit's."""
        leaves = tree_leaves((args, kwargs))
        shapes = tuple(tuple(a.shape) for a in leaves if hasattr(a, "shape"))
        if shapes not in self._seen:
            with poutine.block():
                self._target[0].check_call(args, kwargs)
            self._seen.add(shapes)

    def _unpack_latent(self, latent: Tensor) -> Any:
        (target,) = self._target
        for name, message in target.messages.items():
            like = biject_to(message["fn"].support).inv(message["value"])
            fn_event = message["fn"].event_dim + like.dim() - message["value"].dim()
            batch, event = like.shape[: like.dim() - fn_event], like.shape[like.dim() - fn_event :]
            piece = latent[..., target.slices[name]]
            yield message, placed(piece, latent.shape[:-1], batch, event).to(like.dtype)


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


def _maps_as_pyro(target: GlobalTarget, name: str, message: Any) -> bool:
    """Whether a site's columns of z are Pyro's unconstrained value of the site."""
    if any(
        n not in target.sites or m["value"].shape != target.sites[n].shape
        for n, m in target.messages.items()
    ):
        return False  # only some elements of the site are latent
    theirs = biject_to(message["fn"].support).inv(message["value"]).reshape(-1)
    values = {n: m["value"] for n, m in target.messages.items()}
    with poutine.block():
        ours = target.unconstrain(values)[target.slices[name]].to(theirs.dtype)
    return ours.shape == theirs.shape and bool(torch.isclose(ours, theirs, 1e-4, 1e-4).all())
