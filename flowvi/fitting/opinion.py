"""The second opinion of a fit: short chains at the draws of a guide that weights trust."""

from __future__ import annotations

from flowvi.diagnostics import VERDICTS
from flowvi.diagnostics.findings import FLAT_GAP
from flowvi.fitting.candidate import Candidate
from flowvi.fitting.restart import CHECK_SHARE, Restart
from flowvi.objectives.nested import NestedTarget
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.samplers.short_chains import LONG, SHORT, second_opinion
from flowvi.targets.structure import MarginalTarget
from flowvi.training.records import OPINION


def consult(restart: Restart, candidate: Candidate) -> None:
    """Ask short chains about a guide that weights trust, once.

    Args:
        restart: The restart, whose log says what they said.
        candidate: The guide with the draws of its check, which are released.
    """
    if candidate.opinion or candidate.chains or candidate.diagnosis is None:
        return
    candidate.opinion = why = _why_not(restart)
    if why or candidate.weighted is None:
        restart.record.log.extend([why] if why else [])
        return
    table, candidate.weighted = candidate.weighted, None
    resampled = candidate.diagnosis.verdict == VERDICTS[1]
    excellent = candidate.diagnosis.gap <= FLAT_GAP and not resampled
    lengths, seed = SHORT if excellent else LONG, restart.seed(OPINION)
    try:
        with abort_on_interrupt():
            said = second_opinion(table, candidate.guide, resampled, seed, lengths)
    except Interrupted:
        return
    except (ValueError, RuntimeError) as error:
        # The verdict of the weights remains valid.
        restart.record.log.append(f"second opinion: failed, {error}")
        return
    candidate.opinion, candidate.drifts = said.reason, bool(said.drifts)
    candidate.bridge = said.bridge
    restart.record.log.append(f"second opinion: {said.reason}")


def _why_not(restart: Restart) -> str:
    """Why no chains are asked; empty if they are."""
    target, clock = restart.target, restart.session.clock
    why = ""
    if isinstance(target, MarginalTarget):
        why = "the density of the shared latents is that of Laplace's formula"
    elif isinstance(target, NestedTarget) or target.subsampled:
        why = "the density is a bound, or an estimate from some of the rows"
    elif target.sum_of_rows is not None:
        why = "each evaluation goes through all rows of the data"
    elif clock.out_of_time(CHECK_SHARE) or not restart.pace.has_time_for(LONG.evaluations):
        why = "the time budget is spent"
    return f"No second opinion by short chains: {why}." if why else ""
