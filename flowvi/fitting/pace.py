"""What a draw costs, and what of a time budget is therefore left for other things than steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flowvi.runtime.clock import Clock
from flowvi.samplers.tempering import EVALUATIONS
from flowvi.training.evaluation import particles_of
from flowvi.training.settings import Settings

# Largest share of a time budget for what follows the training: comparisons of iterates and the
# check; and the fewest draws of each.
RESERVED, FEWEST_DRAWS = 0.2, 400
# Comparisons of iterates after a stage: its start, its end, and their average.
COMPARED = 3
# Of the time that is left, the shares that annealing, a search of the step size, and short
# chains may take.
ANNEALED, SEARCHED, ASKED = 0.5, 0.3, 0.25
# A gradient takes about as long as the density.
WITH_GRADIENT = 2


@dataclass
class Pace:
    """Measures the time of a draw, and keeps a part of a time budget for what follows training.

    Args:
        clock: Clock of the fit.

    Attributes:
        a_draw: Seconds of a draw and its density; 0 without a budget.
    """

    clock: Clock
    a_draw: float = 0.0

    def reserve(self, settings: Settings, evaluate: Callable[[Settings], object]) -> Settings:
        """Reserve the time of what follows the training of a guide.

        Args:
            settings: The settings of the fit.
            evaluate: Evaluates the guide by the draws of given settings.

        Returns:
            The settings, with fewer draws where these would take too long.
        """
        clock, schedule = self.clock, settings.schedule
        if clock.budget is None:
            return settings
        before, draws = clock.seconds, min(FEWEST_DRAWS, schedule.evaluation_draws)
        evaluate(replace(settings, schedule=replace(schedule, evaluation_draws=draws)))
        self.a_draw = (clock.seconds - before) / draws
        most = RESERVED * clock.budget
        share = most / max(self._following(settings), 1e-9)
        if share < 1.0:
            few = replace(
                schedule,
                evaluation_draws=_fewer(schedule.evaluation_draws, share),
                check_draws=_fewer(schedule.check_draws, share),
                again=1,
            )
            settings = replace(settings, schedule=few)
        clock.reserved = min(self._following(settings), most)
        return settings

    def has_time_to_anneal(self) -> bool:
        """Whether annealing from a wide start would leave enough time."""
        seconds = WITH_GRADIENT * self.a_draw * EVALUATIONS
        return seconds <= ANNEALED * self.clock.seconds_left

    def has_time_for(self, gradients: int) -> bool:
        """Whether a number of gradients of the density leaves most of the time."""
        return WITH_GRADIENT * self.a_draw * gradients <= ASKED * self.clock.seconds_left

    def has_time_to_search(self, settings: Settings) -> bool:
        """Whether trials of step sizes, for two guides, would leave enough time."""
        schedule = settings.schedule
        steps = schedule.trial_steps * settings.repeats * particles_of(settings.objective)
        draws = 2 * len(schedule.rates) * (schedule.evaluation_draws + WITH_GRADIENT * steps)
        return draws * self.a_draw <= SEARCHED * self.clock.seconds_left

    def _following(self, settings: Settings) -> float:
        schedule = settings.schedule
        return self.a_draw * (COMPARED * schedule.evaluation_draws + schedule.check_draws)


def _fewer(draws: int, share: float) -> int:
    return min(draws, max(FEWEST_DRAWS, int(share * draws)))
