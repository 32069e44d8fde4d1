"""Faults injected into fits that keep a checkpoint, and how many of them lost nothing.

    python benchmarks/faults.py [--kills 50] [--others 10] [--seed 0]

Survived means: the fit that goes on ends with the bits of one that was left in peace
(bound, steps, log and all parameters), and whatever was damaged is named in a warning.
It prints a table, a row at a time.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

import flowvi
from flowvi.initialization import candidates
from flowvi.runtime.files import CheckpointError
from flowvi.training import checkpointer
from flowvi.training.schedule import Schedule

STEPS = 40
Fault = Callable[[Path, np.random.Generator], bool]


def banana() -> flowvi.Target:
    """A density in two dimensions."""

    def log_prob(v: dict[str, Tensor]) -> Tensor:
        x, y = v["x"]
        return Normal(0.0, 1.0).log_prob(x) + Normal(x**2, 0.3).log_prob(y)

    return flowvi.from_density(log_prob, {"x": flowvi.Site((2,))})


def fit(folder: Path | None, resume: bool = False, stop: int = 0) -> flowvi.Fit:
    """A fit that keeps its state after every step."""

    def callback(step: flowvi.Step) -> None:
        if step.step == stop:
            raise TimeoutError

    return flowvi.fit(
        banana(),
        "planar",
        steps=STEPS,
        lr=1e-2,
        progress=False,
        checkpoint=folder,
        resume=resume,
        schedule=Schedule(check_draws=400, evaluation_draws=400),
        callback=callback,
        compile=False,
    )


def same(a: flowvi.Fit, b: flowvi.Fit) -> bool:
    """Whether two fits have the same bits."""
    history = all(np.array_equal(v, b.history[k], equal_nan=True) for k, v in a.history.items())
    pairs = zip(a.guide.state_dict().values(), b.guide.state_dict().values(), strict=True)
    return (
        a.bounds == b.bounds and a.log == b.log and history and all(torch.equal(*p) for p in pairs)
    )


def in_child(work: Callable[[], bool]) -> int:
    """Do something in a process of its own, which a fault may end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = 0 if work() else 1
        finally:
            # Whatever happened: the child is not to go on with what its parent does.
            os._exit(code)
    return child


def ended(child: int) -> int:
    """How a process ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Faults:
    """Faults, each of which takes a fresh folder and tells whether nothing was lost."""

    def __init__(self) -> None:
        began = time.perf_counter()
        self.whole = fit(None)
        self.seconds = time.perf_counter() - began

    def goes_on(self, folder: Path, said: bool = False) -> bool:
        """Whether a fit goes on to the same bits, and says so if something was damaged."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = fit(folder, resume=True)
        return same(found, self.whole) and (bool(caught) or not said)

    def killed(self, number: int) -> Fault:
        """A signal at a random moment."""

        def fault(folder: Path, rng: np.random.Generator) -> bool:
            child = in_child(lambda: bool(fit(folder)))
            time.sleep(1.5 * self.seconds * rng.random())
            os.kill(child, number)
            ended(child)
            return self.goes_on(folder)

        return fault

    def full(self, folder: Path, rng: np.random.Generator) -> bool:
        """No file may be longer than a random size: the fit goes on, and so does the next."""
        most = int(rng.integers(100, 40_000))

        def work() -> bool:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            return same(fit(folder), self.whole)

        return ended(in_child(work)) == 0 and self.goes_on(folder)

    def damaged(self, pattern: str, harm: Callable[[Path, np.random.Generator], object]) -> Fault:
        """The newest file of a kind is not as it was written."""

        def fault(folder: Path, rng: np.random.Generator) -> bool:
            self.cut(folder, int(rng.integers(3, STEPS)))
            harm(max(folder.glob(pattern)), rng)
            return self.goes_on(folder, said=True)

        return fault

    def cut(self, folder: Path, step: int) -> None:
        """Leave a fit in the middle."""
        try:
            fit(folder, stop=step)
        except TimeoutError:
            return

    def shared(self, folder: Path, rng: np.random.Generator) -> bool:
        """A second fit on a folder in use is refused with the process of the first."""
        child = in_child(lambda: bool(fit(folder)))
        while not (folder / "manifest.json").exists():
            time.sleep(0.01)
        try:
            fit(folder, resume=True)
        except CheckpointError as error:
            refused = f"process {child}" in str(error)
        else:
            refused = False
        return ended(child) == 0 and refused and self.goes_on(folder)


def flip(file: Path, rng: np.random.Generator) -> None:
    """One bit."""
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


HARMS: dict[str, Callable[[Path, np.random.Generator], object]] = {
    "one bit flipped": flip,
    "cut off": lambda file, rng: os.truncate(file, int(rng.integers(1, file.stat().st_size))),
    "empty": lambda file, rng: file.write_bytes(b""),
    "random bytes": lambda file, rng: file.write_bytes(rng.bytes(3000)),
    "missing": lambda file, rng: file.unlink(),
}
KINDS = {"state": "state-*", "manifest": "manifest.json", "piece": "piece-*"}


def main() -> None:
    """Inject all faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--others", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    checkpointer.EVERY = checkpointer.SPARED = 0.0
    # A short search for a start and few draws to judge by: what is hurt are the files.
    candidates.TRY_ROUNDS = candidates.REFINE_ROUNDS = candidates.NEWTON_STEPS = (
        candidates.PATH_POINTS
    ) = 1
    faults, rng = Faults(), np.random.default_rng(given.seed)
    rows: list[tuple[str, str, int, Fault]] = [
        ("`kill -9`", "at a random moment", given.kills, faults.killed(signal.SIGKILL)),
        ("Ctrl-C", "at a random moment", given.others, faults.killed(signal.SIGINT)),
        ("full disk", "a random limit of file size", given.others, faults.full),
        ("two runs on one folder", "at the same time", given.others, faults.shared),
    ]
    for kind, pattern in KINDS.items():
        for words, harm in HARMS.items():
            rows.append(
                (f"{kind} {words}", "newest file", given.others, faults.damaged(pattern, harm))
            )
    print("| fault | how injected | times | survived |\n|---|---|---|---|")
    for name, how, times, fault in rows:
        survived = 0
        for _ in range(times):
            folder = Path(tempfile.mkdtemp())
            survived += fault(folder / "run", rng)
            shutil.rmtree(folder)
        print(f"| {name} | {how} | {times} | {survived} |", flush=True)


if __name__ == "__main__":
    main()
