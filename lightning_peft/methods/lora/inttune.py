"""IntTune (IntermediateTune): of the three factors of NLoRA, train the one in the middle.

Paper:    Guo et al., "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", 2025, arXiv:2502.14482.
Formula:  y = W x + b + s B (N - N_0) A dropout(x), of which N alone trains
Shapes:   A (r, d_in), N and N_0 (r, r), B (d_out, r)
Init:     as NLoRA; y starts as the base
Merge:    W <- W + s B (N - N_0) A
Deviates from the authors' code: as NLoRA.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_peft.adapters.core import CoreConv, StartedCore
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.methods.lora.nlora import NLoRA


class CoreAlone(StartedCore):
    """A product whose outer factors are buffers."""

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.fix("lora_A")
        self.fix("lora_B")

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and scaling * B (N - N_0)."""
        return self.lora_A, self.scaling * self.lora_B @ (self.lora_N - self.start_N)


class CoreAloneConv(CoreAlone, CoreConv):
    """The same for convolutions."""


@register("inttune")
@dataclass(frozen=True, kw_only=True)
class IntTune(NLoRA):
    """NLoRA with frozen outer factors; takes the same arguments. Trainable numbers per layer: r * r.

    >>> import torch
    >>> from torch import nn, allclose
    >>> from lightning_peft import inject
    >>> W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> base[0].weight.data = W
    >>> adapter = inject(base, IntTune(r=1))[0].adapters["default"]
    >>> [name for name, _ in adapter.named_parameters()]
    ['lora_N']
    >>> _ = nn.init.constant_(adapter.lora_N, 3.0)
    >>> x = torch.eye(3)
    >>> allclose(base(x), x @ (W + (3 - 1) * W[:, :1] @ W[:1]).T + base[0].bias)
    True
    """

    paper: ClassVar[str] = "arXiv:2502.14482"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": CoreAlone, "conv": CoreAloneConv}

    def num_trainable(self, target: Target) -> int:
        """r * r."""
        return self.rank(target) ** 2
