"""Time of an epoch of a VAE beside other libraries, with the same nets, in turn in one run."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator

import torch
from vae_rivals import CASES, Rival

from flowvi import vae

ROUNDS, IMAGES, TESTS, REACHED = 5, 5000, 1000, 5
NEEDS = {"Pythae": "pythae", "Zuko": "zuko"}


def table(images: vae.Images, epochs: int = REACHED) -> Iterator[str]:
    """Seconds of an epoch of each, ratios, and the ELBO after some epochs on all images."""
    yield f"| guide | prior | | CPU s an epoch of 50,000 images | ratio | -ELBO, {epochs} epochs |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (guide, prior), kinds in CASES.items():
        there = [kind for kind in kinds if _installed(kind)]
        seconds = _in_turn([kind(images.train[:IMAGES], guide, prior) for kind in there])
        for kind, times in zip(there, seconds, strict=True):
            ratio = statistics.median(t / ours for t, ours in zip(times, seconds[0], strict=True))
            scale = 50_000 / len(images.train[:IMAGES])
            torch.manual_seed(0)
            rival = kind(images.train, guide, prior)
            rival.train(epochs)
            reached = -rival.elbo(images.test[:TESTS])
            name = kind.__name__.replace("Flowvi", "flowvi")
            whole = scale * statistics.median(times)
            yield f"| {guide} | {prior} | {name} | {whole:.1f} | {ratio:.2f} | {reached:.2f} |"


def _installed(kind: type[Rival]) -> bool:
    name = NEEDS.get(kind.__name__)
    return name is None or importlib.util.find_spec(name) is not None


def _in_turn(rivals: list[Rival]) -> list[list[float]]:
    """Processor seconds of epochs of each, (rivals, rounds), after one to warm up."""
    times: list[list[float]] = [[] for _ in rivals]
    for i in range(ROUNDS + 1):
        for rival, found in zip(rivals, times, strict=True):
            began = time.process_time()
            rival.train(1)
            if i:
                found.append(time.process_time() - began)
    return times
