"""Normalizing flows: bijections of R^D with their log determinant, one file per family.

`FLOWS` maps a name to a builder, ``builder(dim, context_dim=0, **sizes) -> Layer``.
"""

from collections.abc import Callable

from flowvi.flows.adapter import FromTransform
from flowvi.flows.affine import Diagonal, Triangular
from flowvi.flows.autoregressive import Autoregressive, iaf, maf, nsf_autoregressive
from flowvi.flows.bases import Base, GaussianMixture, Normal, StudentT
from flowvi.flows.continuous import Continuous
from flowvi.flows.coupling import (
    AffineCoupling,
    Coupling,
    marginals,
    nice,
    nsf_coupling,
    realnvp,
    realnvp_clamped,
)
from flowvi.flows.glow import ActNorm, InvertibleLinear, glow
from flowvi.flows.householder import Householder, householder
from flowvi.flows.image import image_glow
from flowvi.flows.kronecker import Kronecker
from flowvi.flows.layer import Chain, Inverse, Layer, SinglePrecision
from flowvi.flows.lowrank import LowRank
from flowvi.flows.neural_autoregressive import naf
from flowvi.flows.permute import Flip, Permutation, permutation
from flowvi.flows.planar import Planar, planar
from flowvi.flows.radial import Radial, radial
from flowvi.flows.spline import Spline, spline
from flowvi.flows.sylvester import (
    Sylvester,
    TriangularSylvester,
    sylvester,
    sylvester_householder,
    sylvester_triangular,
)
from flowvi.flows.tails import Loft, SinhArcsinh, loft

__all__ = [
    "BASES",
    "FLOWS",
    "ActNorm",
    "AffineCoupling",
    "Autoregressive",
    "Base",
    "Chain",
    "Continuous",
    "Coupling",
    "Diagonal",
    "Flip",
    "FromTransform",
    "GaussianMixture",
    "Householder",
    "Inverse",
    "InvertibleLinear",
    "Kronecker",
    "Layer",
    "Loft",
    "LowRank",
    "Normal",
    "Permutation",
    "Planar",
    "Radial",
    "SinglePrecision",
    "SinhArcsinh",
    "Spline",
    "StudentT",
    "Sylvester",
    "Triangular",
    "TriangularSylvester",
]


FLOWS: dict[str, Callable[..., Layer]] = {
    "affine": Triangular,
    "affine_diagonal": Diagonal,
    "affine_kronecker": Kronecker,
    "affine_lowrank": LowRank,
    "ffjord": Continuous,
    "glow": glow,
    "householder": householder,
    "iaf": iaf,
    "image_glow": image_glow,
    "loft": loft,
    "maf": maf,
    "marginals": marginals,
    "naf": naf,
    "nice": nice,
    "nsf_autoregressive": nsf_autoregressive,
    "nsf_coupling": nsf_coupling,
    "permutation": permutation,
    "planar": planar,
    "radial": radial,
    "realnvp": realnvp,
    "realnvp_clamped": realnvp_clamped,
    "sinh_arcsinh": SinhArcsinh,
    "spline": spline,
    "sylvester": sylvester,
    "sylvester_householder": sylvester_householder,
    "sylvester_triangular": sylvester_triangular,
}

# Base densities of guides: name -> builder(dim).
BASES: dict[str, Callable[..., Base]] = {
    "gaussian_mixture": GaussianMixture,
    "normal": Normal,
    "student_t": StudentT,
}
