"""Steps that cannot be taken are skipped, gone back from, and at last blamed on a site."""

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import flowvi
from flowvi.training.guard import Guard


def walled(at: float) -> flowvi.Target:
    """A normal whose density is zero beyond a wall."""

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        x = v["x"]
        inside = Normal(0.0, 1.0).log_prob(x) + Normal(0.0, 1.0).log_prob(v["y"])
        return torch.where(x < at, inside, -torch.inf)

    return flowvi.from_density(log_prob, {"y": flowvi.Site(), "x": flowvi.Site()})


def split() -> flowvi.Target:
    """A normal whose density is zero in a slit that a search for a start does not see."""

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        x = v["x"]
        inside = Normal(0.0, 1.0).log_prob(x) + Normal(0.0, 1.0).log_prob(v["y"])
        return torch.where((x - 0.2).abs() > 5e-4, inside, -torch.inf)

    return flowvi.from_density(log_prob, {"y": flowvi.Site(), "x": flowvi.Site()})


def rooted() -> flowvi.Target:
    """The value is finite everywhere, the gradient is not where x is below one."""

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        x = v["x"]
        root = torch.where(x < 1.0, 0.0 * x.abs().sqrt().detach() + (0.0 * x).sqrt(), 0.0)
        return Normal(0.0, 1.0).log_prob(x) + root + Normal(0.0, 1.0).log_prob(v["y"])

    return flowvi.from_density(log_prob, {"y": flowvi.Site(), "x": flowvi.Site()})


@pytest.mark.parametrize(
    ("outcomes", "failed"),
    [
        ([False] * 9, False),
        ([False] * 10, True),
        ([False] * 9 + [True] + [False], False),
        (([True] * 19 + [False]) * 10, False),
        (([True] * 17 + [False]) * 11 + [True], True),
    ],
)
def test_ten_in_a_row_or_one_in_twenty_fail(outcomes, failed):
    guard = Guard()

    for finite in outcomes:
        guard.admits(0.0 if finite else math.nan, torch.ones(2))

    assert guard.failed is failed
    assert guard.skipped == outcomes.count(False)
    guard.forget()
    assert not guard.failed


def test_a_fit_that_keeps_failing_names_the_site_and_keeps_the_best():
    with pytest.warns(UserWarning, match=r"ended early.*'x'.*best state before") as caught:
        fit = flowvi.fit(split(), "fullrank", steps=900, particles=400, lr=1e-3, progress=False)

    (words,) = fit.meta["failures"]
    assert words in {str(w.message) for w in caught}
    assert "halved 3 times" in words and "The log density is -inf at" in words
    assert sum("halved the learning rate" in line for line in fit.log) == 3
    assert len(fit.history["bound"]) < 900
    assert fit.meta["skipped"] == fit.history["skipped"].sum() >= 40
    assert fit.history["lr"][-1] < 1e-3 / 8
    assert all(p.isfinite().all() for p in fit.guide.parameters())


def test_a_few_failures_are_counted_and_no_more():
    fit = flowvi.fit(walled(4.2), "fullrank", steps=200, progress=False)

    assert fit.meta["failures"] == []
    assert fit.meta["skipped"] == fit.history["skipped"].sum()


def test_a_gradient_that_is_nan_names_site_parameter_and_operation():
    with pytest.warns(UserWarning, match="ended early") as caught:
        flowvi.fit(rooted(), "fullrank", steps=300, progress=False)

    words = next(str(w.message) for w in caught if "ended early" in str(w.message))
    assert "gradient of the log density is not finite" in words
    assert "first at site 'x' (in MulBackward0), such as at y = " in words
    assert "parameter whose gradient is not finite is 'affine" in words


# Randomness and threads.


def test_two_fits_in_two_threads_are_both_right():
    def log_prob(v: dict[str, Tensor]) -> Tensor:
        return Normal(1.0, 2.0).log_prob(v["x"])

    def go(seed: int, found: dict[object, flowvi.Fit], key: object) -> None:
        torch.set_default_dtype(torch.float64)
        target = flowvi.from_density(log_prob, {"x": flowvi.Site()})
        found[key] = flowvi.fit(target, "fullrank", steps=20, seed=seed, progress=False)

    found: dict[object, flowvi.Fit] = {}
    threads = [threading.Thread(target=go, args=(seed, found, seed)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        go(seed, found, "alone")
        np.testing.assert_array_equal(found[seed].history["bound"], found["alone"].history["bound"])
        assert found[seed].meta["seed"] == seed


def test_the_same_target_fitted_twice_has_the_same_bits():
    target = walled(50.0)

    first, second = (flowvi.fit(target, "planar", steps=10, progress=False) for _ in range(2))

    assert first.bounds == second.bounds
    for a, b in zip(first.guide.parameters(), second.guide.parameters(), strict=True):
        assert torch.equal(a, b)
