"""OwLore: draw the blocks that train by their share of outlier weights, and project their gradients.

Paper:    Li et al., "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
          Fine-tuning", 2024, arXiv:2405.18380; outliers as in Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)",
          2023, arXiv:2310.05175.
Formula:  chance of block l ~ D_l, the share of entries of its matrices with |W_ij| ||X_j||_2 > M * their mean;
          n_layers blocks are drawn every interval_steps steps, their matrices train as in GaLore
Shapes:   X (tokens, d_in) the input of W (d_out, d_in); D (number of blocks,)
Init:     the model as it is; y starts as the base
Merge:    nothing to do: the parameters are the base's own, and no copy of the base is kept
Schedule: D is measured on the first batch; directions are taken anew when blocks are drawn, and every
          update_proj_gap steps
Example:  {"n_layers": 2}
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.projected import projected
from lightning_peft.engine import Calibration, Target, TargetError, Training, register
from lightning_peft.engine.limits import Count, Patterns, Positive
from lightning_peft.engine.targets import is_below
from lightning_peft.methods.sampling.galore import GaLore
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.switching import Moments, blocks_to_draw, draw, let_blocks_train


@register("owlore")
@dataclass(frozen=True, kw_only=True)
class OwLore(GaLore):
    """Layer sampling as in LISA, with the chances of blocks from their outliers, and GaLore in the blocks.

    Args:
        n_layers: blocks that train at a time.
        interval_steps: optimizer steps until others are drawn.
        outlier_threshold: M; an entry is an outlier from M times the mean of its block.
        blocks: path of the list of blocks, where it is not found by itself.
        state_policy: what becomes of the optimizer state of a block that is frozen; see `LISA`.
        seed: of the draws.
        r: see `GaLore`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range, or the loop offers no loss to measure with.
        TargetError: no blocks are found, or fewer than ``n_layers``, or a pattern matches no layer in them.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    >>> model = inject(nn.Sequential(nn.Linear(2, 4), blocks), OwLore(n_layers=1, r=2))
    >>> [hasattr(layer[0], "adapters") for layer in (model, *model[1])]  # projected in the blocks alone
    [False, True, True, True]
    """

    paper: ClassVar[str] = "arXiv:2405.18380"

    r: Count = 256
    update_proj_gap: Count = 100
    n_layers: Count = 5
    interval_steps: Count = 50
    outlier_threshold: Positive = 13.0
    blocks: Patterns | None = None
    state_policy: Moments = "reset"
    seed: int = 0

    def targets(self, model: nn.Module) -> list[Target]:
        """The chosen layers inside of blocks."""
        blocks = blocks_to_draw(model, self.blocks, self.n_layers, who="OwLore")
        found = [t for t in super().targets(model) if any(is_below(t.name, block) for block in blocks)]
        if not found:
            raise TargetError(f"OwLore: target_modules {self.target_modules!r} matches no layer in a block. Name some.")
        return found

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The chances of the blocks, not known yet."""
        return {"chances": torch.zeros(len(find_blocks(model, self.blocks)), dtype=torch.float64)}

    def on_train_batch_start(self, training: Training) -> None:
        """Draw the blocks of a period when it begins; ask for full gradients where new directions are due."""
        chances, blocks = training.state["chances"], find_blocks(training.model, self.blocks)
        if not chances.any():
            chances.copy_(training.average(self._outlier_shares(training, blocks)) + 1e-12)
        period, begun = divmod(training.step, self.interval_steps)
        due = begun == 0 or self.due(training)
        if training.is_new((period, due)):
            drawn = draw(chances, self.n_layers, self.seed, period)
            let_blocks_train(training, blocks, drawn, self.state_policy)
            for weight, _, _ in projected(training):
                weight.requires_grad_(weight.requires_grad and due)

    def _outlier_shares(self, training: Training, blocks: list[str]) -> Tensor:
        squares: dict[nn.Module, Tensor] = {}

        def observe(module: nn.Module, x: Tensor) -> None:
            squares[module] = squares.get(module, 0) + x.square().sum(0)

        batch: list[Any] = [training.batch_loss]
        Calibration(training.model, training.name, batch).observe_inputs(observe)
        shares = []
        for block in blocks:
            inside = [(module, adapter) for name, module, adapter in training.adapters() if is_below(name, block)]
            scores = [_scores(adapter.site.get(module)[0], squares.get(module)) for module, adapter in inside]
            count = max(1, sum(s.numel() for s in scores))
            threshold = self.outlier_threshold * sum(s.sum() for s in scores) / count
            shares.append(float(sum((s > threshold).sum() for s in scores)) / count)
        return torch.tensor(shares, dtype=torch.float64)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """One of two blocks at a time."""
        return (cls(n_layers=1, interval_steps=2, r=2, outlier_threshold=1.5, blocks=("q_proj", "v_proj")),)


def _scores(weight: Tensor, squares: Tensor | None) -> Tensor:
    """|W_ij| ||X_j||; the weight alone where its module is not called."""
    magnitude = weight.detach().abs().float()
    return magnitude if squares is None else magnitude * squares.sqrt()
