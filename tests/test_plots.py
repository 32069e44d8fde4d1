"""Plots draw what they are given, on the axes they are given, and change nothing else."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_every_kind import of_rows

import flowvi
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import resample
from flowvi.draws.sampling import draw
from flowvi.guides import MeanField
from flowvi.plots import (
    plot_khat,
    plot_loss,
    plot_marginals,
    plot_pair,
    plot_predictive,
    plot_where,
)
from flowvi.targets import Site, from_density

mpl.use("Agg")


@pytest.fixture(autouse=True)
def same_style():
    """The user's style is as it was, and no figure is left open."""
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


@pytest.fixture
def draws():
    target = from_density(
        lambda v: -(v["mu"] ** 2 + (v["theta"] ** 2).sum() + v["tau"] ** 2) / 2,
        {"mu": Site(), "theta": Site(shape=(9,), dims=("city",)), "tau": Site()},
    )
    target.coords["city"] = [f"c{i}" for i in range(9)]
    q = MeanField(11)
    q.start(torch.full((11,), 0.1), torch.eye(11))
    return draw(target, [q, q], 300)


def history(steps=500):
    rng = np.random.default_rng(0)
    at = np.arange(steps)
    bound = -30 - 1000 * np.exp(-at / 20) - 0.1 * rng.gamma(1.0, size=steps)
    return {"bound": bound, "stage": np.where(at < 200, "gaussian", "flow")}


def shown(axes):
    """Labels of the columns of a pair plot."""
    return [ax.get_xlabel() for ax in axes[-1]]


def test_loss_marks_stages_and_ignores_the_first_steps():
    record = history()
    record["bound"][0] = -1e9
    record["bound"][50:55] = np.nan

    ax = plot_loss(record)

    ax.figure.canvas.draw()
    bottom, top = ax.get_ylim()
    assert [text.get_text().strip() for text in ax.texts] == ["gaussian", "flow"]
    assert -2000 < bottom < -31 and -30.1 < top < -29
    assert len(ax.get_yticks()) >= 3


def test_loss_draws_on_the_axes_it_is_given():
    _, ax = plt.subplots()

    assert plot_loss({"bound": [-3.0]}, ax) is ax


@pytest.mark.parametrize("bound", [np.full(50, -7.0), np.zeros(2), -(np.arange(1e4) ** 3)])
def test_loss_of_any_shape_is_drawn(bound):
    plot_loss({"bound": bound}).figure.canvas.draw()


def test_loss_without_a_finite_bound_is_refused():
    with pytest.raises(ValueError, match="no finite value"):
        plot_loss({"bound": [np.nan, -np.inf]})


def test_pair_takes_scalars_first_and_six_in_all(draws):
    axes = plot_pair(draws)

    axes[0, 0].figure.canvas.draw()
    assert shown(axes) == ["mu", "tau", *(f"theta[c{i}]" for i in range(4))]
    assert not axes[0, 1].axison


def test_pair_finds_elements_by_index_and_label(draws):
    assert shown(plot_pair(draws, ["theta[2]", "theta[c7]", "tau"])) == [
        "theta[c2]",
        "theta[c7]",
        "tau",
    ]


def test_pair_of_resampled_draws_is_drawn(draws):
    plot_pair(resample(draws), ["mu"])[0, 0].figure.canvas.draw()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["nu"], KeyError, "hoose from mu, theta, tau"),
        (["theta[9]"], KeyError, r"'theta' has shape \(9,\)"),
    ],
)
def test_pair_names_what_it_cannot_find(draws, names, error, message):
    with pytest.raises(error, match=message):
        plot_pair(draws, names)


def test_pair_refuses_more_than_it_can_show(draws):
    many = Draws(draws.z, draws.log_p, draws.log_q, {"x": np.zeros((2, 300, 40))}, draws.target)

    with pytest.raises(ValueError, match="40 scalars; a pair plot shows 12"):
        plot_pair(many, ["x"])


def test_khat_shows_the_number_and_its_threshold(draws):
    title = plot_khat(draws).get_title(loc="left")

    assert title.startswith("Pareto k-hat") and "below" in title


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 300.0])
def test_khat_of_any_weights_is_drawn(spread):
    log_w = spread * np.random.default_rng(0).normal(size=1000)
    log_w[:3] = -np.inf
    _, ax = plt.subplots()

    assert plot_khat(log_w, ax) is ax
    ax.figure.canvas.draw()


def test_marginals_show_every_set_on_every_panel(draws):
    axes = plot_marginals({"flow": draws, "resampled": resample(draws)}, columns=2)

    titles = [ax.get_title("left") for ax in axes.flat]
    assert titles == ["mu", "tau", "theta[c0]", "theta[c1]", "theta[c2]", "theta[c3]"]
    assert all(len(ax.patches) == 3 for ax in axes.flat)  # two outlines, the last one filled
    named = plot_marginals({"flow": draws}, ["theta[c8]"])
    assert [ax.get_title("left") for ax in named.flat] == ["theta[c8]"]


def test_marginals_refuse_more_sets_than_there_are_colours(draws):
    with pytest.raises(ValueError, match="1 to 4 sets of draws; got 5"):
        plot_marginals({str(i): draws for i in range(5)})


@pytest.mark.parametrize("rows", [6, 200])
def test_prediction_shows_the_data_among_what_was_predicted(rows):
    rng = np.random.default_rng(0)
    labels = [f"row {i}" for i in range(rows)]

    ax = plot_predictive(rng.normal(size=rows), rng.normal(size=(2, 50, rows)), labels, "y")

    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words[-1] == "observed" and "predicted" in words[0]
    if rows == 6:
        assert [t.get_text() for t in ax.get_xticklabels()] == labels


def test_prediction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"end in the shape \(3,\)"):
        plot_predictive(np.zeros(3), np.zeros((10, 4)))


def test_dollars_in_names_are_no_formulas():
    target = from_density(lambda v: -v["$a_$"].square(), {"$a_$": Site()})
    table = draw(target, [MeanField(1)], 200)

    for axes in (plot_pair(table), plot_marginals({"x": table})):
        axes.flat[0].figure.canvas.draw()


@pytest.fixture(scope="module")
def fitted() -> flowvi.Fit:
    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(v["x"]).sum()

    target = flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})
    return flowvi.fit(target, "meanfield", steps=30, progress=False)


def test_a_loss_is_of_a_fit_or_of_its_history(fitted):
    ax = plot_loss(fitted)

    assert [t.get_text().strip() for t in ax.texts] == ["training"]
    assert plot_loss(fitted.history).lines and plot_loss({"bound": [1.0, 2.0]}).lines
    with pytest.raises(TypeError, match=r"plot_epochs\(fit\.history\)"):
        plot_loss(of_rows(torch.zeros(4)))
    with pytest.raises(TypeError, match="history must be a fit, or its history"):
        plot_loss([1.0, 2.0])
    with pytest.raises(ValueError, match="no column 'bound'; it has loss"):
        plot_loss({"loss": [1.0]})


def test_marginals_are_of_draws_alone_too(fitted):
    draws = fitted.draw(200)

    assert plot_marginals(draws).shape == plot_marginals({"draws": draws}).shape
    with pytest.raises(TypeError, match="sets must be the draws of a fit, or a dictionary"):
        plot_marginals([draws])


def test_where_is_drawn_of_draws(fitted):
    draws = fitted.draw(1000)

    with pytest.raises(TypeError, match=r"plot_where\(draws\), not where\(draws\)"):
        plot_where(flowvi.where(draws))
