"""Guides of a VAE by name: every parameter of every layer is a function of the image's features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.flows import FLOWS, Chain, Diagonal, Layer, Triangular
from flowvi.flows.nets import required
from flowvi.guides.guide import Guide
from flowvi.guides.pushforward import FlowGuide
from flowvi.runtime.arguments import check_choice

# Log scale of a fresh guide.
START = -1.0


def posterior(name: str, dim: int, context_dim: int, **sizes: Any) -> Guide:
    """Build a guide that reads features: a row of `POSTERIORS`.

    Args:
        name: Its name.
        dim: Length D of the latent vector.
        context_dim: Number of features C.
        **sizes: Of the flow, such as its depth.
    """
    check_choice("guide of a VAE", name, sorted(POSTERIORS))
    try:
        return POSTERIORS[name](dim, context_dim, **sizes)
    except TypeError:
        words = ", ".join(f"{key}={value}" for key, value in sizes.items())
        raise ValueError(f"The guide '{name}' does not take {words}.") from None


def amortised(flow: str, **defaults: Any) -> Callable[..., Guide]:
    """A builder of a narrow normal around a function of the features, pushed through a flow.

    The flow sees where in the latent space the normal lies, and can bring the posteriors of all
    images together to the prior; all of its parameters are functions of the features as well.
    Scales and shifts of all images alike come last.

    Args:
        flow: Row of `FLOWS`.
        **defaults: Its sizes, unless others are asked for.
    """

    def build(dim: int, context_dim: int, **sizes: Any) -> Guide:
        layers = FLOWS[flow](dim, context_dim, **{**defaults, **sizes})
        first = attentive(Diagonal(dim, context_dim))
        return FlowGuide(dim, Chain([first, layers]), Diagonal(dim))

    return build


def attentive(affine: Diagonal | Triangular) -> Any:
    """Let an affine layer start as a narrow normal around a random function of the features.

    If a guide starts as the prior for every image, the decoder learns to ignore z
    (posterior collapse).
    """
    dim = len(affine.origin)
    assert affine.params.weight is not None
    with torch.no_grad():
        affine.params.value[dim:] = START
        nn.init.normal_(affine.params.weight[:dim], std=affine.params.weight.shape[1] ** -0.5)
    return affine


def gaussian(dim: int, context_dim: int) -> Guide:
    """A normal with independent coordinates."""
    return FlowGuide(dim, Chain([]), attentive(Diagonal(dim, context_dim)))


def fullrank(dim: int, context_dim: int) -> Guide:
    """A normal with a matrix of correlations that all images share."""
    return FlowGuide(dim, Chain([]), attentive(Triangular(dim, context_dim)))


class Shifted(Layer):
    r"""Shift by a function of the context, after scales that do not depend on it.

    .. math:: c = E(x) + e^{s} \odot u, \qquad \log|\det \partial c / \partial u| = \sum_i s_i

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context.
    """

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        self.shift = nn.Linear(context_dim, dim)
        self.log_scale = nn.Parameter(torch.full((dim,), START))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift = self.shift(required(context, self.shift.in_features))
        y = shift + self.log_scale.exp() * x
        return y, self.log_scale.sum().expand(y.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift = self.shift(required(context, self.shift.in_features))
        x = (y - shift) * (-self.log_scale).exp()
        return x, -self.log_scale.sum().expand(x.shape[:-1])


def fvae(dim: int, context_dim: int, flow: str = "realnvp", **sizes: Any) -> FlowGuide:
    r"""The f-VAE posterior: an unconditional flow of a shifted normal.

    .. math:: z = F(s_1 u + E(x)), \qquad u \sim N(0, I)

    The image enters by the shift alone. F ends in scales and shifts of its own.

    Args:
        dim: Length D of the latent vector.
        context_dim: Number of features C.
        flow: Row of `FLOWS` that is F.
        **sizes: Of the flow, such as its depth.

    References:
        Su and Wu (2018), "f-VAEs: Improve VAEs with Conditional Flows",
        arXiv:1809.05861, section 3.
    """
    return FlowGuide(
        dim, Chain([Shifted(dim, context_dim), FLOWS[flow](dim, **sizes)]), Diagonal(dim)
    )


def shifted(dim: int, context_dim: int) -> FlowGuide:
    r"""A normal whose mean alone depends on the image, :math:`N(E(x), s_1^2)`.

    With a flow prior, and a decoder that reads z, it is the model that the
    authors of f-VAE ran.

    Args:
        dim: Length D of the latent vector.
        context_dim: Number of features C.
    """
    return FlowGuide(dim, Shifted(dim, context_dim), Diagonal(dim))


POSTERIORS: dict[str, Callable[..., Guide]] = {
    "coupling": amortised("realnvp", depth=4, hidden=300),
    "fullrank": fullrank,
    "fvae": fvae,
    "gaussian": gaussian,
    "householder": amortised("householder"),
    "iaf": amortised("iaf", depth=2, hidden=300),
    "planar": amortised("planar", depth=4),
    "radial": amortised("radial", depth=4),
    "shifted": shifted,
    "spline": amortised("nsf_coupling", depth=2, hidden=128),
    "spline_autoregressive": amortised("nsf_autoregressive", depth=2, hidden=128),
    "sylvester": amortised("sylvester"),
    "sylvester_householder": amortised("sylvester_householder"),
    "sylvester_triangular": amortised("sylvester_triangular"),
}
