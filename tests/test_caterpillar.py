"""The caterpillar plot, and the units of a structured fit in a report."""

from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from flowvi import plots
from flowvi.draws.draws import Draws
from flowvi.draws.structured import Units
from flowvi.plots.theme import BLUE, ORANGE
from flowvi.reporting.units import chosen_units, doubtful_units, elements_of_units

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def hierarchy(count=6, size=0):
    """Draws of a vector with a plate, of which the units 1 and 4 are flagged."""
    rng = np.random.default_rng(2)
    values = {
        "mu": rng.normal(size=(1, 200)),
        "u": np.arange(count)[::-1] + rng.normal(size=(1, 200, count)),
    }
    if size:
        values["u"] = np.stack([values["u"], 100 + values["u"]], axis=-1)
    names = [f"city {i}" for i in range(count)]
    bad = np.isin(np.arange(count), (1, 4))
    khat = np.where(bad, 0.9, -np.inf)
    units = Units("group", tuple(names), khat, np.zeros(count), bad, 100)
    target = SimpleNamespace(
        name="hierarchy", dims={"u": ("group", "")[: 1 + bool(size)]}, coords={"group": names}
    )
    zero = np.zeros((1, 200))
    return Draws(np.zeros((1, 200, 1)), zero, zero, values, target, units=units)


def points_of(ax, colour):
    return sum(len(line.get_xdata()) for line in ax.lines if line.get_color() == colour)


def test_caterpillar_sorts_units_and_flags_the_doubtful():
    draws = hierarchy()

    ax = plots.plot_caterpillar(draws)

    means = draws["u"].mean((0, 1))
    heights = np.concatenate([np.c_[line.get_data()] for line in ax.lines[:2]])
    np.testing.assert_allclose(heights[np.argsort(heights[:, 0]), 1], np.sort(means))
    assert points_of(ax, ORANGE) == 2 and points_of(ax, BLUE) == 4
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [f"city {i}" for i in np.argsort(means)]
    ends = [segment[:, 1] for segment in ax.collections[0].get_segments()]
    exact = np.quantile(draws["u"][0], (0.05, 0.95), axis=0).T
    assert any(np.allclose(ends[0], pair) for pair in exact)


def test_caterpillar_of_many_units_draws_some():
    ax = plots.plot_caterpillar(hierarchy(5000))

    assert points_of(ax, ORANGE) == 2
    assert points_of(ax, BLUE) == 298
    assert "300 of them drawn" in ax.get_title(loc="left")


def test_caterpillar_of_one_element_of_units():
    draws = hierarchy(size=2)

    first, second = (plots.plot_caterpillar(draws, site) for site in (None, "u[1]"))

    assert first.get_ylabel() == "u[0]" and second.get_ylabel() == "u[1]"
    assert second.get_ylim()[0] > 90 > first.get_ylim()[1]


@pytest.mark.parametrize(
    ("site", "kind", "words"),
    [
        ("mu", ValueError, "'mu', which is a number"),
        ("v", KeyError, "No value named 'v'"),
        ("u[7]", KeyError, r"'u' has shape \(2,\) for each unit"),
    ],
)
def test_caterpillar_refuses_what_is_no_vector(site, kind, words):
    with pytest.raises(kind, match=words):
        plots.plot_caterpillar(hierarchy(size=2), site)


def test_a_table_has_doubtful_units_then_extreme_ones():
    draws = hierarchy(30)

    chosen = chosen_units(draws)
    labels = [element.label for element in elements_of_units(draws, "u", chosen)]

    assert len(chosen) == 10 and {*chosen[:2]} == {1, 4}
    # The means fall from the first unit to the last.
    assert {*chosen[2:]} == {0, 2, 3, 25, 26, 27, 28, 29}
    assert labels == [f"u[city {i}]" for i in chosen]
    assert [line[:2] for line in doubtful_units(draws)] == [
        ("group[city 1]", "not to be trusted"),
        ("group[city 4]", "not to be trusted"),
    ]
