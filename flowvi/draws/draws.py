"""The table of draws, which all later analyses read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flowvi.compat.arviz_stats import HDI_PROBABILITY
from flowvi.diagnostics import Check, Diagnosis, psis_of_rows
from flowvi.guides.guide import Guide
from flowvi.runtime.arguments import check_choice, unknown_choice
from flowvi.runtime.display import Displayed, later
from flowvi.targets import NOWHERE, Batch, LocalTarget, Target

if TYPE_CHECKING:
    import pandas as pd

    from flowvi.draws.structured import Units

EXPECTED = "the draws of a fit, such as fit.draw(4000)"


@dataclass(frozen=True, eq=False, repr=False)
class Draws(Displayed):
    """Draws of one or several guides, or of Markov chains. Each guide is one chain.

    For latents of rows, a row axis follows the draw axis, and each row has weights of
    its own.

    Attributes:
        z: Unconstrained draws, (chain, draw, [row,] D).
        log_p: Log density of the target at z, Jacobian included; -inf where
            it is zero or not a number. (chain, draw[, row]).
        log_q: Log density of the guide at z, (chain, draw[, row]).
        values: Constrained latents, then deterministics, by their names in the model,
            each (chain, draw, [row,] *shape).
        target: The target, with names, dims and data.
        meta: JSON-able facts about the fit.
        stats: Statistics of each MCMC draw, (chain, draw), by ArviZ's names.
        weighted: For MCMC draws at the end of a fit, the weighted draws of its guide.
        batch: The rows; None without a row axis.
        guide: The guide that drew them; None for several guides and for Markov chains.
        diagnosis: For resampled draws, the verdict on the original ones.
        unit_scores: Log likelihood of each unit with its own latents integrated, given the
            shared ones, (chain, draw, unit). None without units, or where they are too many.
        units: How well the conditional of each unit fits.
    """

    z: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    values: dict[str, np.ndarray]
    target: Target | LocalTarget
    meta: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    weighted: Draws | None = None
    batch: Batch | None = None
    guide: Guide | None = None
    diagnosis: Diagnosis | None = None
    unit_scores: np.ndarray | None = None
    units: Units | None = None

    @property
    def log_weights(self) -> np.ndarray:
        """Log p - log q, (chain, draw[, row]). Resampled and MCMC draws have no weights."""
        if self.mcmc:
            raise ValueError(
                "These draws are of Markov chains, not of the guide: they have no weights, and "
                "need none. Those of the guide are in draws.weighted; evidence(draws) uses both."
            )
        if self.resampled:
            raise ValueError(
                "These draws were resampled and weigh the same. diagnose(draws) tells what their "
                "weights were; the weights themselves are with the original draws."
            )
        return self.log_p - self.log_q

    @property
    def khat(self) -> np.ndarray:
        """Pareto shape of the weights, (), or of the weights of each row, (row)."""
        rows = self.log_p.shape[2:]
        return psis_of_rows(self.log_weights.reshape(len(self), -1).T).khat.reshape(rows)

    @property
    def by_row(self) -> bool:
        """Whether the draws have a row axis, with weights for each row."""
        return self.log_p.ndim > 2

    @property
    def labels(self) -> list[Any]:
        """Labels of the rows: their coordinates or indices; empty without a row axis."""
        if self.batch is None:
            return []
        places = self.batch.places.tolist()
        if NOWHERE in places:
            return [*range(len(places))]
        known = self.target.coords.get(self.plate)
        return places if known is None else [known[i] for i in places]

    @property
    def plate(self) -> str:
        """Name of the row axis."""
        return str(getattr(self.target, "plate", ""))

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """Names of the axes of each value after those of chains and draws."""
        rows = (self.plate,) if self.by_row else ()
        return {name: (*rows, *own) for name, own in self.target.dims.items()}

    @property
    def coords(self) -> dict[str, list[Any]]:
        """Labels along the axes in `dims`."""
        rows = {self.plate: self.labels} if self.batch is not None else {}
        return {**self.target.coords, **rows}

    @property
    def observed(self) -> dict[str, Tensor]:
        """Observed data of the model; with a row axis, of its rows."""
        if isinstance(self.target, LocalTarget):
            return self.target.observations(self.batch)
        return dict(self.target.observed)

    @property
    def improper(self) -> Sequence[str]:
        """Sites with an improper prior, for which there is no evidence."""
        return () if isinstance(self.target, LocalTarget) else self.target.improper

    @property
    def resampled(self) -> bool:
        """Whether these are resampled draws."""
        return bool(self.meta.get("resampled", False))

    @property
    def mcmc(self) -> bool:
        """Whether these are draws of Markov chains."""
        return "mcmc" in self.meta

    @property
    def title(self) -> str:
        """Description of the fit, in one line."""
        if self.mcmc:
            guide = self.meta.get("guide", "")
            return f"{self.target.name}: NUTS{f' in the space of the {guide} guide' * bool(guide)}"
        words = {
            "guide": "structured guide ({} of shared latents)"
            if "shared" in self.meta
            else "{} guide",
            "objective": "{}",
            "steps": "{} steps",
            "epochs": "{} epochs",
        }
        parts = [word.format(self.meta[key]) for key, word in words.items() if key in self.meta]
        return f"{self.target.name}: {', '.join(parts)}" if parts else self.target.name

    def thinned(self, n: int) -> Draws:
        """At most n draws of each chain, evenly spaced."""
        had = self.log_p.shape[1]
        if n >= had:
            return self
        rows = np.linspace(0, had - 1, n).astype(int)

        def pick(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: array[:, rows] for name, array in arrays.items()}

        return replace(
            self,
            z=self.z[:, rows],
            log_p=self.log_p[:, rows],
            log_q=self.log_q[:, rows],
            values=pick(self.values),
            stats=pick(self.stats),
            unit_scores=None if self.unit_scores is None else self.unit_scores[:, rows],
        )

    def summary(self, probability: float = HDI_PROBABILITY) -> pd.DataFrame:
        """Mean, sd, HDI, Monte Carlo errors and quantiles of every scalar, one line each.

        The draws are those that the verdict recommends: if it is "trust the resampled draws",
        these are resampled first. The column ``draws`` says which they are: plain, resampled,
        MCMC, or untrusted. ``ess`` is the effective number of draws of the mean: all of them, if
        they are independent; draws of Markov chains have ``r_hat`` too.

        Args:
            probability: Probability of the highest-density interval.
        """
        return later("flowvi.draws.scalars", "summarise")(self, probability)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each draw, and one column for each scalar, by its label.

        The columns ``chain`` and ``draw`` come first. Weighted draws have ``log_weight``.
        """
        return later("flowvi.draws.scalars", "data_frame")(self)

    def plot(self, names: Sequence[str] | None = None, kind: str = "marginals") -> np.ndarray:
        """Draw the marginals of scalars, or scalars in pairs.

        Args:
            names: What to show, as in `flowvi.plots.plot_pair`; the first scalars by default.
            kind: "marginals" or "pair".

        Returns:
            Axes of matplotlib.
        """
        check_choice("kind", kind, ["marginals", "pair"])
        shown: np.ndarray = later("flowvi.plots", f"plot_{kind}")(self, names)
        return shown

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(unknown_choice("value", name, self.values))
        return self.values[name]

    def __len__(self) -> int:
        """Number of draws; with a row axis, of each row."""
        return self.log_p.shape[0] * self.log_p.shape[1]

    def __str__(self) -> str:
        chains, draws, *rows, dim = self.z.shape
        kind = "resampled draws" if self.resampled else "MCMC draws" if self.mcmc else "draws"
        each = f" for each of {rows[0]} rows" if rows else ""
        lines = [self.title, f"  {chains} x {draws} {kind}{each} in {dim} dimensions"]
        for name, value in self.values.items():
            row = f"  {name:<16} {value.shape[2:]!s:<10}"
            if value.ndim == 2:
                row += f" mean {value.mean():.4g}, sd {value.std():.4g}"
            lines.append(row.rstrip())
        return "\n".join(lines)


def checked(meta: Mapping[str, Any]) -> Check | None:
    """The check of the fit, from its meta data."""
    return Check(**meta["check"]) if meta.get("check") else None


# The name that the table for rows had in earlier versions.
RowDraws = Draws


def weights_of(function: str, draws: Draws) -> np.ndarray:
    """The log weights of draws.

    Raises:
        ValueError: The draws have no weights; the message names the function that needs them.
    """
    if not draws.mcmc and not draws.resampled:
        return draws.log_weights
    came = "MCMC" if draws.mcmc else "resampled"
    way = "pass those of the fit, fit.draw(4000)"
    raise ValueError(
        f"{function} needs weights, and got {came} draws, which have no weights: "
        f"{'draws.weighted has those of the guide' if draws.weighted is not None else way}."
    )


def scored(log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both log densities in double precision; weight zero for draws with an undefined density."""
    log_p, log_q = log_p.astype(np.float64), log_q.astype(np.float64)
    log_p[~(np.isfinite(log_p) & np.isfinite(log_q))] = -np.inf
    log_q[~np.isfinite(log_q)] = 0.0
    return log_p, log_q
