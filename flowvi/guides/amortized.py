"""Guides for local latents: one density for each row of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.flows.nets import Perceptron
from flowvi.guides.guide import Draw, Guide, ScoredSample, StratifiedSample
from flowvi.targets import NOWHERE, Batch

HIDDEN = 128
# Length of the context vector of the default encoder.
CONTEXT = 64


class RowGuide(Guide):
    """A density q(z_n | row n) for every row of a batch.

    Abstract: a guide of this kind says what context a row has for a conditional guide.
    The context of its own methods is the rows: a `Batch`, a tensor or a tuple of them.

    Args:
        guide: A guide with a context of its own, as `make_guide(name, dim, context_dim)` builds.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide, self.dim = guide, guide.dim

    def context(self, rows: Any) -> Tensor:
        """The context of each row, (B, C)."""
        raise NotImplementedError

    def sample(self, shape: tuple[int, ...], context: Any = None) -> Draw:
        return self.guide.sample(shape, self.context(context))

    def log_prob(self, z: Tensor, context: Any = None) -> Tensor:
        return self.guide.log_prob(z, self.context(context))

    def stratified_sample(self, shape: tuple[int, ...], context: Any = None) -> StratifiedSample:
        return self.guide.stratified_sample(shape, self.context(context))

    def sample_with_score(self, shape: tuple[int, ...], context: Any = None) -> ScoredSample:
        return self.guide.sample_with_score(shape, self.context(context))

    def log_component_ratio(self, z: Tensor, context: Any = None) -> Tensor:
        return self.guide.log_component_ratio(z, self.context(context))

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.guide.start(loc, scale_tril)


class Amortised(RowGuide):
    r"""A guide that reads the row: :math:`q(z_n \mid x_n) = q(z_n \mid c_n)`, c_n = encoder(x_n).

    Args:
        encoder: Module that takes the data of B rows, one argument for each tensor, and
            returns the context (B, C).
        guide: A guide with a context of length C.

    References:
        Kingma and Welling (2014), "Auto-encoding variational Bayes", arXiv:1312.6114.
        Rezende and Mohamed (2015), arXiv:1505.05770: with flows.
    """

    def __init__(self, encoder: nn.Module, guide: Guide) -> None:
        super().__init__(guide)
        self.encoder = encoder

    def context(self, rows: Any) -> Tensor:
        context: Tensor = self.encoder(*data_of(rows))
        return context


class SharedAmortised(Amortised):
    """A guide of a row given latents that all rows share, q(z_n | x_n, theta).

    Its context is (c_n, theta) plus the output of a perceptron of both, which is zero at the start.
    So a guide that is linear in its context can depend on products of the row and theta, too.

    Args:
        encoder: As for `Amortised`, to C numbers.
        guide: A guide with a context of length C + G.
        mix: Perceptron from theta and c_n to the term that is added.

    Attributes:
        origin, widths: Centre and scale by which theta is standardised, (G) each; 0 and 1 at first.
    """

    origin: Tensor
    widths: Tensor

    def __init__(self, encoder: nn.Module, guide: Guide, mix: Perceptron) -> None:
        super().__init__(encoder, guide)
        self.mix = mix
        self.register_buffer("origin", torch.zeros(mix.first.in_features))
        self.register_buffer("widths", torch.ones(mix.first.in_features))

    def joint_context(self, seen: Tensor, theta: Tensor) -> Tensor:
        """The context of rows and values of theta. (B, C), (T, G) -> (T, B, C + G)."""
        unit = ((theta - self.origin) / self.widths).to(seen.dtype).unsqueeze(1)
        lead = (len(theta), len(seen))
        both = torch.cat([seen.expand(*lead, -1), unit.expand(*lead, -1)], -1)
        return both + self.mix(unit, seen)


class PerRow(RowGuide):
    """A guide that has parameters of its own for every row: no encoder, no new rows.

    A row's context is a vector that is trained for it.

    Args:
        rows: Number of rows N.
        guide: A guide with a context.
        context_dim: Its length C.
    """

    def __init__(self, rows: int, guide: Guide, context_dim: int) -> None:
        super().__init__(guide)
        # At zero, neither these vectors nor the weights that multiply them would have a gradient.
        self.vectors = nn.Embedding(rows, context_dim)

    def context(self, rows: Any) -> Tensor:
        if not isinstance(rows, Batch) or (rows.places == NOWHERE).any():
            raise ValueError(
                "A guide with parameters for each row needs to know which rows these are: pass "
                "target.batch(index). For new rows use Amortised, which reads their data."
            )
        context: Tensor = self.vectors(rows.places)
        return context


class Encoder(nn.Module):
    """A perceptron over the flattened data of a row, with two hidden layers.

    Args:
        inputs: Numbers in a row.
        context_dim: Length C of the context.
        hidden: Width of the hidden layers.
        loc: What to subtract from the data, (inputs).
        scale: What to divide them by then, (inputs).
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        inputs: int,
        context_dim: int = CONTEXT,
        hidden: int = HIDDEN,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(inputs) if loc is None else loc)
        self.register_buffer("scale", torch.ones(inputs) if scale is None else scale)
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, context_dim),
        )

    def forward(self, *data: Tensor) -> Tensor:
        """The data of B rows, each (B, *shape), to their context (B, C)."""
        x = torch.cat([t.reshape(len(t), -1).to(self.loc.dtype) for t in data], -1)
        context: Tensor = self.layers((x - self.loc) / self.scale)
        return context


def data_of(rows: Any) -> Sequence[Tensor]:
    """The tensors of rows: of a `Batch`, a tensor, or a sequence of tensors."""
    if isinstance(rows, Batch):
        return rows.data
    if isinstance(rows, Tensor):
        return (rows,)
    if isinstance(rows, tuple | list) and all(isinstance(t, Tensor) for t in rows):
        return rows
    raise ValueError(
        "An amortised guide is conditioned on rows: pass context=, a tensor (B, *shape), a tuple "
        f"of tensors or target.batch(index); got {type(rows).__name__}."
    )
