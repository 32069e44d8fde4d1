"""Products of every point with one matrix become one product, with the same numbers."""

import pytest
import torch

import flowvi
from flowvi.targets.recording.program import PATIENCE

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = torch.randn(5, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def right(w: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...j,nj->...n", w, X)


def left(w: torch.Tensor) -> torch.Tensor:
    # The matrix of every point stands right of the same matrix.
    return torch.bmm(A[None, :, :4], w.reshape(1, 4, 1).expand(1, 4, 3) * w[:3]).flatten()


@pytest.mark.parametrize("product", [right, left])
def test_values_and_gradients_stay_the_same(product):
    def log_prob(v):
        return -product(v["w"]).square().sum() - v["w"].square().sum()

    target = flowvi.from_density(log_prob, {"w": flowvi.Site((4,))})
    z = torch.randn(7, 4, generator=torch.Generator().manual_seed(2)).to(target.dtype)

    def evaluated():
        points = z.clone().requires_grad_()
        log_p = target.log_prob(points)
        return log_p.detach(), *torch.autograd.grad(log_p.sum(), points)

    first = evaluated()
    for _ in range(PATIENCE + 1):
        last = evaluated()

    (program,) = target.density.__dict__["_programs"].values()
    names = [str(node.target) for node in program.__closure__[0].cell_contents.graph.nodes]
    assert "aten.mm.default" in names and "aten.bmm.default" not in names
    for a, b in zip(first, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
