"""What a restart tries while its result is not to be trusted, from cheap to dear."""

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
from flowvi.draws.storage import put_up, taken_down
from flowvi.fitting.candidate import Kept
from flowvi.fitting.restart import CHECK_DRAWS, Run
from flowvi.flows import Chain
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.pushforward import FlowGuide, Pushforward
from flowvi.guides.registry import make_guide
from flowvi.guides.skewed import SkewedNormal
from flowvi.runtime.clock import Interrupted, droppable
from flowvi.runtime.tensors import fill, tensors_of
from flowvi.samplers.nuts import Plan, run_chains
from flowvi.samplers.tempering import MOST_DIM
from flowvi.training.fab import refine_bootstrap
from flowvi.training.records import ANNEAL, CHAINS, CHECK

# A mixture of more flows than this would take too long to train, and one of more normals too.
MOST_COMPONENTS, MOST_NORMALS = 3, 12
# Couplings added to a flow that is not rich enough, and times the usual draws to train them with.
MORE_COUPLINGS = 8
MORE_DRAWS = 2
# Powers of the density on the way to it, and steps at each.
POWERS = (0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
COOLING_STEPS = 120
SPLINE_RATE = 1e-2
# Annealing pays up to so many dimensions, and takes so many rounds.
ANNEALED_DIM = 200
ANNEALED_ROUNDS = 150
# Chains that take longer are left to those who ask for them.
CHAIN_SECONDS = 900.0
# Longer chains follow where the first know too little.
PLANS = (Plan(), Plan(draws=3000))
# Nats by which a bound decides between two guides, and the same for k-hat.
CLEARLY = 0.1
THINNER = 0.05

Attempt = Callable[[Run, Kept], Kept | None]


def escalate(run: Run) -> None:
    """Try one thing after the other until the check passes or the budget is spent.

    Each is judged by the check on fresh draws, and dropped if it brought nothing.
    """
    for name, attempt in ATTEMPTS:
        hopeless = run.interrupted or run.record.stopped or run.settings.clock.over(0.9)
        if trusted(run.kept) or hopeless:
            return
        try:
            with droppable():
                new = attempt(run, run.kept)
                if new is None:
                    continue
                run.check(new)
        except (Interrupted, KeyboardInterrupt) as interrupt:
            if isinstance(interrupt, KeyboardInterrupt):
                run.settings.clock.interrupt()
            run.interrupted = True
            run.record.log.append(f"{name}: interrupted")
            return
        except (ValueError, RuntimeError) as error:
            # What there was before is a result all the same.
            run.record.log.append(f"{name}: failed, {error}")
            continue
        taken = better(new, run.kept)
        word = "kept" if taken else "dropped"
        run.record.log.append(f"{name}: {words(run.kept)} before, {words(new)} after: {word}")
        run.kept = new if taken else run.kept


def trusted(kept: Kept) -> bool:
    """Whether some draws of the guide can be used."""
    return kept.distrust < len(VERDICTS) - 1


def better(new: Kept, old: Kept) -> bool:
    """Whether a guide is worth more than another: by verdict, bound, then tail of the weights."""
    if new.distrust != old.distrust:
        return new.distrust < old.distrust
    if new.diagnosis is None or old.diagnosis is None:
        return new.bound > old.bound
    # A guide that covers more of the posterior has the larger mean weight, and not always the
    # larger bound.
    more = new.diagnosis.elbo + new.diagnosis.gap - old.diagnosis.elbo - old.diagnosis.gap
    if abs(more) > CLEARLY + 3 * math.hypot(new.diagnosis.gap_se, old.diagnosis.gap_se):
        return more > 0
    if abs(new.bound - old.bound) > CLEARLY:
        return new.bound > old.bound
    return new.diagnosis.khat < old.diagnosis.khat - THINNER


def words(kept: Kept) -> str:
    """Bound and k-hat, for the log."""
    khat = "" if kept.diagnosis is None else f", k-hat {kept.diagnosis.khat:.2f}"
    return f"bound {kept.bound:.3f}{khat}"


def components(run: Run, kept: Kept) -> Kept | None:
    """A mixture with a component for each mode that was left out."""
    if not 0 < len(kept.missed) < MOST_NORMALS:
        return None
    starts = [run.best, *kept.missed]
    sizes: dict[str, Any] = {"components": len(starts)}
    if len(starts) > MOST_COMPONENTS:
        sizes["component"] = "fullrank"
    new = Kept(run.placed(make_guide("mixture", run.target.dim, **sizes)), "mixture", sizes)
    cast(MixtureGuide, new.guide).start_many([(g.loc, g.scale_tril) for g in starts])
    run.improve(new, 0.7, "mixture")
    return new


def tempered(run: Run, kept: Kept) -> Kept | None:
    """Splines of each coordinate, trained from a flat density to the full one."""
    if not kept.words or run.target.dim > MOST_DIM:
        return None
    wide = run.wide()
    new = Kept(run.placed(make_guide("marginals", run.target.dim)), "marginals", lr=SPLINE_RATE)
    new.guide.start(wide.loc, wide.scale_tril)
    couplings = cast(Chain, cast(FlowGuide, new.guide).flow).layers[0].parameters()
    # Couplings that learn from the start pull all draws into few modes.
    held = [p.requires_grad_(False) for p in couplings]
    trainer, repeats = run.trainer(new.guide), run.settings.repeats
    run.settings.journal.once(
        "tempered",
        run.record,
        lambda: trainer.cool(POWERS, COOLING_STEPS, repeats, SPLINE_RATE),
        lambda _: trainer.vector(),
        lambda vector: trainer.set(vector.to(run.target.device)),
    )
    run.improve(new, 0.6, "splines")
    for p in held:
        p.requires_grad_(True)
    new.lr = (kept.lr or SPLINE_RATE) / 3
    run.improve(new, 0.8, "couplings")
    return new


def richer(run: Run, kept: Kept) -> Kept | None:
    """A deeper flow with heavier tails, trained on with more draws."""
    if isinstance(kept.guide, MixtureGuide) or kept.words:
        return None
    if kept.name == "realnvp":
        sizes = {**kept.sizes, "depth": kept.sizes["depth"] + MORE_COUPLINGS, "base": "student_t"}
        new = run.flow(sizes)
        extend(cast(FlowGuide, new.guide), cast(FlowGuide, kept.guide))
    elif kept.name == "skewed":
        new = run.flow({"depth": kept.sizes.get("depth", 0) + MORE_COUPLINGS}, "skewed")
        extend(cast(SkewedNormal, new.guide), cast(SkewedNormal, kept.guide))
    else:
        new = run.flow({"depth": MORE_COUPLINGS, "base": "student_t"})
    # Couplings have a step size of their own.
    new.lr = 0.0 if kept.name == "skewed" and not kept.sizes else kept.lr / 2
    run.improve(new, 0.7, "richer", MORE_DRAWS)
    return new


@torch.no_grad()
def extend(new: Pushforward, old: Pushforward) -> None:
    """Make a deeper flow start where a shallower one is: its first layers are the identity."""
    _extend(cast(Chain, new.flow), cast(Chain, old.flow))
    new.affine.load_state_dict(old.affine.state_dict())


def _extend(new: Chain, old: Chain) -> None:
    for layer, other in zip(list(new.layers)[-len(old.layers) :], old.layers, strict=True):
        if isinstance(layer, Chain):
            _extend(layer, cast(Chain, other))
        else:
            layer.load_state_dict(other.state_dict())


def annealed(run: Run, kept: Kept) -> Kept | None:
    """Training on annealed draws, which go where the guide's own do not."""
    if run.target.dim > ANNEALED_DIM or not isinstance(kept.guide, MixtureGuide | FlowGuide):
        return None
    clock = run.settings.clock
    new = Kept(copy.deepcopy(kept.guide), kept.name, kept.sizes, kept.lr)
    run.settings.journal.once(
        "annealed",
        run.record,
        lambda: refine_bootstrap(
            run.target,
            new.guide,
            rounds=ANNEALED_ROUNDS,
            seed=run.seed(ANNEAL),
            say=run.record.log.append,
            over=lambda: clock.over(0.8),
        ),
        lambda _: tensors_of(new.guide),
        lambda tensors: fill(new.guide, tensors, "The checkpoint"),
    )
    new.judged = run.trainer(new.guide).judge()
    return new


def sampled(run: Run, kept: Kept) -> Kept | None:
    """NUTS in the space of the flow."""
    if not isinstance(kept.guide, Pushforward) or kept.words:
        return None
    began, clock = run.settings.clock.seconds, run.settings.clock
    found: Draws | None = None
    for plan in PLANS:

        def chains(plan: Plan = plan) -> Draws | None:
            return run_chains(
                run.target,
                kept.guide,
                plan,
                run.seed(CHAINS),
                {"model": run.target.name, "guide": kept.name},
                progress=run.settings.progress,
                over=lambda: clock.over() or clock.seconds > began + CHAIN_SECONDS,
            )

        longer = run.settings.journal.once(
            "chains",
            run.record,
            chains,
            lambda draws: None if draws is None else taken_down(draws),
            lambda state: None if state is None else put_up(run.target, state),
        )
        if longer is None:
            run.record.log.append("NUTS given up for want of time; neutra(fit) has no limit")
            break
        found = longer
        if diagnose(found).verdict == VERDICTS[0]:
            break
    return None if found is None else replace(kept, chains=found)


def joined(runs: Sequence[Run]) -> Kept | None:
    """A mixture of the guides of restarts that found different parts of the posterior.

    Returns:
        The mixture, checked; None where the restarts agree, or it is no better than they are.
    """
    first = max(runs, key=lambda run: run.kept.bound)
    guides = [run.kept.guide for run in runs]
    apart = diagnose(draw(first.target, guides, CHECK_DRAWS, first.seed(CHECK)))
    if apart.verdict != VERDICTS[-1] or any(run.kept.chains for run in runs):
        return None
    best = sorted(runs, key=lambda run: -run.kept.bound)[:MOST_COMPONENTS]
    parts = [run.kept for run in best]
    if any(isinstance(part.guide, MixtureGuide) for part in parts):
        return None
    first.record.log.append(f"restarts differ ({apart.reasons[0]}): trying a mixture of them")
    bounds = torch.tensor([part.bound for part in parts])
    guide = MixtureGuide([part.guide for part in parts], bounds - bounds.max())
    sizes = {"parts": [{"name": part.name, **part.sizes} for part in parts]}
    new = Kept(first.placed(copy.deepcopy(guide)), "mixture", sizes, lr=parts[0].lr / 2)
    first.improve(new, 1.0, "mixture of restarts")
    first.check(new)
    return new if trusted(new) else None


# What is tried, from cheap to dear, each with its name in the log.
ATTEMPTS: tuple[tuple[str, Attempt], ...] = (
    ("A mixture with a component for each mode that was left out", components),
    ("Splines of each coordinate, trained from a flat density to the full one", tempered),
    ("A deeper flow with heavier tails, trained on with more draws", richer),
    ("Training on annealed draws, which go where the guide's own do not", annealed),
    ("NUTS in the space of the flow", sampled),
)
