"""Predictions of a model for new arguments, given draws of its posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowvi.draws.draws import EXPECTED, Draws
from flowvi.draws.row_sampling import pairs_of
from flowvi.runtime.arguments import check_choice, check_type, refuse_fit, unknown_choice
from flowvi.runtime.display import Printed
from flowvi.targets import LocalTarget

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Printed):
    """Predictions for new arguments, one value for each draw of the posterior.

    Attributes:
        values: Deterministic values, and draws of sites that were observed in the fit or are
            unobserved now, each (chain, draw, *shape).
        log_likelihood: Log likelihood of data in the new arguments, each (chain, draw, *rows).
    """

    values: Arrays
    log_likelihood: Arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._named(self.values, name)

    def mean(self, name: str) -> np.ndarray:
        """Mean over all draws, (*shape)."""
        found: np.ndarray = self[name].mean(axis=(0, 1))
        return found

    def quantiles(
        self, name: str, probabilities: Sequence[float] = (0.05, 0.5, 0.95)
    ) -> np.ndarray:
        """Quantiles over all draws, (probability, *shape)."""
        return np.quantile(self[name], probabilities, axis=(0, 1))

    def log_density(self, name: str) -> np.ndarray:
        r"""Log predictive density of each row of new data, (*rows).

        .. math:: \log \tfrac{1}{S} \sum_s p(y_n \mid \theta_s)
        """
        if not self.log_likelihood:
            raise ValueError(
                "The new arguments brought no data to score: pass them to predict, as in the fit."
            )
        scores = self._named(self.log_likelihood, name)
        chains, draws = scores.shape[:2]
        from scipy.special import logsumexp  # slow to import

        found: np.ndarray = logsumexp(scores, axis=(0, 1)) - np.log(chains * draws)
        return found

    def __str__(self) -> str:
        chains, draws = next(iter(self.values.values())).shape[:2]
        lines = [f"{chains} x {draws} predictions"]
        lines += [f"  {name:<16} {value.shape[2:]}" for name, value in self.values.items()]
        for name in self.log_likelihood:
            found = self.log_density(name)
            # The log density of masked rows is zero for every draw.
            found = found[(self.log_likelihood[name] != 0).any(axis=(0, 1))]
            if not found.size:
                continue
            lines.append(
                f"  {name}: log predictive density {found.sum():.2f} of {found.size} rows, "
                f"{found.mean():.3f} per row"
            )
        return "\n".join(lines)

    def _named(self, arrays: Arrays, name: str) -> np.ndarray:
        if name not in arrays:
            raise KeyError(unknown_choice("prediction", name, arrays))
        return arrays[name]


def predict(
    draws: Draws,
    *args: Any,
    seed: int = 0,
    new_units: str | Sequence[str] = (),
    **kwargs: Any,
) -> Prediction:
    """Run the model on new arguments, given draws of its posterior.

    Given the latents, new values are drawn for sites without data and for observed sites:
    predictions are new data. Data in the arguments are also scored under each draw. For a
    nested fit, the latents of rows are drawn as well. For draws with a row axis, the
    arguments hold other data of the same rows; without arguments the rows of the draws are
    used. All draws have equal weight: use `resample` first where the verdict recommends it.

    For groups, persons or other units that were not in the fit, name their plate, as in
    ``predict(draws, *arguments, new_units="group")``: the latents in the plate are then drawn
    from the model given all other latents, and may have another number of units.

    Args:
        draws: Draws of a fit to a target from `from_pyro`.
        *args: New arguments of the model, in place of the captured ones.
        seed: Seed of the drawn data.
        new_units: Plates, or latent sites, whose latents are drawn anew.
        **kwargs: New keyword arguments of the model.

    Raises:
        ModelError: A latent has another shape with these arguments, for example in a plate of
            other rows; or the target is a plain density.
        ValueError: No latent site is in a plate of this name, or has this name.
    """
    refuse_fit("predict", draws)
    check_type("draws", draws, Draws, EXPECTED)
    target, shape = draws.target, draws.log_p.shape
    if isinstance(target, LocalTarget):
        if new_units:
            raise ValueError(
                f"predict got new_units={new_units!r}, and draws of the latents of rows, which a "
                "fit has for other rows too: fit.draw(1000, data=rows), without new_units."
            )
        return _of_rows(draws, target, args, kwargs, seed)
    new = _sites_of(draws, new_units)
    flat = {name: draws[name].reshape(-1, *draws[name].shape[2:]) for name in target.sites}
    try:
        found = target.rerun(flat, args, kwargs, seed, new)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(
            f"predict runs the model on arguments in place of those of the fit, and {error}."
        ) from None
    values, scores = (
        {name: array.reshape(*shape, *array.shape[1:]) for name, array in arrays.items()}
        for arrays in found
    )
    return Prediction(values, scores)


def _sites_of(draws: Draws, names: str | Sequence[str]) -> list[str]:
    """The latent sites of these names, and those in plates of these names."""
    names = [names] if isinstance(names, str) else [*names]
    dims = {site: draws.target.dims.get(site, ()) for site in draws.target.sites}
    known = [*dict.fromkeys(dim for own in dims.values() for dim in own if dim), *dims]
    for name in names:
        check_choice("new_units", name, known)
    return [site for site, own in dims.items() if {site, *own} & {*names}]


def _of_rows(
    draws: Draws, target: LocalTarget, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> Prediction:
    """Draw data of rows given their latents, and score the data that were passed."""
    rows = draws.batch
    assert rows is not None
    if args or kwargs:
        came = target.as_batch(target.called(args, kwargs).data)
        if len(came.places) != len(rows.places):
            raise ValueError(
                f"predict got {len(came.places)} rows, and draws of the latents of "
                f"{len(rows.places)}: fit.draw(1000, data=rows) has those of other rows."
            )
        rows = came
    z = torch.as_tensor(draws.z, dtype=target.dtype, device=target.device)
    values = target.predictive(z, rows, seed=seed)
    names = [*target.observations(rows)]
    if len(names) != 1 or not target.has_parts:
        # The terms of several sites, or of summed ones, have no name.
        return Prediction(values, {})
    with torch.no_grad():
        scores = pairs_of(target, rows).each(
            lambda some, part: target.terms(some, part)[..., 0], z.flatten(0, 1), rows
        )
    return Prediction(values, {names[0]: scores.cpu().numpy().reshape(draws.log_p.shape)})
