"""Folders of results that others wrote: nothing in them runs, leads elsewhere, or takes memory."""

import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save

import flowvi
from flowvi.cli import main
from flowvi.cli.model_file import load_target
from flowvi.runtime.files import CheckpointError

MODEL = """
import pyro
import pyro.distributions as dist
import torch

def data():
    return (torch.tensor(0.5),)

def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(1.0), 2.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
"""
MARKS = "import pathlib; pathlib.Path({!r}).touch(); raise SystemExit(9)\n"
COMMANDS = ("report", "evidence", "resample")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, whose model file is another one now and lies in it too."""
    folder = tmp_path_factory.mktemp("written")
    file = folder / "model.py"
    file.write_text(MODEL)
    result = run("fit", file, "--steps", 3, "--draws", 200, "--out", folder / "out", "--quiet")
    assert result.exit_code in (0, 3), result.output
    shutil.copy(file, folder / "kept.py")
    file.write_text(MARKS.format(str(folder / "ran")))
    for name in ("model.py", "conftest.py", "flowvi.py", "arviz.py", "sitecustomize.py"):
        shutil.copy(file, folder / "out" / name)
    return folder


@pytest.fixture
def results(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to be harmed; nothing beside it may be changed, and nothing have run."""
    folder = tmp_path / "place" / "out"
    shutil.copytree(written / "out", folder)
    (tmp_path / "secret").write_bytes(b"outside" * 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.chdir(folder)
    yield folder
    assert not (written / "ran").exists()
    assert sorted(os.listdir(tmp_path)) == ["place", "secret"]
    assert os.listdir(tmp_path / "place") == ["out"]
    assert (tmp_path / "secret").read_bytes() == b"outside" * 1000
    # In kilobytes; the test process itself is no smaller for it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("command", [*COMMANDS, "compare"])
def test_what_reads_results_never_runs_the_model(results, command):
    modules = set(sys.modules)
    more = [shutil.copytree(results, results / "copy")] if command == "compare" else []

    result = run(command, results, *more)

    assert result.exit_code in (0, 3), result.output
    assert not {"model", "conftest", "sitecustomize"} & (set(sys.modules) - modules)


# Harms: what is done to posterior.nc, and what is said of it.


def _new(file: Path) -> h5py.Group:
    file.unlink()
    return h5py.File(file, "w")


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def random_bytes(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(5000))


def nothing(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text('{"posterior": []}')


class Runs:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch ../ran",)


def a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Runs()))


def a_billion_numbers_in_a_thousand_bytes(file: Path) -> None:
    with _new(file) as new:
        new.create_dataset("posterior/mu", shape=(1, 10**9), dtype="f8", chunks=(1, 1000))


def values_of_another_file(file: Path) -> None:
    where = [("../../secret", 0, 7000)]
    with _new(file) as new:
        new.create_dataset("posterior/mu", shape=(1, 7000), dtype="u1", external=where)


def a_mosaic_of_another_file(file: Path) -> None:
    layout = h5py.VirtualLayout(shape=(1, 100), dtype="f8")
    layout[:] = h5py.VirtualSource("../../secret", "x", shape=(1, 100))
    with _new(file) as new:
        new.create_group("posterior").create_virtual_dataset("mu", layout)


def a_link_to_another_file(file: Path) -> None:
    with _new(file) as new:
        new["posterior"] = h5py.ExternalLink("../../secret", "/posterior")


def a_group_in_itself(file: Path) -> None:
    with _new(file) as new:
        new.create_group("posterior")["again"] = new["/"]


def groups_in_groups(file: Path) -> None:
    with _new(file) as new:
        group = new
        for _ in range(300):
            group = group.create_group("posterior")


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_link_to_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def no_file(file: Path) -> None:
    file.unlink()


def objects(file: Path) -> None:
    with _new(file) as new:
        kind = h5py.string_dtype()
        new.create_dataset("posterior/mu", data=np.array(["a", "b"], object), dtype=kind)


def no_groups(file: Path) -> None:
    with _new(file) as new:
        new.create_group("posterior")


def attributes_without_end(file: Path) -> None:
    with h5py.File(file, "a") as old:
        old["posterior"].attrs["reasons"] = old["sample_stats"].attrs["missed"] = "[" * 5000


