"""Parameters of the model itself, owned by its target."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint

from flowvi.targets.precision import check_trainable
from flowvi.targets.schema import ModelError


@dataclass
class Parameters:
    """The model's own parameters (`pyro.param`, `pyro.module`, `PyroParam`).

    Pyro's parameter store is left alone: two fits never share parameters.

    Args:
        leaves: Name -> unconstrained parameter.
        supports: Name -> constraint on its value.
    """

    leaves: dict[str, nn.Parameter] = field(default_factory=dict)
    supports: dict[str, Constraint] = field(default_factory=dict)

    def value(self, msg: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The constrained value that a `pyro.param` statement asks for, created at first sight.

        Args:
            msg: The statement.
            dtype: Precision of the value; that of the parameter without.

        Raises:
            ModelError: The parameter has no value, or is of a type that is not trained.
        """
        name = msg["name"]
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(init, nn.Parameter) and not init.requires_grad:
            return init
        if name not in self.leaves:
            self.leaves[name], self.supports[name] = _created(msg, init)
        leaf = self.leaves[name]
        given = leaf if dtype is None else leaf.to(dtype)
        constrained: Tensor = transform_to(self.supports[name])(given)
        # Pyro reaches for the leaf through this attribute; on the leaf itself it prevents pickling,
        # so it is set only where Pyro needs it: to take some rows.
        if constrained is not leaf or msg["kwargs"].get("event_dim") is not None:
            constrained.unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
        return constrained


def _created(msg: Any, init: Any) -> tuple[nn.Parameter, Constraint]:
    constraint = msg["kwargs"].get("constraint", constraints.real)
    if init is None:
        return _held_by_module(msg, constraint)
    value = init() if callable(init) and not isinstance(init, Tensor) else init
    if isinstance(value, Tensor):
        check_trainable(msg["name"], value)
    if isinstance(value, nn.Parameter) and constraint is constraints.real:
        return value, constraint
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    return nn.Parameter(transform_to(constraint).inv(value.detach()).clone()), constraint


def _held_by_module(msg: Any, constraint: Constraint) -> tuple[nn.Parameter, Constraint]:
    """The parameter behind a `PyroParam`, which puts itself into Pyro's store before it asks."""
    name, store = msg["name"], pyro.get_param_store()
    if name in store:
        leaf, constraint = store._params[name], store._constraints[name]
    else:
        try:
            value = msg["fn"](*msg["args"], **msg["kwargs"])
        except KeyError:
            raise ModelError(
                f"Parameter '{name}' has no initial value; give one to pyro.param. A target has "
                "parameters of its own and does not read Pyro's parameter store."
            ) from None
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
    check_trainable(name, leaf)
    return leaf if isinstance(leaf, nn.Parameter) else nn.Parameter(leaf.detach()), constraint
