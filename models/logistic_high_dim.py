"""Logistic regression on a thousand predictors: is a digit odd, from products of its pixels.

Alpaydin and Kaynak (1998), optical recognition of handwritten digits, as shipped with scikit-learn.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

PIXELS, ROWS = 44, 1000
SCALE = 0.1


def predictors() -> tuple[Tensor, Tensor]:
    """All images: the pixels that vary most and their products, (1797, 990), and 1 for odd."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "This model's data come with scikit-learn; install it by `pip install flowvi[data]`."
        ) from error
    images, digit = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float64)
    x = x[:, x.std(0).argsort(descending=True)[:PIXELS].sort().values]
    x = (x - x.mean(0)) / x.std(0)
    first, second = torch.combinations(torch.arange(PIXELS)).T
    whole = torch.cat([x, x[:, first] * x[:, second]], 1)
    return (whole - whole.mean(0)) / whole.std(0), torch.tensor(digit % 2).double()


def data() -> tuple[Tensor, Tensor]:
    """The first thousand images, (1000, 990) and (1000,); the others are there to predict."""
    x, odd = predictors()
    return x[:ROWS], odd[:ROWS]


def model(x: Tensor, odd: Tensor | None = None) -> None:
    zero = x.new_zeros(())  # priors take their precision from the data
    intercept = pyro.sample("intercept", dist.Normal(zero, 1.0))
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), SCALE).to_event(1))
    with pyro.plate("image", len(x)):
        pyro.sample("odd", dist.Bernoulli(logits=intercept + x @ weight), obs=odd)
