"""Settings of training on minibatches of rows, and its step-size and warm-up schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from flowvi.objectives.renyi_bound import Renyi
from flowvi.objectives.reweighted import WakeSleep
from flowvi.runtime.arguments import check_choice, check_integer, check_positive
from flowvi.targets import Batch, LocalTarget

# Length of the step size's warm-up in steps, and its final value relative to `lr`.
WARM_UP = 200
LAST = 0.02
# Least value of beta, which is a divisor.
LEAST_BETA = 1e-3
COUNTS = {"batch_size": 1, "epochs": 1, "warmup_epochs": 0, "drops": 0, "workers": 0}
# Factor of the step size when the validation bound has stopped rising.
DROP = 0.3
# Settings of a training to the plateau: a limit that few reach, and when a bound rises no more.
PLATEAU: dict[str, Any] = {"epochs": 1000, "patience": 10, "drops": 2}

Warm = Literal["linear", "cyclical"]


@dataclass(frozen=True)
class Minibatch:
    r"""Settings of training on minibatches of rows.

    With a weight :math:`\beta < 1` a step maximises
    :math:`E_q[\log p(x \mid z) + \beta (\log p(z) - \log q(z))]`, and with free bits
    :math:`\lambda` it replaces the batch's mean divergence by
    :math:`\max(\lambda, \mathrm{KL})`. Neither is a bound. Both are used in training only, and
    every reported value is the bound itself.

    Args:
        batch_size: Largest number of rows of a step; batches have nearly equal sizes.
        epochs: Number of passes over the rows.
        lr: Step size of Adam.
        decay: Final share of the steps, in which the step size falls linearly to 2 %.
        warmup_epochs: Epochs over which beta rises to one.
        warmup: "linear" rises once. "cyclical" splits all epochs into four cycles and rises in
            the first half of each; it needs a positive warmup_epochs.
        free_bits: Nats of divergence without a penalty, in total over the latents of a row.
        patience: Epochs without a better validation bound before training ends. None: no limit.
            Epochs in which beta is below one do not count.
        drops: How often, before training ends for lack of patience, the step size falls to 30 %
            instead. Training then goes on from the best epoch.
        transform: Function applied to every training batch at every visit. Its random numbers
            come from torch's generator, which the fit seeds.
        workers: Processes that fetch items of a `Dataset`.
        amp: Whether to use automatic mixed precision with bfloat16; on a GPU only.

    References:
        Bowman et al. (2016), arXiv:1511.06349, Sønderby et al. (2016), arXiv:1602.02282: warm-up.
        Fu et al. (2019), arXiv:1903.10145: cyclical warm-up.
        Kingma et al. (2016), arXiv:1606.04934, section C.8: free bits.
    """

    batch_size: int = 100
    epochs: int = 40
    lr: float = 1e-3
    decay: float = 0.5
    warmup_epochs: int = 0
    warmup: Warm = "linear"
    free_bits: float = 0.0
    patience: int | None = None
    drops: int = 0
    transform: Callable[..., Any] | None = None
    workers: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        for name, least in COUNTS.items():
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least))
        if not self.free_bits >= 0:
            raise ValueError(f"free_bits must not be negative; got {self.free_bits}.")
        check_positive("lr", self.lr)
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1]; got {self.decay}.")
        if self.patience is not None:
            object.__setattr__(self, "patience", check_integer("patience", self.patience))
        check_choice("warmup", self.warmup, ("linear", "cyclical"))
        if self.drops and self.patience is None:
            raise ValueError("drops says what happens when patience is exhausted: set patience.")

    @classmethod
    def to_plateau(cls, **settings: Any) -> Minibatch:
        """Settings that train until the validation bound stops rising.

        The step size falls to 30 % when ten epochs have brought no better bound, and again after
        another ten; the next ten end the training. `epochs` is only a limit, over the last half
        of which the step size falls too.

        Args:
            **settings: Of `Minibatch`, in place of these.
        """
        return cls(**{**PLATEAU, **settings})

    def rate(self, step: int, steps: int) -> float:
        """Step size: a short linear warm-up, a constant part, a linear decay.

        Args:
            step: Index of the step, from 0.
            steps: Total number of steps.
        """
        rising = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 10)))
        done = step / steps
        falling = max(0.0, done - (1 - self.decay)) / self.decay if self.decay else 0.0
        return self.lr * rising * (1 - (1 - LAST) * falling)

    def beta(self, epoch: float) -> float:
        """Weight of the prior and the guide after a number of epochs."""
        if not self.warmup_epochs:
            return 1.0
        if self.warmup == "linear":
            return min(1.0, max(LEAST_BETA, epoch / self.warmup_epochs))
        cycle = self.epochs / 4
        return min(1.0, max(LEAST_BETA, 2 * (epoch % cycle) / cycle))

    def transformed(self, batch: Batch) -> Batch:
        """Return the batch after the transform."""
        if self.transform is None:
            return batch
        data = self.transform(*batch.data)
        return Batch(batch.places, (data,) if isinstance(data, Tensor) else tuple(data))


def check_objective(target: LocalTarget, objective: Any, settings: Minibatch) -> None:
    """Raise a ValueError for an objective that is not defined for rows."""
    if not isinstance(objective, Renyi | WakeSleep):
        raise ValueError(
            "Rows need an objective that draws its own samples, such as elbo(), iwelbo(16) or "
            f"wake_sleep(16); got {type(objective).__name__}."
        )
    special = settings.warmup_epochs > 0 or settings.free_bits > 0
    if special and not target.has_parts:
        raise ValueError(
            f"warmup_epochs and free_bits weigh the prior of z, but the density of {target.name} "
            "has no separate likelihood and prior: it is written by hand, or sums out "
            "discrete latents."
        )
    if settings.free_bits > 0 and not (isinstance(objective, Renyi) and objective.alpha == 1.0):
        raise ValueError("free_bits are for the ELBO: use elbo(), or leave them out.")
    if target.shared is not None:
        names = ", ".join(f"'{name}'" for name in target.shared.sites)
        raise ValueError(
            f"{names} of {target.name} are latents that all rows share: a guide for rows leaves "
            "them out. Fit nested(target, guide), whose posterior is over both, or make them "
            "parameters (pyro.param)."
        )
