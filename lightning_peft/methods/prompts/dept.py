"""DePT: a short prompt, and a low-rank change of the embedded text by position.

Paper:    Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", 2023, arXiv:2309.05173.
Formula:  y = model([table; E(ids) + (A B)[:n]]) for n tokens
Shapes:   table (m, D), A (s_max, r), B (r, D) for embeddings D wide
Init:     table ~ U(-0.5, 0.5), A ~ kaiming_uniform(a=sqrt 5), B = 0: the text starts as it is
Merge:    none: the prompt is tokens, and the change depends on the position
Deviates from the paper: positions count the tokens of a sample, so a row that is padded on the left is changed as the
          same sample alone. The authors' code multiplies A B by 8 / sqrt(r), of which the paper does not speak.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.prefix import uniform
from lightning_peft.adapters.prompts import Prompt, PromptMethod
from lightning_peft.engine import Adapter, AdapterError, Target, register
from lightning_peft.engine.limits import Count, Positive


class Decomposed(Prompt):
    """Vectors, and a change of the text."""

    def __init__(self, target: Target, method: "DePT") -> None:
        super().__init__(target, method.num_virtual_tokens)
        self.A = target.new_parameter(method.max_length, method.r)
        self.B = target.new_parameter(method.r, target.d_out)

    def reset(self, generator: torch.Generator, embedding: nn.Embedding | None) -> None:
        """table ~ U(-0.5, 0.5), A ~ U(-1/sqrt(r), 1/sqrt(r)), B = 0."""
        uniform(self.table, 0.5, generator)
        uniform(self.A, self.A.shape[1] ** -0.5, generator)
        self.B.zero_()

    def shift(self, x: Tensor, positions: Tensor, length: int) -> Tensor:
        """x + (A B)[positions]."""
        if length > len(self.A):
            raise AdapterError(
                f"DePT: the text has {length} tokens, but max_length={len(self.A)} of them can be changed. Raise "
                "max_length, or cut the text."
            )
        return x + (self.A[positions] @ self.B).to(x.dtype)


@register("dept")
@dataclass(frozen=True, kw_only=True)
class DePT(PromptMethod):
    """A short prompt, and a low-rank change of the embedded text by position.

    Args:
        num_virtual_tokens: m, tokens of the prompt.
        r: rank of the change. As many numbers as a prompt of p tokens has: m D + r (s_max + D) = p D.
        max_length: s_max, tokens of the longest text.
        low_rank_learning_rate_ratio: learning rate of A and B over that of the prompt (0.3 and 5e-4 to 5e-3 in the
            paper).
        module: path of the part that embeds the text, where a model has several.
        blocks: path of the list of blocks, in a model that embeds no text.
        class_tokens: tokens that stay before the prompt. By default the first one, where a text is looked at both ways
            and heads read their answer there; none elsewhere.

    Raises:
        AdapterError: a text is longer than ``max_length``.
        TargetError: m is not below the positions of the model, or its blocks take no further tokens.

    >>> from lightning_peft.methods.prompts.dept import DePT
    >>> DePT().num_prompt(768) == 100 * 768
    True
    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    >>> model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(1, 3, 4)
    >>> table, A, B = torch.randn(2, 4), torch.randn(5, 1), torch.randn(1, 4)
    >>> longer = model(torch.cat([table[None], x + (A @ B)[:3]], dim=1))
    >>> model = inject(model, DePT(num_virtual_tokens=2, r=1, max_length=5))
    >>> prompt = model.layers[0].adapters["default"].prompt
    >>> prompt.table.data, prompt.A.data, prompt.B.data = table, A, B
    >>> torch.allclose(model(x), longer[:, 2:], atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2309.05173"

    num_virtual_tokens: Count = 40
    r: Count = 45
    max_length: Count = 256
    low_rank_learning_rate_ratio: Positive = 0.01

    def prompt(self, target: Target) -> Prompt:
        """Vectors, and a change of the text."""
        return Decomposed(target, self)

    def num_prompt(self, width: int) -> int:
        """m D + r (s_max + D)."""
        return self.num_virtual_tokens * width + self.r * (self.max_length + width)

    def learning_rate_ratio(self, adapter: Adapter, parameter: str) -> float:
        """That of A and B."""
        return self.low_rank_learning_rate_ratio if parameter in ("prompt.A", "prompt.B") else 1.0

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Longer than the text, and of rank 1."""
        first = cls(num_virtual_tokens=3, r=2, max_length=24, low_rank_learning_rate_ratio=0.1)
        return first, replace(first, r=1, class_tokens=1)
