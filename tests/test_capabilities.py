"""What every kind of fit can do: each cell of the table has its property, or refuses by name.

Columns are the kinds of `kinds.KINDS`; each test is a row of the table.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import brief
from kinds import (
    DRAWS,
    KINDS,
    Kind,
    bits,
    both,
    data,
    error_of,
    estimate,
    moved,
    own,
    prepared,
)

import flowvi
from flowvi.diagnostics import VERDICTS
from flowvi.runtime import memory
from flowvi.runtime.files import CheckpointError

# Cells that are refused: what the sentence names, the argument and the reason.
REFUSED = {
    ("executor", "rows"): ("executor", "latents for each row"),
    ("parameters", "structured"): ("guide='structured'", "parameters of its own"),
}
CAPABILITIES = (
    "resume",
    "kept",
    "interrupt",
    "executor",
    "budget",
    "callback",
    "facts",
    "parameters",
    "saved",
    "verdict",
    "memory",
    "single",
    "torchrun",
    "device",
)
HAVE_A_TEST: set[str] = set()
# Where a fit is cut off, of so many steps or epochs.
CUT, COUNT, LONG = 7, 12, 100
# Seconds that a fake clock moves at each call back, and the budget of ten of them.
TICK, BUDGET = 1_000.0, 10_000.0
# Of a sum of a hundred numbers in single precision, and in double.
SINGLE, DOUBLE = 1e-5, 1e-9
ACCELERATOR = (
    "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
)


def cells(capability: str) -> Any:
    """A row of the table: its test for every kind of fit."""
    HAVE_A_TEST.add(capability)
    return pytest.mark.parametrize("name", list(KINDS))


def refused(call: Callable[[], object], *words: str) -> None:
    """A call is refused in one sentence that has these words: the argument, and the reason."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and ". " not in message and message.endswith("."), message
    assert "has no argument" not in message, message


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every bit of two fits."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)


def rounding_of(target: Any) -> float:
    """Of what is computed in the precision of a target."""
    return SINGLE if target.dtype == torch.float32 else DOUBLE


def agrees(kind: Kind, fit: Any, target: Any) -> None:
    """Weights average to the evidence of the model with its present parameter."""
    found, error = estimate(fit.draw(DRAWS, seed=2).log_weights)
    expected = kind.evidence(own(target))
    assert abs(found - expected) < 4.5 * error + rounding_of(target) * abs(expected)


def told_of(told: Any) -> int:
    """The number of a step, or of an epoch."""
    return int(getattr(told, "step", None) or told.epoch)


