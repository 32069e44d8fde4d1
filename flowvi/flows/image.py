"""The multi-scale flow of images: squeeze, steps of Glow with convolutions, split."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from flowvi.flows.elementwise import Affine
from flowvi.flows.glow import ActNorm, mixing
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import required
from flowvi.flows.permute import Permutation

Shape = tuple[int, int, int]


class Pixelwise(Layer):
    """A layer of the channels, applied at every pixel; its log determinant counts H W times.

    Args:
        layer: Unconditional layer of R^C.
        pixels: Number of pixels H W. The vector is (H, W, C), flattened.
    """

    def __init__(self, layer: Layer, pixels: int) -> None:
        super().__init__()
        self.layer = layer
        self.pixels = pixels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.layer(self._pixels(x))
        return y.flatten(-2), ladj.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.layer.inverse(self._pixels(y))
        return x.flatten(-2), ladj.sum(-1)

    def initialise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer.initialise(self._pixels(y)).flatten(-2)

    def _pixels(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.pixels, -1))


class ConvolutionalCoupling(Layer):
    r"""Shift and scale half of the channels by convolutions of the other half.

    With a and b the two halves of the channels, :math:`y = (a, b \, e^s + m)`
    and :math:`(m, s) = h(a, c)`, as in `AffineCoupling`. The network has a 3x3, a
    1x1 and a 3x3 convolution. A context is a feature map; it is averaged or
    repeated to the size of this image and enters the first hidden layer. Both
    directions cost one network call.

    Args:
        shape: (C, H, W) of the image; the vector is (H, W, C), flattened.
        hidden: Channels of the two hidden layers.
        context_shape: (C, H, W) of the context, flattened; none by default.

    References:
        Kingma and Dhariwal (2018), arXiv:1807.03039, section 3.3.
    """

    def __init__(self, shape: Shape, hidden: int, context_shape: Shape | None = None) -> None:
        super().__init__()
        channels, height, width = shape
        self.size = (height, width, channels)
        self.halves = [channels // 2, channels - channels // 2]
        self.map = Affine()
        kept, moved = self.halves
        self.first = nn.Conv2d(kept, hidden, 3, padding=1)
        size = (height, width)
        self.context = ContextMap(context_shape, size, hidden) if context_shape else None
        last = nn.Conv2d(hidden, self.map.size * moved, 3, padding=1)
        self.rest = nn.Sequential(nn.SiLU(), nn.Conv2d(hidden, hidden, 1), nn.SiLU(), last)
        for p in last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(x)
        b, ladj = self.map.forward(b, self._params(a, context))
        return torch.cat([a, b], dim=-1).flatten(-3), ladj.sum((-3, -2, -1))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(y)
        b, ladj = self.map.inverse(b, self._params(a, context))
        return torch.cat([a, b], dim=-1).flatten(-3), ladj.sum((-3, -2, -1))

    def _split(self, x: Tensor) -> list[Tensor]:
        return list(x.unflatten(-1, self.size).split(self.halves, dim=-1))

    def _params(self, a: Tensor, context: Tensor | None) -> Tensor:
        """Channels (*S, *B, H, W, C / 2) -> parameters (*S, *B, H, W, 2, C / 2)."""
        h = self.first(_images(a))
        if self.context is not None:
            maps = h.reshape(*a.shape[:-3], *h.shape[1:]) + self.context(context)
            h = maps.reshape(h.shape)
        return self.rest(h).movedim(1, -1).reshape(*a.shape[:-1], self.map.size, -1)


class ContextMap(nn.Module):
    """A context as a feature map of another size and another number of channels.

    Args:
        shape: (C, H, W) of the context, flattened.
        size: (H, W) of the result, by averages or repetitions of pixels.
        hidden: Channels of the result.
    """

    def __init__(self, shape: Shape, size: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.shape = shape
        self.size = size
        self.weight = nn.Conv2d(shape[0], hidden, 1, bias=False)

    def forward(self, context: Tensor | None) -> Tensor:
        """Context (*B, C H W) -> (*B, hidden, H, W)."""
        found = required(context, math.prod(self.shape))
        maps = self.weight(adaptive_avg_pool2d(found.reshape(-1, *self.shape), self.size))
        return maps.reshape(*found.shape[:-1], *maps.shape[1:])


class Split(Layer):
    """A layer of the first half of the channels; the other half is left as it is.

    Args:
        layer: Layer of (H, W, C / 2), flattened.
        shape: (C, H, W) of the image; the vector is (H, W, C), flattened.
    """

    def __init__(self, layer: Layer, shape: Shape) -> None:
        super().__init__()
        self.layer = layer
        channels, height, width = shape
        self.size = (height * width, channels)
        self.halves = [channels // 2, channels - channels // 2]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(x)
        a, ladj = self.layer(a.flatten(-2), context)
        return self._join(a, b), ladj

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(y)
        a, ladj = self.layer.inverse(a.flatten(-2), context)
        return self._join(a, b), ladj

    def initialise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        a, b = self._split(y)
        return self._join(self.layer.initialise(a.flatten(-2), context), b)

    def _split(self, x: Tensor) -> list[Tensor]:
        return list(x.unflatten(-1, self.size).split(self.halves, dim=-1))

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a.unflatten(-1, (self.size[0], -1)), b], dim=-1).flatten(-2)


def image_glow(
    dim: int,
    context_dim: int = 0,
    shape: Shape | None = None,
    levels: int = 2,
    steps: int = 4,
    hidden: int = 64,
    context_shape: Shape | None = None,
) -> Chain:
    """The multi-scale flow of images, as a flow of the flattened image (C, H, W).

    From the image inwards, each level trades four pixels for four times the
    channels, takes `steps` steps of Glow, and hands on half of the channels;
    what is left behind gets its mean and scale from the half that goes on. Beside that, every
    coordinate of the base has a mean and a scale of its own: convolutions know no place but
    the border, and pictures such as faces differ from place to place.
    Call ``flow.initialise(images)`` to start the normalisations from data.

    Args:
        dim: Length C H W of the flattened image.
        context_dim: Length of the context; 0 for an unconditional flow.
        shape: (C, H, W); one square grey image by default.
        levels: Number of levels; every level halves both sides.
        steps: Steps of each level.
        hidden: Channels of the two hidden layers of each coupling's network.
        context_shape: (C, H, W) of a context that is a feature map, flattened;
            by default the context is a vector, the same for all pixels.

    References:
        Kingma and Dhariwal (2018), "Glow: Generative Flow with Invertible 1x1
        Convolutions", arXiv:1807.03039, figure 2.
    """
    side = math.isqrt(dim)
    shape = (1, side, side) if shape is None else shape
    if math.prod(shape) != dim:
        raise ValueError(
            f"An image flow needs shape=(C, H, W) with C * H * W = dim = {dim}; got {shape}."
        )
    if levels < 1 or any(n % 2**levels for n in shape[1:]):
        raise ValueError(
            f"Every level halves both sides of the image: {shape[1]} x {shape[2]} cannot be "
            f"halved {levels} times. Choose another levels, at least 1, or pad the image."
        )
    if context_dim and context_shape is None:
        context_shape = (context_dim, 1, 1)
    if math.prod(context_shape or (0,)) != context_dim:
        raise ValueError(
            f"context_shape {context_shape} does not hold context_dim = {context_dim} numbers."
        )
    # Channels last, so that the channels of a pixel are adjacent.
    order = torch.arange(dim).reshape(shape).movedim(0, -1).flatten()
    inside = _level(shape, levels, steps, hidden, context_shape)
    return Chain([ActNorm(dim), inside, Permutation(order.argsort())])


def _level(
    shape: Shape, levels: int, steps: int, hidden: int, context_shape: Shape | None
) -> Chain:
    """One level and the levels within, on (H, W, C) flattened, from the base to the image."""
    small = (4 * shape[0], shape[1] // 2, shape[2] // 2)
    pixels = small[1] * small[2]

    def coupling() -> Layer:
        return ConvolutionalCoupling(small, hidden, context_shape)

    layers: list[Layer] = []
    if levels > 1:
        half = (small[0] // 2, *small[1:])
        within = _level(half, levels - 1, steps, hidden, context_shape)
        layers += [Split(within, small), coupling()]
    mixers, back = mixing(small[0], steps)
    for mixer in mixers:
        layers += [coupling(), Pixelwise(mixer, pixels)]
    return Chain([*layers, Pixelwise(back, pixels), _unsqueeze(shape)])


def _unsqueeze(shape: Shape) -> Permutation:
    """(H / 2, W / 2, 4 C) -> (H, W, C), both flattened: a square of pixels from each pixel."""
    channels, height, width = shape
    squares = torch.arange(math.prod(shape)).reshape(height // 2, width // 2, 2, 2, channels)
    return Permutation(squares.movedim(2, 1).flatten())


def _images(x: Tensor) -> Tensor:
    """(..., H, W, C) -> (N, C, H, W)."""
    return x.reshape(-1, *x.shape[-3:]).movedim(-1, 1)
