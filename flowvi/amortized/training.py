"""Train a network on simulated pairs of latents and data, fresh ones at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowvi.amortized.network import Network
from flowvi.amortized.problem import Problem, Simulated
from flowvi.runtime.clock import Clock, Interrupted
from flowvi.runtime.progress import current
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.training.flat import Flat
from flowvi.training.gradient import Gradient
from flowvi.training.learning_rate import FINAL_RATE
from flowvi.training.records import Record
from flowvi.training.settings import Session
from flowvi.training.state import TrainState
from flowvi.training.trainer import Phase, Taken, Trainer

# Random streams.
HELD_OUT, PAIRS, SIZES, BUILD, SCALE, CALIBRATE, RACE = range(7)
# Simulated pairs of one call of the simulator.
CHUNK = 8192
# Share of the budget at which a race ends, and steps of each network in turn.
RACE_SHARE, TURN = 0.2, 50
# Fewest steps of each by which they are compared.
FEWEST = 400
# Fewest data sets of a step.
LEAST_SETS = 64
# Data sets of different numbers of rows in a step.
GROUPS = 2


@dataclass(frozen=True)
class Plan:
    """Numbers by which a training is decided.

    Args:
        batch: Largest number of data sets of a step.
        batch_rows: Largest number of their rows, on average.
        lr: Largest step size.
        warm_up: Steps of the warm-up.
        every: Steps between two looks at the held-out loss.
        held_out: Number of held-out data sets.
        window: Looks whose mean loss is compared with that of as many before.
        worth: Gain in nats by which training goes on.
        fewest: Fewest steps of constant size.
        most: Most steps of constant size.
        decay: Steps of falling size, as a share of the constant ones.
        share: Share of the budget for constant steps.
        race: Steps of each of several networks, of which the best is trained further.
    """

    batch: int = 256
    batch_rows: int = 5000
    lr: float = 3e-3
    warm_up: int = 200
    every: int = 250
    held_out: int = 2000
    window: int = 8
    worth: float = 0.005
    fewest: int = 4000
    most: int = 200_000
    decay: float = 0.5
    share: float = 0.6
    race: int = 800

    def sets(self, problem: Problem) -> int:
        """Data sets of a step, an even number."""
        rows = math.sqrt(problem.rows[0] * problem.rows[1]) if problem.exchangeable else 1.0
        return max(2, min(self.batch, max(LEAST_SETS, int(self.batch_rows / rows)) // 2 * 2))

    def warmed(self, step: int) -> float:
        """Step size with a linear warm-up."""
        return self.lr * min(1.0, (step + 1) / self.warm_up)


@dataclass
class Trained:
    """What a training was.

    Attributes:
        steps: Steps taken.
        simulations: Data sets simulated.
        losses: Held-out losses, with the step of each.
        log: Decisions and their reasons.
    """

    steps: int = 0
    simulations: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


class Stream:
    """Simulated data sets, each used once.

    Args:
        problem: The model.
        seed: Seed of the simulations.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed, self.count = problem, seed, 0
        self._held: Simulated | None = None
        self._place = self._calls = 0
        self._sizes = np.random.default_rng(derive_seed(seed, SIZES))

    def take(self, n: int) -> list[Simulated]:
        """Data sets that were not used before, n in all, in groups of one number of rows."""
        least, most = self.problem.rows
        groups = GROUPS if least < most else 1
        each = n // groups
        return [self._next(each, self._size()) for _ in range(groups)]

    def _next(self, n: int, rows: int | None) -> Simulated:
        if self._held is None or self._place + n > len(self._held.z):
            seed = derive_seed(self.seed, PAIRS, self._calls) % 2**32
            self._held, self._place = self.problem.simulate(max(CHUNK, n), seed), 0
            self._calls += 1
            self.count += len(self._held.z)
        part = slice(self._place, self._place + n)
        self._place += n
        return self._held.part(part, rows, self.problem.by_row)

    def _size(self) -> int | None:
        return draw_size(self.problem, self._sizes)


