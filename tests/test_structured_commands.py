"""Commands on a model file of a hierarchy, whose units are integrated."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flowvi
from flowvi.cli import main
from flowvi.compat.arviz_groups import read_groups
from flowvi.reporting import page

GROUPS = 6
FILE = '''
"""Groups of counts."""
import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch


def model(group, y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("group", int(group.max()) + 1):
        u = pyro.sample("u", dist.Normal(mu, 0.5))
    with pyro.plate("row", len(group)):
        pyro.sample("y", dist.Poisson(u[group].exp()), obs=y)


def data(path=None):
    if path is not None:
        found = json.loads(Path(path).read_text())
        return (torch.tensor(found["group"]),)
    group = torch.arange(6).repeat_interleave(3)
    return group, torch.tensor([2.0, 0, 1, 3, 4, 2, 0, 1, 0, 5, 2, 2, 1, 1, 3, 0, 2, 1])
'''


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module", params=["double", "single"])
def place(request, reproducible_module, tmp_path_factory):
    """A folder with a model file and its fit, under both defaults."""
    torch.set_default_dtype(torch.float64 if request.param == "double" else torch.float32)
    folder = tmp_path_factory.mktemp("structured")
    (folder / "groups.py").write_text(FILE)
    (folder / "new.json").write_text(json.dumps({"group": [0, 0, 1]}))
    with pytest.MonkeyPatch.context() as patch:
        # Pictures take most of the time of a report.
        patch.setattr(page, "pictures", lambda contents: [])
        options = ["--guide", "structured", "--draws", 1000, "--quiet"]
        done = run("fit", folder / "groups.py", "--out", folder / "one", *options)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(autouse=True)
def default_of_the_place(request, reproducible_test):
    if "place" in request.fixturenames:
        single = request.node.callspec.params["place"] == "single"
        torch.set_default_dtype(torch.float32 if single else torch.float64)


def test_a_folder_has_the_units(place):
    draws = read_groups(place / "one/posterior.nc")

    assert draws["posterior"]["u"].dims == ("chain", "draw", "group")
    assert draws["unit_log_likelihood"]["group_units"].shape == (4, 250, GROUPS)
    assert draws["unit_diagnosis"]["unit_khat"].shape == (GROUPS,)
    assert np.isfinite(flowvi.loo(draws, units=True).loo_i).all()


def test_a_report_has_shared_latents_first_and_units(place):
    text = (place / "one/report.html").read_text()

    assert 'id="units"' in text and "6 units of group are independent" in text
    assert text.index('<th scope="row">mu</th>') < text.index('<th scope="row">u[')
    assert "6 of 6 units of group" in text


def test_resampled_draws_keep_the_units(place):
    assert run("resample", place / "one", "--draws", 200).exit_code == 0

    again = read_groups(place / "one/resampled.nc")

    assert again["unit_log_likelihood"]["group_units"].shape == (4, 50, GROUPS)
    assert "unit_khat" in again["unit_diagnosis"]


def test_new_units_are_predicted(place):
    options = [place / "groups.py", place / "one", "--new", place / "new.json"]

    refused = run("predict", *options)
    done = run("predict", *options, "--new-units", "group", "--json")

    assert refused.exit_code == 1 and "new_units='group'" in refused.output
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["shapes"] == {"u": [1, 1000, 2], "y": [1, 1000, 3]}


def test_the_guide_is_listed_and_can_be_resumed(place, monkeypatch):
    monkeypatch.setattr(sys.modules["flowvi.reporting"], "report", lambda a, b: b.write_text(""))
    assert "structured" in run("list", "guides").output.split()
    command = ["fit", place / "groups.py", "--guide", "structured", "--draws", 1000, "--quiet"]

    none = run(*command, "--resume", place / "one")
    done = run(*command, "--out", place / "two")

    assert none.exit_code == 2 and "no fit that was cut off" in none.output
    a, b = (read_groups(place / name / "posterior.nc")["posterior"] for name in ("one", "two"))
    np.testing.assert_array_equal(a["u"], b["u"])
    assert done.exit_code == 0
