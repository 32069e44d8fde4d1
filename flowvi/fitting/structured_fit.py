"""The result of a fit whose local latents are integrated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from flowvi.draws.draws import Draws
from flowvi.draws.structured import Units, check_units, structured_draws
from flowvi.fitting.fit_folder import STRUCTURED, Contents
from flowvi.fitting.result import Fit
from flowvi.guides.gaussian import FullRank
from flowvi.guides.guide import Guide
from flowvi.guides.prefixes import prefix_of
from flowvi.guides.structured import StructuredGuide
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets.structure import MarginalTarget

# Numbers in a table of draws by default, and the fewest and the most draws by default.
TABLE, FEWEST_DRAWS, MOST_DRAWS = 40_000_000, 400, 4000
# Random stream for the check of units.
UNIT_DRAWS = 3


@dataclass(repr=False)
class StructuredFit(Fit):
    """The result of a fit of shared latents, with local latents integrated and corrected.

    Attributes:
        target: The log density of all latents.
        guides: Guides of all latents: a guide of the shared ones, and conditionals of units.
        marginal: The density of the shared latents.
        start: The initial normal of the shared latents.
    """

    marginal: MarginalTarget = field(kw_only=True)
    _judged: Units | None = field(default=None, init=False, repr=False)

    HEAD = "{name}: structured guide ({guide} of {shared} shared latents), {seconds:.1f} s"

    def draw(
        self,
        n: int | None = None,
        seed: int = 0,
        max_memory: memory.MaxMemory = None,
        layers: int | None = None,
    ) -> Draws:
        """Draw all latents of the guide of every restart.

        `log_q` is the log density of all latents less the log weight of the draw. The weights
        are properly weighted by the estimates of each unit: their mean is the evidence.

        Args:
            n: Number of draws from each guide; 4,000 by default, fewer of over 10,000 latents.
            seed: Seed of the draws; the global generators are not changed.
            max_memory: As for `Fit.draw`.
            layers: As for `Fit.draw`.
        """
        n = check_integer("n", self.most_draws if n is None else n)
        shared = self._shared
        if layers is not None:
            shared = [prefix_of(guide, layers) for guide in shared]
        with memory.memory_limit(max_memory):
            drawn = structured_draws(self.marginal, shared, n, seed, self.meta)
            if self.marginal.structure.units == 1:
                return drawn
            # The check of units takes long where they are many: one is made for all tables.
            if self._judged is None:
                self._judged = self.units()
            return replace(drawn, units=self._judged)

    @property
    def most_draws(self) -> int:
        """Number of draws whose table has 40 million numbers; from 400 to 4,000."""
        return int(np.clip(TABLE // self.target.dim, FEWEST_DRAWS, MOST_DRAWS))

    def draw_start(self, n: int = 1000, seed: int = 0) -> Draws:
        if self.start is None:
            raise ValueError("This fit was loaded: its Gaussian start was not saved.")
        n = min(n, self.most_draws)
        start = FullRank(self.marginal.dim).to(dtype=self.target.dtype, device=self.target.device)
        start.start(self.start.loc, self.start.scale_tril)
        return structured_draws(self.marginal, [start], n, seed, {"guide": "Gaussian start"})

    def units(self, seed: int = 0) -> Units:
        """Judge the conditional of each unit by the weights of fresh draws.

        Args:
            seed: Seed of the draws.
        """
        with torch.no_grad(), isolated_rng(derive_seed(seed, UNIT_DRAWS)):
            theta, _ = self._shared[int(np.argmax(self.bounds))].sample((64,))
        return check_units(self.marginal, theta, seed)

    @property
    def _shared(self) -> list[Guide]:
        return [guide.theta for guide in self.guides if isinstance(guide, StructuredGuide)]

    def contents(self) -> Contents:
        own = self.marginal.own_state()
        return (
            super().contents()._replace(guides=self._shared, own=own, kind=STRUCTURED, chains=None)
        )
