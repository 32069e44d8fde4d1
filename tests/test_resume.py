"""A fit that was cut off goes on to the same bits, from whatever of its files is whole."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from quick import quick
from torch.distributions import Normal

import flowvi
from flowvi.initialization import candidates
from flowvi.runtime import checkpoint_folder
from flowvi.runtime.files import CheckpointError
from flowvi.training import checkpointer


class CutOff(Exception):
    """What ends a fit in the middle."""


def banana() -> flowvi.Target:
    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        x, y = v["x"]
        return Normal(0.0, 1.0).log_prob(x) + Normal(x**2, 0.3).log_prob(y)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def bumps() -> flowvi.Target:
    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        x = v["x"]
        sides = torch.stack([Normal(c, 1.0).log_prob(x).sum() for c in (-3.0, 3.0)])
        return sides.logsumexp(0)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def rows() -> flowvi.Target:
    y = torch.linspace(-1, 2, 30)

    def model(y: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("row", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[index])

    return flowvi.from_pyro(model, y)


def decoder() -> flowvi.Target:
    def model(y: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, scale), obs=y)

    return flowvi.from_pyro(model, torch.linspace(-1, 2, 10))


def same(found: flowvi.Fit, expected: flowvi.Fit) -> None:
    """Every bit of two fits."""
    assert found.bounds == expected.bounds
    assert found.log == expected.log
    for name, column in expected.history.items():
        np.testing.assert_array_equal(found.history[name], column, name)
    for a, b in zip(found.guides, expected.guides, strict=True):
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    for p, q in zip(found.target.parameters(), expected.target.parameters(), strict=True):
        assert torch.equal(p, q)


def cut_at(step: int) -> Callable[[flowvi.Step], None]:
    steps = itertools.count(1)

    def callback(told: flowvi.Step) -> None:
        if next(steps) == step:
            raise CutOff

    return callback


@pytest.fixture(autouse=True, scope="module")
def few_draws() -> Iterator[None]:
    """A short search for a start, few draws to judge by, and no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        patched.setattr(candidates, "TRY_ROUNDS", 1)
        patched.setattr(candidates, "REFINE_ROUNDS", 1)
        patched.setattr(candidates, "NEWTON_STEPS", 1)
        patched.setattr(candidates, "PATH_POINTS", 1)
        quick(patched, check_draws=400, evaluation_draws=400)
        yield


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are kept after every step."""
    monkeypatch.setattr(checkpointer, "EVERY", 0.0)
    monkeypatch.setattr(checkpointer, "SPARED", 0.0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small stages."""
    quick(monkeypatch, steady_steps=30, few_steps=30, most_stages=2, least_decay=30)


def own_guide() -> flowvi.FlowGuide:
    # Whatever its first numbers are, the fit goes on with those that it began with.
    return flowvi.FlowGuide(2, flowvi.FLOWS["realnvp"](2, depth=2, hidden=8))


COUNTED = {"steps": 25, "lr": 1e-2, "escalate": False}
FITS = {
    "a flow": (banana, lambda: "realnvp", COUNTED),
    "a guide of one's own": (banana, own_guide, COUNTED),
    "two restarts": (banana, lambda: "fullrank", {**COUNTED, "restarts": 2}),
    "minibatches": (rows, lambda: "fullrank", COUNTED),
    "parameters of the model": (decoder, lambda: "fullrank", COUNTED),
}


@pytest.mark.parametrize("name", FITS)
def test_what_was_cut_off_goes_on_to_the_same_bits(tmp_path, every_step, name):
    make, guide, options = FITS[name]
    cuts = (1, 12, 5) if name == "a flow" else (8,)
    torch.manual_seed(0)
    whole = flowvi.fit(make(), guide(), seed=3, progress=False, **options)
    torch.manual_seed(0)
    options = {**options, "seed": 3, "progress": False, "checkpoint": tmp_path}

    first = guide()
    for cut in cuts:
        with pytest.raises(CutOff):
            flowvi.fit(make(), first, callback=cut_at(cut), resume=True, **options)
        first = guide()
    last = flowvi.fit(make(), first, resume=True, **options)
    again = flowvi.fit(make(), guide(), resume=True, **options)

    same(last, whole)
    same(again, whole)
    kept = flowvi.load(tmp_path / "fit", make(), own_guide())
    assert kept.bounds == whole.bounds


