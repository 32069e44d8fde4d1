"""Pictures of images: rows of them, a map of codes, and the training of a model of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 10  # classes that can be told apart
# Range of all epochs, in ranges of the later ones, from which the first ones are left out.
FAR = 5.0
MARKS = 8  # marks of epochs that lie below the scale, at most
INCHES = 0.55  # side of an image in a grid


def plot_images(
    images: ArrayLike,
    columns: int | None = None,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Images side by side, dark ink on light ground.

    Args:
        images: (N, H, W) in a grid that is as square as may be, or (rows, columns, H, W);
            values from 0, the ground, to 1.
        columns: Images in a row of a grid of (N, H, W).
        names: What to write beside the rows.
        ax: Axes to draw on; a new figure without them.
    """
    values = np.asarray(images, dtype=np.float64)
    if values.ndim == 3:
        values = _wrapped(values, columns or int(np.ceil(len(values) ** 0.5)))
    if values.ndim != 4:
        raise ValueError(
            f"images must have shape (N, H, W) or (rows, columns, H, W); got {values.shape}."
        )
    rows, columns, height, width = values.shape
    sheet = np.full((rows, columns, height + 1, width + 1), np.nan)
    sheet[:, :, :-1, :-1] = np.clip(values, 0, 1)
    sheet = sheet.swapaxes(1, 2).reshape(rows * (height + 1), columns * (width + 1))
    with style():
        size = (INCHES * columns * width / height + 0.1, INCHES * rows + 0.1)
        ax = ax or new_axes((max(size[0], 1.0), max(size[1], 0.8)))
        ax.imshow(sheet[:-1, :-1], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set_xticks([])
        places = [r * (height + 1) + height / 2 for r in range(rows)] if names else []
        ax.set_yticks(places, list(names or ()))
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    return ax


def plot_reconstructions(originals: ArrayLike, found: ArrayLike, ax: Axes | None = None) -> Axes:
    """Images in one row and their reconstructions below.

    Args:
        originals: (N, H, W), from 0 to 1.
        found: The same.
        ax: Axes to draw on; a new figure without them.
    """
    pair = np.stack([np.asarray(originals), np.asarray(found)])
    return plot_images(pair, names=["image", "mean"], ax=ax)


def plot_latent_map(z: ArrayLike, labels: ArrayLike | None = None, ax: Axes | None = None) -> Axes:
    """Codes of images in the plane: their two coordinates, or the plane in which they vary most.

    Args:
        z: Codes, such as posterior means, (N, D), D at least 2.
        labels: Classes to colour them by, (N).
        ax: Axes to draw on; a new figure without them.
    """
    points = np.asarray(z, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] < 2:
        raise ValueError(f"A map needs codes (N, D) with D of at least 2; got {points.shape}.")
    words = ["$z_1$", "$z_2$"]
    if points.shape[1] > 2:
        points, words = _plane(points)
    with style():
        ax = ax or new_axes((4.4, 4.0))
        if labels is None:
            ax.plot(*points.T, ".", ms=3, color=BLUE, alpha=0.5)
        else:
            _coloured(ax, points, np.asarray(labels))
        ax.set(xlabel=words[0], ylabel=words[1])
        ax.set_aspect("equal", adjustable="datalim")
    return ax


def plot_epochs(history: Mapping[str, ArrayLike], ax: Axes | None = None) -> Axes:
    """The bound of a fit of local latents over its epochs, on training and validation rows.

    Args:
        history: ``epoch``, ``bound``, and ``validation``, which may be NaN.
        ax: Axes to draw on; a new figure without them.
    """
    epochs, bound, held = (np.asarray(history[k], float) for k in ("epoch", "bound", "validation"))
    if not np.isfinite(bound).any():
        raise ValueError("history['bound'] holds no finite value: there is nothing to plot.")
    with style():
        ax = ax or new_axes((4.8, 3.2))
        ax.plot(epochs, bound, color=BLUE, lw=1.4, label="training rows")
        if np.isfinite(held).any():
            ax.plot(epochs, held, color=ORANGE, lw=1.4, label="validation rows")
        both = np.concatenate([bound, held])
        known = both[np.isfinite(both)]
        low, usual, high = (float(np.quantile(known, q)) for q in (0.0, 0.1, 1.0))
        if high - low > FAR * (high - usual) > 0:
            # The first epochs do not affect the scale; a mark says that they lie below.
            low = usual
            early = epochs[np.isfinite(bound) & (bound < low - 0.1 * (high - low))]
            early = early[:: max(1, -(-len(early) // MARKS))]
            foot = np.full(len(early), low - 0.1 * (high - low))
            ax.plot(early, foot, "v", color=BLUE, ms=5, clip_on=False, label="lower")
        margin = 0.1 * (high - low) or 1.0
        ax.set(xlabel="epoch", ylabel="bound (nats per row)", ylim=(low - margin, high + margin))
        ax.legend(loc="lower right")
    return ax


def _wrapped(images: np.ndarray, columns: int) -> np.ndarray:
    """(N, H, W) in rows of so many; empty places are NaN."""
    rows = -(-len(images) // columns)
    whole = np.full((rows * columns, *images.shape[1:]), np.nan)
    whole[: len(images)] = images
    return whole.reshape(rows, columns, *images.shape[1:])


def _plane(points: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Scores on the first two principal axes, and labels with their shares of the variance."""
    centred = points - points.mean(0)
    _, scales, axes = np.linalg.svd(centred, full_matrices=False)
    shares = scales**2 / max(float((scales**2).sum()), np.finfo(float).tiny)
    words = [f"principal axis {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2)]
    return centred @ axes[:2].T, words


def _coloured(ax: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    import matplotlib as mpl

    classes = np.unique(labels)
    if len(classes) > COLOURS:
        ax.scatter(points[:, 0], points[:, 1], c=labels, s=6, cmap="viridis", lw=0)
        return
    colours = mpl.colormaps["tab10"]
    for i, name in enumerate(classes):
        x, y = points[labels == name].T
        ax.plot(x, y, ".", ms=3, color=colours(i), alpha=0.6)
        ax.text(
            float(np.median(x)),
            float(np.median(y)),
            str(name),
            color=colours(i),
            weight="bold",
            size=11,
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": GREY, "lw": 0.5},
        )
