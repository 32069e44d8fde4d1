"""How posterior moments change as the prior or the likelihood is given a little more weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flowvi.compat import arviz_stats
from flowvi.diagnostics.pareto import psislw
from flowvi.runtime.display import Printed

# Powers of the prior, or of the likelihood, that are compared with 1.
POWERS = (0.99, 1.01)
# A sensitivity from here on is worth a look; one below is weak.
LIMIT = 0.05
PRIOR, LIKELIHOOD = "prior", "likelihood"
FINE, DOMINATES, CONFLICT = "", "the prior dominates", "prior and data disagree"


class Scaling(NamedTuple):
    """Weights of draws for one power of a component.

    Attributes:
        power: The power.
        weights: Smoothed weights, which add up to one, (S).
        khat: Pareto shape of the weights.
    """

    power: float
    weights: np.ndarray
    khat: float


@dataclass(frozen=True, repr=False)
class Sensitivity(Printed):
    """Sensitivity of each scalar to power-scaling of the prior and of the likelihood, (P) each.

    Attributes:
        labels: Names of the scalars.
        prior: Sensitivity to the power of the prior.
        likelihood: Sensitivity to the power of the likelihood.
        khat: Pareto k-hat of the weights of each power, by component.
        khat_threshold: Limit of k-hat.
        limit: Sensitivities from here on are reported.
        draws: Number of draws.
        title: Description of the fit.
        doubts: Reasons not to rely on these numbers.
        scaled: Latent sites whose prior is scaled.
    """

    labels: tuple[str, ...]
    prior: np.ndarray
    likelihood: np.ndarray
    khat: Mapping[str, tuple[float, ...]]
    khat_threshold: float
    limit: float
    draws: int
    title: str = ""
    doubts: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()

    def only(self, labels: Collection[str]) -> Sensitivity:
        """The same for some of the scalars."""
        places = [i for i, label in enumerate(self.labels) if label in labels]
        kept = tuple(self.labels[i] for i in places)
        likelihood = self.likelihood[places]
        return replace(self, labels=kept, prior=self.prior[places], likelihood=likelihood)

    @property
    def findings(self) -> tuple[str, ...]:
        """What is to be said of each scalar; empty where nothing is."""
        return tuple(self._finding(p, q) for p, q in zip(self.prior, self.likelihood, strict=True))

    @property
    def reliable(self) -> bool:
        """Whether the weights of every power are reliable, and so are the draws."""
        worst = max(k for values in self.khat.values() for k in values)
        return worst < self.khat_threshold and not self.doubts

    def _finding(self, prior: float, likelihood: float) -> str:
        if not prior >= self.limit:
            return FINE
        return CONFLICT if likelihood >= self.limit else DOMINATES

    def __str__(self) -> str:
        found = [(x, y) for x, y in zip(self.labels, self.findings, strict=True) if y]
        head = "The data outweigh the prior" if not found else "The prior matters"
        lines = [f"{head}: {self.title}" if self.title else head]
        by_words: dict[str, list[str]] = {}
        for label, words in found:
            by_words.setdefault(words, []).append(label)
        for words, labels in by_words.items():
            more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
            lines.append(f"  - {', '.join(labels[:NAMED])}{more}: {words}")
        order = np.argsort(-np.nan_to_num(self.prior), kind="stable")[:SHOWN]
        width = max([len(self.labels[i]) for i in order] + [8])
        lines.append(f"  {'':<{width}} {'prior':>9} {'likelihood':>11}")
        lines += [
            f"  {self.labels[i]:<{width}} {self.prior[i]:9.3f} {self.likelihood[i]:11.3f}"
            for i in order
        ]
        if len(self.labels) > len(order):
            lines.append(f"  and {len(self.labels) - len(order)} more, less sensitive to the prior")
        worst = max(k for values in self.khat.values() for k in values)
        judged = "reliable" if worst < self.khat_threshold else "not reliable"
        lines.append(
            f"  sensitive from {self.limit:g} on; weights {judged}, largest k-hat {worst:.2f}"
        )
        return "\n".join([*lines, *(f"  - {doubt}" for doubt in self.doubts)])


# Scalars in a sentence, and in the table.
NAMED, SHOWN = 6, 20


def power_scaling(component: np.ndarray, power: float) -> Scaling:
    """Weights that turn draws of a posterior into those with a power of a component.

    Args:
        component: Log prior, or log likelihood, of each draw, (S).
        power: The power, near one.

    References:
        Kallioinen, Paananen, Buerkner and Vehtari (2024), "Detecting and diagnosing prior and
        likelihood sensitivity with power-scaling", Statistics and Computing 34, arXiv:2107.14054.
    """
    count = len(component)
    if np.ptp(component) == 0:
        return Scaling(power, np.full(count, 1 / count), -math.inf)
    # The tail is that of `arviz_stats.psense`, which estimates the efficiency of the draws.
    ratio = arviz_stats.ess(component[None], "tail") / count
    tail = math.floor(3 * math.sqrt(count / ratio)) if count * ratio > 225 else count // 5
    tail = max(min(tail, count // 2), 5)
    log_w, khat = psislw(((power - 1) * component)[None], tail)
    return Scaling(power, np.exp(log_w[0]), float(khat[0]))


def sensitivities(x: np.ndarray, scalings: Sequence[Scaling]) -> np.ndarray:
    r"""Change of each column per doubling of the power, (P).

    The distance of the distributions is the square root of the cumulative Jensen-Shannon
    divergence, relative to its upper bound, and the change is its mean slope in
    :math:`\log_2` of the power.

    Args:
        x: Draws, (S, P).
        scalings: Weights for powers below and above one.
    """
    found = np.zeros(x.shape[1])
    for column in range(x.shape[1]):
        slopes = [
            max(cjs_distance(sign * x[:, column], s.weights) for sign in (1.0, -1.0))
            / abs(math.log2(s.power))
            for s in scalings
        ]
        found[column] = np.mean(slopes)
    return found


def cjs_distance(x: np.ndarray, weights: np.ndarray) -> float:
    """Cumulative Jensen-Shannon distance of draws with equal weights and with others, 0 to 1.

    Args:
        x: Draws, (S).
        weights: Weights, which add up to one, (S).

    References:
        Nguyen and Vreeken (2015), "Non-parametric Jensen-Shannon divergence", ECML PKDD.
    """
    order = np.argsort(x)
    width = np.diff(x[order])
    p = np.linspace(1 / len(x), 1 - 1 / len(x), len(x) - 1)
    q = np.cumsum(weights[order])[:-1]
    p_sum, q_sum = float(p @ width), float(q @ width)
    middle = _log2(0.5 * (p + q))
    rest = 0.5 / math.log(2) * (q_sum - p_sum)
    forward = max(0.0, float((width * p) @ (_log2(p) - middle)) + rest)
    backward = max(0.0, float((width * q) @ (_log2(q) - middle)) - rest)
    total = p_sum + q_sum
    return math.sqrt((forward + backward) / total) if total > 0 else 0.0


def _log2(x: np.ndarray) -> np.ndarray:
    return np.log2(x, out=np.zeros_like(x), where=x > 0)
