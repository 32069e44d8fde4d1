"""The table of draws: all that is known of a fit once the guide has been called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flowvi.diagnostics import Check, psis
from flowvi.guides.guide import Guide
from flowvi.runtime.arguments import unknown
from flowvi.targets import Batch, LocalTarget, Target

EXPECTED = "the draws of a fit, such as fit.draw(4000)"


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of one or several guides, independent, the chain axis is the guides; or of MCMC.

    Attributes:
        z: Unconstrained draws, (chain, draw, D).
        log_p: Log density of the target at z, Jacobian included; -inf where
            it is zero or not a number. (chain, draw).
        log_q: Log density of the guide at z, (chain, draw).
        values: Latents, then deterministics, named and constrained as in the
            model, each (chain, draw, *shape).
        target: Where names, dims and data come from.
        meta: JSON-able facts about the fit.
        stats: Facts about each draw of MCMC, (chain, draw), by ArviZ's names.
        weighted: For draws of MCMC that a fit ended in, those of its guide, with their weights.
    """

    z: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    values: dict[str, np.ndarray]
    target: Target
    meta: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    weighted: Draws | None = None

    @property
    def log_weights(self) -> np.ndarray:
        """Log p - log q, (chain, draw). Resampled draws and those of MCMC have none."""
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
    def resampled(self) -> bool:
        """Whether `resample` made these draws."""
        return bool(self.meta.get("resampled", False))

    @property
    def mcmc(self) -> bool:
        """Whether `neutra` made these draws."""
        return "mcmc" in self.meta

    @property
    def title(self) -> str:
        """What was fitted, in one line."""
        if self.mcmc:
            where = f"NUTS in the space of the {self.meta.get('guide', '')} guide"
            return f"{self.target.name}: {' '.join(where.split())}"
        words = {"guide": "{} guide", "objective": "{}", "steps": "{} steps"}
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
        )

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(unknown("value", name, self.values))
        return self.values[name]

    def __len__(self) -> int:
        return self.log_p.size

    def __str__(self) -> str:
        chains, draws, dim = self.z.shape
        kind = "resampled draws" if self.resampled else "MCMC draws" if self.mcmc else "draws"
        lines = [self.title, f"  {chains} x {draws} {kind} in {dim} dimensions"]
        for name, value in self.values.items():
            row = f"  {name:<16} {value.shape[2:]!s:<10}"
            if value.ndim == 2:
                row += f" mean {value.mean():.4g}, sd {value.std():.4g}"
            lines.append(row.rstrip())
        return "\n".join(lines)


def checked(meta: Mapping[str, Any]) -> Check | None:
    """What the check of a fit found, from the facts that it left."""
    return Check(**meta["check"]) if meta.get("check") else None


@dataclass(frozen=True, eq=False)
class RowDraws:
    """Draws of the latents of some rows.

    Attributes:
        z: Unconstrained draws, (1, draw, row, D).
        log_p: Log density of rows and latents, (1, draw, row).
        log_q: Log density of the guide, (1, draw, row).
        values: Latents and deterministics as in the model, each (1, draw, row, *shape).
        batch: The rows.
        target: Where names and dims come from.
        meta: JSON-able facts about the fit.
        guide: What drew them.
    """

    z: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    values: dict[str, np.ndarray]
    batch: Batch
    target: LocalTarget
    meta: dict[str, Any] = field(default_factory=dict)
    guide: Guide | None = None

    FOR_ROWS = (
        "draws.khat says which rows to trust, flowvi.to_inference_data(draws) brings them to "
        "ArviZ, and fit.iw_bound() has the evidence of each row"
    )

    @property
    def log_weights(self) -> np.ndarray:
        """Log p - log q, (1, draw, row)."""
        return self.log_p - self.log_q

    @property
    def khat(self) -> np.ndarray:
        """Pareto shape of the weights of each row, (row)."""
        weights = self.log_weights.reshape(-1, self.log_weights.shape[-1])
        return np.array([psis(weights[:, n]).khat for n in range(weights.shape[1])])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(unknown("value", name, self.values))
        return self.values[name]

    def __str__(self) -> str:
        _, draws, rows, dim = self.z.shape
        return f"{self.target.name}: {draws} draws for each of {rows} rows in {dim} dimensions"
