"""Simulation-based calibration: fits to data whose true parameters are known."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from sys import stderr
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from tqdm import tqdm

from flowvi.diagnostics import MIN_DRAWS, calibration
from flowvi.diagnostics.moments import blocks
from flowvi.draws import diagnose, resample, stream
from flowvi.fit import fit
from flowvi.target import ModelError, Target, from_pyro

Truth = Mapping[str, np.ndarray]
Simulate = Callable[[int], tuple[Sequence[Any], Truth]]
# Below this, ranks are called miscalibrated.
LEVEL = 0.01


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among the draws of fits to simulated data.

    Attributes:
        labels: Names of the P scalars, such as ``theta[3]``.
        levels: Number L of draws behind each rank.
        plain: Ranks among the guide's draws, (M, P), from 0 to L.
        resampled: Ranks among the resampled draws, (M, P).
        probabilities: P_q(theta < truth), (M, P).
        verdicts: Of each of the M fits.
        failures: What stopped each fit that failed; these have no row.
    """

    labels: tuple[str, ...]
    levels: int
    plain: np.ndarray
    resampled: np.ndarray
    probabilities: np.ndarray
    verdicts: tuple[str, ...]
    failures: tuple[str, ...] = ()

    @property
    def uniform(self) -> dict[str, float]:
        """Adjusted p-values of the tests of uniformity, of plain and resampled draws."""
        kinds = {"plain": self.plain, "resampled": self.resampled}
        return {
            name: calibration.adjusted(*calibration.uniformity(ranks, self.levels))
            for name, ranks in kinds.items()
        }

    @property
    def symmetric(self) -> float:
        """Adjusted p-value of the test of symmetry (VSBC)."""
        return calibration.adjusted(calibration.symmetry(self.probabilities))

    def __str__(self) -> str:
        uniform, symmetric = self.uniform, self.symmetric
        good = [name for name, p in uniform.items() if p >= LEVEL]
        head = f"The {' and '.join(good)} draws are calibrated" if good else "Not calibrated"
        lines = [f"{head}, by {len(self.plain)} fits to simulated data"]
        lines += [
            f"  ranks among {name} draws uniform{'':<{9 - len(name)}}  p = {p:.2g}  {self._worst(name)}"
            for name, p in uniform.items()
        ]
        lines.append(f"  guide symmetric about the truth          p = {symmetric:.2g}")
        counts = {v: self.verdicts.count(v) for v in dict.fromkeys(self.verdicts)}
        lines.append(
            "  verdicts: " + ", ".join(f"{n} x {verdict}" for verdict, n in counts.items())
        )
        lines.append("  p-values are adjusted for the number of scalars and tests (Bonferroni)")
        if self.failures:
            lines.append(
                f"  - {len(self.failures)} fits failed and are missing, which may itself be a "
                f"fault; the first: {self.failures[0]}"
            )
        return "\n".join(lines)

    def _worst(self, name: str) -> str:
        """The scalar with the smallest p-value."""
        ks, width = calibration.uniformity(getattr(self, name), self.levels)
        i = int(np.argmin(np.minimum(ks, width)))
        return f"({self.labels[i]}: KS {ks[i]:.2g}, width {width[i]:.2g})"


def sbc(
    model: Callable[..., Any],
    *args: Any,
    simulate: Simulate | None = None,
    fits: int = 100,
    draws: int = 1000,
    levels: int = 127,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    **settings: Any,
) -> Calibration:
    """Fit a model to many data sets that it simulated, and rank the truth among the draws.

    Parameters come from the prior and data from the model given them. If a
    fit is right, the true value is one more draw of the posterior, and its rank
    uniform; resampled draws are ranked as well. P_q(theta < truth) is
    symmetric about 1/2 if the guide's centre is right (VSBC).

    Args:
        model: A Pyro model.
        *args: Its arguments. Observed values in them are replaced by simulated ones.
        simulate: Seed -> (arguments of the model, true values by name), where the
            model cannot simulate its own data, or the design is to vary.
        fits: Number M of simulated data sets.
        draws: Draws of each guide, behind its weights and the probabilities.
        levels: Number L of draws behind a rank, from 0 to L.
        seed: Of everything random.
        file: Where finished fits are kept (NumPy's .npz); a later call goes on from there.
        executor: Runs the fits, such as a `ProcessPoolExecutor`; one after the other without.
        progress: Show a bar, if the error stream is a terminal.
        **settings: Of `flowvi.fit`, such as guide and steps.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788: SBC.
        Yao, Vehtari, Simpson and Gelman (2018), arXiv:1802.02538: VSBC.
    """
    if fits < 2 or draws < MIN_DRAWS or not 1 <= levels <= draws:
        raise ValueError(
            f"sbc needs fits >= 2, draws >= {MIN_DRAWS} and levels from 1 to draws; got "
            f"{fits}, {draws} and {levels}."
        )
    common = _Common(model, draws, levels, seed, settings)
    tasks = _given(simulate, common, fits) if simulate else _own(args, common, fits)
    key = {"fits": fits, "draws": draws, "levels": levels, "seed": seed, "settings": repr(settings)}
    store = _Store(Path(file) if file is not None else None, key)
    left = [task for task in tasks if task.index not in store.done]
    shown = progress and stderr.isatty()
    with tqdm(total=fits, initial=fits - len(left), disable=not shown, unit="fit") as bar:
        for outcome in _run(left, executor):
            store.add(outcome)
            bar.update()
    return store.calibration(levels)


class _Common(NamedTuple):
    """What all fits share."""

    model: Callable[..., Any]
    draws: int
    levels: int
    seed: int
    settings: Mapping[str, Any]


