"""The table of draws: all that is known of a fit once the guide has been called."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flowvi import diagnostics, memory, outside
from flowvi.arguments import given, shared_alone, unknown, wanted, whole
from flowvi.columns import Columns
from flowvi.diagnostics import Bounds, Check, Diagnosis, Where
from flowvi.guides import Guide
from flowvi.randomness import own_randomness
from flowvi.target import Target

DRAWING = 0
EXPECTED = "the draws of a fit, such as fit.draw(4000)"
# Columns of the table beside those of the values, which have names.
POINT, LOG_P, LOG_Q = range(3)
# Number n -> draws (n, D) and their log density (n).
Sample = Callable[[int], tuple[Tensor, Tensor]]


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
    weighted: "Draws | None" = None

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

    def thinned(self, n: int) -> "Draws":
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


def draw(
    target: Target,
    guides: Sequence[Guide],
    n: int,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
) -> Draws:
    """Draw from each guide and evaluate the target there, within `memory.limit()`.

    The caller's random number generators are left as they were.

    Args:
        target: What the guides approximate.
        guides: Independent fits, one for each chain.
        n: Draws from each guide.
        seed: Seed of the draws.
        meta: JSON-able facts about the fit, kept with the draws.
    """
    n = whole("n", n)
    with torch.no_grad(), own_randomness(stream(seed, DRAWING)):
        return tabulate(target, n, [in_pieces(sampler(guide), n) for guide in guides], meta)


def tabulate(
    target: Target,
    n: int,
    chains: Sequence[Iterable[tuple[Tensor, Tensor]]],
    meta: dict[str, Any] | None = None,
    stats: dict[str, np.ndarray] | None = None,
) -> Draws:
    """Evaluate the target at draws and put all into one table.

    Args:
        target: The log density.
        n: Draws of each chain.
        chains: For each chain, pieces z (k, D) and log q (k) of so many draws.
        meta: JSON-able facts about the draws.
        stats: Facts about each draw, (chain, draw).
    """
    columns: Columns[int | str] = Columns(n * len(chains))
    for pieces in chains:
        for piece in pieces:
            for some in zip(*(t.split(target.chunk()) for t in piece), strict=True):
                columns.add(_piece(target, *some))
    table = {
        name: column.reshape(len(chains), n, *column.shape[1:])
        for name, column in columns.arrays.items()
    }
    z, log_p, log_q = (table.pop(number) for number in (POINT, LOG_P, LOG_Q))
    values = {str(name): column for name, column in table.items()}
    log_p, log_q = log_p.astype(np.float64), log_q.astype(np.float64)
    # A draw that cannot be scored has weight zero.
    log_p[~(np.isfinite(log_p) & np.isfinite(log_q))] = -np.inf
    log_q[~np.isfinite(log_q)] = 0.0
    return Draws(z, log_p, log_q, values, target, dict(meta or {}), dict(stats or {}))


def stream(seed: int, *purpose: int) -> int:
    """The seed of one purpose: independent of those of other purposes and other seeds.

    Args:
        seed: What the user gave.
        *purpose: Whole numbers that name the purpose.
    """
    source = np.random.SeedSequence(whole("seed", seed, 0), spawn_key=purpose)
    return int(source.generate_state(1, np.uint64)[0] >> np.uint64(1))


def resample(draws: Draws, seed: int = 0, n: int | None = None) -> Draws:
    """Resample by Pareto-smoothed importance weights: draws of p, if k-hat allows.

    Stratified, with replacement. All chains are pooled into one, because
    their weights are on one scale: a guide that found little of the posterior
    contributes little. The diagnosis of the original draws stays with the
    result, and `diagnose` returns it.

    Args:
        draws: Draws of a fit, not resampled yet.
        seed: Seed of the resampling.
        n: Draws wanted; as many as there are without it.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    shared_alone("resample", draws)
    wanted("draws", draws, Draws, EXPECTED)
    given(whole, "n", n)
    diagnosis = diagnose(draws)
    if diagnosis.khat >= diagnosis.khat_threshold and diagnosis.verdict != diagnostics.VERDICTS[1]:
        warnings.warn(
            f"Pareto k-hat {diagnosis.khat:.2f} is not below {diagnosis.khat_threshold:.2f}: the "
            "resampled draws are no better than the guide.",
            stacklevel=2,
        )
    weights = np.exp(diagnostics.psis(draws.log_weights.ravel()).log_weights)
    rows = stratified(weights, n or len(draws), np.random.default_rng(seed))

    def pick(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, *array.shape[2:])[rows][None]

    return Draws(
        pick(draws.z),
        pick(draws.log_p),
        pick(draws.log_q),
        {name: pick(value) for name, value in draws.values.items()},
        draws.target,
        {**draws.meta, "resampled": True, "diagnosis": asdict(diagnosis)},
    )


