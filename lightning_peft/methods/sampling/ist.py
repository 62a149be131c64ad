"""IST: of the adapters of another method, train those of a few blocks at a time, chosen by learnt importance.

Paper:    Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
          Fine-tuning of Large Language Models", 2024, arXiv:2410.11772.
Formula:  each step: n_layers blocks drawn with chances softmax(I);
          every interval_steps steps: for n_subsets random subsets S of n_layers blocks, the adapters outside of S
          act with factor beta; r_S = exp(-loss_S) - mean over S;  I_l <- I_l + mu * r_S for l in S
Shapes:   I (number of blocks in which the other method trains something,)
Init:     I = 0; adapters as the other method makes them
Merge:    as the other method
Schedule: the importances are measured on the coming batch, without gradients
Cost:     every `interval_steps` steps, `n_subsets` forwards
Deviates from the paper: it publishes no code; sign, centring and the defaults of the constants are ours.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.engine import (
    HostedMethod,
    Method,
    Target,
    TargetError,
    Training,
    check_range,
    get_method,
    register,
)
from lightning_peft.engine.limits import Count, NonNegative, Patterns
from lightning_peft.engine.targets import is_below
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.switching import blocks_to_draw, draw, let_blocks_train
from lightning_peft.parts.weakening import weakened


@register("ist")
@dataclass(frozen=True, kw_only=True)
class IST(HostedMethod):
    """Importance-aware sparse tuning of the adapters that ``method`` puts into the blocks of a model.

    What ``method`` trains outside of the blocks always trains.

    Args:
        method: whose adapters, or its registry name; low-rank ones by default.
        n_layers: blocks whose adapters train in a step; by default a quarter of those that have some.
        interval_steps: optimizer steps between two measurements of importance.
        n_subsets: subsets of blocks that are tried in a measurement, a forward pass each.
        beta: factor of the adapters outside of a subset while it is tried; 1 measures nothing.
        mu: step size of the importances.
        blocks: path of the list of blocks, where it is not found by itself.
        seed: of all draws.

    Raises:
        AdapterError: an argument is out of range, or the loop offers no loss to measure with.
        TargetError: no blocks are found, or fewer than ``n_layers``, or ``method`` puts no adapter into one.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(4)])
    >>> IST().n_chosen(blocks)
    1
    """

    paper: ClassVar[str] = "arXiv:2410.11772"
    switches: ClassVar[bool] = True

    method: Method | str = "lora"
    n_layers: Count | None = None
    interval_steps: Count = 10
    n_subsets: Count = 3
    beta: float = 0.25
    mu: NonNegative = 10.0
    blocks: Patterns | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("IST", "beta", self.beta, 0 <= self.beta <= 1, "a number in [0, 1]")

    def n_chosen(self, blocks: Collection[str]) -> int:
        """How many of ``blocks`` train in a step."""
        return self.n_layers or max(1, len(blocks) // 4)

    def targets(self, model: nn.Module) -> list[Target]:
        """Those of the other method, some of them in the blocks."""
        found, blocks = super().targets(model), find_blocks(model, self.blocks, who="IST")
        if not any(is_below(target.name, block) for target in found for block in blocks):
            raise TargetError(
                f"IST: {type(self.host).__name__} puts no adapter into any of {blocks[0]} to {blocks[-1]}, so there is "
                "no importance to measure. Choose another method or other target_modules, name the blocks in blocks=, "
                "or train blocks as they are with LISA."
            )
        return found

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The importances."""
        trained = [*(target.name for target in self.host.targets(model)), *self.host.trained_in_place(model)]
        blocks = self._blocks(model, trained)
        return super().initial_state(model) | {"importance": torch.zeros(len(blocks), dtype=torch.float64)}

    def on_train_batch_start(self, training: Training) -> None:
        """Measure the importances where it is time to, and choose the blocks of this step."""
        super().on_train_batch_start(training)
        importance, blocks = training.state["importance"], self._blocks(training.model, training.parameters())
        k = self.n_chosen(blocks)
        if training.step % self.interval_steps == 0 and training.step:
            importance += self.mu * self._rewards(training, blocks, k)
        chosen = draw(importance.softmax(0).clamp_min(1e-12), k, self.seed, training.step)
        let_blocks_train(training, blocks, chosen, "keep")

    def _blocks(self, model: nn.Module, trained: Collection[str]) -> list[str]:
        return blocks_to_draw(model, self.blocks, self.n_layers or 1, "IST", trained)

    def _rewards(self, training: Training, blocks: Sequence[str], k: int) -> Tensor:
        index = 1_000_000 + training.step * self.n_subsets  # other draws than those of the steps
        subsets = [draw(torch.ones(len(blocks)), k, self.seed, index + i) for i in range(self.n_subsets)]
        inside = {
            adapter: i for name, _, adapter in training.adapters() for i, b in enumerate(blocks) if is_below(name, b)
        }
        gains = torch.zeros(self.n_subsets, dtype=torch.float64)
        for s, subset in enumerate(subsets):
            with weakened([adapter for adapter, i in inside.items() if i not in subset], self.beta):
                gains[s] = -training.batch_loss()
        centred = gains.exp() - gains.exp().mean()
        rewards = torch.zeros(len(blocks), dtype=torch.float64)
        for reward, subset in zip(centred, subsets, strict=True):
            rewards[subset] += reward
        return rewards

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Over low-rank adapters, one of two layers at a time."""
        host = get_method("lora")(r=2)  # type: ignore[call-arg]
        return (cls(method=host, n_layers=1, interval_steps=2, n_subsets=2, blocks=("q_proj", "v_proj")),)
