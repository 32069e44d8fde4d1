"""The optimiser of all fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowvi.training.flat import flatten_tensors

MEMORY, SQUARES, LEAST = 0.9, 0.999, 1e-8


class Adam:
    r"""Adam, as one fused operation on all parameters.

    With gradient g, step size :math:`\eta` and step number t,

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        \theta \leftarrow \theta - \eta\,
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}.

    The results equal those of `torch.optim.Adam(fused=True)` to the bit. That class is far
    slower for the many small tensors of a flow, and its import loads torch's compiler.

    Args:
        parameters: The trained parameters, changed in place; all of one precision.

    References:
        Kingma and Ba (2015), "Adam: A method for stochastic optimization", arXiv:1412.6980.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._sizes = [p.numel() for p in self.parameters]
        zero = flatten_tensors(self.parameters).zero_() if self.parameters else torch.zeros(0)
        self._mean, self._square = zero, zero.clone()
        self._means, self._squares = self._parts(self._mean), self._parts(self._square)
        # One shared count: an update of one count per tensor takes as long as the step itself.
        self._step = torch.zeros((), dtype=torch.float32, device=zero.device)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        pairs = zip(vector.split(self._sizes), self.parameters, strict=True)
        return [part.view_as(p) for part, p in pairs] if self.parameters else []

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float, whole: Tensor | None = None) -> None:
        """Take a step against the gradient of all parameters.

        Args:
            gradient: The gradient, (P).
            lr: Step size.
            whole: The memory of the parameters, (P), if it is one vector; faster, same result.
        """
        self._step += 1
        if whole is None:
            held = (self.parameters, self._parts(gradient), self._means, self._squares)
        else:
            held = ([whole], [gradient], [self._mean], [self._square])
        torch._fused_adam_(
            *held,
            [],
            [self._step] * len(held[0]),
            lr=lr,
            beta1=MEMORY,
            beta2=SQUARES,
            weight_decay=0.0,
            eps=LEAST,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Copy of the state that later steps depend on, without the parameters."""
        copies = {name: [t.clone() for t in held] for name, held in self._held().items()}
        return {**copies, "steps": [self._step.clone() for _ in self.parameters]}

    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Restore a state that `state_dict` returned."""
        for name, held in self._held().items():
            for mine, kept in zip(held, state[name], strict=True):
                mine.copy_(kept)
        for count in state["steps"][:1]:
            self._step.copy_(count)

    def _held(self) -> dict[str, list[Tensor]]:
        return {"means": self._means, "squares": self._squares}