class _Task(NamedTuple):
    """One fit: arguments and observed values of the model, and the truth behind them."""

    common: _Common
    index: int
    args: Sequence[Any]
    observed: dict[str, torch.Tensor]
    truth: Truth


class _Outcome(NamedTuple):
    """What came out of one fit; a message where it failed."""

    index: int
    labels: tuple[str, ...]
    plain: np.ndarray
    resampled: np.ndarray
    probabilities: np.ndarray
    verdict: str
    failure: str


def _given(simulate: Simulate, common: _Common, fits: int) -> list[_Task]:
    made = (simulate(common.seed + i) for i in range(fits))
    return [_Task(common, i, args, {}, truth) for i, (args, truth) in enumerate(made)]


def _own(args: Sequence[Any], common: _Common, fits: int) -> list[_Task]:
    """Data that the model itself simulates."""
    target = from_pyro(common.model, *args)
    _check(target)
    values = target.prior(fits, stream(common.seed, 0))
    truth = {name: v for name, v in values.items() if name not in target.observed}
    data = {
        name: torch.as_tensor(values[name], dtype=like.dtype)
        for name, like in target.observed.items()
    }
    return [
        _Task(
            common,
            i,
            args,
            {name: v[i] for name, v in data.items()},
            {name: v[i] for name, v in truth.items()},
        )
        for i in range(fits)
    ]


def _check(target: Target) -> None:
    if not target.observed:
        raise ModelError(f"{target.name} observes nothing: there are no data to simulate.")
    if target.subsampled:
        plate = next(iter(target.subsampled))
        raise ModelError(
            f"Plate '{plate}' is subsampled: give sbc the model without a subsample size, or "
            "your own simulate(seed)."
        )


def _run(tasks: Sequence[_Task], executor: Executor | None) -> Iterator[_Outcome]:
    if executor is None:
        yield from map(_one, tasks)
        return
    futures = [executor.submit(_one, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _one(task: _Task) -> _Outcome:
    """Fit one simulated data set, and rank its truth."""
    common, seed = task.common, stream(task.common.seed, 1, task.index) % 2**32
    names, truth = _flat({name: np.asarray(v)[None, None] for name, v in task.truth.items()})
    try:
        target = from_pyro(poutine.condition(common.model, data=task.observed), *task.args)
        fitted = fit(target, seed=seed, progress=False, **common.settings)
        drawn = fitted.draw(common.draws, seed=seed)
        diagnosis = diagnose(drawn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k-hat is in the verdict
            weighed = resample(drawn, seed=seed, n=common.levels)
    except (ValueError, torch.linalg.LinAlgError) as error:
        none = np.full(len(names), -1)
        return _Outcome(task.index, names, none, none, none.astype(float), "", str(error) or "?")
    rng = np.random.default_rng(seed)
    _, plain = _flat({name: drawn[name] for name in task.truth})
    _, better = _flat({name: weighed[name] for name in task.truth})
    below = calibration.rank(plain, truth[0], rng)
    return _Outcome(
        task.index,
        names,
        calibration.rank(plain[: common.levels], truth[0], rng),
        calibration.rank(better, truth[0], rng),
        (below + 0.5) / (len(plain) + 1),
        diagnosis.verdict,
        "",
    )


def _flat(values: Mapping[str, np.ndarray]) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels of all scalars, and their draws of the first chain, (draw, P)."""
    parts = [(name + i, x[0, :, k]) for name, s, x in blocks(values) for k, i in enumerate(s)]
    return tuple(label for label, _ in parts), np.stack([x for _, x in parts], axis=-1)


class _Store:
    """Outcomes by number, and the file in which they survive.

    Args:
        file: Where to; nowhere without it.
        key: Settings that outcomes of one file share.
    """

    def __init__(self, file: Path | None, key: Mapping[str, Any]) -> None:
        self.file, self.key = file, json.dumps(dict(key), sort_keys=True)
        self.done: dict[int, _Outcome] = {}
        if file is not None and file.exists():
            self._read(file)

    def add(self, outcome: _Outcome) -> None:
        self.done[outcome.index] = outcome
        if self.file is None:
            return
        rows = list(self.done.values())
        columns = {name: np.array([getattr(r, name) for r in rows]) for name in _Outcome._fields}
        columns["labels"] = np.array(outcome.labels)
        part = self.file.with_name(f".{os.getpid()}.{self.file.name}")
        with part.open("wb") as stream_:
            np.savez(stream_, key=np.array(self.key), **columns)
        os.replace(part, self.file)

    def calibration(self, levels: int) -> Calibration:
        rows = [self.done[i] for i in sorted(self.done)]
        good = [row for row in rows if not row.failure]
        failures = tuple(row.failure for row in rows if row.failure)
        if len(good) < 2:
            raise ValueError(f"Nearly all fits failed, the first one thus: {failures[0]}")
        return Calibration(
            good[0].labels,
            levels,
            np.stack([row.plain for row in good]),
            np.stack([row.resampled for row in good]),
            np.stack([row.probabilities for row in good]),
            tuple(row.verdict for row in good),
            failures,
        )

    def _read(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as saved:
            if str(saved["key"]) != self.key:
                raise ValueError(
                    f"{file} holds the fits of another calibration, with {saved['key']}; "
                    f"this one has {self.key}. Name another file."
                )
            labels = tuple(map(str, saved["labels"]))
            columns = [saved[name] for name in _Outcome._fields if name != "labels"]
        for index, plain, resampled, probabilities, verdict, failure in zip(*columns, strict=True):
            row = (labels, plain, resampled, probabilities, str(verdict), str(failure))
            self.done[int(index)] = _Outcome(int(index), *row)
