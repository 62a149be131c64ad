"""SALT: scale and shift the leading singular values of a weight, and change all others by a low-rank matrix.

Paper:    Elsayed et al., "SALT: Singular Value Adaptation with Low-Rank Transformation", 2025, arXiv:2503.16055.
Formula:  y = W x + b + U (S' - S) V^T x,  W = U S V^T,  S = diag(sigma),
          S' = ReLU(S with gamma * sigma + beta for its first n values and X Y added to the block of the other q),
          loss + reg * sum over layers of (||(gamma - 1) sigma + beta|| + ||X Y||_F)
Shapes:   k = min(d_in, d_out), n = max(1, floor(ratio k)), q = k - n; scale gamma and shift beta (n,), X (q, r),
          Y (r, q); frozen lora_A = V^T (k, d_in), lora_B = U (d_out, k), values sigma (k,);
          a convolution is flattened to (c_out, c_in * kernel)
Init:     gamma = 1, beta = 0, X ~ U(-sqrt(2 / (7 r)), sqrt(2 / (7 r))), Y = 0; y starts as the base
Merge:    W <- W + U (S' - S) V^T
Schedule: the gradient of the penalty is added once for each optimizer step, however many batches it has
Cost:     products with both matrices of singular vectors, as wide as the layer
Deviates from the authors' code: W stays and its change is added, where W is replaced by U S' V^T; in convolutions X and
          Y start as in linear layers, where both start at random and y as something else; X and Y are no wider than q.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.diagonal import GivenFactors
from lightning_peft.adapters.low_rank import LowRankConv
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, TargetError, Training, register
from lightning_peft.engine.limits import Count, NonNegative, Probability
from lightning_peft.parts.spectrum import svd


class Spectrum(GivenFactors):
    """``delta = U (S' - S) V^T`` for the weight U S V^T below: what trains lies between its singular vectors."""

    values: Tensor

    def __init__(self, target: Target, method: "SALT") -> None:
        n, q, r = method.sizes(target)
        super().__init__(target, n + q, scaling=1.0)
        self.register_buffer("values", self.lora_B.new_zeros(n + q))
        self.scale, self.shift = target.new_parameter(n), target.new_parameter(n)
        self.X, self.Y = target.new_parameter(q, r), target.new_parameter(r, q)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The triplets of the weight below, and no change of them."""
        U, values, Vh = svd(layer.weight.detach().flatten(1).to(self.lora_A.dtype))
        self.lora_B.copy_(U)
        self.values.copy_(values)
        self.lora_A.copy_(Vh.view_as(self.lora_A))
        self.scale.fill_(1)
        self.shift.zero_()
        bound = (2 / (7 * len(self.Y))) ** 0.5
        self.X.copy_(torch.empty(self.X.shape, dtype=self.X.dtype).uniform_(-bound, bound, generator=generator))
        self.Y.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """V^T and U (S' - S): (k, d_in, ...) and (d_out, k)."""
        n = len(self.scale)
        first, rest = self.values[:n], self.values[n:].diag()
        leading = (self.scale * first + self.shift).relu() - first
        others = (rest + self.X @ self.Y).relu() - rest
        return self.lora_A, torch.cat([self.lora_B[:, :n] * leading, self.lora_B[:, n:] @ others], dim=1)

    def size_of_change(self) -> Tensor:
        """||(gamma - 1) sigma + beta|| + ||X Y||_F, a scalar."""
        first = self.values[: len(self.scale)]
        moved = self.scale * first + self.shift - first
        return torch.linalg.vector_norm(moved) + torch.linalg.matrix_norm(self.X @ self.Y)


class SpectrumConv(LowRankConv, Spectrum):
    """The same for convolutions."""


@register("salt")
@dataclass(frozen=True, kw_only=True)
class SALT(TargetedMethod):
    """Trained spectra between the frozen singular vectors of each weight.

    Both matrices of singular vectors are kept, and used in each forward: twice the memory and the work of the layer.

    Args:
        ratio: share of the singular values, the largest, that are scaled and shifted.
        r: rank of what is added to the block of the others, at most q; trainable numbers per layer: 2 * n + 2 * q * r.
        reg: weight of the size of the changes in the loss; 0 switches it off.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: a weight has but one singular value.

    >>> from torch import nn, tensor, allclose
    >>> from lightning_peft import inject, merge
    >>> base = nn.Sequential(nn.Linear(3, 3))
    >>> base[0].weight.data = tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]])
    >>> salt = inject(base, SALT(r=1))[0].adapters["default"]
    >>> salt.scale.data, salt.shift.data = tensor([2.0]), tensor([0.5])
    >>> salt.X.data, salt.Y.data = tensor([[1.0], [-1]]), tensor([[4.0, 8]])
    >>> allclose(merge(base)[0].weight.abs(), tensor([[2 * 3 + 0.5, 0, 0], [0, 2 + 4, 8], [0, 0, 0]]))
    True
    """

    paper: ClassVar[str] = "arXiv:2503.16055"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Spectrum, "conv": SpectrumConv}

    ratio: Probability = 0.1
    r: Count = 256
    reg: NonNegative = 0.0

    def sizes(self, target: Target) -> tuple[int, int, int]:
        """n, q and r of ``target``."""
        k = min(target.d_in, target.d_out)
        if k < 2:
            raise TargetError(
                f"SALT: {target.name!r} ({target.d_out} x {target.d_in}) has one singular value, which leaves none for "
                "X Y. Leave it out with exclude_modules."
            )
        n = max(1, int(self.ratio * k))
        return n, k - n, min(self.r, k - n)

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """reg * sum of the sizes of the changes."""
        sizes = [adapter.size_of_change() for _, _, adapter in training.adapters()]
        return {"spectrum": self.reg * torch.stack(sizes).sum()} if self.reg and sizes else {}

    def num_trainable(self, target: Target) -> int:
        """2 * n + 2 * q * r."""
        n, q, r = self.sizes(target)
        return 2 * n + 2 * q * r

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With and without a penalty."""
        return cls(r=2, ratio=0.4), cls(reg=0.01, modules_to_save="head")
