"""The sites of a model with a plate of rows: those of one row, and those that all rows share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.local.runner import RowRunner
from flowvi.targets.pyro import checks, data_checks
from flowvi.targets.pyro.bijections import bijection_of
from flowvi.targets.pyro.handlers import is_reparametrised
from flowvi.targets.pyro.layout import Layout, layout_of
from flowvi.targets.schema import ModelError, Site

RUNS = 3
# Rows among which latents without a prior are looked for.
ROWS = 1000


class RowSites:
    """What a few runs of a model on one row tell about its sites.

    Args:
        rows: Runs the model on rows.
        name: Name of the model.
        plate: Name of the plate.

    Attributes:
        traces: Runs from the prior on the first row.
        data: Observed values of the first row, by site.
        local: Layout of the latent vector of one row.
        common: Layout of the latents that all rows share; None if there are none.
        axes: The axis of the plate in the value of each site that lies in it.

    Raises:
        ModelError: The plate has no latent site, or the model does not run on one row.
    """

    def __init__(self, rows: RowRunner, name: str, plate: str) -> None:
        self.plate = plate
        self.first_row = rows.arguments.batch([0]).data
        runs = _runs_on_one_row(rows, name, plate)
        self.traces = [trace for trace, _ in runs]
        self.first, self.data = runs[0]
        checks.check_same_structure(self.traces)
        latents = checks.latent_sites(self.first, name)
        local = {n: s for n, s in latents.items() if self.is_local(s)}
        if not local:
            raise ModelError(
                f"local='{plate}': {name} has no latent site in that plate; its latents are "
                f"{', '.join(latents)}. Leave local out."
            )
        self.local = layout_of(self.first, local)
        common = {n: s for n, s in latents.items() if n not in local}
        self.common: Layout | None = layout_of(self.first, common) if common else None
        valued = [site for site in checks.sites_with_value(self.first) if self.is_local(site)]
        self.axes = {site["name"]: self._axis(site) for site in valued}
        data_checks.check_observations(self.first, self.data)
        data_checks.check_scores(self.first)
        self._check_masks(rows)

    def is_local(self, site: Mapping[str, Any]) -> bool:
        """Whether a site lies in the plate."""
        return any(f.name == self.plate for f in site.get("cond_indep_stack", ()))

    def is_prior(self, site: Mapping[str, Any]) -> bool:
        """Whether a density is a latent's, or was left with the site that it was made from."""
        return site["name"] in self.local.sites or is_reparametrised(site)

    @property
    def deterministics(self) -> tuple[str, ...]:
        """Derived values of a row."""
        return tuple(n for n in self.local.deterministics if n in self.axes)

    @property
    def common_deterministics(self) -> tuple[str, ...]:
        """Derived values outside the plate."""
        return tuple(n for n in self.local.deterministics if n not in self.axes)

    @property
    def dim(self) -> int:
        """Length D of the latent vector of a row."""
        return max(s.stop for s in self.local.slices.values())

    def row_site(self, name: str) -> Site:
        """Shape, support and names of axes of one row's value."""
        site, axis = self.local.sites[name], self.axes[name]
        shape = (*site.shape[:axis], *site.shape[axis + 1 :])
        return Site(shape, site.support, self.row_dims(name))

    def row_dims(self, name: str) -> tuple[str, ...]:
        """Names of the axes of one row's value."""
        value = self.first.nodes[name]["value"]
        dims = self.local.dims.get(name) or tuple(f"{name}_dim_{i}" for i in range(value.dim()))
        axis = self.axes[name]
        return (*dims[:axis], *dims[axis + 1 :])

    def zero(self) -> Tensor:
        """A latent vector of a row whose coordinates are all zero, (D)."""
        return torch.zeros_like(unconstrained(self.first, self.local))

    def _axis(self, site: Mapping[str, Any]) -> int:
        """The axis of the plate in a site's value, from the left."""
        frame = next(f for f in site["cond_indep_stack"] if f.name == self.plate)
        value = torch.as_tensor(site["value"])
        if frame.dim is None:
            raise ModelError(
                f"Plate '{self.plate}' is looped over; write `with pyro.plate(...)` instead."
            )
        axis = value.dim() - site["fn"].event_dim + frame.dim
        if axis < 0 and value.dim() and site["infer"].get("_deterministic"):
            axis = 0  # every axis of a pyro.deterministic belongs to its event, unless told
        if axis < 0 or (value.dim() and value.shape[axis] != 1):
            raise ModelError(
                f"Site '{site['name']}' has no axis for plate '{self.plate}': its value has shape "
                f"{tuple(value.shape)} for one row. Give it one entry a row."
            )
        return axis

    def _check_masks(self, rows: RowRunner) -> None:
        """Refuse a local latent whose prior is masked out in a row of the data."""
        some = rows.arguments.batch(range(min(rows.arguments.size, ROWS)))
        with isolated_rng(0):
            masked = checks.masked_latents(rows.prior(some.data, validate=False)[0])
        for site in self.local.sites:
            if site in masked:
                raise ModelError(masked[site])


def unconstrained(trace: poutine.Trace, layout: Layout) -> Tensor:
    """The latent vector of a run."""
    sites = [trace.nodes[name] for name in layout.latents]
    return torch.cat([bijection_of(s["fn"]).inv(s["value"]).reshape(-1) for s in sites])


def _runs_on_one_row(
    rows: RowRunner, name: str, plate: str
) -> list[tuple[poutine.Trace, dict[str, Tensor]]]:
    first_row = rows.arguments.batch([0]).data
    try:
        with pyro.get_param_store().scope():
            return [rows.prior(first_row, validate=i == 0) for i in range(RUNS)]
    except ModelError:
        raise
    except (ValueError, RuntimeError) as error:
        why = str(error).split("\n")[0]
        raise ModelError(
            f"{name} runs on several rows of plate '{plate}' and fails on one: {why} Rows have "
            "to stand for themselves; put modules with batch norm into evaluation mode "
            "(.eval()), or use layer norm."
        ) from error
