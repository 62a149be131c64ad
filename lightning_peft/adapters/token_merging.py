"""Token merging between the attention and the feed-forward net of a block, whose source tokens are modulated first."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_peft.adapters.small_nets import Norm
from lightning_peft.engine import Adapter, AdapterError, Layer, Target
from lightning_peft.parts.attention import Products, seen_by


@dataclass(frozen=True)
class Merged(Target):
    """A module that merging needs.

    Args:
        role: the block where tokens are merged, or one of its parts: attention, its keys, the feed-forward net.
        block: which block, counted from 0.
        r: how many tokens are merged there.
        tokens: how many there are before.
        prefix: how many of them, the first ones, are never merged.
        heads: of the attention.
        last: whether it is the last block, behind which every token gets what its group has.
    """

    role: Literal["block", "attention", "keys", "mlp"] = "block"
    block: int = 0
    r: int = 0
    tokens: int = 0
    prefix: int = 0
    heads: int = 1
    last: bool = False


class Merging:
    """What the adapters of one injection hand to each other within one forward; a copy of it is empty."""

    def __init__(self) -> None:
        self.skipped = ""  # the branch that is not called now
        self.keys: Tensor | None = None
        self.size: Tensor | None = None  # of each token that the attention looks at; None while all are single
        self.state: tuple[Tensor, Tensor] | None = None  # size of each token; which one holds each of the first
        self.before = WeakTensorKeyDictionary()  # by the input of a block: its state, for checkpoints that run it again

    def __reduce__(self) -> tuple[Any, ...]:
        return Merging, ()


class Proportional(Products):
    """Lets a token that stands for n of them count n times: log n is added to the scores of its key.

    Args:
        size: (B, N, 1).
    """

    def __init__(self, size: Tensor) -> None:
        super().__init__()
        self.size = size

    def product(self, given: dict[str, Any]) -> Tensor:
        """The product with those scores; keys that came in front of the tokens are single."""
        query, mask = given["query"], given.get("attn_mask")
        more = self.size.log().to(query.dtype).transpose(1, 2)[:, None]  # (B, 1, 1, N)
        more = F.pad(more, (given["key"].shape[-2] - more.shape[-1], 0))
        if mask is not None:
            more = more.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else more + mask
        return F.scaled_dot_product_attention(**given | {"attn_mask": more})


class Branch(Adapter):
    """Lets one branch of a block be left out; tells its attention how large tokens are, and keeps its keys."""

    def __init__(self, target: Merged, merging: Merging, who: str) -> None:
        super().__init__()
        self.merging, self.who, self.role, self.heads = merging, who, target.role, target.heads
        self.fused = target.name.endswith("qkv")

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the branch answers; zeros while it is left out."""
        if self.role == "keys":
            y = layer(x)
            k = y.chunk(3, dim=-1)[1] if self.fused else y
            self.merging.keys = k.detach().unflatten(-1, (self.heads, -1)).mean(-2)
            return y
        if self.merging.skipped == self.role:
            return torch.zeros_like(x)
        if self.role == "mlp" or self.merging.size is None:
            return layer(x)
        return seen_by(Proportional(self.merging.size), layer.module, lambda: layer(x), self.who)


