"""A model, captured as a log density on R^D."""

from flowvi.targets.density import from_density
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.local.rows import NOWHERE, Batch
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.pyro.from_pyro import from_pyro, replicable
from flowvi.targets.schema import ModelError, Site
from flowvi.targets.target import Target

__all__ = [
    "NOWHERE",
    "Batch",
    "GlobalTarget",
    "LocalTarget",
    "ModelError",
    "Site",
    "Target",
    "from_density",
    "from_pyro",
    "replicable",
]
