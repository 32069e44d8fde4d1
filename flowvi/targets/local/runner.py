"""Run a Pyro model on some of its rows, with latents for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.local.rows import Arguments, Call, Place, candidate_row_counts
from flowvi.targets.pyro.bijections import bijection_of
from flowvi.targets.pyro.handlers import (
    Substitute,
    Uncondition,
    is_imputed,
    isolated_param_store,
    without_validation,
)
from flowvi.targets.pyro.layout import Layout
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.schema import ModelError

TOGETHER = 3


class UnscalePlate(Messenger):
    """Undo the scale N / B of one plate."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                msg["scale"] = msg["scale"] * frame.size / frame.full_size


class ImputeEveryRow(Messenger):
    """Give every row a latent value for an observation with `obs_mask` that may be missing.

    The latent vectors of all rows have one length. In a row whose observation is not missing,
    the latent value has a density that integrates to one, and is not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observed: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if is_imputed(msg, self.observed):
            msg["mask"] = None
        elif msg["is_observed"]:
            self.observed.add(msg["name"])


class LatentsFromRows(Messenger):
    """Give every local site its values for many rows; the log Jacobians of rows are in `ladj`.

    Args:
        z: Latent vectors, (R, D).
        layout: Where each site lies in them.
        axes: The axis of the rows in each site's value.
    """

    def __init__(self, z: Tensor, layout: Layout, axes: Mapping[str, int]) -> None:
        super().__init__()
        self.z, self.layout, self.axes = z, layout, axes
        self.ladj: Tensor = z.new_zeros(len(z))

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.layout.slices:
            return
        transform, axis = bijection_of(msg["fn"]), self.axes[name]
        shape = self.layout.shapes[name]
        u = self.z[:, self.layout.slices[name]].reshape(
            len(self.z), *shape[:axis], *shape[axis + 1 :]
        )
        u = u.movedim(0, axis).to(self.layout.dtypes[name])
        value = transform(u)
        ladj = transform.log_abs_det_jacobian(u, value).movedim(axis, 0)
        self.ladj = self.ladj + ladj.reshape(len(self.z), -1).sum(-1)
        msg["value"], msg["done"] = value, True


class RowRunner:
    """Runs a model on some of its rows."""

    def __init__(self, runner: Runner, arguments: Arguments, plate: str) -> None:
        self.runner, self.arguments, self.plate = runner, arguments, plate

    @classmethod
    def of(cls, runner: Runner, name: str, plate: str) -> RowRunner:
        """Find out which arguments have a row for each of the plate's."""
        seen: set[str] = set()
        failed: Exception | None = None
        for size in candidate_row_counts(runner.args, runner.kwargs):
            rows = cls(runner, Arguments(runner.args, runner.kwargs, size), plate)
            few = min(TOGETHER, size)
            try:
                trace, _ = rows.prior(rows.arguments.batch(range(few)).data, False)
            except Exception as error:  # another size may be that of the plate
                failed = failed or error
                continue
            frames = [f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ())]
            seen |= {frame.name for frame in frames}
            full = {frame.full_size for frame in frames if frame.name == plate}
            if full and full <= {few, size}:
                return rows
        if failed is not None and not seen:
            raise failed
        plates = ", ".join(sorted(seen)) or "none"
        raise ModelError(
            f"local='{plate}': {name} has no plate of that name with one entry for each row of "
            f"its data; its plates are: {plates}."
        )

    def runner_on(self, data: Sequence[Tensor]) -> Runner:
        """The model on some rows."""
        args, kwargs = self.arguments.call(data)
        model = ImputeEveryRow()(self.runner.model)
        return replace(self.runner, model=model, args=args, kwargs=kwargs, drawn={})

    def prior(
        self, data: Sequence[Tensor], validate: bool
    ) -> tuple[poutine.Trace, dict[str, Tensor]]:
        """One run from the prior on some rows."""
        with all_rows_in_plate(self.plate, len(data[0]) if data else 1):
            return self.runner_on(data).prior(validate)

    def run_and_score(self) -> None:
        """Run the model on a row from its prior and score it."""
        data = self.arguments.batch([0]).data
        with isolated_rng(0), isolated_param_store(), self.runner.running(), without_validation():
            self.prior(data, validate=False)[0].compute_log_prob()

    def trace(
        self,
        handler: Callable[[Any], Any],
        data: Sequence[Tensor],
        own: Sequence[Tensor],
        enumerate_from: int | None = None,
        places: Mapping[str, Tensor] | None = None,
    ) -> poutine.Trace:
        """One scored run on latent values that handlers serve, without the plate's scale."""
        runner = self.runner_on(data)
        runner.model = UnscalePlate(self.plate)(runner.model)
        with all_rows_in_plate(self.plate, len(data[0]) if data else 1):
            trace, _ = runner.trace(handler, own, enumerate_from, places)
        return trace

    def simulate(self, values: Mapping[str, Tensor], data: Sequence[Tensor]) -> poutine.Trace:
        """One run in which the data are drawn, and all latents that are not given."""
        runner = self.runner_on(data)
        free = runner.input_handler()(Substitute(values)(Uncondition()(runner.model)))
        with (
            without_validation(),
            runner.running(),
            all_rows_in_plate(self.plate, len(data[0]) if data else 1),
        ):
            return poutine.trace(free).get_trace(*runner.args, **runner.kwargs)

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The rows in a call of the model, which runs up to its plate."""
        runner = replace(self.runner, args=args, kwargs=kwargs, drawn={})
        said = self._plate_arguments(runner)
        return Call(self._rows_of(runner), *said)

    def _plate_arguments(self, runner: Runner) -> tuple[int | None, int | None, Any]:
        """Size, subsample size and subsample that the model gives the plate."""

        def reached(
            size: int | None = None, batch: int | None = None, rows: Any = None, *_: Any
        ) -> Any:
            raise _PlateReached(size, batch, rows)

        model = runner.input_handler()(runner.model)
        with (
            without_validation(),
            runner.running(),
            torch.no_grad(),
            _plate_subsample(self.plate, reached),
        ):
            try:
                model(*runner.args, **runner.kwargs)
            except _PlateReached as found:
                size, batch, rows = found.args
                return size, batch, rows
        raise ModelError(
            f"The model does not come to its plate '{self.plate}' with these arguments."
        )

    def _rows_of(self, runner: Runner) -> tuple[Tensor, ...]:
        """Those arguments of a call that have rows, as the first call had them."""
        args, kwargs = self.arguments.places()
        like = _by_path(replace(runner, args=args, kwargs=kwargs))
        given = _by_path(runner)
        found: dict[int, Tensor] = {}
        for path, leaf in like.items():
            if isinstance(leaf, Place):
                value = given.get(path)
                if not isinstance(value, Tensor):
                    raise ModelError(
                        f"A guide of rows reads them in the model's argument '{path[0].key}', as "
                        "the model was captured; got no tensor there. Give the rows, and let "
                        "poutine.uncondition(model) draw what is to be simulated."
                    )
                found[leaf.index] = value
        return tuple(found[i] for i in range(len(found)))


class _PlateReached(Exception):
    """The model has reached the plate; the arguments of the plate are in `args`."""


def all_rows_in_plate(plate: str, rows: int) -> AbstractContextManager[None]:
    """Let a plate contain the rows that the model is called with, whatever its size argument is."""

    def held(size: int | None = None, *_: Any) -> Any:
        return (rows if size is None else size), rows, torch.arange(rows)

    return _plate_subsample(plate, held)


def _by_path(runner: Runner) -> dict[Any, Any]:
    """All that a model is called with, by the name of the argument and the place in it."""
    named = runner.arguments() or {"args": runner.args, "kwargs": runner.kwargs}
    return dict(tree_flatten_with_path(named)[0])


@contextmanager
def _plate_subsample(plate: str, held: Callable[..., Any]) -> Iterator[None]:
    """Replace the subsampling of a plate by a function of the plate's arguments."""
    theirs = SubsampleMessenger._subsample

    def own(name: str, *rest: Any) -> Any:
        return held(*rest) if name == plate else theirs(name, *rest)

    SubsampleMessenger._subsample = staticmethod(own)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(theirs)
