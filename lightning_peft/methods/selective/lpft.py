"""LP-FT: first train the head alone, then everything from there.

Paper:    Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022,
          arXiv:2202.10054; Tomihari and Sato, "Understanding Linear Probing then Fine-tuning Language Models from NTK
          Perspective", 2024, arXiv:2405.16747.
Formula:  epochs 0 to lp_epochs - 1: the head trains; then all parameters, or what another method trains
Shapes:   those of the model
Init:     the model as it is; y starts as the base
Merge:    as the other method; of full fine-tuning nothing is left to do, and no copy of the base is kept
Schedule: at the change of stage the optimizer forgets the moments of the head
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.engine import HostedMethod, Method, Training, get_method, register, select_parameters
from lightning_peft.engine.limits import Patterns, WholeNumber
from lightning_peft.parts.switching import let_train


@register("lpft")
@dataclass(frozen=True, kw_only=True)
class LPFT(HostedMethod):
    """Linear probing, then fine-tuning; a lower learning rate from there is a matter of the scheduler.

    In the first stage frozen normalisation layers keep their running statistics.

    Args:
        lp_epochs: epochs of the first stage.
        head: patterns of what trains in it; ``"output-head"`` finds the head by itself.
        method: what trains after it, the head beside it; everything by default.

    Raises:
        AdapterError: ``lp_epochs`` is out of range.
        TargetError: a pattern matches nothing, or no output head is known.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import notify
    >>> model = inject(nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)}), LPFT(lp_epochs=2))
    >>> for epoch in (1, 2):
    ...     _ = notify(model, "on_train_batch_start", [], epoch=epoch)
    ...     print(epoch, [name for name, p in model.named_parameters() if p.requires_grad])
    1 ['head.weight', 'head.bias']
    2 ['body.weight', 'body.bias', 'head.weight', 'head.bias']
    """

    paper: ClassVar[str] = "arXiv:2202.10054"
    keeps_base: ClassVar[bool] = False
    switches: ClassVar[bool] = True

    method: Method | str = "fullfinetuning"
    lp_epochs: WholeNumber = 1
    head: Patterns = "output-head"

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """What the other method trains in place, and the head."""
        head = select_parameters(model, self.head, who="LPFT")
        return list(dict.fromkeys([*super().trained_in_place(model), *head]))

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Whether the second stage has begun."""
        return super().initial_state(model) | {"tuned": torch.zeros(())}

    def on_train_batch_start(self, training: Training) -> None:
        """Begin the stage of this epoch."""
        super().on_train_batch_start(training)
        probing, tuned = training.epoch < self.lp_epochs, training.state["tuned"]
        if training.is_new(probing):
            head = select_parameters(training.model, self.head, who="LPFT")
            let_train(training, head if probing else training.parameters())
        if not probing and not tuned:
            tuned.fill_(1)
            for parameter in training.parameters().values():
                for optimizer in training.optimizers:
                    optimizer.state.pop(parameter, None)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Before everything, and before low-rank adapters."""
        return cls(head="head"), cls(head="head", method=get_method("lora")(r=2))  # type: ignore[call-arg]
