"""QLoRA: LoRA on a base that is kept in 4 bits.

Paper:    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv:2305.14314.
Formula:  y = Q x + b + scaling * B (A dropout(x)),  Q = level[code] * absmax of the block: W in NF4
Shapes:   as LoRA; Q (d_out, d_in) in 4 + 32 / block_size bits a weight, or 4 + 8 / block_size + 1 / (8 * block_size)
          with double quantisation: 4.5, or 4.127
Init:     as LoRA; y starts as the output of the quantised base, which is not that of the base
Merge:    W <- Q + scaling * B A, in the precision that W had
Deviates from the authors' code: the second quantisation takes no mean off and has uniform levels. Dropout is off, as in
          their code; the paper has 0.1, or 0.05 for large models. Their paged optimizer is left to the user.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, AdapterError, Kind, Target, check_range, register
from lightning_peft.engine.limits import Count
from lightning_peft.methods.lora.lora import LoRA
from lightning_peft.parts.nf4 import NF4Tensor


@register("qlora")
@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA on weights that are kept in 4 bits, and unpacked for each use of them.

    The layers of ``target_modules`` are quantised; embeddings, norms, biases, the head and ``modules_to_save`` are not.
    Parameters are replaced, so make an optimizer after injection. ``unload`` leaves the weights in 4 bits: they cannot
    be had back. Any other method may be injected into the model afterwards; it then sees the quantised weights.

    Args:
        block_size: weights that share a scale; a power of two.
        double_quant: keep the scales in 8 bits.
        r: rank of the update.
        alpha: numerator of ``scaling``.
        dropout: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``block_size`` or an argument of `LoRA` is out of range, or a weight has no values yet, has NaN or
            infinite ones, or is in 4 bits already with other blocks.
        TargetError: see `LoRA`; or a weight is tied to another.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> base[0].weight.data = Tensor([[1.0, -1.0, 0.3, 0.0], [0.9, 0.4, -0.7, -0.2]])
    >>> lora = inject(base, QLoRA(r=2, alpha=8.0))[0].adapters["default"]
    >>> levels = Tensor([[1.0, -1.0, 0.3379, 0.0], [1.0, 0.4407, -0.6962, -0.1848]])
    >>> allclose(base[0].weight, levels, atol=1e-4)
    True
    >>> _ = nn.init.ones_(lora.lora_B)
    >>> allclose(base(ones(1, 4)), ones(1, 4) @ (levels + (8 / 2) * lora.lora_B @ lora.lora_A).T, atol=1e-3)
    True
    """

    paper: ClassVar[str] = "arXiv:2305.14314"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": LowRank, "conv": LowRankConv}
    identity_at_init: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True

    r: Count = 64
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.block_size
        power = isinstance(size, int) and size >= 2 and size & (size - 1) == 0
        check_range(type(self).__name__, "block_size", size, power, "a power of two >= 2")

    def stored(self, weight: Tensor, target: Target) -> Tensor:
        """``weight`` in NF4."""
        who, name = type(self).__name__, target.name
        if isinstance(weight, NF4Tensor):
            there = (weight.block_size, weight.scale is not None)
            if there != (self.block_size, self.double_quant):
                raise AdapterError(
                    f"{who}: {name!r} is in 4 bits already, with block_size={there[0]} and double_quant={there[1]}. "
                    "Ask for the same, or use LoRA."
                )
            return weight
        if weight.is_meta:
            raise AdapterError(f"{who}: {name!r} has no values to quantise yet (meta device). Load the base first.")
        try:
            return NF4Tensor.pack(weight, self.block_size, self.double_quant)
        except ValueError:
            raise AdapterError(f"{who}: {name!r} has NaN or infinite values. Load the base again.") from None

    @classmethod
    def examples(cls) -> "tuple[Self, ...]":
        """As in the paper, and with small blocks."""
        return cls(r=2), cls(r=3, alpha=1.0, block_size=16, double_quant=False, modules_to_save="head")
