"""The table of flows in the documentation is the one that the registry gives."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FIXED

from flowvi.flows import FLOWS
from flowvi.flows.facts import FACTS

MAKE = Path(__file__).parents[1] / "docs/choose/make_flow_table.py"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_flow_table", MAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_registry(make):
    page = make.PAGE.read_text()

    assert page == make.renewed(page), f"Run python {MAKE.relative_to(MAKE.parents[2])}"


def test_every_flow_is_in_the_table(make):
    lines = make.table().splitlines()[2:]

    assert FACTS.keys() == FLOWS.keys()
    assert [line.split("`")[1] for line in lines] == list(FLOWS)


def test_only_flows_without_parameters_take_no_context(make):
    unconditional = [n for n, build in FLOWS.items() if make.row(n, build)[5] == "no"]

    assert unconditional == FIXED


@pytest.mark.parametrize(
    ("name", "way"),
    [("realnvp", "recursion"), ("planar", "recursion"), ("maf", "inverse"), ("glow", "both")],
)
def test_path_gradients_go_the_way_that_the_table_says(name, way, make, monkeypatch):
    """A layer with a recursion of its own never calls its inverse."""
    flow, x = FLOWS[name](4), torch.randn(5, 4)
    called = []
    for part in make.parts(flow):
        spy = partial(_noted, called, part.inverse)
        monkeypatch.setattr(part, "inverse", spy)

    flow.push(x, -x)

    assert make.path_gradient(flow) == way
    assert bool(called) == (way != "recursion")


def _noted(called, inverse, *args):
    called.append(inverse)
    return inverse(*args)
