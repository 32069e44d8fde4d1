"""The result of an objective, and the names of gradient estimators."""

from typing import Literal, NamedTuple

from torch import Tensor

Gradient = Literal["total", "stl", "dreg"]


class Estimate(NamedTuple):
    """One evaluation of an objective, to be maximised.

    Attributes:
        bound: Estimate of the bound, (*B). Its value is the bound, and its gradient
            is the chosen estimator's. It can be summed, scaled and nested freely.
        log_w: Detached log weights, (K, *B). The plain mean of the weights estimates
            the evidence. Log weights of a guide's strata include the log of K times
            their shares.
    """

    bound: Tensor
    log_w: Tensor
