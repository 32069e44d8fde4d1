"""Imports point downwards, importing flowvi changes nothing, and no code is run from strings."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowvi

PACKAGE = Path(flowvi.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up. Modules of one layer may import those named before them in it.
LAYERS = [
    ["_version"],
    ["flows"],
    ["target"],
    ["diagnostics"],
    ["guides"],
    ["objectives"],
    ["draws"],
    ["init", "schedule"],
    ["fit"],
    ["checkpoint"],
    ["inference_data"],
    ["plots"],
    ["cli"],
]
FACES = {"__init__", "__main__"}
# What design.md promises, as far as it exists.
PUBLIC = {
    *("from_pyro", "from_density", "Site", "Target", "ModelError"),
    *("fit", "load", "Fit", "Draws", "diagnose", "bounds", "resample", "to_inference_data"),
    *("elbo", "iwelbo", "renyi", "FLOWS", "GUIDES", "OBJECTIVES"),
    *("FlowGuide", "MeanField", "FullRank", "__version__"),
}
