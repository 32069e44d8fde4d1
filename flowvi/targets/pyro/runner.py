"""Run a Pyro model with its arguments at given latent values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from flowvi.runtime.rng import isolated_rng
from flowvi.targets import precision
from flowvi.targets.pyro import checks, data_checks
from flowvi.targets.pyro.discrete import FixDiscrete, MarkEnumerated
from flowvi.targets.pyro.handlers import (
    ServeInputs,
    StartImproperPriors,
    isolated_param_store,
    run,
    without_validation,
)
from flowvi.targets.pyro.naming import signature_of
from flowvi.targets.pyro.parameters import Parameters
from flowvi.targets.pyro.sampler_fixes import FixedSamplers
from flowvi.targets.schema import ModelError
from flowvi.targets.tabular import as_tensor, not_numbers

# Longest message of an error that is quoted; longer ones repeat all values of a tensor.
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
        varying: Tensors among the arguments that are inputs, behind those; see `leaves`.
        precision: In which the model runs, whatever that of its arguments and torch's default
            are; as they are without. See `in_precision`.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: Parameters = field(default_factory=Parameters)
    drawn: dict[str, tuple[int, int]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()
    precision: torch.dtype | None = None
    given: tuple[Any, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.given = self.args, self.kwargs
        # Arrays and columns of numbers become tensors; other arguments are unchanged.
        given = tree_map(as_tensor, (self.args, self.kwargs))
        self.args, self.kwargs = tree_map(lambda t: precision.cast(t, self.precision), given)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the values that the model works with."""
        if self.precision is not None:
            return self.precision
        double = torch.float64 in precision.precisions((self.args, self.kwargs))
        return torch.float64 if double else torch.get_default_dtype()

    def in_precision(
        self, dtype: torch.dtype, scored: Callable[[Runner], object] | None = None
    ) -> Runner:
        """The model in one precision: its arguments are cast, and new tensors have it.

        Numbers of Python become numbers of that precision, data and latents too. A model that
        holds tensors of another one, such as a network, may not run that way: it is left as
        it is. Parameters keep the precision that the model makes them in; it sees them cast.

        Args:
            dtype: The precision.
            scored: Runs a model and scores it, to see that it runs; on all its arguments without.
        """
        scored = scored or Runner.run_and_score
        new = replace(self, parameters=Parameters(), precision=dtype)
        if not precision.succeeds(partial(scored, new)):
            return self
        if (made := new.parameters.leaves) and torch.get_default_dtype() != dtype:
            own = replace(self, parameters=Parameters())
            precision.succeeds(partial(scored, own))
            for name, like in own.parameters.leaves.items():
                if name in made and made[name].dtype != like.dtype:
                    made[name] = nn.Parameter(made[name].detach().to(like.dtype))
        return new

    def run_and_score(self) -> None:
        """Run the model from its prior and score it."""
        with (
            isolated_rng(0),
            isolated_param_store(),
            torch.no_grad(),
            self.running(),
            without_validation(),
        ):
            self.prior(validate=False)[0].compute_log_prob()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, new tensors and draws have the precision of the model."""
        if self.precision is None:
            yield
            return
        # Outside of the trace, which keeps a value as those before it leave it.
        with precision.default_dtype(self.precision), precision.CastLatents(self.precision):
            yield

    def input_handler(self, rows: Mapping[str, Tensor] | None = None) -> ServeInputs:
        """Serves the model's parameters, and rows of plates that draw theirs."""
        return ServeInputs(self.parameters, rows, self.precision)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the model by name, with defaults; empty if its signature is unknown."""
        return self._named(self.args, self.kwargs)

    def leaves(self) -> dict[str, Tensor]:
        """Tensors among the arguments, such as ``x``, or ``data.x`` of a dictionary of them."""
        flat, _ = tree_flatten_with_path(self.arguments())
        return {path_name(path): leaf for path, leaf in flat if isinstance(leaf, Tensor)}

    def with_leaves(self, values: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with other tensors in the place of some of them."""
        if not values:
            return self.args, self.kwargs
        flat, spec = tree_flatten_with_path(self.arguments())
        new = [values.get(path_name(path), leaf) for path, leaf in flat]
        bound = signature_of(self.model).bind(*self.args, **self.kwargs)
        bound.arguments.update(tree_unflatten(new, spec))
        return bound.args, bound.kwargs

    def given_by_name(self) -> dict[str, Any]:
        """The same before arrays and columns become tensors."""
        return self._named(*self.given)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = signature_of(self.model).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return {}
        bound.apply_defaults()
        return dict(bound.arguments)

    def prior(self, validate: bool) -> tuple[poutine.Trace, dict[str, Tensor]]:
        """One run from the prior, and the data that it observed, as they were given."""
        owned, last = self.input_handler(), checks.LastSite()
        handlers = (
            last,
            StartImproperPriors(self.dtype),
            FixedSamplers(),
            owned,
            checks.CheckSites(),
            MarkEnumerated(),
        )
        with torch.no_grad(), self.running(), pyro.validation_enabled(validate):
            try:
                trace = run(self.model, self.args, self.kwargs, *handlers)
            except Exception as error:
                self._explain_error(error, last)
                last.add_note(error)
                raise
        self.drawn = owned.drawn
        return trace, owned.data

    def _explain_error(self, error: Exception, last: checks.LastSite) -> None:
        """Add a note to an error, if its cause can be seen in the arguments of the model."""
        if isinstance(error, ModelError):
            return
        several = self._devices(last.devices) if isinstance(error, RuntimeError) else ""
        cause = ""
        if isinstance(error, ValueError | IndexError):
            cause = data_checks.not_finite_in(self.arguments()).strip()
        args, kwargs = self.given
        named = self._named(args, kwargs) or {"args": args, **kwargs}
        odd = "" if several or cause else not_numbers(named, error)
        if isinstance(error, RuntimeError) and not (several or odd):
            several = self._precisions(error, last)
        if several or cause or odd:
            first = str(error).partition("\n")[0][:LONGEST]
            words = " ".join(filter(None, (several, cause, odd, first)))
            raise ModelError(f"The model fails. {words}") from error

    def _precisions(self, error: Exception, last: checks.LastSite) -> str:
        """Which tensors are of which types, in words; empty if the error is of another kind."""
        held = {
            f"argument '{name}'": leaf.dtype
            for name, value in self.arguments().items()
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        }
        held |= {f"parameter '{n}'": p.dtype for n, p in self.parameters.leaves.items()}
        words = precision.explain_mixed_precision(error, held | last.dtypes)
        where = f" behind site '{last.name}'" if words and last.name else ""
        return f"{words} It failed{where}:" if words else ""

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
                of the sites in `replaced` and of the arguments in `varying`.
            enumerate_from: First axis for the values of discrete sites; None to draw them.
            places: Discrete sites that have one value, by its place among all.
        """
        rest = inputs[len(self.parameters.leaves) :]
        rows, data = rest[: len(self.drawn)], rest[len(self.drawn) :]
        owned = self.input_handler(dict(zip(self.drawn, rows, strict=True)))
        model = FixDiscrete(places or {})(MarkEnumerated()(self.model))
        data, arguments = data[: len(self.replaced)], data[len(self.replaced) :]
        args, kwargs = self.args, self.kwargs
        if data:
            args, kwargs = self.with_leaves(dict(zip(self.varying, arguments, strict=True)))
            model = poutine.condition(model, dict(zip(self.replaced, data, strict=True)))
        if enumerate_from is not None:
            model = poutine.enum(model, first_available_dim=enumerate_from)
        with without_validation(), self.running():
            trace = run(model, args, kwargs, handler, owned)
            trace.compute_log_prob()
        return trace, owned.data


def path_name(path: Sequence[Any]) -> str:
    """Name of a tensor among the arguments: ``x``, or ``data.x`` of a dictionary of them."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
