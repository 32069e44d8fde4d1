"""The pictures of a report, as data URIs."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.compat.arviz_groups import has_group
from flowvi.draws.diagnose import where
from flowvi.draws.draws import Draws
from flowvi.plots import (
    plot_caterpillar,
    plot_epochs,
    plot_evidence,
    plot_khat,
    plot_loss,
    plot_marginals,
    plot_pair,
    plot_predictive,
    plot_sensitivity,
    plot_where,
)
from flowvi.plots.caterpillar import unit_values
from flowvi.plots.loss import stage_names
from flowvi.reporting.contents import Contents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144
SITES = 4  # observed sites with a predictive check
MARGINALS, PAIRS = 9, 5  # scalars in a picture


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        key: Section of the report.
        source: The image, as a data URI.
        width: Width on the page in points.
        alt: Text alternative of the image.
        caption: Explanation of the picture.
    """

    key: str
    source: str
    width: int
    alt: str
    caption: str


def pictures(contents: Contents) -> list[Picture]:
    """Draw all pictures of a report."""
    return [_picture(*one) for one in _all(contents)]


Drawing = tuple[str, Callable[[], "Figure"], str, str]


def _all(c: Contents) -> Iterator[Drawing]:
    names = [one.label for one in c.first]
    scalars = ", ".join(names[:4])
    if names:
        yield from _marginals(c, names[:MARGINALS])
        yield from _prior(c, names[:MARGINALS])
    yield (
        "pairs",
        lambda: _figure(plot_pair(c.kept, names[:PAIRS] or None)),
        f"Scatter matrix of {scalars}: histograms on the diagonal, densities of pairs below.",
        f"The draws are the {c.kind}. Darker cells hold more draws.",
    )
    yield from _units(c)
    yield from _predictive(c)
    if c.weighted is not None:
        yield from _weights(c)
    if c.evidence is not None:
        found = c.evidence
        yield (
            "evidence",
            lambda: _figure(plot_evidence(found)),
            f"Ladder of bounds on the log evidence, the best estimate at {found.log_evidence:.3f}.",
            "Bars are two standard errors. Marks that point right are lower bounds.",
        )
    yield from _training(c)


def _training(c: Contents) -> Iterator[Drawing]:
    bound = np.asarray(c.history.get("bound", ()))
    if not np.isfinite(bound).any():
        return
    if "epoch" in c.history:
        yield (
            "training",
            lambda: _figure(plot_epochs(c.history)),
            f"The bound per row over {len(bound)} epochs of training.",
            "One line is for the training rows, the other for the held-out rows.",
        )
        return
    columns: dict[str, Any] = {"bound": bound}
    if "stage" in c.history:
        columns["stage"] = stage_names(c.history, c.facts.get("stages", ()))
    yield (
        "training",
        lambda: _figure(plot_loss(columns)),
        f"The bound over {len(bound)} steps of training, with a line where each stage begins.",
        "The scale is linear within the noise of the final bound, and logarithmic beyond it.",
    )


def _prior(c: Contents, names: list[str]) -> Iterator[Drawing]:
    prior = c.prior
    known = [name for name in names if prior and name.partition("[")[0] in prior.values]
    if prior is not None and known:
        sets = {"prior": prior, "posterior": c.kept}
        yield (
            "prior",
            lambda: _figure(plot_marginals(sets, known, 3, focus="posterior")),
            f"Histograms of {', '.join(known[:4])} under the prior and the posterior.",
            "Where the two are alike, the data say little. The prior may be wider than a panel.",
        )
    if c.sensitivity is not None and c.sensitivity.labels:
        found = c.sensitivity
        yield (
            "sensitivity",
            lambda: _figure(plot_sensitivity(found)),
            "Sensitivity of each scalar to the power of the prior and of the likelihood.",
            "Right of the line: orange alone says that the prior dominates, both that prior and "
            "data disagree.",
        )


