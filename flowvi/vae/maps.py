"""Codes that are images themselves, and images padded so that they can be halved."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad

# Sides that are multiples of this can be halved four times: twice by a net, twice by a flow.
UNIT = 16


def padded(size: Sequence[int]) -> tuple[int, int]:
    """The sides of an image, rounded up so that they can be halved four times."""
    height, width = (UNIT * -(-n // UNIT) for n in size)
    return height, width


def code_shape(
    size: Sequence[int], latent: int | None = None, channels: int = 1
) -> tuple[int, int, int]:
    """The shape (C, H / 4, W / 4) of a code, of the padded sides.

    Args:
        size: (H, W) of an image.
        latent: Length D of the code; that of `channels` by default.
        channels: Channels C, where D is not given.

    Raises:
        ValueError: D is no multiple of H W / 16.
    """
    height, width = (n // 4 for n in padded(size))
    latent = channels * height * width if latent is None else latent
    if latent % (height * width) or latent < height * width:
        raise ValueError(
            f"Images of {size[0]} x {size[1]} have codes of {height} x {width} pixels: latent must "
            f"be a multiple of {height * width}; got {latent}."
        )
    return latent // (height * width), height, width


class Padded(nn.Module):
    """Zeros around an image, until its sides can be halved. (N, C, H, W) -> (N, C, H', W').

    Args:
        size: (H, W).
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.margins = _margins(size)

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.margins
        return pad(x, (left, right, top, bottom))


class Cropped(nn.Module):
    """The image within such zeros. (N, C, H', W') -> (N, C, H, W).

    Args:
        size: (H, W).
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        self.margins = _margins(size)

    def forward(self, x: Tensor) -> Tensor:
        (top, _), (left, _) = self.margins
        return x[..., top : top + self.size[0], left : left + self.size[1]]


def _margins(size: Sequence[int]) -> list[tuple[int, int]]:
    extra = [big - small for big, small in zip(padded(size), size, strict=True)]
    return [(n // 2, n - n // 2) for n in extra]
