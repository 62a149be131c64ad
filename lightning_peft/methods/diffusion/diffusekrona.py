"""DiffuseKronA: Kronecker products of two matrices on the projections of attentions.

Paper:    Marjit et al., "DiffuseKronA: A Parameter Efficient Fine-tuning Method for Personalized Diffusion Models",
          2024, arXiv:2402.17412.
Formula:  y = W x + b + (A kron B) x
Shapes:   A (a1, a2), B (d_out / a1, d_in / a2)
Init:     A ~ N(0, 1 / a1^2), B = 0; y starts as the base
Merge:    W <- W + A kron B
Deviates from the authors' code: which answers with the features of the product in another order, so that its files do
          not fit; a1 or a2 that does not divide the width gives way to the largest smaller one up to the square root.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from lightning_peft.adapters.kronecker import Kronecker, split
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, register
from lightning_peft.engine.limits import Count, Patterns

# customary names of the projections of attentions; those of diffusers first
_ATTENTION = (
    r".*\b(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|[qkvo]_proj|out_proj|query|key|value|qkv|c_attn"
    r"|query_key_value|in_proj_weight|(attn|self_attn|attention)\.(c_)?proj|attention\.output\.dense)"
)


class NormalKronecker(Kronecker):
    """Kronecker products whose first matrix is random, and whose second one is zero."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """A ~ N(0, 1 / a1^2), B = 0."""
        A, B = self.matrix("lokr_w1"), self.matrix("lokr_w2")
        A.copy_(torch.randn(A.shape, dtype=A.dtype, generator=generator) / len(A))
        B.zero_()


@register("diffusekrona")
@dataclass(frozen=True, kw_only=True)
class DiffuseKronA(TargetedMethod):
    """Kronecker products of two whole matrices, in attentions.

    Args:
        a1: rows of A.
        a2: columns of A.
        target_modules: linear layers to adapt; by default the projections of attentions, by their customary names.
        exclude_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``a1`` or ``a2`` is out of range.
        TargetError: a pattern matches nothing; name the layers if the customary names do not occur.

    >>> from torch import nn, tensor, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.ModuleDict({"to_q": nn.Linear(4, 2)})
    >>> x = tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> y = base["to_q"](x)
    >>> krona = inject(base, DiffuseKronA(a1=2, a2=2))["to_q"].adapters["default"]
    >>> krona.lokr_w1.data, krona.lokr_w2.data = tensor([[1.0, 0.0], [2.0, 3.0]]), tensor([[5.0, 7.0]])
    >>> first, second = 5 * 1 + 7 * 2, 5 * 3 + 7 * 4
    >>> allclose(base["to_q"](x), y + tensor([1.0 * first, 2.0 * first + 3.0 * second]))
    True
    """

    paper: ClassVar[str] = "arXiv:2402.17412"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": NormalKronecker}

    target_modules: Patterns = _ATTENTION
    a1: Count = 32
    a2: Count = 16

    def adapter(self, target: Target) -> Adapter:
        """A and B for ``target``."""
        (a1, b1), (a2, b2) = split(target.d_out, self.a1), split(target.d_in, self.a2)
        return NormalKronecker(target, {"lokr_w1": (a1, a2), "lokr_w2": (b1, b2)})

    def num_trainable(self, target: Target) -> int:
        """a1 a2 + d_out d_in / (a1 a2)."""
        small = split(target.d_out, self.a1)[0] * split(target.d_in, self.a2)[0]
        return small + target.d_out * target.d_in // small

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """On both projections, and on one with a head."""
        return cls(), cls(a1=5, a2=11, target_modules="v_proj", modules_to_save="head")
