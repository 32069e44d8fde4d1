"""Names that commands list and check without importing anything are those of the registries."""

import inspect

import pytest

from flowvi.cli import catalog, vae
from flowvi.flows import FLOWS
from flowvi.guides.registry import GUIDES, JOINT_GUIDES, MANY_GUIDES, guide_names
from flowvi.guides.structured import STRUCTURED_GUIDES
from flowvi.objectives.forward_kl import ForwardKL
from flowvi.objectives.registry import OBJECTIVES
from flowvi.vae import LIKELIHOODS, NETS, POSTERIORS, PRIORS

REGISTRIES = {
    "flows": (catalog.FLOWS, FLOWS),
    "guides": (catalog.GUIDES, {**GUIDES, **JOINT_GUIDES, **MANY_GUIDES, **STRUCTURED_GUIDES}),
    "objectives": (catalog.OBJECTIVES, OBJECTIVES),
}


@pytest.mark.parametrize(("read", "registry"), REGISTRIES.values(), ids=REGISTRIES)
def test_rows_say_what_their_builders_say(read, registry):
    lines = {name: (inspect.getdoc(row) or "").split("\n")[0] for name, row in registry.items()}

    assert {row.name: row.line for row in catalog.entries(*read)} == lines
    assert all(lines.values())


def test_objectives_show_their_arguments():
    calls = {row.name: row.call for row in catalog.entries(*catalog.OBJECTIVES)}

    for name, build in OBJECTIVES.items():
        if not inspect.isclass(build):
            parameters = inspect.signature(build).parameters.values()
            plain = [str(p.replace(annotation=p.empty)) for p in parameters]
            assert calls[name] == f"({', '.join(plain)})"


def test_options_take_the_names_of_registries():
    assert catalog.guide_names() == sorted([*guide_names(), *STRUCTURED_GUIDES])
    assert catalog.bound_names() == sorted(n for n, b in OBJECTIVES.items() if b is not ForwardKL)
    assert sorted(LIKELIHOODS) == vae.LIKELIHOODS
    assert sorted(NETS) == vae.NETS
    assert sorted(POSTERIORS) == vae.POSTERIORS
    assert sorted(PRIORS) == vae.PRIORS
