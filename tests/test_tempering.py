"""Annealing from a wide start finds modes that a guide leaves out, and nothing where none is."""

import math
import re

import pytest
import torch
from pyro import distributions as dist

import flowvi
from flowvi.draws.sampling import draw
from flowvi.guides import FullRank
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.samplers.tempering import Tempered, mass_beyond_guide, wide_gaussian


def bumps(*places: float) -> flowvi.Target:
    """Standard normals of equal weight at places on the diagonal of a plane."""

    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        normal = dist.Normal(0.0, 1.0)
        parts = [normal.log_prob(v["x"] - m).sum() for m in places]
        return torch.logsumexp(torch.stack(parts), 0) - math.log(len(places))

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def at(place: float) -> GaussianApproximation:
    return GaussianApproximation(torch.full((2,), place), torch.eye(2), "a mode")


def diagnosis_of(target: flowvi.Target, place: float) -> flowvi.diagnostics.Diagnosis:
    guide = FullRank(2)
    guide.start(torch.full((2,), place), torch.eye(2))
    return flowvi.diagnose(draw(target, [guide], 2000))


def test_a_wide_normal_covers_both_modes():
    wide = wide_gaussian(bumps(-4.0, 4.0), [at(4.0)], 0)

    assert (wide.widths > 4.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_mode_that_is_left_out_is_found(seed):
    target = bumps(-4.0, 4.0)

    said = mass_beyond_guide(
        target, diagnosis_of(target, 4.0), wide_gaussian(target, [], seed), seed
    )

    share = re.search(r"finds about ([\d.]+) times the mass that the guide covers", said)
    assert share is not None
    # The whole of which the guide covers a half; 500 draws know it to 4 % or so.
    assert float(share[1]) == pytest.approx(2.0, rel=4.5 * 0.04)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_found_where_nothing_is_missing(seed):
    target = bumps(4.0)

    said = mass_beyond_guide(
        target, diagnosis_of(target, 4.0), wide_gaussian(target, [], seed), seed
    )

    assert said == ""


def test_a_tempered_density_is_a_power():
    target = bumps(0.0)
    z = torch.randn(5, 2)

    torch.testing.assert_close(Tempered(target, 0.3).log_prob(z), 0.3 * target.log_prob(z))