@pytest.fixture(autouse=True, scope="module")
def brief_module() -> Iterator[None]:
    """Short searches for a start, few draws to judge by, and no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        brief(patched)
        yield


@pytest.fixture(scope="module")
def known(brief_module: None) -> Callable[[str], tuple[Any, Any, dict[str, Any]]]:
    """For each kind a short fit, its target and its bits."""
    made: dict[str, tuple[Any, Any, dict[str, Any]]] = {}

    def of(name: str) -> tuple[Any, Any, dict[str, Any]]:
        if name not in made:
            target = KINDS[name].target()
            fit = KINDS[name].fit(target, COUNT)
            made[name] = fit, target, bits(fit, target)
        return made[name]

    return of


@pytest.fixture(scope="module")
def trained(brief_module: None) -> Callable[[str], tuple[Any, Any]]:
    """For each kind a fit that has come to its end, and its target."""
    made: dict[str, tuple[Any, Any]] = {}

    def of(name: str) -> tuple[Any, Any]:
        if name not in made:
            target = KINDS[name].target()
            made[name] = KINDS[name].fit(target, LONG), target
        return made[name]

    return of


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """A callback that lets much time pass: states are then kept, and budgets spent."""
    real, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed[0])

    def callback(told: object) -> None:
        passed[0] += TICK

    return callback


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=prepared) as executor:
        yield executor


class CutOff(Exception):
    """What ends a fit in the middle."""


@cells("resume")
def test_resume(name, known, tick, tmp_path):
    """What was cut off goes on, to the bits of a fit that was not, and nothing else does."""
    kind, seen = KINDS[name], []

    def cut(told: Any) -> None:
        tick(told)
        if told_of(told) == CUT:
            raise CutOff

    with pytest.raises(CutOff):
        kind.fit(kind.target(), COUNT, callback=cut, checkpoint=tmp_path)
    target = kind.target()
    fit = kind.fit(target, COUNT, callback=seen.append, checkpoint=tmp_path, resume=True)

    same(bits(fit, target), known(name)[2])
    # A state of each step is kept behind its callback, one of an epoch before.
    assert CUT <= told_of(seen[0]) <= CUT + 1 and told_of(seen[-1]) == COUNT
    with pytest.raises(CheckpointError, match="checkpoint of another fit: 'seed' was 3"):
        kind.fit(target, COUNT, seed=4, checkpoint=tmp_path, resume=True)
    refused(lambda: kind.fit(target, COUNT, resume=True), "resume=True", "checkpoint=")


@cells("kept")
def test_kept(name, tmp_path):
    """A checkpoint holds the best so far, as a fit that `load` reads."""
    kind, target, fresh = KINDS[name], KINDS[name].target(), KINDS[name].target()

    def pressed(told: Any) -> None:
        if told_of(told) == CUT:
            raise KeyboardInterrupt

    fit = kind.fit(target, COUNT, callback=pressed, checkpoint=tmp_path)
    loaded = flowvi.load(tmp_path / "fit", fresh, **kind.own_guides())

    assert own(fresh) == own(target) and moved(target)
    same(bits(loaded, fresh), bits(fit, target))


@cells("interrupt")
def test_interrupt(name, known, tick, tmp_path, monkeypatch, capsys):
    """Ctrl-C leaves the best so far, which can be drawn from, kept and gone on from."""
    kind, target = KINDS[name], KINDS[name].target()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def pressed(told: Any) -> None:
        tick(told)
        if told_of(told) == CUT:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        fit = kind.fit(target, COUNT, callback=pressed, checkpoint=tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)

    assert fit.meta["interrupted"] is True and len(fit.history["bound"]) == CUT
    assert all(p.isfinite().all() for p in fit.guide.parameters())
    agrees(kind, fit, target)
    fresh = kind.target()
    going = kind.fit(fresh, COUNT, checkpoint=tmp_path / "run", resume=True)
    assert going.meta["interrupted"] is False
    same(bits(going, fresh), known(name)[2])


@cells("executor")
def test_executor(name, known, processes):
    """Another process gives the same bits, and brings the parameter of the model back."""
    kind, target = KINDS[name], KINDS[name].target()
    if words := REFUSED.get(("executor", name)):
        refused(lambda: kind.fit(target, 1, executor=processes), *words)
        return

    fit = kind.fit(target, COUNT, executor=processes)

    same(bits(fit, target), known(name)[2])
    words = "callback is called in this process", "executor"
    refused(lambda: kind.fit(target, 1, executor=processes, callback=print), *words)
    refused(lambda: kind.fit(target, 1, executor="four"), "executor", "got a str")


@cells("budget")
def test_budget(name, tick):
    """Steps end when their time is spent, and the fit says what it took."""
    kind, target = KINDS[name], KINDS[name].target()

    fit = kind.fit(target, 2 * COUNT, callback=tick, budget=BUDGET)

    # The step in which the time runs out, and one for a clock that is read before the callback.
    steps = len(fit.history["bound"])
    assert 0 <= steps - BUDGET / TICK <= 1
    assert 0 <= fit.meta["seconds"] - steps * TICK < TICK
    assert fit.meta["interrupted"] is False
    agrees(kind, fit, target)
    refused(lambda: kind.fit(target, 1, budget=-1.0), "budget", "positive number", "-1.0")


@cells("callback")
def test_callback(name, known):
    """It is told of every step, or epoch, and a true answer ends the fit there."""
    kind, target, seen = KINDS[name], KINDS[name].target(), []

    fit = kind.fit(target, COUNT, callback=seen.append)
    part = kind.fit(kind.target(), COUNT, callback=lambda told: told_of(told) == CUT)

    assert [told_of(told) for told in seen] == list(range(1, COUNT + 1))
    np.testing.assert_array_equal([told.bound for told in seen], fit.history["bound"])
    same(bits(fit, target), known(name)[2])
    assert len(part.history["bound"]) == CUT and part.meta["interrupted"] is False
    np.testing.assert_array_equal(part.history["bound"], fit.history["bound"][:CUT])
    refused(lambda: kind.fit(target, 1, callback=3), "callback must be a function", "3")


@cells("facts")
def test_facts(name, known):
    """What became of a fit is in its facts, which are JSON."""
    fit, _, _ = known(name)

    facts = json.loads(json.dumps(fit.meta, allow_nan=False))

    assert facts["interrupted"] is False and facts["seconds"] > 0.0
    assert facts["budget"] is None and facts["failures"] == []
    assert facts["seed"] == 3 and facts["model"] == KINDS[name].model.__name__
    # Rows have a verdict each.
    assert name == "rows" or facts["check"]["verdict"] in VERDICTS


@cells("parameters")
def test_parameters_of_the_model(name, trained):
    """They are trained to the maximum of the evidence, at the mean of the data."""
    if words := REFUSED.get(("parameters", name)):
        refused(lambda: flowvi.fit(flowvi.from_pyro(both, data()), "structured"), *words)
        return

    fit, target = trained(name)

    assert abs(own(target) - float(data().mean())) < 4.5 * error_of(KINDS[name])
    agrees(KINDS[name], fit, target)


@cells("saved")
def test_saved_and_loaded(name, trained, tmp_path):
    """Draws of what is loaded have the same bits, and a fresh target the parameter."""
    kind, (fit, target) = KINDS[name], trained(name)
    fit.save(tmp_path)
    fresh = kind.target()

    loaded = flowvi.load(tmp_path, fresh, **kind.own_guides())

    assert own(fresh) == own(target) and moved(target)
    same(bits(loaded, fresh), bits(fit, target))
    assert loaded.meta == fit.meta and loaded.log == fit.log


@cells("verdict")
def test_verdict(name, trained):
    """The posterior is trusted, and a guide beside it is not."""
    fit, _ = trained(name)
    right = fit.draw(DRAWS)
    assert flowvi.diagnose(right).verdict == "trust"
    z = torch.as_tensor(right["m"] if name == "structured" else right.z).reshape(-1, 1)
    guide = fit.guide.theta if name == "structured" else fit.guide
    before = {k: v.clone() for k, v in guide.state_dict().items()}

    try:
        with torch.no_grad():
            guide.start(z.mean(0) + 6 * z.std(0), z.std(0)[:, None])
        wrong = fit.draw(DRAWS)
    finally:
        guide.load_state_dict(before)

    assert flowvi.diagnose(wrong).verdict == "do not trust"


@cells("memory")
def test_memory_limit(name, trained, monkeypatch):
    """A low limit is kept, and gives the same draws to rounding; an impossible one is refused."""
    kind, (fit, trained_on) = KINDS[name], trained(name)
    # Even the lowest limit holds all points of a small model; now a step takes two parts.
    monkeypatch.setattr(memory, "EVALUATED", 1e-3)
    target, found = kind.target(), {}

    def drawn(limit: str) -> None:
        found[limit] = fit.draw(DRAWS, max_memory=limit)

    few = kind.fit(target, COUNT, max_memory="32MB")
    # Programs that evaluate the density are written meanwhile, which takes memory too.
    for limit in 5 * ("32MB", "64GB"):
        drawn(limit)
    least, most = (memory.peak_bytes(lambda limit=limit: drawn(limit)) for limit in found)

    agrees(kind, few, target)
    # Tables of rows are the larger part. Draws of units are made in parts of one size.
    assert least < (1.1 if name == "structured" else 0.8) * most
    low, high = found.values()
    np.testing.assert_array_equal(low.z, high.z)
    for column in ("log_p", "log_q"):
        rounding = rounding_of(trained_on)
        np.testing.assert_allclose(getattr(low, column), getattr(high, column), rtol=rounding)
    for wrong in ("1 B", "banana"):
        reason = "max_memory must be a number of bytes", f"got '{wrong}'"
        refused(lambda wrong=wrong: kind.fit(target, 1, max_memory=wrong), *reason)
        refused(lambda wrong=wrong: fit.draw(1, max_memory=wrong), *reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["alike", "of_numpy"])
@cells("single")
def test_single_default(name, dtype):
    """Under the precision that users have, with data alike or in double, all is as exact."""
    torch.set_default_dtype(torch.float32)
    kind, target = KINDS[name], KINDS[name].target(data(dtype))

    fit = kind.fit(target, COUNT)

    assert all(c.dtype == torch.float32 for c in target.parameters())
    assert moved(target)
    found, error = estimate(fit.draw(DRAWS, seed=2).log_weights)
    expected = kind.evidence(own(target))
    assert abs(found - expected) < 4.5 * error + SINGLE * abs(expected)


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from kinds import KINDS, bits, checksum, estimate, own, prepared
from flowvi.runtime import distributed
prepared()
facts = {{}}
with distributed.join_process_group():
    for name, kind in KINDS.items():
        target = kind.target()
        fit = kind.fit(target, {count})
        found, error = estimate(fit.draw({draws}, seed=2).log_weights)
        facts[name] = [
            distributed.size(), checksum(bits(fit, target)), own(target), found, error
        ]
        open(f"{out}/{{distributed.rank()}}.json", "w").write(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, of each kind that came to its end, and what failed."""
    folder = tmp_path_factory.mktemp("group")
    script = folder / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, count=COUNT, draws=DRAWS, out=str(folder)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    found = [folder / f"{rank}.json" for rank in (0, 1)]
    return [
        {"failed": done.stderr, **(json.loads(f.read_text()) if f.exists() else {})} for f in found
    ]


