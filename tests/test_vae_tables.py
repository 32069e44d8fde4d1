"""Autoencoders of tables: kinds of columns, their densities, what is refused, and the command."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import distributions as td

import flowvi
from flowvi import plots, vae
from flowvi.cli import main
from flowvi.vae.columns import Column
from flowvi.vae.mixed import FLOOR, MixedLikelihood

N = 200
COLUMNS = [
    Column("x", "float", (), 3.0, 2.0),
    Column("yes", "binary", (0, 1), 0.5, 0.5),
    Column("word", "category", ("a", "b", "c")),
    Column("few", "count", (), 2.0, 1.0),
    Column("many", "count", (), 4.0, 6.0),
]


@pytest.fixture
def table():
    """Columns of which all but one follow a latent number."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=N)
    return pd.DataFrame(
        {
            "size": 3 + 2 * z + 0.3 * rng.normal(size=N),
            "yes": (z + 0.3 * rng.normal(size=N) > 0).astype(int),
            "word": np.array(["low", "middle", "high"])[np.digitize(z, [-0.5, 0.5])],
            "seen": rng.poisson(np.exp(1 + 0.7 * z)),
            "noise": rng.random(N) < 0.4,
        }
    )


def test_columns_have_the_kinds_that_their_values_say(table):
    made = table.assign(
        whole=np.arange(N) // 2 - 5,
        grade=pd.Categorical(["good"] * 150 + ["bad"] * 50, ["bad", "good", "none"], ordered=True),
        half=np.arange(N) % 2 / 2,
        ones=(np.arange(N) % 2).astype(float),
        small=np.arange(N) % 3,
    )

    columns = {c.name: c for c in vae.columns_of(made)}

    kinds = {name: c.kind for name, c in columns.items()}
    assert kinds == {
        **{"size": "float", "yes": "binary", "word": "category", "seen": "count"},
        **{"noise": "binary", "grade": "category", "half": "float", "ones": "binary"},
        **{"small": "count", "whole": "float"},
    }
    assert columns["grade"].levels == ("bad", "good")
    assert columns["word"].levels == ("high", "low", "middle")
    assert columns["small"].likelihood == "Poisson"
    assert columns["seen"].likelihood == "negative binomial"
    back = vae.decoded(vae.encoded(made, list(columns.values())), list(columns.values()))
    pd.testing.assert_frame_equal(
        back, made.astype({"grade": object}), check_dtype=False, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ([1.0, np.nan] * 100, "Column 'odd' has 100 missing values of 200: leave out these rows"),
        ([None, "a"] * 100, "Column 'odd' has 100 missing values"),
        ([2.5] * N, r"Column 'odd' is constant, 2.5: leave it out"),
        (["a"] * N, "Column 'odd' is constant, a"),
        ([1.0, np.inf] * 100, "Column 'odd' has infinite values"),
        (range(5, 5 + N), "Column 'odd' numbers the rows"),
        ([f"id {i}" for i in range(N)], "Column 'odd' has 200 different values in 200 rows"),
        (pd.date_range("2020-01-01", periods=N), "Column 'odd' holds dates, for which there is no"),
        ([1j, 2.0] * 100, "Column 'odd' holds complex128; expected real numbers"),
        ([[1], 2] * 100, "Column 'odd' holds objects"),
    ],
)
def test_columns_without_a_likelihood_are_refused_by_name(table, column, words):
    with pytest.raises(ValueError, match=words):
        vae.load_table(table.assign(odd=column))


def test_tables_that_are_none_are_refused(table):
    with pytest.raises(ValueError, match="at least 20 rows; got 7"):
        vae.load_table(table[:7])
    with pytest.raises(ValueError, match="more than one column 'yes': rename"):
        vae.load_table(table.rename(columns={"noise": "yes"}))
    with pytest.raises(ValueError, match="no columns"):
        vae.load_table(table[[]])


def test_each_column_has_the_density_of_its_family():
    family = MixedLikelihood(COLUMNS).double()
    params = torch.randn(6, family.outputs, dtype=torch.float64)
    x = torch.tensor([[2.5, 1, 2, 3, 9], [4.0, 0, 0, 0, 0]], dtype=torch.float64).repeat(3, 1)

    found = family(params).log_prob_of_columns(x)

    scale = torch.tensor(2.0).double() * (FLOOR + (1 - FLOOR))
    size = family.log_size.exp()
    logits = params[:, 6] - family.log_size
    expected = [
        td.Normal(3.0 + 2.0 * params[:, 0], scale).log_prob(x[:, 0]),
        td.Bernoulli(logits=params[:, 1]).log_prob(x[:, 1]),
        td.Categorical(logits=params[:, 2:5]).log_prob(x[:, 2]),
        td.Poisson(params[:, 5].exp()).log_prob(x[:, 3]),
        td.NegativeBinomial(size, logits=logits).log_prob(x[:, 4]),
    ]
    torch.testing.assert_close(found, torch.stack(expected, -1))
    torch.testing.assert_close(family(params).log_prob(x), found.sum(-1))
    assert torch.isclose(size, torch.tensor(16 / 32).double()).all()


