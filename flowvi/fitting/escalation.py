"""Attempts of a restart to improve a result that is not trusted, in order of cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from flowvi.diagnostics import VERDICTS
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws
from flowvi.draws.sampling import draw
from flowvi.draws.storage import from_state, to_state
from flowvi.fitting.candidate import Candidate
from flowvi.fitting.first_guide import flow
from flowvi.fitting.opinion import consult
from flowvi.fitting.restart import Restart
from flowvi.fitting.reweighted import likeliest, moments
from flowvi.flows import Chain
from flowvi.guides.guide import Guide
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.pushforward import FlowGuide, Pushforward
from flowvi.guides.registry import make_guide
from flowvi.guides.skewed import SkewedNormal
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.runtime.progress import phase
from flowvi.runtime.tensors import cpu_state_dict, load_tensors
from flowvi.samplers.nuts import NutsSettings, run_nuts
from flowvi.samplers.tempering import MOST_DIM
from flowvi.targets.structure import MarginalTarget
from flowvi.training.fab import refine_fab
from flowvi.training.records import ANNEAL, CHAINS, CHECK

# Largest numbers of flows, and of normals, in a mixture; larger ones train too long.
MOST_COMPONENTS, MOST_NORMALS = 3, 12
# Couplings added to a flow, and factor of the number of draws of its training.
MORE_COUPLINGS = 8
MORE_DRAWS = 2
# Powers of the tempered densities, and steps at each power.
POWERS = (0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
COOLING_STEPS = 120
SPLINE_RATE = 1e-2
# Largest dimension for annealing, and its number of rounds.
ANNEALED_DIM = 200
ANNEALED_ROUNDS = 150
# Markov chains that would take longer are not run.
CHAIN_SECONDS = 900.0
# Difference in nats, or in k-hat, that decides between two guides.
CLEARLY = 0.1
THINNER = 0.05
# Factor of the effective draws that decides between two guides of shared latents.
MORE_EFFECTIVE = 1.3

Attempt = Callable[[Restart, Candidate], Candidate | None]


def escalate(restart: Restart) -> None:
    """Try one attempt after the other until the check passes or the budget is spent.

    Each result is checked on fresh draws, and dropped if it is not better.
    """
    tried: set[tuple[Attempt, Guide]] = set()
    for name, attempt in ATTEMPTS:
        hopeless = (
            restart.interrupted or restart.record.stopped or restart.session.clock.out_of_time(0.9)
        )
        if hopeless:
            return
        # The same attempt at the same guide has the same result.
        if _enough(restart, attempt) or (attempt, restart.candidate.guide) in tried:
            continue
        tried.add((attempt, restart.candidate.guide))
        phase(name)
        try:
            with abort_on_interrupt():
                new = attempt(restart, restart.candidate)
                if new is None:
                    continue
                restart.check(new)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                restart.session.clock.interrupt()
            restart.interrupted = True
            restart.record.log.append(f"{name}: interrupted")
            return
        except (ValueError, RuntimeError) as error:
            # The result of earlier attempts remains valid.
            restart.record.log.append(f"{name}: failed, {error}")
            continue
        taken = better(new, restart.candidate)
        taken = taken or (attempt in CHEAP and more_effective(new, restart.candidate))
        word = "kept" if taken else "dropped"
        restart.record.log.append(
            f"{name}: {summary(restart.candidate)} before, {summary(new)} after: {word}"
        )
        restart.candidate = new if taken else restart.candidate
    if trusted(restart.candidate):
        consult(restart, restart.candidate)


def _enough(restart: Restart, attempt: Attempt) -> bool:
    """Whether an attempt is not worth its time.

    Attempts that need no gradients are made until the plain draws are trusted. A guide is
    trusted if short chains do not drift away from its draws either.
    """

    def settled() -> bool:
        candidate = restart.candidate
        return candidate.trust_rank == 0 if attempt in CHEAP else trusted(candidate)

    if settled():
        consult(restart, restart.candidate)
    return settled()


def trusted(candidate: Candidate) -> bool:
    """Whether the verdict trusts plain or resampled draws of the guide."""
    return candidate.trust_rank < len(VERDICTS) - 1


def better(new: Candidate, old: Candidate) -> bool:
    """Whether a guide is better than another: by verdict, bound, then tail of the weights."""
    if new.trust_rank != old.trust_rank:
        return new.trust_rank < old.trust_rank
    if new.diagnosis is None or old.diagnosis is None:
        return new.bound > old.bound
    # A guide that covers more of the posterior has the larger mean weight, but not always
    # the larger bound.
    more = new.diagnosis.elbo + new.diagnosis.gap - old.diagnosis.elbo - old.diagnosis.gap
    if abs(more) > CLEARLY + 3 * math.hypot(new.diagnosis.gap_se, old.diagnosis.gap_se):
        return more > 0
    if abs(new.bound - old.bound) > CLEARLY:
        return new.bound > old.bound
    return new.diagnosis.khat < old.diagnosis.khat - THINNER


def more_effective(new: Candidate, old: Candidate) -> bool:
    """Whether the weights of a guide, trusted as little as another, have more effective draws.

    Weighted moments cover the density of the shared latents, which lowers the bound and evens the
    weights; these are what corrects the draws.
    """
    if new.trust_rank != old.trust_rank or new.diagnosis is None or old.diagnosis is None:
        return False
    return new.diagnosis.ess > MORE_EFFECTIVE * old.diagnosis.ess


def summary(candidate: Candidate) -> str:
    """Bound and k-hat, for the log."""
    khat = "" if candidate.diagnosis is None else f", k-hat {candidate.diagnosis.khat:.2f}"
    return f"bound {candidate.bound:.3f}{khat}"


def components(restart: Restart, candidate: Candidate) -> Candidate | None:
    """A mixture with one component for each missed mode."""
    if not 0 < len(candidate.missed) < MOST_NORMALS:
        return None
    starts = [restart.best, *candidate.missed]
    sizes: dict[str, Any] = {"components": len(starts)}
    if len(starts) > MOST_COMPONENTS:
        sizes["component"] = "fullrank"
    new = Candidate(
        restart.to_target(make_guide("mixture", restart.target.dim, **sizes)), "mixture", sizes
    )
    cast(MixtureGuide, new.guide).start_components([(g.loc, g.scale_tril) for g in starts])
    restart.train(new, 0.7, "mixture")
    return new


def tempered(restart: Restart, candidate: Candidate) -> Candidate | None:
    """Splines of each coordinate, trained from a flat density to the target."""
    if not candidate.reasons or restart.target.dim > MOST_DIM:
        return None
    if isinstance(restart.target, MarginalTarget):
        return None
    wide = restart.tempered_normal()
    new = Candidate(
        restart.to_target(make_guide("marginals", restart.target.dim)), "marginals", lr=SPLINE_RATE
    )
    new.guide.start(wide.loc, wide.scale_tril)
    couplings = cast(Chain, cast(FlowGuide, new.guide).flow).layers[0].parameters()
    # Trainable couplings would pull all draws into few modes.
    held = [p.requires_grad_(False) for p in couplings]
    stages, repeats = restart.stages(new.guide), restart.settings.repeats
    restart.session.checkpointer.run_once(
        "tempered",
        restart.record,
        lambda: stages.cool(POWERS, COOLING_STEPS, repeats, SPLINE_RATE),
        lambda _: stages.vector(),
        lambda vector: stages.set(vector.to(restart.target.device)),
    )
    restart.train(new, 0.6, "splines")
    for p in held:
        p.requires_grad_(True)
    new.lr = (candidate.lr or SPLINE_RATE) / 3
    restart.train(new, 0.8, "couplings")
    return new


def richer(restart: Restart, candidate: Candidate) -> Candidate | None:
    """A deeper flow with heavier tails, trained further with more draws."""
    if isinstance(candidate.guide, MixtureGuide) or candidate.reasons:
        return None
    if candidate.name == "realnvp":
        sizes = {
            **candidate.sizes,
            "depth": candidate.sizes["depth"] + MORE_COUPLINGS,
            "base": "student_t",
        }
        new = flow(restart, sizes)
        extend(cast(FlowGuide, new.guide), cast(FlowGuide, candidate.guide))
    elif candidate.name == "skewed":
        new = flow(restart, {"depth": candidate.sizes.get("depth", 0) + MORE_COUPLINGS}, "skewed")
        extend(cast(SkewedNormal, new.guide), cast(SkewedNormal, candidate.guide))
    else:
        new = flow(restart, {"depth": MORE_COUPLINGS, "base": "student_t"})
    # Couplings have a step size of their own.
    new.lr = 0.0 if candidate.name == "skewed" and not candidate.sizes else candidate.lr / 2
    restart.train(new, 0.7, "richer", MORE_DRAWS)
    return new


@torch.no_grad()
def extend(new: Pushforward, old: Pushforward) -> None:
    """Initialise a deeper flow at a shallower one: its first layers are the identity."""
    _extend(cast(Chain, new.flow), cast(Chain, old.flow))
    new.affine.load_state_dict(old.affine.state_dict())


def _extend(new: Chain, old: Chain) -> None:
    for layer, other in zip(list(new.layers)[-len(old.layers) :], old.layers, strict=True):
        if isinstance(layer, Chain):
            _extend(layer, cast(Chain, other))
        else:
            layer.load_state_dict(other.state_dict())


def annealed(restart: Restart, candidate: Candidate) -> Candidate | None:
    """Training on annealed draws, which reach regions that the guide misses."""
    if restart.target.dim > ANNEALED_DIM or not isinstance(
        candidate.guide, MixtureGuide | FlowGuide
    ):
        return None
    if isinstance(restart.target, MarginalTarget):
        return None
    clock = restart.session.clock
    new = Candidate(copy.deepcopy(candidate.guide), candidate.name, candidate.sizes, candidate.lr)
    restart.session.checkpointer.run_once(
        "annealed",
        restart.record,
        lambda: refine_fab(
            restart.target,
            new.guide,
            rounds=ANNEALED_ROUNDS,
            seed=restart.seed(ANNEAL),
            say=restart.record.log.append,
            over=lambda: clock.out_of_time(0.8),
        ),
        lambda _: cpu_state_dict(new.guide),
        lambda tensors: load_tensors(new.guide, tensors, "The checkpoint"),
    )
    new.evaluation = restart.stages(new.guide).evaluate()
    return new


def sampled(restart: Restart, candidate: Candidate) -> Candidate | None:
    """NUTS in the space of the guide."""
    if not isinstance(candidate.guide, Pushforward) or candidate.reasons:
        return None
    if isinstance(restart.target, MarginalTarget):
        # Chains would be draws of Laplace's formula, without weights that correct it.
        return None
    began, clock = restart.session.clock.seconds, restart.session.clock
    found: Draws | None = None
    for plan in restart.schedule.chains:

        def chains(plan: NutsSettings = plan) -> Draws | None:
            return run_nuts(
                restart.target,
                candidate.guide,
                plan,
                restart.seed(CHAINS),
                {"model": restart.target.name, "guide": candidate.name},
                out_of_time=lambda: clock.out_of_time() or clock.seconds > began + CHAIN_SECONDS,
            )

        longer = restart.session.checkpointer.run_once(
            "chains",
            restart.record,
            chains,
            lambda draws: None if draws is None else to_state(draws),
            lambda state: None if state is None else from_state(restart.target, state),
        )
        if longer is None:
            restart.record.log.append("NUTS stopped at its time limit; neutra(fit) has no limit")
            break
        found = longer
        if diagnose(found).verdict == VERDICTS[0]:
            break
    if found is None:
        return None
    return replace(candidate, chains=found, opinion="", drifts=False, bridge=None, weighted=None)


def joined(restarts: Sequence[Restart]) -> Candidate | None:
    """A mixture of the guides of restarts that found different parts of the posterior.

    Returns:
        The checked mixture; None if the restarts agree, or if it is no improvement.
    """
    first = max(restarts, key=lambda r: r.candidate.bound)
    guides = [r.candidate.guide for r in restarts]
    apart = diagnose(draw(first.target, guides, first.schedule.check_draws, first.seed(CHECK)))
    if apart.verdict != VERDICTS[-1] or any(r.candidate.chains for r in restarts):
        return None
    best = sorted(restarts, key=lambda r: -r.candidate.bound)[:MOST_COMPONENTS]
    parts = [r.candidate for r in best]
    if any(isinstance(part.guide, MixtureGuide) for part in parts):
        return None
    first.record.log.append(f"restarts differ ({apart.reasons[0]}): trying a mixture of them")
    bounds = torch.tensor([part.bound for part in parts])
    guide = MixtureGuide([part.guide for part in parts], bounds - bounds.max())
    sizes = {"parts": [{"name": part.name, **part.sizes} for part in parts]}
    new = Candidate(first.to_target(copy.deepcopy(guide)), "mixture", sizes, lr=parts[0].lr / 2)
    first.train(new, 1.0, "mixture of restarts")
    first.check(new)
    if trusted(new):
        consult(first, new)
    return new if trusted(new) else None


# Attempts that fit a guide of shared latents to weighted draws, without gradients.
CHEAP: tuple[Attempt, ...] = (moments, likeliest)
# The attempts in order of cost, each with its name in the log.
ATTEMPTS: tuple[tuple[str, Attempt], ...] = (
    ("A normal with the weighted moments of the draws", moments),
    ("The weighted moments of its draws", moments),
    ("Skews fitted to the weighted draws", likeliest),
    ("A mixture with a component for each mode that was left out", components),
    ("Splines of each coordinate, trained on tempered densities", tempered),
    ("A deeper flow with heavier tails, trained with more draws", richer),
    ("Training on annealed draws, which reach modes that the guide misses", annealed),
    ("NUTS in the space of the flow", sampled),
    ("The weighted moments of the draws once more", moments),
)