def words_for_weights(file: Path) -> None:
    with h5py.File(file, "a") as old:
        for name in ("log_p", "log_q", "log_weight"):
            del old[f"sample_stats/{name}"]
            old.create_dataset(f"sample_stats/{name}", data=np.array([["a"] * 200], "S1"))


HARMS = {
    half: "truncated file",
    random_bytes: "file signature not found",
    nothing: "file signature not found",
    text: "file signature not found",
    a_pickle: "file signature not found",
    a_billion_numbers_in_a_thousand_bytes: "'mu' claims 1000000000 values",
    values_of_another_file: "values of 'mu' are in another file",
    a_mosaic_of_another_file: "values of 'mu' are in another file",
    a_link_to_another_file: "'posterior' is a link",
    a_group_in_itself: "'again' holds itself",
    groups_in_groups: "groups lie too deep",
    a_pipe: "",
    a_link_to_a_device: "",
    no_file: "",
    objects: "",
    no_groups: "",
    attributes_without_end: "",
    words_for_weights: "",
}


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_damaged_file_of_draws_says_what_is_left(results, harm):
    """The file is named in one sentence; where it cannot be read, so is the fit that is left."""
    harm(results / "posterior.nc")

    for command in COMMANDS:
        result = run(command, results)
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)
        assert "Error: " in result.output and HARMS[harm] in result.output
        if HARMS[harm]:
            words = f"The fit itself is still in {results}/fit: flowvi.load("
            assert words in " ".join(result.output.split())


# The folder of the fit itself.


def _manifest(folder: Path, **changes: object) -> None:
    file = folder / "fit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _named(folder: Path, name: str) -> None:
    files = json.loads((folder / "fit.json").read_text())["files"]
    _manifest(folder, files={**files, "guide_0": {**files["guide_0"], "name": name}})


def _specified(folder: Path, **sizes: object) -> None:
    meta = json.loads((folder / "fit.json").read_text())["meta"]
    spec = {"name": "realnvp", "sizes": sizes}
    _manifest(folder, meta={**meta, "specs": [spec]})


def _linked(folder: Path) -> None:
    file = next(folder.glob("guide_0*"))
    file.unlink()
    file.symlink_to("../../../secret")


def _moved(folder: Path) -> None:
    file = next(folder.glob("guide_0-*"))
    kept = folder.parent / file.name
    shutil.move(file, kept)
    file.symlink_to(kept)


def _moved_manifest(folder: Path) -> None:
    shutil.move(folder / "fit.json", folder.parent / "fit.json")
    (folder / "fit.json").symlink_to(folder.parent / "fit.json")


