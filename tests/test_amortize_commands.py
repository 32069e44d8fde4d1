"""`flowvi amortize` and `flowvi apply`, the report, the cards and the pictures."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner

import flowvi
from flowvi.amortized.table import Fits, Line
from flowvi.amortized.training import Plan
from flowvi.cli import main
from flowvi.diagnostics.calibration import Calibration, Recovery
from flowvi.plots import plot_coverage, plot_held_out, plot_recovery
from flowvi.reporting.amortized import report_amortized

MODEL = """
import pyro, torch
import pyro.distributions as dist

def data():
    return torch.randn(8, generator=torch.Generator().manual_seed(0)), torch.zeros(8)

def model(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a * x, 1.0), obs=y)
"""


def model(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model file, two data sets in a table, and a trained guide."""
    path = tmp_path_factory.mktemp("amortized")
    (path / "line.py").write_text(MODEL)
    rng = np.random.default_rng(1)
    rows = [f"{who},{rng.normal():.4f},{rng.normal():.4f}" for who in "ab" for _ in range(6)]
    (path / "new.csv").write_text("\n".join(["who,x,y", *rows]))
    done = run("amortize", path / "line.py", "--out", path / "out", "--steps", 100, "--fits", 20)
    assert done.exit_code == 0, done.output
    return path


def run(*words):
    return CliRunner().invoke(main, [*map(str, words), "--quiet"])


def calibration(rng):
    truth = rng.normal(size=(120, 2))
    ranks = rng.integers(0, 64, size=(120, 2))
    recovery = Recovery(truth, truth + 0.1, np.full((120, 2), 0.2))
    return Calibration(
        ("a", "b"), 63, ranks, ranks, rng.random((120, 2)), ("trust",) * 120, recovery=recovery
    )


def test_a_guide_and_a_report_are_written(folder):
    out = folder / "out"
    assert {"guide", "report.html"} <= {file.name for file in out.iterdir()}
    page = (out / "report.html").read_text()
    # Calibration first.
    assert page.index("<h2>Calibration") < page.index("<h2>Training")
    assert "data sets are trusted without a fit" in page and page.count("<img") == 4


def test_new_data_sets_are_judged(folder):
    words = ("--model", folder / "line.py", "--data", folder / "new.csv", "--by", "who")

    done = run("apply", folder / "out", *words, "--no-escalate", "--out", folder / "new", "--json")

    assert done.exit_code in (0, 3), done.output
    record = json.loads(done.output)
    assert [line["data set"] for line in record["data sets"]] == [
        "new.csv: who a",
        "new.csv: who b",
    ]
    assert {"fits.csv", "summary.csv", "fits.npz"} <= {f.name for f in (folder / "new").iterdir()}
    assert (folder / "new" / "fits.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--by", "town"), 2, "no column 'town' for --by; it has who, x, y"),
        (("--data", "missing.csv"), 2, "does not exist"),
    ],
)
def test_commands_that_are_wrong(folder, words, code, said):
    given = ("--model", folder / "line.py", "--data", folder / "new.csv")

    done = run("apply", folder / "out", *given, *words)

    assert done.exit_code == code
    assert said in done.output


def test_a_file_without_a_column_is_refused(folder):
    (folder / "short.csv").write_text("x\n1.0\n2.0\n")

    done = run(
        "apply", folder / "out", "--model", folder / "line.py", "--data", folder / "short.csv"
    )

    assert done.exit_code == 1
    assert "lacks 'y'" in done.output


def test_pictures_show_what_was_measured():
    found = calibration(np.random.default_rng(0))

    axes = plot_recovery(found)
    assert axes.shape == (2, 2)
    assert "a" in {axes[0, 0].get_title(loc) for loc in ("left", "center")}
    points = axes[1, 0].lines[0].get_xydata()
    assert np.allclose(points[:, 1], 0.5)  # 0.1 in units of 0.2
    line = plot_coverage(found).lines[0].get_xydata()
    plain, _ = found.coverage(line[:, 0])
    assert np.allclose(line[:, 1], plain[:, 0] - line[:, 0])
    losses = np.array([[10.0, 2.0], [20.0, 1.0]])
    assert np.array_equal(plot_held_out(losses).lines[0].get_xydata(), losses)


def test_a_calibration_of_fits_has_no_recovery():
    found = calibration(np.random.default_rng(0))
    without = Calibration(*(getattr(found, n) for n in list(vars(found))[:6]))

    with pytest.raises(ValueError, match=r"needs the calibration of an amortised guide"):
        plot_recovery(without)


def test_cards_and_tables():
    guide = flowvi.amortize(
        model, torch.zeros(4), steps=5, budget=None, progress=False, plan=Plan(batch=32)
    )
    lines = [Line("trust", "guide", 0.1, 90.0, 100), Line("do not trust", "failed", reason="<b>")]
    fits = Fits("line", lines * 8, lambda i: None)

    assert "1 of" not in str(fits) and "8 of 16 data sets trusted" in str(fits)
    assert str(fits).count("\n") == 2 + 11
    card = fits._repr_html_()
    assert "50% trusted" in card and "&lt;b&gt;" in card
    assert "amortised" in guide._repr_html_()
    assert list(fits.to_dataframe()["verdict"][:2]) == ["trust", "do not trust"]
    with pytest.raises(IndexError, match="16 data sets"):
        fits[16]


def test_the_report_lists_data_sets(tmp_path):
    guide = flowvi.amortize(
        model, torch.zeros(4), steps=5, budget=None, progress=False, plan=Plan(batch=32)
    )
    fits = guide.fit_many([np.zeros(4)], escalate=False, progress=False)
    found = calibration(np.random.default_rng(0))

    file = report_amortized(guide, found, tmp_path / "page.html", fits)

    page = file.read_text()
    assert page.index("<h2>Calibration") < page.index("<h2>Data sets") < page.index("<h2>Training")
