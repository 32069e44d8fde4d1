"""A fit that is asked to stop ends promptly, with the best so far, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from quick import quick
from torch.distributions import Normal

import flowvi
from flowvi.cli import main
from flowvi.cli.fit import _executor
from flowvi.fitting import check, restart, starts
from flowvi.initialization import candidates, missed_modes
from flowvi.runtime import files
from flowvi.runtime.clock import (
    INTERRUPT_NOTICE,
    Clock,
    Interrupted,
    abort_on_interrupt,
    interruptible,
    until_interrupted,
)
from flowvi.training.compiling.background import Compilation
from flowvi.training.trainer import Trainer

JUDGED, CHECKED = 200, 400
# What has to be known of the best so far: a score of each candidate from one start, bounds of the
# guide as it began and where it was cut off, and whether it leaves out any modes.
MOST = 10 * candidates.JUDGE_DRAWS + 6 * JUDGED + 8 * missed_modes.DRAWS


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C interrupts, which it does not in what a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Counted:
    """A banana of which every draw counts, and which interrupts its fit at some evaluation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
        self.calls, self.after, self.at = 0, 0, at
        self.target = flowvi.from_density(self._log_prob, {"x": flowvi.Site((2,))})
        # Counts its evaluations, not those that its graph is recorded by.
        inner = self.target.log_prob
        monkeypatch.setattr(self.target, "log_prob", lambda z: self._count(z) or inner(z))

    @staticmethod
    def _log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        x, y = v["x"]
        return Normal(0.0, 1.0).log_prob(x) + Normal(x**2, 0.3).log_prob(y)

    def _count(self, z: torch.Tensor) -> None:
        self.calls += 1
        self.after += z[..., 0].numel() if self.calls > self.at else 0
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short stages, and few draws to judge and check by."""
    draws = {"check_draws": CHECKED, "evaluation_draws": JUDGED}
    quick(monkeypatch, **draws, least_decay=20, steady_steps=30, few_steps=30)


# In the search for a start, the trials of step sizes, and a stage.
@pytest.mark.parametrize("at", [20, 60, 150, 300])
def test_hardly_anything_is_evaluated_after_an_interrupt(at, small, monkeypatch, capsys):
    counted = Counted(monkeypatch, at)

    fit = flowvi.fit(counted.target, progress=False)

    assert fit.meta["interrupted"]
    assert counted.after <= MOST
    assert bool(torch.as_tensor(fit.bounds).isfinite().all())
    assert capsys.readouterr().err.count(INTERRUPT_NOTICE) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("phase", ["further_modes", "diagnose", "mass_beyond_guide"])
def test_a_search_or_a_check_is_dropped(phase, small, monkeypatch, capsys):
    def log_prob(v: dict[str, torch.Tensor]) -> torch.Tensor:
        return Normal(0.0, 1.0).log_prob(v["x"]).sum()

    target, done = flowvi.from_density(log_prob, {"x": flowvi.Site((2,))}), []

    def long(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append(phase)

    places = {"further_modes": starts, "diagnose": check, "mass_beyond_guide": restart}
    monkeypatch.setattr(places[phase], phase, long)
    fit = flowvi.fit(target, progress=False)

    assert fit.meta["interrupted"] and not done


# What can be dropped.


def test_what_can_be_dropped_ends_at_once(capsys):
    clock, done = Clock(), []
    with interruptible(clock):
        with pytest.raises(Interrupted), abort_on_interrupt():
            with abort_on_interrupt(False):
                os.kill(os.getpid(), signal.SIGINT)
                done.append("to its end")
            with abort_on_interrupt():
                done.append("never")
        with pytest.raises(Interrupted), abort_on_interrupt():
            done.append("never")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    assert done == ["to its end"]
    with abort_on_interrupt():
        done.append("another fit")


def test_an_item_that_is_being_made_is_dropped(capsys):
    def items() -> Iterator[int]:
        for i in range(4):
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield i

    with interruptible(Clock()):
        assert list(until_interrupted(items())) == [0, 1]
    assert list(until_interrupted(iter([0, 1]))) == [0, 1]


def test_nobody_waits_for_the_compiler_after_an_interrupt():
    made = object.__new__(Compilation)
    made._work = None
    made._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    asked = iter([False, True])

    assert not made.done(wait=True, over=lambda: next(asked))
    process = made._process
    made.stop()

    assert process.poll() is not None


def test_nobody_waits_for_workers_after_an_interrupt():
    with pytest.raises(KeyboardInterrupt), _executor(1) as executor:
        executor.submit(time.sleep, 600)
        workers = list(executor._processes.values())
        raise KeyboardInterrupt

    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGTERM]


# Commands.

MODEL = """
import pyro
import pyro.distributions as dist
import torch

def data():
    return ()

def model():
    m = pyro.sample("m", dist.Normal(torch.tensor(1.0), 2.0))
    pyro.sample("y", dist.Normal(m, 1.0), obs=torch.tensor(0.5))
"""
FIT = ["fit", "m.py", "--guide", "meanfield", "--steps", "3", "--quiet"]
COMMANDS = {
    "fit": [*FIT, "--out", "out"],
    "resume": [*FIT, "--resume", "out"],
    "vae": ["vae", "--out", "out"],
    "neutra": ["neutra", "m.py", "out"],
    "sbc": ["sbc", "m.py", "--out", "out"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model file, and a folder of results in which a fit has begun."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    Path("out/checkpoint").mkdir(parents=True)
    Path("out/checkpoint/manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_which_another_run_is_busy_is_left_alone(folder, name):
    def refused() -> str:
        done = CliRunner().invoke(main, COMMANDS[name])
        assert done.exit_code == 2, done.output
        assert Path("out/checkpoint/manifest.json").read_text() == "{}"
        assert "remove" not in done.stderr
        return " ".join(done.stderr.split())

    with files.lock_folder(folder / "out/checkpoint"):
        assert f"'out' is in use by another run (process {os.getpid()}" in refused()
    # While its results are written.
    with files.hold_folder(folder / "out"):
        assert "'out' is in use by another run (another command)" in refused()


def test_a_folder_is_free_again_after_a_command(folder):
    for _ in range(2):
        done = CliRunner().invoke(main, COMMANDS["fit"])
        assert "has a fit that was cut off" in " ".join(done.stderr.split())

    with files.hold_folder(folder / "out") as free:
        assert free
    assert files.lock_owner(folder / "out/checkpoint") == ""


def test_an_interrupted_command_says_what_it_does(folder, monkeypatch):
    (folder / "out/checkpoint/manifest.json").unlink()
    (folder / "out/checkpoint").rmdir()
    module = import_module("flowvi.reporting")
    monkeypatch.setattr(module, "report", lambda folder, file: file.write_text("report"))
    seen = []

    def simulated(*arguments: object) -> None:
        seen.append("simulated")

    monkeypatch.setattr("flowvi.interop.inference_data._predictive", simulated)

    def pressed(trainer: Trainer, told: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "callback", pressed)
    done = CliRunner().invoke(main, COMMANDS["fit"])

    assert done.exit_code == 143
    assert INTERRUPT_NOTICE in done.stderr
    assert "Writing the results of the steps so far to out" in done.stderr
    assert "flowvi report out writes a report" in done.stderr
    assert Path("out/posterior.nc").exists() and not seen
    assert not Path("out/report.html").exists()
