"""Small Pyro models, one for each thing that a capture must carry.

Every entry of `ZOO` builds a model and its data anew, under the default
precision of the moment: the property tests run over all of them.
"""

from zoo import discrete, dynamics, likelihoods, linear, masks, modules, plates, styles, supports
from zoo.case import Case

_FAMILIES = (discrete, dynamics, likelihoods, linear, masks, modules, plates, styles, supports)
ZOO = {name: build for family in _FAMILIES for name, build in family.MODELS.items()}

__all__ = ["ZOO", "Case"]