def _rewritten(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A file with other numbers, and their size and checksum."""
    manifest = json.loads((folder / "fit.json").read_text())
    entry = manifest["files"][part]
    tensors = load_file(folder / entry["name"])
    change(tensors)
    content = save(tensors)
    (folder / entry["name"]).write_bytes(content)
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "fit.json").write_text(json.dumps(manifest))


def _changed(folder: Path, part: str, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(t for t in tensors.values() if t.dim()).view(-1)[0] = value

    _rewritten(folder, part, change)


def _cut_history(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bound"] = tensors["bound"][:-1].clone()

    _rewritten(folder, "history", change)


FITS = {
    "a path": (lambda f: _named(f, "../../../secret"), "'../../../secret' is no name"),
    "an absolute path": (lambda f: _named(f, "/etc/passwd"), "'/etc/passwd' is no name"),
    "a link": (_linked, "is a link, and flowvi reads no file outside"),
    "a link to the very bytes": (_moved, "is a link, and flowvi reads no file outside"),
    "a manifest elsewhere": (_moved_manifest, r"fit\.json is a link"),
    "not a number": (lambda f: _changed(f, "guide_0", math.nan), "parameter '.*' is nan at"),
    "infinity": (lambda f: _changed(f, "guide_0", math.inf), "parameter '.*' is inf at"),
    "a history of two lengths": (_cut_history, "no number for every step"),
    "a bound in words": (lambda f: _manifest(f, bounds=["-1"]), "not a file that flowvi wrote"),
    "two bounds": (lambda f: _manifest(f, bounds=[-1.0, -2.0]), "not a file that flowvi wrote"),
    "a billion guides": (lambda f: _manifest(f, guides=10**9), "not a file that flowvi wrote"),
    "a huge flow": (lambda f: _specified(f, depth=10**9), "too small for a guide of"),
    "a wide flow": (lambda f: _specified(f, hidden=10**9), "too small for a guide of"),
    "another flow": (lambda f: _specified(f, depth=2), "but the guide's is"),
    "a module": (
        lambda f: _manifest(f, meta={"specs": [{"name": "os.system", "sizes": {}}]}),
        "guide of your own making",
    ),
    "a later format": (lambda f: _manifest(f, format=99), "has format 99; this flowvi reads"),
    "no end": (lambda f: (f / "fit.json").write_text("[" * 10**6), "not a file that flowvi wrote"),
    "a number": (lambda f: (f / "fit.json").write_text("3"), "has format None"),
    "a pickle": (lambda f: a_pickle(f / "fit.json"), "not a file that flowvi wrote"),
}


@pytest.mark.parametrize("name", FITS)
def test_a_crafted_fit_is_refused_by_its_file(results, written, name):
    harm, words = FITS[name]
    target = load_target(written / "kept.py", None)
    harm(results / "fit")

    with pytest.raises(CheckpointError, match=f"(?s)fit.*{words}"):
        flowvi.load(results / "fit", target)


CHAINS = {
    "not a number": lambda t: t["z"].view(-1)[0].fill_(math.nan),
    "no density": lambda t: t["log_q"].view(-1)[1].fill_(math.nan),
    "a density without end": lambda t: t["log_q"].view(-1)[1].fill_(math.inf),
    "one number too many": lambda t: t.update(z=t["z"].repeat(1, 1, 2)),
    "whole numbers": lambda t: t.update(z=t["z"].long()),
    "no densities": lambda t: t.pop("log_q"),
    "fewer densities": lambda t: t.update(log_q=t["log_q"][:, 1:].clone()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_crafted_chains_are_refused_by_their_file(name, tmp_path, brief):
    target = flowvi.from_density(lambda v: -v["x"].square(), {"x": flowvi.Site()})
    fit = flowvi.fit(target, "meanfield", steps=1, progress=False)
    chains = fit.draw(100)
    chains = replace(chains, meta={**chains.meta, "mcmc": "as if of chains"})
    replace(fit, chains=chains).save(tmp_path)
    assert np.array_equal(flowvi.load(tmp_path, target).draw(100).z, chains.z)
    _rewritten(tmp_path, "chains", CHAINS[name])

    with pytest.raises(CheckpointError, match=r"chains.* no finite draws of chains of 1 "):
        flowvi.load(tmp_path, target)


# Where results go.

PLACES = {
    "a file": lambda f: _touched(f / "x"),
    "in a file": lambda f: _touched(f / "x") / "y",
    "a device": lambda f: Path("/dev/null"),
    "a link to nothing": lambda f: _link(f / "x", f / "nothing"),
    "no name": lambda f: f / "a\0b",
    "a long name": lambda f: f / ("x" * 300),
    "nothing": lambda f: "",
}


def _touched(file: Path) -> Path:
    file.touch()
    return file


def _link(file: Path, to: Path) -> Path:
    file.symlink_to(to)
    return file


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_is_refused_before_the_fit(tmp_path, monkeypatch, place):
    where = PLACES[place](tmp_path)
    target = flowvi.from_density(lambda v: -v["x"].square(), {"x": flowvi.Site()})
    monkeypatch.setattr("flowvi.fitting.starts.preflight", None)

    with pytest.raises(ValueError, match=r"path of a folder|cannot hold"):
        flowvi.fit(target, checkpoint=where, progress=False)

    assert not any(file.is_file() and file.name != "x" for file in tmp_path.rglob("*"))


def test_a_checkpoint_behind_a_link_is_kept_there(tmp_path, brief):
    (tmp_path / "real").mkdir()
    link = _link(tmp_path / "link", tmp_path / "real")
    target = flowvi.from_density(lambda v: -v["x"].square(), {"x": flowvi.Site()})

    fit = flowvi.fit(target, "meanfield", steps=3, checkpoint=link, progress=False)

    assert link.is_symlink() and (tmp_path / "real" / "manifest.json").is_file()
    again = flowvi.load(link / "fit", target)
    for p, q in zip(again.guide.parameters(), fit.guide.parameters(), strict=True):
        assert torch.equal(p, q)
