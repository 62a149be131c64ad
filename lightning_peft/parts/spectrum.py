"""Singular values and vectors of weights, all of them or the leading ones."""

import torch
from torch import Tensor

from lightning_peft.engine import Training


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), descending values (k,) and V^T (k, d_in), with k = min(d_out, d_in)."""
    return torch.linalg.svd(weight, full_matrices=False)


def leading_svd(weight: Tensor, r: int, niter: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``r`` triplets: U (d_out, r), values (r,), V^T (r, d_in).

    Args:
        weight: (d_out, d_in).
        r: how many.
        niter: None for the exact ones; else approximate ones, from a random subspace that is refined as often (Halko
            et al., 2011), at a fraction of the time.
        generator: of the random subspace, on the CPU.
    """
    if niter is None:
        U, values, Vh = svd(weight)
        return U[:, :r], values[:r], Vh[:r]
    more = min(r + 8, *weight.shape)  # a few directions more make the last ones sharper
    random = torch.randn(weight.shape[1], more, generator=generator).to(weight)
    with torch.autocast(weight.device.type, enabled=False):  # products in half precision cannot be decomposed
        Q = torch.linalg.qr(weight @ random).Q
        for _ in range(niter):
            Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ Q).Q).Q
        U, values, Vh = svd(Q.T @ weight)
        return (Q @ U)[:, :r], values[:r], Vh[:r]


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """Frobenius norm of ``rows rows^T - I``, a scalar; for rows (r, d) it is 0 where they are orthonormal."""
    rows = rows.flatten(1)
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def orthonormality(training: Training, weight: float) -> dict[str, Tensor]:
    """A penalty: ``weight`` times the mean distance of lora_A's rows and lora_B's columns from orthonormal ones.

    Over all layers; empty for a weight of zero.
    """
    adapters = [adapter for _, _, adapter in training.adapters()]
    if not weight or not adapters:
        return {}
    factors = [factor for adapter in adapters for factor in (adapter.lora_A, adapter.lora_B.T)]
    return {"orthonormality": weight * torch.stack([distance_from_orthonormal(factor) for factor in factors]).mean()}


class PrincipalComponents:
    """The leading principal components of rows that come batch by batch (Ross et al., 2008).

    Args:
        n: how many. Those beyond are lost with each batch: exact for one batch, and for rows of at most n directions.
    """

    components: Tensor  # (n, d), orthonormal rows
    values: Tensor  # (n,), descending singular values of all rows so far, less their mean
    mean: Tensor  # (d,)

    def __init__(self, n: int) -> None:
        self.n, self.count, self.total = n, 0, torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Take in a batch (m, d); in half precision, which cannot be decomposed, it is taken in as float32."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not self.count:
            self.mean, self.values = rows.new_zeros(rows.shape[1]), rows.new_zeros(0)
            self.components = rows.new_zeros(0, rows.shape[1])
        m, mean = len(rows), rows.mean(0)
        shift = (self.count * m / (self.count + m)) ** 0.5 * (self.mean - mean)
        known = self.values[:, None] * self.components
        stacked = torch.cat([known, rows - mean, shift[None]])
        self.total = self.total.to(rows) + (rows - mean).square().sum() + shift.square().sum()
        self.mean = (self.count * self.mean + m * mean) / (self.count + m)
        self.count += m
        _, self.values, self.components = leading_svd(stacked, self.n, 4, torch.Generator().manual_seed(42))

    @property
    def shares(self) -> Tensor | None:
        """The share of the variance that each component explains, (n,); None if there was no row."""
        return self.values.square() / self.total if self.count else None
