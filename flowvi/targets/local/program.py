"""The terms of many rows, as one recorded list of operations on all of them at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from flowvi.targets.recording.batched import silence_vmap_fallback
from flowvi.targets.recording.capture import agree
from flowvi.targets.recording.tape import record

PROGRAMS_KEPT = 12


class RowPrograms:
    """Evaluate rows by a recorded run of the model on all of them, one record per number of rows.

    The record is made at the second evaluation with a number of rows, and compared with rows
    evaluated one by one. If they differ, no further record is made of the model.

    Args:
        function: Of z (R, D), theta (G) if there is one, parameters, and the data of R rows:
            the terms (R, 2).
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.works = True
        self.programs: OrderedDict[int, Callable[..., Any] | None] = OrderedDict()

    def __call__(
        self,
        rows_of_one: Callable[[], Tensor],
        z: Tensor,
        theta: Sequence[Tensor],
        own: Sequence[Tensor],
        rows: Sequence[Tensor],
    ) -> Tensor:
        """The terms, (S, T, B, 2).

        Args:
            rows_of_one: The same, evaluated row by row.
            z: (S, T, B, D).
            theta: Nothing, or one tensor (T, G).
            own: Parameters, the same for all.
            rows: Data, each (B, *shape).
        """
        samples, thetas, count, _ = z.shape
        if not self.works or z.numel() == 0 or is_functorch_wrapped_tensor(z):
            return rows_of_one()
        number = samples * count
        if number not in self.programs:
            # Recording is worthwhile from the second use on.
            self.programs[number] = None
            while len(self.programs) > PROGRAMS_KEPT:
                self.programs.popitem(last=False)
            return rows_of_one()
        self.programs.move_to_end(number)
        flat = z.transpose(0, 1).reshape(thetas, number, -1)
        data = [t if samples == 1 else t.repeat(samples, *[1] * (t.dim() - 1)) for t in rows]
        fresh = self.programs[number] is None
        if fresh:
            self.programs[number] = self._recorded(flat, theta, own, data)
        program = self.programs[number]
        if program is None:
            return rows_of_one()
        if theta and thetas > 1:
            dims = (0, 0, *[None] * (len(own) + len(data)))
            with silence_vmap_fallback():
                out = torch.func.vmap(program, dims)(flat, *theta, *own, *data)
        else:
            out = program(flat[0], *[t[0] for t in theta], *own, *data)
        terms: Tensor = out.reshape(thetas, samples, count, 2).transpose(0, 1)
        if fresh:
            expected = rows_of_one()
            self.works = agree((terms.detach(),), (expected.detach(),))
            return terms if self.works else expected
        return terms

    def clear(self) -> None:
        """Drop all records, such as after a change of device."""
        self.programs.clear()

    def begin(self, seen: Sequence[int] = ()) -> None:
        """Record anew, as after evaluations of these numbers of rows."""
        self.programs = OrderedDict((int(number), None) for number in seen)

    def _recorded(
        self,
        flat: Tensor,
        theta: Sequence[Tensor],
        own: Sequence[Tensor],
        data: Sequence[Tensor],
    ) -> Callable[..., Any] | None:
        inputs = [flat[0], *(t[0] for t in theta), *own, *data]
        try:
            with torch.no_grad():
                return record(self.function, inputs)
        except Exception:  # one row at a time is known to work
            self.works = False
            return None
