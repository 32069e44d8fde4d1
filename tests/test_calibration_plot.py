"""Predictive intervals of the right width cover as often as they say, narrow ones less often."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from flowvi.draws.prediction import Prediction
from flowvi.plots import plot_calibration
from flowvi.plots.calibration import LEVELS, coverage

ROWS = 400


def predicted(scale):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=ROWS)
    draws = centre + scale * rng.normal(size=(2, 1000, ROWS))
    return Prediction({"y": draws}, {}), centre + rng.normal(size=ROWS)


def test_right_predictions_cover_as_they_say():
    prediction, y = predicted(1.0)

    error = np.sqrt(LEVELS * (1 - LEVELS) / ROWS)
    assert (np.abs(coverage(prediction, y) - LEVELS) < 4 * error).all()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_coverage_is_that_of_normals_of_another_width(scale):
    prediction, y = predicted(scale)

    expected = 1 - 2 * stats.norm.cdf(-scale * stats.norm.ppf(0.5 + LEVELS / 2))
    error = np.sqrt(expected * (1 - expected) / ROWS)
    assert (np.abs(coverage(prediction, y) - expected) < 4 * error + 0.005).all()


def test_the_plot_shows_the_coverage():
    prediction, y = predicted(1.0)

    ax = plot_calibration(prediction, y)

    np.testing.assert_allclose(ax.lines[1].get_ydata(), coverage(prediction, y))
    plt.close(ax.figure)


def test_other_rows_are_refused():
    prediction, _ = predicted(1.0)

    with pytest.raises(ValueError, match=r"rows of shape \(400,\); .* shape \(3,\)"):
        plot_calibration(prediction, np.zeros(3))
