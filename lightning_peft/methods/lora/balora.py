"""BA-LoRA: PiSSA that stays consistent with the base model, diverse, and concentrated in its outputs.

Paper:    Chang et al., "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large
          Language Models", 2024, arXiv:2408.04556.
Formula:  loss + lambda_1 L_c + lambda_2 L_d + lambda_3 L_s of the logits z and those of the base model z_0;
          understanding: L_c = mean (z/|z| - z_0/|z_0|)^2,  L_d = sum over i != j of Cov(z)_ij^2 / D
          generation:    L_c = KL(p_0 || p) / batch,         L_d = - mean entropy of p
          both:          L_s = - (sigma_1 + ... + sigma_k) / sum of all sigma, singular values of z as (batch, rest)
Shapes:   as PiSSA; z (batch, D) or (batch, tokens, D); Cov (D, D) over all rows of z
Init:     as PiSSA; L_c = 0
Merge:    as PiSSA
Schedule: with each batch, which goes through the base model as well, without gradients
Cost:     a forward of the base model for each batch, and the singular values of its outputs; a second pair of thin
          products
Deviates from the authors' code: no second copy of the model, as the base is still there below the adapters; singular
          values are those of one matrix, where theirs takes it for a batch of them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import TargetError, register, select_modules
from lightning_peft.engine.limits import Count, NonNegative
from lightning_peft.methods.lora.pissa import PiSSA

Task = Literal["understanding", "generation"]


@register("balora")
@dataclass(frozen=True, kw_only=True)
class BALoRA(PiSSA):
    """PiSSA with three more terms in the loss, which hold the model to what the base model knows.

    Args:
        task: ``"understanding"`` for classifiers and regressors, ``"generation"`` for language models.
        consistency: weight of L_c, how far the outputs are from those of the base model.
        diversity: weight of L_d, how much outputs vary together, or how sure a language model is.
        spectrum: weight of L_s, how many directions the outputs of a batch take.
        k: singular values in which the outputs are to be concentrated.
        output: the module whose outputs are the logits; ``"output-head"`` finds it by itself.
        r: see `PiSSA`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range, or the module ``output`` is not called for a batch.
        TargetError: no layer is known to be the head, or several are; see `PiSSA`.

    >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> terms = BALoRA(consistency=1.0, diversity=1.0, spectrum=1.0, k=1).output_losses(z, 2 * z)
    >>> {name: round(term.item(), 4) for name, term in terms.items()}  # Cov = [[2, -1], [-1, 0.5]]
    {'consistency': 0.0, 'diversity': 1.0, 'spectrum': -0.6667}
    """

    paper: ClassVar[str] = "arXiv:2408.04556"

    task: Task = "understanding"
    consistency: NonNegative = 1e-4
    diversity: NonNegative = 3e-4
    spectrum: NonNegative = 1e-4
    k: Count = 3
    output: str = "output-head"

    def watched(self, model: nn.Module) -> str | None:
        """The module ``output``, unless all weights are 0."""
        if not (self.consistency or self.diversity or self.spectrum):
            return None
        found = select_modules(model, self.output, who="BALoRA")
        if len(found) != 1:
            raise TargetError(
                f"BALoRA: output={self.output!r} selects {', '.join(found)}. Name the one with the logits."
            )
        return found[0]

    def output_losses(self, outputs: Tensor, base_outputs: Tensor) -> dict[str, Tensor]:
        """The three terms, weighted."""
        z, z_0 = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (outputs, base_outputs))
        if self.task == "understanding":
            consistency = F.mse_loss(F.normalize(z, dim=-1), F.normalize(z_0, dim=-1))
            rows = z.flatten(0, -2)
            covariance = rows.T.cov(correction=min(1, len(rows) - 1))  # one row does not vary
            diversity = (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[-1]
        else:
            log_p = z.log_softmax(-1)
            consistency = F.kl_div(log_p, z_0.log_softmax(-1), reduction="batchmean", log_target=True)
            diversity = (log_p.exp() * log_p).sum(-1).mean()
        values = torch.linalg.svdvals(z.flatten(1))
        spectrum = -values[: self.k].sum() / (values.sum() + 1e-10)
        return {
            "consistency": self.consistency * consistency,
            "diversity": self.diversity * diversity,
            "spectrum": self.spectrum * spectrum,
        }

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """For both kinds of task."""
        return (
            cls(r=2, consistency=0.01, output="head"),
            cls(r=1, task="generation", alpha=4.0, output="head", modules_to_save="head"),
        )
