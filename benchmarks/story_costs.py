"""What a family costs beside a plain Gaussian: draws, scores and path gradients.

A draw is one z with its log density under a guide of one posterior, D = 16 (a call makes 1,000). A
row is one image's z under a guide that reads 64 features, as in a VAE (a call makes 100). Times are
of the processor, the best of five rounds; ratios are to the diagonal Gaussian in the same column.

    python benchmarks/story_costs.py
    python benchmarks/story_costs.py --quick
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flowvi.flows import FLOWS, Chain, Diagonal, Triangular
from flowvi.guides import FlowGuide, Guide

FAMILIES = (
    *("planar", "radial", "householder", "sylvester", "realnvp", "nsf_coupling", "iaf", "maf"),
    *("naf", "spline", "glow"),
)
DIM, FEATURES, DRAWS, ROWS = 16, 64, 1000, 100
ROUNDS, LEAST = 5, 0.05


def guides(families: Sequence[str], context: int) -> Iterator[tuple[str, Guide]]:
    """The Gaussians, and each family at its usual size on a diagonal affine layer."""
    yield "gaussian", FlowGuide(DIM, Chain([]), Diagonal(DIM, context))
    yield "full rank", FlowGuide(DIM, Chain([]), Triangular(DIM, context))
    for name in families:
        yield name, FlowGuide(DIM, FLOWS[name](DIM, context), Diagonal(DIM, context))


def microseconds(call: Callable[[], object], items: int) -> float:
    """Processor time of one item."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        began, calls, spent = time.process_time(), 0, 0.0
        while spent < LEAST:
            call()
            calls, spent = calls + 1, time.process_time() - began
        best = min(best, spent / calls)
    return 1e6 * best / items


def measured(guide: Guide, context: Tensor | None) -> list[float]:
    """Microseconds of a draw, of a score, and of a step of the path gradient."""
    shape = (DRAWS,) if context is None else ()
    items = DRAWS if context is None else len(context)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p) / max(1, p.shape[-1] if p.dim() else 1) ** 0.5)
        z, _ = guide.sample(shape, context)

    def plain(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    def step() -> None:
        drawn = guide.sample_with_score(shape or (1,), context)
        (0.5 * drawn.z.square().sum(-1) + (drawn.score * drawn.z).sum(-1)).mean().backward()
        guide.zero_grad(set_to_none=True)

    return [
        microseconds(plain(lambda: guide.sample(shape, context)), items),
        microseconds(plain(lambda: guide.log_prob(z, context)), items),
        microseconds(step, items),
    ]


def table(families: Sequence[str]) -> Iterator[str]:
    """A line for each family: microseconds of the Gaussian, and ratios to it."""
    yield "| family | draw | score | path gradient | row: draw | row: score | row: path gradient |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    torch.manual_seed(0)
    rows = torch.randn(ROWS, FEATURES)
    base: list[float] = []
    pairs = zip(guides(families, 0), guides(families, FEATURES), strict=True)
    for (name, one), (_, reads) in pairs:
        found = [*measured(one, None), *measured(reads, rows)]
        if not base:
            base = found
            cells = [f"{x:.2f} µs" for x in found]
        else:
            cells = [f"{x / y:.1f}" for x, y in zip(found, base, strict=True)]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two families")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for line in table(FAMILIES[:2] if options.quick else FAMILIES):
        print(line, flush=True)


if __name__ == "__main__":
    main()
