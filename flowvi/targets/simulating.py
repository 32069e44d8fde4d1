"""Draws from the model of a target: from its prior, given latents, and with other arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.targets.schema import Functions, ModelError
from flowvi.targets.target import Target


class SimulatingTarget(Target):
    """A target whose model draws what it describes. Abstract."""

    _functions: Functions

    def prior(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """Draw all sites from the prior: name -> (n, *shape).

        Raises:
            ModelError: The model has no proper prior to draw from.
        """
        if self._functions.simulate is None:
            raise ModelError(f"{self.name} is a plain density; it has no prior to draw from.")
        if self.improper:
            raise ModelError(f"The prior of '{self.improper[0]}' is improper: it has no draws.")
        return as_observed(self._functions.simulate(None, n, seed), self.observed)

    def prior_of_latents(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """Draw the latent sites from the prior, without data: name -> (n, *shape).

        Raises:
            ModelError: The model has no proper prior to draw from.
        """
        if self._functions.simulate is None or self.improper:
            return self.prior(n, seed)
        return self._functions.simulate(None, n, seed, latents_only=True)

    def predictive(self, values: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Simulate the observed sites given latent values. (n, *shape) each -> (n, *shape)."""
        if self._functions.simulate is None:
            raise ModelError(f"{self.name} is a plain density; it cannot simulate data.")
        given = {name: np.asarray(values[name]) for name in self.sites}
        count = len(next(iter(given.values())))
        return as_observed(self._functions.simulate(given, count, seed), self.observed)

    def rerun(
        self,
        values: Mapping[str, np.ndarray],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int,
        new: Collection[str] = (),
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run the model on other arguments, given latent values, (n, *shape) each.

        Args:
            values: Of the latent sites.
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.
            seed: Of whatever is drawn.
            new: Latent sites that are drawn anew, given the others.

        Returns:
            Draws of all other sites, (n, *shape) each, observed ones included; and the pointwise
            log likelihood of the data that these arguments bring, (n, *rows) each.

        Raises:
            ModelError: A latent has another shape with these arguments.
        """
        if self._functions.rerun is None:
            raise ModelError(f"{self.name} is a plain density; it has no arguments to change.")
        given = {name: np.asarray(values[name]) for name in self.sites}
        drawn, scores = self._functions.rerun(given, args, kwargs, seed, new)
        return as_observed(drawn, self.observed), scores

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments with which the latents of the model have other shapes.

        Raises:
            ModelError: Names the site, its plate and the sizes.
        """
        if self._functions.messages_with is None:
            return
        for name, node in self._functions.messages_with(args, kwargs).items():
            shape, came = tuple(self.messages[name]["value"].shape), tuple(node["value"].shape)
            if came != shape:
                plates = [frame.name for frame in node["cond_indep_stack"] if frame.vectorized]
                where = f" in plate '{plates[-1]}'" if plates else ""
                raise ModelError(
                    f"Site '{name}'{where} has shape {shape} in the fit and {came} with these "
                    "arguments: the guide is one of the rows that were fitted. Call it with those, "
                    "fit again, or fit with local= for a guide that reads its rows."
                )


def as_observed(
    simulated: Mapping[str, np.ndarray], observed: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """Simulated values in the type of the observed ones, where these are counts or categories.

    Pyro's distributions of counts return floating-point numbers.

    Args:
        simulated: Values by site.
        observed: Observed values by site.
    """

    def converted(name: str, value: np.ndarray) -> np.ndarray:
        like = observed.get(name)
        if like is None or like.is_floating_point() or like.is_complex():
            return value
        whole = np.isfinite(value).all() and (value == np.floor(value)).all()
        return value.astype(torch_to_numpy(like.dtype)) if whole else value

    return {name: converted(name, value) for name, value in simulated.items()}


def torch_to_numpy(dtype: torch.dtype) -> np.dtype[Any]:
    """The type of NumPy's arrays for a type of tensors."""
    return torch.empty(0, dtype=dtype).numpy().dtype