def _marginals(c: Contents, names: list[str]) -> Iterator[Drawing]:
    sets = {} if c.start is None else {"Gaussian start": c.start}
    if c.weighted is not None:
        guide = "structured" if "shared" in c.facts else c.facts.get("guide", "")
        sets[f"{guide} guide".strip()] = c.weighted
    if c.kept.resampled or c.kept.mcmc:
        sets["resampled" if c.kept.resampled else "NUTS"] = c.kept
    sets = sets or {"draws": c.kept}
    yield (
        "marginals",
        lambda: _figure(plot_marginals(sets, names, 3)),
        f"Histograms of {', '.join(names[:4])}: {', '.join(sets)}.",
        "They compare the draws before and after each step of the approximation.",
    )


def _units(c: Contents) -> Iterator[Drawing]:
    for name in unit_values(c.kept)[:SITES]:
        yield (
            "units",
            partial(_caterpillar, c.kept, name),
            f"Means and intervals of {name} of each unit, in the order of the means.",
            "Thick bars hold 50 % of the posterior, thin ones 90 %. The dotted line is the mean of "
            "all units.",
        )


def _predictive(c: Contents) -> Iterator[Drawing]:
    if not has_group(c.plain, "posterior_predictive"):
        return
    predicted, observed = c.plain["posterior_predictive"], c.plain["observed_data"]
    for name in [n for n in predicted.data_vars if n in observed][:SITES]:
        y, x = observed[name], predicted[name]
        if not np.issubdtype(y.dtype, np.number) or not y.size:
            continue
        labels = list(y[y.dims[0]].values) if y.ndim == 1 else None
        yield (
            "predictive",
            partial(_predicted, y.values, x.values, labels, str(name)),
            f"Observed values of {name} beside those that the posterior predicts.",
            f"Data simulated from {x.sizes['chain'] * x.sizes['draw']} draws of the posterior.",
        )


def _weights(c: Contents) -> Iterator[Drawing]:
    draws = c.weighted
    assert draws is not None
    if not np.isfinite(draws.log_weights).any():
        return
    khat = c.diagnosis.khat if c.diagnosis else np.nan
    if draws.by_row:
        yield (
            "weights",
            lambda: _figure(plot_khat(draws)),
            f"Pareto k-hat of the weights of each row; the largest is {khat:.2f}.",
            "Above the line a few draws of the row carry the weight, and averages are unreliable.",
        )
        return
    yield (
        "weights",
        lambda: _figure(plot_khat(draws)),
        f"The largest importance weights against their rank; Pareto k-hat {khat:.2f}.",
        "A line that is steep at the left is a heavy tail: a few draws dominate every average.",
    )
    found = where(draws)
    if len(found.labels) > 1:
        clear = found.sentence or "The largest weights are not concentrated in one region."
        yield (
            "weights",
            lambda: _figure(plot_where(draws)),
            f"Draws by {found.labels[0]} and {found.labels[1]}, the heaviest weights marked.",
            clear,
        )


def _caterpillar(draws: Draws, name: str) -> Figure:
    return _figure(plot_caterpillar(draws, name))


def _predicted(y: Any, x: Any, labels: list[Any] | None, name: str) -> Figure:
    return _figure(plot_predictive(y, x, labels, name))


def _figure(axes: Any) -> Figure:
    first = axes.flat[0] if isinstance(axes, np.ndarray) else axes
    figure: Figure = first.figure
    return figure


def _picture(key: str, draw: Callable[[], Figure], alt: str, caption: str) -> Picture:
    content = png(draw, DPI)
    # The header of a PNG holds its width in pixels.
    width = round(int.from_bytes(content[16:20], "big") * 96 / DPI)
    return Picture(key, data_uri(content), width, alt, caption)


def png(draw: Callable[[], Any], dpi: int) -> bytes:
    """Draw a picture, and close it: the bytes of a PNG file.

    Args:
        draw: Returns a figure, or axes or an array of axes in it.
        dpi: Resolution.
    """
    import matplotlib.pyplot as plt

    with warnings.catch_warnings(), plt.ioff():
        # A name may have letters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawn = draw()
        figure = drawn if hasattr(drawn, "savefig") else _figure(drawn)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=dpi)
    plt.close(figure)
    return content.getvalue()


def data_uri(content: bytes) -> str:
    """A PNG file as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
