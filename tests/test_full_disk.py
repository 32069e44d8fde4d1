"""A full disk costs the file that did not fit, and never what was computed."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import flowvi
from flowvi.analysis.sbc_store import Outcome, Store
from flowvi.cli import main, results
from flowvi.compat import netcdf
from flowvi.compat.arviz_groups import make_groups, read_groups
from flowvi.compat.netcdf import write_groups
from flowvi.runtime import files, memory

MODEL = """
import pyro
import pyro.distributions as dist
import torch

def data():
    return (torch.tensor([1.0, 2.0, 3.0]),)

def model(y):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)
"""
QUICK = ["--guide", "meanfield", "--steps", "3", "--quiet"]
# Files of a whole fit that are smaller than this, and some that are not.
SMALL = 60_000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a model file."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    return tmp_path


@pytest.fixture(autouse=True)
def short_report(monkeypatch) -> None:
    """A report takes seconds; what is in it is the business of test_report."""
    module = import_module("flowvi.reporting")
    monkeypatch.setattr(module, "report", lambda folder, file: file.write_text("report"))


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: an error of the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def hidden(where: Path) -> list[str]:
    return [file.name for file in where.rglob(".*")]


def groups():
    draws = np.random.default_rng(0).normal(size=(1, 50_000))
    return make_groups({"posterior": xr.Dataset({"x": (("chain", "draw"), draws)})})


def target() -> flowvi.Target:
    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.distributions.Normal(1.0, 2.0).log_prob(v["x"]).sum()

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def fitted(**settings: object) -> flowvi.Fit:
    return flowvi.fit(target(), "meanfield", steps=3, progress=False, **settings)


# Files.


@pytest.mark.parametrize("limit", [memory.DEFAULT, memory.LEAST // 1000])
def test_netcdf_for_which_there_is_no_room_leaves_the_old_file(folder, limit):
    """In memory first, or written to the disk at once: an error that names the file, no crash."""
    file = folder / "draws.nc"
    file.write_bytes(b"old")

    token = memory._LIMIT.set(limit)
    try:
        with no_file_beyond(SMALL), pytest.raises(OSError, match=r"too large: .*draws\.nc"):
            write_groups(groups(), file)
        assert file.read_bytes() == b"old" and not hidden(folder)
        write_groups(groups(), file)
    finally:
        memory._LIMIT.reset(token)

    xr.testing.assert_identical(read_groups(file)["posterior"]["x"], groups()["posterior"]["x"])


def test_netcdf_beyond_the_disk_is_not_begun(folder):
    room = shutil.disk_usage(folder).free

    with pytest.raises(OSError, match=r"No space left on device: .*draws\.nc"):
        netcdf.check_room(folder / "draws.nc", 2 * room + 10**6)


def test_zarr_is_whole_or_not_there(folder, monkeypatch):
    pytest.importorskip("zarr")

    def half(tree: object, path: str, **_: object) -> None:
        Path(path).mkdir()
        full()

    with monkeypatch.context() as patched:
        patched.setattr(xr.DataTree, "to_zarr", half)
        with pytest.raises(OSError, match=r"No space left on device: .*draws\.zarr"):
            write_groups(groups(), folder / "draws.zarr")
        assert not hidden(folder) and not (folder / "draws.zarr").exists()
    write_groups(groups(), folder / "draws.zarr")

    with pytest.raises(FileExistsError, match=r"draws\.zarr"):
        write_groups(groups(), folder / "draws.zarr")
    assert read_groups(folder / "draws.zarr")["posterior"].sizes["draw"] == 50_000


def test_a_fit_that_cannot_be_saved_leaves_the_one_before(folder, monkeypatch):
    before = fitted(seed=1)
    before.save(folder / "fit")
    names = sorted(os.listdir(folder / "fit"))

    with monkeypatch.context() as patched:
        patched.setattr("flowvi.fitting.fit_folder.write_json", full)
        with pytest.raises(OSError, match="No space"):
            fitted(seed=2).save(folder / "fit")

    assert sorted(os.listdir(folder / "fit")) == names
    assert flowvi.load(folder / "fit", target()).bounds == before.bounds


def test_what_a_crash_left_is_swept(folder):
    (folder / f".posterior.nc.{'0' * 8}.part").touch()
    (folder / f".draws.zarr.{'0' * 8}.part").mkdir()
    (folder / ".mine").touch()

    with files.lock_folder(folder):
        assert hidden(folder) == [".mine"]


# Fits.


@pytest.mark.parametrize(
    "where", ["flowvi.runtime.files.os.fsync", "flowvi.runtime.files.os.pwrite"]
)
def test_a_full_disk_costs_the_state_and_not_the_fit(folder, monkeypatch, where):
    expected = fitted()

    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        if where.endswith("fsync"):
            with pytest.warns(UserWarning, match=r"could not be written \(No space left on dev"):
                found = fitted(checkpoint=folder / "state")
        else:
            found = fitted(checkpoint=folder / "state")

    assert found.bounds == expected.bounds
    assert not hidden(folder)


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_a_folder_that_vanishes_costs_no_fit(folder):
    expected = fitted()

    found = fitted(checkpoint=folder / "state", callback=lambda step: shutil.rmtree("state", True))

    assert found.bounds == expected.bounds
    assert flowvi.load(folder / "state" / "fit", target()).bounds == expected.bounds


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_a_blocked_folder_costs_no_fit(folder):
    """Nothing can be made where a folder was."""

    def block(step: object) -> None:
        if Path("state").is_dir():
            shutil.rmtree("state")
            Path("state").touch()

    assert fitted(checkpoint=folder / "state", callback=block).bounds == fitted().bounds


# Commands.


def test_all_that_fits_is_written_and_the_rest_later(folder):
    with no_file_beyond(SMALL):
        done = run("fit", "m.py", "--out", "out", *QUICK)

    assert done.exit_code == 1
    assert "Verdict: " in done.stdout and "Posterior (" in done.stdout
    words = " ".join(done.stderr.split())
    assert "Could not write out/posterior.nc: File too large; report.html" in words
    assert "All other files are written" in words and "--resume out" in words
    assert (folder / "out/summary.csv").exists() and (folder / "out/fit/fit.json").exists()
    assert not (folder / "out/posterior.nc").exists() and not hidden(folder)

    again = run("fit", "m.py", "--resume", "out", *QUICK)

    assert again.exit_code == 0, again.stderr
    assert again.stdout.split("Posterior")[0] == done.stdout.split("Posterior")[0].rstrip() + "\n"
    assert (folder / "out/posterior.nc").exists() and not (folder / "out/checkpoint").exists()


def test_results_are_written_into_a_folder_that_vanished(folder, monkeypatch):
    whole = results.recommended_draws

    def vanish(*arguments: object) -> results.RecommendedDraws:
        shutil.rmtree("out")
        return whole(*arguments)

    monkeypatch.setattr(results, "recommended_draws", vanish)

    done = run("fit", "m.py", "--out", "out", *QUICK)

    assert done.exit_code == 0, done.output
    assert (folder / "out/posterior.nc").exists()


def test_other_commands_say_it_in_one_sentence(folder):
    assert run("fit", "m.py", "--out", "out", *QUICK).exit_code == 0

    for command in ("resample", "evidence"):
        with no_file_beyond(1000):
            done = run(command, "out")
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: Could not write out/")
        assert done.stderr.endswith(": File too large.\n") and not hidden(folder)


def test_draws_that_took_long_go_where_there_is_room(folder, monkeypatch):
    assert run("fit", "m.py", "--out", "out", *QUICK).exit_code == 0
    real, calls = write_groups, []

    def once(idata: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            full()
        real(idata, path)

    monkeypatch.setattr("flowvi.compat.netcdf.write_groups", once)
    done = run("neutra", "m.py", "out", "--draws", "100", "--warmup", "100", "--quiet")

    assert done.exit_code == 1 and "Could not write out/mcmc.nc: No space" in done.stderr
    assert str(calls[1]) in done.stdout and str(calls[1]) in done.stderr
    assert read_groups(calls[1])["posterior"].sizes["draw"] == 100


def test_a_calibration_goes_on_over_a_full_disk(folder):
    file = folder / "sbc.npz"
    rows = [
        Outcome(i, ("m",), np.zeros(1), np.zeros(1), np.zeros(1), "trust", "") for i in range(3)
    ]
    store = Store(file, {})
    store.add(rows[0])

    with no_file_beyond(10), pytest.warns(UserWarning, match="sbc.npz could not be written"):
        store.add(rows[1])
    assert list(Store(file, {}).done) == [0] and not hidden(folder)
    store.add(rows[2])

    assert list(Store(file, {}).done) == [0, 1, 2]


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A disk of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    able = os.geteuid() == 0 and shutil.which("mount") is not None
    if not able or subprocess.run(asked, check=False, capture_output=True).returncode:
        pytest.skip("only the superuser can mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_truly_full(tiny_disk):
    """In a process of its own, which the HDF5 library once ended with a segmentation fault."""
    whole = subprocess.run(
        [sys.executable, "-m", "flowvi", "fit", "m.py", "--out", tiny_disk / "out", *QUICK],
        check=False,
        capture_output=True,
        text=True,
    )

    assert whole.returncode == 1, whole.stderr
    assert "No space left on device" in whole.stderr and "Traceback" not in whole.stderr
    assert "Verdict: " in whole.stdout and not hidden(tiny_disk)