def diagnose(draws: Draws | ArrayLike) -> Diagnosis:
    """Say whether draws can be trusted.

    Args:
        draws: Draws of a fit, or log weights as an array, (draw) or (chain,
            draw). For resampled draws, the diagnosis of the original ones.
    """
    shared_alone("diagnose", draws)
    if not isinstance(draws, Draws):
        return diagnostics.diagnose(_weights(draws))
    if draws.resampled:
        facts = draws.meta["diagnosis"]
        pairs = tuple(tuple(row) for row in facts.get("distances", ()))
        return Diagnosis(**{**facts, "reasons": tuple(facts["reasons"]), "distances": pairs})
    if draws.mcmc:
        return _of_chains(draws)
    diagnosis = diagnostics.diagnose(
        draws.log_weights,
        named_values(draws),
        draws.target.improper,
        draws.title,
        draws.meta.get("missed", ()),
        axes_of(draws),
        checked(draws.meta),
        draws.meta.get("failures", ()),
        _outside(draws),
    )
    diagnosis = replace(diagnosis, reasons=(*diagnosis.reasons, *draws.meta.get("reasons", ())))
    if len(draws.z) == 1:
        return diagnosis
    found = diagnostics.distances(draws.z)
    apart = tuple(finding.reason for finding in diagnostics.apart(found))
    matrix = tuple(tuple(row) for row in found.matrix.round(6).tolist())
    return replace(diagnosis, reasons=(*diagnosis.reasons, *apart), distances=matrix)


def checked(meta: Mapping[str, Any]) -> Check | None:
    """What the check of a fit found, from the facts that it left."""
    return Check(**meta["check"]) if meta.get("check") else None


def _outside(draws: Draws) -> str:
    """Why draws have no positive density; empty where all have, or their model is gone."""
    inside = np.isfinite(draws.log_p)
    if inside.all() or not inside.any() or not isinstance(draws.target, Target):
        return ""
    pieces = (draws.z[~inside][: outside.TRIED], draws.z[inside][:1])
    z, good = (torch.as_tensor(x, device=draws.target.device) for x in pieces)
    return outside.explained(draws.target, z, good)


def where(draws: Draws) -> Where:
    """Say where in the space of parameters the heaviest weights are.

    Args:
        draws: Draws of a fit, not resampled.
    """
    shared_alone("where", draws)
    wanted("draws", draws, Draws, EXPECTED)
    return diagnostics.where(draws.log_weights, named_values(draws), axes_of(draws))


def named_values(draws: Draws) -> dict[str, np.ndarray]:
    """All values and, beside them, the unconstrained coordinates of each site."""
    return {**draws.values, **_coordinates(draws)}


def axes_of(draws: Draws) -> dict[str, list[Sequence[Any] | None]]:
    """The labels of every axis of these, as the user gave them; None without."""
    dims, coords = draws.target.dims, draws.target.coords
    axes: dict[str, list[Sequence[Any] | None]] = {
        name: [coords.get(dim) for dim in own] for name, own in dims.items()
    }
    # Of a vector in R^n, coordinates are elements.
    flat = {f"unconstrained {name}": labels for name, labels in axes.items() if len(labels) == 1}
    return axes | flat


def bounds(draws: Draws | ArrayLike, particles: Sequence[int] = (1, 10, 100, 1000)) -> Bounds:
    """Importance-weighted bounds on the log evidence, with standard errors.

    Args:
        draws: Draws of a fit, or log weights as an array.
        particles: Numbers of particles K. Where there are fewer draws than K
            the bound is NaN.
    """
    shared_alone("bounds", draws)
    if isinstance(draws, Draws):
        check_proper(draws.target.improper)
        draws = draws.weighted or draws
    particles = particles if isinstance(particles, Iterable) else [particles]
    log_weights = draws.log_weights if isinstance(draws, Draws) else _weights(draws)
    return diagnostics.iw_bounds(diagnostics.as_chains(log_weights).ravel(), particles)


