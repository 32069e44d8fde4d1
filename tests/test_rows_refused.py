"""What is for latents that all rows share says so of fits and draws of rows, and what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import plots

THINGS = ("fit of rows", "draws of rows", "bounds of rows", "nested fit")
CALLS = {
    "report": lambda x, folder: flowvi.report(x, folder / "report.html"),
    "evidence": lambda x, _: flowvi.evidence(x),
    "loo": lambda x, _: flowvi.loo(x),
    "compare": lambda x, _: flowvi.compare({"a": x, "b": x}),
    "neutra": lambda x, _: flowvi.neutra(x),
    "where": lambda x, _: flowvi.where(x),
    "diagnose": lambda x, _: flowvi.diagnose(x),
    "bounds": lambda x, _: flowvi.bounds(x),
    "resample": lambda x, _: flowvi.resample(x),
}
OUT = {
    "fit of rows": "got a RowFit, .*fit.iw_bound",
    "draws of rows": "got a RowDraws, .*draws.khat",
    "bounds of rows": "got a RowBounds, .*minus",
    "nested fit": r"got a NestedFit, .*fit.draw\(1000\)",
}


@pytest.fixture(scope="module")
def things() -> dict[str, object]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def both(x: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-1, 1, 4)
    rows = flowvi.fit(
        flowvi.from_pyro(model, x, local="data"), "meanfield", epochs=1, progress=False
    )
    shared = flowvi.from_pyro(both, x, local="data")
    return {
        "fit of rows": rows,
        "draws of rows": rows.draw(200),
        "bounds of rows": rows.iw_bound(particles=10),
        "nested fit": flowvi.nested(shared, "meanfield", "meanfield", steps=1),
    }


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_shared_latents_names_the_way_out(things, tmp_path, name, thing):
    with pytest.raises(TypeError, match=f"^{name} is for latents .*{OUT[thing]}") as caught:
        CALLS[name](things[thing], tmp_path)

    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evidence", "loo", "compare"])
def test_groups_of_rows_are_refused_too(things, tmp_path, name):
    """Their weights have an axis of rows, along which nothing may be summed."""
    idata = flowvi.to_inference_data(things["draws of rows"], particles=10)

    with pytest.raises(ValueError, match=r"latents of rows .*fit\.iw_bound"):
        CALLS[name](idata, tmp_path)


@pytest.mark.filterwarnings("ignore:Pareto k-hat")  # after one step
@pytest.mark.parametrize("name", ["evidence", "diagnose", "bounds", "resample", "where"])
def test_the_way_out_of_a_nested_fit_is_one(things, tmp_path, name):
    CALLS[name](things["nested fit"].draw(1000), tmp_path)


# Pictures take what there is.


@pytest.fixture(scope="module")
def fitted() -> flowvi.Fit:
    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(v["x"]).sum()

    target = flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})
    return flowvi.fit(target, "meanfield", steps=30, progress=False)


def test_a_loss_is_of_a_fit_or_of_its_history(fitted, things):
    ax = plots.plot_loss(fitted)

    assert [t.get_text().strip() for t in ax.texts] == ["training"]
    assert plots.plot_loss(fitted.history).lines and plots.plot_loss({"bound": [1.0, 2.0]}).lines
    with pytest.raises(TypeError, match=r"plot_epochs\(fit\.history\)"):
        plots.plot_loss(things["fit of rows"])
    with pytest.raises(TypeError, match="history must be a fit, or its history"):
        plots.plot_loss([1.0, 2.0])
    with pytest.raises(ValueError, match="no column 'bound'; it has loss"):
        plots.plot_loss({"loss": [1.0]})


def test_marginals_are_of_draws_alone_too(fitted):
    draws = fitted.draw(200)

    assert plots.plot_marginals(draws).shape == plots.plot_marginals({"draws": draws}).shape
    with pytest.raises(TypeError, match="sets must be the draws of a fit, or a dictionary"):
        plots.plot_marginals([draws])


def test_where_is_drawn_of_draws(fitted):
    draws = fitted.draw(1000)

    with pytest.raises(TypeError, match=r"plot_where\(draws\), not where\(draws\)"):
        plots.plot_where(flowvi.where(draws))
