"""SVFit: train the leading singular values of a weight, and nothing else.

Paper:    Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", 2024,
          arXiv:2409.05926.
Formula:  y = W x + b + s U_r diag(z - sigma_r) V_r^T dropout(x)
Shapes:   lora_z, start_z (r,), lora_A (r, d_in), lora_B (d_out, r), of which lora_z alone is trained;
          a convolution is flattened to (c_out, c_in * kernel)
Init:     lora_A = V_r^T, lora_B = U_r, lora_z = start_z = sigma_r, the r leading triplets; y starts as the base
Merge:    W <- W + s U_r diag(z - sigma_r) V_r^T
Deviates from the paper: the rank is given, and not chosen for each layer by the energy that it keeps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from lightning_peft.adapters.diagonal import GivenDiagonal, GivenDiagonalConv
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count, Positive
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.spectrum import svd


@register("svfit")
@dataclass(frozen=True, kw_only=True)
class SVFit(LoRA):
    """Trained singular values between the frozen singular vectors of each weight.

    Args:
        r: how many, the largest; trainable numbers per layer: r. Memory is that of a frozen LoRA of the same rank.
        alpha: numerator of ``scaling``, which is 1 by default.
        clip_rank: lower the rank of a layer that has fewer singular values; True by default.
        dropout: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: see `LoRA`.
        TargetError: see `LoRA`.

    >>> from torch import nn, allclose
    >>> from torch.linalg import svdvals
    >>> from lightning_peft import inject, merge
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> adapter = inject(base, SVFit(r=2))[0].adapters["default"]
    >>> adapter.lora_z.data = Tensor([3.0, 2.0])
    >>> allclose(svdvals(merge(base)[0].weight)[:2], Tensor([3.0, 2.0]))
    True
    """

    paper: ClassVar[str] = "arXiv:2409.05926"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": GivenDiagonal, "conv": GivenDiagonalConv}

    r: Count = 256
    alpha: Positive | None = None
    clip_rank: bool = True

    def adapter(self, target: Target) -> Adapter:
        """Singular vectors of the weight, once it is there."""
        adapter: Any = super().adapter(target)
        adapter.start = self.start
        return adapter

    def start(self, weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """V_r^T (r, d_in), sigma_r (r,) and U_r (d_out, r) of a weight (d_out, d_in)."""
        U, values, Vh = svd(weight)
        return Vh[:r], values[:r], U[:, :r]

    def num_trainable(self, target: Target) -> int:
        """r."""
        return self.rank(target)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Some of the values, and all of them."""
        return cls(r=2, alpha=4.0), cls(modules_to_save="head")
