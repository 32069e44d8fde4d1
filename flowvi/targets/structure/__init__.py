"""Structure of a log density: independent units, chains and fields given shared latents."""

from flowvi.targets.structure.marginal import MarginalTarget
from flowvi.targets.structure.structure import Structure, structure

__all__ = ["MarginalTarget", "Structure", "structure"]
