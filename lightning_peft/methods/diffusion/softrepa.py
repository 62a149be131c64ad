"""SoftREPA: trained tokens beside the text of the first blocks, learnt by telling which text belongs to which image.

Paper:    Lee et al., "Aligning Text to Image in Diffusion Models is Easier Than You Think", 2025, arXiv:2503.08250.
Formula:  block_k sees [P(S_k) + T_k[t]; c] for k < K in place of the text c, and what it makes of c alone goes on to
          block_k+1; P is the frozen projection of the text. In the stages of a UNet: [c_0; S + T[t]; c_1, ...]
Shapes:   S_k (p, d_text), T (100, K C) for a text d_text wide and C wide in the blocks; in a UNet S (p, C), T (100, C)
Init:     S, T ~ N(0, 0.02^2), which is not the base
Merge:    none: tokens are no weights
Needs:    a denoiser that looks at a text
Loss:     `contrastive_denoising_loss` of the errors of n images with n texts, in the training step
Deviates from the authors' code: a step t >= 1000 has the last row of T; there, one such step lowers all steps of the
          batch by one. For SD1.5 their tokens start as the token that begins a text.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.soft_text import STAGES, SoftBlock, SoftTarget, SoftTokens, Stage, soft_targets
from lightning_peft.engine import Adapter, Kind, MethodWithHead, Target, TargetError, check_range, register
from lightning_peft.engine.limits import Count


@register("softrepa")
@dataclass(frozen=True, kw_only=True)
class SoftREPA(MethodWithHead):
    """Soft tokens of the text in a denoiser, for SD3 and for UNets that look at a text.

    They act with every text, that of guidance without condition too. The paper trains with the errors of all pairs of
    n images and n texts, at one time step and with one noise: repeat images, texts and the rest to n * n samples, take
    the mean squared error of each, and give `contrastive_denoising_loss` the n x n of them.

    Args:
        num_virtual_tokens: p, tokens of each block.
        n_layers: K, the first blocks, which have tokens of their own; no more than there are. Not in a UNet.
        stages: of a UNet, whose stages share their tokens: which of "down", "mid" and "up" see them.
        num_times: rows of the table of time, which share the steps from 0 to 1000; None for tokens that do not depend
            on it.
        module: path of the denoiser, where there are several.
        modules_to_save: see `LoRA`.

    Raises:
        TargetError: there is no denoiser that looks at a text, or its text has positions there, as in Flux.
        AdapterError: while running, a text is changed before it comes to the blocks.

    >>> import torch
    >>> from lightning_peft.engine import Site
    >>> facts = {"index": None, "start": 0, "context": 2, "given": 2, "rows": (0, 1, None), "projection": ""}
    >>> tokens = SoftTokens(SoftTarget("", nn.Linear(2, 2), Site("module", width=2), "", **facts), 1, 4, "SoftREPA")
    >>> tokens.table.data = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> tokens.times.data = torch.arange(4.0)[:, None] * torch.tensor([10.0, 10.0, 100.0, 100.0])
    >>> first, second = tokens.tokens(torch.zeros(2, 5, 2), torch.tensor([249, 500]), nn.Identity())  # rows 0 and 2
    >>> first.flatten(1).tolist(), second.flatten(1).tolist()
    ([[1.0, 2.0], [21.0, 22.0]], [[3.0, 4.0], [203.0, 204.0]])
    """

    paper: ClassVar[str] = "arXiv:2503.08250"
    modalities: ClassVar = ("diffusion",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": SoftBlock}
    acts_on: ClassVar = "condition"
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    num_virtual_tokens: Count = 4
    n_layers: Count = 5
    stages: tuple[Stage, ...] = ("down",)
    num_times: Count | None = 100
    module: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = isinstance(self.stages, tuple) and self.stages and set(self.stages) <= STAGES.keys()
        check_range("SoftREPA", "stages", self.stages, bool(known), f"some of {', '.join(map(repr, STAGES))}")

    def targets(self, model: nn.Module) -> list[Target]:
        """The denoiser, and all blocks or stages that look at the text."""
        return [*soft_targets(model, self.n_layers, self.stages, self.module, "SoftREPA")]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """What makes the tokens, and what puts them in."""
        parts = [target for target in targets if isinstance(target, SoftTarget)]
        if parts and parts[0].index is not None:
            raise TargetError(
                "SoftREPA: blocks were built after the denoiser was adapted. Build all of it in one place "
                "(configure_model), or unload the model first."
            )
        p = self.num_virtual_tokens
        return [
            SoftTokens(t, p, self.num_times, "SoftREPA") if t.index is None else SoftBlock(t, "SoftREPA") for t in parts
        ]

    def num_trainable(self, target: Target) -> int:
        """K p d_text + 100 K C of the denoiser; in a UNet p C + 100 C."""
        if not isinstance(target, SoftTarget) or target.index is not None:
            return 0
        each = self.num_virtual_tokens * target.given + (self.num_times or 0) * target.context
        return target.n_tables * each

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and in the first, without time."""
        return cls(num_virtual_tokens=3), cls(num_virtual_tokens=2, n_layers=1, num_times=None)
