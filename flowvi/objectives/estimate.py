"""What an objective returns, and the gradients that it may have."""

from typing import Literal, NamedTuple

from torch import Tensor

Gradient = Literal["total", "stl", "dreg"]


class Estimate(NamedTuple):
    """One evaluation of an objective, to be maximised.

    Attributes:
        bound: Estimate of the bound, (*B). Its value is the bound and its
            gradient is the chosen estimator's, so it can be summed, scaled
            and nested freely.
        log_w: Detached log weights, (K, *B), whose plain mean on the natural
            scale estimates the evidence: those of a guide's strata carry
            K times their shares.
    """

    bound: Tensor
    log_w: Tensor
