"""The start of a density of very many rows: a search on some of them, and its end on all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.diagnostics import Diagnosis, diagnose
from flowvi.initialization.candidates import LARGE, TRY_ROUNDS, Log, best_gaussian, refine_fully
from flowvi.initialization.gaussian import GaussianApproximation, diagonal_of, evaluate
from flowvi.initialization.modes import FIRST, MOST, further_modes
from flowvi.initialization.newton_mode import newton_mode
from flowvi.initialization.preflight import preflight
from flowvi.runtime.clock import Clock
from flowvi.samplers.tempering import MOST_DIM, mass_beyond_guide, wide_gaussian
from flowvi.targets import ModelError, Target
from flowvi.targets.global_target import GlobalTarget
from flowvi.training.records import ANNEAL, BUILD, CHECK, LOOK, MODES, WIDE

# Rows on which a search begins, at least and for each coordinate; with a finding that these rows
# cannot explain, so many times more, up to a share of all.
FEWEST, FOR_EACH, MORE, LARGEST = 1000, 10, 8, 0.25
# Rows of the second sample, in units of the first: modes that are one there are so on all rows.
SECOND = 32
# Widths of the first sample's normal from which other ascents on the second sample begin.
WIDTHS = 3.0
# Draws by which the normal of a sample is judged; the largest k-hat with which its evidence is
# known, and a gap with which it is known whatever k-hat is.
JUDGED, LIGHT, SMALL = 1000, 0.7, 0.05
# Gap expected of Laplace's approximation on all rows, above which it is refined there; and the
# draws by which it is then compared.
WORTH_REFINING, COMPARED = 1e-3, 200


class Sampled(NamedTuple):
    """What the search on some rows found.

    Attributes:
        best: The best normal.
        modes: Normals at other modes.
        places: Draws from the prior, or random places, (P, D).
    """

    best: GaussianApproximation
    modes: list[GaussianApproximation]
    places: Tensor


def start_from_rows(
    target: Target, seed: Callable[[int], int], clock: Clock, say: Log, diagonal: bool, share: float
) -> list[GaussianApproximation] | None:
    """Find the best normal and other modes; None where some rows do not show what all rows do.

    The whole search for a start, that for modes, and annealing run on a few rows, where an
    evaluation is cheap. Ascents from far outside of the normal and the symmetries of the density
    are tried on more rows, which may tell modes apart that are one with fewer. Newton steps on all
    rows end it. Findings that a sample cannot explain, such as mass that no mode of it holds, are
    looked into on a larger one.

    Args:
        target: The log density.
        seed: Purpose -> seed.
        clock: Clock of the fit.
        say: Function that takes a line of the log.
        diagonal: Whether the guide has a diagonal covariance.
        share: Share of a time budget for the search.
    """
    rows = target.sum_of_rows
    if rows is None or not isinstance(target, GlobalTarget) or target.dim > min(LARGE, MOST_DIM):
        return None
    search = _RowSearch(target, rows.count, seed, clock, say, share)
    for n in sample_sizes(target.dim, rows.count):
        if clock.out_of_time(share):
            return None
        try:
            sampled = search.on_sample(n)
            found = None if sampled is None else search.on_all(sampled, n)
        except (ModelError, ValueError, RuntimeError) as error:
            # What fails on some rows need not fail on all of them.
            say(f"the search on {n} rows failed, {error}")
            continue
        if found is not None:
            return (
                [replace(g, scale_tril=diagonal_of(g).scale_tril) for g in found]
                if diagonal
                else found
            )
    say("some rows are not enough to find a start: the search takes all of them")
    return None


class _RowSearch:
    """The steps of `start_from_rows`, with its arguments."""

    def __init__(
        self,
        target: GlobalTarget,
        count: int,
        seed: Callable[[int], int],
        clock: Clock,
        say: Log,
        share: float,
    ) -> None:
        self.target, self.seed, self.say = target, seed, say
        self.rows: int = count
        self.late = lambda: clock.out_of_time(share)
        self.later = lambda: clock.out_of_time(2 * share)

    def on_sample(self, n: int) -> Sampled | None:
        """The search on n rows; None if these leave something open."""
        self.say(f"start: a search on {n} of {self.rows} rows")
        sample = self.target.some_rows(n, self.seed(LOOK))
        seen = preflight(sample, self.seed(LOOK))
        self.say(str(seen))
        best, others, ends = best_gaussian(
            sample, self.seed(BUILD), False, self.say, self.late, seen.median, seen.places
        )
        modes = further_modes(
            sample, best, ends, seen.places, self.seed(MODES), self.say, self.later
        )
        found = self._judged(sample, best)
        words = "" if modes else self._beyond(sample, found, [best, *others])
        sure = found.gap < SMALL or (found.khat < LIGHT and math.isfinite(found.gap))
        if not modes and not sure:
            words = f"k-hat {found.khat:.2f} of the normal of {n} rows"
        if words:
            self.say(words)
            return None
        return Sampled(best, modes, seen.places)

    def _judged(self, sample: Target, g: GaussianApproximation) -> Diagnosis:
        """The diagnosis of a normal by its weights."""
        eps = self._noise(JUDGED, CHECK)
        log_q = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1) - g.log_det
        log_p = evaluate(sample, g.at(eps)).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        return diagnose((log_p - log_q).cpu().double().numpy())

    def _beyond(
        self, sample: Target, found: Diagnosis, normals: list[GaussianApproximation]
    ) -> str:
        if self.later():
            return ""
        try:
            wide = wide_gaussian(sample, normals, self.seed(WIDE))
            return mass_beyond_guide(sample, found, wide, self.seed(ANNEAL))
        except (ValueError, RuntimeError) as error:
            self.say(f"annealing from a wide start failed, {error}")
            return ""

    def on_all(self, sampled: Sampled, n: int) -> list[GaussianApproximation] | None:
        """The normals of a sample, brought to all rows; None if one of the steps fails."""
        more = second_size(n, self.rows)
        second = self.target.some_rows(more, self.seed(MODES))
        home = newton_mode(second, with_more_rows(sampled.best, n, more), "mode of more rows")
        if home is None:
            self.say(f"Newton's steps on {more} rows do not converge")
            return None
        around = wide_draws(sampled.best, FIRST, self.seed(MODES))
        places = torch.cat([around, sampled.places[:MOST]])
        ends = torch.stack([home.loc, *(g.loc for g in sampled.modes)])
        modes = further_modes(second, home, ends, places, self.seed(MODES), self.say, self.later)
        best = newton_mode(
            self.target, with_more_rows(home, more, self.rows), "Laplace, of all rows"
        )
        if best is None:
            self.say("Newton's steps on all rows do not converge")
            return None
        self.say(f"start: Newton's steps on all rows; Laplace's log evidence {best.elbo:.3f}")
        # The gap falls with the rows.
        if not self._judged(second, home).gap * more / self.rows < WORTH_REFINING:
            generator = torch.Generator(self.target.device).manual_seed(self.seed(BUILD))
            judge = self._noise(COMPARED, CHECK)
            best = refine_fully(self.target, best, generator, judge, self.late, TRY_ROUNDS)
        return [replace(best, searched=True), *self._other_modes(best, modes, more)]

    def _other_modes(
        self, best: GaussianApproximation, modes: list[GaussianApproximation], n: int
    ) -> list[GaussianApproximation]:
        """Other modes of a sample of n rows as modes of all rows, with their masses."""
        moved = [newton_mode(self.target, with_more_rows(g, n, self.rows), g.name) for g in modes]
        ends = [g.loc for g in moved if g is not None]
        if not ends:
            return []
        nowhere = best.loc.new_zeros(0, len(best.loc))
        return further_modes(
            self.target, best, torch.stack(ends), nowhere, self.seed(MODES), self.say, self.later
        )

    def _noise(self, n: int, purpose: int) -> Tensor:
        generator = torch.Generator(self.target.device).manual_seed(self.seed(purpose))
        dtype, device = self.target.dtype, self.target.device
        return torch.randn(n, self.target.dim, generator=generator, dtype=dtype, device=device)


def sample_sizes(dim: int, rows: int) -> list[int]:
    """Numbers of rows to search on, one after the other."""
    sizes = [max(FEWEST, FOR_EACH * dim)]
    most = int(LARGEST * rows)
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] * MORE, most))
    return [n for n in sizes if n <= most]


def second_size(first: int, rows: int) -> int:
    """Number of rows of the second sample."""
    return min(SECOND * first, int(LARGEST * rows))


def with_more_rows(g: GaussianApproximation, before: int, after: int) -> GaussianApproximation:
    """A normal of the width that more rows leave, around the same place."""
    return replace(g, scale_tril=g.scale_tril * math.sqrt(before / after))


def wide_draws(g: GaussianApproximation, n: int, seed: int) -> Tensor:
    """Places around a normal, far outside of its middle, (n, D)."""
    generator = torch.Generator(device=g.loc.device).manual_seed(seed)
    shape = (n, len(g.loc))
    eps = torch.randn(shape, generator=generator, dtype=g.loc.dtype, device=g.loc.device)
    return g.at(WIDTHS * eps)
