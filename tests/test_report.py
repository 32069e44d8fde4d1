"""The report is one whole page: it loads nothing, escapes all names, and reads well everywhere."""

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flowvi
from flowvi.cli import main
from flowvi.compat.arviz_groups import read_groups
from flowvi.draws.scalars import scalars_of
from flowvi.interop.read_draws import diagnosis_of, draws_of

CHROMIUM = shutil.which("chromium")
BROWSER = [
    *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
MODEL = """
import pyro
import pyro.distributions as dist
import torch

NAME = '<b>&"$x$'

def data():
    return (torch.tensor([0.5, 1.5, -0.5], dtype=torch.float64),)

def model(y):
    zero = y.new_zeros(())
    mu = pyro.sample(NAME, dist.Normal(zero, 2.0))
    with pyro.plate("row", 3):
        theta = pyro.sample("theta", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(mu + 0.1 * theta, 1.0), obs=y)

coords = {"row": ["<img src=x>", "b", "c"]}
"""
SECTIONS = ["verdict", "fit", "posterior", "predictive", "weights", "evidence", "training"]
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Tags with their attributes, headings, text, and whether all that opens is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of a small fit whose names are as awkward as they can be."""
    place = tmp_path_factory.mktemp("report")
    (place / "odd.py").write_text(MODEL)
    options = ["--guide", "realnvp", "--steps", "20", "--restarts", "2", "--draws", "400"]
    done = CliRunner().invoke(
        main, ["fit", str(place / "odd.py"), "--out", str(place / "out"), *options]
    )
    assert done.exit_code in (0, 3), done.output
    assert "report.html" in done.output
    (place / "odd.py").unlink()
    return place / "out"


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text()


def test_the_verdict_and_its_reasons_come_first(text, folder):
    diagnosis = diagnosis_of(read_groups(folder / "posterior.nc"))
    words = " ".join(" ".join(read(text).text).split())

    assert words.index("odd") < words.index(diagnosis.verdict) < words.index("What was fitted")
    for reason in diagnosis.reasons:
        assert words.index(" ".join(reason.split())) < words.index("What was fitted")


def test_nothing_is_loaded_from_anywhere(text):
    page = read(text)

    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object"})
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.of("img"))
    assert all(a["href"].startswith("data:") for a in page.of("link"))
    assert all(a["href"].startswith("#") for a in page.of("a"))
    assert not re.search(r"url\(|@import|\bhttps?:", text)


def test_names_are_escaped(text):
    page = read(text)

    assert '<b>&"$x$' in "".join(page.text)
    assert "theta[<img src=x>]" in "".join(page.text)
    assert all(a.get("src") != "x" for a in page.of("img"))
    assert len(page.of("b")) == text.count("<dd><b>")


def test_every_section_is_there_and_every_link_leads_to_one(text):
    page = read(text)
    ids = [a["id"] for _, a in page.tags if "id" in a]

    assert [name for name in ids if name in SECTIONS] == SECTIONS
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} <= set(ids)


def test_headings_step_down_one_at_a_time(text):
    levels = [int(tag[1]) for tag, _ in read(text).tags if re.fullmatch(r"h\d", tag)]

    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_it_can_be_read_without_seeing_it(text):
    page = read(text)

    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("img")) >= 7
    assert all(len(a["alt"]) > 20 for a in page.of("img"))
    assert all(a.get("scope") in ("row", "col") for a in page.of("th"))
    scrolled = [a for _, a in page.tags if "scroll" in a.get("class", "").split()]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolled)


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_what_it_is_on(text):
    colours = dict(re.findall(r"--(\w+): (#\w{6})", text))
    pairs = [(front, back) for front in ("ink", "soft", "blue") for back in ("paper", "wash")]
    pairs += [("paper", tone) for tone in ("good", "care", "bad")]

    for front, back in pairs:
        dark, light = sorted(luminance(colours[name]) for name in (front, back))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{front} on {back}"


def test_the_table_is_that_of_the_draws(text, folder):
    kept = folder / "resampled.nc"
    draws = draws_of(read_groups(kept if kept.exists() else folder / "posterior.nc"))
    words = " ".join(" ".join(read(text).text).split())

    for name in draws.values:
        one = next(scalars_of(draws, name))
        # Each number has some decimals of its own table.
        mean = rf"{re.escape(one.label)} (-?[\d.,]+) "
        found = [float(number.replace(",", "")) for number in re.findall(mean, words)]
        assert any(abs(x - one.draws.mean()) <= 0.06 for x in found)
    assert "R-hat compares the restarts" in words


def test_seed_versions_and_command_are_there(text):
    words = " ".join("".join(read(text).text).split())

    assert f"flowvi {flowvi.__version__}" in words
    assert f"torch {torch.__version__}" in words
    assert re.search(r"flowvi fit \S*odd\.py --guide realnvp --steps 20", words)
    assert "Vehtari" in words and "Dinh" in words


def test_the_command_reads_the_folder_alone(folder, text, tmp_path):
    done = CliRunner().invoke(main, ["report", str(folder), "--out", str(tmp_path / "a.html")])

    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.html").read_text() == text


def test_a_folder_without_results_is_refused(tmp_path):
    done = CliRunner().invoke(main, ["report", str(tmp_path)])

    assert done.exit_code == 1
    assert "name a folder that flowvi fit wrote" in done.output


def test_a_table_read_back_is_the_one_that_was_written(folder):
    idata = read_groups(folder / "posterior.nc")

    draws, diagnosis = draws_of(idata), diagnosis_of(idata)

    again = flowvi.diagnose(draws)
    assert list(draws.values) == ['<b>&"$x$', "theta"]
    np.testing.assert_array_equal(draws.log_weights, idata["sample_stats"]["log_weight"])
    assert diagnosis.khat == pytest.approx(again.khat)
    assert diagnosis.log_evidence == pytest.approx(again.log_evidence)


def test_a_fit_is_reported_without_a_folder(tmp_path):
    target = flowvi.from_density(
        lambda v: -0.5 * v["x"].square().sum(), {"x": flowvi.Site(shape=(2,))}
    )
    fit = flowvi.fit(target, "meanfield", steps=1, progress=False)

    file = flowvi.report(fit, tmp_path / "x.html", draws=200)

    assert "Posterior prediction" not in file.read_text()
    with pytest.raises(ValueError, match="Say where the report goes"):
        flowvi.report(fit)


def test_where_there_is_no_evidence_the_report_says_why(tmp_path):
    import pyro
    import pyro.distributions as dist

    def flat():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.3))

    fit = flowvi.fit(flowvi.from_pyro(flat), "meanfield", steps=1, progress=False)

    words = " ".join(read(flowvi.report(fit, tmp_path / "x.html", draws=200).read_text()).text)

    assert "The prior of x is improper" in words
    assert "log evidence" not in words


# The page measures itself, in a copy that may run a script.
MEASURE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, nav, pre") && e.getBoundingClientRect().right > innerWidth + 1);
  const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth);
  document.title = ["measured", innerWidth, document.documentElement.scrollWidth,
    wide.length, broken.length, document.images.length].join(" ");
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the report with")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_whole_and_without_a_complaint(text, folder, tmp_path, width):
    copy = tmp_path / "copy.html"
    copy.write_text(re.sub(r"<meta http-equiv[^>]*>", MEASURE, text))
    size = f"--window-size={width},900"

    measured = subprocess.run(
        [*BROWSER, size, "--dump-dom", copy.as_uri()], capture_output=True, text=True, check=True
    ).stdout
    logged = subprocess.run(
        [
            *BROWSER,
            size,
            "--enable-logging=stderr",
            f"--screenshot={tmp_path / 's.png'}",
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stderr

    found = re.search(r"<title>measured (\d+) (\d+) (\d+) (\d+) (\d+)</title>", measured)
    inner, scrolled, wide, broken, images = map(int, found.groups())
    assert scrolled <= inner and wide == 0
    assert broken == 0 and images >= 7
    assert "CONSOLE" not in logged
    assert (tmp_path / "s.png").stat().st_size > 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to print the report with")
def test_it_can_be_printed(folder, tmp_path):
    file = tmp_path / "report.pdf"

    subprocess.run(
        [*BROWSER, f"--print-to-pdf={file}", (folder / "report.html").as_uri()],
        capture_output=True,
        check=True,
    )

    assert file.read_bytes().startswith(b"%PDF")
