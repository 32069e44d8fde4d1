"""Several processes take the steps of one with as many draws."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_compiling import schools

import flowvi
from flowvi.guides import GUIDES, make_guide
from flowvi.runtime import distributed

REPOSITORY = Path(__file__).parents[1]
NAMES = ("realnvp", "fullrank")
# The first process says stop to the tenth step, or to the last; the second is slower.
SCRIPT = """
import json, sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_default_dtype(torch.float64)
from pytest import MonkeyPatch
from conftest import brief
from test_parallel import NAMES, fitted, somewhere
from test_compiling import schools
import flowvi
from flowvi.runtime import distributed as parallel
with parallel.join_process_group(), MonkeyPatch.context() as patch:
    brief(patch)
    rank, same, ends = parallel.rank(), {{}}, []
    for name in NAMES:
        found = fitted(name, 64)
        same[name] = [
            parallel.size(), found.history["bound"].tolist(), somewhere(found), found.log
        ]
    torch.set_default_dtype(torch.float32)
    for call in (
        dict(callback=lambda step: step.step == (10, 5)[rank], steps=30),
        dict(callback=lambda step: step.step == (30, 5)[rank], steps=30),
        dict(budget=2.0, callback=lambda step: time.sleep(0.01 * rank)),
    ):
        found = flowvi.fit(
            schools(), "fullrank", lr=0.01, escalate=False, progress=False, **call
        )
        ends.append([len(found.history["bound"]), found.bounds[0], found.log])
    open(f"{out}/{{rank}}.json", "w").write(json.dumps([same, ends]))
"""


def fitted(name: str, particles: int) -> flowvi.Fit:
    torch.manual_seed(distributed.rank())  # what a process did before must not matter
    target = schools()
    return flowvi.fit(
        target, name, steps=30, lr=0.01, particles=particles, escalate=False, progress=False
    )


def somewhere(found: flowvi.Fit) -> list[float]:
    """The density of the guide at a few points, which says what its parameters are."""
    z = torch.linspace(-1.0, 1.0, 30).reshape(3, 10)
    return found.guide.log_prob(z).tolist()


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found with each guide, and how its fits ended."""
    folder = tmp_path_factory.mktemp("parallel")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(folder)))

    done = torchrun("--nproc-per-node", "2", str(script))

    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{i}.json").read_text()) for i in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_with_twice_the_draws(name, two_processes, brief):
    first, second = (same[name] for same, _ in two_processes)
    alone = fitted(name, 128)
    assert first == second
    assert first[0] == 2
    # Sums of the draws of one and of two, in the precision of the steps.
    rounding = 1e-8 if alone.guide.mixed_precision_copy() is None else 1e-5
    np.testing.assert_allclose(first[1], alone.history["bound"], rtol=rounding)
    np.testing.assert_allclose(first[2], somewhere(alone), rtol=rounding)


@pytest.mark.slow
def test_processes_end_together(two_processes):
    """The first one's callback and clock count, the callback from the next step on."""
    first, second = (ends for _, ends in two_processes)

    assert [f[:2] for f in first] == [f[:2] for f in second]
    assert [f[0] for f in first[:2]] == [11, 30]
    assert "stopped by the callback after 11 steps" in first[0][2]


@pytest.mark.slow
def test_the_first_process_writes_and_speaks(tmp_path):
    out = tmp_path / "out"

    done = torchrun(
        *("--nproc-per-node", "2", "-m", "flowvi", "fit", "models/eight_schools.py"),
        *("--guide", "fullrank", "--steps", "40", "--draws", "400", "--quiet", "--out", str(out)),
    )

    assert (out / "posterior.nc").exists(), done.stderr
    assert done.stdout.count("Verdict: ") == 1


def test_outside_a_group_nothing_is_shared():
    bound, gradient = torch.tensor(1.0), torch.arange(3.0)

    assert (distributed.size(), distributed.rank()) == (1, 0)
    assert distributed.all_reduce_mean(bound, gradient, [1.0, 0.5]) == (bound, gradient, [1.0, 0.5])
    assert distributed.broadcast_number(2.5) == 2.5
    assert distributed.broadcast(gradient) is gradient


@pytest.mark.parametrize("name", ["realnvp", "nsf_coupling", *sorted(GUIDES)])
def test_skipping_takes_the_random_numbers_of_a_step(name):
    guide = make_guide(name, 5)
    state = torch.get_rng_state()
    guide.sample_with_score((16, 1))
    after = torch.get_rng_state()

    torch.set_rng_state(state)
    guide.advance_rng((16, 1))

    assert torch.equal(torch.get_rng_state(), after)
