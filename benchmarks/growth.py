"""Time and memory against D, draws K, rows N and groups G, with slopes, and a picture of them.

    python benchmarks/growth.py [--only D] [--sizes 100 1000] [--figure docs/images/growth.png]

A step is the ELBO of K draws with its STL gradient, by autograd, on one thread. Seconds are of
the processor, medians; bytes are the most that tensors hold at the same time
(`flowvi.runtime.memory.peak_bytes`) beside the parameters. Slopes are of a line through the
logarithms at sizes within a factor of 100 of the largest. D: a normal density, K = 16. K: the same
with D = 10. N: logistic regression on ten covariates, all rows in each step, K = 16. "draws" is
`draw` with a limit of 64 MB: K draws scored by 1,000 rows, and 100 draws by N. G: the default call
on the normal hierarchy of models/normal_groups.py and 1,000 draws, each size in a process of its
own; bytes are the most that the process held, less what it held after imports.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structure
import torch
from torch import Tensor
from torch.distributions import constraints

import flowvi
from flowvi.draws.sampling import draw
from flowvi.guides import Guide, make_guide
from flowvi.guides.guide import FULL_RANK_DIM
from flowvi.objectives import elbo
from flowvi.runtime import memory

GUIDES = ("meanfield", "lowrank", "fullrank", "realnvp", "iaf")
# What the guide's formula says of large D, for one draw.
FORMULAS = {
    "meanfield": "D",
    "lowrank": "D R",
    "fullrank": "D²",
    "realnvp": "D² up to 2,000, then D (R + W)",
    "iaf": "D² up to 2,000, then D (R + W)",
}
SIZES = {
    "D": (2, 10, 100, 1000, 2000, 4000, 10_000),
    "K": (1, 10, 100, 1000, 10_000),
    "N": (100, 1000, 10_000, 100_000, 1_000_000),
    "G": (100, 1000, 10_000, 100_000),
}
ENOUGH, FEWEST = 0.3, 3
ALL_ROWS, DRAWN, FITTED = "step on all rows", "draws, 64 MB", "fit of a hierarchy"
COLOURS = {
    "meanfield": "#4477aa",
    "lowrank": "#66ccee",
    "fullrank": "#228833",
    "realnvp": "#ccbb44",
    "iaf": "#ee6677",
    ALL_ROWS: "#777777",
    DRAWN: "#aa3377",
    FITTED: "#222222",
}


class Cell(NamedTuple):
    """Seconds and bytes of one size."""

    size: int
    seconds: float
    bytes: int


def normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1)


def step(guide: Guide, log_p: Callable[[Tensor], Tensor], draws: int) -> Callable[[], object]:
    """One gradient of the ELBO."""
    objective, trained = elbo(draws), list(guide.parameters())
    return lambda: torch.autograd.grad(-objective(log_p, guide).bound, trained, allow_unused=True)


def regression(rows: int) -> flowvi.Target:
    """Logistic regression; the density of one point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 10, generator=generator)
    y = (torch.rand(rows, generator=generator) < 0.5).to(x)

    def log_prob(values: dict[str, Tensor]) -> Tensor:
        logits = x @ values["w"]
        fit = y * logits - torch.nn.functional.softplus(logits)
        return fit.sum() - 0.5 * values["w"].square().sum()

    return flowvi.from_density(log_prob, {"w": flowvi.Site((10,), constraints.real)})


def measured(size: int, work: Callable[[], object]) -> Cell:
    """Median time of a call, and the most bytes that it holds."""
    work()
    held, times = memory.peak_bytes(work), list[float]()
    while sum(times) < ENOUGH or len(times) < FEWEST:
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return Cell(size, statistics.median(times), held)


def of_dimensions(name: str) -> Iterator[Cell]:
    for dim in SIZES["D"]:
        if name != "fullrank" or dim <= FULL_RANK_DIM:
            yield measured(dim, step(make_guide(name, dim), normal, 16))


def of_draws(name: str) -> Iterator[Cell]:
    guide = make_guide(name, 10)
    return (measured(draws, step(guide, normal, draws)) for draws in SIZES["K"])


def of_rows() -> Iterator[Cell]:
    """Steps on all rows."""
    for rows in SIZES["N"]:
        target = regression(rows)
        guide = make_guide("meanfield", 10).to(target.dtype)
        yield measured(rows, step(guide, target.log_prob, 16))


