"""The schedule of a fit: numbers of steps, step sizes, and stopping thresholds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowvi.runtime.arguments import check_integer, check_positive
from flowvi.samplers.nuts import NutsSettings

# Fields that count something, at least one. A check of zero draws is left out.
COUNTS = (
    *("trial_steps", "steady_steps", "few_steps", "least_decay", "most_stages", "race_steps"),
    *("evaluation_draws", "again", "ready_steps", "polish_steps"),
)


@dataclass(frozen=True)
class Schedule:
    """Numbers of steps, step sizes, and thresholds that end the training.

    A fit trains in stages: steps of constant size until a plateau, then steps of
    falling size. Each stage doubles the draws and halves the step size. With `lengths`
    the numbers of steps are fixed, and the step size is halved only after a stage without a gain.

    Gaps are importance-sampling estimates of KL(q || p), in nats.

    Args:
        rates: Step sizes to try, the largest first; the middle one is the default.
        trial_steps: Steps of each trial.
        convincing: Share of the gap that a trial has to remove to be the last one.
        trial_share: Share of a time budget at which trials end.
        search_seconds: Least remaining time in seconds for a search of the step size.
        little_rate: Step size where the gap is below `little`.
        skew_rate: Step size of skews, each of which has a gradient of its own.
        steady_steps: Largest number of steps of constant size in a stage.
        few_steps: The same limit for a stage that begins with a gap below `little`.
        least_decay: Least number of steps of the decay, which otherwise has half as many steps
            as the constant part.
        lengths: Fixed numbers of steps of the stages; None if stages end at plateaus.
        most_stages: Largest number of stages that end at plateaus.
        ready: A gap, estimated from the noise of the last `ready_steps` steps, at which a stage
            goes over to steps of falling size without waiting for a plateau. A stage that begins
            with such a gap has no others.
        ready_steps: Steps behind that estimate.
        polish_steps: Steps of falling size for a guide that is good enough where it starts.
        nothing_left: A gap below which the initial Gaussian needs no flow.
        spare: The same threshold where the check trusts the Gaussian's draws as they are.
        enough: A gap below which training ends: the error of a mean is then below 0.15 sd.
        enough_heavy: The same threshold where k-hat is not below `light`.
        enough_beyond: The same threshold where k-hat is not below `heavy`.
        light: Largest k-hat of weights with a light tail.
        heavy: Largest k-hat of weights whose mean can be relied on.
        little: A gap below which `little_rate` and `few_steps` are used.
        worth: Share of the gap that a stage has to remove for another one to follow.
        first_share: Share of a time budget for the first guide, if other guides may follow.
        start_share: Share of a time budget for the search for a start.
        much: A gap above which couplings are compared with couplings plus skews.
        ahead: Required lead of skews in nats after the step-size trials.
        further: Required lead of skews in nats after `race_steps` more steps.
        race_steps: Steps of the comparison.
        evaluation_draws: Draws by which guides are compared.
        check_draws: Draws of the check, as many as `Fit.draw` makes.
        again: Factor of the number of check draws where the first result is uncertain.
        chains: Settings of the Markov chains for untrusted guides, tried in order.
    """

    rates: tuple[float, ...] = (1e-2, 5e-3, 1e-3)
    trial_steps: int = 60
    convincing: float = 0.3
    trial_share: float = 0.5
    search_seconds: float = 30.0
    little_rate: float = 1e-2
    skew_rate: float = 1e-2
    steady_steps: int = 1000
    few_steps: int = 400
    least_decay: int = 100
    lengths: tuple[int, ...] | None = None
    most_stages: int = 3
    ready: float = 0.05
    ready_steps: int = 50
    polish_steps: int = 50
    nothing_left: float = 0.003
    spare: float = 0.01
    enough: float = 0.01
    enough_heavy: float = 0.006
    enough_beyond: float = 0.001
    light: float = 0.5
    heavy: float = 0.7
    little: float = 0.3
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

    def __post_init__(self) -> None:
        for name in COUNTS:
            check_integer(name, getattr(self, name))
        for name, values in (("rates", self.rates), ("lengths", self.lengths or (1,))):
            if not isinstance(values, tuple) or not values:
                raise ValueError(f"{name} must be a tuple of at least one number; got {values!r}.")
        for rate in self.rates:
            check_positive("rates", rate)
        for length in self.lengths or ():
            check_integer("lengths", length)

    @property
    def middle_rate(self) -> float:
        """The step size used without a search."""
        return self.rates[len(self.rates) // 2]

    @property
    def fewest_to_search(self) -> int:
        """Number of steps below which a search would take more than a fifth of them."""
        return 5 * len(self.rates) * self.trial_steps

    def counted(self, steps: int | None) -> tuple[int, ...]:
        """Return the fixed lengths of the stages; a number of steps is split into two stages.

        The first stage is short. The gradients of a fresh guide of rows are large, and Adam
        averages their squares over about a thousand steps, which would slow the training of
        theta. The second stage therefore restarts Adam.

        Args:
            steps: Number of steps asked for; None selects the lengths of the schedule.
        """
        assert self.lengths is not None
        if steps is None:
            return self.lengths
        first = min(self.lengths[0], steps // 3)
        return (first, steps - first) if first else (steps,)


# Numbers of latents up to which an uncertain check takes more draws, and from which any check has
# few, where each draw integrates the local latents.
SMALL, LARGE = 200, 30_000

# Draws of the check of a chain or a field; a verdict needs 400 effective ones.
FEW_OF_ONE = 800

# The default schedule.
DEFAULT = Schedule()
# The default for a target whose parameters include the guide of rows. Its draws are
# expensive, and its stages have fixed lengths.
NESTED = Schedule(lengths=(100, 200, 400, 800), again=1)
# Rows times draws of a density of many rows by which guides are compared, and checked; and the
# fewest draws that are enough for either.
COMPARED_ROWS, CHECKED_ROWS = 4 * 10**8, 10**9
FEWEST_COMPARED, FEWEST_CHECKED = 400, 1000


def of_rows(rows: int) -> Schedule:
    """The default for a target of many rows of data: fewer draws where each takes long.

    Args:
        rows: Number of rows.
    """
    compared = min(max(COMPARED_ROWS // rows, FEWEST_COMPARED), DEFAULT.evaluation_draws)
    checked = min(max(CHECKED_ROWS // rows, FEWEST_CHECKED), DEFAULT.check_draws)
    return replace(DEFAULT, evaluation_draws=compared, check_draws=checked)


def structured(dim: int, shared: int, one: bool = False) -> Schedule:
    """The default for shared latents whose density integrates many local ones.

    Args:
        dim: Number D of all latents; the more there are, the fewer draws.
        shared: Number of shared latents, whose covariance needs many draws.
        one: Whether the local latents are one chain or field, whose draws take many steps each.
    """
    few = 500 if dim >= LARGE else max(1000, 100 * shared)
    return Schedule(
        evaluation_draws=min(2000, max(200, 2_000_000 // dim)),
        check_draws=min(FEW_OF_ONE if one else 4000, max(few, 400_000 // dim)),
        again=4 if dim <= SMALL else 2 if one else 1,
    )
