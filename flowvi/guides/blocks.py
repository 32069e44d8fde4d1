"""Guides by block: products over named sites, and blocks that depend on other blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from flowvi.guides.guide import Draw, Guide, ScoredSample
from flowvi.guides.mixtures import MixtureGuide
from flowvi.guides.prefixes import PrefixGuide
from flowvi.guides.pushforward import Pushforward


class Block(NamedTuple):
    """One block of a guide.

    Attributes:
        guide: Guide of the block's coordinates; its context is that of the whole guide, followed
            by the blocks on which it depends.
        columns: Which coordinates of z these are, (d).
        given: Numbers of earlier blocks that it depends on.
    """

    guide: Guide
    columns: tuple[int, ...]
    given: tuple[int, ...] = ()


class BlockGuide(Guide):
    r"""A product of guides, each of some coordinates, and perhaps given others.

    .. math:: q(z) = \prod_b q_b(z_b \mid (z_g - o_g) / r_g, \; g \in \mathrm{given}(b))

    The origins o and widths r are constants, 0 and 1 until `start` is called. After that a
    block gets the others in units of their own scale, and its mean depends on them as the
    conditional mean of the Gaussian does.

    Args:
        parts: Blocks whose columns are those of z, each once.
        spec: Arguments with which `block_guide` makes the same guide, if it can.
    """

    kind: ClassVar[str] = "blocks"

    order: Tensor
    origin: Tensor
    width: Tensor

    def __init__(self, parts: Sequence[Block], spec: dict[str, Any] | None = None) -> None:
        super().__init__()
        order = [column for part in parts for column in part.columns]
        self.dim, self.spec = len(order), spec
        if sorted(order) != list(range(self.dim)):
            raise ValueError(f"Blocks must cover the columns 0 ... {self.dim - 1}, each once.")
        for i, part in enumerate(parts):
            if isinstance(part.guide, MixtureGuide):
                raise ValueError("A mixture cannot be a block; make a mixture of blocks instead.")
            if part.guide.joint or isinstance(part.guide, PrefixGuide):
                raise ValueError(f"A {part.guide.kind} guide cannot be a block.")
            if any(g >= i for g in part.given):
                raise ValueError(f"Block {i} can only be given blocks before it; got {part.given}.")
        self.guides = nn.ModuleList(part.guide for part in parts)
        self.given = [part.given for part in parts]
        self.flat = not any(self.given) and all(part.guide.flat for part in parts)
        dense = not any(part.guide.flat for part in parts)
        chained = all(set(given) == set(range(b)) for b, given in enumerate(self.given))
        self.partial = not (self.flat or (dense and chained))
        self.sizes = [len(part.columns) for part in parts]
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("origin", torch.zeros(self.dim))
        self.register_buffer("width", torch.ones(self.dim))

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        pieces: list[Tensor] = []
        log_qs = []
        for b, guide in enumerate(self._guides()):
            if self.given[b]:
                z, log_q = guide.sample((), self._context(b, pieces, context))
            else:
                z, log_q = guide.sample(shape, context)
            pieces.append(z)
            log_qs.append(log_q)
        return Draw(self._join(pieces), torch.stack(log_qs).sum(0))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} columns but the guide has D = {self.dim}.")
        pieces = self._split(z)
        terms = [
            guide.log_prob(pieces[b], self._context(b, pieces, context))
            for b, guide in enumerate(self._guides())
        ]
        return torch.stack(terms).sum(0)

    def sample_with_score(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> ScoredSample:
        pieces: list[Tensor] = []
        scores: list[Tensor] = []
        log_qs = []
        for b, guide in enumerate(self._guides()):
            if self.given[b]:
                z, log_q = guide.sample((), self._context(b, pieces, context))
                score, *others = self._score(b, z, pieces, context)
                for g, other in zip(self.given[b], others, strict=True):
                    scores[g] = scores[g] + other
            else:
                z, log_q, log_share, score = guide.sample_with_score(shape, context)
            pieces.append(z)
            scores.append(score)
            log_qs.append(log_q)
        total = torch.stack(log_qs).sum(0)
        return ScoredSample(self._join(pieces), total, log_share, self._join(scores))

    def advance_rng(self, shape: tuple[int, ...]) -> None:
        for guide in self._guides():
            guide.advance_rng(shape)

    @torch.no_grad()
    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the Gaussian N(loc, L L^T), as far as the dependences of the blocks allow.

        Each block becomes the conditional Gaussian given all blocks that do not depend on it,
        whose means it follows where they are given: the nearest product in KL(q || p), if
        no block is given another.
        """
        flat = scale_tril.dim() == 1
        covariance = None if flat else scale_tril @ scale_tril.mT
        self.origin.copy_(loc)
        self.width.copy_(scale_tril if flat else scale_tril.norm(dim=1))
        columns = self.order.split(self.sizes)
        for b, guide in enumerate(self._guides()):
            own = columns[b]
            if covariance is None:
                guide.start(loc[own], scale_tril[own])
                continue
            above = [
                columns[a] for a in range(len(columns)) if a != b and a not in self._descendants(b)
            ]
            known = torch.cat([own, *above])
            precision = torch.cholesky_inverse(_factor(covariance[known][:, known]))
            inner = torch.cholesky_inverse(_factor(precision[: len(own), : len(own)]))
            guide.start(loc[own], _factor(inner))
            if self.given[b] and isinstance(guide, Pushforward):
                slope = torch.zeros(len(own), self.dim).to(loc)
                slope[:, known[len(own) :]] = -inner @ precision[: len(own), len(own) :]
                given = torch.cat([columns[g] for g in self.given[b]])
                leaning = slope[:, given] * self.width[given]
                weight = guide.affine.params.weight
                # The context of the whole guide comes first.
                rest = 0 if weight is None else weight.shape[1] - len(given)
                guide.affine.lean(torch.nn.functional.pad(leaning, (rest, 0)))

    def _descendants(self, b: int) -> set[int]:
        """Blocks that depend on a block, directly or not."""
        found = {b}
        for other, given in enumerate(self.given):
            if found & set(given):
                found.add(other)
        return found - {b}

    def _context(self, b: int, pieces: Sequence[Tensor], context: Tensor | None) -> Tensor | None:
        """The context of a block: that of the guide, and the blocks on which it depends."""
        if not self.given[b]:
            return context
        columns = self.order.split(self.sizes)
        seen = [
            (pieces[g] - self.origin[columns[g]]) / self.width[columns[g]] for g in self.given[b]
        ]
        if context is not None:
            seen = [context.expand(*seen[0].shape[:-1], -1), *seen]
        return torch.cat(seen, -1)

    def _score(
        self, b: int, z: Tensor, pieces: Sequence[Tensor], context: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of a block's log density at its own draw, and at those it was given."""
        fixed = None if context is None else context.detach()
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_()]
            leaves += [pieces[g].detach().requires_grad_() for g in self.given[b]]
            seen = dict(zip(self.given[b], leaves[1:], strict=True))
            known = [seen.get(i, piece) for i, piece in enumerate(pieces)]
            log_q = self._guides()[b].log_prob(leaves[0], self._context(b, known, fixed))
            return torch.autograd.grad(log_q.sum(), leaves)

    def _split(self, z: Tensor) -> list[Tensor]:
        return list(z.index_select(-1, self.order).split(self.sizes, dim=-1))

    def _join(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces), -1).index_select(-1, self.order.argsort())

    def _guides(self) -> list[Guide]:
        return cast(list[Guide], list(self.guides))


def _factor(matrix: Tensor) -> Tensor:
    """A Cholesky factor, in units of the diagonal, with as little added as it takes."""
    scale = matrix.diagonal().sqrt()
    unit = matrix / scale[:, None] / scale
    for jitter in (0.0, 1e-12, 1e-9, 1e-6, 1e-3):
        factor, info = torch.linalg.cholesky_ex(unit + jitter * torch.eye(len(scale)).to(unit))
        if info == 0:
            break
    return scale[:, None] * factor
