"""Judge a guide at many data sets, and fit those at which it is not trusted."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowvi.amortized.guide import START_DRAWS, AmortizedGuide, check_sets
from flowvi.amortized.reading import DataSet, read, target_of
from flowvi.amortized.table import CHAINS, FAILED, FIT, GUIDE, Fits, Line, line_from, line_of
from flowvi.diagnostics import VERDICTS
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.storage import from_state, to_state
from flowvi.fitting.fit import fit
from flowvi.fitting.given_start import normal_of_draws
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.runtime.arguments import check_integer, optional
from flowvi.runtime.files import CheckpointError, atomic_replace, error_reason
from flowvi.runtime.progress import showing
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import GlobalTarget, from_pyro
from flowvi.targets.precision import default_dtype

# Seconds between two writes of the file, and least multiple of the time that one takes.
EVERY, SPARED = 10.0, 50.0
OF_GUIDE, OF_FIT = 1, 2

State = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One data set that gets a fit of its own, in a form that can be pickled.

    Attributes:
        number: Place of the data set.
        model: The model.
        args: Its arguments with these data.
        kwargs: Its keyword arguments.
        start: Normal near the posterior, by its state.
        n: Draws.
        seed: Seed of the fit and its draws.
        dtype: Torch's default precision.
        settings: Arguments of `flowvi.fit`.
    """

    number: int
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    start: Mapping[str, Any]
    n: int
    seed: int
    dtype: torch.dtype
    settings: Mapping[str, Any]


def fit_many(
    guide: AmortizedGuide,
    data: Iterable[Any],
    n: int,
    escalate: bool,
    executor: Executor | None,
    progress: bool,
    file: str | os.PathLike[str] | None,
    seed: int,
    settings: Mapping[str, Any],
) -> Fits:
    """See `AmortizedGuide.fit_many`."""
    n, seed = check_integer("n", n), check_integer("seed", seed, 0)
    given = check_sets(data)
    sets: list[DataSet | str] = []
    for one in given:
        try:
            sets.append(read(guide.problem, one))
        except (ValueError, TypeError) as error:
            # One bad data set of thousands does not end the others.
            sets.append(str(error))
    if sets and all(isinstance(one, str) for one in sets):
        raise ValueError(f"None of the data sets can be read, the first one thus: {sets[0]}")
    prints = [one if isinstance(one, str) else one.fingerprint() for one in sets]
    key = {"model": guide.name, "n": n, "escalate": escalate, "seed": seed, "guide": guide.meta}
    store = Store(optional(Path, "file", file), {**key, "settings": repr(dict(settings))}, prints)
    with showing(guide.name, progress, unit="data set") as bar:
        bar.phase("guide at each data set", len(sets), len(store.lines))
        # By their number of rows, since each has a captured model of its own.
        order = sorted(range(len(sets)), key=lambda i: getattr(sets[i], "rows", 0))
        for i in order:
            if i not in store.lines:
                store.add(i, _judge(guide, sets[i], n, _seed(seed, OF_GUIDE, i)))
                bar.step()
        left = [
            i
            for i, line in sorted(store.lines.items())
            if escalate and line.method == GUIDE and not line.trusted
        ]
        bar.phase("fits of those not trusted", len(left))
        tasks = (_task(guide, sets[i], i, n, _seed(seed, OF_FIT, i), settings) for i in left)
        for number, line, state in _run(tasks, executor):
            before = store.lines[number]
            store.add(number, replace(line, unlike=before.unlike), state)
            bar.step()
        store.write()
    lines = [store.lines[i] for i in range(len(sets))]

    def drawn(i: int) -> Draws:
        one = sets[i]
        if isinstance(one, str):
            raise ValueError(f"Data set {i} could not be read: {one}")
        if i in store.states:
            target = target_of(guide.problem, one)
            return from_state(target, _tensors(store.states[i]))
        return guide._drawn(one, n, _seed(seed, OF_GUIDE, i))

    return Fits(guide.name, lines, drawn)


def _seed(seed: int, purpose: int, i: int) -> int:
    return derive_seed(seed, purpose, i) % 2**32


def _judge(guide: AmortizedGuide, data: DataSet | str, n: int, seed: int) -> Line:
    """The verdict on the guide's draws at a data set."""
    began = time.perf_counter()
    if isinstance(data, str):
        return Line(VERDICTS[-1], FAILED, reason=data)
    draws = guide._drawn(data, n, seed)
    try:
        found = diagnose(draws)
    except ValueError as error:
        return Line(VERDICTS[-1], GUIDE, unlike=draws.meta["unlike"]["p"], reason=str(error))
    return line_of(found, GUIDE, draws.meta["unlike"]["p"], time.perf_counter() - began)


