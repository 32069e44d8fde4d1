"""The first guide of a restart: the requested one, or a flow chosen by the Gaussian's gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowvi.fitting.candidate import Candidate
from flowvi.fitting.enough import needs_no_flow
from flowvi.fitting.restart import Restart
from flowvi.fitting.reweighted import pilot
from flowvi.guides.guide import FULL_RANK_DIM, Guide
from flowvi.guides.registry import make_guide
from flowvi.guides.skewed import HELD_DIM
from flowvi.guides.structured import NoLatents
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.clock import Interrupted
from flowvi.runtime.tensors import cpu_state_dict, load_tensors
from flowvi.targets.structure import MarginalTarget

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
            lambda: (
                restart.initialised(_as_candidate(guide))
                if restart.fresh
                else _unchanged_guide(restart, guide)
            ),
            lambda candidate: cpu_state_dict(candidate.guide),
            lambda tensors: _initialised_guide(restart, guide, tensors),
        )
    if restart.name != AUTO:
        return restart.initialised(Candidate(make_guide(restart.name, target.dim), restart.name))
    if isinstance(target, NestedTarget):
        name = "fullrank" if target.dim <= NESTED_DIM else "meanfield"
        return restart.initialised(Candidate(make_guide(name, target.dim), name))
    if isinstance(target, MarginalTarget):
        if not target.dim:
            return Candidate(restart.to_target(NoLatents()), NoLatents.kind)
        name = "fullrank" if target.dim <= FULL_RANK_DIM else "lowrank"
        return pilot(restart, restart.initialised(Candidate(make_guide(name, target.dim), name)))
    return _choose_by_gap(restart)


def flow(restart: Restart, sizes: dict[str, Any], name: str = "realnvp") -> Candidate:
    """Build a fresh flow on top of the best Gaussian."""
    guide = make_guide(name, restart.target.dim, **sizes)
    words = ", ".join(f"{key} {value}" for key, value in sizes.items())
    title = f"{name} ({words})" if words else name
    restart.record.log.append(f"guide: {title} on top of the Gaussian")
    return restart.initialised(Candidate(guide, name, sizes))


def _choose_by_gap(restart: Restart) -> Candidate:
    """Return the Gaussian if its gap is small; else couplings, or couplings with skews."""
    target, settings, schedule = restart.target, restart.settings, restart.schedule
    name = "fullrank" if target.dim <= FULL_RANK_DIM else "lowrank"
    gaussian = restart.initialised(Candidate(make_guide(name, target.dim), name))
    gaussian.evaluation = found = restart.evaluate(gaussian.guide)
    gap = found.gap
    restart.record.log.append(f"Gaussian: KL(q || p) about {gap:.2g}")
    # Parameters of the model are trained together with one guide only.
    own = bool(list(target.parameters()))
    if (
        restart.session.clock.interrupted
        or restart.suffices(gaussian)
        or (own and gap < schedule.nothing_left)
    ):
        return gaussian
    if not own and needs_no_flow(schedule, found, lambda: restart.trusts(gaussian)):
        return gaussian
    if target.dim > HELD_DIM:
        return flow(restart, {}, "skewed")
    plain = flow(restart, {"depth": MANY_COUPLINGS if gap > WIDE_GAP else FEW_COUPLINGS})
    asked = settings.steps is not None or settings.lr is not None
    much = gap > schedule.much and restart.should_search_rate(gap)
    alike = not target.subsampled and not own
    return _compare_with_skews(restart, plain) if much and alike and not asked else plain


def _compare_with_skews(restart: Restart, plain: Candidate) -> Candidate:
    """Train couplings, and couplings with skews, for the same steps; keep the better guide."""
    schedule = restart.schedule
    racers = (plain, flow(restart, plain.sizes, "skewed"))
    try:
        stages = [restart.stages(candidate.guide) for candidate in racers]
        found = [restart.try_rates(one) for one in stages]
        if found[1].bound > found[0].bound + schedule.ahead:
            pairs = zip(stages, found, strict=True)
            found = [restart.try_rates(one, trial.lr) for one, trial in pairs]
    except Interrupted:
        return plain
    best = found[1].bound > found[0].bound + schedule.further
    candidate, trial = racers[best], found[best]
    candidate.lr = trial.lr
    restart.record.log.append(f"guide: {candidate.name}, the better of these trials")
    return candidate


def _initialised_guide(restart: Restart, guide: Guide, tensors: Mapping[str, Tensor]) -> Candidate:
    """Return the user's guide with its initial values."""
    load_tensors(restart.to_target(guide), tensors, "The checkpoint")
    return _as_candidate(guide)


def _unchanged_guide(restart: Restart, guide: Guide) -> Candidate:
    """Return a guide that keeps its present parameters."""
    return _as_candidate(restart.to_target(guide))


def _as_candidate(guide: Guide) -> Candidate:
    """Return the user's guide, with the sizes that rebuild it if they are known."""
    if guide.spec is not None:
        return Candidate(guide, guide.kind, guide.spec)
    return Candidate(guide, type(guide).__name__)
