"""Record the tensor operations that depend on given inputs, as a graph that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from flowvi.runtime.torch_modes import EagerDispatchMode
from flowvi.targets.recording import rules
from flowvi.targets.recording.aliasing import (
    StorageMap,
    geometry_of,
    positions,
    size_of,
    storage_key,
)
from flowvi.targets.recording.random_ops import READS, WRITES, is_random
from flowvi.targets.recording.rules import aten
from flowvi.targets.recording.source_lines import in_assertion, user_line

DOUBLE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}


class LatentValueRead(Exception):
    """A value that depends on an input was read into Python."""


class RandomNumber(Exception):
    """A random number was drawn while the function was being recorded."""


class Unrecordable(Exception):
    """An operation has no functional form that the tape knows."""


class Tape(EagerDispatchMode):
    """Record every operation that depends on the inputs; fold all others into constants.

    Writes in place become functional updates of the memory that they touch,
    equal expressions are recorded once, and everything is written for replay
    under autograd and `torch.func.vmap`.

    Args:
        inputs: Tensors whose dependents are recorded.
        double: Write the graph in double precision, whatever it is recorded in.
        chance: Record random numbers, which are drawn at each replay. Otherwise the line of the
            model that draws one is noted.

    Attributes:
        rounded: Whether a coarser precision was met, which the graph does not have.
    """

    def __init__(
        self, inputs: Sequence[Tensor], double: bool = False, record_random: bool = False
    ) -> None:
        super().__init__()
        self.double = double
        self.chance = record_random
        self.rounded = False
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.random: str | None = None
        self.memory = StorageMap()
        self._constants: dict[tuple[Any, ...], tuple[fx.Node, Tensor]] = {}
        self._constant_storages: dict[int, list[str]] = {}
        self._seen: dict[Any, fx.Node] = {}
        for i, t in enumerate(inputs):
            self.memory.track(t, self.graph.placeholder(f"x{i}"))

    def finish(self, outputs: Any) -> fx.GraphModule:
        """Close the graph with the given outputs (a tree of tensors)."""
        self.graph.output(tree_map(self._operand, outputs))
        self.graph.eliminate_dead_code()
        graph = fx.GraphModule(self.root, self.graph)
        # Values that a model computes from its data are not part of its state.
        graph._non_persistent_buffers_set.update(graph._buffers)
        graph.meta["rounded"] = self.rounded
        return graph

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        random = is_random(func, args, kwargs)
        if random and not self.chance:
            self.random = self.random or f"{rules.name_of(func)} at {user_line()}"
        written = rules.written_tensors(func, args, kwargs)
        for t in written:
            self._protect_constants(t)
        drawn = random and self.chance
        if func in rules.CHECKS or not (drawn or self._depends((args, kwargs))):
            return func(*args, **kwargs)
        func, args = rules.masked_write(func, args)
        if self._reads_latent(func, args):
            if in_assertion():
                return func(*args, **kwargs)
            raise LatentValueRead(f"{rules.name_of(func)} at {user_line()}")
        func, args = rules.static_positions(func, args)
        if written and torch.Tag.inplace_view not in func.tags:
            return self._record_write(func, args, kwargs, written)
        operands = tree_map(self._operand, (args, kwargs))
        out = func(*args, **kwargs)
        self._record(rules.functional(func) if written else func, operands, out)
        return out

    def _depends(self, tree: Any) -> bool:
        return any(t in self.memory for t in tree_flatten(tree)[0] if isinstance(t, Tensor))

    def _reads_latent(self, func: OpOverload, args: Any) -> bool:
        """Whether the result is a number in Python, or a shape, that depends on an input."""
        if torch.Tag.data_dependent_output in func.tags:
            return True
        if torch.Tag.dynamic_output_shape not in func.tags:
            return False
        # Positions given by constants are as static as a slice.
        return func not in rules.BY_POSITION or any(
            t.dtype in (torch.bool, torch.uint8) and self._depends(t)
            for t in tree_flatten(args[1])[0]
            if isinstance(t, Tensor)  # an absent index is None
        )

    def _record(self, func: Any, operands: Any, out: Any) -> None:
        args, kwargs = operands
        if func in rules.IDENTITIES:
            self.memory.track(out, args[0])
        elif func in rules.RESHAPES:
            self.memory.track(out, self._call(torch.reshape, (args[0], tuple(args[1])), {}))
        elif isinstance(out, Tensor):
            self.memory.track(out, self._call(READS.get(func, func), args, kwargs))
        elif isinstance(out, (tuple, list)):
            whole = self._call(func, args, kwargs)
            for i, t in enumerate(out):
                failing = i == 0 and func is aten.linalg_cholesky_ex.default
                pick = rules.nan_if_failed if failing else rules.item
                if isinstance(t, Tensor):
                    self.memory.track(t, self._call(pick, (whole, i), {}))
        else:
            raise Unrecordable(
                f"{rules.name_of(func)} returns {type(out).__name__} at {user_line()}"
            )

    def _record_write(self, func: OpOverload, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        target = written[0]
        if len(written) > 1:
            raise Unrecordable(f"{rules.name_of(func)} writes to several tensors at {user_line()}")
        before, geometry = self._flat_node(target), geometry_of(target)
        operands = tree_map(self._operand, (args, kwargs))
        value = self._functional(func, *operands)
        index = self._constant(positions(target, geometry))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and geometry_of(out) != geometry:
            raise Unrecordable(f"{rules.name_of(func)} resizes its argument at {user_line()}")
        like = (tuple(target.shape), self._dtype(target.dtype), target.device)
        value = self._call(rules.as_shape, (value, *like), {})
        self.memory.write(target, value, self._call(rules.put, (before, index, value), {}))
        return out

    def _functional(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """The value that a writing operation would have written, without the write."""
        if func._schema.name in ("aten::copy_", "aten::fill_"):
            return args[1]
        if func._schema.name == "aten::zero_":
            return 0
        functional: Any = WRITES.get(func._schema.name) or rules.functional(func)
        if functional is None:
            raise Unrecordable(f"{rules.name_of(func)} at {user_line()}")
        outs = {a.name for a in func._schema.arguments if a.is_out}
        return self._call(functional, args, {k: v for k, v in kwargs.items() if k not in outs})

    def _flat_node(self, t: Tensor) -> fx.Node:
        """The whole memory behind t as one vector, starting to track it if need be."""
        size = size_of(t)
        block = self.memory.block(t)
        if block is None:
            whole = t.detach().as_strided((size,), (1,), 0)
            block = self.memory.track(whole, self._constant(whole.clone()))
            block.flat = block.views[block.owner]
        elif block.flat is None:
            if block.owner[3] != t.dtype:
                raise Unrecordable(f"A view with another dtype at {user_line()}")
            index = self._constant(positions(t, block.owner))
            zeros = self._constant(torch.zeros(size, dtype=t.dtype, device=t.device))
            block.flat = self._call(rules.put, (zeros, index, block.views[block.owner]), {})
        return block.flat

    def _operand(self, x: Any) -> Any:
        """What stands for x in the graph: a node, a constant's node, or x itself."""
        if isinstance(x, torch.dtype):
            return self._dtype(x)
        if not isinstance(x, Tensor):
            return x
        if x not in self.memory:
            return self._constant(x)
        node = self.memory.node(x)
        if node is None:
            index = self._constant(positions(x, geometry_of(x)))
            node = self._call(rules.take, (self._flat_node(x), index, tuple(x.shape)), {})
            self.memory.track(x, node)
        return node

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        written = DOUBLE.get(dtype, dtype) if self.double else dtype
        self.rounded |= written != dtype
        return written

    def _constant(self, t: Tensor) -> fx.Node:
        strided = t.layout == torch.strided
        key = (storage_key(t), *geometry_of(t)) if strided else (id(t),)
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            held = t.detach()
            self.root.register_buffer(name, held.to(self._dtype(t.dtype)))
            self._constants[key] = (self.graph.get_attr(name), held)
            self._constant_storages.setdefault(key[0], []).append(name)
        return self._constants[key][0]

    def _protect_constants(self, t: Tensor) -> None:
        """Copy constants out of memory that is about to be written."""
        key = storage_key(t)
        for name in self._constant_storages.pop(key, []):
            setattr(self.root, name, getattr(self.root, name).clone())
        self._constants = {
            (object(), *k[1:]) if k[0] == key else k: v for k, v in self._constants.items()
        }

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        flat, spec = tree_flatten((args, kwargs))
        key: Any = (function, str(spec), tuple((type(a), a) for a in flat))
        if is_random(function, args, kwargs):
            # Two draws from one distribution are different operations.
            key = object()
        if key not in self._seen:
            self._seen[key] = self.graph.call_function(function, tuple(args), dict(kwargs))
        return self._seen[key]


