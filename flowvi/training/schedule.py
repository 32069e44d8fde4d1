"""How long to train and with what steps: the numbers by which a fit decides."""

from __future__ import annotations

from dataclasses import dataclass

from flowvi.samplers.nuts import NutsSettings


@dataclass(frozen=True)
class Schedule:
    """How long to train, with what steps, and when enough is enough.

    A fit trains in stages: steps of a constant size until a plateau, then of a falling one. From
    stage to stage the draws double and the step size halves. With `lengths` the stages are of
    counted steps, and the step size halves only where a stage gained nothing.

    Gaps are KL(q || p) in nats, as importance weights estimate it.

    Args:
        rates: Step sizes to try, the largest first; the middle one is taken without a search.
        trial_steps: Steps of each trial.
        trial_share: Share of a time budget at which trials end.
        search_seconds: With less time than this left, no step size is searched.
        skew_rate: Step size for skews, of which each follows a gradient of its own.
        steady_steps: Most steps of constant size in a stage.
        few_steps: The same in the first stage, where less than `little` is to be gained.
        least_decay: Least steps of falling size; half as many as the constant ones otherwise.
        lengths: Steps of each stage, where they are counted.
        most_stages: Most stages until a plateau.
        nothing_left: A gap below which the start needs no flow.
        enough: A gap below which no further stage is trained: no mean is then off by 0.15 sds.
        enough_heavy: The same where k-hat is not below `light`.
        light: k-hat of weights with a light tail.
        little: A gap below which the middle step size will do, and few steps.
        worth: Share of the gap that a stage has to remove for another one to follow.
        first_share: Share of a time budget for the first guide, if more could follow.
        start_share: Share of it for the search for a start.
        much: A gap above which couplings compete with couplings and skews.
        ahead: Nats that skews have to be ahead after the trials of step sizes.
        further: Nats that they have to be ahead after `race_steps` more.
        race_steps: Steps of the race.
        evaluation_draws: Draws by which guides are compared.
        check_draws: Draws behind the check, as many as `Fit.draw` makes.
        again: Times as many where other draws could decide otherwise.
        chains: Markov chains to run where no guide is to be trusted, one plan after the other.
    """

    rates: tuple[float, ...] = (1e-2, 5e-3, 1e-3)
    trial_steps: int = 60
    trial_share: float = 0.5
    search_seconds: float = 30.0
    skew_rate: float = 1e-2
    steady_steps: int = 1000
    few_steps: int = 300
    least_decay: int = 200
    lengths: tuple[int, ...] | None = None
    most_stages: int = 3
    nothing_left: float = 0.003
    enough: float = 0.005
    enough_heavy: float = 0.003
    light: float = 0.5
    little: float = 0.03
    worth: float = 0.15
    first_share: float = 0.7
    start_share: float = 0.2
    much: float = 0.3
    ahead: float = 0.05
    further: float = 0.2
    race_steps: int = 200
    evaluation_draws: int = 2000
    check_draws: int = 4000
    again: int = 4
    chains: tuple[NutsSettings, ...] = (NutsSettings(), NutsSettings(draws=3000))

    @property
    def middle_rate(self) -> float:
        """The step size that is taken without a search."""
        return self.rates[len(self.rates) // 2]

    @property
    def fewest_to_search(self) -> int:
        """Steps asked for below which a search would take more than a fifth of them."""
        return 5 * len(self.rates) * self.trial_steps

    def counted(self, steps: int | None) -> tuple[int, ...]:
        """Steps of each stage where they are counted: those asked for, in two stages.

        The first is short. While a guide of rows is fresh its gradients are large. The optimiser
        remembers their squares for a thousand steps, in which it would hold theta: so it begins
        again once they are small.

        Args:
            steps: Number of steps asked for; all stages of the schedule without.
        """
        assert self.lengths is not None
        if steps is None:
            return self.lengths
        first = min(self.lengths[0], steps // 3)
        return (first, steps - first) if first else (steps,)


# What a fit goes by where no schedule is given.
DEFAULT = Schedule()
# The same for a target that has the guide of rows among its parameters. Its draws are dear, and
# none of its stages waits for a plateau.
NESTED = Schedule(lengths=(100, 200, 400, 800), again=1)
