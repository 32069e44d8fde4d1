"""Save and load amortised guides: tensors as safetensors, the rest as JSON, no pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flowvi.amortized.covariates import Covariates, UnsavedCovariates
from flowvi.amortized.encoders import OWN
from flowvi.amortized.guide import AmortizedGuide
from flowvi.amortized.network import make_network
from flowvi.amortized.novelty import Novelty
from flowvi.amortized.problem import FIXED, Problem
from flowvi.fitting.fit_folder import compare_latents
from flowvi.fitting.identity import latents
from flowvi.guides.registry import guide_names
from flowvi.runtime.files import (
    CheckpointError,
    Checksum,
    make_folder,
    read_json,
    write_atomic,
    write_json,
)
from flowvi.runtime.tensors import (
    cpu_state_dict,
    read_module,
    read_state,
    serialize,
    write_state,
)
from flowvi.targets.pyro.naming import name_of

MANIFEST = "amortized.json"
FORMAT = 1
NETWORK, EXAMPLE = "network.safetensors", "example.safetensors"
FIELDS = {"latents": dict, "encoder": dict, "guide": dict, "rows": list, "meta": dict, "log": list}


def save_guide(guide: AmortizedGuide, folder: str | os.PathLike[str]) -> Path:
    """Write a guide to a folder: its network, the example arguments and facts.

    Raises:
        ValueError: An argument of the model is neither numbers nor text, and cannot be written.
    """
    path = make_folder(folder, "an amortised guide")
    problem, network = guide.problem, guide.network
    args, kwargs = problem.runner.args, problem.runner.kwargs
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, Tensor | int | float | str | bool | None):
            raise ValueError(
                f"An argument of {guide.name} holds a {type(leaf).__name__}, which is not saved: "
                "give the model arrays, numbers and text, or bind it with functools.partial."
            )
    tensors = {"network": network, "novelty": guide.novelty}
    state = {k: cpu_state_dict(module) for k, module in tensors.items()}
    flat = {f"{k}.{n}": t for k, part in state.items() for n, t in part.items()}
    files = {
        "network": write_atomic(path / NETWORK, serialize(flat))._asdict(),
        "example": write_state(
            path / EXAMPLE,
            {
                "args": tree_map(_plain, list(args)),
                "kwargs": tree_map(_plain, dict(kwargs)),
                "losses": torch.as_tensor(guide.losses),
            },
        )._asdict(),
    }
    write_json(
        path / MANIFEST,
        {
            "format": FORMAT,
            "latents": latents(problem.target),
            "encoder": network.encoder.spec(),
            "guide": network.guide_spec,
            "dtype": str(network.dtype).removeprefix("torch."),
            "novelty": len(guide.novelty.distances),
            "width": len(guide.novelty.mean),
            "rows": list(problem.rows),
            "varying": problem.varying,
            "dims": {
                name: [axes] if isinstance(axes, str) else list(axes)
                for name, axes in problem.dims.items()
            },
            "coords": {dim: [_label(x) for x in labels] for dim, labels in problem.coords.items()},
            "own_covariates": problem.draws_own_covariates,
            "meta": guide.meta,
            "log": guide.log,
            "files": files,
        },
    )
    return path


def load_guide(
    folder: str | os.PathLike[str],
    model: Callable[..., Any],
    encoder: nn.Module | None = None,
    covariates: Covariates | None = None,
) -> AmortizedGuide:
    """Read a guide that `AmortizedGuide.save` wrote.

    Args:
        folder: The folder.
        model: The same model; its latent sites are compared.
        encoder: A module of the same architecture, where one was given to `amortize`.
        covariates: The function that was given to `amortize`, without which nothing can be
            simulated.

    Raises:
        CheckpointError: The folder holds no such guide, or one of another model.
    """
    path = Path(folder)
    found = read_json(path / MANIFEST)
    whole = isinstance(found, dict) and all(isinstance(found.get(k), t) for k, t in FIELDS.items())
    if not whole or found.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not a file that this flowvi wrote.")
    try:
        seals = {k: Checksum(int(v["size"]), str(v["sha256"])) for k, v in found["files"].items()}
        example = read_state(path / EXAMPLE, seals["example"])
        varying = [str(name) for name in found["varying"]]
        problem = Problem(
            model,
            tuple(example["args"]),
            dict(example["kwargs"]),
            (int(found["rows"][0]), int(found["rows"][1])),
            covariates or _covariates(found["own_covariates"], varying, name_of(model)),
            found.get("dims"),
            found.get("coords"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is not whole: {error}.") from None
    compare_latents(found["latents"], latents(problem.target), path)
    if problem.varying != varying:
        raise CheckpointError(
            f"{path} was trained with the varying arguments {varying}; this model has "
            f"{problem.varying}."
        )
    if found["encoder"].get("kind") == OWN and encoder is None:
        raise CheckpointError(
            f"{path} holds an encoder of your own making; pass one of the same build: "
            "flowvi.load(folder, model, guide=encoder)."
        )
    if found["guide"].get("name") not in guide_names():
        raise CheckpointError(f"{path / MANIFEST} names no guide of flowvi.")
    with torch.random.fork_rng(devices=[]):
        network = make_network(found["encoder"], found["guide"], encoder, dim=problem.target.dim)
    network = network.to(getattr(torch, str(found["dtype"]), torch.float32))
    novelty = Novelty(int(found["width"]), int(found["novelty"]))
    both = nn.ModuleDict({"network": network, "novelty": novelty})
    read_module(path / NETWORK, both, seals["network"])
    network.eval()
    losses = np.asarray(example["losses"])
    return AmortizedGuide(problem, network, novelty, losses, found["log"], found["meta"])


def _label(label: Any) -> Any:
    """A label that JSON has: itself, or its text."""
    return label if isinstance(label, str | int | float | bool) else str(label)


def _plain(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _covariates(own: bool, varying: list[str], name: str) -> Covariates | str | None:
    if own:
        return UnsavedCovariates(name, varying)
    return None if varying else FIXED
