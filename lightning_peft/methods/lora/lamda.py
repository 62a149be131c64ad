"""LaMDA: start at the leading singular triplets of a weight, train the core, and freeze the outer factors.

Paper:    Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", 2024,
          arXiv:2406.12832.
Formula:  y = W x + b + s (B N - B_0 N_0) A dropout(x), of which N and B train, A never
Shapes:   lora_A (r, d_in); lora_N, start_N (r, r); lora_B, start_B (d_out, r);
          a convolution is flattened to (c_out, c_in * kernel)
Init:     A = V_r^T, N_0 = diag(sigma_r / s), B_0 = U_r, the r leading singular triplets of W; y starts as the base
Merge:    W <- W + s (B N - B_0 N_0) A
Schedule: in step t of T the first floor(r t / (freeze_until T)) columns of B are frozen, the leading ones first; behind
          freeze_until T none of B requires gradients any more, and the optimizer forgets its moments
Deviates from the paper: what W keeps of the start is not said; here the first product is kept beside it, as in PiSSA.
          Deviates from the authors' code: that starts at random factors with B = 0, leaves r out of the number of
          frozen columns, so that it freezes three at most, and lets the optimizer go on moving them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.core import CoreOnFixed, CoreOnFixedConv
from lightning_peft.engine import Adapter, Kind, Target, Training, check_range, register
from lightning_peft.methods.lora.structuredlora import StructuredLoRA
from lightning_peft.parts.spectrum import svd
from lightning_peft.parts.switching import let_train


@register("lamda")
@dataclass(frozen=True, kw_only=True)
class LaMDA(StructuredLoRA):
    """A core between the leading singular vectors of each weight, of which the left ones are frozen column by column.

    Args:
        freeze_until: share of the run after which all of B is frozen; trainable numbers per layer are then r * r.
        r: rank of the update; trainable numbers per layer at first: r * (d_out + r).
        alpha: numerator of the scaling s, which is 1 by default.
        dropout: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``freeze_until`` or an argument of `LoRA` is out of range, or the length of the run is not known.
        TargetError: see `LoRA`.

    >>> from torch import nn, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> U, values, Vh = torch.linalg.svd(base[0].weight)
    >>> adapter = inject(base, LaMDA(r=2))[0].adapters["default"]
    >>> _ = adapter.lora_N.data.mul_(3)
    >>> moved = base[0].weight + (3 - 1) * U[:, :2] * values[:2] @ Vh[:2]
    >>> allclose(base(torch.eye(4)), torch.eye(4) @ moved.T + base[0].bias, atol=1e-6)
    True
    >>> [LaMDA(freeze_until=0.5).frozen_columns(4, step, total_steps=16) for step in range(10)]
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """

    paper: ClassVar[str] = "arXiv:2406.12832"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": CoreOnFixed, "conv": CoreOnFixedConv}
    switches: ClassVar[bool] = True

    freeze_until: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        until = self.freeze_until
        check_range(type(self).__name__, "freeze_until", until, 0 < until <= 1, "a number in (0, 1]")

    def adapter(self, target: Target) -> Adapter:
        """Three factors that start where `start` says."""
        adapter: Any = super().adapter(target)
        adapter.start = self.start
        return adapter

    def start(self, weight: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, d_in), N (r, r), not scaled yet, and B (d_out, r) for a weight (d_out, d_in)."""
        U, values, Vh = svd(weight)
        return Vh[:r], values[:r].diag(), U[:, :r]

    def frozen_columns(self, r: int, step: int, total_steps: int) -> int:
        """How many of the ``r`` columns of B are frozen in ``step``, counted from 0."""
        last = round(self.freeze_until * total_steps)
        return r * step // last if step < last else r

    def on_train_batch_start(self, training: Training) -> None:
        """Let B train until all of its columns are frozen."""
        frozen = self.frozen_columns(1, training.step, training.run_length()) == 1
        if training.is_new(frozen):
            names = training.parameters()
            let_train(training, [n for n in names if not (frozen and n.endswith(".lora_B"))], "reset")

    def on_before_optimizer_step(self, training: Training) -> None:
        """Hold the columns that are frozen in this step."""
        for _, _, adapter in training.adapters():
            adapter.hold(self.frozen_columns(len(adapter.lora_A), training.step, training.run_length()))

    def on_after_optimizer_step(self, training: Training) -> None:
        """Put them back to where they were."""
        for _, _, adapter in training.adapters():
            adapter.put_back()

    def num_trainable(self, target: Target) -> int:
        """r * (d_out + r)."""
        return self.rank(target) * (target.d_out + self.rank(target))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Column by column, and frozen soon with a scaling and a head."""
        return cls(r=2, freeze_until=0.5), cls(r=2, alpha=6.0, target_modules="v_proj", modules_to_save="head")
