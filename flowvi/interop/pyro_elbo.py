"""The importance-weighted bound for Pyro's SVI, valid for subsampled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.util import warn_if_nan
from torch import Tensor

from flowvi.runtime.arguments import check_choice, check_integer
from flowvi.targets import ModelError

PARTICLES = "num_particles_vectorized"  # Pyro's plate of vectorised particles

Sites = list[dict[str, Any]]


class TracePair(NamedTuple):
    """One run of guide and model, or K runs at once.

    Attributes:
        model: Sites of the model, with log densities.
        guide: Sites of the guide, with log densities.
        drawn: Random sites as the guide drew them, if those of `guide` are detached from
            their inputs.
    """

    model: Sites
    guide: Sites
    drawn: dict[str, Tensor]


class IWELBO(ELBO):
    r"""The importance-weighted bound of K particles, as a loss of `pyro.infer.SVI`.

    Where all sites lie in common plates, each cell n of the plates has weights of its own,

    .. math::
        L = c \sum_n \log \frac{1}{K} \sum_{k=1}^K w_{nk}, \qquad
        w_{nk} = \frac{p(x_n, z_{nk})}{q(z_{nk})}, \quad z_{nk} \sim q,

    with :math:`c = N / B` if B of N rows are subsampled: an unbiased estimate of a lower
    bound on the log evidence. Otherwise one weight covers all sites, and subsampling is
    rejected. Pyro's `RenyiELBO` multiplies log weights by N / B inside, which gives no bound.

    Args:
        num_particles: Number of particles K.
        gradient: ``"dreg"`` drops the score of q and reweights the path gradient; ``"total"``
            differentiates the bound as written. Both have the same expectation.
        vectorize_particles: Whether to draw all particles at once, by an outer plate.
        max_plate_nesting: Depth of the nested plates; by default a run finds it.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv:1509.00519.
        Tucker et al. (2019), arXiv:1810.04152: ``"dreg"``.
    """

    def __init__(
        self,
        num_particles: int = 16,
        gradient: Literal["dreg", "total"] = "dreg",
        *,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
    ) -> None:
        num_particles = check_integer("num_particles", num_particles)
        check_choice("gradient", gradient, ("dreg", "total"))
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        self.gradient = gradient

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Minus the bound."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Minus the bound; adds its gradient to the gradients of all parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound, with the chosen gradient estimator."""
        rows = _SameRows()
        runs = list(self._get_traces(rows(model), rows(guide), args, kwargs))
        plates = common_plates(runs[0])
        if self.num_particles > 1:
            _check_rows(runs[0], plates, self.num_particles)
        cells = _Cells(runs, plates, self.vectorize_particles and self.num_particles > 1)
        log_p = cells.sum([run.model for run in runs])
        log_w = log_p - cells.sum([run.guide for run in runs])
        bound = (torch.logsumexp(log_w, 0) - math.log(self.num_particles)).sum()
        if self.gradient == "dreg" and torch.is_grad_enabled():
            path = self._surrogate(runs, cells, log_p, log_w)
            bound = bound.detach() + path - path.detach()
        loss: Tensor = -cells.scale * bound
        warn_if_nan(loss, "loss")
        return loss

    def _surrogate(
        self, runs: Sequence[TracePair], cells: _Cells, log_p: Tensor, log_w: Tensor
    ) -> Tensor:
        """A scalar whose gradient is that of the bound, in expectation.

        Direct dependence on parameters has weight v = softmax(log w), the path through the
        draws has weight v^2; log q contributes through the draws alone.
        """
        v = torch.softmax(log_w.detach(), 0)
        # A site without randomness has no score to drop.
        fixed = cells.sum([[s for s in run.guide if s["name"] not in run.drawn] for run in runs])
        surrogate = (v * (log_p - fixed)).sum()
        draws = [
            (k, s, run.drawn[s["name"]])
            for k, run in enumerate(runs)
            for s in run.guide
            if s["name"] in run.drawn
        ]
        leaves = [site["value"] for _, site, _ in draws]
        if not (leaves and log_w.requires_grad):
            return surrogate
        slopes = torch.autograd.grad(log_w.sum(), leaves, retain_graph=True, allow_unused=True)
        for (k, site, z), slope in zip(draws, slopes, strict=True):
            if slope is not None:
                surrogate = surrogate + (cells.spread(v, k, site) ** 2 * slope * z).sum()
        return surrogate

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> TracePair:
        drawn: dict[str, Tensor] = {}
        if torch.is_grad_enabled():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
            scored = {site["name"]: site for site in _scored(trace)}
            random = {name: site for name, site in scored.items() if not _is_delta(site["fn"])}
            for name, site in random.items():
                if not site["fn"].has_rsample:
                    raise ModelError(
                        f"Site '{name}' has draws without a gradient ({type(site['fn']).__name__})"
                        "; IWELBO needs a guide whose draws have one. Sum discrete sites out, or "
                        "use Trace_ELBO."
                    )
            if self.gradient == "dreg":
                drawn = {name: site["value"] for name, site in random.items()}
            for name, site in list(trace.nodes.items()):
                if name in drawn:
                    site["value"] = site["value"].detach().requires_grad_()
                elif name in scored and name not in random:
                    trace.remove_node(name)  # recomputed from the detached draws
            guide = poutine.replay(guide, trace=trace)
        traces = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        run = TracePair(list(_scored(traces[0])), list(_scored(traces[1])), drawn)
        names = {site["name"] for site in run.guide}
        for site in run.model:
            if not site["is_observed"] and site["name"] not in names:
                raise ModelError(
                    f"Site '{site['name']}' of the model is neither observed nor in the guide."
                )
        return run


