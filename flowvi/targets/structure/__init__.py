"""Structure of a log density: independent units, chains and fields given shared latents."""

from flowvi.targets.structure.marginal import VARYING, MarginalTarget
from flowvi.targets.structure.structure import Structure, structure

__all__ = ["VARYING", "MarginalTarget", "Structure", "structure"]
