"""Milliseconds of one gradient, by autograd and compiled, and what compiling takes.

    python benchmarks/step.py [--shared DIR] [--draws 16 64 256] [NAME ...]

NAME is a posterior of the corpus. The guide is the default flow, a RealNVP of
eight couplings on a full-rank layer, with the STL gradient of the ELBO, on one
thread. Medians of 100 gradients, those of both kinds in turn. Seconds: recording
the graph, compiling it in a process of its own, and loading what an earlier run
compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import corpus
import torch
from torch import Tensor, nn

import flowvi
from flowvi.guides import make_guide
from flowvi.objectives import elbo
from flowvi.targets.recording.program import PATIENCE
from flowvi.training.compiling import Bound, Compilation, trace

REPEATS = 100


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def row(name: str, folder: Path, draws: int) -> str:
    """Time one model with one number of draws."""
    module = corpus.load_model(name)
    target = flowvi.from_pyro(module.model, *corpus.arguments(module, name, folder))
    guide = make_guide("realnvp", target.dim, depth=8).to(target.dtype)
    objective = elbo(draws)
    bound = Bound([guide, target], lambda: objective(target.log_prob, guide).bound.mean())
    trained = list(bound.trained().values())

    def eager() -> tuple[Tensor, Sequence[Tensor]]:
        value = bound()
        return value, torch.autograd.grad(-value, trained, allow_unused=True)

    for _ in range(PATIENCE + 1):
        eager()
    began = time.perf_counter()
    graph = trace(bound)
    recorded = time.perf_counter() - began
    flat = nn.utils.parameters_to_vector(trained).detach()
    made = Compilation(graph, flat)
    made.start()
    compiling = seconds(lambda: made.done(wait=True))
    began = time.perf_counter()
    function = made.load()
    loading = time.perf_counter() - began
    if function is None:
        return f"{name:<28}{target.dim:>4}{draws:>6}  {made.failed}"
    with torch.no_grad():
        found = [
            (seconds(with_grad(eager)), seconds(lambda: function(flat, *graph.draw())))
            for _ in range(REPEATS)
        ]
    slow, fast = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
    return (
        f"{name:<28}{target.dim:>4}{draws:>6}{slow:>9.2f}{fast:>10.2f}{slow / fast:>7.1f}"
        f"{recorded:>9.1f}{compiling:>9.1f}{loading:>7.2f}"
    )


def with_grad(function: Callable[[], object]) -> Callable[[], object]:
    def inner() -> object:
        with torch.enable_grad():
            return function()

    return inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FLOWVI_SHARED", corpus.ROOT.parent / "shared")
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder of the corpus")
    parser.add_argument("--draws", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'posterior':<28}{'D':>4}{'draws':>6}{'eager':>9}{'compiled':>10}{'ratio':>7}"
        f"{'record':>9}{'compile':>9}{'load':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLOWVI_CACHE"] = folder
        for name in options.names or ["eight_schools_noncentered", "garch11", "nes1980"]:
            for draws in options.draws:
                print(row(name, options.shared / "posteriors" / name, draws), flush=True)


if __name__ == "__main__":
    main()
