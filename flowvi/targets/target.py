"""The density p: what every part of flowvi may ask of a model, whatever its latents are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from flowvi.targets.schema import ModelError, Site


class Target(nn.Module, ABC):
    r"""A log density with names, shapes and dims of its values. Abstract.

    One shape rule holds for all of them: ``log_prob`` maps ``(*S, *B, D)`` to ``(*S, *B)``.

    - `GlobalTarget`: one latent vector, B = (): a density on R^D, Jacobians included.
    - `LocalTarget`: a latent vector for each row of the data, B = (N).
    - `NestedTarget`: one vector that all rows share; its density contains a bound over
      the latents of the rows, and has the guide of a row among its parameters.

    Parameters of the target are trained in a fit, together with those of the guide.

    Attributes:
        name: Name of the model.
        dim: Length D of a latent vector.
        sites: Latent sites by name.
        slices: Columns of z that belong to each site.
        dims: A name for each axis of each value.
        coords: Labels of dims.
        made: Makes the target again, in another process; None where only this one has it.
    """

    name: str
    dim: int
    sites: dict[str, Site]
    slices: dict[str, slice]
    dims: dict[str, tuple[str, ...]]
    coords: dict[str, list[Any]]
    deterministics: tuple[str, ...] = ()
    observed: Any
    constants: dict[str, Tensor]
    improper: tuple[str, ...] = ()
    masked: Mapping[str, str]
    subsampled: dict[str, tuple[int, int]]
    messages: Mapping[str, Any]
    # Whether an evaluation draws random numbers.
    stochastic = False

    def __init__(self) -> None:
        super().__init__()
        self.coords, self.constants, self.masked, self.subsampled = {}, {}, {}, {}
        self.messages = {}
        self.made: Callable[[], Any] | None = None
        # The model, its arguments and keyword arguments; None for plain densities.
        self.source: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None
        self._supports: Mapping[str, Constraint] = {}
        self._count = 0

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Precision in which the density is evaluated."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the density is evaluated."""

    @abstractmethod
    def log_prob(self, z: Tensor, batch: Any = None) -> Tensor:
        """Evaluate the log density. (*S, *B, D) -> (*S, *B).

        Args:
            z: Latent vectors.
            batch: Rows to evaluate; all of them without.
        """

    @abstractmethod
    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of latent and deterministic sites. (*S, *B, D) -> (*S, *B, *shape)."""

    @abstractmethod
    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """Latent vectors of values of the latent sites. Each (*S, *B, *shape) -> (*S, *B, D)."""

    # For one vector of latents; targets of rows override or refuse these.

    def starts(self, generator: torch.Generator) -> Tensor:
        """Points to start from, (P, D)."""
        raise self._lacks("points to start from")

    def chunk(self) -> int:
        """How many points to evaluate at a time, with gradients, so that memory is limited."""
        raise self._lacks("a density of one vector")

    def at_once(self) -> int:
        """How many draws a step of training may evaluate at a time, of the rows of one step."""
        return self.chunk()

    def cover(self) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Batches and weights whose weighted densities add up to that of all rows."""
        yield 1.0, {}

    def compared(self, z: Tensor) -> Tensor:
        """The density by which guides are compared: the same noise for all. (*S, D) -> (*S)."""
        return self.log_prob(z)

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Pointwise log likelihood of every observed site. (*S, D) -> (*S, *rows)."""
        return {}

    def log_prior(self, z: Tensor) -> dict[str, Tensor]:
        """Log prior density of every latent site, without Jacobian. (*S, D) -> (*S, *shape)."""
        return {}

    def probabilities(self, z: Tensor) -> dict[str, Tensor]:
        """Probabilities of the values of discrete sites, given the data and the latents."""
        return {}

    def prior(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """Draw all sites from the prior: name -> (n, *shape)."""
        raise self._lacks("a prior to draw from")

    def prior_of_latents(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """Draw the latent sites from the prior, without data: name -> (n, *shape)."""
        return self.prior(n, seed)

    @property
    def sum_of_rows(self) -> Any:
        """The density as a sum over many rows of data; None where it is none, or has few."""
        return None

    def predictive(self, values: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """Simulate the observed sites given latent values. (n, *shape) each -> (n, *shape)."""
        raise self._lacks("one simulation for each draw")

    def rerun(
        self,
        values: Mapping[str, np.ndarray],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int,
        new: Collection[str] = (),
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run the model on other arguments, given latent values."""
        raise self._lacks("arguments to change")

    def plain(self, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """The density as operations that autograd follows one by one. (*S, D) -> (*S)."""
        return self.log_prob(z, batch)

    def latents(self, z: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the latent sites, and the log Jacobians of the maps to them."""
        raise self._lacks("one map for all draws")

    def violation(self, z: Tensor) -> tuple[str, str]:
        """The site a parameter of which leaves its constraint at a point (D), and a sentence."""
        return "", ""

    def begin(self, uses: Any = ()) -> None:
        """Count evaluations anew, so that what came before makes no difference to rounding."""

    def uses(self) -> Any:
        """How often each size was evaluated, for `begin` to go on from."""
        return []

    # Parameters of the model itself.

    def register_own(
        self, parameters: Mapping[str, nn.Parameter] | None, supports: Mapping[str, Constraint]
    ) -> None:
        """Take the model's parameters, by name, with the constraints on their values."""
        self._supports, self._count = supports, len(parameters or {})
        for i, p in enumerate((parameters or {}).values()):
            self.register_parameter(f"own_{i}", p)

    @property
    def model_parameters(self) -> list[Tensor]:
        """The model's parameters, or what stands in for them while a step is compiled."""
        return [getattr(self, f"own_{i}") for i in range(self._count)]

    @property
    def parameters_of_model(self) -> dict[str, tuple[nn.Parameter, Constraint]]:
        """Parameters of the model itself, unconstrained, with the constraints on their values."""
        return {
            name: (getattr(self, f"own_{i}"), constraint)
            for i, (name, constraint) in enumerate(self._supports.items())
        }

    def own_state(self) -> dict[str, Tensor]:
        """All that training changes, by the names that files have for it."""
        return {f"own_{i}": getattr(self, f"own_{i}") for i in range(self._count)}

    @torch.no_grad()
    def set_own_state(self, values: Mapping[str, Tensor]) -> None:
        """Be as where `own_state` was taken, by name."""
        for name, held in self.own_state().items():
            held.copy_(values[name])

    def _lacks(self, what: str) -> ModelError:
        return ModelError(f"{self.name} has latents for each row (local=), and not {what}.")
