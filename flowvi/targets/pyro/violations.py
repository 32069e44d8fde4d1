"""Parameters of distributions that leave their constraints in a run of a model."""

from __future__ import annotations

from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from flowvi.targets.pyro.checks import sites_with_density
from flowvi.targets.pyro.handlers import innermost


def violation(trace: poutine.Trace) -> tuple[str, str]:
    """The first site with such a parameter, and a sentence on it; empty where there is none.

    Args:
        trace: A run of the model.
    """
    for site in sites_with_density(trace):
        fn = innermost(site["fn"])
        for name, constraint in getattr(fn, "arg_constraints", {}).items():
            value = vars(fn).get(name)
            if constraints.is_dependent(constraint) or not isinstance(value, Tensor):
                continue
            bad = ~constraint.check(value)
            if bad.any():
                shown = value[bad].flatten()[0] if bad.shape == value.shape else value.flatten()[0]
                words = (
                    f"the parameter '{name}' of the {type(fn).__name__} of site '{site['name']}' "
                    f"is {shown.item():.3g}, outside {constraint!r}"
                )
                return site["name"], words
    return "", ""
