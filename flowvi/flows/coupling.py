"""Coupling layers: one part of the vector moves, told how by the part that stays."""

from torch import Tensor

from flowvi.flows.affine import Diagonal
from flowvi.flows.clamps import asymmetric_clamp
from flowvi.flows.coupling_kernel import Halves, Move, Plan
from flowvi.flows.elementwise import Affine, Elementwise, Shift
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import Perceptron
from flowvi.flows.permute import mixed
from flowvi.flows.spline import RationalQuadratic, Spline, spline
from flowvi.flows.tails import Loft


class Coupling(Layer):
    r"""Map one half of the vector, with parameters from a network of the other half.

    With :math:`x = (a, b)`, a monotone map f of one coordinate and a network h,

    .. math::
        y = (a,\; f(b; h(a, c))), \qquad
        \log|\det \partial y / \partial x| = \sum_i \log f'(b_i; h_i(a, c)).

    Both directions cost one network call, so the layer suits every gradient
    estimator.

    Args:
        dim: Length D of the vector. At least 2.
        map: The map f.
        context_dim: Length C of the context; 0 for an unconditional layer.
        hidden: Width of the network's two hidden layers.
        swap: Move the first half instead of the second.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using
        Real NVP", arXiv:1605.08803, section 3.
    """

    def __init__(
        self,
        dim: int,
        map: Elementwise,
        context_dim: int = 0,
        hidden: int = 64,
        *,
        swap: bool = False,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"A coupling splits its input in two: dim must be >= 2, got {dim}.")
        self.halves = Halves([dim // 2, dim - dim // 2], swap)
        self.map = map
        kept, moved = reversed(self.halves.sizes) if swap else self.halves.sizes
        self.net = Perceptron(kept, map.size * moved, context_dim, hidden)

    @property
    def single(self) -> bool:
        return self.map.single

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.halves.split(x)
        b, ladj = self.map.forward(b, self._params(a, context))
        return self.halves.join(a, b), ladj.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.halves.split(y)
        b, ladj = self.map.inverse(b, self._params(a, context))
        return self.halves.join(a, b), ladj.sum(-1)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (pushed := self.planned(x, score, context)) is not None:
            return pushed
        (a, b), (score_a, score_b) = self.halves.split(x), self.halves.split(score)
        params, pull = self.net.linearised(a, context)
        params = params.unflatten(-1, (self.map.size, -1))
        moved, ladj = self.map.forward(b, params)
        f = self.map.linearised(b, params)
        score_b = (score_b - f.change) * (-f.log_slope).exp()
        score_a = score_a - pull(f.pull(score_b).flatten(-2))
        return self.halves.join(a, moved), ladj.sum(-1), self.halves.join(score_a, score_b)

    def plan(self) -> Plan | None:
        return Move(self.halves, self.net) if self.map == Affine() else None

    def _params(self, a: Tensor, context: Tensor | None) -> Tensor:
        return self.net(a, context).unflatten(-1, (self.map.size, -1))


class AffineCoupling(Coupling):
    r"""Shift and scale one half of the vector: a coupling with :math:`f(b) = b \, e^s + m`.

    The log-scale is bounded, :math:`|s| < 3`, by a tanh.

    Args:
        dim: Length D of the vector. At least 2.
        context_dim: Length C of the context; 0 for an unconditional layer.
        hidden: Width of the network's two hidden layers.
        swap: Move the first half instead of the second.
    """

    def __init__(
        self, dim: int, context_dim: int = 0, hidden: int = 64, *, swap: bool = False
    ) -> None:
        super().__init__(dim, Affine(), context_dim, hidden, swap=swap)


def realnvp(dim: int, context_dim: int = 0, depth: int = 8, hidden: int = 64) -> Chain:
    """Affine couplings that move the two halves of the vector in turn.

    Halves are drawn anew after each pair of couplings: coordinates of one half
    would otherwise meet only through the other. One coordinate has no halves:
    at D = 1 this, and every other flow of couplings, is `spline`.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of couplings.
        hidden: Width of the two hidden layers of each network.
    """
    return _couplings(Affine(), dim, context_dim, depth, hidden)


def realnvp_clamped(dim: int, context_dim: int = 0, depth: int = 16, hidden: int = 64) -> Chain:
    """Real NVP for hundreds of dimensions: deep, with asymmetric clamps and LOFT at the end."""
    return Chain([_couplings(Affine(asymmetric_clamp), dim, context_dim, depth, hidden), Loft()])


def nice(dim: int, context_dim: int = 0, depth: int = 8, hidden: int = 64) -> Chain:
    """Additive couplings, which preserve volume, and a scale of each coordinate at the end.

    References:
        Dinh, Krueger and Bengio (2015), "NICE: Non-linear Independent
        Components Estimation", arXiv:1410.8516.
    """
    couplings = _couplings(Shift(), dim, context_dim, depth, hidden)
    return Chain([couplings, Diagonal(dim, context_dim)])


def nsf_coupling(
    dim: int, context_dim: int = 0, depth: int = 4, hidden: int = 64, bins: int = 8
) -> Chain:
    """Rational-quadratic spline couplings.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), "Neural Spline Flows",
        arXiv:1906.04032.
    """
    return _couplings(RationalQuadratic(bins), dim, context_dim, depth, hidden)


def marginals(
    dim: int, context_dim: int = 0, depth: int = 8, hidden: int = 64, bins: int = 16
) -> Chain:
    """Affine couplings, then a fine spline of each coordinate, which may have several modes.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of couplings.
        hidden: Width of the two hidden layers of each of their networks.
        bins: Number of bins of each spline.
    """
    couplings = _couplings(Affine(), dim, context_dim, depth, hidden)
    return Chain([couplings, Spline(dim, context_dim, bins, bound=4.0)])


def _couplings(map: Elementwise, dim: int, context_dim: int, depth: int, hidden: int) -> Chain:
    if dim == 1:
        return spline(dim, context_dim)
    layers = [Coupling(dim, map, context_dim, hidden, swap=i % 2 == 1) for i in range(depth)]
    return mixed([Chain(layers[i : i + 2]) for i in range(0, depth, 2)], dim)
