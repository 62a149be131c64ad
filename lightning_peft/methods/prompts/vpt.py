"""VPT: trained tokens behind the class token of a vision transformer, before its first block or before each.

Paper:    Jia et al., "Visual Prompt Tuning", 2022, arXiv:2203.12119.
Formula:  deep:    [c_i, _, x_i] = block_i([c_{i-1}, P_i, x_{i-1}]) for every block i
          shallow: [c_1, z_1, x_1] = block_1([c_0, P, x_0]), and [c_i, z_i, x_i] = block_i([c_{i-1}, z_{i-1}, x_{i-1}])
Shapes:   P, P_i (p, D) for tokens D wide
Init:     U(-v, v), v = sqrt(6 / (3 P^2 + D)) for patches of P x P pixels
Merge:    none: tokens are no weights
Deviates from the paper: on Swin each window sees the prompt as keys and values; what the reference makes of the prompt
          as queries there is thrown away by the next block. Shallow is not known on Swin.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn

from lightning_peft.adapters.prefix import uniform
from lightning_peft.adapters.prompts import BlockTokens, Prompt, Tokens, tokens_adapter
from lightning_peft.engine import Adapter, Kind, MethodWithHead, Target, register
from lightning_peft.engine.limits import Count, Patterns, Probability, WholeNumber
from lightning_peft.parts.tokens import TokenTarget, stack_targets


class VisualPrompt(Prompt):
    """Vectors as wide as the tokens of a block."""

    def __init__(self, target: TokenTarget, p: int) -> None:
        super().__init__(target, p)
        self.bound = (6 / (3 * target.patch + target.d_out)) ** 0.5

    def reset(self, generator: torch.Generator, embedding: nn.Embedding | None) -> None:
        """U(-v, v)."""
        uniform(self.table, self.bound, generator)


@register("vpt")
@dataclass(frozen=True, kw_only=True)
class VPT(MethodWithHead):
    """Trained tokens beside those of the patches.

    Args:
        num_virtual_tokens: p, of each prompt.
        deep: every block has a prompt of its own; else the first one's is carried on.
        dropout: probability of dropping a number of the prompt, in training only; for each sample by itself, on Swin
            for all windows of a batch alike.
        blocks: path of the list of blocks; found by itself if there is one.
        class_tokens: tokens that stay before the prompt; by default as many as the model has of its own (class,
            distillation, register).
        modules_to_save: modules trained whole; a head that is new to the model belongs here (``"output-head"``).

    Raises:
        TargetError: the blocks take no further tokens: convolutions, or a number of tokens that is fixed.
        AdapterError: a block was given something else than tokens.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    >>> model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(1, 3, 4)
    >>> P_1, P_2 = torch.randn(2, 4), torch.randn(2, 4)
    >>> y = model.layers[0](torch.cat([P_1[None], x], dim=1))[:, 2:]
    >>> y = model.layers[1](torch.cat([P_2[None], y], dim=1))[:, 2:]
    >>> model = inject(model, VPT(num_virtual_tokens=2))
    >>> for block, P in zip(model.layers, (P_1, P_2)):
    ...     block.adapters["default"].prompt.table.data = P
    >>> torch.allclose(model(x), y, atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2203.12119"
    modalities: ClassVar = ("vision",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Tokens}
    acts_on: ClassVar = "blocks"
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    num_virtual_tokens: Count = 5
    deep: bool = True
    dropout: Probability = 0.0
    blocks: Patterns | None = None
    class_tokens: WholeNumber | None = None

    def targets(self, model: nn.Module) -> list[Target]:
        """The blocks."""
        who = type(self).__name__
        return stack_targets(model, who, deep=self.deep, blocks=self.blocks, class_tokens=self.class_tokens)  # type: ignore[return-value]

    def adapter(self, target: Target) -> Adapter:
        """The tokens, or what carries them on."""
        p = self.num_virtual_tokens
        adapter = tokens_adapter(target, lambda t: VisualPrompt(t, p), p, type(self).__name__)  # type: ignore[arg-type]
        if isinstance(adapter, BlockTokens):
            adapter.dropping = self.dropout
        return adapter

    def num_trainable(self, target: Target) -> int:
        """p D, where a prompt comes in."""
        return self.num_virtual_tokens * target.d_out if isinstance(target, TokenTarget) and target.inserts else 0

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Deep, and shallow."""
        return cls(num_virtual_tokens=3), cls(num_virtual_tokens=2, deep=False)
