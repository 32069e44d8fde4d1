"""Simulation-based calibration of an amortised guide, which needs no fits."""

from __future__ import annotations

import warnings

import numpy as np

from flowvi.amortized.guide import AmortizedGuide
from flowvi.amortized.reading import read
from flowvi.analysis.ranks import ranks_of, scalars
from flowvi.diagnostics import VERDICTS
from flowvi.diagnostics.calibration import Calibration, Recovery
from flowvi.draws.resampling import resample
from flowvi.runtime.progress import showing
from flowvi.runtime.rng import derive_seed


def sbc_amortized(
    guide: AmortizedGuide, fits: int, draws: int, levels: int, seed: int, progress: bool
) -> Calibration:
    """Rank the true latents of simulated data sets among the guide's draws; see `sbc`."""
    sets, truth = guide.simulate(fits, seed)
    rng = np.random.default_rng(seed)
    found: list[tuple[np.ndarray, ...]] = []
    moments: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    verdicts: list[str] = []
    names: tuple[str, ...] = ()
    with showing(guide.name, progress, unit="data set") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-hat is in the verdict
        bar.phase("calibration", len(sets))
        for i, data in enumerate(sets):
            drawn = guide._drawn(read(guide.problem, data), draws, derive_seed(seed, 1, i) % 2**32)
            weighed = resample(drawn, seed=derive_seed(seed, 2, i) % 2**32)
            assert weighed.diagnosis is not None
            verdicts.append(weighed.diagnosis.verdict)
            names, true = scalars({n: truth[n][i][None, None] for n in truth})
            _, plain = scalars({n: drawn[n] for n in truth})
            _, better = scalars({n: weighed[n] for n in truth})
            chosen = better[rng.permutation(len(better))[:levels]]
            found.append(ranks_of(plain, chosen, true[0], levels, rng))
            # A few heavy weights leave one draw, which has no spread.
            kept = better if verdicts[-1] in VERDICTS[:2] else plain
            moments.append((true[0], kept.mean(0), kept.std(0, ddof=1)))
            bar.step()
    ranked, resampled, below = (np.stack(column) for column in zip(*found, strict=True))
    recovery = Recovery(*(np.stack(column) for column in zip(*moments, strict=True)))
    return Calibration(names, levels, ranked, resampled, below, tuple(verdicts), recovery=recovery)
