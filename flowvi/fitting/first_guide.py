"""The first guide of a restart: the requested one, or a flow chosen by the Gaussian's gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowvi.fitting.candidate import Candidate
from flowvi.fitting.enough import needs_no_flow
from flowvi.fitting.restart import Restart
from flowvi.guides.guide import FULL_RANK_DIM, Guide
from flowvi.guides.registry import make_guide
from flowvi.guides.skewed import HELD_DIM
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.clock import Interrupted
from flowvi.runtime.tensors import cpu_state_dict, load_tensors

AUTO = "auto"
# Numbers of couplings for a gap above a nat, and for a smaller one.
WIDE_GAP, MANY_COUPLINGS, FEW_COUPLINGS = 1.0, 12, 8
# Largest D for which a nested fit has a full-rank guide of the shared latents by default.
NESTED_DIM = 500


def first_guide(restart: Restart) -> Candidate:
    """Build the first guide of a restart, initialised at its start."""
    target, guide = restart.target, restart.given
    if guide is not None:
        return restart.session.checkpointer.run_once(
            "guide",
            restart.record,
            lambda: restart.started(_own(guide)) if restart.fresh else _placed(restart, guide),
            lambda candidate: cpu_state_dict(candidate.guide),
            lambda tensors: _given(restart, guide, tensors),
        )
    if restart.name != AUTO:
        return restart.started(Candidate(make_guide(restart.name, target.dim), restart.name))
    if isinstance(target, NestedTarget):
        name = "fullrank" if target.dim <= NESTED_DIM else "meanfield"
        return restart.started(Candidate(make_guide(name, target.dim), name))
    return _by_the_gap(restart)


def flow(restart: Restart, sizes: dict[str, Any], name: str = "realnvp") -> Candidate:
    """Build a fresh flow on top of the best Gaussian."""
    guide = make_guide(name, restart.target.dim, **sizes)
    words = ", ".join(f"{key} {value}" for key, value in sizes.items())
    title = f"{name} ({words})" if words else name
    restart.record.log.append(f"guide: {title} on top of the Gaussian")
    return restart.started(Candidate(guide, name, sizes))


def _by_the_gap(restart: Restart) -> Candidate:
    """Return the Gaussian if its gap is small; else couplings, or couplings with skews."""
    target, settings, schedule = restart.target, restart.settings, restart.schedule
    name = "fullrank" if target.dim <= FULL_RANK_DIM else "lowrank"
    gaussian = restart.started(Candidate(make_guide(name, target.dim), name))
    found = restart.evaluate(gaussian.guide)
    gap = found.gap
    restart.record.log.append(f"the Gaussian leaves KL(q || p) of about {gap:.2g}")
    # Parameters of the model are trained together with one guide only.
    own = bool(list(target.parameters()))
    if restart.session.clock.interrupted or (own and gap < schedule.nothing_left):
        return gaussian
    if not own and needs_no_flow(schedule, found, lambda: restart.diagnosed(gaussian)):
        return gaussian
    if target.dim > HELD_DIM:
        return flow(restart, {}, "skewed")
    plain = flow(restart, {"depth": MANY_COUPLINGS if gap > WIDE_GAP else FEW_COUPLINGS})
    asked = settings.steps is not None or settings.lr is not None
    much = gap > schedule.much and restart.searches(gap)
    alike = not target.subsampled and not own
    return _raced(restart, plain) if much and alike and not asked else plain


def _raced(restart: Restart, plain: Candidate) -> Candidate:
    """Train couplings, and couplings with skews, for the same steps; keep the better guide."""
    schedule = restart.schedule
    racers = (plain, flow(restart, plain.sizes, "skewed"))
    try:
        stages = [restart.stages(candidate.guide) for candidate in racers]
        found = [restart.tried(one) for one in stages]
        if found[1].bound > found[0].bound + schedule.ahead:
            pairs = zip(stages, found, strict=True)
            found = [restart.tried(one, trial.lr) for one, trial in pairs]
    except Interrupted:
        return plain
    best = found[1].bound > found[0].bound + schedule.further
    candidate, trial = racers[best], found[best]
    candidate.lr = trial.lr
    restart.record.log.append(f"the guide is {candidate.name}, by these trials")
    return candidate


def _given(restart: Restart, guide: Guide, tensors: Mapping[str, Tensor]) -> Candidate:
    """Return the user's guide with its initial values."""
    load_tensors(restart.placed(guide), tensors, "The checkpoint")
    return _own(guide)


def _placed(restart: Restart, guide: Guide) -> Candidate:
    """Return a guide that keeps its present parameters."""
    return _own(restart.placed(guide))


def _own(guide: Guide) -> Candidate:
    """Return the user's guide, with the sizes that rebuild it if they are known."""
    if guide.spec is not None:
        return Candidate(guide, guide.kind, guide.spec)
    return Candidate(guide, type(guide).__name__)
