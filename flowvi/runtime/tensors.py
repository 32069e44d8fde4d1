"""Tensors, modules and states in files. Reading a file gives numbers and text and runs no code.

Tensors are stored in the safetensors format, everything else as JSON in the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from flowvi.runtime.files import (
    LONGEST_TEXT,
    CheckpointError,
    Checksum,
    parse_json,
    read_checked,
    read_prefix,
    write_atomic,
)

# Key of the text of a state in a file of tensors, and of the reference to a tensor in that text.
TEXT, TENSOR = "state", "tensor"
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


def serialize(tensors: Mapping[str, Tensor], text: str = "") -> bytes:
    """The content of a file of tensors by name, and of a text beside them."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(whole, {TEXT: text} if text else None)


def write_state(file: Path, state: Any) -> Checksum:
    """Write lists and dictionaries of tensors, numbers, text and None as one file."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_split_tensors(state, tensors))
    return write_atomic(file, serialize(tensors, text))


def cpu_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module by name, as copies on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}


def read_tensors(file: Path, checksum: Checksum | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file by name, on the CPU."""
    _header(file, checksum)
    return _loaded(read_checked(file, checksum), file)


def read_state(file: Path, checksum: Checksum | None = None) -> Any:
    """Read what `write_state` wrote."""
    text = _header(file, checksum).get("__metadata__", {}).get(TEXT, "")
    tensors = read_tensors(file, checksum)
    try:
        return _join_tensors(parse_json(text.encode(), file), tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a file that flowvi wrote: {error}.") from None


def read_module(file: Path, module: nn.Module, checksum: Checksum | None = None) -> None:
    """Load all parameters and buffers of a module from a file, after checking their shapes."""
    check_module(file, module, checksum)
    tensors = read_tensors(file, checksum)
    check_finite(file, tensors, module.state_dict())
    module.load_state_dict(tensors)


def check_finite(file: Path, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are not finite where a fresh module has finite ones.

    Raises:
        CheckpointError: A tensor has one; the message has its name and place.
    """
    for name, value in found.items():
        bad = (~torch.isfinite(value)).nonzero()
        if len(bad) and bool(torch.isfinite(own[name]).all()):
            place = bad[0].tolist()
            raise CheckpointError(
                f"{file}: parameter '{name}' is {value[tuple(place)].item()}"
                f"{f' at {place}' if place else ''}, so there is no fit in it; fit again, or "
                "take a copy of the file from before it was changed."
            )


def check_module(file: Path, module: nn.Module, checksum: Checksum | None = None) -> None:
    """Compare names, shapes and types of a file's tensors with those of a module.

    Raises:
        CheckpointError: A tensor is missing, too many, or of another shape or kind.
    """
    header = {k: v for k, v in _header(file, checksum).items() if k != "__metadata__"}
    try:
        shapes = {k: (tuple(v["shape"]), TYPES[v["dtype"]]) for k, v in header.items()}
    except (KeyError, TypeError):
        raise CheckpointError(f"{file} is not a file that flowvi wrote.") from None
    _compare(module, shapes, file)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Load all parameters and buffers of a module, after checking names, shapes and types.

    Args:
        module: Changed in place.
        tensors: By name, as `cpu_state_dict` made them.
        where: Where the tensors come from, for messages.
    """
    _compare(module, {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}, where)
    module.load_state_dict(dict(tensors))


def _header(file: Path, checksum: Checksum | None) -> dict[str, Any]:
    """The description of the tensors at the beginning of a file."""
    length = int.from_bytes(read_prefix(file, 8, checksum), "little")
    if length > LONGEST_TEXT:
        raise CheckpointError(f"{file} is not a file that flowvi wrote: its header is too long.")
    header = parse_json(read_prefix(file, 8 + length)[8:], file)
    if not isinstance(header, dict) or not all(isinstance(v, dict) for v in header.values()):
        raise CheckpointError(f"{file} is not a file that flowvi wrote.")
    return header


def _loaded(content: bytes, file: Path) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not a file that flowvi wrote: {error}.") from None


def _compare(
    module: nn.Module, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], where: object
) -> None:
    wanted = {k: (tuple(v.shape), v.dtype) for k, v in module.state_dict().items()}
    for name in [*wanted, *(n for n in found if n not in wanted)]:
        a, b = found.get(name), wanted.get(name)
        # Precisions may differ: a model can be captured again in another one.
        same = a and b and a[0] == b[0] and a[1].is_floating_point == b[1].is_floating_point
        if not same:
            raise CheckpointError(
                f"{where}: tensor '{name}' is {_words(a)}, but the guide's is {_words(b)}."
            )


def _words(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} of {tensor[1]}"


def _split_tensors(state: Any, tensors: dict[str, Tensor]) -> Any:
    """The state as JSON has it, with its tensors moved to a table."""
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state
        return {TENSOR: name}
    if isinstance(state, Mapping):
        # A list of pairs, because keys may be of any type, and may equal the key of a reference.
        return {"dict": [[k, _split_tensors(v, tensors)] for k, v in state.items()]}
    if isinstance(state, list | tuple):
        return [_split_tensors(v, tensors) for v in state]
    if state is None or isinstance(state, str | int | float):
        return state
    raise TypeError(f"A state holds tensors, numbers and text; got {type(state).__name__}.")


def _join_tensors(text: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(text, list):
        return [_join_tensors(v, tensors) for v in text]
    if not isinstance(text, dict):
        return text
    if "dict" in text:
        return {k: _join_tensors(v, tensors) for k, v in text["dict"]}
    return tensors[text[TENSOR]]
