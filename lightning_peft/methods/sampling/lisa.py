"""LISA: train a few randomly drawn blocks at a time, and everything outside of the blocks always.

Paper:    Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
          2024, arXiv:2403.17919.
Formula:  in period i = step // interval_steps, n_layers of the L blocks are drawn uniformly; they train, and so do
          embeddings, norms outside of the blocks and output head; all other blocks are frozen
Shapes:   those of the model
Init:     the model as it is; y starts as the base
Merge:    nothing to do: the parameters are the base's own, and no copy of the base is kept
Schedule: a new draw every interval_steps optimizer steps
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn

from lightning_peft.engine import Method, Training, register, select_parameters
from lightning_peft.engine.limits import Count, Patterns
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.switching import Moments, blocks_to_draw, draw, let_blocks_train


@register("lisa")
@dataclass(frozen=True, kw_only=True)
class LISA(Method):
    """Full fine-tuning of ``n_layers`` blocks at a time, with the gradients and moments of these alone in memory.

    Bytes in 16-bit training with a 32-bit AdamW: 2 for each parameter, and 14 more for each that trains at the moment.

    Args:
        n_layers: blocks that train at a time.
        interval_steps: optimizer steps until others are drawn.
        blocks: path of the list of blocks, where it is not found by itself.
        state_policy: what becomes of the optimizer state of a block that is frozen: ``"reset"`` frees it, ``"keep"``
            lets it grow towards that of full fine-tuning, ``"offload"`` moves it to main memory until it is needed.
        seed: of the draws; they depend on it and on the step alone.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: no blocks are found, or fewer than ``n_layers``.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> from lightning_peft.engine import notify
    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> model = inject(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([block() for _ in range(4)])), LISA(n_layers=1))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> _ = notify(model, "on_train_batch_start", optimizer, step=0)
    >>> sum(block[0].weight.requires_grad for block in model[1]), model[0].weight.requires_grad
    (1, True)
    """

    paper: ClassVar[str] = "arXiv:2403.17919"
    keeps_base: ClassVar[bool] = False
    switches: ClassVar[bool] = True

    n_layers: Count = 2
    interval_steps: Count = 20
    blocks: Patterns | None = None
    state_policy: Moments = "reset"
    seed: int = 0

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """Every parameter of the base: over time all blocks have their turn."""
        blocks_to_draw(model, self.blocks, self.n_layers, who="LISA")
        return select_parameters(model, "all-layers", who="LISA")

    def on_train_batch_start(self, training: Training) -> None:
        """Draw the blocks of a period when it begins."""
        period = training.step // self.interval_steps
        if training.is_new(period):
            blocks = find_blocks(training.model, self.blocks)
            drawn = draw(torch.ones(len(blocks)), self.n_layers, self.seed, period)
            let_blocks_train(training, blocks, drawn, self.state_policy)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """One of two blocks at a time; the moments forgotten, or kept."""
        two = ("q_proj", "v_proj")
        return (
            cls(n_layers=1, interval_steps=2, blocks=two),
            cls(n_layers=1, interval_steps=3, blocks=two, state_policy="keep", seed=1),
        )
