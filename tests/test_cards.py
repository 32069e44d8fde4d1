"""Prompts show what `print` says, and notebooks show cards."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from kinds import data

import flowvi
from flowvi.diagnostics.calibration import Calibration
from flowvi.reporting import cards
from flowvi.reporting.decimals import decimals, even

# Nothing in a notebook is larger.
LARGEST = 200_000


def model(y):
    a = pyro.sample("a<b>", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        effect = pyro.deterministic("effect", a + 0.5 * raw)
        pyro.deterministic("one", torch.ones(3))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


@pytest.fixture(scope="module")
def fit():
    target = flowvi.from_pyro(model, torch.tensor([0.3, -0.2, 1.1]))
    target = target.label({"group": ["u", "v", "w"]})
    return flowvi.fit(target, "fullrank", steps=20, compile=False, progress=False)


@pytest.fixture(scope="module")
def draws(fit):
    return fit.draw(1000)


def calibration(fits: int) -> Calibration:
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 100, (fits, 2))
    return Calibration(("a", "b"), 99, ranks, ranks, (ranks + 0.5) / 100, ("trust",) * fits)


@pytest.fixture(scope="module")
def shown(fit, draws):
    other = fit.draw(1000, seed=1)
    return {
        "fit": fit,
        "draws": draws,
        "resampled": flowvi.resample(draws),
        "diagnosis": flowvi.diagnose(draws),
        "evidence": flowvi.evidence(draws),
        "comparison": flowvi.compare({"first": draws, "<b>second</b>": other}),
        "calibration": calibration(20),
    }


class Checked(HTMLParser):
    """Collects tags and text, and refuses tags that are not closed."""

    VOID = frozenset({"img", "circle", "rect", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_prompts_show_what_print_says(shown, draws):
    others = [flowvi.where(draws), flowvi.bounds(draws), flowvi.predict(draws, data()[:, 0][:3])]

    for result in (*shown.values(), *others):
        assert repr(result) == str(result)
        assert len(repr(result)) < 5000


def test_cards_are_whole_small_and_escaped(shown):
    for name, result in shown.items():
        html = result._repr_html_()
        page = Checked(html)

        assert 500 < len(html) < LARGEST, name
        assert "<b>second</b>" not in html and "a<b>" not in html
        assert "script" not in page.tags and "http" not in html
        # One picture, drawn here.
        assert page.tags.count("img") + page.tags.count("svg") == 1, name


def test_cards_say_the_verdict_first_and_then_why(shown):
    found = shown["diagnosis"]

    for name in ("draws", "diagnosis"):
        text = Checked(shown[name]._repr_html_()).text
        assert text.startswith(found.verdict)
        assert all(reason in text for reason in found.reasons[: cards.ROWS])
    assert Checked(shown["fit"]._repr_html_()).text.startswith(found.verdict)
    assert "What the fit decided" in shown["fit"]._repr_html_()
    assert Checked(shown["calibration"]._repr_html_()).text.startswith("too few to tell")


def test_cards_have_the_summary_with_hdi_and_errors(shown, draws):
    text = Checked(shown["draws"]._repr_html_()).text
    table = draws.summary()

    assert "94 % HDI" in text and "MCSE" in text
    line = table.loc["effect[v]"]
    places = decimals(table["sd"].drop([f"one[{g}]" for g in "uvw"]).to_numpy())
    for column in ("mean", "sd"):
        assert even(line[column], line["sd"], places) in text
    # Standardised and constant elements are folded away; the table of all has them.
    lines = text.split("ESS")[1]
    assert "raw[" not in lines and "one[" not in lines and "effect[u]" in lines
    assert {"raw[u]", "one[w]"} <= {*table.index}


@pytest.mark.slow
def test_cards_of_rows_and_chains():
    target = flowvi.from_pyro(rows, data()[:, 0], local="row")
    fit = flowvi.fit(target, epochs=2, progress=False)
    shared = flowvi.fit(
        flowvi.from_pyro(model, torch.zeros(3)), "fullrank", steps=10, compile=False, progress=False
    )
    chains = flowvi.neutra(shared, 100, 100, 2, progress=False)

    for result in (fit, fit.draw(200), fit.draw(50), chains, flowvi.evidence(fit.draw(200))):
        page = Checked(result._repr_html_())
        assert len(page.text) > 100
    assert "not judged" in fit.draw(50)._repr_html_()
    assert "R-hat" in flowvi.diagnose(chains)._repr_html_()


def rows(y):
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_card_leaves_no_open_figure_and_no_other_backend(shown):
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), plt.rcParams["backend"]
    shown["draws"]._repr_html_()

    assert (plt.get_fignums(), plt.rcParams["backend"]) == before


def test_a_notebook_shows_cards(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    code = """import flowvi, torch
target = flowvi.from_density(lambda v: -0.5 * v["x"] ** 2, {"x": flowvi.Site()})
fit = flowvi.fit(target, "meanfield", steps=10, compile=False, seed=0)"""
    cells = [code, "fit", "draws = fit.draw(1000)\ndraws", "flowvi.diagnose(draws)", "print(draws)"]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])

    nbclient.NotebookClient(made, timeout=300, kernel_name="python3").execute()

    first, *cards_of, printed = (cell.outputs for cell in made.cells)
    bar = "".join(out["text"] for out in first if out.output_type == "stream")
    assert re.search(r"\r.*done \|", bar) or any("widget" in json.dumps(out) for out in first)
    for (out,) in cards_of:
        assert Checked(out["data"]["text/html"]).text.split()[0] in ("trust", "do", "not")
        assert len(out["data"]["text/html"]) < LARGEST
    (draws_shown,) = cards_of[1]
    assert draws_shown["data"]["text/plain"].strip() == printed[0]["text"].strip()


def test_numbers_of_a_table_have_even_decimals():
    sds = np.array([0.04994, 0.333, 3.33, 15.8, math.nan])
    places = decimals(sds)

    assert [even(x, x, places) for x in sds[:4]] == ["0.05", "0.33", "3.33", "15.80"]
    assert even(-1e-9, 1.0, 2) == "0.00" and even(math.inf, 1.0, 2) == "inf"
    assert even(1.234e-5, 1e-5, 2) == "1.23e-05" and even(12345678.0, 1e6, 2) == "1.23e+07"
