"""Affine layers: shift and scale, coordinate by coordinate or by a triangular matrix."""

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular

from flowvi.flows.layer import Layer
from flowvi.flows.nets import ContextParameter


class Scaled(Layer):
    """An affine layer in units of a constant origin and constant widths, 0 and 1 until `set_`."""

    origin: Tensor
    width: Tensor
    params: ContextParameter

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("origin", torch.zeros(dim))
        self.register_buffer("width", torch.ones(dim))

    @torch.no_grad()
    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        r"""Become the diagonal Gaussian nearest to N(loc, L L^T).

        Nearest in KL(q || p): the scales are :math:`\Lambda_{ii}^{-1/2}`, with
        :math:`\Lambda` the precision matrix, not the marginal scales.

        Args:
            loc: Mean, (D).
            scale_tril: Lower triangular L with a positive diagonal, (D, D); or the scales, (D).
        """
        self._reset()
        self.origin.copy_(loc)
        self.width.copy_(nearest_scales(scale_tril))

    @torch.no_grad()
    def lean(self, slope: Tensor) -> None:
        """Add slope times the context to the mean, (D, C)."""
        self.params.lean(slope / self.width[:, None])

    def _reset(self) -> None:
        """Set the parameters to those of the identity."""
        for p in self.parameters():
            p.zero_()


class Diagonal(Scaled):
    r"""Shift and scale every coordinate.

    .. math:: y = o + r \odot (m + e^{s} \odot x), \qquad
        \log|\det \partial y / \partial x| = \sum_i s_i + \log r_i

    The shift m and log-scale s are trained and may depend on the context. The
    origin o and widths r are constants, 0 and 1 until `set_` is called: m and
    s are then measured in units of the target's own scale, so that one step
    size suits them all. Both directions cost O(D).

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim)
        self.params = ContextParameter(torch.zeros(2 * dim), context_dim)

    @property
    def single(self) -> bool:
        return True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.params(context).chunk(2, dim=-1)
        log_scale = log_scale + self.width.log()
        y = torch.addcmul(torch.addcmul(self.origin, self.width, shift), x, log_scale.exp())
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            _, log_scale = self.params(context).chunk(2, dim=-1)
            score = score * (-log_scale).exp() / self.width
        return *self(x, context), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.params(context).chunk(2, dim=-1)
        x = ((y - self.origin) / self.width - shift) * (-log_scale).exp()
        return x, -(log_scale + self.width.log()).sum(-1).expand(x.shape[:-1])


class Triangular(Layer):
    r"""Shift, and multiply by a lower triangular matrix with a positive diagonal.

    With U strictly lower triangular,

    .. math:: y = o + R \, (m + e^{s} \odot (x + U x)), \qquad
        \log|\det \partial y / \partial x| = \sum_i s_i + \log R_{ii}.

    U, the shift m and the log-scale s are trained; m and s may depend on the
    context. The origin o and lower triangular frame R are constants, 0 and I
    until `set_` is called: training then starts from the identity in
    coordinates in which the target is about standard. Both directions cost
    O(D^2): a product forwards, a triangular solve backwards.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        held: Leave U at zero, so that all correlations are those of the frame.
    """

    origin: Tensor
    frame: Tensor

    def __init__(self, dim: int, context_dim: int = 0, held: bool = False) -> None:
        super().__init__()
        self.params = ContextParameter(torch.zeros(2 * dim), context_dim)
        self.lower = None if held else nn.Parameter(torch.zeros(dim, dim))
        self.register_buffer("origin", torch.zeros(dim))
        self.register_buffer("frame", torch.eye(dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.params(context).chunk(2, dim=-1)
        mixed = x if self.lower is None else x + x @ self.lower.tril(-1).mT
        t = shift + log_scale.exp() * mixed
        y = self.origin + t @ self.frame.mT
        return y, self._ladj(log_scale).expand(y.shape[:-1])

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            _, log_scale = self.params(context).chunk(2, dim=-1)
            if self.lower is not None:
                score = solve_rows(self.lower.mT, score, upper=True, unit=True)
            score = solve_rows(self.frame.mT, score * (-log_scale).exp(), upper=True)
        return *self(x, context), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.params(context).chunk(2, dim=-1)
        t = solve_rows(self.frame, y - self.origin)
        x = (t - shift) * (-log_scale).exp()
        x = x if self.lower is None else solve_rows(self.lower, x, unit=True)
        return x, -self._ladj(log_scale).expand(x.shape[:-1])

    @torch.no_grad()
    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become x -> loc + L x.

        Args:
            loc: Shift, (D).
            scale_tril: Lower triangular L with a positive diagonal, (D, D); or the scales, (D).
        """
        for p in self.parameters():
            p.zero_()
        self.origin.copy_(loc)
        self.frame.copy_(scale_tril.diag() if scale_tril.dim() == 1 else scale_tril.tril())

    @torch.no_grad()
    def lean(self, slope: Tensor) -> None:
        """Add slope times the context to the mean, (D, C)."""
        self.params.lean(solve_triangular(self.frame, slope, upper=False))

    def _ladj(self, log_scale: Tensor) -> Tensor:
        return log_scale.sum(-1) + self.frame.diagonal().log().sum()


def nearest_scales(scale_tril: Tensor) -> Tensor:
    r"""Scales of the diagonal normal nearest in KL(q || p): :math:`\Lambda_{ii}^{-1/2}`, (D).

    Args:
        scale_tril: Lower triangular L of p, (D, D), with precision :math:`\Lambda`; or its
            scales, (D).
    """
    if scale_tril.dim() == 1:
        return scale_tril
    identity = torch.eye(len(scale_tril), dtype=scale_tril.dtype, device=scale_tril.device)
    return solve_triangular(scale_tril, identity, upper=False).square().sum(0).rsqrt()


def solve_rows(matrix: Tensor, y: Tensor, *, upper: bool = False, unit: bool = False) -> Tensor:
    """Solve M x = y for every vector, M triangular; with `unit`, it has ones on its diagonal."""
    # Flatten the leading dimensions; otherwise the solver copies the matrix for each vector.
    rows = y.reshape(-1, y.shape[-1])
    x = solve_triangular(matrix.mT, rows, upper=not upper, left=False, unitriangular=unit)
    return x.reshape(y.shape)
