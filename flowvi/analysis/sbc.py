"""Simulation-based calibration: fits to simulated data with known parameters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pyro import poutine

from flowvi.amortized.guide import AmortizedGuide
from flowvi.analysis.ranks import ranks_of, scalars
from flowvi.analysis.replicates import WithReplicate
from flowvi.analysis.sbc_amortized import sbc_amortized
from flowvi.analysis.sbc_store import Outcome, Store
from flowvi.diagnostics import MIN_DRAWS
from flowvi.diagnostics.calibration import Calibration
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import resample
from flowvi.draws.scalars import recommended
from flowvi.fitting.executors import own_state_of
from flowvi.fitting.fit import fit
from flowvi.fitting.result import RowFit
from flowvi.runtime.arguments import check_integer, check_keywords
from flowvi.runtime.progress import showing
from flowvi.runtime.rng import derive_seed
from flowvi.targets import GlobalTarget, ModelError, Target, from_pyro, replicable

Truth = Mapping[str, np.ndarray]
Simulate = Callable[[int], tuple[Sequence[Any], Truth]]
# Number of fits that an executor runs in one task, with one capture of the model.
TASKS_PER_SUBMIT = 5
# Number of simulated rows in one call of an amortised guide.
ROWS_PER_CALL = 50
# Draws of each guide by default.
DRAWS = 1000
# Names of the settings of a fit.
SETTINGS = [*signature(fit).parameters]


def sbc(
    model: Callable[..., Any] | RowFit | AmortizedGuide | Draws | None = None,
    *args: Any,
    simulate: Simulate | None = None,
    fits: int = 100,
    draws: int | Draws = DRAWS,
    levels: int = 127,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    **settings: Any,
) -> Calibration:
    """Fit a model to simulated data sets, and rank the true parameters among the draws.

    Parameters are drawn from the prior, and data from the model given them. If the fits are
    calibrated, the rank of the true value among independent draws is uniform. Ranks are computed
    for plain and for resampled draws. P_q(theta < truth) is symmetric about 1/2 if the centre of
    the guide is right (VSBC).

    An amortised guide needs no fits: `sbc(guide, fits=1000)` draws from the result of
    `flowvi.amortize` for each simulated data set, and `sbc(row_fit, fits=1000)` from a guide of
    rows for each simulated row.

    `sbc(draws=fit.draw(4000))` tests calibration at the data of this fit (posterior SBC).
    Parameters are drawn from the posterior, and a second data set given them; the fit to both
    data sets is calibrated, if the rank of the true value is uniform. It needs no prior that
    makes sense, and tests where it matters.

    Args:
        model: A Pyro model; or a `RowFit`, whose guide is tested; or draws, as for `draws`.
        *args: Arguments of the model. Observed values in them are replaced by simulated ones.
        simulate: Function from a seed to (arguments of the model, true values by name), for a
            model that cannot simulate its own data, or for a design that varies.
        fits: Number M of simulated data sets.
        draws: Number of draws of each guide, for its weights and the probabilities; or draws of
            a fit to a Pyro model, for calibration at its data, with 1,000 draws of each guide.
        levels: Number L of draws for a rank, which lies between 0 and L.
        seed: Seed of all random numbers.
        file: File of the finished fits (NumPy's .npz); a later call resumes from it.
        executor: Runs the fits in parallel, such as a `ProcessPoolExecutor`.
        progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
            every 10 seconds elsewhere.
        **settings: Arguments of `flowvi.fit`, such as guide and steps.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788: SBC.
        Yao, Vehtari, Simpson and Gelman (2018), arXiv:1802.02538: VSBC.
        Saeilynoja, Schmitt, Buerkner and Vehtari (2025), arXiv:2502.03279: posterior SBC.
    """
    given = draws if isinstance(draws, Draws) else model if isinstance(model, Draws) else None
    draws = DRAWS if isinstance(draws, Draws) else draws
    if given is not None and (args or simulate or not isinstance(model, Draws | None)):
        raise TypeError(
            "sbc(draws=...) takes the model and its data from the draws: leave out the model, its "
            "arguments and simulate."
        )
    if model is None and given is None:
        raise TypeError("sbc needs a model and its arguments, or draws of a fit: sbc(draws=...).")
    if given is None and (
        hasattr(model, "draw") and not isinstance(model, RowFit | AmortizedGuide)
    ):
        raise TypeError(
            f"sbc needs the model, to fit it to many data sets, or a fit of rows (local=), which "
            f"serves them all; got a {type(model).__name__}: use sbc(model, *arguments)."
        )
    if check_integer("fits", fits, 2) and check_integer("levels", levels) > check_integer(
        "draws", draws, MIN_DRAWS
    ):
        raise ValueError(f"levels must be at most draws; got {levels} and {draws}.")
    if isinstance(model, RowFit | AmortizedGuide):
        if args or simulate or file is not None or executor is not None or settings:
            raise TypeError(
                f"sbc of a {type(model).__name__} fits nothing: it takes fits, draws, levels, seed "
                "and progress alone."
            )
        if isinstance(model, AmortizedGuide):
            return sbc_amortized(model, fits, draws, levels, seed, progress)
        return _of_rows(model, fits, draws, levels, seed)
    check_keywords("sbc", settings, [*signature(sbc).parameters, *SETTINGS])
    common = _Common(cast(Callable[..., Any], model), draws, levels, seed, settings)
    if given is not None:
        tasks = _posterior_tasks(given, common, fits)
    elif simulate:
        tasks = _simulated_tasks(simulate, common, fits)
    else:
        tasks = _model_tasks(args, common, fits)
    key: dict[str, Any] = {
        "fits": fits,
        "draws": draws,
        "levels": levels,
        "seed": seed,
        "settings": repr(settings),
    }
    if given is not None:
        key["posterior"] = given.title
    store = Store(Path(file) if file is not None else None, key)
    left = [task for task in tasks if task.number not in store.done]
    with showing("calibration", progress, unit="fit") as bar:
        bar.phase("fits to simulated data", fits, fits - len(left))
        for outcome in _run(left, executor):
            store.add(outcome)
            bar.step()
    return store.calibration(levels)


class _Common(NamedTuple):
    """Arguments that all fits share."""

    model: Callable[..., Any]
    draws: int
    levels: int
    seed: int
    settings: Mapping[str, Any]


class _Task(NamedTuple):
    """One fit: arguments and observed values of the model, and the true parameters."""

    common: _Common
    number: int
    args: Sequence[Any]
    observed: dict[str, torch.Tensor]
    truth: Truth


def _simulated_tasks(simulate: Simulate, common: _Common, fits: int) -> list[_Task]:
    made = (simulate(common.seed + i) for i in range(fits))
    return [_Task(common, i, args, {}, truth) for i, (args, truth) in enumerate(made)]


def _model_tasks(args: Sequence[Any], common: _Common, fits: int) -> list[_Task]:
    """Simulate the data sets from the model itself."""
    target = from_pyro(common.model, *args)
    _check(target)
    values = target.prior(fits, derive_seed(common.seed, 0))
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


def _posterior_tasks(given: Draws, common: _Common, fits: int) -> list[_Task]:
    """Simulate a second data set for draws of the posterior."""
    target = given.target
    if not isinstance(target, Target) or given.by_row or "inner" in given.meta:
        raise ModelError(
            "sbc needs draws of latents that all rows share, of a fit to a model from from_pyro, "
            f"and got draws of {target.name}: use sbc(model, *arguments)."
        )
    if target.subsampled:
        raise ModelError(
            f"sbc needs draws of a model of all rows, and got draws of {target.name}, whose rows "
            "are subsampled: give from_pyro the model without a subsample size."
        )
    if target.source is None:
        raise ModelError(f"{target.name} is a plain density: there are no data to simulate.")
    model, args, keywords = target.source
    _check(target)
    kept, _ = recommended(given, common.seed)
    rng = np.random.default_rng(derive_seed(common.seed, 2))
    places = rng.choice(len(kept), fits, replace=fits > len(kept))
    flat = {n: v.reshape(len(kept), *v.shape[2:])[places] for n, v in kept.values.items()}
    latents = {name: flat[name] for name in target.sites}
    simulated = target.predictive(latents, derive_seed(common.seed, 0))
    tasks = []
    for i in range(fits):
        data = {
            name: torch.as_tensor(simulated[name][i], dtype=like.dtype)
            for name, like in target.observed.items()
        }
        own = common._replace(model=partial_model(WithReplicate(model, data), keywords))
        tasks.append(_Task(own, i, args, {}, {name: v[i] for name, v in flat.items()}))
    return tasks


def partial_model(model: WithReplicate, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    """The model with the keyword arguments of the fit."""
    return partial(model, **keywords) if keywords else model


def _check(target: Target) -> None:
    if not target.observed:
        raise ModelError(f"{target.name} observes nothing: there are no data to simulate.")
    if target.subsampled:
        plate = next(iter(target.subsampled))
        raise ModelError(
            f"Plate '{plate}' is subsampled: give sbc the model without a subsample size, or "
            "your own simulate(seed)."
        )


def _run(tasks: Sequence[_Task], executor: Executor | None) -> Iterator[Outcome]:
    if executor is None:
        yield from _fit_tasks(tasks)
        return
    futures = [
        executor.submit(_fit_tasks_in_worker, tasks[i : i + TASKS_PER_SUBMIT])
        for i in range(0, len(tasks), TASKS_PER_SUBMIT)
    ]
    try:
        for future in as_completed(futures):
            yield from future.result()
    finally:
        for future in futures:
            future.cancel()


def _fit_tasks_in_worker(tasks: Sequence[_Task]) -> list[Outcome]:
    return list(_fit_tasks(tasks))


def _fit_tasks(tasks: Sequence[_Task]) -> Iterator[Outcome]:
    """Fit several simulated data sets in sequence, with one capture of the model."""
    shared = _capture_once(tasks[0]) if len(tasks) > 1 and tasks[0].observed else None
    for task in tasks:
        yield _fit_task(task, shared)


def _capture_once(task: _Task) -> GlobalTarget | None:
    """Capture the model with replaceable data, if it allows that."""
    try:
        target = replicable(task.common.model, *task.args)
    except ModelError:
        return None
    return target if target.density.batched.how == "tape" else None


def _fit_task(task: _Task, shared: GlobalTarget | None) -> Outcome:
    """Fit one simulated data set, and rank the true parameters."""
    common, seed = task.common, derive_seed(task.common.seed, 1, task.number) % 2**32
    names, truth = scalars({name: np.asarray(v)[None, None] for name, v in task.truth.items()})
    try:
        if shared is not None:
            target = shared.observing(task.observed)
        else:
            target = from_pyro(poutine.condition(common.model, data=task.observed), *task.args)
        # Ranks need independent draws of one guide, even if the guide is poor.
        settings = {"escalate": False, "compile": False, **common.settings}
        # Fits share the model's own parameters, and each starts from their initial values.
        own = own_state_of(target)
        try:
            fitted = fit(target, seed=seed, progress=False, **settings)
            drawn = fitted.draw(common.draws, seed=seed)
        finally:
            target.set_own_state(own)
        diagnosis = diagnose(drawn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k-hat is in the verdict
            weighed = resample(drawn, seed=seed, n=common.levels)
    except (ValueError, torch.linalg.LinAlgError) as error:
        none = np.full(len(names), -1)
        return Outcome(task.number, names, none, none, none.astype(float), "", str(error) or "?")
    rng = np.random.default_rng(seed)
    _, plain = scalars({name: drawn[name] for name in task.truth})
    _, better = scalars({name: weighed[name] for name in task.truth})
    ranks = ranks_of(plain, better, truth[0], common.levels, rng)
    return Outcome(task.number, names, *ranks, diagnosis.verdict, "")


def _of_rows(fit: RowFit, fits: int, draws: int, levels: int, seed: int) -> Calibration:
    """Rank the true latents of simulated rows among the draws of one amortised guide.

    Latents are drawn from the prior, and rows from the model given them, both with the
    trained parameters.
    """
    target = fit.target
    simulated = target.prior(fits, derive_seed(seed, 0) % 2**32)
    rows = target.replaced(target.batch(torch.arange(fits) % target.rows), simulated)
    truth = {name: simulated[name] for name in target.sites}
    rng = np.random.default_rng(seed)
    found: list[tuple[np.ndarray, ...]] = []
    verdicts: list[str] = []
    for start in range(0, fits, ROWS_PER_CALL):
        data = tuple(t[start : start + ROWS_PER_CALL] for t in rows.data)
        drawn = fit.draw(draws, data, derive_seed(seed, 1, start) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k-hat is in the verdict
            weighed = resample(drawn, seed=derive_seed(seed, 2, start) % 2**32, n=levels)
        assert weighed.diagnosis is not None and weighed.diagnosis.rows is not None
        verdicts += weighed.diagnosis.rows.verdict.tolist()
        for i in range(len(data[0])):
            names, true = scalars({n: truth[n][start + i][None, None] for n in truth})
            _, plain = scalars({n: drawn[n][:, :, i] for n in truth})
            _, better = scalars({n: weighed[n][:, :, i] for n in truth})
            found.append(ranks_of(plain, better, true[0], levels, rng))
    ranked, resampled, below = (np.stack(column) for column in zip(*found, strict=True))
    return Calibration(names, levels, ranked, resampled, below, tuple(verdicts))
