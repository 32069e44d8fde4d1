"""The last layer of a network that reads handwritten digits, given the features below it.

The features are those of a network that was trained as a whole, on the same images; then they are
kept, and the last layer has a posterior. Alpaydin and Kaynak (1998), optical recognition of
handwritten digits, as shipped with scikit-learn.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

HIDDEN, CLASSES, ROWS = 32, 10, 500
STEPS = 100


def images() -> tuple[Tensor, Tensor]:
    """All images, (1797, 64) from 0 to 1, in an order of their own, and their digits, (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "This model's data come with scikit-learn; install it by `pip install flowvi[data]`."
        ) from error
    x, digit = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float64)[order], torch.tensor(digit)[order]


def features(x: Tensor, digit: Tensor) -> nn.Module:
    """The layer below the last of a network trained on images; the generators are left alone."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh()).double()
        net = nn.Sequential(body, nn.Linear(HIDDEN, CLASSES).double())
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
        for _ in range(STEPS):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), digit).backward()
            optimiser.step()
    return body.requires_grad_(False)


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and digits of 500 images, and of the 1297 others: (500, 32), (500,), ..."""
    x, digit = images()
    body = features(x[:ROWS], digit[:ROWS])
    hidden = body(x)
    return hidden[:ROWS], digit[:ROWS], hidden[ROWS:], digit[ROWS:]


def data() -> tuple[Tensor, Tensor]:
    """Features and digits of the images that the network was trained on, (500, 32) and (500,)."""
    return split()[:2]


def model(x: Tensor, digit: Tensor | None = None) -> None:
    zero = x.new_zeros(CLASSES, HIDDEN)  # priors take their precision from the data
    weight = pyro.sample("weight", dist.Normal(zero, 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(zero[:, 0], 1.0).to_event(1))
    with pyro.plate("image", len(x)):
        pyro.sample("digit", dist.Categorical(logits=x @ weight.mT + bias), obs=digit)
