"""Facts about each family of flows, for the table of the documentation."""

from __future__ import annotations

from typing import Literal, NamedTuple

Inverse = Literal["closed", "numeric"]


class Facts(NamedTuple):
    """One row of the table.

    Attributes:
        sample: Cost of a draw and its density; L layers, H hidden units, M directions.
        score: Cost of the density of a point from elsewhere.
        inverse: In closed form, or numeric, to rounding unless `use` says otherwise.
        universal: Whether it is known to approach every density on R^D, with enough layers
            and width.
        use: When to take it.
    """

    sample: str
    score: str
    inverse: Inverse
    universal: bool
    use: str


FACTS = {
    "affine": Facts("D²", "D²", "closed", False, "a Gaussian posterior"),
    "affine_diagonal": Facts("D", "D", "closed", False, "a first look; very large D"),
    "affine_kronecker": Facts(
        "D √D", "D √D", "closed", False, "the weights of a dense layer, as a matrix normal"
    ),
    "affine_lowrank": Facts(
        "D rank", "D rank", "closed", False, "a Gaussian with few strong correlations, large D"
    ),
    "ffjord": Facts(
        "20-100 networks",
        "20-100 networks",
        "numeric",
        True,
        "smooth densities without a split of the coordinates; exact to the solver's tolerance",
    ),
    "glow": Facts("L (D H + D²)", "L (D H + D²)", "closed", True, "D up to a few hundred; priors"),
    "householder": Facts(
        "D reflections", "D reflections", "closed", False, "a Gaussian rotated by few reflections"
    ),
    "iaf": Facts("L D H", "L D² H", "closed", True, "posteriors, D up to a hundred"),
    "image_glow": Facts(
        "L convolutions", "L convolutions", "closed", False, "images, as prior or decoder"
    ),
    "loft": Facts("D", "D", "closed", False, "the last layer of a deep flow, against overflow"),
    "maf": Facts("L D² H", "L D H", "closed", True, "priors, and fits to given draws"),
    "marginals": Facts(
        "L D H + D bins",
        "L D H + D bins",
        "closed",
        False,
        "many modes along the axes, from a wide start; a fit tries it automatically",
    ),
    "naf": Facts(
        "L D H", "20 L D² H", "numeric", True, "posteriors far from normal, D up to about 20"
    ),
    "nice": Facts("L D H", "L D H", "closed", False, "a baseline: its log determinant is constant"),
    "nsf_autoregressive": Facts(
        "L D H",
        "L D² H",
        "closed",
        True,
        "densities far from normal, within five sds of the centre",
    ),
    "nsf_coupling": Facts(
        "L D H",
        "L D H",
        "closed",
        True,
        "densities far from normal, if log densities must be cheap too",
    ),
    "permutation": Facts("D", "D", "closed", False, "between the layers of a flow of your own"),
    "planar": Facts("L D", "L D", "numeric", False, "D of two or three; amortised flows"),
    "radial": Facts(
        "L D",
        "L D",
        "closed",
        False,
        "one local expansion or contraction per layer; amortised flows",
    ),
    "realnvp": Facts("L D H", "L D H", "closed", True, "posteriors; the default"),
    "realnvp_clamped": Facts(
        "L D H", "L D H", "closed", True, "D of hundreds and more, heavy tails: training is stable"
    ),
    "sinh_arcsinh": Facts("D", "D", "closed", False, "skew and tails of single coordinates"),
    "spline": Facts(
        "L D²", "L D²", "closed", False, "marginals far from normal, linear dependence; D = 1"
    ),
    "sylvester": Facts(
        "L D M", "L D M", "numeric", False, "amortised flows of more capacity than planar"
    ),
    "sylvester_householder": Facts(
        "L D²", "L D²", "numeric", False, "like sylvester, in all D directions"
    ),
    "sylvester_triangular": Facts(
        "L D²", "L D²", "numeric", False, "like sylvester, without an orthogonal basis"
    ),
}