class Selecting(TorchFunctionMode):
    """Keep `x[i]` a tensor operation where i is a single integer that depends on an input.

    Torch reads an index without axes into Python, whatever else indexes x.

    Args:
        tape: Knows what depends on an input.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], Tensor):
            args = self._selected(*args)
        return func(*args, **(kwargs or {}))

    def _selected(self, x: Tensor, index: Any) -> tuple[Tensor, Any]:
        """The same element of a tensor that has it alone along each axis chosen that way."""
        indices = index if isinstance(index, tuple) else (index,)
        if not any(self._is_chosen(i) for i in indices):
            return x, index
        taken = [_axes_of(i) for i in indices]
        axis, new = 0, []
        for i, n in zip(indices, taken, strict=True):
            if self._is_chosen(i):
                place = torch.where(i < 0, i + x.shape[axis], i).reshape(1)
                x, i = x.index_select(axis, place), 0
            axis += x.dim() - sum(taken) if i is Ellipsis else n
            new.append(i)
        return x, tuple(new)

    def _is_chosen(self, i: Any) -> bool:
        single = isinstance(i, Tensor) and i.dim() == 0 and not i.dtype.is_floating_point
        return single and i.dtype != torch.bool and i in self.tape.memory


def _axes_of(index: Any) -> int:
    """How many axes of a tensor one of its indices is for."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return index.dim()
    return 1


def record(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    double: bool = False,
    record_random: bool = False,
) -> fx.GraphModule:
    """Run a function once and return the graph of what depends on its inputs.

    Args:
        function: Called with the inputs; returns a tree of tensors.
        inputs: Tensors of any shape.
        double: Write the graph in double precision, whatever it is recorded in; its
            `meta["rounded"]` says whether the function itself is coarser.
        record_random: Record random numbers, to be drawn at each replay.

    Raises:
        LatentValueRead: A value that depends on an input was read into Python.
        RandomNumber: A random number was drawn inside.
        Unrecordable: An operation cannot be written without its side effect.
    """
    # The tape identifies inputs by their memory: a parameter of a module that the
    # function reads by itself is an input all the same.
    inputs = [inputs[0].detach().clone(), *(x.detach() for x in inputs[1:])]
    tape = Tape(inputs, double, record_random)
    with tape, Selecting(tape):
        outputs = function(*inputs)
    if tape.random:
        raise RandomNumber(tape.random)
    return tape.finish(outputs)
