"""Few products with a sparse symmetric matrix that have all of its elements."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Colouring(NamedTuple):
    """Which products have the elements of a symmetric matrix H with a known pattern.

    Attributes:
        colour: Colour c of each column, (d). Product c is that of H with the sum of the columns
            of colour c of the unit matrix.
        product: Product that has element (i, j), (d, d).
        row: Its row, (d, d).
        pattern: Elements that are not zero, (d, d).
    """

    colour: Tensor
    product: Tensor
    row: Tensor
    pattern: Tensor

    @property
    def products(self) -> int:
        """Number of products."""
        return int(self.colour.max()) + 1

    def elements(self, products: Tensor) -> Tensor:
        """Elements of H from the products. (..., C, d) -> (..., d, d)."""
        if self.products == len(self.colour):
            return products.mT
        found = products[..., self.product, self.row]
        return torch.where(self.pattern.to(found.device), found, 0.0)

    def weights(self, matrix: Tensor) -> Tensor:
        """W with sum W * products = tr(matrix H). (..., d, d) -> (..., C, d)."""
        d = len(self.colour)
        if self.products == d:
            return matrix.mT
        inside = self.pattern.flatten()
        place = (self.product * d + self.row).flatten()[inside].to(matrix.device)
        flat = matrix.new_zeros(*matrix.shape[:-2], self.products * d)
        flat.index_add_(-1, place, matrix.flatten(-2)[..., inside.to(matrix.device)])
        return flat.unflatten(-1, (self.products, d))


def colouring(pattern: Tensor) -> Colouring:
    """Colour the columns of a symmetric matrix such that each element stands alone somewhere.

    Element (i, j) is in row i of the product of j's colour, alone if no other column of this
    colour is not zero in that row; or, as the matrix is symmetric, in row j of the product of i's
    colour. Columns are coloured one by one, those with most elements first, each by the first
    colour that leaves every element alone somewhere. An arrow takes two colours, a band of width
    b takes at most 2 b + 1.

    References:
        Coleman and Moré (1984), doi:10.1007/BF02612334.

    Args:
        pattern: Elements that may differ from zero, (d, d); symmetric.
    """
    d = len(pattern)
    if pattern.all():
        place = torch.arange(d)
        return Colouring(place, place.expand(d, d), place[:, None].expand(d, d), pattern)
    pattern = pattern | torch.eye(d, dtype=torch.bool)
    colour = torch.full((d,), -1)
    for column in pattern.sum(0).argsort(descending=True, stable=True).tolist():
        for candidate in range(d):
            colour[column] = candidate
            if _alone(pattern, colour)[1]:
                break
    own, _ = _alone(pattern, colour)
    place = torch.arange(d)
    product = torch.where(own, colour.expand(d, d), colour[:, None].expand(d, d))
    row = torch.where(own, place[:, None].expand(d, d), place.expand(d, d))
    return Colouring(colour, product, row, pattern)


def _alone(pattern: Tensor, colour: Tensor) -> tuple[Tensor, bool]:
    """Whether (i, j) is alone in row i of the product of j's colour; and whether all are found."""
    done = colour >= 0
    same = (colour[:, None] == colour) & done & done[:, None]
    # Number of elements in row i of columns with the colour of j.
    number = pattern.double() @ same.double()
    own = number == 1
    found = own | own.T | ~pattern | ~done | ~done[:, None]
    return own, bool(found.all())
