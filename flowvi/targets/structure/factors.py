"""Cholesky factors of precision matrices: small blocks, dense matrices, and bands."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Blocks up to this size are factored by operations on all blocks at once.
UNROLLED = 4


class Factor(ABC):
    """The Cholesky factor L of precision matrices H = L L^T, one for each point and unit.

    Attributes:
        ok: Whether a matrix is positive definite, (S, G).
        log_det: Log determinant of H, (S, G).
    """

    ok: Tensor
    log_det: Tensor

    @abstractmethod
    def solve(self, x: Tensor) -> Tensor:
        """H^-1 x. (S, G, d) -> (S, G, d)."""

    @abstractmethod
    def spread(self, noise: Tensor) -> Tensor:
        """L^-T noise, which has covariance H^-1. (..., S, G, d) -> (..., S, G, d)."""

    @abstractmethod
    def whiten(self, x: Tensor) -> Tensor:
        """L^T x, the inverse of `spread`. (..., S, G, d) -> (..., S, G, d)."""

    @abstractmethod
    def pull(self, x: Tensor) -> Tensor:
        """L^-1 x: a gradient by x as one by its noise. (..., S, G, d) -> (..., S, G, d)."""

    @abstractmethod
    def inverse(self) -> Tensor:
        """Elements of H^-1 for each probe and latent, (S, C, G, d)."""


class Small(Factor):
    """Blocks of few latents.

    Args:
        blocks: Elements of H, (S, G, d, d).
    """

    def __init__(self, blocks: Tensor) -> None:
        d = blocks.shape[-1]
        self.size = d
        ell: list[list[Tensor]] = [[] for _ in range(d)]
        ok = torch.ones(blocks.shape[:-2], dtype=torch.bool, device=blocks.device)
        for i in range(d):
            for j in range(i + 1):
                rest = blocks[..., i, j]
                for k in range(j):
                    rest = rest - ell[i][k] * ell[j][k]
                if i == j:
                    fine = rest > 0
                    ok = ok & fine
                    ell[i].append(torch.where(fine, rest, 1.0).sqrt())
                else:
                    ell[i].append(rest / ell[j][j])
        self.ell, self.ok = ell, ok
        self.log_det = 2 * sum((ell[i][i].log() for i in range(d)), torch.zeros(()))

    def _forward(self, x: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        for i in range(self.size):
            rest = x[..., i]
            for k in range(i):
                rest = rest - self.ell[i][k] * out[k]
            out.append(rest / self.ell[i][i])
        return out

    def _backward(self, x: list[Tensor]) -> Tensor:
        out: list[Tensor] = [x[0]] * self.size
        for i in reversed(range(self.size)):
            rest = x[i]
            for k in range(i + 1, self.size):
                rest = rest - self.ell[k][i] * out[k]
            out[i] = rest / self.ell[i][i]
        return torch.stack(out, -1)

    def solve(self, x: Tensor) -> Tensor:
        return self._backward(self._forward(x))

    def spread(self, noise: Tensor) -> Tensor:
        return self._backward(list(noise.unbind(-1)))

    def pull(self, x: Tensor) -> Tensor:
        return torch.stack(self._forward(x), -1)

    def whiten(self, x: Tensor) -> Tensor:
        parts = x.unbind(-1)
        rows = [
            sum(
                (self.ell[k][i] * parts[k] for k in range(i + 1, self.size)),
                self.ell[i][i] * parts[i],
            )
            for i in range(self.size)
        ]
        return torch.stack(rows, -1)

    def inverse(self) -> Tensor:
        eye = torch.eye(self.size, dtype=self.log_det.dtype, device=self.log_det.device)
        shape = (self.size, *self.log_det.shape, self.size)
        columns = self.solve(eye[:, None, None, :].expand(shape))
        return columns.movedim(0, 1)


class Dense(Factor):
    """Blocks of any size.

    Args:
        blocks: Elements of H, (S, G, d, d).
    """

    def __init__(self, blocks: Tensor) -> None:
        found, info = torch.linalg.cholesky_ex(blocks)
        self.ok = info == 0
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        self.ell = torch.where(self.ok[..., None, None], found, eye)
        self.log_det = 2 * self.ell.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def solve(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x.unsqueeze(-1), self.ell).squeeze(-1)

    def spread(self, noise: Tensor) -> Tensor:
        return self._triangular(self.ell.mT, noise, True)

    def pull(self, x: Tensor) -> Tensor:
        return self._triangular(self.ell, x, False)

    def _triangular(self, matrix: Tensor, x: Tensor, upper: bool) -> Tensor:
        lead = x.shape[: -self.ell.dim() + 1]
        flat = x.reshape(-1, *x.shape[len(lead) :]).movedim(0, -1)
        found = torch.linalg.solve_triangular(matrix, flat, upper=upper)
        return found.movedim(-1, 0).reshape(x.shape)

    def sd(self) -> Tensor:
        """Standard deviations of a draw, (S, d), of one unit."""
        eye = torch.eye(self.ell.shape[-1], dtype=self.ell.dtype, device=self.ell.device)
        columns = torch.linalg.solve_triangular(self.ell, eye, upper=False)
        return columns.square_().sum(-2).sqrt()[:, 0]

    @staticmethod
    def joined(factors: Sequence[Factor]) -> Dense:
        """The factors of several sets of points in one."""
        dense = [factor for factor in factors if isinstance(factor, Dense)]
        new = copy.copy(dense[0])
        for name in ("ell", "ok", "log_det"):
            setattr(new, name, torch.cat([getattr(one, name) for one in dense]))
        return new

    def whiten(self, x: Tensor) -> Tensor:
        lead = x.shape[: -self.ell.dim() + 1]
        flat = x.reshape(-1, *x.shape[len(lead) :]).movedim(0, -1)
        return (self.ell.mT @ flat).movedim(-1, 0).reshape(x.shape)

    def inverse(self) -> Tensor:
        return torch.cholesky_inverse(self.ell).movedim(-1, 1)


class Banded(Factor):
    """The precision of a chain, in the form of LAPACK's lower bands.

    Args:
        bands: Row k holds the elements H[t + k, t], (S, b + 1, n).
        colours: Number of probes.
    """

    def __init__(self, bands: Tensor, colours: int) -> None:
        from scipy.linalg import lapack  # slow to import

        self.like, self.colours = bands, colours
        array = bands.detach().cpu().numpy()
        self.order, self.n = array.shape[1] - 1, array.shape[2]
        found, fine = [], []
        for one in array:
            factor, info = lapack.dpbtrf(one, lower=1)
            if info:
                factor = np.zeros_like(one)
                factor[0] = 1.0
            found.append(factor)
            fine.append(info == 0)
        self.ell = np.stack(found)
        self.ok = torch.tensor(fine).unsqueeze(-1)
        self.log_det = self._tensor(2 * np.log(self.ell[:, 0]).sum(-1)).unsqueeze(-1)

    def solve(self, x: Tensor) -> Tensor:
        from scipy.linalg import lapack  # slow to import

        columns = x.squeeze(-2).detach().cpu().numpy()
        found = [
            lapack.dpbtrs(ell, one, lower=1)[0] for ell, one in zip(self.ell, columns, strict=True)
        ]
        return self._tensor(np.stack(found)).unsqueeze(-2)

    def spread(self, noise: Tensor) -> Tensor:
        return self._triangular(noise, "T")

    def pull(self, x: Tensor) -> Tensor:
        return self._triangular(x, "N")

    def _triangular(self, x: Tensor, trans: str) -> Tensor:
        from scipy.linalg import lapack  # slow to import

        flat = x.reshape(-1, len(self.ell), self.n).detach().cpu().numpy()
        found = np.empty_like(flat)
        for s, ell in enumerate(self.ell):
            column, _ = lapack.dtbtrs(ell, flat[:, s].T.copy(), uplo="L", trans=trans)
            found[:, s] = column.T
        return self._tensor(found).reshape(x.shape)

    def whiten(self, x: Tensor) -> Tensor:
        ell = self._tensor(self.ell)
        flat = x.squeeze(-2)
        out = ell[:, 0] * flat
        for k in range(1, self.order + 1):
            out = torch.cat(
                [out[..., :-k] + ell[:, k, : self.n - k] * flat[..., k:], out[..., -k:]], -1
            )
        return out.unsqueeze(-2)

    def inverse(self) -> Tensor:
        """Elements of H^-1 within the band, by the recursion of Takahashi (1973)."""
        b, n = self.order, self.n
        ell = self.ell / self.ell[:, :1]
        scale = 1 / self.ell[:, 0] ** 2
        points = len(self.ell)
        # sigma[:, k, t] is the element (t + k, t) of the inverse.
        sigma = np.zeros((points, b + 1, n + b))
        for t in reversed(range(n)):
            m = min(b, n - 1 - t)
            for k in reversed(range(m + 1)):
                total = scale[:, t] if k == 0 else np.zeros(points)
                for j in range(1, m + 1):
                    low, high = min(j, k), max(j, k)
                    total = total - ell[:, j, t] * sigma[:, high - low, t + low]
                sigma[:, k, t] = total
        out = np.zeros((points, self.colours, n))
        for t in range(n):
            for k in range(-b, b + 1):
                s = t + k
                if 0 <= s < n:
                    out[:, t % self.colours, s] = sigma[:, abs(k), min(s, t)]
        return self._tensor(out).unsqueeze(2)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array).to(self.like)
