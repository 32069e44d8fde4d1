"""Continuous flows: the solution of a differential equation with a learnt velocity."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowvi.flows.layer import Layer
from flowvi.flows.nets import required

MISSING = (
    "The adaptive solver of 'ffjord' is torchdiffeq: install it with pip install 'flowvi[ode]', "
    "or pass steps=, a number of Runge-Kutta steps of fixed size."
)


class Continuous(Layer):
    r"""Follow a velocity field from time 0 to time 1.

    .. math::
        \frac{dx}{dt} = v(x, t, c), \qquad
        \frac{d}{dt} \log\left|\det \frac{\partial x}{\partial x_0}\right| =
        \mathrm{tr} \frac{\partial v}{\partial x}.

    The velocity is a network with two hidden layers,
    :math:`v = W_3 \sigma(h_2)`, :math:`h_2 = W_2 \sigma(h_1) + w_2 t + b_2`,
    :math:`h_1 = W_1 x + w_1 t + W_c c + b_1`. Its trace then has a closed form,

    .. math::
        \mathrm{tr} \frac{\partial v}{\partial x} =
        \sigma'(h_2)^T \big( W_2 \odot (W_1 W_3)^T \big) \, \sigma'(h_1),

    which costs no more than the velocity itself in any dimension. Both
    directions cost some 20 to 100 calls of the network, and as much memory when
    they are differentiated, by backpropagation through the solver.

    The adaptive solver (Dormand and Prince, order 5) keeps the error of each
    step and each draw below `tolerance`; a round trip is right to about ten
    times that, and so is the density. Its steps depend on all draws of one
    call. Runge-Kutta steps of fixed size (order 4) depend on nothing, work
    under `torch.vmap`, and have no control of their error.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        hidden: Width of the network's two hidden layers.
        steps: Number of Runge-Kutta steps; adaptive by default.
        tolerance: Absolute and relative tolerance of the adaptive solver.
        probes: Number of random signs :math:`\epsilon` for Hutchinson's estimate of
            the trace, the mean of :math:`\epsilon^T (\partial v / \partial x) \epsilon`;
            0 for the exact one, which is cheaper. The estimate is unbiased over
            the signs only: they stay the same until `renew` is called, log_q is
            then no density, and a fit with the same signs learns to exploit them.

    References:
        Chen, Rubanova, Bettencourt and Duvenaud (2018), "Neural Ordinary
        Differential Equations", arXiv:1806.07366.
        Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud (2019), "FFJORD",
        arXiv:1810.01367: Hutchinson's estimate.
    """

    signs: Tensor | None

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        hidden: int = 64,
        steps: int | None = None,
        tolerance: float = 1e-5,
        probes: int = 0,
    ) -> None:
        super().__init__()
        if steps is None:
            adaptive()
        self.steps = steps
        self.tolerance = tolerance
        self.first = nn.Linear(dim, hidden)
        self.context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        self.second = nn.Linear(hidden, hidden)
        self.time = nn.Parameter(torch.zeros(2, hidden))
        # The initial velocity is zero: the flow starts at the identity.
        self.last = nn.Parameter(torch.zeros(dim, hidden))
        self.register_buffer("signs", torch.ones(probes, dim) if probes else None)
        self.renew()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context, 0.0, 1.0)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(y, context, 1.0, 0.0)

    def renew(self) -> None:
        """Draw new random signs, if there are any."""
        if self.signs is not None:
            self.signs.bernoulli_().mul_(2).sub_(1)

    def _solve(
        self, x: Tensor, context: Tensor | None, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        slope = self._slope(context)
        state = torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], dim=-1)
        if self.steps is None:
            times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
            solver = {"rtol": self.tolerance, "atol": self.tolerance, "method": "dopri5"}
            # The maximum norm of the error keeps every draw within the tolerance.
            options = {"norm": lambda error: error.abs().max()}
            state = adaptive()(slope, state, times, **solver, options=options)[-1]
        else:
            state = runge_kutta(slope, state, start, end, self.steps)
        return state[..., :-1], state[..., -1]

    def _slope(self, context: Tensor | None) -> Callable[[Tensor | float, Tensor], Tensor]:
        """The derivative of (x, log det) with respect to time, as a function of both."""
        constant = self.first.bias
        if self.context is not None:
            constant = constant + self.context(required(context, self.context.in_features))
        inner = self.second.weight * (self.first.weight @ self.last).mT

        def slope(t: Tensor | float, state: Tensor) -> Tensor:
            h, rate = _silu(state[..., :-1] @ self.first.weight.mT + constant + t * self.time[0])
            h, last_rate = _silu(self.second(h) + t * self.time[1])
            if self.signs is None:
                trace = ((rate @ inner.mT) * last_rate).sum(-1, keepdim=True)
            else:
                trace = self._hutchinson(self.signs, rate, last_rate)
            return torch.cat([h @ self.last.mT, trace], dim=-1)

        return slope

    def _hutchinson(self, signs: Tensor, rate: Tensor, last_rate: Tensor) -> Tensor:
        along = (rate.unsqueeze(-2) * (signs @ self.first.weight.mT)) @ self.second.weight.mT
        moved = (last_rate.unsqueeze(-2) * along) @ self.last.mT
        return (moved * signs).sum(-1).mean(-1, keepdim=True)


def runge_kutta(
    slope: Callable[[float, Tensor], Tensor], state: Tensor, start: float, end: float, steps: int
) -> Tensor:
    """The classical Runge-Kutta method of order 4, with steps of equal size."""
    size = (end - start) / steps
    for i in range(steps):
        t = start + i * size
        a = slope(t, state)
        b = slope(t + size / 2, state + size / 2 * a)
        c = slope(t + size / 2, state + size / 2 * b)
        d = slope(t + size, state + size * c)
        state = state + size / 6 * (a + 2 * b + 2 * c + d)
    return state


def adaptive() -> Callable[..., Tensor]:
    """The adaptive solver, or an error with the command that installs it."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(MISSING) from error
    solve: Callable[..., Tensor] = odeint
    return solve


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation x sigmoid(x), and its derivative."""
    sigmoid = torch.sigmoid(x)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid)
