"""Run a Pyro model with its arguments at given latent values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flowvi.target import checks, scores
from flowvi.target.discrete import AtValues, Marked
from flowvi.target.facts import ModelError
from flowvi.target.handlers import Owned, Prior, quiet, run
from flowvi.target.naming import signature_of
from flowvi.target.parameters import Parameters
from flowvi.target.samplers import RightSamples
from flowvi.target.tabular import as_tensor, not_numbers

# Of the words of an error that repeat all values of a tensor.
LONGEST = 300


@dataclass
class Runner:
    """A Pyro model with its arguments.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        parameters: Its own parameters.
        drawn: Plates that draw their rows, once the model has run: size and batch size.
        replaced: Observed sites whose values are inputs, behind parameters and rows.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: Parameters = field(default_factory=Parameters)
    drawn: dict[str, tuple[int, int]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    given: tuple[Any, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.given = self.args, self.kwargs
        # Arrays and columns of numbers become tensors; all else is the model's own business.
        self.args, self.kwargs = tree_map(as_tensor, (self.args, self.kwargs))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the data."""
        leaves = tree_leaves((self.args, self.kwargs))
        double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in leaves)
        return torch.float64 if double else torch.get_default_dtype()

    def arguments(self) -> dict[str, Any]:
        """What the model is called with, by name, defaults included; empty if that is unknown."""
        return self._named(self.args, self.kwargs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = signature_of(self.model).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return {}
        bound.apply_defaults()
        return dict(bound.arguments)

    def prior(self, validate: bool) -> tuple[poutine.Trace, dict[str, Tensor]]:
        """One run from the prior, and the data that it observed, as they were given."""
        owned = Owned(self.parameters)
        last = checks.LastSite()
        handlers = (last, Prior(self.dtype), RightSamples(), owned, checks.Known(), Marked())
        with torch.no_grad(), pyro.validation_enabled(validate):
            try:
                trace = run(self.model, self.args, self.kwargs, *handlers)
            except Exception as error:
                self._blame(error, last)
                last.told(error)
                raise
        self.drawn = owned.drawn
        return trace, owned.data

    def _blame(self, error: Exception, last: checks.LastSite) -> None:
        """Say what the model failed of, if it is to be seen in its arguments."""
        if isinstance(error, ModelError):
            return
        several = self._devices(last.devices) if isinstance(error, RuntimeError) else ""
        cause = ""
        if isinstance(error, ValueError | IndexError):
            cause = scores.not_finite_in(self.arguments()).strip()
        args, kwargs = self.given
        named = self._named(args, kwargs) or {"args": args, **kwargs}
        odd = "" if several or cause else not_numbers(named, error)
        if several or cause or odd:
            first = str(error).partition("\n")[0][:LONGEST]
            words = " ".join(filter(None, (several, cause, odd, first)))
            raise ModelError(f"The model fails. {words}") from error

    def _devices(self, sites: Mapping[str, torch.device]) -> str:
        """Which tensors lie on which devices, in words; empty if all lie on one."""
        found = {
            f"argument '{name}'": leaf.device
            for name, value in self.arguments().items()
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        }
        found |= {f"parameter '{n}'": p.device for n, p in self.parameters.leaves.items()}
        found |= sites
        first = {device: name for name, device in reversed(found.items())}
        if len(first) < 2:
            return ""
        words = ", ".join(f"{name} lies on {device}" for device, name in first.items())
        return f"Tensors of the model lie on several devices: {words}. Move them to one."

    def trace(
        self,
        handler: Any,
        inputs: Sequence[Tensor] = (),
        enumerate_from: int | None = None,
        places: Mapping[str, Tensor] | None = None,
    ) -> tuple[poutine.Trace, dict[str, Tensor]]:
        """One scored run on latent values that a handler serves, and the data as given.

        Args:
            handler: Serves latent values.
            inputs: The model's own parameters, rows for the plates that draw theirs, and values
                of the sites in `replaced`.
            enumerate_from: First axis for the values of discrete sites; None to draw them.
            places: Discrete sites that have one value, by its place among all.
        """
        rest = inputs[len(self.parameters.leaves) :]
        rows, data = rest[: len(self.drawn)], rest[len(self.drawn) :]
        owned = Owned(self.parameters, dict(zip(self.drawn, rows, strict=True)))
        model = AtValues(places or {})(Marked()(self.model))
        if data:
            model = poutine.condition(model, dict(zip(self.replaced, data, strict=True)))
        if enumerate_from is not None:
            model = poutine.enum(model, first_available_dim=enumerate_from)
        with quiet():
            trace = run(model, self.args, self.kwargs, handler, owned)
            trace.compute_log_prob()
        return trace, owned.data
