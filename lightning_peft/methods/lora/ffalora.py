"""FFA-LoRA: freeze the random factor of a low-rank product, so that averages over clients are exact.

Paper:    Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", 2024, arXiv:2403.12313.
Formula:  as LoRA, of which only lora_B trains; with one A for all clients k,  sum p_k (B_k A) = (sum p_k B_k) A
Shapes:   as LoRA
Init:     as LoRA; A depends on the seed of the adapter and the name of its layer alone, so all clients draw the same
Merge:    as LoRA
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.methods.lora.lora import LoRA


@register("ffalora")
@dataclass(frozen=True, kw_only=True)
class FFALoRA(LoRA):
    """LoRA whose ``lora_A`` stays as it was drawn; takes the same arguments.

    The change of a weight is linear in what trains: noise for privacy is not multiplied, and half is communicated.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> x, y = ones(1, 3), base(ones(1, 3))
    >>> adapter = inject(base, FFALoRA(r=2, alpha=8.0))[0].adapters["default"]
    >>> [name for name, _ in adapter.named_parameters()]
    ['lora_B']
    >>> _ = nn.init.ones_(adapter.lora_B)
    >>> allclose(base(x), y + (8 / 2) * (x @ adapter.lora_A.T).sum())
    True
    """

    paper: ClassVar[str] = "arXiv:2403.12313"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": LowRank, "conv": LowRankConv}

    def adapter(self, target: Target) -> Adapter:
        """A low-rank product with a fixed ``lora_A``."""
        adapter: Any = super().adapter(target)
        adapter.fix("lora_A")
        return adapter

    def num_trainable(self, target: Target) -> int:
        """r * d_out."""
        return self.rank(target) * target.d_out
