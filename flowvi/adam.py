"""The optimiser of all fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MEMORY, SQUARES, LEAST = 0.9, 0.999, 1e-8


class Adam:
    r"""Adam, as one fused operation on all parameters.

    With gradient g, step size :math:`\eta` and number of the step t,

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        \theta \leftarrow \theta - \eta\,
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}.

    The bits are those of `torch.optim.Adam(fused=True)`, which takes twice the time of a step
    and loads torch's compiler first, two seconds of every process.

    Args:
        parameters: What is trained, changed in place; all of one precision.

    References:
        Kingma and Ba (2015), "Adam: A method for stochastic optimization", arXiv:1412.6980.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._sizes = [p.numel() for p in self.parameters]
        self._means = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self._squares = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self._steps = [torch.zeros((), device=p.device, dtype=torch.float32) for p in self._means]

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        """Take a step against a gradient, that of all parameters in one vector."""
        parts = gradient.split(self._sizes)
        torch._foreach_add_(self._steps, 1)
        torch._fused_adam_(
            self.parameters,
            [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)],
            self._means,
            self._squares,
            [],
            self._steps,
            lr=lr,
            beta1=MEMORY,
            beta2=SQUARES,
            weight_decay=0.0,
            eps=LEAST,
            amsgrad=False,
            maximize=False,
        )

    def state(self) -> dict[str, list[Tensor]]:
        """A copy of all that later steps depend on, beside the parameters."""
        held = {"means": self._means, "squares": self._squares, "steps": self._steps}
        return {name: [t.clone() for t in tensors] for name, tensors in held.items()}

    def restore(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Be as when a state was taken."""
        held = {"means": self._means, "squares": self._squares, "steps": self._steps}
        for name, tensors in held.items():
            for mine, kept in zip(tensors, state[name], strict=True):
                mine.copy_(kept)
