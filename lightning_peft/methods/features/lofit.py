"""LoFiT: choose a few attention heads, and train one offset for what each of them answers.

Paper:    Yin et al., "LoFiT: Localized Fine-tuning on LLM Representations", 2024, arXiv:2406.01563.
Formula:  first z_h <- (1 + A_h) * z_h for every head h, with l1 * sum |A| added to the loss; then, for the top_k heads
          of the largest ||A_h||, z_h <- z_h + v_h; z_h is what head h hands to the output projection
Shapes:   z_h, A_h, v_h (d_head,)
Init:     A ~ N(0, init_std^2), and so v when its turn comes: the output at the start differs a little from the base
Merge:    b_o <- b_o + sum of W_o[:, h] v_h over the chosen heads, a missing bias is created; before the choice,
          W_o[:, h] <- W_o[:, h] diag(1 + A_h)
Schedule: the choice is made before step selection_steps; A is forgotten then, with its moments
Deviates: the authors train twice, with two learning rates; here it is one run with the rates of its schedule. A and v
          take turns in one tensor, so that as many numbers are saved as there are features of heads.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.head_offset import HeadOffset, HeadTarget
from lightning_peft.engine import Adapter, AdapterError, Kind, Target, TargetError, Training, register
from lightning_peft.engine.limits import Count, NonNegative
from lightning_peft.parts.ranks import keep_largest
from lightning_peft.parts.sublayers import SublayerKind, SublayerMethod, n_heads


@register("lofit")
@dataclass(frozen=True, kw_only=True)
class LoFiT(SublayerMethod):
    """Offsets of a few attention heads, which the first part of the run chooses.

    Args:
        top_k: number of heads of all layers together; a tenth of them by default.
        selection_steps: optimizer steps before the choice; half of the run by default.
        l1: weight of the sum of |A| in the loss, before the choice.
        init_std: standard deviation of both first values; 0 starts as the base.
        n_heads: heads in each attention, where its module does not tell.
        target_modules: patterns of the output projections of attentions; by default those of all blocks are found.
        seed: of the first values of v.
        blocks: see `ParallelAdapter`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range; or, when training starts, the choice does not fit into the run.
        TargetError: there are no attentions, or how many heads they have cannot be told; or a pattern matches nothing.

    >>> from lightning_peft import inject
    >>> base = nn.ModuleDict({"proj": nn.Linear(4, 1)})
    >>> a = inject(base, LoFiT(target_modules="proj", n_heads=2))["proj"].adapters["default"]
    >>> base["proj"].weight.data, base["proj"].bias.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1)
    >>> a.offset.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> base["proj"](torch.ones(1, 4)).item()  # 2 * 1 + 2 + 3 + 2 * 4
    15.0
    >>> a.chosen.fill_(1), a.kept.copy_(torch.tensor([0.0, 1.0]))  # the second head was chosen
    (tensor(1.), tensor([0., 1.]))
    >>> base["proj"](torch.ones(1, 4)).item()  # 1 + 2 + 3 + 4 * (1 + 1)
    14.0
    """

    paper: ClassVar[str] = "arXiv:2406.01563"
    modalities: ClassVar = ("text",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": HeadOffset}
    sublayers: ClassVar[tuple[SublayerKind, ...]] = ("attention",)
    layers: ClassVar[tuple[Kind, ...]] = ("linear",)
    identity_at_init: ClassVar[bool] = False

    top_k: Count | None = None
    selection_steps: Count | None = None
    l1: NonNegative = 5e-4
    init_std: NonNegative = 1e-3
    n_heads: Count | None = None
    seed: int = 0

    def targets(self, model: nn.Module) -> list[Target]:
        """The output projections that are named, or those of all attentions."""
        found = self.named(model) if self.target_modules else [sublayer.projection for sublayer in self.found(model)]
        return [self._with_heads(model, target) for target in found if target.site.kind == "linear"]

    def _with_heads(self, model: nn.Module, target: Target) -> HeadTarget:
        heads = self.n_heads or n_heads(model, target)
        if heads is None or target.d_in % heads:
            told = f"n_heads={heads} does not divide" if heads else "no module around it tells how many heads make up"
            raise TargetError(
                f"LoFiT: {told} the {target.d_in} features that {target.name!r} is given. Give the number of heads of "
                "its attention as n_heads=."
            )
        return HeadTarget(target.name, target.module, target.site, target.owner, n_heads=heads)

    def adapter(self, target: Target) -> Adapter:
        """Scales of all heads, until some are chosen."""
        return HeadOffset(target, self.init_std)  # type: ignore[arg-type]  # all targets know their heads

    def first_step(self, training: Training) -> int:
        """The step before which the heads are chosen."""
        first = self.selection_steps or max(1, training.run_length() // 2)
        if training.total_steps is not None and first >= training.total_steps:
            raise AdapterError(
                f"LoFiT: of {training.total_steps} optimizer steps, selection_steps={first} leaves none for the "
                "offsets. Lower it, or train for longer."
            )
        return first

    def penalties(self, training: Training) -> dict[str, Tensor]:
        """l1 * sum |A|, before the choice."""
        adapters = [adapter for _, _, adapter in training.adapters()]
        if not self.l1 or adapters[0].chosen:
            return {}
        return {"l1": self.l1 * torch.stack([adapter.offset.abs().sum() for adapter in adapters]).sum()}

    @torch.no_grad()
    def on_train_batch_start(self, training: Training) -> None:
        """Choose, if it is time to."""
        adapters = [adapter for _, _, adapter in training.adapters()]
        if training.step < self.first_step(training) or adapters[0].chosen:
            return
        scores = [adapter.offset.norm(dim=1) for adapter in adapters]
        k = self.top_k or max(1, sum(map(len, scores)) // 10)
        generator = torch.Generator().manual_seed(self.seed)
        for adapter, kept in zip(adapters, keep_largest(scores, k), strict=True):
            adapter.kept.copy_(kept)
            adapter.chosen.fill_(1)
            adapter.draw(generator)
            for optimizer in training.optimizers:
                optimizer.state.pop(adapter.offset, None)

    def num_trainable(self, target: Target) -> int:
        """The features of all heads; behind the choice, top_k * d_head of them act."""
        return target.d_in

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Over all blocks; and at one projection, with a choice soon."""
        one = cls(target_modules="1.attn.proj", n_heads=4, top_k=2, selection_steps=2, init_std=0.0, l1=0.01)
        return cls(n_heads=3, top_k=2), one
