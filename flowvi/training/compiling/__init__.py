"""The gradient of an objective as one compiled graph, made beside a fit that is under way."""

from flowvi.training.compiling.background import Compilation, available
from flowvi.training.compiling.graph import Bound, Graph, NotOneGraph, trace
from flowvi.training.compiling.step import Accelerator, Compile, asked

__all__ = [
    "Accelerator",
    "Bound",
    "Compilation",
    "Compile",
    "Graph",
    "NotOneGraph",
    "asked",
    "available",
    "trace",
]
