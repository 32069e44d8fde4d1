"""Measures of a trained autoencoder: active units, reconstructions, interpolations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowvi.guides.guide import Guide
from flowvi.vae.model import Generator

# A unit whose posterior mean varies less than this between images is inactive.
ACTIVE = 0.01
CHUNK = 500


@dataclass(frozen=True)
class ActiveUnits:
    """How much the posterior mean of every latent coordinate varies over images.

    Attributes:
        variance: Var_x E_q[z | x], an unbiased estimate that may fall below zero, (D).
        threshold: A unit above it is active.
    """

    variance: np.ndarray
    threshold: float = ACTIVE

    @property
    def count(self) -> int:
        """Number of active units."""
        return int((self.variance > self.threshold).sum())

    def __str__(self) -> str:
        return (
            f"{self.count} of {len(self.variance)} units active (variance above {self.threshold:g})"
        )


def active_units(guide: Guide, x: Tensor, draws: int = 64, seed: int = 0) -> ActiveUnits:
    r"""Units whose posterior mean depends on the image, for a guide of any kind.

    The posterior mean of a flow has no formula, so it is a mean of draws, whose
    own variance is taken off:

    .. math::
        \mathrm{Var}_x \, \bar z(x) - \frac{1}{S} \, \mathrm{E}_x \, s^2(x),

    with :math:`\bar z` the mean and :math:`s^2` the variance of S draws for one image.
    Coordinates of a flow's latent space are not comparable from one family to another.

    Args:
        guide: A guide whose context are images.
        x: Images, (N, H, W).
        draws: Draws S for each image.
        seed: Of the draws.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv:1509.00519, section 5.2.
    """
    if draws < 2 or len(x) < 2:
        raise ValueError(
            f"Active units need at least two images and two draws of each; got {len(x)} images "
            f"and draws={draws}."
        )
    mean, variance = moments(guide, x, draws, seed)
    return ActiveUnits((mean.var(0) - variance.mean(0) / draws).numpy())


def moments(guide: Guide, x: Tensor, draws: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance of z given each image, by draws. (N, H, W) -> (N, D), (N, D), doubles."""
    found = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for rows in x.split(CHUNK):
            z = guide.sample((draws,), rows).z.double().cpu()
            found.append((z.mean(0), z.var(0)))
    mean, variance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mean, variance


def draws_of(guide: Guide, x: Tensor, n: int = 1, seed: int = 0) -> Tensor:
    """Draws of z given images, (n, N, D)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return guide.sample((n,), x).z


def reconstructions(generator: Generator, guide: Guide, x: Tensor, seed: int = 0) -> Tensor:
    """The mean image of one draw of z for every image. (N, H, W) -> (N, H, W), from 0 to 1."""
    return generator.mean(draws_of(guide, x, 1, seed)[0])


def interpolation(
    generator: Generator, guide: Guide, start: Tensor, end: Tensor, steps: int = 9
) -> Tensor:
    r"""Images on the way from some images to others.

    The path between two draws of z turns and stretches by even steps, since a
    straight line would pass through vectors shorter than any that a normal
    prior has: with :math:`\omega` the angle between a and b,

    .. math:: z_t = \frac{\sin((1 - t) \omega) \, a + \sin(t \omega) \, b}{\sin \omega}.

    Args:
        generator: The model of images.
        guide: A guide whose context are images.
        start: Images, (N, H, W).
        end: Images, (N, H, W).
        steps: Number of images T on the way, ends included.

    Returns:
        Images, (N, T, H, W), from 0 to 1.

    References:
        White (2016), "Sampling Generative Networks", arXiv:1609.04468.
    """
    a, b = (draws_of(guide, x)[0] for x in (start, end))
    return generator.mean(great_circle(a, b, steps))


def great_circle(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Points from a to b by even turns, (N, D) -> (N, T, D); a line where they are parallel."""
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).reshape(-1, 1)
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    sine = angle.sin()
    straight = (1 - t) * a + t * b
    turned = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine.clamp_min(1e-6)
    return torch.where(sine < 1e-3, straight, turned)


def traversal(generator: Generator, z: Tensor, units: list[int], values: Tensor) -> Tensor:
    """Images as one coordinate of z takes other values. (D) -> (units, values, H, W)."""
    changed = z.repeat(len(units), len(values), 1)
    for i, unit in enumerate(units):
        changed[i, :, unit] = values
    return generator.mean(changed)
