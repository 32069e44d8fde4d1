"""Record the tensor operations that depend on given inputs, as a graph that can be replayed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten

# Frames below these folders, or in these files of the standard library, are not the user's.
LIBRARIES = tuple(
    f"{Path(file).parent}/" for file in (torch.__file__, pyro.__file__, str(Path(__file__).parent))
)
STANDARD = ("contextlib.py", "functools.py")
IDENTITIES = {
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
}
BY_POSITION = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten.masked_select.default,
}
CHECKS = {aten._linalg_check_errors.default, aten._assert_async.default, aten._assert_async.msg}


class LatentValueRead(Exception):
    """A value that depends on an input was read into Python."""


class RandomNumber(Exception):
    """A random number was drawn while the function was being recorded."""


class Unrecordable(Exception):
    """An operation has no functional form that the tape knows."""


class _Storage:
    """What the tape knows about one tracked piece of memory.

    `owner` is the geometry of the first tensor seen on it; `views` maps each
    geometry to the node that holds its current value; `flat` is the node of
    the whole memory as a vector, present once something wrote into it.
    """

    def __init__(self, owner: tuple[Any, ...], node: fx.Node) -> None:
        self.owner = owner
        self.views = {owner: node}
        self.flat: fx.Node | None = None


def _geometry(t: Tensor) -> tuple[Any, ...]:
    return (t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype)


def _storage_key(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _flat_index(geometry: tuple[Any, ...], size: int) -> Tensor:
    """Positions in the flat memory of every element of a view."""
    offset, shape, stride, _ = geometry
    return torch.arange(size).as_strided(shape, stride, offset).reshape(-1)


class Tape(TorchDispatchMode):
    """Record every operation that depends on the inputs; fold all others into constants.

    Writes in place become functional updates of the memory that they touch,
    equal expressions are recorded once, and everything is written for replay
    under autograd and `torch.func.vmap`.

    Args:
        inputs: Tensors whose dependents are recorded.
        double: Write the graph in double precision although it is recorded in single.
    """

    def __init__(self, inputs: Sequence[Tensor], double: bool = False) -> None:
        super().__init__()
        self.double = double
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.random: str | None = None
        self._keep: list[Tensor] = []
        self._storages: dict[int, _Storage] = {}
        self._constants: dict[tuple[Any, ...], tuple[fx.Node, Tensor]] = {}
        self._constant_storages: dict[int, list[str]] = {}
        self._seen: dict[Any, fx.Node] = {}
        for i, t in enumerate(inputs):
            self._track(t, self.graph.placeholder(f"x{i}"))

    def finish(self, outputs: Any) -> fx.GraphModule:
        """Close the graph with the given outputs (a tree of tensors)."""
        self.graph.output(tree_map(self._operand, outputs))
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = self.random or f"{_name(func)} at {user_line()}"
        written = _written(func, args, kwargs)
        for t in written:
            self._protect_constants(t)
        if not self._depends((args, kwargs)):
            return func(*args, **kwargs)
        if func in CHECKS:
            return func(*args, **kwargs)
        if self._reads_latent(func, args):
            raise LatentValueRead(f"{_name(func)} at {user_line()}")
        func, args = _static_positions(func, args)
        if written:
            return self._record_write(func, args, kwargs, written)
        out = func(*args, **kwargs)
        self._record(func, tree_map(self._operand, (args, kwargs)), out)
        return out

    def _depends(self, tree: Any) -> bool:
        tensors = (t for t in tree_flatten(tree)[0] if isinstance(t, Tensor))
        return any(_storage_key(t) in self._storages for t in tensors)

    def _reads_latent(self, func: OpOverload, args: Any) -> bool:
        """Whether the result is a number in Python, or a shape, that depends on an input."""
        if torch.Tag.data_dependent_output in func.tags:
            return True
        if torch.Tag.dynamic_output_shape not in func.tags:
            return False
        # Positions given by constants are as static as a slice.
        return func not in BY_POSITION or any(
            t.dtype in (torch.bool, torch.uint8) and self._depends(t)
            for t in tree_flatten(args[1])[0]
            if isinstance(t, Tensor)  # an absent index is None
        )

    def _record(self, func: OpOverload, operands: Any, out: Any) -> None:
        args, kwargs = operands
        if func in IDENTITIES:
            self._track(out, args[0])
        elif func in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            self._track(out, self._call(torch.reshape, (args[0], tuple(args[1])), {}))
        elif func is aten.linalg_cholesky_ex.default:
            # A failed factorisation raises outside of a graph; inside, it must not pass as a number.
            pair = self._call(func, args, kwargs)
            self._track(out[0], self._call(_nan_if_failed, (pair,), {}))
            self._track(out[1], self._call(_second, (pair,), {}))
        elif isinstance(out, Tensor):
            self._track(out, self._call(func, args, kwargs))
        elif isinstance(out, (tuple, list)):
            whole = self._call(func, args, kwargs)
            for i, t in enumerate(out):
                if isinstance(t, Tensor):
                    self._track(t, self._call(_item, (whole, i), {}))
        else:
            raise Unrecordable(f"{_name(func)} returns {type(out).__name__} at {user_line()}")

    def _record_write(
        self, func: OpOverload, args: Any, kwargs: Any, written: list[Tensor]
    ) -> Any:
        target = written[0]
        if len(written) > 1:
            raise Unrecordable(f"{_name(func)} writes to several tensors at {user_line()}")
        new_args, new_kwargs = tree_map(self._operand, (args, kwargs))
        before = self._flat_node(target)
        geometry, size = _geometry(target), target.untyped_storage().nbytes()
        size //= target.element_size()
        value = self._functional(func, new_args, new_kwargs, target)
        index = self._constant(_flat_index(geometry, size))
        out = func(*args, **kwargs)
        if torch.is_tensor(out) and _geometry(out) != geometry:
            raise Unrecordable(f"{_name(func)} resizes its argument at {user_line()}")
        value = self._call(_as_shape, (value, tuple(target.shape), self._dtype(target.dtype)), {})
        entry = self._storages[_storage_key(target)]
        entry.flat = self._call(_put, (before, index, value), {})
        entry.views = {geometry: value}
        self._keep.append(target)
        return out

    def _functional(self, func: OpOverload, args: Any, kwargs: Any, target: Tensor) -> fx.Node:
        """The value that a writing operation would have written, without the write."""
        name, overload = func._schema.name.split("::")[1], func._overloadname
        if name == "copy_":
            return args[1]
        if name == "zero_":
            return self._call(torch.zeros_like, (args[0],), {})
        kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        packet = getattr(aten, name[:-1] if name.endswith("_") else name, None)
        overload = "default" if overload in ("", "out") else overload.removesuffix("_out")
        functional = getattr(packet, overload, None) if packet is not None else None
        if functional is None or functional._schema.is_mutable:
            raise Unrecordable(f"{_name(func)} at {user_line()}")
        return self._call(functional, args, kwargs)

    def _flat_node(self, t: Tensor) -> fx.Node:
        """The whole memory behind t as one vector, starting to track it if need be."""
        key = _storage_key(t)
        size = t.untyped_storage().nbytes() // t.element_size()
        entry = self._storages.get(key)
        if entry is None:
            whole = t.detach().as_strided((size,), (1,), 0)
            node = self._constant(whole.clone())
            entry = self._storages[key] = _Storage(_geometry(whole), node)
            entry.flat = node
            self._keep.append(t)
        elif entry.flat is None:
            geometry = entry.owner
            if geometry[3] != t.dtype:
                raise Unrecordable(f"A view with another dtype at {user_line()}")
            index = self._constant(_flat_index(geometry, size))
            zeros = self._constant(torch.zeros(size, dtype=t.dtype, device=t.device))
            entry.flat = self._call(_put, (zeros, index, entry.views[geometry]), {})
        return entry.flat

    def _operand(self, x: Any) -> Any:
        """What stands for x in the graph: a node, a constant's node, or x itself."""
        if isinstance(x, torch.dtype):
            return self._dtype(x)
        if not isinstance(x, Tensor):
            return x
        entry = self._storages.get(_storage_key(x))
        if entry is None:
            return self._constant(x)
        geometry = _geometry(x)
        if geometry not in entry.views:
            size = x.untyped_storage().nbytes() // x.element_size()
            index = self._constant(_flat_index(geometry, size))
            node = self._call(_take, (self._flat_node(x), index, tuple(x.shape)), {})
            entry.views[geometry] = node
        return entry.views[geometry]

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.double and dtype == torch.float32 else dtype

    def _constant(self, t: Tensor) -> fx.Node:
        key = (_storage_key(t), *_geometry(t))
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            held = t.detach()
            self.root.register_buffer(name, held.to(self._dtype(t.dtype)), persistent=False)
            self._constants[key] = (self.graph.get_attr(name), held)
            self._constant_storages.setdefault(key[0], []).append(name)
        return self._constants[key][0]

    def _protect_constants(self, t: Tensor) -> None:
        """Copy constants out of memory that is about to be written."""
        key = _storage_key(t)
        for name in self._constant_storages.pop(key, []):
            setattr(self.root, name, getattr(self.root, name).clone())
        self._constants = {
            (object(), *k[1:]) if k[0] == key else k: v for k, v in self._constants.items()
        }

    def _track(self, t: Tensor, node: fx.Node) -> None:
        self._keep.append(t)
        geometry = _geometry(t)
        entry = self._storages.get(_storage_key(t))
        if entry is None:
            self._storages[_storage_key(t)] = _Storage(geometry, node)
        else:
            entry.views[geometry] = node

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        flat, spec = tree_flatten((args, kwargs))
        key = (function, str(spec), tuple((type(a), a) for a in flat))
        if key not in self._seen:
            self._seen[key] = self.graph.call_function(function, tuple(args), dict(kwargs))
        return self._seen[key]


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor], double: bool = False
) -> fx.GraphModule:
    """Run a function once and return the graph of what depends on its inputs.

    Args:
        function: Called with the inputs; returns a tree of tensors.
        inputs: Tensors of any shape.
        double: Write the graph in double precision although it is recorded in single.

    Raises:
        LatentValueRead: A value that depends on an input was read into Python.
        RandomNumber: A random number was drawn inside.
        Unrecordable: An operation cannot be written without its side effect.
    """
    # Inputs keep their memory, by which the tape knows them: a parameter of a module that the
    # function reads by itself is an input all the same.
    inputs = [inputs[0].detach().clone(), *(x.detach() for x in inputs[1:])]
    tape = Tape(inputs, double)
    with tape:
        outputs = function(*inputs)
    if tape.random:
        raise RandomNumber(tape.random)
    return tape.finish(outputs)


def user_line() -> str:
    """The innermost line of the call stack that belongs to the user's own code."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(LIBRARIES) and Path(frame.filename).name not in STANDARD:
            return f'{Path(frame.filename).name}:{frame.lineno} "{frame.line}"'
    return "an unknown line"


def _name(func: OpOverload) -> str:
    return {"_local_scalar_dense": "reading a number (.item(), float(), int(), if)"}.get(
        name := func._schema.name.split("::")[1], f"'{name}'"
    )


def _static_positions(func: OpOverload, args: Any) -> tuple[OpOverload, Any]:
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


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(a.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
    return found


# The few functions below stand in recorded graphs; they must work under vmap and autograd.


def _item(values: Sequence[Tensor], i: int) -> Tensor:
    return values[i]


def _second(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1]


def _nan_if_failed(pair: tuple[Tensor, Tensor]) -> Tensor:
    factor, info = pair
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def _take(flat: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.index_select(0, index).reshape(shape)


def _put(flat: Tensor, index: Tensor, value: Tensor) -> Tensor:
    return flat.index_put((index,), value.reshape(-1))


def _as_shape(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full(shape, value, dtype=dtype)
    return value.to(dtype).expand(shape)
