"""Train a guide on annealed draws, which reach modes that the guide's own draws miss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowvi.guides.guide import Guide
from flowvi.initialization.candidates import Log
from flowvi.runtime.rng import isolated_rng
from flowvi.samplers.ais import AnnealedDraws, AnnealingLadder
from flowvi.targets import Target
from flowvi.training.adam import Adam
from flowvi.training.averaging import Average
from flowvi.training.guard import Guard
from flowvi.training.learning_rate import decayed

ROUNDS = 300
BATCH = 256
RATE = 1e-3
TEMPERATURES = 4
LEAPFROG = 5
# Steps of Adam for each batch of annealed draws.
STEPS = 4
# Capacity of the buffer in batches, and batches in it before the first step.
CAPACITY, FILL = 50, 4
# Largest factor by which one step may change the weight of a draw.
MOST = 10.0
# Rate at which the chains' step sizes adapt to their acceptance rate.
ADAPTATION = 0.1
LAST_PART = 0.2


def refine_fab(
    target: Target,
    guide: Guide,
    *,
    rounds: int = ROUNDS,
    batch: int = BATCH,
    lr: float = RATE,
    power: float = 2.0,
    temperatures: int = TEMPERATURES,
    leapfrog: int = LEAPFROG,
    seed: int = 0,
    say: Log = lambda line: None,
    over: Callable[[], bool] = lambda: False,
) -> None:
    r"""Minimise the alpha-divergence of the target from the guide, alpha = power, in place.

    The gradient of :math:`\int p^a q^{1 - a}` is, up to a factor, minus the
    mean of :math:`\nabla \log q(z)` under the normalised :math:`p^a q^{1 - a}`. Each round
    anneals a batch of draws towards this density, adds them to a buffer, and takes a few
    steps of Adam on draws sampled from the buffer without replacement in proportion to
    their weights. When q changes, the weight of a draw is multiplied by
    :math:`(q_{old} / q_{new})^{a - 1}`. The guide ends at the average of its last
    iterates. The caller has to compare it with the initial guide.

    Args:
        target: The log density p; its own parameters are constants.
        guide: The density q. It has to evaluate the density of any draw.
        rounds: Number of annealed batches.
        batch: Draws of each batch and of each step.
        lr: Largest step size of Adam.
        power: The order a. 2 minimises the variance of the importance weights;
            1 minimises KL(p || q).
        temperatures: Number of temperatures of the annealing path.
        leapfrog: Leapfrog steps of each transition.
        seed: Seed of all random numbers; the global generators are not changed.
        say: Function that takes a line of the log.
        over: Function called before every round; true stops.

    References:
        Midgley et al. (2023), "Flow Annealed Importance Sampling Bootstrap",
        arXiv:2208.01893, sections 3 and 4 (the buffer).
    """
    for name, value in (("rounds", rounds), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    trained = [p for p in guide.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(guide).__name__} has no parameters to train.")
    with isolated_rng(seed):
        ladder = AnnealingLadder(target, guide, power, temperatures, leapfrog)
        ladder.tune()
        Refinement(guide, trained, ladder, power - 1, batch).run(rounds, lr, say, over)


class Refinement:
    """The training of one guide on annealed draws.

    Args:
        guide: The guide.
        trained: Its trainable parameters.
        ladder: Annealed importance sampling from the guide.
        order: Exponent of 1 / q in the weights.
        batch: Draws of each round and of each step.
    """

    def __init__(
        self,
        guide: Guide,
        trained: list[nn.Parameter],
        ladder: AnnealingLadder,
        order: float,
        batch: int,
    ) -> None:
        self.guide, self.trained, self.ladder = guide, trained, ladder
        self.order, self.batch = order, batch
        self.buffer = Buffer(CAPACITY * batch)
        self.average = Average()
        self.guard = Guard()

    def run(self, rounds: int, lr: float, say: Log, over: Callable[[], bool]) -> None:
        """Run the rounds, and set the guide to the average of the last iterates."""
        optimiser = Adam(self.trained)
        done = 0
        for i in range(rounds):
            if over():
                break
            for _ in range(FILL if i == 0 else 1):
                self.buffer.add(self.ladder.run(self.batch, ADAPTATION))
            for k in range(STEPS):
                self._step(optimiser, decayed(STEPS * i + k, STEPS * rounds, lr))
            if i >= (1 - LAST_PART) * rounds:
                self.average.add(nn.utils.parameters_to_vector(self.trained).detach())
            done = i + 1
        if self.average.mean is not None:
            with torch.no_grad():
                nn.utils.vector_to_parameters(self.average.mean.clone(), self.trained)
        say(
            f"bootstrap: {done} rounds of {self.batch} annealed draws, "
            f"{self.guard.skipped} steps skipped"
        )

    def _step(self, optimiser: Adam, lr: float) -> None:
        rows = self.buffer.pick(self.batch)
        if len(rows) == 0:
            return
        log_q = self.guide.log_prob(self.buffer.z[rows])
        change = self.order * (self.buffer.log_q[rows] - log_q.detach())
        loss = -(change.exp().clamp_max(MOST) * log_q).mean()
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(self.trained, gradients, strict=True)
            ]
        )
        admitted, _ = self.guard.admits(loss.item(), flat)
        self.buffer.change(rows, change, log_q.detach())
        if admitted:
            optimiser.step(flat, lr)


class Buffer:
    """The latest annealed draws with their weights and the guide's log density.

    Args:
        capacity: Largest number of draws; the oldest ones are dropped.

    Attributes:
        z: Draws, (N, D).
        log_w: Their log weights, (N).
        log_q: Log density, (N), of the guide that the weights refer to.
    """

    z: Tensor
    log_w: Tensor
    log_q: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.empty = True

    def add(self, new: AnnealedDraws) -> None:
        """Add the draws whose weight is positive."""
        good = new.log_w.isfinite()
        found = new.z[good], new.log_w[good], new.log_q[good]
        kept = [t[:0] for t in found] if self.empty else [self.z, self.log_w, self.log_q]
        pairs = zip(kept, found, strict=True)
        self.z, self.log_w, self.log_q = (torch.cat(pair)[-self.capacity :] for pair in pairs)
        self.empty = False

    def pick(self, n: int) -> Tensor:
        """Sample up to n different rows in proportion to the weights, (n)."""
        weights = torch.softmax(self.log_w, 0)
        most = min(n, int(weights.count_nonzero()))
        return torch.multinomial(weights, most) if most else weights.new_empty(0).long()

    def change(self, rows: Tensor, change: Tensor, log_q: Tensor) -> None:
        """Correct the weights for a changed guide; a NaN becomes weight zero."""
        self.log_w[rows] = (self.log_w[rows] + change).nan_to_num(-torch.inf)
        self.log_q[rows] = log_q