def test_draws_follow_the_density():
    """Means of draws are those of the families; the weights of a density have the mean one."""
    family = MixedLikelihood(COLUMNS)
    params = 0.5 * torch.randn(family.outputs)
    n = 20_000

    x = family(params).expand((n,)).sample()

    mean = family.mean(params)
    for place in (0, 1, 3, 4):
        error = x[:, place].std() / math.sqrt(n)
        assert abs(x[:, place].mean() - mean[place]) < 4.5 * error
    shares = torch.bincount(x[:, 2].long(), minlength=3) / n
    assert (shares - params[2:5].softmax(0)).abs().max() < 4.5 * 0.5 / math.sqrt(n)
    # Of a count k the expectation of a^k is the generating function: of all moments one number.
    size, m = family.log_size.exp(), mean[4]
    found = 0.5 ** x[:, 4]
    assert abs(found.mean() - (1 + m * 0.5 / size) ** -size) < 4.5 * found.std() / math.sqrt(n)


def test_large_counts_keep_their_digits_in_single_precision():
    family = MixedLikelihood([Column("n", "count", (), 1e5, 2e3)]).float()
    params, x = torch.tensor([[math.log(1e5)]]).float(), torch.tensor([[100_300.0]])

    found = family(params).log_prob(x)

    log_size = family.log_size.double()
    exact = td.NegativeBinomial(log_size.exp(), logits=params.double()[:, 0] - log_size)
    torch.testing.assert_close(found, exact.log_prob(x[:, 0].double()).float())


def test_an_autoencoder_begins_at_the_columns_and_learns_what_ties_them(table):
    given = vae.load_table(table)
    made = vae.build_table(given, 2, hidden=(32,), prior="mixture")
    target = flowvi.from_pyro(made.model, given.train, local="data")
    alone = vae.independent(given, given.test).sum(1).double().numpy()

    fit = flowvi.fit(
        target,
        made.guide,
        flowvi.elbo(1, "total"),
        validation=given.val,
        epochs=60,
        lr=5e-3,
        batch_size=40,
        progress=False,
    )

    bound = fit.iw_bound(given.test, 50)
    gain = bound.values + alone
    assert gain.mean() > 4.5 * gain.std() / math.sqrt(len(gain))
    assert [len(part) for part in (given.train, given.val, given.test)] == [160, 20, 20]
    new = vae.decoded(vae.simulated(made.generator, 50, seed=1), given.columns)
    assert list(new.columns) == list(table.columns)
    assert new["seen"].dtype.kind == "i" and set(new["word"]) <= set(table["word"])
    assert vae.by_column(made.generator, fit.guide, given.test).shape == (20, 5)


def test_priors_of_images_are_refused(table):
    with pytest.raises(ValueError, match="prior of rows"):
        vae.build_table(vae.load_table(table), prior="vamp")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_command_takes_tables(table, tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    if ending == "csv":
        table.to_csv("t.csv", index=False)
    else:
        pytest.importorskip("pyarrow")
        table.to_parquet("t.parquet")
    few = ["vae", "--data", f"t.{ending}", "--epochs", "2", "--particles", "7"]

    done = CliRunner().invoke(main, [*few, "--out", "r"])

    assert done.exit_code == 0, done.output
    assert "columns by themselves, nats per row" in done.output
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        *("fit", "parts.json", "table.csv", "test_bounds.csv", "columns.csv", "simulated.csv"),
        *("columns.png", "associations.png", "epochs.png", "map.png", "report.html"),
    }
    assert list(pd.read_csv("r/simulated.csv").columns) == list(table.columns)
    page = (tmp_path / "r/report.html").read_text()
    assert "What the code tells" in page and "categorical, 3 levels" in page
    parts = json.loads((tmp_path / "r/parts.json").read_text())
    assert [c["kind"] for c in parts["columns"]] == [
        *("float", "binary", "category", "count", "binary")
    ]
    given = vae.load_table(f"t.{ending}")
    sizes = {k: parts[k] for k in ("latent", "guide", "prior", "hidden", "seed")}
    made = vae.build_table(given, **sizes)
    target = flowvi.from_pyro(made.model, given.train, local="data")
    fit = flowvi.load("r/fit", target, made.guide)
    written = pd.read_csv("r/test_bounds.csv")["bound"]
    np.testing.assert_allclose(fit.iw_bound(given.test, 7).values, written, rtol=1e-6)
    other = CliRunner().invoke(main, [*few, "--prior", "maf", "--against", "r", "--out", "s"])
    assert other.exit_code == 0 and "paired" in other.output


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--likelihood", "gaussian"], 2, "--likelihood is for images"),
        (["--net", "conv"], 2, "--net is for images"),
        (["--prior", "vamp"], 2, "--prior vamp is made of images"),
    ],
)
def test_options_of_images_are_refused_for_tables(table, tmp_path, more, code, words):
    file = tmp_path / "t.csv"
    table.to_csv(file, index=False)
    done = CliRunner().invoke(main, ["vae", "--data", str(file), "--out", str(tmp_path), *more])
    assert done.exit_code == code and words in done.output


def test_a_table_with_gaps_is_refused_by_the_command(table, tmp_path):
    file = tmp_path / "t.csv"
    table.assign(seen=table["seen"].where(table["seen"] > 1)).to_csv(file, index=False)
    done = CliRunner().invoke(main, ["vae", "--data", str(file), "--out", str(tmp_path / "r")])
    assert done.exit_code == 1 and "Column 'seen' has" in done.output


def test_pictures_of_tables_need_the_same_columns(table):
    ax = plots.plot_columns(table, table[::-1])
    assert len([a for a in ax.figure.axes if a.get_visible()]) == 5
    ax = plots.plot_associations(table, table)
    line = ax.containers[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), line.get_ydata())
    with pytest.raises(ValueError, match="same columns"):
        plots.plot_columns(table, table[["yes"]])