class _SameRows(Messenger):
    """Give all particles the rows that the first one drew, because a weight is of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.rows:
            msg["value"], msg["done"] = self.rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.rows[msg["name"]] = msg["value"]


class _Cells:
    """Cells of plates, each with K weights.

    Args:
        runs: One run for each particle, or one run of all.
        plates: Plates that all sites lie in.
        together: Whether one run holds all particles.
    """

    def __init__(self, runs: Sequence[TracePair], plates: Sequence[Any], together: bool) -> None:
        frames = [f for s in (*runs[0].model, *runs[0].guide) for f in _frames(s)]
        self.together = together
        self.depth = max((-f.dim for f in frames), default=0) + together
        self.kept = {f.dim for f in plates} | ({-self.depth} if together else set())
        self.scale = math.prod((f.full_size or f.size) / f.size for f in plates)

    def sum(self, runs: Iterable[Sites]) -> Tensor:
        """Add the log densities of each run's sites up, by cell. (K, *cells)."""
        sums = [self._sum(sites) for sites in runs]
        return sums[0] if self.together else torch.stack(sums)

    def spread(self, v: Tensor, k: int, site: dict[str, Any]) -> Tensor:
        """Weights (K, *cells) of the k-th run, shaped to broadcast with its draws at a site."""
        z = site["value"]
        own = v if self.together else v[k]
        batch = z.dim() - site["fn"].event_dim
        return own.reshape((*own.shape[own.dim() - batch :], *(1,) * site["fn"].event_dim))

    def _sum(self, sites: Sites) -> Tensor:
        total = torch.zeros((1,) * self.depth)
        for site in sites:
            log_prob = torch.as_tensor(site["log_prob"]) / self.scale
            others = [d for d in range(-log_prob.dim(), 0) if d not in self.kept]
            total = total + (log_prob.sum(others, keepdim=True) if others else log_prob)
        return total


def common_plates(run: TracePair) -> list[Any]:
    """The plates in which all sites lie: their cells are independent."""
    stacks = [{f.name: f for f in _frames(site)} for site in (*run.model, *run.guide)]
    first = stacks[0] if stacks else {}
    return [f for name, f in first.items() if all(name in stack for stack in stacks)]


def _check_rows(run: TracePair, plates: Sequence[Any], particles: int) -> None:
    """Raise a ModelError for subsampled plates if a weight needs all of their rows."""
    common = {f.name for f in plates}
    for site in (*run.model, *run.guide):
        for frame in site["cond_indep_stack"]:
            if frame.name not in common and (frame.full_size or frame.size) != frame.size:
                outside = next(
                    s["name"]
                    for s in (*run.model, *run.guide)
                    if frame.name not in {f.name for f in s["cond_indep_stack"]}
                )
                raise ModelError(
                    f"IWELBO({particles}) needs every row of plate '{frame.name}' in each weight, "
                    f"because site '{outside}' lies outside of it, but the plate is subsampled: "
                    "it would not be a bound. Use the full plate, or Trace_ELBO."
                )


def _scored(trace: poutine.Trace) -> Iterator[dict[str, Any]]:
    """Sites that contribute to the density: no subsample sites, no deterministics."""
    for site in trace.nodes.values():
        if (
            site["type"] == "sample"
            and not isinstance(site["fn"], _Subsample)
            and not site["infer"].get("_deterministic")
        ):
            yield site


def _frames(site: dict[str, Any]) -> list[Any]:
    return [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]


def _is_delta(fn: Any) -> bool:
    while not isinstance(fn, dist.Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)
