"""Bottlenecks whose matrices are sums of Kronecker products, with one factor common to all adapters."""

import math

import torch
from torch import Tensor, nn

from lightning_peft.adapters.bottleneck import Bottleneck
from lightning_peft.engine import Target


class HypercomplexBottleneck(Bottleneck):
    """A bottleneck whose matrices are sums of ``n`` Kronecker products, the first factors of which are shared.

    Args:
        target: behind which.
        r: width of the bottleneck.
        n: divides ``r`` and the features of ``target``.
        rank: of the second factors.
        first: holds the first factors C (n, n, n); None if that is this one.
        init_std: standard deviation of C at the start.
        activation: see `Bottleneck`; so for ``dropout``.
    """

    def __init__(
        self,
        target: Target,
        r: int,
        n: int,
        rank: int,
        first: "HypercomplexBottleneck | None",
        *,
        init_std: float,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(target, r, activation=activation, dropout=dropout)
        del self.down, self.up
        d = target.d_out
        self.down_A, self.down_B = target.new_parameter(n, d // n, rank), target.new_parameter(n, rank, r // n)
        self.up_A, self.up_B = target.new_parameter(n, r // n, rank), target.new_parameter(n, rank, d // n)
        self.init_std = init_std
        if first is None:
            self.phm_C = target.new_parameter(n, n, n)
        # in a tuple, or it would be a child, with its parameters
        self.first = () if first is None else (first,)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """D (r, d) and U (d, r)."""
        C = self.first[0].phm_C if self.first else self.phm_C
        return kronecker_sum(C, self.down_A, self.down_B).T, kronecker_sum(C, self.up_A, self.up_B).T

    def reset_matrices(self, generator: torch.Generator) -> None:
        """Glorot's rule for A and B; C normal."""
        for factor in (self.down_A, self.down_B, self.up_A, self.up_B):
            random = torch.empty(factor.shape, dtype=factor.dtype)
            for each in random:
                nn.init.xavier_uniform_(each, gain=math.sqrt(2), generator=generator)
            factor.copy_(random)
        if not self.first:
            C = self.phm_C
            C.copy_(self.init_std * torch.randn(C.shape, dtype=C.dtype, generator=generator))


def kronecker_sum(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``sum_k C_k (x) (A_k B_k)``, (n i, n j) for C (n, n, n), A (n, i, rank), B (n, rank, j).

    >>> eye, ones = torch.eye(2), torch.ones(2, 1, 1)
    >>> kronecker_sum(torch.stack([eye, 10 * eye.flip(0)]), ones, 3 * ones).tolist()
    [[3.0, 30.0], [30.0, 3.0]]
    """
    return torch.einsum("kab,kij->aibj", C.to(A.dtype), A @ B).flatten(2).flatten(0, 1)
