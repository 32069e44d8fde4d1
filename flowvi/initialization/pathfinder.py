"""Pathfinder: Gaussians along a quasi-Newton path, from the curvature that the path itself saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

# Number of pairs (step, change of the gradient) in an estimate.
HISTORY = 6


class InverseHessian(NamedTuple):
    """A diagonal and a matrix of low rank, A + W C W^T.

    Attributes:
        diagonal: Diagonal of A, (D).
        wide: W, (D, R).
        core: C, (R, R).
    """

    diagonal: Tensor
    wide: Tensor
    core: Tensor

    def times(self, x: Tensor) -> Tensor:
        """Its product with a vector, (D)."""
        return self.diagonal * x + self.wide @ (self.core @ (self.wide.mT @ x))

    def dense(self) -> Tensor:
        """The whole matrix, (D, D)."""
        return self.diagonal.diag() + self.wide @ self.core @ self.wide.mT

    def variances(self) -> Tensor:
        """The diagonal of the whole matrix, (D)."""
        return self.diagonal + ((self.wide @ self.core) * self.wide).sum(1)


class PathfinderNormal(NamedTuple):
    """A normal density from a point of a path.

    Attributes:
        loc: The point and one quasi-Newton step from it, (D).
        inverse: Estimate of the inverse Hessian of -log p there, the covariance.
    """

    loc: Tensor
    inverse: InverseHessian


def normals_along_path(points: Tensor, gradients: Tensor) -> Iterator[PathfinderNormal]:
    r"""Normals at the points of a path, each from the steps that led to it.

    The inverse Hessian is that of limited-memory BFGS: with steps S and changes
    Y of the gradient of -log p as columns, R the upper triangle of S^T Y and E
    its diagonal,

    .. math:: H = A + [S, A Y]
        \begin{pmatrix} R^{-T} (E + Y^T A Y) R^{-1} & -R^{-T} \\ -R^{-1} & 0 \end{pmatrix}
        [S, A Y]^T

    on a diagonal A, which follows the path by the update of Gilbert and Lemarechal.

    Args:
        points: The path, (T, D).
        gradients: Gradients of log p there, (T, D).

    References:
        Zhang, Carpenter, Gelman and Vehtari (2022), "Pathfinder: Parallel
        quasi-Newton variational inference", JMLR 23(306), algorithms 1 and 3.
        Byrd, Nocedal and Schnabel (1994), "Representations of quasi-Newton
        matrices", Mathematical Programming 63: the formula.
    """
    diagonal = torch.ones_like(points[0])
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for i in range(1, len(points)):
        s, y = points[i] - points[i - 1], gradients[i - 1] - gradients[i]
        # A step along which the density is not log-concave gives no curvature estimate.
        if s @ y > 1e-12 * y.square().sum():
            diagonal = update_diagonal(diagonal, s, y)
            steps, changes = [*steps, s][-HISTORY:], [*changes, y][-HISTORY:]
        if steps:
            inverse = inverse_hessian(diagonal, steps, changes)
            yield PathfinderNormal(points[i] + inverse.times(gradients[i]), inverse)


def update_diagonal(diagonal: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The diagonal estimate after one more step s, in which the gradient changed by y."""
    a, b, c = (y * diagonal) @ y, s @ y, (s / diagonal) @ s
    inverse = a / (b * diagonal) + y.square() / b - a / (b * c) * (s / diagonal).square()
    good = (inverse > 0) & inverse.isfinite()
    return torch.where(good, 1 / inverse, diagonal)


def inverse_hessian(
    diagonal: Tensor, steps: Sequence[Tensor], changes: Sequence[Tensor]
) -> InverseHessian:
    """The inverse Hessian of limited-memory BFGS.

    Args:
        diagonal: What it is before the first pair, (D).
        steps: Steps s, oldest first.
        changes: Changes y of the gradient of -log p, with s^T y > 0 each.
    """
    s, y = torch.stack(list(steps), 1), torch.stack(list(changes), 1)
    scaled = diagonal[:, None] * y
    product = s.mT @ y
    r, e = product.triu(), product.diagonal().diag()
    one = torch.eye(len(r), dtype=s.dtype, device=s.device)
    # With T = R^-T the blocks are T (E + Y^T A Y) T^T and -T: S comes with T on either side.
    turned = s @ solve_triangular(r.mT, one, upper=False)
    core = torch.cat([torch.cat([e + y.mT @ scaled, -one], 1), torch.cat([-one, 0 * one], 1)])
    return InverseHessian(diagonal, torch.cat([turned, scaled], 1), core)
