"""Run a Pyro model on some of its rows, with latents for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from flowvi.target.bijections import bijection_of
from flowvi.target.facts import ModelError
from flowvi.target.handlers import Owned, Unseen, quiet
from flowvi.target.layout import Layout
from flowvi.target.local_rows import Arguments, sizes
from flowvi.target.runner import Runner

TOGETHER = 3


class Unscaled(Messenger):
    """Undo the scale N / B of one plate."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                msg["scale"] = msg["scale"] * frame.size / frame.full_size


class FromRows(Messenger):
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
        u = u.movedim(0, axis)
        value = transform(u)
        ladj = transform.log_abs_det_jacobian(u, value).movedim(axis, 0)
        self.ladj = self.ladj + ladj.reshape(len(self.z), -1).sum(-1)
        msg["value"], msg["done"] = value, True


class Rows:
    """Runs a model on some of its rows."""

    def __init__(self, runner: Runner, arguments: Arguments, plate: str) -> None:
        self.runner, self.arguments, self.plate = runner, arguments, plate

    @classmethod
    def of(cls, runner: Runner, name: str, plate: str) -> Rows:
        """Find out which arguments have a row for each of the plate's."""
        seen: set[str] = set()
        failed: Exception | None = None
        for size in sizes(runner.args, runner.kwargs):
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

    def on(self, data: Sequence[Tensor]) -> Runner:
        """The model on some rows."""
        args, kwargs = self.arguments.call(data)
        return replace(self.runner, args=args, kwargs=kwargs, drawn={})

    def prior(
        self, data: Sequence[Tensor], validate: bool
    ) -> tuple[poutine.Trace, dict[str, Tensor]]:
        """One run from the prior on some rows."""
        with whole(self.plate, len(data[0]) if data else 1):
            return self.on(data).prior(validate)

    def trace(
        self,
        handler: Callable[[Any], Any],
        data: Sequence[Tensor],
        own: Sequence[Tensor],
        enumerate_from: int | None = None,
    ) -> poutine.Trace:
        """One scored run on latent values that handlers serve, without the plate's scale."""
        runner = self.on(data)
        runner.model = Unscaled(self.plate)(runner.model)
        with whole(self.plate, len(data[0]) if data else 1):
            trace, _ = runner.trace(handler, own, enumerate_from)
        return trace

    def simulate(self, values: Mapping[str, Tensor], data: Sequence[Tensor]) -> poutine.Trace:
        """One run in which the data are drawn, and all latents that are not given."""
        runner = self.on(data)
        free = Owned(runner.parameters)(poutine.condition(Unseen()(runner.model), values))
        with quiet(), whole(self.plate, len(data[0]) if data else 1):
            return poutine.trace(free).get_trace(*runner.args, **runner.kwargs)


@contextmanager
def whole(plate: str, rows: int) -> Iterator[None]:
    """Let a plate hold the rows that the model is called with, whatever size it names."""
    theirs = SubsampleMessenger._subsample

    def own(name: str, size: int | None = None, *rest: Any) -> Any:
        if name != plate:
            return theirs(name, size, *rest)
        return (rows if size is None else size), rows, torch.arange(rows)

    SubsampleMessenger._subsample = staticmethod(own)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(theirs)
