"""Symmetries of a density: labels that can be swapped, and signs that can be turned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from flowvi.guides.mixtures import MixtureGuide
from flowvi.targets import ModelError, Target

Values = dict[str, Tensor]

# Largest number of labels whose permutations a mixture can cover: four have 24. The units of a
# network have many more, but predictions do not depend on their order.
MOST_LABELS = 3
# Largest number of sites for which sign flips of pairs are tested.
MOST_FLIPPED = 8
# Number of points at which densities are compared, and tolerances: absolute in nats, relative.
PLACES, ROUNDING = 4, (1e-3, 1e-5)


class Symmetry(NamedTuple):
    """A change of the values that leaves the density as it is.

    Attributes:
        description: Description of the symmetry, for the log.
        images: Maps values (P, *shape) by site to all their images.
    """

    description: str
    images: Callable[[Values], Iterator[Values]]


def symmetries(target: Target, places: Tensor) -> list[Symmetry]:
    """The symmetries of a density, among those that models often have.

    Entries of one or all sites along axes of one length trade places, as the labels of
    a mixture's components do; one or two real sites change their sign, as loadings and
    factors do. The density in question is that of the sites' own values.

    Args:
        target: The log density.
        places: Points to compare it at, (N, D).
    """
    z = places[:PLACES]
    if len(z) < PLACES:
        return []
    values, density = _density(target, z)
    near = ROUNDING[0] + ROUNDING[1] * density.abs()

    def same(moved: Values) -> bool:
        try:
            other = _density(target, target.unconstrain(moved))[1]
        except (ValueError, RuntimeError):
            return False  # outside of a support, as a matrix whose rows alone are swapped
        return bool(((other - density).abs() <= near).all())

    all_found: list[Symmetry] = []
    for guesses in (_permutations(values), _sign_flips(target)):
        found: list[set[str]] = []
        for names, symmetry in guesses:
            # Subsets of sites with a known joint symmetry of the kind are not tested.
            if not any(set(names) <= known for known in found) and all(
                same(moved) for moved in itertools.islice(symmetry.images(values), 2)
            ):
                found.append(set(names))
                all_found.append(symmetry)
    return all_found


def sentences(target: Target, guide: MixtureGuide) -> list[str]:
    """What the symmetries of a density mean for summaries of a guide's draws, a sentence each.

    A symmetry counts if it takes a draw from one component of the guide to another.

    Args:
        target: The log density.
        guide: A mixture over several modes.
    """
    with torch.no_grad():
        z = guide.sample((PLACES,)).z
        component = guide.log_component_densities(z).argmax(-1)
        values, said = _density(target, z)[0], []
        for symmetry in symmetries(target, z):
            moved = [target.unconstrain(image) for image in symmetry.images(values)]
            if any((guide.log_component_densities(m).argmax(-1) != component).any() for m in moved):
                said.append(
                    f"By symmetry {symmetry.description} without a change of the density: means "
                    "and sds are averages over these copies. An order, or a sign, fixed in the "
                    "model gives those of one copy."
                )
    return said


def images(target: Target, found: Sequence[Symmetry], z: Tensor) -> Tensor:
    """Images of a point under symmetries, (D) -> (N, D)."""
    values = _density(target, z[None])[0]
    moved = [target.unconstrain(image) for s in found for image in s.images(values)]
    return torch.cat([z.new_zeros(0, len(z)), *moved])


@torch.no_grad()
def _density(target: Target, z: Tensor) -> tuple[Values, Tensor]:
    """Values of the sites at points (P, D), and the log density of these values, (P)."""
    log_p, values = target.log_prob(z), target.constrain(z)
    try:
        # Permutations and sign flips change only the Jacobians of some maps, such as Pyro's map
        # to the simplex.
        ladjs = target.latents(z)[1].values()
        log_p = log_p - sum(ladj.reshape(len(z), -1).sum(-1) for ladj in ladjs)
    except ModelError:
        pass
    return {name: values[name] for name in target.sites}, log_p


def _permutations(values: Values) -> Iterator[tuple[list[str], Symmetry]]:
    """Guesses at sites whose entries can trade places."""
    sizes = sorted({n for v in values.values() for n in v.shape[1:] if 2 <= n <= MOST_LABELS})
    for size in sizes:
        having = [name for name, v in values.items() if size in v.shape[1:]]
        for names in [having, *([name] for name in having if len(having) > 1)]:
            words = f"entries of {_listed(names)} can be permuted"
            # Permute all axes of this length, as in a transition matrix, or the first only.
            every = {
                n: [d for d, m in enumerate(values[n].shape) if d and m == size] for n in names
            }
            first = {n: axes[:1] for n, axes in every.items()}
            for axes in [every, *([first] if first != every else [])]:
                yield names, Symmetry(words, _permute_entries(axes, size))


def _permute_entries(axes: dict[str, list[int]], size: int) -> Callable[[Values], Iterator[Values]]:
    orders = list(itertools.permutations(range(size)))[1:]

    def images(values: Values) -> Iterator[Values]:
        for order in orders:
            moved = dict(values)
            for name, dims in axes.items():
                for d in dims:
                    at = torch.tensor(order, device=moved[name].device)
                    moved[name] = moved[name].index_select(d, at)
            yield moved

    return images


def _sign_flips(target: Target) -> Iterator[tuple[list[str], Symmetry]]:
    """Guesses at real sites whose sign can be turned."""
    real = [name for name, site in target.sites.items() if _is_real(site.support)][:MOST_FLIPPED]
    for names in [*([name] for name in real), *map(list, itertools.combinations(real, 2))]:

        def images(values: Values, names: list[str] = names) -> Iterator[Values]:
            yield values | {name: -values[name] for name in names}

        yield names, Symmetry(f"the sign of {_listed(names)} can be flipped", images)


def _is_real(support: Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
