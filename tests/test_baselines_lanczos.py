"""The iteration for extreme eigenvalues, on explicit matrices."""

from __future__ import annotations

import pytest
import torch
from dense_derivatives import check
from torch import Tensor

from fastfi.baselines._lanczos import extreme_eigenpairs

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


class Matrices:
    """Symmetric matrices [b, p, p], as the Lanczos iteration sees them."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def __call__(self, v: Tensor) -> Tensor:
        return (self.a @ v[:, :, None]).squeeze(2)

    def keep(self, samples: Tensor) -> None:
        self.a = self.a[samples]


def test_invariant_spaces_end_the_iteration() -> None:
    """0, I, -2 I, one of rank 1, one whose start has Rayleigh quotient 0, and pairs +-1."""
    p = 6
    start = torch.randn(p, dtype=torch.float64)
    start /= start.norm()
    eye = torch.eye(p, dtype=torch.float64)
    u = torch.randn(p, dtype=torch.float64)
    other = u - (u @ start) * start
    other /= other.norm()
    swap = torch.outer(start, other) + torch.outer(other, start)
    signs = torch.diag(torch.tensor([1.0, -1.0] * 3, dtype=torch.float64))
    a = torch.stack([0 * eye, eye, -2 * eye, torch.outer(u, u), swap, signs])
    found = extreme_eigenpairs(Matrices(a), start, 6, 1e-10, 64)
    want = torch.tensor([0.0, 1.0, -2.0, float(u @ u), 1.0, 1.0], dtype=torch.float64)
    check(found.value[:4], want[:4])
    check(found.value.abs(), want.abs())
    assert found.iterations.tolist() == [1, 1, 1, 2, 2, 2] and found.converged.all()
    left = (a @ found.vector[:, :, None]).squeeze(2) - found.value[:, None] * found.vector
    assert float(left.abs().max()) < 1e-12


def test_many_random_matrices() -> None:
    """Ranks and spectra of all kinds; at most a few starting vectors are unlucky."""
    p, count = 24, 400
    spread = torch.rand(count, 1, dtype=torch.float64)
    values = torch.randn(count, p, dtype=torch.float64) * spread ** torch.arange(p)
    q = torch.linalg.qr(torch.randn(count, p, p, dtype=torch.float64)).Q
    start = torch.randn(p, dtype=torch.float64)
    a = q @ torch.diag_embed(values) @ q.mT
    found = extreme_eigenpairs(Matrices(a), start / start.norm(), count, 1e-8, 64)
    assert found.converged.all() and (found.iterations <= p).all()
    largest = values.abs().amax(1)
    assert ((found.value.abs() - largest).abs() <= 1e-8 * largest).double().mean() > 0.99
    left = (a @ found.vector[:, :, None]).squeeze(2) - found.value[:, None] * found.vector
    assert (left.norm(dim=1) <= 1.1e-8 * found.value.abs()).all()


def test_the_other_end_is_waited_for() -> None:
    """1 stands apart and is found at once; -1.05, at the end of a band, is larger."""
    values = torch.cat([torch.ones(1), torch.linspace(-1.05, 0.0, 39)]).double()
    start = torch.ones(40, dtype=torch.float64) / 40**0.5
    a = torch.diag(values)[None]
    early = extreme_eigenpairs(Matrices(a), start, 1, 0.02, 5)
    assert float(early.value) > 0.99 and float(early.residual) < 0.02
    assert not early.converged.any()
    found = extreme_eigenpairs(Matrices(a), start, 1, 0.02, 40)
    check(found.value, values[1:2], rtol=0.02)
    assert found.converged.all() and int(found.iterations) < 40
