"""Sums of products in the space of logarithms, for opt_einsum."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import torch
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from torch import Tensor


class Ring(LogRing):
    """Sums of products whose recorded graph has a finite gradient where a term is zero.

    Pyro's own ring uses an `autograd.Function` for that, and a recorded graph contains only its
    forward operations.
    """

    _backend = "flowvi.targets.pyro.log_einsum"


def transpose(a: Tensor, axes: Any) -> Tensor:
    """Axes in another order."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """The logarithm of an einsum of exponentials.

    .. math:: \\log \\sum \\prod_i e^{a_i} = \\sum_i s_i + \\log \\sum \\prod_i e^{a_i - s_i}

    where s_i is the largest of the terms that are summed.
    """
    # torch.einsum accepts only letters as symbols; opt_einsum accepts any character.
    symbols = sorted(set(equation) - set(",->"))
    equation = equation.translate(dict(zip(map(ord, symbols), ascii_letters, strict=False)))
    inputs, output = equation.split("->")
    if inputs == output:
        return operands[0].clone()
    shifts, terms = [], []
    for dims, operand in zip(inputs.split(","), operands, strict=True):
        summed = [i for i, dim in enumerate(dims) if dim not in output]
        shift = operand.detach()
        shift = shift.amax(summed, keepdim=True) if summed else shift
        # Do not subtract from minus infinity: the result would be NaN.
        shift = torch.where(shift.isinf(), 0.0, shift)
        terms.append((operand - shift).exp())
        kept = "".join(dim for dim in dims if dim in output)
        shift = shift.squeeze(summed) if summed else shift
        order = [kept.index(dim) for dim in output if dim in kept]
        sizes = dict(zip(kept, shift.shape, strict=True))
        shifts.append(shift.permute(order).reshape([sizes.get(dim, 1) for dim in output]))
    total = torch.einsum(equation, *terms)
    # The logarithm of zero has no gradient, instead of an infinite one.
    zero = total == 0
    log_sum = torch.where(zero, -torch.inf, torch.where(zero, 1.0, total).log())
    return sum(shifts, log_sum)


tensordot = Tensordot(einsum)
