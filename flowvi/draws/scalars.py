"""The scalars of a table of draws: their labels, a data frame of them, and a summary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowvi.compat import arviz_stats
from flowvi.diagnostics import MIN_DRAWS, VERDICTS
from flowvi.diagnostics.summary import hdi, mcse
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import resample

if TYPE_CHECKING:
    import pandas as pd

WEIGHT = "log_weight"
QUANTILES = {"5%": 0.05, "50%": 0.5, "95%": 0.95}
# What the column `draws` of a summary says.
PLAIN, RESAMPLED, MCMC, UNTRUSTED = "plain", "resampled", "MCMC", "untrusted"


class Scalar(NamedTuple):
    """One scalar of a table of draws.

    Attributes:
        label: Its name, with the labels of its axes.
        name: The value that it is an element of.
        place: Its index in the value.
        draws: Its draws, (S).
    """

    label: str
    name: str
    place: tuple[int, ...]
    draws: np.ndarray


def scalars_of(draws: Draws, name: str) -> Iterator[Scalar]:
    """Every scalar of a value."""
    value = draws[name]
    axes = [draws.coords.get(dim) for dim in draws.dims.get(name, ())]
    for index in np.ndindex(value.shape[2:]):
        labels = [
            str(i if axis is None else axis[i]) for i, axis in itertools.zip_longest(index, axes)
        ]
        label = f"{name}[{', '.join(labels)}]" if index else name
        yield Scalar(label, name, index, value[(..., *index)].ravel())


def every_scalar(draws: Draws) -> Iterator[Scalar]:
    """Every scalar of every value."""
    return itertools.chain.from_iterable(scalars_of(draws, name) for name in draws.values)


def elements(draws: Draws, name: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Every scalar of a value: its name by index, its name by label, its draws."""
    for label, _, index, x in scalars_of(draws, name):
        yield f"{name}[{', '.join(map(str, index))}]" if index else name, label, x


def data_frame(draws: Draws) -> pd.DataFrame:
    """The table as `Draws.to_dataframe` returns it."""
    import pandas as pd

    chains, each = draws.log_p.shape[:2]
    columns: dict[str, np.ndarray] = {
        "chain": np.repeat(np.arange(chains), each),
        "draw": np.tile(np.arange(each), chains),
    }
    columns |= {one.label: one.draws for one in every_scalar(draws)}
    if not (draws.resampled or draws.mcmc):
        weights = draws.log_weights.reshape(len(draws), -1)
        labels = [f"{WEIGHT}[{label}]" for label in draws.labels] if draws.by_row else [WEIGHT]
        columns |= dict(zip(labels, weights.T, strict=True))
    return pd.DataFrame(columns)


def recommended(draws: Draws, seed: int = 0) -> tuple[Draws, str]:
    """The draws that their verdict recommends, as they are or resampled, and a word for them."""
    if draws.resampled:
        return draws, RESAMPLED
    if len(draws) < MIN_DRAWS or draws.log_p.shape[1] < MIN_DRAWS:
        return draws, UNTRUSTED
    verdict = diagnose(draws).verdict
    if verdict == VERDICTS[1] and not draws.mcmc:
        return resample(draws, seed), RESAMPLED
    word = MCMC if draws.mcmc else PLAIN
    return draws, word if verdict == VERDICTS[0] else UNTRUSTED


def summarise(draws: Draws, probability: float = arviz_stats.HDI_PROBABILITY) -> pd.DataFrame:
    """The summary as `Draws.summary` returns it.

    Raises:
        ValueError: The probability does not lie between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie between 0 and 1; got {probability}.")
    kept, word = recommended(draws)
    return table(kept, probability).assign(draws=word)


def table(
    kept: Draws,
    probability: float = arviz_stats.HDI_PROBABILITY,
    chosen: Sequence[Scalar] | None = None,
) -> pd.DataFrame:
    """A summary of draws as they are, one line a scalar.

    Args:
        kept: The draws.
        probability: Probability of the highest-density interval.
        chosen: The scalars; all of them by default.
    """
    import pandas as pd

    shown = [*every_scalar(kept)] if chosen is None else chosen
    columns = [one.draws for one in shown]
    x = np.stack(columns, axis=1).astype(np.float64) if columns else np.zeros((len(kept), 0))
    low, high = hdi(x, probability)
    ess, rhat = _effective(kept, x, shown)
    error_mean, error_sd = mcse(x, ess)
    tail = 100 * (1 - probability) / 2
    rows: dict[str, np.ndarray] = {
        "mean": x.mean(0),
        "sd": x.std(0, ddof=1) if len(x) > 1 else np.full(x.shape[1], math.nan),
        f"hdi_{tail:g}%": low,
        f"hdi_{100 - tail:g}%": high,
        "mcse_mean": error_mean,
        "mcse_sd": error_sd,
        "ess": ess,
    }
    if rhat is not None:
        rows["r_hat"] = rhat
    rows |= {word: np.quantile(x, q, axis=0) for word, q in QUANTILES.items()}
    return pd.DataFrame(rows, index=pd.Index([one.label for one in shown], name="name"))


def _effective(
    draws: Draws, x: np.ndarray, shown: Sequence[Scalar]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Effective draws of the mean of each scalar, (P), and R-hat where the draws are of chains."""
    count = float(len(x))
    if draws.mcmc:
        chains = x.T.reshape(x.shape[1], *draws.log_p.shape)
        moving = [np.ptp(one) > 0 for one in chains]
        pairs = list(zip(chains, moving, strict=True))
        sizes = [arviz_stats.ess(one, "mean") if varies else count for one, varies in pairs]
        rhats = [arviz_stats.rhat(one) if varies else math.nan for one, varies in pairs]
        return np.array(sizes), np.array(rhats)
    found = draws.diagnosis
    if not draws.resampled or found is None:
        return np.full(x.shape[1], count), None
    # The variance of resampling is added to that of the weights.
    weights = np.atleast_1d(found.ess if found.rows is None else found.rows.ess)
    ess = 1 / (1 / weights + 1 / count)
    if not draws.by_row:
        return np.full(x.shape[1], ess[0]), None
    return np.array([ess[one.place[0]] for one in shown]), None
