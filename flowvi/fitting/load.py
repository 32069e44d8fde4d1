"""Load a saved fit: tensors as safetensors, the rest as JSON, no pickle."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowvi.draws.storage import from_state
from flowvi.fitting.fit_folder import (
    CHAINS,
    HISTORY,
    NESTED,
    OWN,
    ROWS,
    STRUCTURED,
    FitFiles,
    all_latents,
    compare_latents,
    read_manifest,
)
from flowvi.fitting.identity import latents
from flowvi.fitting.result import Fit, NestedFit, RowFit
from flowvi.fitting.structured_fit import StructuredFit
from flowvi.guides.amortized import Amortised
from flowvi.guides.guide import Guide
from flowvi.guides.recipes import amortised
from flowvi.guides.registry import guide_names, make_guide
from flowvi.guides.structured import NoLatents, StructuredGuide
from flowvi.objectives.nested import NestedTarget, inner_guide
from flowvi.runtime.arguments import check_path, check_type
from flowvi.runtime.display import later
from flowvi.runtime.files import CheckpointError, Checksum, read_prefix
from flowvi.runtime.rng import isolated_rng
from flowvi.runtime.tensors import check_finite, check_module, read_module, read_tensors
from flowvi.targets import GlobalTarget, LocalTarget, Target
from flowvi.targets.structure import VARYING, MarginalTarget, structure

# File by which the folder of an amortised guide is known.
AMORTIZED = "amortized.json"


@overload
def load(folder: str | os.PathLike[str], target: Target, guide: Guide | None = None) -> Fit: ...


@overload
def load(
    folder: str | os.PathLike[str], target: Callable[..., None], guide: nn.Module | None = None
) -> Any: ...


@overload
def load(
    folder: str | os.PathLike[str],
    target: LocalTarget,
    guide: Guide | None = None,
    inner: Amortised | None = None,
) -> RowFit | NestedFit: ...


def load(
    folder: str | os.PathLike[str],
    target: Any,
    guide: Any = None,
    inner: Amortised | None = None,
) -> Any:
    """Load a fit that `Fit.save`, `RowFit.save` or `NestedFit.save` wrote, or an amortised guide.

    Args:
        folder: The folder of the saved fit.
        target: The same model on the same data; its latent sites are compared. For an amortised
            guide, the model itself.
        guide: For a fit of a user's guide, a guide of the same architecture; for an amortised
            guide, the user's encoder.
        inner: For a nested fit, an inner guide of the same architecture.

    Raises:
        CheckpointError: The folder holds no fit, or a fit of another model; the
            message names the file or the site.
    """
    path = check_path("folder", folder)
    if (path / AMORTIZED).is_file():
        if not callable(target) or isinstance(target, Target):
            raise CheckpointError(
                f"{path} holds an amortised guide, which reads any data set: give load the model "
                f"itself, not a target of one data set; got {type(target).__name__}."
            )
        return later("flowvi.amortized.storage", "load_guide")(path, target, guide)
    check_type("target", target, Target, "what from_pyro or from_density returned")
    manifest = read_manifest(path)
    kind = manifest.get("kind")
    _same_kind(kind in (ROWS, NESTED), isinstance(target, LocalTarget), path)
    files = FitFiles(path, manifest.get("files"))
    if isinstance(target, LocalTarget) and kind == NESTED:
        compare_latents(manifest["latents"], all_latents(target), path)
        return _load_nested(files, manifest, target, guide, inner)
    compare_latents(manifest["latents"], latents(target), path)
    if isinstance(target, LocalTarget):
        return _load_rows(files, manifest, target, guide)
    if kind == STRUCTURED:
        return _load_structured(files, manifest, target, guide)
    guides = []
    for i in range(manifest["guides"]):
        file, seal = files.of(f"guide_{i}")
        with isolated_rng():
            new = _build(manifest["meta"]["specs"][i], target, guide, file, seal)
        guides.append(new)
    if files.has(OWN):
        _fill_own(target, *files.of(OWN))
    history = _history(files)
    meta, log, bounds = manifest["meta"], manifest["log"], manifest["bounds"]
    chains = manifest.get("chains")
    table = None
    if chains is not None:
        table = from_state(target, {"arrays": _chains(target, files), "meta": chains})
    return Fit(target, guides, bounds, history, log, meta, table)


def _load_rows(
    files: FitFiles, manifest: dict[str, Any], target: LocalTarget, guide: Guide | None
) -> RowFit:
    meta = manifest["meta"]
    spec = meta["specs"][0]
    file, seal = files.of("guide_0")
    if guide is None and not spec.get("own") and spec.get("name") in guide_names():
        with isolated_rng():
            new: Guide = amortised(target, spec["name"])
    else:
        new = _copy_of_own(guide, file, spec.get("name"))
    new = new.to(dtype=target.dtype, device=target.device)
    read_module(file, new, seal)
    if files.has(OWN):
        _fill_own(target, *files.of(OWN))
    return RowFit(target, new, _history(files), manifest["log"], meta)


def _load_nested(
    files: FitFiles,
    manifest: dict[str, Any],
    target: LocalTarget,
    guide: Guide | None,
    inner: Amortised | None,
) -> NestedFit:
    meta, file = manifest["meta"], files.of("guide_1")
    specs, particles = meta["specs"], meta.get("particles")
    whole = len(specs) == 2 and all(isinstance(spec, dict) for spec in specs)
    if target.shared is None or not whole or not isinstance(particles, int):
        raise CheckpointError(f"{files.path} holds no nested fit of {target.name}.")
    spec, of_rows = specs
    sees_theta = bool(of_rows.get("sees_theta"))
    with isolated_rng():
        theta = _build(spec, target.shared, guide, *files.of("guide_0"))
        if inner is not None:
            rows = copy.deepcopy(inner).to(dtype=target.dtype, device=target.device)
        elif of_rows.get("name") in guide_names():
            mixes = bool(of_rows.get("mixes"))
            rows = inner_guide(target, of_rows["name"], sees_theta, mixes)
        else:
            raise CheckpointError(
                f"{files.path} holds a guide of rows of your own making; pass one of the same "
                "build: flowvi.load(folder, target, inner=...)."
            )
    read_module(file[0], rows, file[1])
    if files.has(OWN):
        _fill_own(target, *files.of(OWN))
    density = NestedTarget(target, rows, particles, sees_theta, meta.get("batch_size"))
    density.inner_name = str(of_rows.get("name"))
    density.weighted = meta.get("outer", 1) > 1
    log, history = list(manifest["log"]), _history(files)
    # Earlier versions saved no bounds.
    bounds = list(manifest.get("bounds") or [math.nan])
    return NestedFit(density, [theta], bounds, history, log, meta)


def _load_structured(
    files: FitFiles, manifest: dict[str, Any], target: Target, guide: Guide | None
) -> StructuredFit:
    found = structure(target)
    if not found or not isinstance(target, GlobalTarget):
        raise CheckpointError(
            f"{files.path} was fitted with local latents that are integrated, but {target.name} "
            f"has {found}."
        )
    marginal = MarginalTarget(target, found)
    file, seal = files.of(OWN)
    own, wanted = read_tensors(file, seal), marginal.own_state()
    for name, value in wanted.items():
        bad = name not in own or not own[name].isfinite().all()
        # As many further modes as were found.
        leading = 1 if name in VARYING else 0
        if bad or own[name].shape[leading:] != value.shape[leading:]:
            raise CheckpointError(
                f"{file}: '{name}' of the local latents is missing or not finite."
            )
    marginal.set_own_state({n: own[n].to(value) for n, value in wanted.items()})
    specs = manifest["meta"]["specs"]
    guides: list[Guide] = []
    for i in range(manifest["guides"]):
        with isolated_rng():
            shared = _build(specs[i], marginal, guide, *files.of(f"guide_{i}"))
        guides.append(StructuredGuide(marginal, shared))
    bounds = [float(b) for b in manifest.get("bounds") or [math.nan] * len(guides)]
    log, meta, history = list(manifest["log"]), manifest["meta"], _history(files)
    return StructuredFit(target, guides, bounds, history, log, meta, marginal=marginal)


def _chains(target: Target, files: FitFiles) -> dict[str, Tensor]:
    """Draws of Markov chains, (C, S, D), and statistics of each draw, (C, S)."""
    file, seal = files.of(CHAINS)
    arrays = read_tensors(file, seal)
    z = arrays.get("z", torch.empty(0))
    whole = z.dim() == 3 and z.shape[-1] == target.dim and "log_q" in arrays
    alike = all(a.shape[:2] == z.shape[:2] for a in arrays.values())
    numbers = [z, arrays["log_q"]] if whole else [z]
    finite = all(a.is_floating_point() and bool(a.isfinite().all()) for a in numbers)
    if not (whole and alike and finite):
        raise CheckpointError(
            f"{file} has no finite draws of chains of {target.dim} numbers, and no finite log_q."
        )
    return arrays


def _history(files: FitFiles) -> dict[str, Any]:
    file, seal = files.of(HISTORY)
    found = read_tensors(file, seal)
    shapes = {tuple(column.shape) for column in found.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise CheckpointError(f"{file} has no number for every step: columns {sorted(shapes)}.")
    return {name: column.numpy() for name, column in found.items()}


def _same_kind(there: bool, here: bool, path: Path) -> None:
    kinds = ("one vector of latents", "latents for each row (local=)")
    if there != here:
        raise CheckpointError(
            f"{path} was fitted to a model with {kinds[there]}; this target has {kinds[here]}."
        )


def _build(
    spec: dict[str, Any], target: Target, own: Guide | None, file: Path, checksum: Checksum | None
) -> Guide:
    """Build a guide, and load its tensors from a file."""
    name, sizes = str(spec.get("name")), dict(spec.get("sizes") or {})
    if name == NoLatents.kind and not target.dim:
        return NoLatents()
    if name in guide_names():
        _check_sizes(sizes, file, checksum)
        try:
            with torch.device("meta"):
                # On the meta device it takes no memory.
                check_module(file, make_guide(name, target.dim, **sizes), checksum)
            new = make_guide(name, target.dim, **sizes)
        except CheckpointError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{file} fits no guide '{name}' of {sizes}: {error}") from None
    else:
        new = _copy_of_own(own, file, name)
    new = new.to(dtype=target.dtype, device=target.device)
    read_module(file, new, checksum)
    return new


def _copy_of_own(own: Guide | None, file: Path, name: str | None) -> Guide:
    if own is None:
        raise CheckpointError(
            f"{file.parent} holds a guide of your own making ({name}); "
            "pass one of the same build: flowvi.load(folder, target, guide=...)."
        )
    return copy.deepcopy(own)


def _check_sizes(sizes: Mapping[str, Any], file: Path, checksum: Checksum | None) -> None:
    """Reject sizes with more layers than the file has bytes, before any layer is built."""
    read_prefix(file, 1, checksum)
    for value in tree_leaves(dict(sizes)):
        if isinstance(value, int) and value > file.stat().st_size:
            raise CheckpointError(f"{file} is too small for a guide of {sizes}.")


def _fill_own(target: Target | LocalTarget, file: Path, checksum: Checksum | None) -> None:
    found, wanted = read_tensors(file, checksum), dict(target.named_parameters())
    own = {name: value for name, value in found.items() if name in wanted}
    check_finite(file, own, wanted)
    for name, value in found.items():
        if name not in wanted or wanted[name].shape != value.shape:
            raise CheckpointError(f"{file}: parameter '{name}' does not fit {target.name}.")
        with torch.no_grad():
            wanted[name].copy_(value)
