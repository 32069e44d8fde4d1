"""Numbers of any order of magnitude as inputs of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

# Values beyond so many scales are compressed.
SOFT = 4.0
# Largest number of different whole numbers that are read as categories.
MOST_LEVELS = 12
# The same for arguments of whole numbers, which are indices.
MOST_INDICES = 64
# Features of a number.
EACH = 3


@dataclass(frozen=True)
class Input:
    """What is read of a data set under one name.

    Attributes:
        name: Observed site, or argument that varies.
        shape: Shape of one row; of the whole value without rows.
        rows: Whether the first axis is the rows.
        levels: Number of categories; 0 for numbers.
        index: Whether rows of a category belong together, as those of a group.
    """

    name: str
    shape: tuple[int, ...]
    rows: bool
    levels: int = 0
    index: bool = False

    @property
    def count(self) -> int:
        """Numbers of a row."""
        return torch.Size(self.shape).numel()

    @property
    def width(self) -> int:
        """Features of a row."""
        return self.count * (EACH + self.levels)

    def state(self) -> dict[str, Any]:
        """The attributes, as JSON takes them."""
        return {**asdict(self), "shape": list(self.shape)}


class Features(nn.Module):
    r"""Three features of each number: u soft-clipped, asinh(u), and on the scale of logs.

    With u = (x - median) / scale,

    .. math:: \frac{u}{1 + |u| / 4}, \qquad \operatorname{asinh}(u), \qquad
        \operatorname{sign}(x) \log(1 + |x| / x_0),

    the last one standardised. Categories have one feature each besides.

    Args:
        input: What is read.
    """

    loc: Tensor
    scale: Tensor
    tiny: Tensor
    log_loc: Tensor
    log_scale: Tensor

    def __init__(self, input: Input) -> None:
        super().__init__()
        self.input = input
        for name in ("loc", "log_loc"):
            self.register_buffer(name, torch.zeros(input.count))
        for name in ("scale", "tiny", "log_scale"):
            self.register_buffer(name, torch.ones(input.count))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take location and scales from simulated values, (n, *shape)."""
        flat = x.reshape(-1, self.input.count).double()[:20000]
        low, middle, high = flat.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), 0)
        spread, sd = (high - low) / 2.56, flat.clamp(-1e30, 1e30).std(0)
        scale = torch.where(spread > 1e-3 * sd, spread, sd)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        size = flat.abs()
        tiny = size.quantile(0.1, 0)
        tiny = torch.maximum(tiny, 1e-3 * scale)
        logs = flat.sign() * (size / tiny).log1p()
        spread = logs.std(0)
        self.loc.copy_(middle)
        self.scale.copy_(scale)
        self.tiny.copy_(tiny)
        self.log_loc.copy_(logs.mean(0))
        self.log_scale.copy_(torch.where(spread > 0, spread, 1.0))

    def unit(self, x: Tensor) -> Tensor:
        """The standardised numbers, (*B, *shape) -> (*B, count)."""
        lead = x.shape[: x.dim() - len(self.input.shape)]
        return (x.reshape(*lead, -1).to(self.loc.dtype) - self.loc) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """All features, (*B, *shape) -> (*B, width)."""
        scales = self.scales(self.unit(x))
        if not self.input.levels:
            return scales
        return torch.cat([scales, self.categories(x).to(scales.dtype).flatten(-2)], -1)

    def scales(self, u: Tensor) -> Tensor:
        """Standardised numbers on three scales, (*B, count) -> (*B, 3 count)."""
        x = u * self.scale + self.loc
        logs = x.sign() * (x.abs() / self.tiny).log1p()
        parts = [u / (1 + u.abs() / SOFT), u.asinh(), (logs - self.log_loc) / self.log_scale]
        return torch.cat(parts, -1)

    def categories(self, x: Tensor) -> Tensor:
        """One column for each category, (*B, *shape) -> (*B, count, levels)."""
        lead = x.shape[: x.dim() - len(self.input.shape)]
        places = x.reshape(*lead, -1).long().clamp(0, self.input.levels - 1)
        return one_hot(places, self.input.levels)


def levels_of(x: Tensor, observed: bool) -> int:
    """Number of categories that whole numbers stand for; 0 if they are numbers.

    Args:
        x: Simulated values.
        observed: Whether they are observed; an argument is an index if it is an integer.
    """
    if not (observed or not x.is_floating_point()):
        return 0
    some = x.reshape(-1)[:20000]
    if some.is_floating_point() and bool((some != some.floor()).any()):
        return 0
    if bool((some < 0).any()):
        return 0
    most = int(some.max()) + 1
    limit = MOST_LEVELS if observed else MOST_INDICES
    # Zeros and ones are numbers.
    return most if 2 < most <= limit else 0


def inputs_from(states: Sequence[dict[str, Any]]) -> list[Input]:
    """The inputs that `Input.state` described."""
    return [Input(**{**state, "shape": tuple(state["shape"])}) for state in states]
