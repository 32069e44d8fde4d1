"""Numbers of a table with the same decimals in every line."""

from __future__ import annotations

import math

import numpy as np

# Significant digits of a typical standard deviation, and largest number of decimals.
DIGITS, MOST = 2, 4


def decimals(sds: np.ndarray) -> int:
    """Number of decimals that shows the smaller of some standard deviations by two digits."""
    known = sds[np.isfinite(sds) & (sds > 0)]
    if not len(known):
        return DIGITS
    small = float(np.quantile(known, 0.25))
    return int(np.clip(DIGITS - 1 - math.floor(math.log10(small)), 1, MOST))


def even(x: float, sd: float, places: int) -> str:
    """A number with given decimals; its own digits where the sd is far below or above them.

    Args:
        x: The number.
        sd: Standard deviation of the scalar.
        places: Number of decimals of the table.
    """
    if not math.isfinite(x):
        return str(x)
    tiny = 0 < sd < 10.0**-places
    if tiny or abs(x) >= 1e6:
        return f"{x:.3g}"
    text = f"{x:,.{places}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text
