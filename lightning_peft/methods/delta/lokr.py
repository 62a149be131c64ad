"""LoKr: the Kronecker product of a small matrix and a low-rank one.

Paper:    Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2024,
          arXiv:2309.14859.
Formula:  y = W x + b + scaling * (w1 kron w2) dropout(x),  w2 = w2_a w2_b where that is smaller,  scaling = alpha / r
Shapes:   d_out = l k and d_in = m n, l <= k and m <= n as near to each other as they can be, unless decompose_factor
          says otherwise; w1 (l, m), w2 (k, n) or w2_a (k, r), w2_b (r, n); with decompose_both w1_a (l, r),
          w1_b (r, m); convolution: c_in / groups = m n, and w2 (k, n, *kernel), w2_b (r, n, *kernel)
Init:     w1 = 0 (w1_a = 0), all others uniform up to 1 / sqrt(their inputs); y starts as the base
Merge:    W <- W + scaling * (w1 kron w2)
Cost:     in a convolution the delta is built
Deviates from the authors' code: scaling is alpha / r even where neither matrix is decomposed, and w1 starts at zero, as
          in HF PEFT; theirs is w2, or w2_b.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from lightning_peft.adapters.kronecker import Kronecker, KroneckerConv, split
from lightning_peft.engine import Adapter, Kind, Target, TargetedMethod, check_range, register
from lightning_peft.engine.limits import Count, Positive, Probability


@register("lokr")
@dataclass(frozen=True, kw_only=True)
class LoKr(TargetedMethod):
    """Kronecker product of two matrices, of which the larger is a low-rank product.

    Args:
        r: rank of the matrices that are decomposed; one that r would not make smaller is kept whole.
        alpha: numerator of ``scaling``.
        dropout: probability of dropping an input feature of the update, in training only.
        decompose_factor: rows and columns of the small matrix, or less where it does not divide those of the weight;
            -1 makes both matrices about as large.
        decompose_both: decompose the small matrix too.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``r``, ``alpha``, ``dropout`` or ``decompose_factor`` is out of range.

    >>> from torch import nn, ones, allclose, kron
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(6, 4))
    >>> x, y = ones(1, 6), base(ones(1, 6))
    >>> lokr = inject(base, LoKr(r=2, alpha=8.0))[0].adapters["default"]
    >>> _ = nn.init.ones_(lokr.lokr_w1)
    >>> allclose(base(x), y + (8 / 2) * x @ kron(lokr.lokr_w1, lokr.lokr_w2).T, atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2309.14859"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Kronecker, "conv": KroneckerConv}

    r: Count = 8
    alpha: Positive = 8.0
    dropout: Probability = 0.0
    decompose_factor: int = -1
    decompose_both: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.decompose_factor
        check_range("LoKr", "decompose_factor", factor, factor == -1 or factor >= 1, "-1 or an integer >= 1")

    def shapes(self, target: Target) -> dict[str, tuple[int, ...]]:
        """Parameter -> its shape, for the adapter of ``target``."""
        l, k = split(target.d_out, self.decompose_factor)  # noqa: E741
        m, n = split(target.shape[1], self.decompose_factor)
        small = {"lokr_w1": (l, m)}
        if self.decompose_both and self.r < max(l, m) / 2:
            small = {"lokr_w1_a": (l, self.r), "lokr_w1_b": (self.r, m)}
        if self.r < max(k, n) / 2:
            return {**small, "lokr_w2_a": (k, self.r), "lokr_w2_b": (self.r, n, *target.shape[2:])}
        return {**small, "lokr_w2": (k, n, *target.shape[2:])}

    def adapter(self, target: Target) -> Adapter:
        """Matrices of these shapes."""
        cls = KroneckerConv if target.site.kind == "conv" else Kronecker
        return cls(target, self.shapes(target), self.alpha / self.r, self.dropout)

    def num_trainable(self, target: Target) -> int:
        """l * m, or r * (l + m); plus k * n, or r * (k + n)."""
        return sum(math.prod(shape) for shape in self.shapes(target).values())

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Plain, and with both matrices decomposed and a head."""
        return cls(r=2), cls(r=1, decompose_both=True, modules_to_save="head")
