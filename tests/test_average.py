"""Predictions of several models are averaged by weights of the evidence or of stacking."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import flowvi
from flowvi.analysis.compare import Model, ModelComparison
from flowvi.draws.prediction import Prediction


def prediction(value: float, draws: int = 100) -> Prediction:
    y = np.full((2, draws // 2, 3), value) + np.arange(draws).reshape(2, -1, 1) / 1000
    return Prediction({"y": y, "own": y[..., 0]}, {"y": np.full(y.shape, -value)})


@pytest.fixture
def both():
    return {"one": prediction(0.0), "two": prediction(1.0)}


def comparison(**changes) -> ModelComparison:
    models = tuple(Model(n, -1.0, 0.1, 0.0, 0.0, p) for n, p in (("two", 0.7), ("one", 0.3)))
    table = pd.DataFrame({"weight": [0.9, 0.1]}, index=["one", "two"])
    return replace(ModelComparison(models, table), **changes)


def test_each_model_has_its_share_of_the_draws(both):
    found = flowvi.average(both, {"one": 3.0, "two": 1.0})

    assert found["y"].shape == (1, 100, 3)
    assert (found["y"] < 0.5).all(-1).sum() == 75
    # No draw is taken twice before all are.
    assert len(np.unique(found["own"])) == 100
    assert flowvi.average(both, {"one": 0.0, "two": 1.0}, n=7)["y"].min() >= 1.0


def test_shares_are_right_on_average(both):
    counts = [
        (flowvi.average(both, {"one": 1.0, "two": 2.0}, n=10, seed=i)["own"] < 0.5).sum()
        for i in range(300)
    ]

    assert set(counts) == {3, 4} and abs(np.mean(counts) - 10 / 3) < 4 * 0.48 / math.sqrt(300)


def test_weights_of_a_comparison(both):
    by = {
        how: (flowvi.average(both, comparison(), by=how)["own"] < 0.5).mean()
        for how in ("stacking", "evidence")
    }

    assert by == {"stacking": pytest.approx(0.9), "evidence": pytest.approx(0.3)}


def test_densities_are_those_of_the_mixture(both):
    found = flowvi.average(both, {"one": 0.5, "two": 0.5}).log_density("y")

    np.testing.assert_allclose(found, math.log((1 + math.exp(-1)) / 2))


def test_what_does_not_fit_is_refused(both):
    no_evidence = tuple(replace(m, probability=math.nan) for m in comparison().models)
    refused = [
        (({"one": both["one"]}, {"one": 1.0, "two": 1.0}), {}, "names of the predictions, one"),
        ((both, {"one": -1.0, "two": 2.0}), {}, "at least 0"),
        ((both, comparison(loo=None)), {}, "no leave-one-out scores"),
        ((both, comparison(models=no_evidence)), {"by": "evidence"}, "'two' has no evidence"),
        ((both, comparison()), {"by": "magic"}, "by"),
        (({**both, "two": Prediction({"z": np.zeros((1, 5))}, {})}, both_equal()), {}, "no site"),
        (({**both, "two": shorter()}, both_equal()), {}, "different shapes"),
    ]

    for args, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            flowvi.average(*args, **settings)


def test_missing_weights_and_other_types_are_said_in_one_sentence(both):
    refused = [
        ((both,), TypeError, "average needs weights of the models: the result of compare, or a "),
        (([both["one"]],), TypeError, "predictions must be a dictionary of predictions by name; "),
        ((both, 0.5), TypeError, "weights must be the result of compare, or a weight for each "),
        (({},), ValueError, "predictions must hold the predictions of a model at least; got none"),
    ]
    for args, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            flowvi.average(*args)
        assert str(caught.value).count(".") == 1


def both_equal():
    return {"one": 1.0, "two": 1.0}


def shorter() -> Prediction:
    return Prediction({"y": np.zeros((1, 5, 2))}, {})
