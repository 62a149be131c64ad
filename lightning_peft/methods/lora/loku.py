"""LoKU: unlearn with a bounded loss, from a start at what matters for the data to forget and not for those to retain.

Paper:    Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", 2025, arXiv:2408.06621.
Formula:  F = mean of (dL_forget/dW)^2 / (1e-5 + mean of (dL_retain/dW)^2), rho_i = sqrt(sum over j of F_ij),
          diag(rho) W = U diag(sigma) V^T, the first r triplets;
          loss = mean over tokens of max(0, 1 + p_target - max of p_other), plus that of the data to retain
Shapes:   F (d_out, d_in), rho (d_out,); lora_A (r, d_in), lora_B (d_out, r)
Init:     A_0 = diag(sqrt(sigma / s)) V^T, B_0 = diag(1 / (rho + 1e-5)) U diag(sqrt(sigma / s)); y starts as the base
Merge:    as PiSSA
Schedule: F is measured before training
Needs:    a training step that returns the loss on the data to forget by itself: {"loss": ..., "forget": ...}
Cost:     a second pair of thin products
Deviates from the authors' code: each batch has the same weight in F, whatever number of tokens is in it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from lightning_peft.adapters.low_rank import MeasuredStart
from lightning_peft.engine import Adapter, Calibration, Kind, register
from lightning_peft.engine.limits import Count, Positive
from lightning_peft.methods.lora.pissa import PiSSA
from lightning_peft.parts.spectrum import leading_svd


@register("loku")
@dataclass(frozen=True, kw_only=True)
class LoKU(PiSSA):
    """LoRA that starts at what the data to forget rely on (FILA); trained with `InvertedHingeLoss`.

    The training step returns, beside the loss, the losses by which both kinds of data are told apart, with graphs::

        forget, retain = self.model(**batch["forget"]), self.model(**batch["retain"])
        hinge = InvertedHingeLoss()(forget.logits[:, :-1], batch["forget"]["labels"][:, 1:])
        return {"loss": hinge + retain.loss, "forget": forget.loss, "retain": retain.loss}

    Args:
        forget: under which key the training step returns the loss of the data to forget.
        retain: the same for the data to retain.
        r: see `PiSSA`; so for the arguments that follow it.

    Raises:
        AdapterError: there is no data, a part of the loss is not returned, or a gradient is missing or not finite.
        TargetError: see `PiSSA`.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import calibrate
    >>> model, x = inject(nn.Sequential(nn.Linear(3, 2)), LoKU(r=1, alpha=1.0)), torch.eye(3)
    >>> calibrate(model, [lambda: {"forget": model(x)[:, 0].sum(), "retain": model(x)[:, 1].sum()}])
    >>> product = model[0].adapters["default"].lora_B @ model[0].adapters["default"].lora_A
    >>> torch.allclose(product[0], model[0].weight[0], atol=1e-3)  # the first output alone is to be forgotten
    True
    """

    paper: ClassVar[str] = "arXiv:2408.06621"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": MeasuredStart}
    calibrated: ClassVar[bool] = True

    r: Count = 32
    alpha: Positive | None = 64.0
    forget: str = "forget"
    retain: str = "retain"

    def calibrate(self, calibration: Calibration) -> None:
        """Measure F for each layer, and decompose the weight under it."""
        forget, retain = (calibration.gradients(part, power=2) for part in (self.forget, self.retain))
        starts: list[Any] = []
        for path, module, adapter in calibration.each():
            importance = calibration.measured("gradient", path, forget.get(path))
            importance = importance / (1e-5 + retain.get(path, torch.zeros_like(importance)))
            weight = calibration.weight(module, adapter).to(adapter.scaling.dtype)
            rho = importance.sum(1, keepdim=True).sqrt().to(weight)
            U, values, Vh = leading_svd(rho * weight, len(adapter.lora_A), self.niter, torch.Generator())
            root = values.sqrt()
            starts.append((adapter, root[:, None] * Vh, U * root / (rho + 1e-5)))
        for adapter, A, B in starts:
            adapter.restart(A, B)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Both parts under one name, so that any training step will do."""
        return (
            cls(r=2, alpha=2.0, forget="loss", retain="loss"),
            cls(r=1, forget="loss", retain="loss", modules_to_save="head"),
        )
