"""Logistic regression: is a breast tumour benign, from thirty standardised measurements.

Street, Wolberg and Mangasarian (1993), "Nuclear feature extraction for breast tumor diagnosis";
the Wisconsin diagnostic set, as shipped with scikit-learn.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

MEASURES = [
    "radius",
    "texture",
    "perimeter",
    "area",
    "smoothness",
    "compactness",
    "concavity",
    "concave points",
    "symmetry",
    "fractal dimension",
]


def data() -> tuple[Tensor, Tensor]:
    """Predictors with mean 0 and sd 1, (569, 30), and 1 for a benign tumour, (569,)."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ImportError(
            "This model's data come with scikit-learn; install it by `pip install flowvi[data]`."
        ) from error
    predictors, benign = load_breast_cancer(return_X_y=True)
    predictors = (predictors - predictors.mean(0)) / predictors.std(0)
    return torch.tensor(predictors), torch.tensor(benign, dtype=torch.float64)


def model(predictors: Tensor, benign: Tensor) -> None:
    zero = predictors.new_zeros(())
    intercept = pyro.sample("intercept", dist.Normal(zero, 5.0))
    with pyro.plate("feature", predictors.shape[-1]):
        weight = pyro.sample("weight", dist.Normal(zero, 1.0))
    with pyro.plate("tumour", len(benign)):
        logits = intercept + predictors @ weight
        pyro.sample("benign", dist.Bernoulli(logits=logits), obs=benign)


coords = {
    "feature": [
        *(f"mean {measure}" for measure in MEASURES),
        *(f"{measure} error" for measure in MEASURES),
        *(f"worst {measure}" for measure in MEASURES),
    ]
}
