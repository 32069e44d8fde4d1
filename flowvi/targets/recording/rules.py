"""Rules by which single tensor operations are written into a recorded graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten

IDENTITIES = {
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
}
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
BY_POSITION = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten.masked_select.default,
}
# Assertions, which are only needed while the model runs.
CHECKS = {
    aten._linalg_check_errors.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._is_all_true.default,
}
READ = "_local_scalar_dense"


def name_of(func: OpOverload) -> str:
    """Name of an operation in messages."""
    name = func._schema.name.split("::")[1]
    return "a number (.item(), float(), int(), if)" if name == READ else f"'{name}'"


def written_tensors(func: OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(a.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
    return found


def functional(func: OpOverload) -> OpOverload | None:
    """The functional form of an operation that writes in place, if there is one."""
    name = func._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None)
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        found = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if found == wanted and not candidate._schema.is_mutable:
            return candidate
    return None


def masked_write(func: OpOverload, args: Any) -> tuple[OpOverload, Any]:
    """Write one number to where a mask is true, without the positions that it stands for."""
    if func is not aten.index_put_.default or len(args) > 3 or len(args[1]) != 1:
        return func, args
    memory, (mask,), value = args
    if mask is None or mask.dtype != torch.bool or value.numel() != 1:
        return func, args
    mask = mask.reshape((*mask.shape, *(1,) * (memory.dim() - mask.dim())))
    return aten.masked_fill_.Tensor, (memory, mask, value.reshape(()).to(memory.dtype))


def static_positions(func: OpOverload, args: Any) -> tuple[OpOverload, Any]:
    """Write boolean index masks as positions, which `torch.func.vmap` can carry."""
    if func not in BY_POSITION:
        return func, args
    if func is aten.masked_select.default:
        x, mask = torch.broadcast_tensors(*args)
        func, args = aten.index.Tensor, (x, [mask])
    positions: list[Tensor | None] = []
    for t in args[1]:
        is_mask = t is not None and t.dtype in (torch.bool, torch.uint8)
        positions += t.nonzero(as_tuple=True) if is_mask else [t]
    return func, (args[0], positions, *args[2:])


# Recorded graphs call the functions below; they must work under vmap and autograd.


def item(values: Sequence[Tensor], i: int) -> Tensor:
    """One of several results."""
    return values[i]


def nan_if_failed(pair: tuple[Tensor, Tensor], i: int) -> Tensor:
    """A factorisation, or NaN where it failed: outside of a graph that raises an error."""
    factor, info = pair[i], pair[1]
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def take(flat: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of memory, read from its elements in one row."""
    return flat.index_select(0, index).reshape(shape)


def put(flat: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Memory after a write to some of its elements."""
    return flat.index_put((index,), value.reshape(-1))


def as_shape(
    value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a write leaves in a tensor of this shape and precision."""
    if not isinstance(value, Tensor):
        return torch.full(shape, value, dtype=dtype, device=device)
    return value.to(dtype).expand(shape)
