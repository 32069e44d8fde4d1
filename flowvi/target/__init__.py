"""A model, captured as a log density on R^D."""

from flowvi.target.base import Target
from flowvi.target.density import from_density
from flowvi.target.facts import ModelError, Site
from flowvi.target.local import LocalTarget
from flowvi.target.local_rows import NOWHERE, Batch
from flowvi.target.pyro_model import from_pyro, replicable

__all__ = [
    "NOWHERE",
    "Batch",
    "LocalTarget",
    "ModelError",
    "Site",
    "Target",
    "from_density",
    "from_pyro",
    "replicable",
]
