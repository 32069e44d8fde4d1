"""Ascents to modes, whose densities are evaluated together."""

import pytest
import torch

import flowvi
from flowvi.initialization.ascents import ascend, ascend_together
from flowvi.runtime.clock import Interrupted


def valley(counted=None):
    """Rosenbrock's valley, with its top at (1, 1)."""

    def log_density(v):
        x, y = v["x"]
        return -((1 - x) ** 2) - 10 * (y - x**2) ** 2

    target = flowvi.from_density(log_density, {"x": flowvi.Site((2,))})
    if counted is not None:
        inner = target.log_prob

        def log_prob(z):
            counted.append(len(z))
            return inner(z)

        target.log_prob = log_prob
    return target


STARTS = torch.tensor([[-1.0, 2.0], [0.5, -1.0], [2.0, 0.0]], dtype=torch.float64)


def test_ascents_together_go_where_each_goes_alone():
    target = valley()

    paths = ascend_together(target, list(STARTS))

    for start, path in zip(STARTS, paths, strict=True):
        alone = ascend(target, start)
        assert len(path) == len(alone)
        # Sums over a batch may round differently, and a path follows its first differences.
        torch.testing.assert_close(torch.stack(path), torch.stack(alone), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(path[-1], torch.ones_like(start), rtol=0.0, atol=1e-2)


def test_the_density_is_asked_once_for_all_that_wait():
    alone, together = [], []
    for start in STARTS:
        ascend(valley(alone), start)

    ascend_together(valley(together), list(STARTS))

    assert set(alone) == {1} and max(together) == len(STARTS)
    # As many calls as the longest ascent has alone, give or take one step of a line search.
    assert len(together) < 0.6 * len(alone)


def test_an_ascent_where_the_density_is_not_finite_stays_where_it_starts():
    target = flowvi.from_density(
        lambda v: torch.where(v["x"].sum() > 0, -v["x"].square().sum(), -torch.inf),
        {"x": flowvi.Site((2,))},
    )
    outside, inside = torch.tensor([[-3.0, -3.0], [1.0, 2.0]], dtype=target.dtype)

    stuck, climbed = ascend_together(target, [outside, inside])

    assert torch.equal(stuck[-1], outside)
    assert climbed[-1].norm() < inside.norm()


@pytest.mark.parametrize("error", [RuntimeError("no"), Interrupted()])
def test_an_error_ends_all_ascents_and_an_interrupt_keeps_their_points(error):
    target = valley()
    inner, calls = target.log_prob, []

    def log_prob(z):
        calls.append(z)
        if len(calls) == 8:
            raise error
        return inner(z)

    target.log_prob = log_prob
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="no"):
            ascend_together(target, list(STARTS))
        return

    paths = ascend_together(target, list(STARTS))

    assert len(paths) == len(STARTS) and all(1 <= len(path) < 8 for path in paths)


def test_an_error_of_the_optimiser_is_raised(monkeypatch):
    def minimize(*args, **options):
        raise ValueError("no such method")

    monkeypatch.setattr("scipy.optimize.minimize", minimize)

    with pytest.raises(ValueError, match="no such method"):
        ascend_together(valley(), list(STARTS))
