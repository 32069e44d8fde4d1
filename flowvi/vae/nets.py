"""Encoders, from images to features, and decoders, from latent vectors to images."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowvi.vae.maps import Cropped, Padded, code_shape

Size = tuple[int, int]


class Encoder(nn.Module):
    """Features of an image, the context of a guide. (*B, H, W) -> (*B, C).

    Args:
        body: Module that maps (N, 1, H, W) to (N, C).
        width: Number of features C.
        centre: Pixel means, which are subtracted from an image, (H, W).
        scale: Divisor after that.
    """

    centre: Tensor

    def __init__(self, body: nn.Module, width: int, centre: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.body = body
        self.width = width
        self.scale = scale
        self.register_buffer("centre", centre)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.centre.dtype) - self.centre) / self.scale
        features: Tensor = self.body(x.reshape(-1, 1, *x.shape[-2:]))
        return features.reshape(*x.shape[:-2], self.width)


class Decoder(nn.Module):
    """Outputs for every pixel, the parameters of a likelihood. (*S, D) -> (*S, P, H, W).

    Args:
        body: Module that maps (N, D) to (N, P, H, W).
        bias: Learnt bias of every pixel, (P, H, W).
    """

    def __init__(self, body: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.body = body
        self.bias = nn.Parameter(bias)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.body(z.reshape(-1, z.shape[-1]))
        return out.reshape(*z.shape[:-1], *self.bias.shape) + self.bias


class Bodies(NamedTuple):
    """The inner modules of an encoder and a decoder, and the number of features between."""

    encoder: nn.Module
    width: int
    decoder: nn.Module


def mlp(
    size: Size,
    latent: int,
    outputs: int,
    hidden: Sequence[int] = (300, 300),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Bodies:
    """Fully connected layers, in the opposite order in the decoder.

    Args:
        size: (H, W) of an image.
        latent: Length D of the latent vector.
        outputs: Decoder outputs P for each pixel.
        hidden: Widths of the hidden layers of the encoder; the last is that of its features.
        activation: Activation after each hidden layer.
    """
    if not hidden:
        raise ValueError("hidden must name at least one width, such as (300, 300); got none.")
    pixels = size[0] * size[1]
    widths = [pixels, *hidden]
    encoder = [nn.Flatten(), *layers(widths, activation)]
    back = [*layers([latent, *reversed(hidden)], activation)]
    last = nn.Linear(hidden[0], outputs * pixels, bias=False)
    decoder = nn.Sequential(*back, last, nn.Unflatten(-1, (outputs, *size)))
    return Bodies(nn.Sequential(*encoder), hidden[-1], decoder)


class Gated(nn.Module):
    r"""A convolution times the sigmoid of another one, :math:`h(x) \, \sigma(g(x))`.

    The initial weights keep the variance of the input, where the sigmoid is about a half.
    With torch's own initial weights each layer loses nine tenths of the variance or more, and a
    decoder of five layers ignores its code at first.

    Args:
        conv: Convolution with twice as many channels as the result.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.conv = conv
        back = isinstance(conv, nn.ConvTranspose2d)
        inputs = conv.in_channels * math.prod(conv.kernel_size)
        inputs //= math.prod(conv.stride) if back else 1
        with torch.no_grad():
            h, _ = conv.weight.chunk(2, dim=1 if back else 0)
            h.normal_(std=2 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(self.conv(x), dim=-3)


def conv(size: Size, latent: int, outputs: int, channels: int = 16) -> Bodies:
    """Gated 5x5 convolutions that halve the image twice, without normalisation.

    Args:
        size: (H, W) of an image; both divisible by 4.
        latent: Length D of the latent vector.
        outputs: Decoder outputs P for each pixel.
        channels: Channels of the first layers; the published net has 32.

    References:
        Van den Berg, Hasenclever, Tomczak and Welling (2018), arXiv:1803.05649,
        appendix: the architecture, with 32 channels.
    """
    if any(n % 4 for n in size):
        raise ValueError(
            f"The convolutions halve both sides twice: {size[0]} x {size[1]} must be divisible "
            "by 4. Pad the images, or take net='mlp'."
        )
    c = channels
    small = (size[0] // 4, size[1] // 4)
    encoder = nn.Sequential(
        _down(1, c, 1),
        _down(c, c, 2),
        _down(c, 2 * c, 1),
        _down(2 * c, 2 * c, 2),
        _down(2 * c, 2 * c, 1),
        Gated(nn.Conv2d(2 * c, 2 * 8 * c, small)),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Unflatten(-1, (latent, 1, 1)),
        Gated(nn.ConvTranspose2d(latent, 2 * 2 * c, small)),
        _up(2 * c, 2 * c, 1),
        _up(2 * c, c, 2),
        _up(c, c, 1),
        _up(c, c, 2),
        _up(c, c, 1),
        nn.Conv2d(c, outputs, 1, bias=False),
    )
    return Bodies(encoder, 8 * c, decoder)


def maps(size: Size, latent: int, outputs: int, channels: int = 16) -> Bodies:
    """Gated convolutions to a code that is an image of a quarter of the sides, and back.

    The code keeps the spatial arrangement, which flows of images need; see `code_shape`.

    Args:
        size: (H, W) of an image.
        latent: Length D of the code.
        outputs: Decoder outputs P for each pixel.
        channels: Channels of the first layers.
    """
    c, code = channels, code_shape(size, latent)
    encoder = nn.Sequential(
        Padded(size),
        _down(1, c, 1),
        _down(c, c, 2),
        _down(c, 2 * c, 2),
        _down(2 * c, 2 * c, 1),
        nn.Conv2d(2 * c, code[0], 1),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Unflatten(-1, code),
        _up(code[0], 2 * c, 1),
        _up(2 * c, c, 2),
        _up(c, c, 2),
        _up(c, c, 1),
        nn.Conv2d(c, outputs, 1, bias=False),
        Cropped(size),
    )
    return Bodies(encoder, latent, decoder)


NETS: dict[str, Callable[..., Bodies]] = {"conv": conv, "maps": maps, "mlp": mlp}


def layers(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> list[nn.Module]:
    """Linear layers from each width to the next, with an activation after each."""
    return [m for pair in pairwise(widths) for m in (nn.Linear(*pair), activation())]


def _down(inputs: int, outputs: int, stride: int) -> Gated:
    return Gated(nn.Conv2d(inputs, 2 * outputs, 5, stride, 2))


def _up(inputs: int, outputs: int, stride: int) -> Gated:
    return Gated(nn.ConvTranspose2d(inputs, 2 * outputs, 5, stride, 2, stride - 1))


def pixel_means(x: Tensor) -> Tensor:
    """Mean image of a data set, (N, H, W) -> (H, W), in the default precision."""
    return x.to(torch.get_default_dtype()).mean(0)