def _weights(given: ArrayLike) -> np.ndarray:
    """Log weights, as an array."""
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"draws must be {EXPECTED}, or an array of log weights; got a {type(given).__name__}."
        ) from None


def check_proper(improper: Sequence[str]) -> None:
    """Refuse to speak of the evidence where a prior is improper."""
    if improper:
        names = ", ".join(f"'{name}'" for name in improper)
        raise ValueError(
            f"The prior of {names} is improper, so there is no evidence to bound. Compare guides "
            "by diagnose(draws).elbo, or give a proper prior."
        )


def _of_chains(draws: Draws) -> Diagnosis:
    """The verdict on MCMC draws, by every coordinate, the log density and all deterministics."""
    named = {name: draws[name] for name in draws.target.deterministics}
    diagnosis = diagnostics.diagnose_chains(
        {**_coordinates(draws), "log p": draws.log_p, **named},
        draws.stats["diverging"],
        draws.title,
        draws.meta.get("missed", ()),
        axes_of(draws),
    )
    check = checked(draws.meta)
    if check is not None and len(draws) < check.draws:
        diagnosis = _of_all(diagnosis, check, len(draws.z), draws.meta.get("missed", ()))
    if draws.weighted is None:
        return diagnosis
    trusted = diagnosis.verdict == diagnostics.VERDICTS[0]
    weights = draws.weighted.log_weights
    found = diagnostics.evidence(weights, draws.log_p - draws.log_q, trusted=trusted)
    proper = not draws.target.improper
    return replace(
        diagnosis,
        khat=found.khat,
        khat_threshold=found.khat_threshold,
        elbo=found.bounds[0].bound,
        elbo_se=found.bounds[0].se,
        gap=found.log_evidence - found.bounds[0].bound,
        gap_se=found.log_evidence_se,
        log_evidence=found.log_evidence if proper else math.nan,
        log_evidence_se=found.log_evidence_se if proper else math.nan,
    )


def _of_all(diagnosis: Diagnosis, check: Check, chains: int, missed: Sequence[str]) -> Diagnosis:
    """The verdict on some draws of chains that have been judged as a whole."""
    reason = (
        f"These are {diagnosis.draws} of {check.draws} draws of Markov chains, which were judged "
        f"as a whole: {check.verdict}. Draw more for all of them: "
        f"fit.draw({check.draws // chains})."
    )
    verdict = diagnostics.VERDICTS[-1] if missed else check.verdict
    return replace(diagnosis, verdict=verdict, reasons=(*missed, reason))


def _coordinates(draws: Draws) -> dict[str, np.ndarray]:
    """The unconstrained coordinates of each site; those of heavy-tailed values have moments."""
    columns = {name: draws.z[..., part] for name, part in draws.target.slices.items()}
    return {
        f"unconstrained {name}": z[..., 0] if z.shape[-1] == 1 else z for name, z in columns.items()
    }


def sampler(guide: Guide) -> Sample:
    """A guide as a function of the number of draws."""
    return lambda n: guide.sample((n,))


def piece(sample: Sample) -> int:
    """How many draws to make at a time: as many whatever `max_memory` is, on which no draw depends.

    Args:
        sample: What draws them, as `sampler` makes it.
    """
    with torch.no_grad(), own_randomness():
        return memory.cost(sample).fits(memory.PIECE)


def in_pieces(sample: Sample, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws z (k, D) and their log density (k), n in all, each piece made when it is asked for."""
    size = piece(sample)
    for start in range(0, n, size):
        yield sample(min(size, n - start))


def _piece(target: Target, z: Tensor, log_q: Tensor) -> dict[int | str, Tensor]:
    """A piece of the table: points, both densities, and the values there."""
    found: dict[int | str, Tensor] = {POINT: z, LOG_P: target.log_prob(z), LOG_Q: log_q}
    found.update(target.constrain(z))
    return found


def stratified(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices drawn in proportion to the weights, one from each n-th of their sum, shuffled."""
    heights = np.cumsum(weights)
    points = (np.arange(n) + rng.random(n)) / n
    # Below the top even after rounding; then no weight of zero is ever hit.
    points = np.minimum(points, np.nextafter(1.0, 0.0)) * heights[-1]
    return rng.permutation(np.searchsorted(heights, points, side="right"))
