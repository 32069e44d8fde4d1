"""Records of a model beside its density."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from flowvi.targets.imputed import Missing
from flowvi.targets.recording.batched import PointFunction


class Simulator(Protocol):
    """Draws the data given latent values, or everything, or the latents alone."""

    def __call__(
        self,
        given: Mapping[str, np.ndarray] | None,
        n: int,
        seed: int,
        latents_only: bool = False,
    ) -> dict[str, np.ndarray]: ...


# Draws latent vectors (n, D), and data by site: (n, seed, tensors among the arguments) -> both.
JointSimulator = Callable[[int, int, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

# Runs the model on other arguments: (latent values, arguments, keyword arguments, seed) -> draws
# of all other sites, and the log likelihood of the data among the arguments.
Rerun = Callable[
    [Mapping[str, np.ndarray], tuple[Any, ...], dict[str, Any], int, Collection[str]],
    tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
]


class ModelError(ValueError):
    """The model cannot be written as a density on R^D."""


@dataclass(frozen=True)
class Site:
    """A named value of the model.

    Args:
        shape: Shape of one value, in the space that the user named it in.
        support: Where the value lies.
        dims: A name for each axis; empty to have them made up.
    """

    shape: tuple[int, ...] = ()
    support: Constraint = constraints.real
    dims: tuple[str, ...] = ()


@dataclass
class Facts:
    """Facts about a model, beside its density.

    Args:
        name: Name of the model.
        sites: Latent sites, in the model's order.
        slices: Columns of z that belong to each site.
        deterministics: Names of derived values that are reported.
        observed: Data at the observed sites.
        constants: Data that the model was called with and does not observe.
        dims: For each of all these names, a name for each axis.
        improper: Sites whose prior has no integral.
        subsampled: Plates that are subsampled: size and batch size.
        parameters: Parameters of the model itself, with the constraints on their values.
        discrete: Discrete sites that are summed out, with a name for each axis.
        missing: Missing elements of observations, which are latent.
        masked: Latents whose prior is masked out, with a message for each.
    """

    name: str
    sites: dict[str, Site]
    slices: dict[str, slice]
    deterministics: tuple[str, ...] = ()
    observed: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    improper: tuple[str, ...] = ()
    subsampled: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters: dict[str, Constraint] = field(default_factory=dict)
    discrete: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: tuple[Missing, ...] = ()
    masked: dict[str, str] = field(default_factory=dict)

    def sizes(self) -> str:
        """How many columns of z each site has, in words."""
        columns = {name: s.stop - s.start for name, s in self.slices.items()}
        return ", ".join(f"{name} {n}" for name, n in columns.items() if name in self.sites)


@dataclass(frozen=True)
class Functions:
    """Functions of one point, by which a target answers.

    Args:
        values: z (D,) -> reported values, latents and deterministics.
        inverse: Flattened values of the sites -> z (D,).
        likelihood: z (D,) -> pointwise log likelihood of each observed site.
        simulate: Draws from the model.
        latents: z (D,) -> values of the latent sites, and log Jacobians of their supports.
        messages: Pyro's record of each latent site in one run.
        rerun: Draws from the model with other arguments.
        messages_with: Pyro's record of each latent site in one run with other arguments.
        discrete: z (D,) -> probabilities of the values of discrete sites that are summed out.
        violation: z (D,) -> the site, and a sentence, where a parameter of its distribution leaves
            its constraint.
        prior: z (D,) -> log prior density of each latent site, without Jacobian.
        joint: Draws latent vectors and data together, with arguments of their own.
    """

    values: PointFunction
    inverse: PointFunction
    likelihood: PointFunction | None = None
    simulate: Simulator | None = None
    latents: PointFunction | None = None
    messages: Mapping[str, Any] = field(default_factory=dict)
    rerun: Rerun | None = None
    messages_with: Callable[[tuple[Any, ...], dict[str, Any]], Mapping[str, Any]] | None = None
    discrete: PointFunction | None = None
    violation: Callable[[Tensor], tuple[str, str]] | None = None
    prior: PointFunction | None = None
    joint: JointSimulator | None = None
