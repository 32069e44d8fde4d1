"""Priors of weights: each samples the sites of one tensor of a network, and returns its value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

GAINS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Weight:
    """One tensor of parameters of a module.

    Args:
        name: Its name in the module.
        value: The parameter itself, of any shape.
        fan_in: How many inputs each output adds up; 1 for biases, gains and embeddings.
        centre: Neutral value: 1 for the gains of normalisation layers, 0 otherwise.
        dtype: Precision in which the model runs.
    """

    name: str
    value: nn.Parameter
    fan_in: int
    centre: float
    dtype: torch.dtype

    def full(self, number: float, shape: tuple[int, ...] | None = None) -> Tensor:
        """A constant of the weight's shape, or another, in the model's precision."""
        size = self.value.shape if shape is None else shape
        return torch.full(size, number, dtype=self.dtype, device=self.value.device)

    def sample(self, name: str, fn: dist.TorchDistribution) -> Tensor:
        """Sample a site, all of whose axes belong to one value."""
        value: Tensor = pyro.sample(name, fn.to_event(len(fn.batch_shape)))
        return value

    def standard(self, suffix: str) -> Tensor:
        """A standard normal site of the weight's shape."""
        return self.sample(f"{self.name}.{suffix}", dist.Normal(self.full(0.0), 1.0))

    def reported(self, value: Tensor) -> Tensor:
        """Report a weight that is computed from its sites."""
        out: Tensor = pyro.deterministic(self.name, value, event_dim=value.dim())
        return out


def weight_of(module: nn.Module, name: str, dtype: torch.dtype) -> Weight:
    """A named parameter of a module, with the fan-in and centre of its layer."""
    path, _, leaf = name.rpartition(".")
    owner, value = module.get_submodule(path), module.get_parameter(name)
    fan_in = 1
    if value.dim() > 1 and not isinstance(owner, LOOKED_UP):
        # A transposed convolution keeps its inputs on the first axis.
        axis = 1 if isinstance(owner, TRANSPOSED) else 0
        fan_in = value.numel() // value.shape[axis]
    gain = isinstance(owner, GAINS) and leaf == "weight"
    return Weight(name, value, fan_in, float(gain), dtype)


# Samples the sites of one tensor of parameters, and returns its value.
Prior = Callable[[Weight], Tensor]


@dataclass(frozen=True)
class Normal:
    r"""Independent normals, :math:`w \sim N(c, s^2 / \mathrm{fan\ in})`.

    Outputs of a layer then keep the scale s of its inputs, however wide it is.

    Args:
        scale: Standard deviation s before the division.
    """

    scale: float = 1.0

    def __call__(self, weight: Weight) -> Tensor:
        spread = self.scale / math.sqrt(weight.fan_in)
        return weight.sample(weight.name, dist.Normal(weight.full(weight.centre), spread))


@dataclass(frozen=True)
class Laplace:
    r"""Independent Laplace weights of standard deviation :math:`s / \sqrt{\mathrm{fan\ in}}`.

    Args:
        scale: Standard deviation s before the division.
    """

    scale: float = 1.0

    def __call__(self, weight: Weight) -> Tensor:
        spread = self.scale / math.sqrt(2 * weight.fan_in)
        return weight.sample(weight.name, dist.Laplace(weight.full(weight.centre), spread))


@dataclass(frozen=True)
class Hierarchical:
    r"""Normals whose scale is learnt, one for each tensor.

    .. math:: \sigma \sim N^+(0, s^2), \quad \epsilon \sim N(0, 1), \qquad
        w = c + \sigma \epsilon / \sqrt{\mathrm{fan\ in}}

    The sites are ``<name>.scale`` and ``<name>.raw``; the weight is reported.

    Args:
        scale: Scale s of the half-normal.
    """

    scale: float = 1.0

    def __call__(self, weight: Weight) -> Tensor:
        sigma = weight.sample(f"{weight.name}.scale", dist.HalfNormal(weight.full(self.scale, ())))
        spread = sigma / math.sqrt(weight.fan_in)
        return weight.reported(weight.centre + spread * weight.standard("raw"))


@dataclass(frozen=True)
class Horseshoe:
    r"""A few large weights among many next to zero.

    .. math:: \tau \sim C^+(0, s), \quad \lambda_i \sim C^+(0, 1), \quad \epsilon \sim N(0, 1),
        \qquad w_i = c + \tau \lambda_i \epsilon_i / \sqrt{\mathrm{fan\ in}}

    The sites are ``<name>.scale``, ``<name>.local`` and ``<name>.raw``; the weight is
    reported.

    Args:
        scale: Scale s of the common half-Cauchy.
        by_input: One :math:`\lambda` for all weights of an input (the second axis), which
            switches whole inputs off, instead of one for each weight.

    References:
        Carvalho, Polson and Scott (2010), "The horseshoe estimator for sparse signals".
        Ghosh, Yao and Doshi-Velez (2018), "Structured Variational Learning of Bayesian
        Neural Networks with Horseshoe Priors", arXiv:1806.05975: by unit.
    """

    scale: float = 1.0
    by_input: bool = False

    def __call__(self, weight: Weight) -> Tensor:
        name, shape = weight.name, tuple(weight.value.shape)
        tau = weight.sample(f"{name}.scale", dist.HalfCauchy(weight.full(self.scale, ())))
        if self.by_input and len(shape) > 1:
            shape = (1, shape[1], *(1 for _ in shape[2:]))
        local = weight.sample(f"{name}.local", dist.HalfCauchy(weight.full(1.0, shape)))
        spread = tau / math.sqrt(weight.fan_in) * local
        return weight.reported(weight.centre + spread * weight.standard("raw"))


@dataclass(frozen=True)
class UnitScales:
    r"""A latent scale for each output, of directions that are learnt or latent.

    .. math:: g_j \sim N(0, s^2), \qquad w_j = g_j \, v_j / \|v_j\|

    The directions v are parameters of the target, trained in the fit; they
    start at the values that the module has. A flow over all scales is a Bayesian
    hypernetwork. Biases and gains are normal, as in `Normal`. With latent directions, v is
    standard normal: then every direction is as likely as any other.

    The sites are ``<name>.scale``, (outputs), and, where latent, ``<name>.direction``; the
    weight is reported.

    Args:
        scale: Standard deviation s.
        directions: Whether the directions are latent.

    References:
        Krueger, Huang, Islam, Turner, Lacoste and Courville (2017), "Bayesian
        Hypernetworks", arXiv:1710.04759.
    """

    scale: float = 1.0
    directions: bool = False

    def __call__(self, weight: Weight) -> Tensor:
        if weight.value.dim() < 2:
            return Normal(self.scale)(weight)
        if self.directions:
            v = weight.standard("direction").flatten(1)
        else:
            v = pyro.param(f"{weight.name}.direction", weight.value).to(weight.dtype).flatten(1)
        unit = v / v.norm(dim=1, keepdim=True)
        prior = dist.Normal(weight.full(0.0, (len(v),)), self.scale)
        g = weight.sample(f"{weight.name}.scale", prior)
        return weight.reported((g[:, None] * unit).reshape(weight.value.shape))


PRIORS: dict[str, Callable[..., Prior]] = {
    "hierarchical": Hierarchical,
    "horseshoe": Horseshoe,
    "laplace": Laplace,
    "normal": Normal,
    "unit_scales": UnitScales,
}