@cells("torchrun")
def test_torchrun(name, two_processes):
    """Two processes agree to the bit on a fit of the evidence."""
    assert all(name in found for found in two_processes), two_processes[0]["failed"]
    (size, word, c, found, error), second = (found[name] for found in two_processes)
    expected = KINDS[name].evidence(c)

    assert size == 2 and second[:3] == [size, word, c]
    assert c != 0.0 or name == "structured"
    assert abs(found - expected) < 4.5 * error + DOUBLE * abs(expected)


@pytest.mark.skipif(not ACCELERATOR, reason="no accelerator here: neither CUDA nor MPS")
@cells("device")
def test_another_device(name):
    """A model whose data lie there is fitted there, and its draws come back."""
    # MPS has no double precision.
    dtype = torch.float64 if ACCELERATOR == "cuda" else torch.float32
    kind = KINDS[name]
    target = kind.target(data(dtype, ACCELERATOR))

    fit = kind.fit(target, COUNT)

    assert target.device.type == ACCELERATOR
    assert {p.device.type for p in fit.guide.parameters()} == {ACCELERATOR}
    assert moved(target)
    agrees(kind, fit, target)


def test_the_table_has_no_hole():
    """Every capability has a test, and each refusal is of a cell of the table."""
    assert set(CAPABILITIES) == HAVE_A_TEST
    assert set(REFUSED) <= {(cell, name) for cell in CAPABILITIES for name in KINDS}