def _task(
    guide: AmortizedGuide,
    data: DataSet | str,
    number: int,
    n: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Task:
    assert isinstance(data, DataSet)
    start = normal_of_draws(guide._drawn(data, START_DRAWS, seed))
    model, call = guide.problem.model, data.call
    if call is None:
        raise ValueError(
            f"Data set {number} was given by its sites, and the model of {guide.name} takes them "
            "as no arguments: it cannot be fitted by itself. Use escalate=False."
        )
    return Task(number, model, *call, start.state(), n, seed, torch.get_default_dtype(), settings)


def _run(
    tasks: Iterator[Task], executor: Executor | None
) -> Iterator[tuple[int, Line, State | None]]:
    if executor is None:
        yield from map(run_task, tasks)
        return
    futures = [executor.submit(run_task, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def run_task(task: Task) -> tuple[int, Line, State | None]:
    """Fit one data set: its place, its line, and its draws as arrays; none if the fit failed."""
    began = time.perf_counter()
    settings = {"progress": False, **task.settings, "seed": task.seed}
    with isolated_rng(), default_dtype(task.dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict tells
        try:
            target = from_pyro(task.model, *task.args, **task.kwargs)
            assert isinstance(target, GlobalTarget)
            done = fit(target, start=GaussianApproximation(**task.start), **settings)
            draws = done.draw(task.n, task.seed)
            found = diagnose(draws)
        except (ValueError, RuntimeError, torch.linalg.LinAlgError) as error:
            return task.number, Line(VERDICTS[-1], FAILED, reason=str(error)), None
    method = CHAINS if draws.mcmc else FIT
    seconds = time.perf_counter() - began
    line = line_of(found, method, math.nan, seconds, int(done.meta["steps"]))
    kept = draws if draws.by_row is False else replace(draws, unit_scores=None)
    state = to_state(kept)
    arrays = {name: t.numpy() for name, t in state["arrays"].items()}
    return task.number, line, {"arrays": arrays, "meta": state["meta"]}


class Store:
    """Lines and draws by place of the data set, and the file that keeps them.

    Args:
        file: The file; None keeps nothing.
        key: What all results of the file share.
        prints: Checksum of each data set.

    Raises:
        CheckpointError: The file holds results of another call.
    """

    def __init__(self, file: Path | None, key: Mapping[str, Any], prints: Sequence[str]) -> None:
        self.file, self.key, self.prints = file, json.dumps(dict(key), sort_keys=True), prints
        self.lines: dict[int, Line] = {}
        self.states: dict[int, State] = {}
        self._last, self._took = time.perf_counter(), 0.0
        if file is not None and file.exists():
            self._read(file)

    def add(self, number: int, line: Line, state: State | None = None) -> None:
        """Add a result, and write the file if it is time."""
        self.lines[number] = line
        if state is not None:
            self.states[number] = state
        if time.perf_counter() - self._last > max(EVERY, SPARED * self._took):
            self.write()

    def write(self) -> None:
        """Write the file, completely or not at all."""
        if self.file is None:
            return
        began = time.perf_counter()
        lines = {self.prints[i]: asdict(line) for i, line in self.lines.items()}
        metas = {self.prints[i]: state["meta"] for i, state in self.states.items()}
        arrays = {
            f"{self.prints[i]}/{name}": array
            for i, state in self.states.items()
            for name, array in state["arrays"].items()
        }
        text = json.dumps({"key": self.key, "lines": lines, "metas": metas})
        try:
            with atomic_replace(self.file) as part, part.open("wb") as opened:
                np.savez(opened, text=np.array(text), **arrays)
        except OSError as error:
            warnings.warn(
                f"{self.file} could not be written ({error_reason(error)}). The fits go on, and "
                "are written with the next ones.",
                stacklevel=3,
            )
        self._last = time.perf_counter()
        self._took = self._last - began

    def _read(self, file: Path) -> None:
        try:
            with np.load(file, allow_pickle=False) as saved:
                found = json.loads(str(saved["text"]))
                arrays = {name: saved[name] for name in saved.files if name != "text"}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} is not a file that fit_many wrote: {error}.") from None
        if found["key"] != self.key:
            raise CheckpointError(
                f"{file} holds the data sets of another call of fit_many, with other settings or "
                "another guide. Name another file."
            )
        for i, print_ in enumerate(self.prints):
            if print_ in found["lines"]:
                self.lines[i] = line_from(found["lines"][print_])
            if print_ in found["metas"]:
                prefix = f"{print_}/"
                own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
                self.states[i] = {"arrays": own, "meta": found["metas"][print_]}


def _tensors(state: State) -> State:
    arrays = {name: torch.as_tensor(array) for name, array in state["arrays"].items()}
    return {**state, "arrays": arrays}
