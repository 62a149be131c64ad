"""Prompt tuning: trained vectors in front of the embedded text, and nothing else.

Paper:    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv:2104.08691.
Formula:  y = model([table; E(ids)]), and the answers at the places of the prompt are cut off
Shapes:   table (p, D) for embeddings D wide
Init:     table ~ U(-0.5, 0.5), or rows of the embedding: sampled ones, or those of given ids
Merge:    none: tokens are no weights
Deviates from the paper: where a text is looked at both ways and its first token is the one that heads read (BERT), the
          prompt comes behind it; models without a text get it before their first block. Positions are those of each
          sample, so padding does not count; but where rows are padded on the left, it does stand between prompt and
          text for attentions that look back over a window of fixed length, or weigh by distance in the row (T5).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import nn

from lightning_peft.adapters.prefix import uniform
from lightning_peft.adapters.prompts import Prompt, PromptMethod
from lightning_peft.engine import Target, TargetError, register
from lightning_peft.engine.limits import check_range
from lightning_peft.parts.tokens import embedding_of


class Vectors(Prompt):
    """Bare vectors."""

    def __init__(self, target: Target, method: "PromptTuning") -> None:
        super().__init__(target, method.num_virtual_tokens)
        self.method = method

    def reset(self, generator: torch.Generator, embedding: nn.Embedding | None) -> None:
        """As ``init`` says."""
        if embedding is None or not self.method.starts_at_ids:
            uniform(self.table, 0.5, generator)
            return
        given = self.method.init_token_ids
        ids = torch.tensor(given) if given else torch.randint(embedding.num_embeddings, (self.p,), generator=generator)
        ids = ids.repeat(-(-self.p // len(ids)))[: self.p]  # tiled, and cropped
        self.table.copy_(embedding(ids.to(self.table.device)))


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
        class_tokens: tokens that stay before the prompt. By default the first one, where a text is looked at both ways
            and heads read their answer there; none elsewhere.

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
        super().__post_init__()
        ok = all(isinstance(i, int) and i >= 0 for i in self.init_token_ids)
        check_range(type(self).__name__, "init_token_ids", self.init_token_ids, ok, "integers >= 0")

    @property
    def starts_at_ids(self) -> bool:
        """Whether the prompt starts at embedded ids."""
        return self.init == "vocabulary" or bool(self.init_token_ids)

    def targets(self, model: nn.Module) -> list[Target]:
        """The part that embeds the text, or the blocks."""
        found = super().targets(model)
        embedding = embedding_of(found[0].module)
        if self.starts_at_ids and embedding is None:
            raise TargetError(f"PromptTuning: {found[0].name!r} embeds no ids to start at. Use init='random'.")
        if embedding is not None and max(self.init_token_ids, default=0) >= embedding.num_embeddings:
            raise TargetError(
                f"PromptTuning: init_token_ids has {max(self.init_token_ids)}, but the model has "
                f"{embedding.num_embeddings} ids. Take those of its own tokenizer."
            )
        return found

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
