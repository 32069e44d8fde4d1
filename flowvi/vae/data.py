"""Images to train on, and three ways to make pixels 0 or 1."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvi.runtime.arguments import check_choice
from flowvi.vae.image_files import SEED, SPLITS, digits, read

# Distance from 0 or 1 within which a pixel counts as ink or as paper.
END = 0.05
# Likelihoods of floats: for pixels of which most do, and for others.
OF_FLOATS = ("continuous_bernoulli", "gaussian")


@dataclass(frozen=True)
class Images:
    """A data set of grey or black-and-white images.

    Attributes:
        name: What to call it.
        train: Training images, (N, H, W).
        val: Validation images.
        test: Test images.
        visit: Function that transforms training images anew at every visit, such as random
            binarisation; None if they are used as they are.
        labels: Classes of the images of a split, by its name, where there are any.
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    visit: "Binarise | None" = None
    labels: Mapping[str, Tensor] | None = None

    @property
    def rows(self) -> "Tensor | Visits":
        """The rows of a model and its fit: `from_pyro(model, images.rows, ...)`."""
        return self.train if self.visit is None else Visits(self.train, self.visit)

    @property
    def example(self) -> Tensor:
        """Training images as the model sees them, drawn once where they are drawn, (N, H, W)."""
        return self.train if self.visit is None else Binarise(SEED)(self.train)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.train.shape[1:]
        return height, width

    def first(self, train: int | None = None, test: int | None = None) -> "Images":
        """The first images of the training split and of the other splits, with their labels."""
        counts = {"train": train, "val": test, "test": test}
        labels = {k: v[: counts[k]] for k, v in (self.labels or {}).items()}
        return replace(
            self,
            train=self.train[:train],
            val=self.val[:test],
            test=self.test[:test],
            labels=labels or None,
        )


class Binarise:
    """Draw black-and-white images from grey ones, anew at every call.

    Args:
        seed: Of a generator of its own, whose numbers do not depend on what else is drawn;
            None for torch's, which a fit seeds for every epoch, so that it can be resumed.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Grey values in [0, 1] to 0 and 1, each 1 with a probability of its value."""
        return (torch.rand(x.shape, generator=self.generator).to(x) < x).to(x.dtype)


class Visits(Dataset[Tensor]):
    """Images that are transformed anew at every access.

    Args:
        x: Original images, (N, H, W).
        visit: Transforms one image.
    """

    def __init__(self, x: Tensor, visit: Binarise) -> None:
        self.x, self.visit = x, visit

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.visit(self.x[i])


def load(
    path: str | Path | None = None,
    binarise: str = "static",
    split: str | None = None,
) -> Images:
    """Read a data set of images.

    A file holds ``train_x``, ``val_x`` and ``test_x`` (N, H, W) with grey levels
    0 to 255, or for "grey" values in [0, 1], and may hold ``*_bits``, fixed
    black-and-white versions packed by `numpy.packbits`, and labels ``*_y``; or ``x``
    (N, H, W) with one or more orders ``perm_*``. The files of the published tables are
    read as they are: the folder of the three ``binarized_mnist_*.amat``,
    ``chardata.mat`` (OMNIGLOT), and ``caltech101_silhouettes_28_split1.mat``.
    Without a file the images are the 1797
    digits of scikit-learn.

    Args:
        path: An ``.npz`` or ``.mat`` file, a folder of ``.amat`` files, or None for the digits.
        binarise: "static": pixels drawn once, those of the file where it has them;
            "dynamic": training images drawn anew at every visit, the others once;
            "threshold": 1 above half of the range; "grey": values in [0, 1];
            "levels": whole numbers from 0 to 255.
        split: Which of the orders ``perm_*`` to cut into 80, 10 and 10 %; the first by default.

    Raises:
        ValueError: An array is missing in the file; the message names it.

    References:
        Larochelle and Murray (2011), "The neural autoregressive distribution
        estimator": the fixed MNIST. Burda et al. (2016), arXiv:1509.00519:
        ``chardata.mat``. Marlin et al. (2010), "Inductive principles for
        restricted Boltzmann machine learning": the silhouettes.
    """
    check_choice("binarisation", binarise, BINARISATIONS)
    name, arrays = digits() if path is None else read(Path(path), split, binarise == "grey")
    levels = {k: arrays[f"{k}_x"] for k in SPLITS}
    found = {
        k: BINARISATIONS[binarise](levels[k], arrays.get(f"{k}_bits"), i)
        for i, k in enumerate(SPLITS)
    }
    visit = None
    if binarise == "dynamic":
        found["train"] = _grey(levels["train"], None, 0)
        visit = Binarise()
    labels = {k: torch.as_tensor(arrays[f"{k}_y"]).long() for k in SPLITS if f"{k}_y" in arrays}
    return Images(name, **found, visit=visit, labels=labels or None)


class Proposal(NamedTuple):
    """A likelihood that suits pixels, and why; no reason where it is the usual one."""

    likelihood: str
    reason: str = ""


def propose_likelihood(path: str | Path | None = None, split: str | None = None) -> Proposal:
    """A likelihood for the pixels of a file, as `load` reads it.

    Grey levels 0 to 255, and floats that are 0 and 1 alone, are for "bernoulli", after they have
    been made 0 or 1. Floats in [0, 1] have a density: "continuous_bernoulli" where most pixels
    lie at an end of the range, as ink on paper does, and "gaussian" for tones in between.

    Args:
        path: As for `load`.
        split: As for `load`.
    """
    if path is None:
        return Proposal("bernoulli")
    _, arrays = read(Path(path), split, shares=True)
    x = arrays["train_x"]
    if x.dtype.kind != "f":
        return Proposal("bernoulli")
    ends = float(((x <= END) | (x >= 1 - END)).mean())
    name, other = OF_FLOATS if ends > 0.5 else OF_FLOATS[::-1]
    return Proposal(
        name,
        f"pixels are floats in [0, 1], {ends:.0%} of them within {END:g} of an end: "
        f"--likelihood {name} (the other for such pixels: {other})",
    )


def _drawn(levels: np.ndarray, bits: np.ndarray | None, place: int) -> Tensor:
    if bits is None:
        return Binarise(SEED + place)(_grey(levels, None, place))
    flat = np.unpackbits(bits, axis=1)[:, : levels[0].size]
    return torch.as_tensor(flat).reshape(levels.shape).to(torch.get_default_dtype())


def _threshold(levels: np.ndarray, bits: np.ndarray | None, place: int) -> Tensor:
    return torch.as_tensor(levels > 127).to(torch.get_default_dtype())


def _grey(levels: np.ndarray, bits: np.ndarray | None, place: int) -> Tensor:
    shares = levels.dtype.kind == "f"
    return _levels(levels, bits, place) / (1 if shares else 255)


def _levels(levels: np.ndarray, bits: np.ndarray | None, place: int) -> Tensor:
    return torch.as_tensor(np.asarray(levels)).to(torch.get_default_dtype())


# Functions of grey levels, packed bits or None, and the index of the split.
BINARISATIONS: dict[str, Callable[[np.ndarray, np.ndarray | None, int], Tensor]] = {
    "static": _drawn,
    "dynamic": _drawn,
    "threshold": _threshold,
    "grey": _grey,
    "levels": _levels,
}
