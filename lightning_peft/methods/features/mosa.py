"""MoSA: train a random share of an adapter's entries in each step, one of n that make up the whole.

Paper:    Zhang et al., "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training", 2023,
          arXiv:2312.02923.
Formula:  as AdaptFormer, with W_i = W_0 + M_i * (W - W_0) in the place of a split matrix W: in training i is drawn
          anew for each step, adapter and split matrix; in evaluation W_0 + mean_i M_i * (W - W_0), or the sum
Shapes:   as AdaptFormer; M_1, ..., M_n of the shape of W, of zeros and ones, which sum up to one everywhere
Init:     W_0 as in AdaptFormer; M_i: the i-th of n equal shares of all entries in random order
Merge:    not possible: f is not linear
Deviates: the authors keep n copies of W and mask their gradients, so that copy i differs from W_0 in M_i alone; W and
          W_0 hold the same. Adam's moments and weight decay of entries that rest go on, where theirs wait, and they
          draw i in each forward. They add copies up (``merge="sum"``), though in training one acts alone: on the digits
          of the demo, what is right in 79 % of cases in training is so in 27 % with the sum, in 79 % with the mean.
          Left out: the loss that compares the outputs of two draws, and masks of whole rows or columns.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lightning_peft.adapters.bottleneck import Bottleneck, Stash
from lightning_peft.engine import Adapter, Kind, Layer, Target, Training, check_range, register
from lightning_peft.engine.limits import Count
from lightning_peft.methods.features.adaptformer import AdaptFormer


class SplitBottleneck(Bottleneck):
    """A bottleneck of whose matrices a share acts as trained, and the rest as it was at the start."""

    choice: Tensor
    down_start: Tensor

    def split(self, n: int, names: tuple[str, ...], weight: float) -> "SplitBottleneck":
        """Split the matrices of these names into ``n`` shares, which count by ``weight`` when they act together."""
        self.n, self.names, self.weight = n, names, weight
        for name in names:
            matrix = getattr(self, name).detach()
            self.register_buffer(f"{name}_share", torch.zeros_like(matrix, dtype=torch.uint8))
        if "down" in names:  # the other one starts at zero
            self.register_buffer("down_start", torch.zeros_like(self.down.detach()))
        # which share of each matrix acts in training; all of it until a step has drawn one
        self.register_buffer("choice", self.up.detach().new_full((2,), -1, dtype=torch.int64), persistent=False)
        return self

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The matrices, and who is in which share."""
        super().reset_parameters(layer, generator)
        for name in self.names:
            matrix, share = getattr(self, name), getattr(self, f"{name}_share")
            order = torch.randperm(matrix.numel(), generator=generator)
            share.copy_((order * self.n // matrix.numel()).view_as(share))
        if "down" in self.names:
            self.down_start.copy_(self.down)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """D and U: in training the drawn share of them, and the rest as at the start."""
        return self._acting("down", self.choice[0]), self._acting("up", self.choice[1])

    def _acting(self, name: str, choice: Tensor) -> Tensor:
        matrix = getattr(self, name)
        if name not in self.names:
            return matrix
        start: Any = self.down_start if name == "down" else 0
        whole = matrix if self.weight == 1 else start + self.weight * (matrix - start)
        if not self.training:
            return whole
        drawn = torch.where(getattr(self, f"{name}_share") == choice, matrix, start)
        return torch.where(choice < 0, whole, drawn)


@register("mosa")
@dataclass(frozen=True, kw_only=True)
class MoSA(AdaptFormer):
    """AdaptFormer that trains as a mixture of sparse adapters, and is one dense adapter in evaluation.

    Args:
        n: number of shares.
        share: which matrix is common to all shares and not split: ``"down"`` (only U is split) as in the authors' runs,
            ``"up"``, or ``"none"``.
        merge: how the shares act together in evaluation: their ``"mean"``, or the ``"sum"`` as in the authors' code.
        r: see `ParallelAdapter`; so for the arguments that follow it, and for errors.
        seed: of the draws.

    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> block = lambda: nn.ModuleDict({"up": nn.Linear(2, 3), "down": nn.Linear(3, 2)})
    >>> model = inject(nn.ModuleList([block(), block()]), MoSA(r=2, n=2, share="none"))
    >>> a = model[0]["down"].adapters["default"]
    >>> a.up_share.copy_(torch.tensor([[0, 1], [1, 0]])), a.up.data.fill_(3.0), a.choice.fill_(1)
    (tensor(...), tensor(...), tensor([1, 1]))
    >>> a.train().matrices()[1].tolist(), a.eval().matrices()[1].tolist()
    ([[0.0, 3.0], [3.0, 0.0]], [[1.5, 1.5], [1.5, 1.5]])
    """

    paper: ClassVar[str] = "arXiv:2312.02923"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {k: SplitBottleneck for k in ("linear", "conv", "module")}

    n: Count = 4
    share: Literal["down", "up", "none"] = "down"
    merge: Literal["mean", "sum"] = "mean"
    r: Count = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("MoSA", "n", self.n, 2 <= self.n <= 255, "an integer from 2 to 255")

    def bottleneck(self, target: Target, stash: Stash | None) -> Bottleneck:
        """One whose matrices are split."""
        whole: Any = super().bottleneck(target, stash)
        weight = 1 if self.merge == "sum" else 1 / self.n
        return whole.split(self.n, tuple(name for name in ("down", "up") if name != self.share), weight)

    def on_train_batch_start(self, training: Training) -> None:
        """Draw the shares of this step."""
        adapters = [adapter for _, _, adapter in training.adapters() if isinstance(adapter, SplitBottleneck)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + training.step)
        choices = torch.randint(self.n, (len(adapters), 2), generator=generator)
        for adapter, choice in zip(adapters, choices, strict=True):
            adapter.choice.copy_(choice)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With one matrix split, and with both."""
        return cls(r=2, n=2, dropout=0.0), cls(r=3, n=3, share="none", merge="sum", dropout=0.0)
