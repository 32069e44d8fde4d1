"""The command line checks everything first, says the verdict first, and writes what it names."""

import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import arviz as az
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

import flowvi
from flowvi.cli import main
from flowvi.cli.model_file import load_target
from flowvi.cli.options import objective
from flowvi.training.guard import Guard

SCHOOLS = Path(__file__).parents[1] / "models" / "eight_schools.py"
FILES = {"posterior.nc", "summary.csv", "loss.png", "pair.png", "report.html", "fit"}
HEAD = """
import pyro
import pyro.distributions as dist
import torch

def data():
    return ()
"""
# A Gaussian guide is exact.
NORMAL = """
def model():
    mu = pyro.sample("mu", dist.Normal(torch.tensor(1.0), 2.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.5))
"""
# A guide of independent coordinates is too narrow by a factor of 0.83, with k-hat near 0.55.
CORRELATED = """
def model():
    covariance = torch.tensor([[1.0, 0.55], [0.55, 1.0]])
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance))
"""
# A Gaussian guide misses nearly all of its tail.
HEAVY = """
def model():
    pyro.sample("x", dist.StudentT(torch.tensor(1.0)).expand([5]).to_event(1))
"""
READS_JSON = """
def data(path):
    return tuple(json.loads(Path(path).read_text()))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def short_report(monkeypatch) -> None:
    """A report takes seconds; what is in it is the business of test_report."""
    module = import_module("flowvi.reporting")
    monkeypatch.setattr(module, "report", lambda folder, file: file.write_text("report"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def fit(text: str, *options: object) -> Result:
    """Write a model file m.py and fit it in a few steps, into the folder `out`."""
    Path("m.py").write_text(HEAD + text)
    return run("fit", "m.py", "--steps", 3, "--out", "out", *options)


def test_eight_schools_from_the_command_to_its_files(folder, default):
    result = run("fit", SCHOOLS, "--steps", 20, "--draws", 400, "--out", "new/out")

    assert result.exit_code in (0, 3)
    assert result.stdout.startswith("Verdict: ")
    assert (
        FILES <= {path.name for path in (folder / "new/out").iterdir()} <= FILES | {"resampled.nc"}
    )
    assert all(f"  {name}" in result.stdout for name in FILES)
    posterior = az.from_netcdf("new/out/posterior.nc")
    assert posterior["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert list(posterior["posterior"]["school"].values) == list("ABCDEFGH")
    assert posterior["sample_stats"]["log_weight"].shape == (4, 100)


def test_a_fit_can_be_loaded_again(folder, default):
    assert fit(NORMAL).exit_code == 0

    loaded = flowvi.load("out/fit", load_target(Path("m.py"), None))

    posterior = az.from_netcdf("out/posterior.nc")["posterior"]
    np.testing.assert_array_equal(loaded.draw(4000)["mu"], posterior["mu"].values.reshape(1, -1))


def test_a_trusted_fit_summarises_its_draws(default):
    result = fit(NORMAL)

    table = pd.read_csv("out/summary.csv", index_col="name")
    draws = az.from_netcdf("out/posterior.nc")["posterior"]["mu"].values
    assert result.exit_code == 0
    assert result.stdout.startswith("Verdict: trust\n")
    assert table.loc["mu", "draws"] == "plain"
    assert table.loc["mu", "mean"] == pytest.approx(draws.mean())
    assert not Path("out/resampled.nc").exists()


def test_resampled_draws_are_written_where_they_are_the_ones_to_trust(default):
    result = fit(CORRELATED, "--guide", "meanfield")

    table = pd.read_csv("out/summary.csv", index_col="name")
    draws = az.from_netcdf("out/resampled.nc")["posterior"]["x"].values
    assert result.exit_code == 0
    assert result.stdout.startswith("Verdict: trust the resampled draws\n")
    assert set(table["draws"]) == {"resampled"}
    assert table.loc["x[0]", "sd"] == pytest.approx(draws[..., 0].std(ddof=1), rel=1e-3)
    # The plain draws are too narrow by 0.16; 4000 draws know the sd to about 0.03 after weighting.
    assert table["sd"].to_numpy() == pytest.approx(1.0, abs=0.1)


def test_a_fit_that_cannot_be_trusted_has_its_own_exit_code():
    result = fit(HEAVY, "--guide", "meanfield")

    assert result.exit_code == 3
    assert result.stdout.startswith("Verdict: do not trust\n")
    assert set(pd.read_csv("out/summary.csv")["draws"]) == {"untrusted"}


def test_resampled_draws_of_an_earlier_fit_do_not_stay():
    fit(CORRELATED, "--guide", "meanfield")

    fit(NORMAL)

    assert not Path("out/resampled.nc").exists()


def test_other_files_in_the_folder_stay():
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")

    fit(NORMAL)

    assert Path("out/notes.txt").read_text() == "mine"


def test_restarts_are_chains(default):
    fit(NORMAL, "--restarts", 2, "--draws", 200)

    assert az.from_netcdf("out/posterior.nc")["posterior"]["mu"].shape == (2, 200)


def test_a_seed_gives_the_same_numbers():
    texts = []
    for seed in (1, 1, 2):
        fit(CORRELATED, "--seed", seed)
        texts.append(Path("out/summary.csv").read_text())

    assert texts[0] == texts[1] != texts[2]


def test_quiet_prints_the_verdict_alone():
    result = fit(NORMAL, "--quiet")

    assert result.stdout.startswith("Verdict: trust\n")
    assert "summary.csv" not in result.output


def test_an_interrupted_fit_writes_what_there_is(monkeypatch):
    calls = iter(range(1000))
    admits = Guard.admits

    def interrupted(self, *arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return admits(self, *arguments)

    monkeypatch.setattr(Guard, "admits", interrupted)

    result = fit(NORMAL)

    assert result.exit_code == 130
    assert result.stdout.startswith("Verdict: ")
    assert "Interrupted" in result.stderr
    assert Path("out/posterior.nc").exists()


def test_a_fit_that_was_cut_off_is_gone_on_with(monkeypatch):
    whole = fit(NORMAL, "--guide", "meanfield", "--steps", "30")
    expected = Path("out/summary.csv").read_text()
    assert whole.exit_code == 0 and not Path("out/checkpoint").exists()
    shutil.rmtree("out")
    calls = iter(range(1000))
    admits = Guard.admits

    def terminated(self, *arguments):
        if next(calls) == 9:
            signal.raise_signal(signal.SIGTERM)
        return admits(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Guard, "admits", terminated)
        cut = fit(NORMAL, "--guide", "meanfield", "--steps", "30")
    assert cut.exit_code == 143
    assert "--resume out" in cut.stderr

    again = fit(NORMAL)
    other = run("fit", "m.py", "--resume", "out", "--guide", "fullrank")
    done = run("fit", "m.py", "--resume", "out", "--guide", "meanfield", "--steps", "30")
    nothing = run("fit", "m.py", "--resume", "out")

    assert again.exit_code == 2 and "cut off" in again.stderr
    assert other.exit_code == 1 and "'guide' was meanfield" in other.stderr
    assert done.exit_code == 0
    assert Path("out/summary.csv").read_text() == expected
    assert nothing.exit_code == 2 and "no fit that was cut off" in nothing.stderr


def test_an_interrupt_before_the_fit_says_so():
    result = fit("raise KeyboardInterrupt\n")

    assert result.exit_code == 130
    assert "Interrupted before" in result.stderr


def test_a_failed_write_keeps_the_old_file(monkeypatch):
    fit(NORMAL)
    before = Path("out/posterior.nc").read_bytes()

    def full(idata, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowvi.compat.netcdf.write", full)
    result = fit(NORMAL, "--seed", 1)

    assert result.exit_code == 1
    assert "Could not write out/posterior.nc: No space left on device" in result.stderr
    assert Path("out/posterior.nc").read_bytes() == before
    # What the fit can be gone on with stays, until its results are written.
    assert {path.name for path in Path("out").iterdir()} == FILES | {"checkpoint"}


def test_draws_that_cannot_be_judged_leave_the_fit(monkeypatch):
    def refuse(draws):
        raise ValueError("Every log weight is -inf.")

    monkeypatch.setattr("flowvi.draws.diagnose.diagnose", refuse)

    result = fit(NORMAL)

    assert result.exit_code == 1
    assert result.stderr.endswith("Error: Every log weight is -inf.\n")
    assert Path("out/fit/fit.json").exists()


OPTIONS = {
    "guide": (["--guide", "realnvq"], "Did you mean realnvp? Choose from auto, "),
    "objective": (["--objective", "elob"], "Did you mean elbo? Choose from elbo, iwelbo, renyi"),
    "forward KL": (["--objective", "forward_kl"], "No objective named 'forward_kl'"),
    "particles": (
        ["--objective", "iwelbo(0)"],
        "particles must be a whole number of at least 1; got 0",
    ),
    "fraction": (["--objective", "iwelbo(1.5)"], "must be a whole number"),
    "alpha": (["--objective", "renyi(2, 4)"], "alpha must lie in [0, 1]"),
    "arguments": (["--objective", "elbo(1, total, 3)"], "elbo takes other arguments"),
    "word": (["--objective", "iwelbo(many)"], "whole number of at least 1; got 'many'"),
    "code": (["--objective", "__import__('os').getcwd()"], "is no objective"),
    "steps": (["--steps", "0"], "0 is not in the range x>=1"),
    "draws": (["--draws", "5"], "5 is not in the range x>=100"),
    "seed": (["--seed", "-1"], "-1 is not in the range"),
    "restarts": (["--restarts", "0"], "0 is not in the range"),
    "no number": (["--steps", "many"], "'many' is not a valid integer"),
    "misspelt": (["--setps", "5"], "--steps"),
    "data missing": (["--data", "no.csv"], "'no.csv' does not exist"),
    "data not taken": (["--data", "m.py"], "m.py brings its own data: leave out --data"),
    "out a file": (["--out", "m.py"], "'m.py' cannot hold the results"),
    "out in a file": (["--out", "m.py/out"], "'m.py/out' cannot hold the results"),
    "out no name": (["--out", "a\0b"], "cannot hold the results"),
    "out too long": (["--out", "x" * 300], "cannot hold the results: File name too long"),
    "out blocked": (["--out", "blocked"], "'blocked/posterior.nc' is in the way"),
    "fit blocked": (["--out", "blocked2"], "'blocked2/fit' is in the way"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_refused_before_the_fit(options, message, monkeypatch):
    monkeypatch.setattr("flowvi.fitting.fit.fit", None)
    Path("blocked/posterior.nc").mkdir(parents=True)
    Path("blocked2").mkdir()
    Path("blocked2/fit").touch()

    result = fit(NORMAL, *options)

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused_before_the_fit():
    Path("locked").mkdir(mode=0o500)

    result = fit(NORMAL, "--out", "locked")

    assert result.exit_code == 2
    assert "'locked' cannot hold the results: Permission denied" in result.stderr


PATHS = {
    "missing": ("models/eight_schols.py", "Did you mean models/eight_schools.py?"),
    "bare name": ("eight_schools", "Did you mean models/eight_schools.py?"),
    "folder": ("models", "models is no Python file"),
    "other file": ("models/README.md", "README.md is no Python file"),
}


@pytest.mark.parametrize("path, message", PATHS.values(), ids=PATHS)
def test_a_path_that_is_no_model_file_is_refused(path, message):
    Path("models").mkdir()
    Path("models/eight_schools.py").touch()
    Path("models/README.md").touch()

    result = run("fit", path, "--out", "out")

    assert result.exit_code == 2
    assert message in result.stderr


MODELS = {
    "syntax": ("def model(:\n", "m.py:8: def model(:"),
    "at import": ("1 / 0\n", "m.py:8, in <module>: 1 / 0\n  ZeroDivisionError: division by zero"),
    "exit": ("raise SystemExit(0)\n", "m.py:8, in <module>: raise SystemExit(0)"),
    "no model": ("", "m.py defines no function 'model'"),
    "no data": ("del data\ndef model(): ...\n", "m.py defines no function 'data'"),
    "no tuple": (NORMAL + "def data(): return torch.ones(3)\n", "write `return (y,)`"),
    "in data": (NORMAL + "def data(): return {}['y']\n", "in data: def data(): return {}['y']"),
    "in model": ("def model():\n    torch.ones(2) + torch.ones(3)\n", "m.py:9, in model: torch."),
    "no latents": ("def model(): ...\n", "has no latent sites"),
    "too few": ("def model(x): ...\n", "data() returns 0 values, but model is model(x)"),
    "too many": (
        "def model(x): ...\ndef data(): return 1, 2\n",
        "data() returns 2 values, but model is model(x)",
    ),
    "discrete": (
        'def model(): pyro.sample("k", dist.Poisson(3.0))\n',
        "Site 'k' is discrete (Poisson)",
    ),
    "coords": (NORMAL + 'coords = {"town": ["a"]}\n', "No dim named 'town'"),
    "while captured": (
        'def model():\n    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))\n'
        '    pyro.factor("f", torch.linalg.cholesky(-torch.eye(2))[0, 0] * x)\n',
        "m.py:10, in model: ",
    ),
}


@pytest.mark.parametrize("text, message", MODELS.values(), ids=MODELS)
def test_a_fault_of_the_model_file_is_shown_with_its_line(text, message):
    result = fit(text)

    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_model_that_reads_a_file_asks_for_it():
    text = NORMAL + "def data(path):\n    return ()\n"
    Path("d.csv").touch()

    assert "m.py reads its data from a file: name it with --data FILE" in fit(text).stderr
    assert fit(text, "--data", "d.csv").exit_code == 0


def test_a_fault_of_the_data_names_the_file_and_the_line():
    Path("d.json").write_text('{"y": [1, 2,]}')
    text = f"{NORMAL}from pathlib import Path\nimport json\n" + READS_JSON

    result = fit(text, "--data", "d.json")

    assert result.exit_code == 1
    assert "m.py:16, in data: " in result.stderr
    assert "(reading d.json)" in result.stderr
    assert "JSONDecodeError" in result.stderr


@pytest.mark.parametrize(
    "text, expected",
    [
        ("elbo", flowvi.elbo()),
        ("elbo()", flowvi.elbo()),
        ("iwelbo(16)", flowvi.iwelbo(16)),
        (" renyi ( 0.5,16 ) ", flowvi.renyi(0.5, 16)),
        ("iwelbo(8, total)", flowvi.iwelbo(8, "total")),
    ],
)
def test_an_objective_is_read_as_a_call(text, expected):
    assert objective(text) == expected


@pytest.mark.parametrize("kind", ["flows", "guides", "objectives"])
def test_list_shows_every_row_of_a_registry(kind):
    registry = {"flows": flowvi.FLOWS, "guides": flowvi.GUIDES, "objectives": ("elbo", "iwelbo")}

    lines = run("list", kind).stdout.splitlines()

    for name in registry[kind]:
        (line,) = [row for row in lines if row.startswith((f"{name} ", f"{name}("))]
        assert line.endswith(".")


def test_list_models_reads_them_without_running_them():
    Path("models").mkdir()
    Path("models/a.py").write_text('"""One."""\n1 / 0\ndef model(): ...\ndef data(path): ...\n')
    Path("models/broken.py").write_text("def (")
    Path("models/helper.py").write_text('"""No model."""\n')

    result = run("list", "models")

    assert result.exit_code == 0
    assert "a       One.  [--data FILE]\n" in result.stdout
    assert "broken  (cannot be read: " in result.stdout
    assert "helper" not in result.stdout


def test_list_models_names_a_folder_that_is_not_there():
    result = run("list", "models", "--dir", "nowhere")

    assert result.exit_code == 2
    assert "There is no folder nowhere" in result.stderr


@pytest.mark.parametrize("command", [[], ["fit"], ["list"]])
def test_help_has_examples(command):
    result = run(*command, "--help")

    assert result.exit_code == 0
    assert "Examples:\n    flowvi " in result.stdout


def test_an_extra_that_is_missing_is_named_without_a_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    done = run("vae", "--out", "out")

    assert done.exit_code == 1
    assert done.stderr.startswith("Error: Without a file the images are scikit-learn's digits")
    assert "pip install flowvi[data]" in done.stderr and done.stderr.count("\n") == 1


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "flowvi", "--version"], capture_output=True, text=True, check=True
    )

    assert done.stdout == f"flowvi {flowvi.__version__}\n"
