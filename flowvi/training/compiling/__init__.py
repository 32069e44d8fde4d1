"""Compile the gradient of an objective as one graph, in the background of a fit."""

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
