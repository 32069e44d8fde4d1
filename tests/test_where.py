"""Where the weights are bad is found, by scalar and by side, and said in the reasons."""

import numpy as np
import pytest
from scipy.stats import norm

from flowvi.diagnostics import diagnose, where

DRAWS = 4000


def narrow(scale: float = 0.5):
    """Draws of a guide that is too narrow in ``bad`` and right in ``good``."""
    rng = np.random.default_rng(0)
    values = {"bad": scale * rng.normal(size=(1, DRAWS)), "good": rng.normal(size=(1, DRAWS))}
    return norm.logpdf(values["bad"]) - norm.logpdf(values["bad"], scale=scale), values


def one_sided():
    """Draws of a normal for a target whose lower tail is heavy."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, DRAWS))
    return np.where(x < 0, 0.6 * x**2, 0.0), {"x": x, "y": rng.normal(size=(1, DRAWS, 2))}


def test_each_scalar_has_a_k_hat_of_its_own():
    found = where(*narrow())

    khat = dict(zip(found.labels, found.khat, strict=True))
    assert khat["bad"] > 0.7 > 0.5
    assert khat["bad"] > khat["good"] - 0.1


def test_weights_that_are_equal_have_light_tails_and_no_place():
    rng = np.random.default_rng(0)

    found = where(np.zeros(DRAWS), {"x": rng.normal(size=(1, DRAWS))[0][None]})

    assert found.khat[0] < 0.3
    assert found.sentence == ""


def test_the_side_of_a_tail_is_named():
    found = where(*one_sided())

    assert found.labels[0] == "x" and found.displacement[0] < -5
    assert found.level[0] < 0.05
    assert "low end of x" in found.sentence
    assert "x " in str(found) and "heaviest draws carry" in str(found)


def test_mirrored_draws_are_at_the_other_end():
    log_w, values = one_sided()

    found = where(log_w, {"x": -values["x"]})

    assert "high end of x" in found.sentence and "above" in found.sentence


def test_heavy_tails_are_placed_in_the_reasons_of_the_verdict():
    diagnosis = diagnose(*one_sided())

    assert diagnosis.verdict == "do not trust"
    assert any("low end of x" in reason for reason in diagnosis.reasons[1:])


def test_the_displacement_of_nothing_is_standard_normal():
    rng = np.random.default_rng(2)
    log_w = rng.normal(0, 0.3, DRAWS)

    found = where(log_w, {"x": rng.normal(size=(1, DRAWS, 200))})

    assert found.displacement.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * 200))
    assert np.abs(found.displacement).max() < 5
