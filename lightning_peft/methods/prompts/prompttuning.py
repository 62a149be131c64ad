"""Prompt tuning: trained vectors in front of the embedded text, and nothing else.

Paper:    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv:2104.08691.
Formula:  y = model([table; E(ids)]), and the answers at the places of the prompt are cut off
Shapes:   table (p, D) for embeddings D wide
Init:     table ~ U(-0.5, 0.5), or rows of the embedding: sampled ones, or those of given ids
Merge:    none: tokens are no weights
Deviates from the paper: where a text is looked at both ways and its first token is the one that heads read (BERT), the
          prompt comes behind it; models without a text get it before their first block.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from lightning_peft.adapters.prefix import uniform
from lightning_peft.adapters.prompts import Embed, Prompt, PromptMethod
from lightning_peft.engine import AdapterError, Target, register
from lightning_peft.engine.limits import check_range


class Vectors(Prompt):
    """Bare vectors."""

    def __init__(self, target: Target, method: "PromptTuning") -> None:
        super().__init__(target, method.num_virtual_tokens)
        self.method = method

    def reset(self, generator: torch.Generator, embed: Embed | None, vocabulary: int) -> None:
        """As ``init`` says."""
        if self.method.init == "random" and not self.method.init_token_ids:
            uniform(self.table, 0.5, generator)
            return
        if embed is None:
            raise AdapterError("the model embeds no ids that a prompt could start at. Use init='random'.")
        given = self.method.init_token_ids
        ids = torch.tensor(given) if given else torch.randint(vocabulary, (self.p,), generator=generator)
        if int(ids.max()) >= vocabulary:
            raise AdapterError(
                f"init_token_ids has {int(ids.max())}, but there are {vocabulary} ids. Give smaller ones."
            )
        ids = ids.repeat(-(-self.p // len(ids)))[: self.p]  # tiled, and cropped
        self.table.copy_(embed(ids.to(self.table.device)))


@register("prompttuning")
@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """Trained vectors in front of the embedded text.

    Args:
        num_virtual_tokens: p, how many.
        init: ``"random"``, or ``"vocabulary"`` for sampled rows of the embedding.
        init_token_ids: ids whose embeddings the prompt starts at, as a tokenizer made them of a text; repeated or cut
            to p of them.
        module: path of the part that embeds the text, where a model has several.
        blocks: path of the list of blocks, in a model that embeds no text.
        class_tokens: tokens that stay before the prompt; see `PromptMethod`.

    Raises:
        AdapterError: a call brings more tokens than the model has positions for, less p.
        TargetError: p is not below the positions of the model, or its blocks take no further tokens.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    >>> model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(1, 3, 4)
    >>> table = torch.randn(2, 4)
    >>> longer = model(torch.cat([table[None], x], dim=1))
    >>> model = inject(model, PromptTuning(num_virtual_tokens=2))
    >>> model.layers[0].adapters["default"].prompt.table.data = table
    >>> torch.allclose(model(x), longer[:, 2:], atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2104.08691"

    init: Literal["random", "vocabulary"] = "random"
    init_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_token_ids", tuple(self.init_token_ids))
        ok = all(isinstance(i, int) and i >= 0 for i in self.init_token_ids)
        check_range(type(self).__name__, "init_token_ids", self.init_token_ids, ok, "integers >= 0")
        super().__post_init__()

    def prompt(self, target: Target) -> Prompt:
        """Bare vectors."""
        return Vectors(target, self)

    def num_prompt(self, width: int) -> int:
        """p D."""
        return self.num_virtual_tokens * width

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In front, and behind the class token."""
        return cls(num_virtual_tokens=3), cls(num_virtual_tokens=2, class_tokens=1)
