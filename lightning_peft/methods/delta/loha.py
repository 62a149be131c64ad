"""LoHa: the elementwise product of two low-rank products, of rank r * r at the price of two of rank r.

Paper:    Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
          2022, arXiv:2108.06098; as an adapter: Yeh et al. (LyCORIS), 2024, arXiv:2309.14859.
Formula:  y = W x + b + scaling * ((w1_a w1_b) * (w2_a w2_b)) dropout(x), the two matrices multiplied elementwise
Shapes:   hada_w1_a, hada_w2_a (d_out, r); hada_w1_b, hada_w2_b (r, d_in), in a convolution (r, c_in / groups, *kernel)
Init:     w1_b ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), w1_a, w2_a ~ U(-1/sqrt(r), 1/sqrt(r)), w2_b = 0; y starts as the base
Merge:    W <- W + scaling * (w1_a w1_b) * (w2_a w2_b)
Cost:     thin products of rank r * r
Deviates from the authors' code: the delta is never built; it is one product of rank r * r, whose factors are the
          products of all pairs of columns of w1_a and w2_a, and of all pairs of rows of w1_b and w2_b. It starts as in
          HF PEFT; theirs at normal numbers, and at w2_a = 0.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, Kind, Layer, Target, register
from lightning_peft.methods.lora.lora import LoRA


class Hadamard(LowRank):
    """``delta = scaling * (w1_a w1_b) * (w2_a w2_b)``, elementwise, as one product of rank r * r."""

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        Adapter.__init__(self)
        self.hada_w1_a, self.hada_w2_a = (target.new_parameter(target.d_out, r) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (target.new_parameter(r, *target.shape[1:]) for _ in range(2))
        self.register_buffer("scaling", self.hada_w1_a.new_tensor(scaling), persistent=False)
        self.dropout = dropout

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Uniform, as LoRA's A, but for the last factor, which is zero."""
        for parameter in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            random = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
        self.hada_w2_b.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r * r, d_in, ...) and (d_out, r * r)."""
        down = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
        return down, self.scaling * up


class HadamardConv(Hadamard, LowRankConv):
    """The same for convolutions."""


@register("loha")
@dataclass(frozen=True, kw_only=True)
class LoHa(LoRA):
    """Elementwise product of two low-rank products; takes the arguments of `LoRA`, with twice the parameters.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> x, y = ones(1, 3), base(ones(1, 3))
    >>> loha = inject(base, LoHa(r=2, alpha=8.0))[0].adapters["default"]
    >>> _ = nn.init.ones_(loha.hada_w2_b)
    >>> delta = (loha.hada_w1_a @ loha.hada_w1_b) * (loha.hada_w2_a @ loha.hada_w2_b)
    >>> allclose(base(x), y + (8 / 2) * x @ delta.T, atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2108.06098"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Hadamard, "conv": HadamardConv}

    def num_trainable(self, target: Target) -> int:
        """2 * r * (d_in + d_out)."""
        return 2 * super().num_trainable(target)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Plain, and with a rank of its own for one layer."""
        return cls(r=2), cls(r=3, alpha=1.0, rank_pattern={"v_proj": 1}, modules_to_save="head")
