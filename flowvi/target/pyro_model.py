"""Capture a Pyro model as a log density on R^D."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowvi.target import checks
from flowvi.target.base import Facts, ModelError, Site, Target, cover
from flowvi.target.bijections import support_of
from flowvi.target.handlers import (
    FromVector,
    Owned,
    Parameters,
    Prior,
    ToVector,
    improper_base,
    is_deterministic,
    quiet,
    run,
)
from flowvi.target.program import CaptureError, Density, capture
from flowvi.target.simulate import simulator
from flowvi.target.tape import LatentValueRead, RandomNumber

TRIES = 40
POINTS = 3


def from_pyro(
    model: Callable[..., Any], *args: Any, local: str | None = None, **kwargs: Any
) -> Target:
    """Capture a Pyro model as a log density on R^D.

    The model runs a few times now and never again while a guide is fitted:
    the operations that depend on latent values are recorded once, batched,
    and checked against the model in value and gradient.

    Args:
        model: A Pyro model: a function, a callable object or a `PyroModule`.
        *args: Its positional arguments; numpy arrays become tensors.
        local: Name of the plate whose latents are local, one vector a row.
        **kwargs: Its keyword arguments.

    Returns:
        The target, evaluated in double precision where the model allows it.

    Raises:
        ModelError: The model cannot be written as a density on R^D; the
            message names the site or line and says what to do.
    """
    if local is not None:
        raise ModelError(
            f"local='{local}': latents in a plate cannot yet have a guide that reads their row; "
            "leave local out to give every row its own latents."
        )
    args = tuple(_as_tensor(a) for a in args)
    kwargs = {k: _as_tensor(v) for k, v in kwargs.items()}
    return _Capture(model, args, kwargs).target()


class _Capture:
    """One model on its way to a target."""

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.name = _name_of(model)
        self.parameters = Parameters()
        data = [t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.dtype = torch.float64 if torch.float64 in data else torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            torch.manual_seed(0)
            self.traces = [self._prior_trace(validate=i == 0) for i in range(3)]
        self.first = self.traces[0]
        checks.same_structure(self.traces)
        self.latents = checks.latent_sites(self.first, self.name)
        self.subsampled = checks.subsampled_plates(self.first, self.latents)
        self.enumerated = checks.enumerated_sites(self.first)
        checks.observations(self.first)
        self._lay_out()

    def target(self) -> Target:
        """Find points, capture the density and put the target together."""
        points = self._points()
        inputs = [*self.parameters.leaves.values(), *self._first_rows()]
        try:
            batched = capture(self._log_prob, points, inputs, self.name)
        except LatentValueRead as error:
            raise ModelError(
                f"{self.name} reads a value that depends on a latent into Python: {error}. The "
                "density would be that of one branch only. Use torch.where for a choice, and "
                "tensors instead of numbers."
            ) from None
        except RandomNumber as error:
            raise ModelError(
                f"{self.name} draws random numbers that are not sites: {error}. Draw them "
                "outside of the model and pass them as data, or make them a pyro.sample site."
            ) from None
        except CaptureError as error:
            raise ModelError(str(error)) from None
        frozen = not self.parameters.leaves
        return Target(
            self._facts(),
            Density(batched, frozen),
            self._values,
            self._inverse,
            None if self.enumerated else self._log_likelihood,
            points,
            list(self.parameters.leaves.values()),
            simulator(
                functools.partial(self.model, *self.args, **self.kwargs),
                self.parameters,
                [*self.latents, *self.deterministics],
                list(self.observed),
                points.dtype,
            ),
        )

    # The functions of one point that are recorded.

    def _log_prob(self, z: Tensor, *inputs: Tensor) -> Tensor:
        handler = FromVector(z, self.slices, self.shapes)
        trace = self._trace(handler, inputs, enumerate_sites=bool(self.enumerated))
        if self.enumerated:
            evaluator = TraceEinsumEvaluator(trace, True, self.plate_nesting)
            total = evaluator.log_prob(trace)
        else:
            terms = [site["log_prob_sum"] for site in _scored(trace)]
            total = sum(terms[1:], terms[0])
        log_p: Tensor = total + handler.ladj
        return log_p

    def _values(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        trace = self._trace(FromVector(z, self.slices, self.shapes), inputs)
        names = [*self.latents, *self.deterministics]
        # A deterministic value may not depend on z, or be a number.
        return {name: torch.as_tensor(trace.nodes[name]["value"]) for name in names}

    def _inverse(self, flat: Tensor, *inputs: Tensor) -> Tensor:
        values, start = {}, 0
        for name, site in self.sites.items():
            size = int(np.prod(site.shape, dtype=int))
            values[name] = flat[start : start + size].reshape(site.shape)
            start += size
        handler = ToVector(values)
        self._trace(handler, inputs)
        return torch.cat([handler.pieces[name] for name in self.latents])

    def _log_likelihood(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        trace = self._trace(FromVector(z, self.slices, self.shapes), inputs)
        return {
            site["name"]: scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
            for site in _scored(trace)
            if site["name"] in self.observed
        }

    def _trace(
        self, handler: Any, inputs: tuple[Tensor, ...], enumerate_sites: bool = False
    ) -> poutine.Trace:
        rows = inputs[len(self.parameters.leaves) :]
        owned = Owned(self.parameters, dict(zip(self.subsampled, rows, strict=True)))
        model = self.model
        if enumerate_sites:
            model = poutine.enum(self.model, first_available_dim=-1 - self.plate_nesting)
        with quiet():
            trace = run(model, self.args, self.kwargs, handler, owned)
            checks.same_latents(trace, self.latents)
            trace.compute_log_prob()
        return trace

    # Facts.

    def _prior_trace(self, validate: bool) -> poutine.Trace:
        with pyro.validation_enabled(validate or pyro.settings.get("validate_poutine")):
            owned = Owned(self.parameters)
            return run(self.model, self.args, self.kwargs, checks.LastSite(), Prior(self.dtype), owned)

    def _lay_out(self) -> None:
        self.slices: dict[str, slice] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.sites: dict[str, Site] = {}
        start = 0
        for name, site in self.latents.items():
            transform = checks.transform_of(site)
            value = site["value"]
            u = transform.inv(value)
            self.shapes[name] = u.shape
            self.slices[name] = slice(start, start + u.numel())
            start += u.numel()
            self.sites[name] = Site(tuple(value.shape), support_of(site["fn"]), _dims(site))
        nodes = [site for site in self.first.nodes.values() if site["type"] == "sample"]
        self.deterministics = tuple(s["name"] for s in nodes if is_deterministic(s))
        self.observed = {s["name"]: s for s in nodes if checks.is_data(s)}
        frames = [f for s in nodes for f in s["cond_indep_stack"] if f.dim is not None]
        self.plate_nesting = max((-f.dim for f in frames), default=0)

    def _facts(self) -> Facts:
        dims = {name: site.dims for name, site in self.sites.items()}
        for name in self.deterministics:
            dims[name] = _dims(self.first.nodes[name])
        observed = {name: site["value"].detach() for name, site in self.observed.items()}
        dims |= {name: _dims(site) for name, site in self.observed.items()}
        constants = self._constants(observed)
        plates = _plates(self.first)
        for name, t in constants.items():
            dims[name] = _constant_dims(name, t, plates)
        improper = [n for n, s in self.latents.items() if improper_base(s["fn"]) is not None]
        return Facts(
            self.name,
            self.sites,
            self.slices,
            self.deterministics,
            self._whole_observations(observed),
            constants,
            dims,
            {},
            tuple(improper),
            self.subsampled,
        )

    def _constants(self, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensor arguments that are not themselves observed."""
        try:
            bound = inspect.signature(self.model).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):
            return {}
        data = {t.data_ptr() for t in observed.values()}
        taken = {*self.latents, *self.deterministics, *observed}
        return {
            name: value.detach()
            for name, value in bound.items()
            if isinstance(value, Tensor)
            and name not in taken
            and value.data_ptr() not in data
            and not any(value.shape == t.shape and torch.equal(value, t) for t in observed.values())
        }

    def _whole_observations(self, observed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Observed data of all rows, where the first trace saw a batch of them."""
        if not self.subsampled:
            return observed
        sizes = {name: size for name, (size, _) in self.subsampled.items()}
        whole = {}
        for name, t in observed.items():
            dims = _dims(self.observed[name])
            whole[name] = t.new_zeros([sizes.get(d, n) for d, n in zip(dims, t.shape, strict=True)])
        keep = ToVector({name: site["value"] for name, site in self.latents.items()})
        leaves = tuple(self.parameters.leaves.values())
        for _, batch in cover(self.subsampled):
            trace = self._trace(keep, (*leaves, *batch.values()))
            for name in whole:
                value = trace.nodes[name]["value"]
                dims = _dims(self.observed[name])
                rows = [batch.get(d, torch.arange(n)) for d, n in zip(dims, value.shape, strict=True)]
                whole[name][torch.meshgrid(*rows, indexing="ij")] = value
        return whole

    def _first_rows(self) -> list[Tensor]:
        return list(next(cover(self.subsampled))[1].values())

    def _points(self) -> Tensor:
        """A few points at which the model's own density is finite."""
        inputs = (*self.parameters.leaves.values(), *self._first_rows())
        generator = torch.Generator().manual_seed(0)
        start = torch.cat([self._flat(t) for t in self.traces]).reshape(len(self.traces), -1)
        found: list[Tensor] = []
        trace = self.first
        for i in range(TRIES):
            z = start[i] if i < len(start) else start[0]
            if i >= len(start):
                noise = torch.randn(z.shape, generator=generator).to(z)
                z = noise * (2.0 if i % 2 else 0.5) * (1 - i / TRIES)
            with torch.no_grad(), contextlib.suppress(torch.linalg.LinAlgError):
                trace = self._trace(FromVector(z, self.slices, self.shapes), inputs)
                if all(site["log_prob_sum"].isfinite() for site in _scored(trace)):
                    found.append(z)
            if len(found) == POINTS:
                return torch.stack(found)
        if found:
            return torch.stack(found)
        raise ModelError(checks.where_not_finite(trace, TRIES))

    def _flat(self, trace: poutine.Trace) -> Tensor:
        pieces = [
            checks.transform_of(trace.nodes[name]).inv(trace.nodes[name]["value"]).reshape(-1)
            for name in self.latents
        ]
        return torch.cat(pieces).detach()


def _scored(trace: poutine.Trace) -> list[dict[str, Any]]:
    """Sites that contribute to the log joint."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and not isinstance(site["fn"], _Subsample)
        and not is_deterministic(site)
    ]


def _dims(site: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for each axis of a site's value: its plates, then made-up ones."""
    value = site["value"]
    batch = value.dim() - site["fn"].event_dim
    if is_deterministic(site) and batch == 0:
        # Unless told otherwise, pyro.deterministic takes every axis for one of the event.
        batch = value.dim()
    names = [f"{site['name']}_dim_{i}" for i in range(value.dim())]
    for frame in site["cond_indep_stack"]:
        axis = batch + frame.dim if frame.dim is not None else -1
        if 0 <= axis < batch and value.shape[axis] == frame.size:
            names[axis] = frame.name
    return tuple(names)


def _plates(trace: poutine.Trace) -> dict[str, int]:
    nodes = trace.nodes.values()
    return {s["name"]: s["fn"].size for s in nodes if isinstance(s.get("fn"), _Subsample)}


def _constant_dims(name: str, t: Tensor, plates: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of constant data are named by the one plate that has their size, if only one has."""
    dims = []
    for i, size in enumerate(t.shape):
        fitting = [plate for plate, n in plates.items() if n == size]
        known = len(fitting) == 1 and fitting[0] not in dims
        dims.append(fitting[0] if known else f"{name}_dim_{i}")
    return tuple(dims)


def _as_tensor(value: Any) -> Any:
    """Numpy arrays become tensors; everything else is the model's own business."""
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value


def _name_of(model: Any) -> str:
    while isinstance(model, functools.partial):
        model = model.func
    return getattr(model, "__name__", type(model).__name__)
