"""Base densities: the noise that a flow starts from."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Gamma
from torch.nn.functional import softplus

LOG_2PI = math.log(2 * math.pi)


class Base(nn.Module):
    """A density on R^D with reparameterised samples.

    Attributes:
        dim: Length D of a sample.
    """

    dim: int

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Draw samples, (*shape, D)."""
        raise NotImplementedError

    def log_prob(self, eps: Tensor) -> Tensor:
        """Score samples. (..., D) -> (...)."""
        raise NotImplementedError

    def score(self, eps: Tensor) -> Tensor:
        """Gradient of the log density at eps, a constant. (..., D) -> (..., D)."""
        with torch.enable_grad():
            eps = eps.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.log_prob(eps).sum(), eps)
        return found


class Normal(Base):
    """The standard normal.

    Args:
        dim: Length D of a sample.
    """

    zero: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("zero", torch.zeros(()))

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn((*shape, self.dim), dtype=self.zero.dtype, device=self.zero.device)

    def log_prob(self, eps: Tensor) -> Tensor:
        return -0.5 * (eps.square().sum(-1) + self.dim * LOG_2PI)

    def score(self, eps: Tensor) -> Tensor:
        return -eps.detach()


class StudentT(Base):
    r"""Independent Student t coordinates whose degrees of freedom are learnt.

    .. math::
        \epsilon = n \sqrt{\nu / (2 g)}, \quad n \sim N(0, 1), \; g \sim \Gamma(\nu / 2), \qquad
        \nu = 1 + \mathrm{softplus}(a)

    The derivative of g with respect to :math:`\nu` is that of implicit
    reparameterisation. An affine layer after the flow learns the scales.

    Args:
        dim: Length D of a sample.
        df: Degrees of freedom at the start, more than 1.

    References:
        Andrade (2024), "Stable Training of Normalizing Flows for
        High-dimensional Variational Inference", arXiv:2402.16408: t bases.
        Figurnov, Mohamed and Mnih (2018), "Implicit Reparameterization
        Gradients", arXiv:1805.08498.
    """

    def __init__(self, dim: int, df: float = 30.0) -> None:
        super().__init__()
        if df <= 1.0:
            raise ValueError(f"df must be more than 1, so that the mean exists; got {df}.")
        self.dim = dim
        # softplus(df - 1 + log(1 - e^(1 - df))) = df - 1
        self.raw = nn.Parameter(torch.full((dim,), df - 1.0 + math.log(-math.expm1(1.0 - df))))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom of each coordinate, (D)."""
        return 1.0 + softplus(self.raw)

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        half = 0.5 * self.df
        mixing = Gamma(half, half, validate_args=False).rsample(shape)
        return torch.randn_like(mixing) * mixing.rsqrt()

    def log_prob(self, eps: Tensor) -> Tensor:
        df = self.df
        norm = torch.lgamma(0.5 * (df + 1)) - torch.lgamma(0.5 * df) - 0.5 * (math.pi * df).log()
        return (norm - 0.5 * (df + 1) * torch.log1p(eps.square() / df)).sum(-1)


class GaussianMixture(Base):
    r"""A mixture of Gaussians with diagonal covariances and fixed weights.

    .. math:: p(\epsilon) = \sum_j \pi_j \, N(\epsilon; \mu_j, \mathrm{diag}(e^{2 s_j}))

    Means and scales are learnt, through the draws of their own component. The
    weights are not: the path derivative with respect to a weight moves draws
    from one mode to another, and its variance grows like one over the density
    between the modes. Where the weights matter take a mixture of flows as the
    guide, which is stratified over its components.

    Args:
        dim: Length D of a sample.
        components: Number of components.
        weights: Their weights, (components); equal by default.

    References:
        Izmailov, Kirichenko, Finzi and Wilson (2020), "Semi-Supervised Learning
        with Normalizing Flows", arXiv:1912.13025: flows on mixtures.
    """

    log_weights: Tensor

    def __init__(self, dim: int, components: int = 4, weights: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        equal = torch.full((components,), 1.0 / components)
        found = equal if weights is None else weights / weights.sum()
        if found.shape != (components,) or not bool((found > 0).all()):
            raise ValueError(
                f"weights must be {components} positive numbers, one for each component; "
                f"got {weights}."
            )
        self.register_buffer("log_weights", found.log())
        # Different means, so that components can separate; the total variance is about one.
        self.loc = nn.Parameter(0.5 * torch.randn(components, dim))
        self.log_scale = nn.Parameter(torch.full((components, dim), 0.5 * math.log(0.75)))

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True).reshape(shape)
        loc, log_scale = self.loc[which], self.log_scale[which]
        return loc + log_scale.exp() * torch.randn_like(loc)

    def log_prob(self, eps: Tensor) -> Tensor:
        standard = (eps.unsqueeze(-2) - self.loc) * (-self.log_scale).exp()
        norm = self.log_weights - self.log_scale.sum(-1) - 0.5 * self.dim * LOG_2PI
        return torch.logsumexp(norm - 0.5 * standard.square().sum(-1), dim=-1)
