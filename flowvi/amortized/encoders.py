"""Networks that read a data set: whole, as a set of rows, or as a series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from flowvi.amortized.features import EACH, Features, Input, inputs_from
from flowvi.runtime.arguments import check_choice

HIDDEN, CONTEXT, BLOCKS = 128, 64, 2
# Width of the network of a row, and features of which the maximum is taken.
ROW_HIDDEN, MAXIMA = 32, 16
# Learnt averages of the rows of a group, and what is read from all its averages.
GROUP_FEATURES, GROUP_HIDDEN = 8, 16
# Largest number of numbers of a row whose products are averaged.
MOST_PRODUCTS = 12
# Length from which data without rows are read as a series.
SERIES = 48
VECTOR, SET, SERIES_KIND, OWN = "vector", "set", "series", "own"

Data = Mapping[str, Tensor]


class Residual(nn.Module):
    """A perceptron of residual blocks, plus a linear map of its input.

    Args:
        inputs: Length of the input.
        outputs: Length of the output.
        hidden: Width.
        blocks: Number of blocks.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int = HIDDEN, blocks: int = BLOCKS
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            for _ in range(blocks)
        )
        self.last = nn.Linear(hidden, outputs)
        self.line = nn.Linear(inputs, outputs, bias=False)
        # It starts at the linear map, which `Network.regress` sets.
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.last(silu(h)) + self.line(x)
        return out


class Encoder(nn.Module):
    """Reads data sets: {name: (B, *shape)} -> context (B, C). Abstract.

    Args:
        inputs: What is read.
        context: Length C of the context.
    """

    kind: str
    net: nn.Module

    def __init__(self, inputs: Sequence[Input], context: int = CONTEXT) -> None:
        super().__init__()
        self.inputs, self.size = list(inputs), context
        self.features = nn.ModuleList(Features(i) for i in self.inputs)

    @property
    def readers(self) -> list[Features]:
        """What reads each input, in their order."""
        return cast(list[Features], list(self.features))

    @property
    def by_row(self) -> tuple[str, ...]:
        """Names of what each row has."""
        return tuple(i.name for i in self.inputs if i.rows)

    def fit(self, data: Data) -> None:
        """Standardise by simulated data sets."""
        for feature in self.readers:
            feature.fit(data[feature.input.name])

    def read(self, data: Data) -> Tensor:
        """The numbers by which data sets are compared, (B, R)."""
        raise NotImplementedError

    def parts(self, data: Data) -> list[tuple[Tensor, bool]]:
        """What the last network reads, (B, *) each, and whether it is learnt.

        Not learnt are functions of the data that do not change in the training.
        """
        return [(self.read(data), False)]

    def forward(self, data: Data) -> Tensor:
        """The context of data sets, (B, C)."""
        out: Tensor = self.net(torch.cat([part for part, _ in self.parts(data)], -1))
        return out

    def spec(self) -> dict[str, Any]:
        """Arguments of `make_encoder`, as JSON takes them."""
        return {
            "kind": self.kind,
            "inputs": [i.state() for i in self.inputs],
            "context": self.size,
        }


class VectorEncoder(Encoder):
    """A perceptron over all numbers of a data set, whose shapes are fixed."""

    kind = VECTOR

    def __init__(self, inputs: Sequence[Input], context: int = CONTEXT) -> None:
        super().__init__(inputs, context)
        self.net = Residual(sum(i.width for i in self.inputs), context)

    def read(self, data: Data) -> Tensor:
        parts = [feature(data[feature.input.name]) for feature in self.readers]
        return torch.cat([p.flatten(1) for p in parts], -1)


