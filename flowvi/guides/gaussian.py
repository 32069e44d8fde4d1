"""Gaussian guides: mean field, full rank, low rank, Kronecker."""

from flowvi.flows import Chain, Diagonal, Kronecker, LowRank, Triangular
from flowvi.guides.pushforward import Pushforward


class MeanField(Pushforward):
    """A Gaussian with independent coordinates.

    `start` takes the diagonal Gaussian nearest in KL(q || p), which is narrower
    than the marginals of a correlated one.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that mean and scales depend on; 0 for none.
    """

    flat = True

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, Chain([]), Diagonal(dim, context_dim))


class FullRank(Pushforward):
    """A Gaussian with a full covariance matrix.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that mean and scales depend on; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, Chain([]), Triangular(dim, context_dim))


class LowRankNormal(Pushforward):
    """A Gaussian whose covariance is a diagonal plus a matrix of low rank.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that it depends on; 0 for none.
        rank: Rank R of the matrix.
    """

    flat = True

    def __init__(self, dim: int, context_dim: int = 0, rank: int = 8) -> None:
        super().__init__(dim, Chain([]), LowRank(dim, context_dim, rank))


class KroneckerNormal(Pushforward):
    """A Gaussian of a matrix whose rows and columns are correlated.

    Args:
        dim: Length D of the latent vector, the matrix row by row.
        context_dim: Length C of the context that its mean depends on; 0 for none.
        rows: Number of rows of the matrix.
    """

    flat = True

    def __init__(self, dim: int, context_dim: int = 0, rows: int | None = None) -> None:
        super().__init__(dim, Chain([]), Kronecker(dim, context_dim, rows))