@pytest.mark.slow
def test_a_race_of_guides_goes_on_too(tmp_path, every_step, short, monkeypatch):
    """A training begins where the trials of its step size and guide have led."""
    quick(monkeypatch, race_steps=10)

    def heavy() -> flowvi.Target:
        def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
            return -1.5 * (1 + v["x"].square() / 2).log().sum()

        return flowvi.from_density(log_prob, {"x": flowvi.Site((12,))})

    options = {"escalate": False, "progress": False}
    whole = flowvi.fit(heavy(), **options)
    options["checkpoint"] = tmp_path
    with pytest.raises(CutOff):
        flowvi.fit(heavy(), callback=cut_at(8), **options)
    last = flowvi.fit(heavy(), resume=True, **options)

    assert any("more steps" in line for line in whole.log)
    same(last, whole)


@pytest.mark.slow
def test_stages_and_attempts_go_on_too(tmp_path, every_step, short, monkeypatch):
    """Of two bumps: a Gaussian, then a mixture of two flows, each cut off, the first one twice."""
    options = {"seed": 1, "progress": False, "lr": 1e-2}
    quick(monkeypatch, nothing_left=10.0)
    whole = flowvi.fit(bumps(), **options)
    assert whole.meta["guide"] == "mixture"
    steps = len(whole.history["bound"])
    options.update(checkpoint=tmp_path, resume=True)

    done = 0
    for cut in (5, 40, min(70, steps - 1)):
        with pytest.raises(CutOff):
            flowvi.fit(bumps(), callback=cut_at(cut - done), **options)
        done = cut
    found = flowvi.fit(bumps(), **options)

    same(found, whole)


# Files that are not as they were written.


@pytest.fixture(scope="module")
def cut_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, flowvi.Fit]:
    """A folder of a fit that was cut off, and what it would have come to."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpointer, "EVERY", 0.0)
        patched.setattr(checkpointer, "SPARED", 0.0)
        whole = flowvi.fit(banana(), "fullrank", progress=False, **COUNTED)
        with pytest.raises(CutOff):
            _fit(folder, callback=cut_at(12))
    return folder, whole


@pytest.fixture
def cut(tmp_path: Path, cut_once: tuple[Path, flowvi.Fit]) -> tuple[Path, flowvi.Fit]:
    """A copy of it."""
    shutil.copytree(cut_once[0], tmp_path / "run")
    return tmp_path / "run", cut_once[1]


def _fit(folder: Path, **more: object) -> flowvi.Fit:
    arguments = {"progress": False, "checkpoint": folder, **COUNTED, **more}
    return flowvi.fit(banana(), "fullrank", **arguments)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*"), reverse=True)


def _pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("piece-*"))


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _foreign(file: Path) -> None:
    file.write_bytes(b"\x80\x04.")


HARMS = [_empty, _halve, _flip, _foreign, os.unlink]


@pytest.mark.parametrize(("harm", "newest"), [*((harm, 1) for harm in HARMS), (_flip, 2)])
def test_a_damaged_state_leaves_the_one_before(cut, harm, newest):
    folder, whole = cut
    for file in _states(folder)[:newest]:
        harm(file)

    with pytest.warns(
        UserWarning, match=r"state-\d+\.safetensors .*continues from the checkpoint before"
    ):
        found = _fit(folder, resume=True)

    same(found, whole)


@pytest.mark.parametrize("harm", [_flip, os.unlink])
def test_a_damaged_piece_is_done_again(cut, harm):
    folder, whole = cut
    harm(_pieces(folder)[0])

    with pytest.warns(UserWarning, match="piece-0001"):
        found = _fit(folder, resume=True)

    same(found, whole)


def _misspell(file: Path) -> None:
    file.write_text(file.read_text().replace('"site"', '"side"'))


@pytest.mark.parametrize("harm", [_empty, _foreign, _misspell])
def test_a_damaged_manifest_leaves_the_one_before(cut, harm):
    folder, whole = cut
    harm(folder / "manifest.json")

    with pytest.warns(UserWarning, match=r"manifest\.json .*continues from"):
        found = _fit(folder, resume=True)

    same(found, whole)


def test_two_damaged_manifests_are_named(cut):
    folder, _ = cut
    _foreign(folder / "manifest.json")
    _empty(folder / "manifest.previous.json")

    with pytest.raises(CheckpointError, match=r"manifest\.json .*previous\.json is empty"):
        _fit(folder, resume=True)


def test_names_in_a_manifest_never_become_paths(cut):
    folder, _ = cut
    for name in ("manifest.json", "manifest.previous.json"):
        text = (folder / name).read_text().replace("piece-0001.safetensors", "../piece-0001")
        (folder / name).write_text(json.dumps(checkpoint_folder.with_checksum(json.loads(text))))

    with pytest.raises(CheckpointError, match=r"'\.\./piece-0001' is no name"):
        _fit(folder, resume=True)


def test_a_full_disk_leaves_what_was_written(cut, monkeypatch):
    folder, whole = cut

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("flowvi.runtime.tensors.write_atomic", full)
        with pytest.warns(UserWarning, match="could not be written .*No space"):
            found = _fit(folder, resume=True)
    again = _fit(folder, resume=True)

    same(found, whole)
    same(again, whole)


# What is not to be gone on with.


def test_a_checkpoint_is_not_written_over(cut):
    with pytest.raises(CheckpointError, match="resume=True"):
        _fit(cut[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "'seed' was 0 there and is 1 here"),
        ({"lr": 0.1}, "'lr' was 0.01 there and is 0.1"),
        ({"steps": 26}, "'steps' was 25 there and is 26"),
        ({"objective": "iwelbo"}, "'objective' was ELBO .* is IW-ELBO"),
    ],
)
def test_other_settings_are_refused(cut, change, message):
    with pytest.raises(CheckpointError, match=message):
        _fit(cut[0], resume=True, **change)


def test_another_model_and_other_data_are_refused(cut):
    arguments = {"progress": False, "checkpoint": cut[0], "resume": True, **COUNTED}

    with pytest.raises(CheckpointError, match="'log density' was"):
        flowvi.fit(
            flowvi.from_density(_log_prob, {"x": flowvi.Site((2,))}), "fullrank", **arguments
        )
    with pytest.raises(CheckpointError, match="'guide' was fullrank there and is meanfield"):
        flowvi.fit(banana(), "meanfield", **arguments)
    with pytest.raises(CheckpointError, match="'x' 'shape' was"):
        flowvi.fit(
            flowvi.from_density(_log_prob, {"x": flowvi.Site((3,))}), "fullrank", **arguments
        )


def _log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
    return Normal(0.0, 2.0).log_prob(v["x"]).sum()


_log_prob.__name__ = "log_prob"


def test_other_software_is_said(cut, monkeypatch):
    folder, whole = cut
    monkeypatch.setattr("flowvi.runtime.checkpoint_folder.__version__", "99.0")

    with pytest.warns(UserWarning, match=r"flowvi 0\.1\.0 is now 99\.0.*not identical to the bit"):
        found = _fit(folder, resume=True)

    assert found.bounds == whole.bounds


# Interrupts.

FIT = """
import signal, sys, torch, flowvi
# Shells start processes in the background deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {tests!r})
import test_resume
from flowvi.training import checkpointer
checkpointer.EVERY = checkpointer.SPARED = 0.0

