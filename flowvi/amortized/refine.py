"""Train an amortised guide further on real data sets, by the model's own density."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowvi.amortized import reading
from flowvi.amortized.network import AtData, Network
from flowvi.amortized.reading import DataSet, read
from flowvi.amortized.training import ForwardGradient, Plan, Stream, loss_of
from flowvi.amortized.training import held_out as held_out_sets
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.clock import Clock, interruptible
from flowvi.runtime.progress import phase, showing
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.training.records import Record
from flowvi.training.settings import Session
from flowvi.training.trainer import Phase, Trainer

if TYPE_CHECKING:
    from flowvi.amortized.guide import AmortizedGuide

# Random streams.
ORDER, PAIRS, JUDGE = 31, 32, 33
# Data sets of a step, draws of each that judge the result, and data sets that judge it.
SETS, JUDGE_DRAWS, MOST_JUDGED = 4, 400, 50
# Step size, as a share of the training's.
SLOWER = 0.1
# Loss of nats on simulated data sets that a gain on real ones may cost.
WORST = 0.05


class WakeGradient(ForwardGradient):
    r"""Gradient of the forward KL divergence at real data sets and at simulated ones.

    .. math::
        \nabla_\phi \Big( - \sum_k \tilde w_k \log q_\phi(z_k \mid y) \Big), \qquad
        \tilde w_k \propto p(z_k, y) / q_\phi(z_k \mid y), \qquad z_k \sim q_\phi(\cdot \mid y)

    averaged over a few real data sets y (the wake phase), plus that of simulated pairs (the sleep
    phase). The weights are held fixed and truncated.

    Args:
        sets: The real data sets.
        draws: Draws of each in a step.
        seed: Seed of their order.
        training: Arguments of `ForwardGradient`.

    References:
        Hinton and others (1995), doi:10.1126/science.7761831: wake-sleep.
        Bornschein and Bengio (2015), arXiv:1406.2751: reweighted wake-sleep.
        Ionides (2008), doi:10.1198/106186008X320456: truncated weights.
    """

    def __init__(self, sets: Sequence[DataSet], draws: int, seed: int, *training: Any) -> None:
        super().__init__(*training)
        self.sets, self.draws = sets, draws
        self.problem = training[0]
        self.rng = np.random.default_rng(seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        self.flat.zero()
        sleep = self.network.log_prob(*self.stream.take(self.batch)).mean()
        chosen = self.rng.choice(len(self.sets), min(SETS, len(self.sets)), replace=False)
        wake = torch.stack([self._weighted(self.sets[i]) for i in chosen]).mean()
        bound = sleep + wake.to(sleep)
        (-bound).backward()
        return self.averaged(bound.detach(), self.flat.gradient)

    def _weighted(self, data: DataSet) -> Tensor:
        """The weighted mean log density of draws of one data set."""
        net = self.network
        context = net.encoder(data.data)[0]
        z, log_w = _weighted_draws(net, context.detach(), self.problem, data, self.draws)
        # No draw weighs more than sqrt(K) average ones.
        w = (log_w - log_w.logsumexp(0)).exp()
        w = w.clamp(max=len(w) ** -0.5)
        log_q = net.guide.log_prob(net.unit(z), context.expand(len(z), -1))
        return (w / w.sum()).to(log_q) @ log_q


def refine(
    guide: AmortizedGuide, data: Iterable[Any], steps: int, draws: int, seed: int, progress: bool
) -> AmortizedGuide:
    """As `AmortizedGuide.refine`."""
    steps, draws = check_integer("steps", steps), check_integer("draws", draws, 2)
    sets = [read(guide.problem, one) for one in data]
    if not sets:
        raise ValueError("refine needs data sets; got none.")
    network, clock, record = copy.deepcopy(guide.network), Clock(None), Record()
    plan = Plan()
    problem = guide.problem
    simulated = held_out_sets(problem, plan.held_out, derive_seed(seed, JUDGE) % 2**32)
    with showing(problem.name, progress, clock), interruptible(clock):
        stream = Stream(problem, derive_seed(seed, PAIRS))
        training = (problem, network, stream, clock, plan.sets(problem))
        gradient = WakeGradient(sets, draws, derive_seed(seed, ORDER), *training)
        trainer = Trainer(gradient, Session(clock), record, problem.name)
        rate = SLOWER * plan.lr
        with isolated_rng(derive_seed(seed, ORDER)):
            trainer.take(
                Phase(
                    steps,
                    lambda step: rate * min(1.0, (step + 1) / 20) * (1 - step / steps),
                    gradient,
                    lambda _: False,
                    name="refining",
                ),
                trainer.begin(),
            )
        gradient.flat.release()
        network.eval()
        phase("judging")
        judged = sets[:MOST_JUDGED]
        before, after = (effective(net, problem, judged, seed) for net in (guide.network, network))
        losses = [loss_of(net, simulated) for net in (guide.network, network)]
    better = after > before and losses[1] < losses[0] + WORST
    line = (
        f"refined on {len(sets)} data sets in {steps} steps: {before:.1%} of the draws effective "
        f"before and {after:.1%} after, held-out loss {losses[0]:.4f} and {losses[1]:.4f}: "
        + ("kept" if better else "dropped")
    )
    log = [*guide.log, *record.log, line]
    if not better:
        return replace(guide, log=log)
    meta = {**guide.meta, "refined": {"steps": steps, "data sets": len(sets)}, "loss": losses[1]}
    return replace(guide, network=network, log=log, meta=meta)


def effective(network: Network, problem: Any, sets: Sequence[DataSet], seed: int) -> float:
    """Mean share of effective draws at data sets, of fresh draws."""
    shares = []
    with torch.no_grad(), isolated_rng(derive_seed(seed, JUDGE)):
        for data in sets:
            context = network.encoder(data.data)[0]
            _, log_w = _weighted_draws(network, context, problem, data, JUDGE_DRAWS)
            w = (log_w - log_w.max()).exp()
            shares.append(float(w.sum() ** 2 / w.square().sum() / len(w)))
    return float(np.mean(shares))


@torch.no_grad()
def _weighted_draws(
    network: Network, context: Tensor, problem: Any, data: DataSet, n: int
) -> tuple[Tensor, Tensor]:
    """Draws of the guide and their log weights, (n, D) and (n)."""
    z, log_q = AtData(network, context).sample((n,))
    log_p = reading.target_of(problem, data).log_prob(z)
    log_w = (log_p - log_q).nan_to_num(nan=-torch.inf, neginf=-1e300, posinf=-1e300)
    return z, log_w
