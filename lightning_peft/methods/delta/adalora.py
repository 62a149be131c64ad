"""AdaLoRA: let all layers compete for a number of ranks that falls while training.

Paper:    Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, arXiv:2303.10512.
Formula:  y = W x + b + s B diag(z) A dropout(x),  s = alpha / r,
          loss + orth_reg_weight * R,  R = mean of ||A A^T - I||_F and ||B^T B - I||_F over all factors of all layers;
          worth of a triplet: c(z_i) + mean_j c(A_ij) + mean_j c(B_ji),  c = I * U for each number p, with
          I <- beta1 I + (1 - beta1) |p dp|,  U <- beta2 U + (1 - beta2) | |p dp| - I |,  dp its gradient;
          z_i <- 0 for all triplets but the budget(t) most worthy ones of all layers together
Shapes:   lora_A (r, d_in), lora_B (d_out, r), lora_z, kept (r,); convolution: lora_A (r, c_in / groups, *kernel)
Init:     lora_A, lora_B ~ N(0, 0.02^2), lora_z = 0; y starts as the base
Merge:    W <- W + s B diag(z) A
Schedule: behind each step t = 1, ..., T; for n layers, budget(t) = r n until tinit, and falls to target_r n at
          T - tfinal as (1 - (t - tinit) / (T - tinit - tfinal))^3; a choice every deltaT steps, the final one there
Cost:     averages of |p dp| for each number, and two products (r, r) per layer for the penalty
Deviates from the authors' code: t counts the steps that were taken, so that the last step of all can make the choice
          final; triplets of equal worth do not go together; alpha / r in place of alpha / (r + 1e-5).
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_peft.adapters.diagonal import Diagonal
from lightning_peft.adapters.low_rank import LowRankConv
from lightning_peft.engine import Adapter, AdapterError, Kind, Layer, Target, Training, check_range, register
from lightning_peft.engine.limits import Count, NonNegative, Share, WholeNumber
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.ranks import cubic_budget, keep_largest, measure_sensitivity, triplet_worths
from lightning_peft.parts.spectrum import orthonormality


class Triplets(Diagonal):
    """``delta = scaling * B diag(z) A``, and which of the r triplets were kept last."""

    kept: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.register_buffer("kept", torch.ones_like(self.lora_z, requires_grad=False))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Random directions of length zero."""
        for factor in (self.lora_A, self.lora_B):
            factor.copy_(0.02 * torch.randn(factor.shape, dtype=factor.dtype, generator=generator))
        self.lora_z.zero_()
        self.kept.fill_(1)


class TripletsConv(LowRankConv, Triplets):
    """The same for convolutions."""


@register("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LoRA):
    """Low-rank updates whose ranks are shared out over the layers while training.

    Args:
        r: rank of each layer at the start; trainable numbers per layer: r * (d_in + d_out + 1).
        target_r: average rank of the layers in the end; two thirds of r by default.
        tinit: optimizer steps before the budget begins to fall.
        tfinal: optimizer steps at the end, with ranks that stay.
        deltaT: optimizer steps between two choices.
        total_steps: T; all of the run by default.
        beta1: of the moving average I.
        beta2: of U.
        orth_reg_weight: weight of R in the loss; 0 switches it off.
        alpha: see `LoRA`; so for the arguments that follow it, and for other errors.

    Raises:
        AdapterError: an argument is out of range; or, when training starts, the schedule does not fit into the run.

    >>> from torch import nn, diag, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> y = base(ones(1, 3))
    >>> a = inject(base, AdaLoRA(r=2, alpha=8.0))[0].adapters["default"]
    >>> a.lora_z.data = torch.tensor([5.0, 7.0])
    >>> allclose(base(ones(1, 3)), y + (8 / 2) * ones(1, 3) @ (a.lora_B @ diag(a.lora_z) @ a.lora_A).T)
    True
    """

    paper: ClassVar[str] = "arXiv:2303.10512"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Triplets, "conv": TripletsConv}

    r: Count = 12
    target_r: Count | None = None
    tinit: WholeNumber = 0
    tfinal: WholeNumber = 0
    deltaT: Count = 1  # noqa: N815  (its name everywhere)
    total_steps: Count | None = None
    beta1: Share = 0.85
    beta2: Share = 0.85
    orth_reg_weight: NonNegative = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("AdaLoRA", "target_r", self.target_r, (self.target_r or 0) <= self.r, f"at most r={self.r}")

    def final_step(self, training: Training) -> int:
        """The step behind which the choice is final: T - tfinal."""
        total = self.total_steps or training.run_length()
        if total - self.tfinal <= self.tinit:
            raise AdapterError(
                f"AdaLoRA: of {total} optimizer steps, tinit={self.tinit} and tfinal={self.tfinal} leave none to share "
                "out ranks in. Lower them, or train for longer."
            )
        return total - self.tfinal

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """orth_reg_weight * R."""
        return orthonormality(training, self.orth_reg_weight)

    def on_train_batch_start(self, training: Training) -> None:
        """See, before anything is trained, whether the schedule fits into the run."""
        self.final_step(training)

    @torch.no_grad()
    def on_after_optimizer_step(self, training: Training) -> None:
        """Measure, and choose if it is time to."""
        step, final = training.step + 1, self.final_step(training)
        adapters = [adapter for _, _, adapter in training.adapters()]
        for parameter in (p for adapter in adapters for p in adapter.parameters() if step < final):
            measure_sensitivity(training, parameter, self.beta1, self.beta2)
        last = len(adapters) * (self.target_r or max(1, 2 * self.r // 3))
        choose = step == final or (self.tinit < step < final and step % self.deltaT == 0)
        if step > final and training.is_new("final"):  # a loss scaler may have passed over that step
            choose = sum(int(adapter.kept.sum()) for adapter in adapters) > last
        if choose:
            worths = [triplet_worths(training, adapter) for adapter in adapters]
            budget = cubic_budget(step, sum(map(len, worths)), last, self.tinit, final)
            for adapter, kept in zip(adapters, keep_largest(worths, budget), strict=True):
                adapter.kept.copy_(kept)
        for adapter in adapters if choose or step > final else ():
            adapter.lora_z.mul_(adapter.kept)

    def num_trainable(self, target: Target) -> int:
        """r * (d_in + d_out + 1)."""
        return super().num_trainable(target) + self.rank(target)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """A choice at each step, and one now and then, beside a trained head."""
        seldom = cls(r=3, tinit=1, deltaT=2, total_steps=5, orth_reg_weight=0.0, modules_to_save="head")
        return cls(r=2, target_r=1, tfinal=2, total_steps=6), seldom
