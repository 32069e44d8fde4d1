"""Convert a fit of row latents to a Pyro guide."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Size, Tensor

from flowvi.guides.amortized import RowGuide
from flowvi.guides.guide import Guide
from flowvi.interop.pyro_distribution import (
    GuideDistribution,
    check_store,
    own_name,
    sample_site,
    serve,
)
from flowvi.targets import Batch, LocalTarget, ModelError
from flowvi.targets.local.rows import Call


class RowPyroGuide(PyroModule):
    """A guide for the rows of a plate as a Pyro guide for the model of a target.

    It opens the model's plate in the same way as the model: with all rows, with a subsample that
    the model reuses, or with a batch from the arguments.

    Args:
        target: From `from_pyro` with `local=`.
        guide: A guide for its rows; it is trained in place.

    Raises:
        ModelError: The target is a plain density, the model has shared and row latents, the guide
            is none for rows, or Pyro's store holds other values of the model's parameters.
    """

    density: RowGuide

    def __init__(self, target: LocalTarget, guide: Guide) -> None:
        _check(target)
        check_store(target)
        super().__init__(own_name())
        self._target = (target,)  # the model's parameters are not this module's
        self._frames = {
            frame.name: frame
            for message in target.messages.values()
            for frame in message["cond_indep_stack"]
            if frame.vectorized
        }
        self._dim: int = self._frames[target.plate].dim
        self.density = _of_rows(guide)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latent sites of the rows in the model's arguments.

        Raises:
            ModelError: The rows are not in the arguments that held them at capture, or are neither
                all rows nor those of the plate.
            ValueError: The rows have another shape than the model's, or the guide has parameters
                for each row and the plate does not identify the rows.
        """
        (target,) = self._target
        serve(target)
        with poutine.block():  # only the model's plate is needed
            call = target.called(args, kwargs)
        given = target.as_batch(call.data)
        plates = {
            name: pyro.plate(name, frame.full_size, frame.size, dim=frame.dim)
            for name, frame in self._frames.items()
            if name != target.plate
        }
        plates[target.plate] = pyro.plate(
            target.plate, call.size, call.subsample_size, call.subsample, dim=self._dim
        )
        with plates[target.plate] as index:
            rows, context = self._read(call, given, index)
            posterior = GuideDistribution(self.density.guide, context)
            name, infer = f"_{self._pyro_name}_latent", {"is_auxiliary": True}
            z = pyro.sample(name, posterior, infer=infer)
        lead = z.shape[:-1]
        outer = len(lead) + self._dim
        with poutine.block():  # the target may run the model
            values, ladjs = target.latents(z.reshape(*lead[: outer + 1], -1), rows)
        out = {}
        for name, message in target.messages.items():
            batch = list(message["value"].shape[: message["value"].dim() - message["fn"].event_dim])
            axis = len(batch) + self._dim
            batch[axis] = len(rows.places)
            # The target puts the axis of the rows first.
            value, ladj = (t.movedim(outer, outer + axis) for t in (values[name], ladjs[name]))
            out[name] = sample_site(message, value, ladj, lead, Size(batch), plates)
        return out

    def _read(self, call: Call, rows: Batch, index: Tensor | None) -> tuple[Batch, Tensor]:
        """Return the rows of the plate, and the guide's context for them, (B, 1, ..., 1, C)."""
        (target,) = self._target
        known = False
        if index is not None:
            index = torch.as_tensor(index, device=target.device)
            came = len(rows.places)
            if came not in (call.size, len(index)):
                raise ModelError(
                    f"Plate '{target.plate}' holds {len(index)} of {call.size} rows; the arguments "
                    f"have {came}, which is neither."
                )
            # A model that is called with a batch ignores the subsample indices of its plate.
            known = call.size == target.rows and (came == call.size or call.subsample is not None)
            data = tuple(t[index] for t in rows.data) if came == call.size else rows.data
            rows = Batch(index, data)
        context = self.density.context(rows if known else rows.data)
        return rows, context.reshape(len(context), *(1,) * (-1 - self._dim), -1)


def _check(target: LocalTarget) -> None:
    """Raise a ModelError if a guide of rows cannot sample all latents of the target."""
    if not target.messages:
        raise ModelError(
            f"{target.name} is a plain density and has no Pyro sites: use fit.draw, or "
            "GuideDistribution(fit.guide.guide, fit.guide.context(rows)) with target.constrain."
        )
    if target.shared is not None:
        raise ModelError(
            f"{target.name} has latents that all rows share ({', '.join(target.shared.sites)}), "
            "which a guide of rows does not sample. Leave local= out for a guide of all latents, "
            "or use GuideDistribution in a guide of your own: docs/pyro.md shows one."
        )


def _of_rows(guide: Guide) -> RowGuide:
    if not isinstance(guide, RowGuide):
        raise ModelError(
            "A guide of rows in Pyro is a density with a context for each row, Amortised or "
            f"PerRow; got a {type(guide).__name__}."
        )
    return guide
