"""Normalizing flows: bijections of R^D with their log determinant, one file per family.

`FLOWS` maps a name to a builder, ``builder(dim, context_dim=0, **sizes) -> Layer``.
"""

from collections.abc import Callable

from flowvi.flows.affine import Diagonal, Triangular
from flowvi.flows.coupling import AffineCoupling
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.permute import Flip, Permutation, mixed, random_order
from flowvi.flows.planar import Planar
from flowvi.flows.radial import Radial
from flowvi.flows.spline import Spline

__all__ = [
    "FLOWS",
    "AffineCoupling",
    "Chain",
    "Diagonal",
    "Flip",
    "Layer",
    "Permutation",
    "Planar",
    "Radial",
    "Spline",
    "Triangular",
    "planar",
    "radial",
    "realnvp",
    "spline",
]


def realnvp(dim: int, context_dim: int = 0, depth: int = 8, hidden: int = 64) -> Chain:
    """Affine couplings that move the two halves of the vector in turn.

    Halves are drawn anew after each pair of couplings: coordinates of one half
    would otherwise meet only through the other. One coordinate has no halves:
    at D = 1 this is `spline`.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of couplings.
        hidden: Width of the two hidden layers of each network.
    """
    if dim == 1:
        return spline(dim, context_dim)
    layers = [AffineCoupling(dim, context_dim, hidden, swap=i % 2 == 1) for i in range(depth)]
    return mixed([Chain(layers[i : i + 2]) for i in range(0, depth, 2)], dim)


def planar(dim: int, context_dim: int = 0, depth: int = 8) -> Chain:
    """Planar layers, one after the other."""
    return Chain(Planar(dim, context_dim) for _ in range(depth))


def radial(dim: int, context_dim: int = 0, depth: int = 8) -> Chain:
    """Radial layers, one after the other."""
    return Chain(Radial(dim, context_dim) for _ in range(depth))


def spline(dim: int, context_dim: int = 0, depth: int = 4, bins: int = 8) -> Chain:
    """Splines of each coordinate and triangular affine maps in turn, in alternating order."""
    layers: list[Layer] = []
    for _ in range(depth):
        layers += [Spline(dim, context_dim, bins), Triangular(dim, context_dim), Flip()]
    return Chain(layers)


def permutation(dim: int, context_dim: int = 0, seed: int = 0) -> Permutation:
    """A fixed random order of the coordinates; it has no parameters and ignores the context."""
    return Permutation(random_order(dim, seed))


FLOWS: dict[str, Callable[..., Layer]] = {
    "affine": Triangular,
    "affine_diagonal": Diagonal,
    "permutation": permutation,
    "planar": planar,
    "radial": radial,
    "realnvp": realnvp,
    "spline": spline,
}
