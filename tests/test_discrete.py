"""Discrete latents of random small models, against the sum over every joint value."""

import pyro
import pytest
import torch
from discrete_models import KINDS, Oracle
from reference import with_gradient

from flowvi.target import from_pyro

EACH = 21
MODELS = [(kind, seed) for kind in KINDS for seed in range(EACH)]


def tolerance() -> dict[str, float]:
    """Rounding, of a density whose own terms are in the default precision."""
    single = torch.get_default_dtype() == torch.float32
    return {"rtol": 2e-4, "atol": 2e-4} if single else {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize(("kind", "seed"), MODELS)
def test_sums_are_those_over_every_joint_value(kind, seed):
    torch.set_default_dtype(torch.float32 if seed % 3 == 1 else torch.float64)
    model = KINDS[kind](seed)
    target = from_pyro(model)
    rows = {name: torch.arange(size) for name, (_, size) in target.subsampled.items()}
    oracle = Oracle(model, target, rows)
    z = 0.7 * torch.randn(target.dim, generator=torch.Generator().manual_seed(seed))

    found = with_gradient(lambda z: target.log_prob(z, rows or None), z)
    torch.testing.assert_close(found, with_gradient(oracle.log_prob, z), **tolerance())
    if rows:
        return
    probabilities, expected = target.probabilities(z), oracle.probabilities(z)
    for name in expected:
        torch.testing.assert_close(
            probabilities[name].to(z), expected[name].to(z), **tolerance()
        )
    likelihood = target.log_likelihood(z)
    assert bool(likelihood) == oracle.adds_up(z)
    for name, expected_rows in (oracle.log_likelihood(z) if likelihood else {}).items():
        torch.testing.assert_close(likelihood[name].to(z), expected_rows.to(z), **tolerance())
