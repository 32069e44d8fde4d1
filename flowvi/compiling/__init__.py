"""The gradient of an objective as one compiled graph, made beside a fit that is under way."""

from flowvi.compiling.background import Compilation, available
from flowvi.compiling.graph import Bound, Graph, NotOneGraph, trace
from flowvi.compiling.step import Accelerator, Compile, asked

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