def of_evaluations(what: str) -> Iterator[Cell]:
    """Draws that are scored, as many as K or at as many rows as N, within 64 MB."""
    for size in SIZES[what][2:] if what == "K" else SIZES[what]:
        target = regression(1000 if what == "K" else size)
        guide = make_guide("meanfield", 10).to(target.dtype)
        draws = size if what == "K" else 100

        def work(
            draws: int = draws, target: flowvi.Target = target, guide: Guide = guide
        ) -> object:
            with memory.memory_limit("64MB"):
                return draw(target, [guide], draws).z

        yield measured(size, work)


def of_groups() -> Iterator[Cell]:
    """Whole fits, to be trusted or not."""
    options = structure.parser().parse_args([])
    for size in SIZES["G"]:
        with tempfile.TemporaryDirectory() as made:
            case, folder = structure.CASES["normal"], Path(made)
            np.savez(folder / "data.npz", *case.arguments(size, 0, options.shared))
            row = structure.run("flowvi", case, folder, options, 0.0)
        if "verdict" not in row:
            print(f"G = {size:,}: {row['note']}")
            return
        print(f"G = {size:,}: {row['verdict']}, k-hat {row['khat']:.2f}, {row['note']}")
        yield Cell(size, row["cpu"], round((row["peak_mb"] - row["base_mb"]) * 2**20))


def slope(cells: Sequence[Cell], column: int) -> float:
    """Of the logarithms, at the larger sizes."""
    largest = max(cell.size for cell in cells)
    late = [c for c in cells if c.size * 100 >= largest]
    x, y = np.log([c.size for c in late]), np.log([c[column] for c in late])
    return float(np.polyfit(x, y, 1)[0])


def picture(found: dict[tuple[str, str], list[Cell]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from flowvi.plots.theme import style

    axis = {"D": "dimensions D", "K": "draws K", "N": "rows N", "G": "groups G"}
    shown = [what for what in axis if any(what == key for key, _ in found)]
    with style(mathematics=True):
        figure, axes = plt.subplots(
            2,
            len(shown),
            figsize=(3.0 * len(shown), 5.0),
            sharex="col",
            sharey="row",
            layout="constrained",
            squeeze=False,
        )
        for (what, name), cells in found.items():
            top, bottom = axes[:, shown.index(what)]
            sizes = [c.size for c in cells]
            look = {"marker": "o", "ms": 3, "c": COLOURS[name]}
            top.loglog(sizes, [1e3 * c.seconds for c in cells], **look)
            bottom.loglog(sizes, [c.bytes / 1e6 for c in cells], **look, label=name)
            bottom.set_xlabel(axis[what])
        axes[0, 0].set_ylabel("processor time, ms")
        axes[1, 0].set_ylabel("memory, MB")
        lines = {
            t: h for ax in axes[1] for h, t in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend([*lines.values()], [*lines], loc="outside right center")
        figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--only", choices=SIZES, action="append", help="may be given again")
    parser.add_argument("--sizes", type=int, nargs="+", help="in place of the usual ones")
    options = parser.parse_args()
    wanted = options.only or list(SIZES)
    SIZES.update({what: tuple(options.sizes) for what in wanted if options.sizes})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[tuple[str, str], list[Cell]] = {}
    for what, measure in (("D", of_dimensions), ("K", of_draws)):
        if what in wanted:
            found |= {(what, name): list(measure(name)) for name in GUIDES}
    if "N" in wanted:
        found["N", ALL_ROWS] = list(of_rows())
    found |= {(what, DRAWN): list(of_evaluations(what)) for what in ("K", "N") if what in wanted}
    if "G" in wanted:
        found["G", FITTED] = list(of_groups())
    print("| against | guide | ms | MB | slope of time | of memory | formula |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (what, name), cells in found.items():
        first, last = cells[0], cells[-1]
        formula = FORMULAS.get(name, "") if what == "D" else what
        print(
            f"| {what} = {first.size:,} to {last.size:,} | {name} "
            f"| {1e3 * first.seconds:.3g} to {1e3 * last.seconds:.3g} "
            f"| {first.bytes / 1e6:.2g} to {last.bytes / 1e6:.3g} "
            f"| {slope(cells, 1):.2f} | {slope(cells, 2):.2f} | {formula} |"
        )
    if options.figure:
        picture(found, options.figure)


if __name__ == "__main__":
    main()