class SeriesEncoder(Encoder):
    """Convolutions over the longest axis, and a perceptron over their ends and averages.

    The numbers themselves are read too, so that nothing depends on the convolutions alone.
    """

    kind = SERIES_KIND

    def __init__(self, inputs: Sequence[Input], context: int = CONTEXT) -> None:
        super().__init__(inputs, context)
        self.length = max(i.shape[0] for i in self.inputs if i.shape)
        wide = [i for i in self.inputs if i.shape and i.shape[0] == self.length]
        self.steps = [i.name for i in wide]
        channels = sum(i.width // self.length for i in wide)
        width = ROW_HIDDEN
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels if k == 0 else width, width, 5, stride=1 + (k > 0), padding=2)
            for k in range(3)
        )
        parts = min(8, self.length // 4)
        self.pool = nn.AdaptiveAvgPool1d(parts)
        self.net = Residual(sum(i.width for i in self.inputs) + width * parts, context)

    def read(self, data: Data) -> Tensor:
        parts = [feature(data[feature.input.name]) for feature in self.readers]
        return torch.cat([p.flatten(1) for p in parts], -1)

    def parts(self, data: Data) -> list[tuple[Tensor, bool]]:
        flat = {f.input.name: f(data[f.input.name]) for f in self.readers}
        h = torch.cat([flat[name].unflatten(-1, (-1, self.length)) for name in self.steps], 1)
        for convolution in self.convolutions:
            h = silu(convolution(h))
        read = torch.cat([t.flatten(1) for t in flat.values()], -1)
        return [(read, False), (self.pool(h).flatten(1), True)]


class SetEncoder(Encoder):
    """Deep sets: a network of each row, pooled, and a network of what is pooled.

    Rows are pooled by mean and maximum, and so are their standardised numbers and the products
    of these. Rows that an index puts into groups are pooled by group too. The number of rows is
    an input. The result does not depend on the order of the rows.

    References:
        Zaheer et al. (2017), "Deep Sets", arXiv:1703.06114.
    """

    kind = SET
    center: Tensor
    spread: Tensor

    def __init__(self, inputs: Sequence[Input], context: int = CONTEXT) -> None:
        super().__init__(inputs, context)
        width = sum(f.input.width for f in self.of_rows)
        self.numbers = sum(f.input.count for f in self.of_rows)
        self.row = nn.Sequential(
            nn.Linear(width, ROW_HIDDEN), nn.SiLU(), nn.Linear(ROW_HIDDEN, ROW_HIDDEN)
        )
        count = self.moments()
        self.register_buffer("center", torch.zeros(count))
        self.register_buffer("spread", torch.ones(count))
        levels = sum(f.input.levels * f.input.count for f in self.groups)
        # Of each group a few learnt averages, the averages of the numbers, and its size.
        self.by_group = nn.Linear(ROW_HIDDEN, GROUP_FEATURES) if levels else None
        # One network for all groups: what it learns of one holds for the others.
        plain = EACH * self.numbers + 1
        self.of_group = nn.Sequential(
            nn.Linear(plain + self.numbers + GROUP_FEATURES, ROW_HIDDEN),
            nn.SiLU(),
            nn.Linear(ROW_HIDDEN, GROUP_HIDDEN),
        )
        of_groups = levels * (plain + GROUP_HIDDEN)
        rest = sum(f.input.width for f in self.of_all)
        of_all = ROW_HIDDEN + MAXIMA + count + EACH * self.numbers + 2
        self.net = Residual(of_all + of_groups + rest, context)

    @property
    def of_rows(self) -> list[Features]:
        """Readers of what each row has."""
        return [f for f in self.readers if f.input.rows]

    @property
    def of_all(self) -> list[Features]:
        """Readers of what all rows share."""
        return [f for f in self.readers if not f.input.rows]

    @property
    def groups(self) -> list[Features]:
        """Readers of an index that puts rows into groups."""
        return [f for f in self.of_rows if f.input.index and f.input.levels]

    def moments(self) -> int:
        """How many averages of numbers and products there are."""
        n = self.numbers
        return 2 * n + (n * (n + 1) // 2 if n <= MOST_PRODUCTS else n)

    @torch.no_grad()
    def fit(self, data: Data) -> None:
        super().fit(data)
        name = self.of_rows[0].input.name
        most = data[name].shape[1]
        sizes = sorted({max(1, most // k) for k in (1, 2, 3, 4)})
        found = torch.cat(
            [self._averages({k: self._cut(k, v, n) for k, v in data.items()}) for n in sizes]
        )
        spread = found.std(0)
        self.center.copy_(found.mean(0))
        self.spread.copy_(torch.where(spread > 1e-6, spread, 1.0))

    def _cut(self, name: str, value: Tensor, rows: int) -> Tensor:
        return value[:, :rows] if any(f.input.name == name for f in self.of_rows) else value

    def _numbers(self, data: Data) -> Tensor:
        """The standardised numbers of each row, (B, rows, numbers)."""
        return torch.cat([f.unit(data[f.input.name]) for f in self.of_rows], -1)

    def _averages(self, data: Data) -> Tensor:
        u = self._numbers(data)
        if self.numbers <= MOST_PRODUCTS:
            rows, columns = torch.triu_indices(self.numbers, self.numbers)
            products = (u.mT @ u / u.shape[1])[:, rows, columns]
        else:
            products = u.square().mean(1)
        parts = [u.mean(1), u.abs().amax(1), products]
        return compressed(torch.cat(parts, -1))

    def read(self, data: Data) -> Tensor:
        rest = [f(data[f.input.name]).flatten(1) for f in self.of_all]
        return torch.cat([(self._averages(data) - self.center) / self.spread, *rest], -1)

    def parts(self, data: Data) -> list[tuple[Tensor, bool]]:
        h = self.row(torch.cat([f(data[f.input.name]) for f in self.of_rows], -1))
        n, u = h.new_full((len(h), 1), h.shape[1]), self._numbers(data)
        found = [(h.mean(1), True), (h[..., :MAXIMA].max(1).values, True)]
        plain = [self.read(data), n.log(), n.rsqrt(), self._scales(u.mean(1))]
        found += [(part, False) for part in plain]
        if self.by_group is not None:
            values = torch.cat([u, u.square(), self.by_group(h)], -1)
            for f in self.groups:
                member = f.categories(data[f.input.name]).to(h.dtype).flatten(-2)
                size = member.sum(1)
                means = member.mT @ values / size.clamp(min=1.0).unsqueeze(-1)
                first, second, learnt = means.split([self.numbers] * 2 + [GROUP_FEATURES], -1)
                known = torch.cat([self._scales(first), size.log1p().unsqueeze(-1)], -1)
                seen = self.of_group(torch.cat([known, compressed(second), learnt], -1))
                found += [(known.flatten(1), False), (seen.flatten(1), True)]
        return found

    def _scales(self, averages: Tensor) -> Tensor:
        """Averages of the numbers on the three scales of each, (*B, numbers) -> (*B, 3 numbers)."""
        parts = averages.split([f.input.count for f in self.of_rows], -1)
        return torch.cat([f.scales(u) for f, u in zip(self.of_rows, parts, strict=True)], -1)


def compressed(x: Tensor) -> Tensor:
    """Averages of any size on the scale of logs, and exact ones where they are small."""
    return x.sign() * x.abs().log1p() + x.clamp(-10, 10)


class OwnEncoder(Encoder):
    """A module of the user's: {name: (B, *shape)} -> context (B, C).

    Args:
        inputs: What is read.
        context: Length C of what the module returns.
        module: The module.
    """

    kind = OWN

    def __init__(
        self, inputs: Sequence[Input], context: int = CONTEXT, module: nn.Module | None = None
    ) -> None:
        super().__init__(inputs, context)
        assert module is not None
        self.module = module

    def read(self, data: Data) -> Tensor:
        return self(data)

    def forward(self, data: Data) -> Tensor:
        # A module of the user's reads the tensors themselves.
        out: Tensor = self.module({n: t.to(torch.get_default_dtype()) for n, t in data.items()})
        return out


ENCODERS: dict[str, type[Encoder]] = {
    VECTOR: VectorEncoder,
    SET: SetEncoder,
    SERIES_KIND: SeriesEncoder,
}


def make_encoder(spec: Mapping[str, Any], module: nn.Module | None = None) -> Encoder:
    """Build an encoder from what `Encoder.spec` returned, with the user's module if it has one."""
    inputs, context = inputs_from(spec["inputs"]), int(spec["context"])
    if spec["kind"] == OWN:
        return OwnEncoder(inputs, context, module)
    return ENCODERS[check_choice("encoder", spec["kind"], ENCODERS)](inputs, context)


def kind_for(inputs: Sequence[Input], exchangeable: bool) -> str:
    """The kind of encoder for what is read.

    Args:
        inputs: What is read.
        exchangeable: Whether the rows are a set.
    """
    if exchangeable:
        return SET
    longest = max((i.shape[0] for i in inputs if i.shape), default=0)
    return SERIES_KIND if longest >= SERIES else VECTOR
