"""Modes beside the one that a fit starts at: converged ones, each with its mass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowvi.diagnostics.importance import psis, smoothed_evidence
from flowvi.guides.guide import FULL_RANK_DIM
from flowvi.initialization.ascents import ascend, ascend_together
from flowvi.initialization.candidates import JUDGE_DRAWS, LARGE, TRY_ROUNDS
from flowvi.initialization.gaussian import GaussianApproximation, evaluate, refine, with_elbo
from flowvi.initialization.missed_modes import SHARE
from flowvi.initialization.peaks import Peak, are_separate, connected_place, converged_peak
from flowvi.initialization.symmetry import images, symmetries
from flowvi.targets import Target

# Numbers of further starts: always, and the least and largest with more than one mode.
FIRST, FEWEST, MOST = 3, 8, 40
# Number of modes at which the search ends.
MOST_MODES = 13
# The search ends if the next start finds a new mode with a smaller probability than this.
NEW_MODE_CHANCE = 0.05
# Number of draws that estimate the mass of a mode.
MASS_DRAWS = 1000
# Largest error that Laplace's approximation of the mass of a mode is assumed to have, in nats.
LAPLACE_ERROR = 5.0


def further_modes(
    target: Target,
    home: GaussianApproximation,
    ends: Tensor,
    places: Tensor,
    seed: int,
    log: Callable[[str], None],
    out_of_time: Callable[[], bool] = lambda: False,
) -> list[GaussianApproximation]:
    r"""Normals at modes that lie apart from the one where the fit starts.

    A mode is a point where Newton's steps have converged, and from which every path found to
    another mode falls by a nat (see `flowvi.initialization.peaks`). Its mass is estimated by
    draws from its normal, with a standard error. Ascents that do not converge, as where the
    density has no bound, count for nothing.

    Nothing more is done where the first ends of ascents, three more and the density's symmetries
    lead to no other mode. Otherwise ascents go on from draws from the prior, until

    .. math:: n_1 / n < 0.05

    of n ascents have ended in a mode that none other has: the Good-Turing estimate of the
    chance that the next one ends in a mode not seen yet.

    Args:
        target: The log density.
        home: The Gaussian that the fit starts with.
        ends: Where ascents from the first start points have ended, (N, D).
        places: Points to start from, (N, D).
        seed: Seed of the draws.
        log: Takes a sentence about the modes, for the log.
        out_of_time: Returns whether the time for the search is spent.

    References:
        Good (1953), "The population frequencies of species and the estimation of
        population parameters", Biometrika 40.
    """
    if target.dim > FULL_RANK_DIM:
        # Hessians would take too much memory.
        return []
    climb = _ModeSearch(target, home)
    for end in ends:
        climb.count_end(end)
    first = _search(climb, places, log, out_of_time) if target.dim <= LARGE else climb.count
    if climb.count > 1:
        log(
            f"{climb.count} modes, {first} of them from the first starts; {climb.unfinished} other "
            "ascents did not end at a mode"
        )
    return _with_masses(target, home, climb.peaks, seed, out_of_time)


def _search(
    climb: _ModeSearch, places: Tensor, log: Callable[[str], None], out_of_time: Callable[[], bool]
) -> int:
    """Look for more modes from further starts and symmetries; how many the first starts found."""
    target = climb.target
    if not out_of_time() and len(places):
        for path in ascend_together(target, list(places[:FIRST])):
            climb.count_end(path[-1])
    first = climb.count
    found = symmetries(target, places)
    for symmetry in found:
        log(f"symmetry of the density: {symmetry.description}")
    for image in [z for place in climb.places for z in images(target, found, place)][:MOST]:
        climb.count_end(image)
    if climb.count > 1:
        _search_further(climb, places[FIRST:], out_of_time)
    return first


class _ModeSearch:
    """Where ascents end: in which mode, in a new one, or in none.

    Args:
        target: The log density.
        home: The Gaussian that the fit starts with.
    """

    def __init__(self, target: Target, home: GaussianApproximation) -> None:
        self.target = target
        top = converged_peak(target, ascend(target, home.loc)[-1])
        # A centred hierarchy, for example, has no mode: the location itself is used.
        self.places: list[Tensor] = [home.loc if top is None else top.loc]
        self.peaks: list[Peak] = []
        self.hits = [0]
        self.unfinished = 0

    @property
    def count(self) -> int:
        """Modes so far, that of the start among them."""
        return len(self.places)

    def count_end(self, end: Tensor) -> None:
        """Count the end of an ascent."""
        where = self._mode_of(end)
        if where is None:
            self.unfinished += 1
        else:
            self.hits[where] += 1

    def _mode_of(self, end: Tensor) -> int | None:
        seen = connected_place(self.target, end, self.places)
        if seen is not None:
            return seen
        peak = converged_peak(self.target, end)
        if peak is None:
            return None
        for i, place in enumerate(self.places):
            if not are_separate(self.target, place, peak.loc, peak.scale_tril):
                return i
        self.places.append(peak.loc)
        self.peaks.append(peak)
        self.hits.append(0)
        return len(self.places) - 1


def _search_further(climb: _ModeSearch, places: Tensor, out_of_time: Callable[[], bool]) -> None:
    """Ascents from other places, until the chance of a mode not seen yet is small."""
    before = sum(climb.hits)
    if not len(places):
        return
    groups = places[:MOST].split(FEWEST)
    ends = (path[-1] for group in groups for path in ascend_together(climb.target, list(group)))
    for i in range(min(len(places), MOST)):
        rare = climb.hits.count(1) < NEW_MODE_CHANCE * max(sum(climb.hits) - before, 1)
        if out_of_time() or climb.count > MOST_MODES or (i >= FEWEST and rare):
            return
        climb.count_end(next(ends))


def _with_masses(
    target: Target,
    home: GaussianApproximation,
    peaks: list[Peak],
    seed: int,
    out_of_time: Callable[[], bool],
) -> list[GaussianApproximation]:
    """Normals at peaks, those that could matter, with the mass around each."""
    generator = torch.Generator(device=target.device).manual_seed(seed)

    def noise(n: int) -> Tensor:
        shape = (n, target.dim)
        return torch.randn(shape, generator=generator, dtype=target.dtype, device=target.device)

    judge, found = noise(JUDGE_DRAWS), []
    for i, peak in enumerate(peaks):
        laplace = peak.laplace(f"mode {i + 1}")
        volume = laplace.log_det + target.dim / 2 * math.log(2 * math.pi)
        if peak.height + float(volume) < home.elbo + math.log(SHARE) - LAPLACE_ERROR:
            continue
        g = with_elbo(target, laplace, judge)
        better = refine(target, g, generator, judge, False, TRY_ROUNDS, out_of_time)
        # Refinement may move from a low peak to a larger mass nearby.
        g = better if connected_place(target, better.loc, [peak.loc]) is not None else g
        found.append(_with_mass(target, g, noise(MASS_DRAWS)))
    return [g for g in found if math.isfinite(g.mass)]


def _with_mass(target: Target, g: GaussianApproximation, eps: Tensor) -> GaussianApproximation:
    """The same Gaussian with the mass around it, by weighted draws."""
    log_q = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1) - g.log_det
    log_w = (evaluate(target, g.at(eps)) - log_q).cpu().double()
    log_w = log_w.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    if not log_w.isfinite().any():
        return g
    mass = smoothed_evidence(log_w.numpy(), psis(log_w.numpy()))
    return replace(g, mass=mass.value, mass_se=mass.se)
