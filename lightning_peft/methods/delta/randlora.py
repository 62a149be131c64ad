"""RandLoRA: a full-rank update as a sum of random low-rank products, of which the scales of rows and columns train.

Paper:    Albert et al., "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models", 2025, arXiv:2502.00987.
Formula:  with m = min(d_in, d_out), M = max(d_in, d_out), n = ceil(m / r):
          y = W x + b + s D dropout(x),  D = sum_k B_k diag(lambda_k) A diag(gamma_k), transposed where d_out < d_in
Shapes:   A (r, m), B_k (M, r), the same numbers for all layers; lambda (n, r), gamma (n, m)
Init:     A, B ~ U(-sqrt(3), sqrt(3)), not trained; lambda = 0, gamma = 1 / max(n, m); y starts as the base
Merge:    W <- W + s D
Cost:     products of rank m in place of r
Deviates from HF PEFT: its code pairs the columns of B_k with rows of other k, which is another sum of random products,
          and draws numbers in half precision, so that they depend on the machine.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, register
from lightning_peft.engine.limits import Count, Positive, Probability
from lightning_peft.parts.bank import Banked, bank


class RandomBases(Banked, LowRank):
    """``delta = scaling * sum_k B_k diag(lambda_k) A diag(gamma_k)``, A and B of banks."""

    def __init__(self, target: Target, method: "RandLoRA") -> None:
        Adapter.__init__(self)
        self.narrow, self.wide = sorted((target.d_in, target.d_out))
        self.flat, self.dropout = target.d_out < target.d_in, method.dropout
        n = math.ceil(self.narrow / method.r)
        self.rand_lambda, self.rand_gamma = target.new_parameter(n, method.r), target.new_parameter(n, self.narrow)
        self.banks = bank("rand_A", method.seed, method.r), bank("rand_B", method.seed, method.r)
        # 3 is the product of both bounds, sqrt(3): that gives the numbers of a bank a standard deviation of 1
        self.register_buffer("scaling", self.rand_gamma.new_tensor(3 * method.alpha / method.r), persistent=False)
        self.numbers()

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The same for every layer; nothing is drawn."""
        self.rand_lambda.zero_()
        self.rand_gamma.fill_(1 / max(self.rand_gamma.shape))

    def numbers(self) -> tuple[Tensor, Tensor]:
        """A (r, m) and B (n, M, r), both without their bounds."""
        A, B = self.banks
        n = len(self.rand_gamma)
        rows = B.rows(n * self.wide, self.rand_gamma)
        return A.rows(self.narrow, self.rand_gamma).T, rows.unflatten(0, (n, self.wide))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(n r, d_in) and (d_out, n r), the scaling in the second."""
        A, B = self.numbers()
        narrow = (A * self.rand_gamma[:, None]).flatten(0, 1)
        wide = (self.scaling * B * self.rand_lambda[:, None]).transpose(0, 1).flatten(1)
        return (wide.T, narrow.T) if self.flat else (narrow, wide)


@register("randlora")
@dataclass(frozen=True, kw_only=True)
class RandLoRA(TargetedMethod):
    """An update of full rank from few trained numbers; a smaller ``r`` makes them more.

    Args:
        r: rank of each random product.
        alpha: numerator of the scaling ``alpha / r``; HF PEFT advises 20 r.
        seed: of the random matrices, which are the same on every machine and not saved.
        dropout: probability of dropping an input feature of the update, in training only.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``r``, ``alpha`` or ``dropout`` is out of range.

    >>> from torch import nn, eye, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 4, bias=False))
    >>> a = inject(base, RandLoRA(r=2, alpha=4.0))[0].adapters["default"]
    >>> a.rand_lambda.data, a.rand_gamma.data = torch.rand(2, 2), torch.rand(2, 3)
    >>> A, B = (3**0.5 * numbers for numbers in a.numbers())
    >>> D = sum(B[k] @ a.rand_lambda[k].diag() @ A @ a.rand_gamma[k].diag() for k in range(2))
    >>> allclose(base(eye(3)), (base[0].weight + 4 / 2 * D).T, atol=1e-5)
    True
    """

    paper: ClassVar[str] = "arXiv:2502.00987"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": RandomBases}

    r: Count = 32
    alpha: Positive = 640.0
    seed: int = 0
    dropout: Probability = 0.0

    def num_trainable(self, target: Target) -> int:
        """ceil(min(d_in, d_out) / r) * (r + min(d_in, d_out))."""
        narrow = min(target.d_in, target.d_out)
        return math.ceil(narrow / self.r) * (self.r + narrow)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Of several products, and of one; the scaling suits a small net."""
        return cls(r=2, alpha=2.0), cls(r=16, alpha=4.0, seed=1, modules_to_save="head")
