"""Part (b) of `flows.py`: time of a step of every family, beside that of other libraries."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context

import rivals
import torch

from flowvi import flows
from flowvi.flows import FLOWS, Layer
from flowvi.flows.score import through_inverse

PARTICLES = 100
ROUNDS = 5
LIBRARIES = ("pyro", "zuko", "normflows")

# At the sizes of the other libraries' rows; those of `FLOWS` where no size is given.
OURS: dict[str, Callable[[int], Layer]] = {
    "affine_diagonal": flows.Diagonal,
    "planar": FLOWS["planar"],
    "radial": FLOWS["radial"],
    "householder": lambda dim: flows.Householder(dim, reflections=8),
    "sylvester_householder": FLOWS["sylvester_householder"],
    "spline": lambda dim: flows.Spline(dim, bins=8),
    "nice": FLOWS["nice"],
    "realnvp": FLOWS["realnvp"],
    "glow": FLOWS["glow"],
    "iaf": FLOWS["iaf"],
    "maf": FLOWS["maf"],
    "naf": FLOWS["naf"],
    "nsf_coupling": FLOWS["nsf_coupling"],
    "nsf_autoregressive": FLOWS["nsf_autoregressive"],
    "ffjord": lambda dim: stirred(flows.Continuous(dim, tolerance=1e-6)),
}
# D calls of a network, or D derivatives of one, take others minutes a step.
LARGEST = {"maf": 100, "ffjord": 10}
Step = Callable[[], None]
# Where to time a step, what makes the step, and of what.
Cell = tuple[Executor, Callable[..., Step], tuple[object, ...]]


def stirred(flow: Layer) -> Layer:
    """Off the identity, at which solvers and recursions have little to do."""
    with torch.no_grad():
        for p in flow.parameters():
            inputs = p[0].numel() if p.dim() > 1 else 1
            p.add_(0.3 * inputs**-0.5 * torch.randn_like(p))
    return flow


@cache
def plain(library: str, family: str, dim: int) -> Step:
    """Sample, score, and differentiate by the total gradient."""
    torch.manual_seed(0)
    module, forward = (
        (OURS[family](dim),) * 2 if library == "flowvi" else rivals.BUILD[library][family](dim)
    )

    def step() -> None:
        eps = torch.randn(PARTICLES, dim)
        z, ladj = forward(eps)
        log_q = -0.5 * eps.square().sum(-1) - ladj
        (log_q + 0.5 * z.square().sum(-1)).mean().backward()
        module.zero_grad(set_to_none=True)

    return step


@cache
def path(how: str, family: str, dim: int) -> Step:
    """Sample, score, and differentiate by the path gradient; `how` the score is found."""
    torch.manual_seed(0)
    flow = stirred(FLOWS[family](dim))

    def step() -> None:
        eps = torch.randn(PARTICLES, dim)
        if how == "plain":
            z, ladj = flow(eps)
            loss = 0.5 * z.square().sum(-1) - ladj
        else:
            if how == "push":
                z, _, score = flow.push(eps, -eps)
            else:
                z, _ = flow(eps)
                score = through_inverse(flow, z, -eps, None)
            loss = 0.5 * z.square().sum(-1) + (score * z).sum(-1)
        loss.mean().backward()
        flow.zero_grad(set_to_none=True)

    return step


def milliseconds(build: Callable[..., Step], *args: object, seconds: float = 0.12) -> float:
    """Median time of a step, after a first one that does not count."""
    step = build(*args)
    step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def rounds(cells: dict[str, Cell]) -> dict[str, float]:
    """Time each in turn, several times; the best for each, as other work only adds time."""
    found: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(ROUNDS):
        for name, (worker, build, args) in cells.items():
            found[name].append(worker.submit(milliseconds, build, *args).result())
    return {name: min(times) for name, times in found.items()}


def table(families: Iterable[str], dims: Iterable[int]) -> None:
    """A line for each family and D: our time, and the others' in units of it."""
    dims = list(dims)
    print(
        f"sample + log_q + backward, K = {PARTICLES}, one thread, float32; best of {ROUNDS} rounds"
    )
    print("ours in ms; others as ratios to ours (above 1: ours is faster)")
    print(f"{'family':<24}{'D':>6}{'ours':>9}" + "".join(f"{name:>11}" for name in LIBRARIES))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_worker()) for name in ("flowvi", *LIBRARIES)}
        for family in families:
            for dim in (d for d in dims if d <= LARGEST.get(family, d)):
                cells: dict[str, Cell] = {
                    name: (worker, plain, (name, family, dim))
                    for name, worker in workers.items()
                    if name == "flowvi" or rivals.has(name, family, dim)
                }
                found = rounds(cells)
                own = found.pop("flowvi")
                ratios = [
                    f"{found[n] / own:>11.2f}" if n in found else f"{'-':>11}" for n in LIBRARIES
                ]
                mark = "" if min(found.values()) >= own else "  slower"
                print(f"{family:<24}{dim:>6}{own:>9.2f}" + "".join(ratios) + mark, flush=True)


def path_table(families: Iterable[str], dims: Iterable[int]) -> None:
    """A line for each family: what a step with path gradients costs, in plain steps."""
    dims = list(dims)
    print("\nstep with path gradients / plain step: by `push`, and through the inverse")
    print(f"{'family':<24}" + "".join(f"{f'D = {d}: push':>16}{'inverse':>9}" for d in dims))
    with _worker() as worker:
        for family in families:
            print(f"{family:<24}", end="", flush=True)
            for dim in dims:
                cells: dict[str, Cell] = {
                    how: (worker, path, (how, family, dim)) for how in ("plain", "push", "inverse")
                }
                found = rounds(cells)
                push, inverse = (found[how] / found["plain"] for how in ("push", "inverse"))
                print(f"{push:>16.2f}{inverse:>9.2f}", end="", flush=True)
            print()


def _worker() -> ProcessPoolExecutor:
    """A process of its own: importing zuko switches validation off in the whole process."""
    # Memory that is freed is kept: else it is a matter of luck who takes page faults in every step.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,))