def draw_size(problem: Problem, rng: np.random.Generator) -> int | None:
    """A number of rows, uniform on the log scale; None where it is fixed."""
    least, most = problem.rows
    if least == most:
        return None
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def held_out(problem: Problem, n: int, seed: int, groups: int = 16) -> list[Simulated]:
    """Data sets to judge by, in groups of one number of rows."""
    least, most = problem.rows
    pairs = problem.simulate(n, seed)
    if least == most:
        return [pairs]
    rng = np.random.default_rng(seed)
    parts = [slice(i, None, groups) for i in range(groups)]
    return [pairs.part(part, draw_size(problem, rng), problem.by_row) for part in parts]


@torch.no_grad()
def loss_of(network: Network, groups: list[Simulated]) -> float:
    """Mean of -log q(z | data)."""
    return -float(network.log_prob(*groups).double().mean())


class ForwardGradient(Gradient):
    """Gradient of the forward KL divergence, averaged over data sets: of -log q(z | data).

    Args:
        problem: The model.
        network: The network.
        stream: Simulated data sets.
        clock: Clock of the training.
        batch: Data sets of a step.
    """

    def __init__(
        self, problem: Problem, network: Network, stream: Stream, clock: Clock, batch: int
    ) -> None:
        # No parameter of the model is trained.
        super().__init__(problem.target, network, clock)
        self.network, self.stream, self.batch = network, stream, batch
        self.flat = Flat(self.trained)

    @property
    def whole(self) -> Tensor | None:
        return self.flat.vector.detach()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The mean log density of a batch, and the gradient of minus it."""
        self.flat.zero()
        bound = self.network.log_prob(*self.stream.take(self.batch)).mean()
        (-bound).backward()
        return self.averaged(bound.detach(), self.flat.gradient)

    def explain_nonfinite(self) -> str:
        return ""


@dataclass
class _Run:
    """One network in a race."""

    network: Network
    gradient: ForwardGradient
    trainer: Trainer
    state: TrainState
    seconds: float = 0.0


def race(
    problem: Problem, networks: Sequence[Network], plan: Plan, clock: Clock, seed: int, steps: int
) -> tuple[Network, list[str], int]:
    """The best of several networks by the held-out loss after a few steps.

    Args:
        problem: The model.
        networks: The networks, changed in place.
        plan: Numbers of the training.
        clock: Time and budget.
        seed: Seed of all simulations.
        steps: Steps of each.

    Returns:
        The network, lines of the log, and the number of simulated data sets.
    """
    judge = held_out(problem, plan.held_out, derive_seed(seed, HELD_OUT) % 2**32)
    runs = []
    for network in networks:
        stream = Stream(problem, derive_seed(seed, RACE))
        gradient = ForwardGradient(problem, network, stream, clock, plan.sets(problem))
        trainer = Trainer(gradient, Session(clock), Record(), problem.name)
        runs.append(_Run(network, gradient, trainer, trainer.begin()))
    limit = math.inf if clock.budget is None else RACE_SHARE * clock.budget / len(runs)
    with isolated_rng(derive_seed(seed, BUILD)), suppress(Interrupted):
        # In turn, each for as many steps, or as long where time is short.
        while going := [r for r in runs if r.state.step < steps and r.seconds < limit]:
            for run in going:
                began = clock.seconds
                name = f"trying {run.network.guide_spec['name']}"
                until = min(run.state.step + TURN, steps)
                phase = Phase(until, plan.warmed, run.gradient, lambda _: False, name=name)
                run.trainer.take(phase, run.state)
                run.seconds += clock.seconds - began
    losses = []
    for run in runs:
        run.gradient.flat.release()
        losses.append(loss_of(run.network, judge))
    words = [
        f"{run.network.guide_spec['name']} {loss:.3f} after {run.state.step} steps"
        for run, loss in zip(runs, losses, strict=True)
    ]
    count = sum(run.gradient.stream.count for run in runs)
    told = f"held-out losses: {', '.join(words)}"
    if min(run.state.step for run in runs) < min(FEWEST, steps):
        line = f"{told}; these are too few steps to tell: the first is trained further"
        return networks[0], [line], count
    best = int(np.nanargmin([*losses, math.inf]))
    chosen = networks[min(best, len(networks) - 1)]
    return chosen, [f"{told}; the best is trained further"], count


def train(
    problem: Problem,
    network: Network,
    plan: Plan,
    clock: Clock,
    seed: int,
    steps: int | None = None,
    callback: Callable[[int, float], object] | None = None,
) -> Trained:
    """Train a network until a plateau of the held-out loss, or until the budget is spent.

    Steps of constant size, until `plan.window` looks at the held-out loss bring less than
    `plan.worth` nats or a share of the budget is spent; then steps of falling size.

    Args:
        problem: The model.
        network: The network, changed in place.
        plan: The numbers.
        clock: Time and budget.
        seed: Seed of all simulations.
        steps: Number of steps; by default the plateau decides.
        callback: Function of a step and the held-out loss; a true answer ends the training.
    """
    judge = held_out(problem, plan.held_out, derive_seed(seed, HELD_OUT) % 2**32)
    stream, trained, record = Stream(problem, seed), Trained(), Record()
    gradient = ForwardGradient(problem, network, stream, clock, plan.sets(problem))
    trainer = Trainer(gradient, Session(clock), record, problem.name)
    began = clock.seconds
    constant = plan.most if steps is None else max(1, round(steps / (1 + plan.decay)))
    ends = ""

    def look(step: int) -> float:
        loss = loss_of(network, judge)
        trained.losses.append((step, loss))
        return loss

    def after(taken: Taken) -> bool:
        nonlocal ends
        if steps is None and clock.budget_spent(plan.share):
            ends = "the budget"
            return True
        if (taken.number + 1) % plan.every:
            return False
        loss = look(taken.number + 1)
        if callback is not None and callback(taken.number + 1, loss):
            record.stopped = True
        if steps is None and taken.number + 1 >= plan.fewest and flat(trained.losses, plan):
            ends = "a plateau of the held-out loss"
            return True
        return False

    state = trainer.begin()
    interrupted = False
    try:
        with isolated_rng(derive_seed(seed, BUILD)):
            trainer.take(Phase(constant, plan.warmed, gradient, after, name="training"), state)
            first = state.step
            trained.log.append(
                f"{first} steps of constant size" + (f", until {ends}" if ends else "")
            )
            pace = (clock.seconds - began) / max(first, 1)
            fall = round(plan.decay * first) if steps is None else max(0, steps - first)
            left = clock.seconds_left
            if steps is None and math.isfinite(left):
                fall = min(fall, max(0, int(0.9 * left / max(pace, 1e-9))))
            state.start_decay(clock.seconds)
            if fall and not record.stopped:
                trainer.take(
                    Phase(
                        fall,
                        lambda step: plan.lr * _fallen(step / fall),
                        gradient,
                        lambda taken: clock.budget_spent() and steps is None,
                        name="training, smaller steps",
                    ),
                    state,
                )
    except Interrupted:
        interrupted = True
    trained.steps = state.steady + state.step
    trained.simulations = stream.count
    loss = look(trained.steps)
    current().phase("held-out loss")
    trained.log += [
        *record.log,
        f"held-out loss {loss:.4f} after {trained.steps} steps"
        + (", interrupted" if interrupted else ""),
    ]
    gradient.flat.release()
    if not math.isfinite(loss):
        raise ValueError(
            f"The held-out loss of {problem.name} is {loss}: simulated data sets have values that "
            "the network cannot take. Narrow the prior, or give encoder=."
        )
    return trained


def flat(losses: list[tuple[int, float]], plan: Plan) -> bool:
    """Whether the last looks at the held-out loss are hardly better than those before."""
    if len(losses) < 2 * plan.window:
        return False
    values = [loss for _, loss in losses]
    now = values[-plan.window :]
    before = values[-2 * plan.window : -plan.window]
    return float(np.mean(before) - np.mean(now)) < plan.worth


def _fallen(done: float) -> float:
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))