class Merge(Adapter):
    """Runs a block in two halves, and merges tokens between them."""

    def __init__(self, target: Merged, merging: Merging, who: str) -> None:
        super().__init__()
        self.merging, self.who, self.name = merging, who, target.name
        self.block, self.r, self.tokens, self.prefix = target.block, target.r, target.tokens, target.prefix
        self.last = target.last
        if self.r:
            self.weight_r, self.weight_D = target.new_parameter(self.r), target.new_parameter(target.d_out)
            self.norm = Norm(target, target.d_out)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """W_r ~ U(-1, 1); W_D = 0; the norm as ever."""
        if self.r:
            self.weight_r.copy_(2 * torch.rand(self.r, dtype=self.weight_r.dtype, generator=generator) - 1)
            self.weight_D.zero_()
            self.norm.fill(generator)

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the block answers, with fewer tokens; behind the last, with all of them again."""
        merging = self.merging
        if x.dim() != 3 or x.shape[1] != self.tokens:
            raise AdapterError(
                f"{self.who}: {self.name!r} was given {tuple(x.shape)}; expected {self.tokens} tokens. Say how "
                "many patches there are (num_patches=), and how many tokens before them (num_prefix_tokens=)."
            )
        for name, value in layer.arguments().items():
            if isinstance(value, Tensor):
                raise AdapterError(
                    f"{self.who}: {self.name!r} is given {name!r} beside its tokens, which would not fit fewer of "
                    "them. Choose a model whose blocks take tokens alone."
                )
        size, origin = self.begin(x)
        merging.size = None if x.shape[1] == origin.shape[1] else size
        if not self.r:
            y = layer(x)
        else:
            h = self.without("mlp", x, layer)
            if merging.keys is None:
                raise AdapterError(
                    f"{self.who}: the attention of {self.name!r} did not call its projection of keys. Choose a model "
                    "whose attention does."
                )
            keys, merging.keys = merging.keys, None
            h, size, origin = self.merge(h, keys, size, origin)
            y = self.without("attention", h, layer)
        merging.keys, merging.size, merging.state = None, None, None if self.last else (size, origin)
        return y.gather(1, origin[..., None].expand(-1, -1, y.shape[-1])) if self.last else y

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes (B, N, 1) and origins (B, N_0) of the tokens that the block is given."""
        merging, compiling = self.merging, torch.compiler.is_compiling()
        if self.block == 0:
            ones = x.new_ones(len(x), self.tokens, 1)
            return ones, torch.arange(self.tokens, device=x.device).expand(len(x), -1)
        state = None if compiling else merging.before.get(x)
        state = merging.state if state is None else state
        if state is None:
            raise AdapterError(
                f"{self.who}: the blocks before {self.name!r} were not called in their order. Let activation "
                "checkpoints be of the kind use_reentrant=False."
            )
        if not compiling:
            merging.before[x] = state
        return state

    def without(self, branch: str, x: Tensor, layer: Layer) -> Tensor:
        """The block without one of its branches."""
        self.merging.skipped = branch
        try:
            y = layer(x)
        finally:
            self.merging.skipped = ""
        if y.shape != x.shape:
            raise AdapterError(
                f"{self.who}: {self.name!r} made {tuple(y.shape)} of {tuple(x.shape)} by another adapter on it. Let "
                "one that changes the number of tokens act at a time (set_active)."
            )
        return y

    def merge(self, x: Tensor, keys: Tensor, size: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r tokens of the even ones go to the odd ones whose keys are nearest; x, size and origin thereafter."""
        with torch.no_grad():
            keys = F.normalize(keys, dim=-1)
            scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
            scores[:, : (self.prefix + 1) // 2] = -torch.inf
            scores[:, :, : self.prefix // 2] = -torch.inf
            nearness, to = scores.max(-1)
            order = nearness.argsort(dim=-1, descending=True, stable=True)
            merged, stay = order[:, : self.r], order[:, self.r :].sort(-1).values
            to = to.gather(1, merged)
        n = stay.shape[1]

        def pick(t: Tensor, index: Tensor) -> Tensor:
            return t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))

        weighted = x * size.to(x.dtype)
        even, odd = weighted[:, ::2], weighted[:, 1::2]
        source = self.modulated(pick(even, merged), pick(odd, to))
        into = to[..., None].expand(-1, -1, x.shape[-1])
        odd = odd.scatter_add(1, into, source.to(odd.dtype))
        sizes = size[:, 1::2].scatter_add(1, to[..., None], pick(size[:, ::2], merged))
        size = torch.cat([pick(size[:, ::2], stay), sizes], dim=1)
        x = torch.cat([pick(even, stay), odd], dim=1) / size.to(x.dtype)
        # where each of the tokens before is now
        now = torch.empty(len(x), self.tokens, dtype=torch.long, device=x.device)
        now[:, 1::2] = n + torch.arange(sizes.shape[1], device=x.device)
        now = now.scatter(1, 2 * stay, torch.arange(n, device=x.device).expand_as(stay)).scatter(1, 2 * merged, n + to)
        if self.prefix > 1:  # those before the patches go to the front again, where the next block looks for them
            front = [i // 2 + i % 2 * n for i in range(self.prefix)]
            rest = [i for i in range(x.shape[1]) if i not in front]
            order = torch.tensor(front + rest, device=x.device)
            x, size, now = x[:, order], size[:, order], order.argsort()[now]
        return x, size, now.gather(1, origin)

    def modulated(self, source: Tensor, partner: Tensor) -> Tensor:
        """source + (source * w_1) * w_2."""
        q = self.norm(source + partner)
        w1 = 2 * (self.weight_r.to(q.dtype) @ q).sigmoid()[:, None]
        w2 = 2 * (q @ self.weight_D.to(q.dtype)).sigmoid()[..., None] - 1
        return source + (source * w1) * w2