def callback(step):
    print(step.step, flush=True)

found = flowvi.fit(
    test_resume.banana(), "fullrank", progress=False, checkpoint=sys.argv[1], resume=True,
    callback=callback, **test_resume.COUNTED | {{"steps": 5000}},
)
print("interrupted" if found.meta["interrupted"] else "whole", len(found.history["bound"]))
"""


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGKILL], [signal.SIGINT] * 2])
def test_a_signal_loses_nothing(tmp_path, signals):
    command = [sys.executable, "-c", FIT.format(tests=str(Path(__file__).parent)), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert "25\n" in iter(running.stdout.readline, "")
        for number in signals:
            running.send_signal(number)
        rest, errors = running.communicate()

    states = _states(tmp_path)
    assert states
    if signals == [signal.SIGINT]:
        assert rest.splitlines()[-1].startswith("interrupted")
        assert "Traceback" not in errors
    if signals == [signal.SIGKILL]:
        assert running.returncode == -signal.SIGKILL


def test_an_interrupt_is_gone_on_from(tmp_path, every_step):
    def pressed(step: flowvi.Step) -> None:
        if step.step == 7:
            raise KeyboardInterrupt

    whole = flowvi.fit(banana(), "fullrank", progress=False, **COUNTED)

    part = _fit(tmp_path, callback=pressed)
    found = _fit(tmp_path, resume=True)

    assert part.meta["interrupted"] and len(part.history["bound"]) == 7
    assert not found.meta["interrupted"]
    same(found, whole)


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C interrupts, which it does not in what a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_interrupt_stops_at_once(tmp_path, heard):
    presses = []

    def pressed(step: flowvi.Step) -> None:
        presses.append(step.step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, callback=pressed)

    assert presses == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_runs_do_not_share_a_folder(tmp_path):
    messages = []

    def second(step: flowvi.Step) -> bool:
        with pytest.raises(CheckpointError, match=f"in use by .*process {os.getpid()}") as caught:
            _fit(tmp_path, resume=True)
        messages.append(caught.value)
        return True

    _fit(tmp_path, callback=second)

    assert messages
