"""Commands on the results of a fit: files in, files and one answer out, and clear exit codes."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flowvi
from flowvi.cli import main
from flowvi.cli.output import to_json
from flowvi.compat.arviz_groups import read_groups

FEW = ["--guide", "fullrank", "--steps", "3", "--draws", "1000"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


SIMPLE = """
import pyro
import pyro.distributions as dist
import torch

def data():
    return (torch.zeros(4, dtype=torch.float64),)

def model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
"""


@pytest.fixture(scope="module", params=["double", "single"])
def place(request, reproducible_module, tmp_path_factory):
    """A model file from `new-model`, as it was written, and a fit of it, under both defaults."""
    torch.set_default_dtype(torch.float64 if request.param == "double" else torch.float32)
    folder = tmp_path_factory.mktemp("commands")
    assert run("new-model", "wells", "--dir", folder).exit_code == 0
    (folder / "simple.py").write_text(SIMPLE)
    with pytest.MonkeyPatch.context() as patch:
        # A report takes seconds; what is in it is the business of test_report.
        module = import_module("flowvi.reporting")
        patch.setattr(module, "report", lambda folder, file: file.write_text("report"))
        done = run("fit", folder / "wells.py", "--out", folder / "one", "--json", *FEW)
        assert done.exit_code in (0, 3), done.output
        (folder / "fit.json").write_text(done.stdout)
        for seed, name in enumerate(("two", "three")):
            options = ["--out", folder / name, "--seed", seed, *FEW]
            assert run("fit", folder / "simple.py", *options).exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def default_of_the_place(request, reproducible_test):
    """Commands on a fit run under the default that the fit was made under."""
    if "place" in request.fixturenames:
        request.getfixturevalue("place")
        single = request.node.callspec.params["place"] == "single"
        torch.set_default_dtype(torch.float32 if single else torch.float64)


def test_a_new_model_fits_as_it_is(place):
    posterior = read_groups(place / "one/posterior.nc")["posterior"]

    assert set(posterior.data_vars) == {"slope", "spread", "noise", "offset", "level"}
    assert list(posterior["group"].values) == ["a", "b", "c", "d"]
    assert float(posterior["slope"].mean()) == pytest.approx(0.9, abs=0.4)


def test_a_new_model_replaces_nothing(place):
    before = (place / "wells.py").read_text()

    done = run("new-model", "wells.py", "--dir", place)

    assert done.exit_code == 1 and "is there already" in done.stderr
    assert (place / "wells.py").read_text() == before
    assert run("new-model", "no-name", "--dir", place).exit_code == 2


def test_a_fit_answers_machines(place):
    found = json.loads((place / "fit.json").read_text())

    assert found["diagnosis"]["verdict"] in ("trust", "trust the resampled draws", "do not trust")
    assert found["fit"]["guide"] == "fullrank"
    assert found["fit"]["command"].startswith("flowvi fit ")
    for name in found["fit"]["files"]:
        assert (Path(found["fit"]["folder"]) / name).exists()


def test_resample_follows_the_weights(place):
    done = run("resample", place / "one", "--draws", 600, "--seed", 1, "--json")

    plain_draws = read_groups(place / "one/posterior.nc")
    new = read_groups(place / "one/resampled.nc")
    answer = json.loads(done.stdout)
    khat = answer["diagnosis"]["khat"]
    trusted = khat < answer["diagnosis"]["khat_threshold"]
    assert done.exit_code == (
        0 if trusted and answer["diagnosis"]["verdict"] != "do not trust" else 3
    )
    assert new["posterior"]["level"].shape == (4, 150, 4)
    assert new["log_likelihood"]["y"].shape == (4, 150, 8)
    assert "log_weight" not in new["sample_stats"]
    log_w = plain_draws["sample_stats"]["log_weight"].values.ravel()
    weight = np.exp(log_w - log_w.max())
    slope = plain_draws["posterior"]["slope"].values.ravel()
    expected = np.average(slope, weights=weight)
    found = new["posterior"]["slope"].values
    assert found.mean() == pytest.approx(expected, abs=5 * slope.std() / math.sqrt(600))
    # Each resampled draw is one of the old ones, with all of its values.
    old = {tuple(row) for row in plain_draws["posterior"]["level"].values.reshape(-1, 4)}
    assert {tuple(row) for row in new["posterior"]["level"].values.reshape(-1, 4)} <= old


def test_resampled_draws_cannot_be_resampled(place, tmp_path):
    run("resample", place / "one")
    (tmp_path / "posterior.nc").write_bytes((place / "one/resampled.nc").read_bytes())

    done = run("resample", tmp_path)

    assert done.exit_code == 1
    assert "have no weights" in done.stderr


def test_compare_ranks_folders(place):
    text, found = (
        run("compare", place / "two", place / "three", *option) for option in ([], ["--json"])
    )

    record = json.loads(found.stdout)
    assert text.exit_code == found.exit_code == 0
    assert text.stdout.startswith("Largest evidence: ")
    assert {m["name"] for m in record["models"]} == {"two", "three"}
    assert sum(m["probability"] for m in record["models"]) == pytest.approx(1.0)
    assert {row["name"] for row in record["loo"]} == {"two", "three"}
    assert run("compare", place / "one").exit_code == 2


def test_evidence_answers_machines(place):
    done = run("evidence", place / "one", "--json")

    found = json.loads(done.stdout)["evidence"]
    assert done.exit_code in (0, 3)
    assert found["bounds"][0]["particles"] == 1
    assert found["eubo"] is None  # not a number, for want of chains


def test_neutra_goes_on_from_the_fit(place):
    options = ["--draws", 100, "--warmup", 100, "--chains", 2, "--quiet", "--json"]

    done = run("neutra", place / "simple.py", place / "two", *options)

    found = json.loads(done.stdout)
    assert done.exit_code == (3 if found["diagnosis"]["verdict"] == "do not trust" else 0)
    chains = read_groups(place / "two/mcmc.nc")
    assert chains["posterior"]["mu"].shape == (2, 100)
    assert "diverging" in chains["sample_stats"]


def test_neutra_wants_the_model_of_the_fit(place, tmp_path):
    run("new-model", "other", "--dir", tmp_path)
    text = (tmp_path / "other.py").read_text().replace('"slope"', '"grade"')
    (tmp_path / "other.py").write_text(text)

    done = run("neutra", tmp_path / "other.py", place / "one")

    assert done.exit_code == 1
    assert "'slope'" in done.stderr


READS = SIMPLE.replace("data()", "data(path)").replace(
    "torch.zeros(4, dtype=torch.float64)", "torch.as_tensor(numpy.loadtxt(path))"
)


def test_predict_runs_the_model_on_new_data(place, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("flowvi.reporting"), "report", lambda _, f: f.write_text("x"))
    text = "import numpy\n" + READS.replace('plate("row", 4)', 'plate("row", len(y))')
    (tmp_path / "reads.py").write_text(text)
    (tmp_path / "old").write_text("0.5\n1.5\n1.0\n")
    (tmp_path / "new").write_text("3.0\n4.0\n")
    model, old = tmp_path / "reads.py", ["--data", tmp_path / "old"]
    assert run("fit", model, *old, "--out", tmp_path / "out", *FEW).exit_code == 0

    options = ["--new", tmp_path / "new", "--draws", 200, "--json"]
    done = run("predict", model, tmp_path / "out", *old, *options)

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["shapes"]["y"] == [1, 200, 2]
    found = read_groups(tmp_path / "out/predictions.nc")["predictions"]["y"].values
    # The posterior of the mean is N(0.75, 1/4), and a new value adds one.
    assert abs(found.mean() - 0.75) < 5 * (1.25 / 200) ** 0.5


def test_predict_runs_a_new_model_on_new_rows(place, tmp_path):
    file = tmp_path / "new.csv"
    file.write_text("x,member\n1.0,0\n2.0,3\n9.0,1\n")

    done = run("predict", place / "wells.py", place / "one", "--new", file, "--draws", 200)

    assert done.exit_code in (0, 3), done.output
    assert read_groups(place / "one/predictions.nc")["predictions"]["y"].shape == (4, 50, 3)


def test_predict_names_its_own_option(place, tmp_path):
    (tmp_path / "new.csv").touch()

    done = run("predict", place / "simple.py", place / "two", "--new", tmp_path / "new.csv")

    words = " ".join(done.stderr.split())
    assert done.exit_code == 2 and "--data" not in words
    assert "the file of --new: its data() takes no path. Write data(path=None)" in words


def test_sbc_ranks_the_truth(place, tmp_path):
    options = ["--fits", 5, "--draws", 200, "--guide", "fullrank", "--steps", 1, "--quiet"]

    done = run("sbc", place / "simple.py", "--out", tmp_path / "out", *options)

    assert done.exit_code == 0, done.output
    assert "5 fits to simulated data" in done.stdout
    assert {"sbc.npz", "sbc.png"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_list_answers_machines():
    found = json.loads(run("list", "flows", "--json").stdout)

    assert {row["name"] for row in found} == set(flowvi.FLOWS)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_examples_and_exit_codes(name):
    done = run(name, "--help")

    assert done.exit_code == 0
    assert "Examples:" in done.stdout
    assert f"flowvi {name} " in done.stdout
    if name != "list":
        assert "Exit codes:\n    0 " in done.stdout


def test_the_shell_can_complete_commands():
    done = CliRunner().invoke(main, env={"_FLOWVI_COMPLETE": "bash_source"}, prog_name="flowvi")

    assert "complete" in done.stdout and "_FLOWVI_COMPLETE" in done.stdout


def test_json_has_null_where_a_number_is_not_finite():
    record = {"a": math.nan, "b": np.float64(1.5), "c": [np.inf, Path("x")], "d": np.arange(2)}

    assert json.loads(json.dumps(to_json(record), allow_nan=False)) == {
        "a": None,
        "b": 1.5,
        "c": [None, "x"],
        "d": [0, 1],
    }
