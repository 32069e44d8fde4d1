"""Predictions averaged over several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flowvi.analysis.compare import ModelComparison
from flowvi.draws.prediction import Prediction
from flowvi.runtime.arguments import check_choice, check_integer, check_type, optional

EVIDENCE, STACKING = "evidence", "stacking"
EXPECTED = "the result of compare, or a weight for each name"


def average(
    predictions: Mapping[str, Prediction],
    weights: ModelComparison | Mapping[str, float] | None = None,
    *,
    by: str = STACKING,
    n: int | None = None,
    seed: int = 0,
) -> Prediction:
    """Average predictions over models: a mixture of their predictive distributions.

    Each model contributes draws in proportion to its weight. Weights by the evidence are the
    posterior probabilities of the models; they suit the case in which one of them is true. Those
    by stacking maximise the leave-one-out score of the mixture, and need no true model.

    Args:
        predictions: Results of `predict` on the same new arguments, by the names of the models.
        weights: Result of `compare` of these models, or weights by name, which are normalised.
            One of them has to be given.
        by: "stacking" or "evidence", for a result of `compare`.
        n: Number of draws; by default that of the largest prediction.
        seed: Seed of the choice of draws.

    Returns:
        Draws of the mixture as one chain, with the sites that all models predict.

    Raises:
        ValueError: The names, shapes or weights do not fit together.

    References:
        Yao, Vehtari, Simpson and Gelman (2018), "Using stacking to average Bayesian predictive
        distributions", Bayesian Analysis 13(3), arXiv:1704.02030.
    """
    check_type("predictions", predictions, Mapping, "a dictionary of predictions by name")
    for name, prediction in predictions.items():
        check_type(f"predictions['{name}']", prediction, Prediction, "a result of predict")
    if not predictions:
        raise ValueError("predictions must hold the predictions of a model at least; got none.")
    if weights is None:
        raise TypeError(f"average needs weights of the models: {EXPECTED}.")
    check_type("weights", weights, (ModelComparison, Mapping), EXPECTED)
    optional(check_integer, "n", n)
    known = _weights(weights, by) if isinstance(weights, ModelComparison) else dict(weights)
    if set(known) != set(predictions):
        raise ValueError(
            f"weights must have the names of the predictions, {', '.join(predictions)}; got "
            f"{', '.join(known)}."
        )
    share = np.array([float(known[name]) for name in predictions])
    if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise ValueError(f"weights must be at least 0 and finite, and not all 0; got {known}.")
    sizes = [np.prod(next(iter(p.values.values())).shape[:2]) for p in predictions.values()]
    total = n or int(max(sizes))
    rng = np.random.default_rng(seed)
    chosen = [
        _places(count, int(size), rng)
        for count, size in zip(_counts(share / share.sum(), total, rng), sizes, strict=True)
    ]
    order = rng.permutation(total)
    values = _mixed([p.values for p in predictions.values()], chosen, order)
    scores = _mixed([p.log_likelihood for p in predictions.values()], chosen, order)
    if not values:
        raise ValueError(
            "The models predict no site of the same name: "
            + "; ".join(f"{name} predicts {', '.join(p.values)}" for name, p in predictions.items())
            + "."
        )
    return Prediction(values, scores)


def _weights(comparison: ModelComparison, by: str) -> dict[str, float]:
    if check_choice("by", by, [STACKING, EVIDENCE]) == EVIDENCE:
        # A model without an evidence has no probability.
        lacking = [m.name for m in comparison.models if not np.isfinite(m.probability)]
        if lacking:
            raise ValueError(
                f"'{lacking[0]}' has no evidence, hence no weight by it: use by='stacking', or "
                "weights of your own."
            )
        return {m.name: m.probability for m in comparison.models}
    if comparison.loo is None:
        raise ValueError(
            "These models have no leave-one-out scores to stack by: use by='evidence', or weights "
            "of your own."
        )
    return {str(name): float(weight) for name, weight in comparison.loo["weight"].items()}


def _counts(share: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of draws of each model, whose sum is the total and whose means are its shares."""
    ends = np.floor(np.concatenate([[0.0], np.cumsum(share)]) * total + rng.random())
    ends[-1] = total + ends[0]
    return np.diff(ends).astype(int)


def _places(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Places of draws, each one as often as the others, or by one less."""
    whole, rest = divmod(count, size)
    return np.concatenate([*([np.arange(size)] * whole), rng.permutation(size)[:rest]]).astype(int)


def _mixed(
    tables: Sequence[Mapping[str, np.ndarray]], chosen: list[np.ndarray], order: np.ndarray
) -> dict[str, np.ndarray]:
    """The chosen draws of the sites that all tables have, as one chain."""
    found = {}
    for name in tables[0]:
        if not all(name in table for table in tables):
            continue
        shapes = [table[name].shape[2:] for table in tables]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"The models predict '{name}' for rows of different shapes, "
                f"{', '.join(map(str, shapes))}: predict for the same new arguments."
            )
        parts = [
            table[name].reshape(-1, *shapes[0])[places]
            for table, places in zip(tables, chosen, strict=True)
        ]
        found[name] = np.concatenate(parts)[order][None]
    return found
