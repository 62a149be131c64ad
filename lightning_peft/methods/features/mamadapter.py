"""MAM adapter: a prefix in every attention, and a bottleneck beside every feed-forward network ("mix and match").

Paper:    He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, arXiv:2110.04366.
Formula:  head(q) = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]  in attentions,
          y = FFN(x) + s (U f(D x + c) + e)  in feed-forward networks
Shapes:   P_k, P_v (p, n_kv_heads * d); D (r, D_model), c (r,), U (D_model, r), e (D_model,)
Init:     P_k, P_v ~ N(0, 0.02^2), D ~ U(-1/sqrt(D_model), 1/sqrt(D_model)), U = 0, c = e = 0. The prefix takes its
          share of each softmax, so the output at the start differs from the base
Merge:    none: keys and values are no weights, and f is not linear
Deviates from the paper: prefixes are trained directly, ``reparameterize=512`` makes them by a small network as there.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.bottleneck import Bottleneck
from lightning_peft.adapters.prefix import Prefix, num_prefix, num_trunk, prefixes
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count, NonNegative, Patterns
from lightning_peft.methods.features.paralleladapter import ParallelAdapter
from lightning_peft.parts.attention import attention_targets, widths_of


@register("mamadapter")
@dataclass(frozen=True, kw_only=True)
class MAMAdapter(ParallelAdapter):
    """A prefix in the attentions and a parallel adapter beside the feed-forward networks.

    Args:
        num_virtual_tokens: p, keys and values that each attention gets.
        reparameterize: inner features of the small network that makes the prefixes; None trains them directly.
        init_std: standard deviation of the prefixes at the start, where they are trained directly.
        attentions: patterns of attentions; by default all but those that look at another sequence.
        r: width of the bottleneck; the paper takes 512.
        target_modules: see `ParallelAdapter`; so for the arguments that follow it, and for errors.

    Raises:
        TargetError: there is no attention whose keys and values can be reached; see `PrefixTuning`.

    >>> import torch
    >>> from lightning_peft import inject
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attn = nn.MultiheadAttention(2, 1, bias=False, batch_first=True)
    ...         self.up, self.down = nn.Linear(2, 3), nn.Linear(3, 2)
    ...     def forward(self, x):
    ...         return self.down(self.up(self.attn(x, x, x)[0]))
    >>> model = nn.Sequential(Block(), Block())
    >>> for weight in (model[0].attn.in_proj_weight, model[0].attn.out_proj.weight):
    ...     weight.data = torch.eye(2).repeat(len(weight) // 2, 1)
    >>> model = inject(model, MAMAdapter(num_virtual_tokens=1, r=1))
    >>> prefix, branch = model[0].attn.adapters["default"], model[0].down.adapters["default"]
    >>> prefix.keys.data, prefix.values.data = torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 7.0]])
    >>> branch.down.data, branch.up.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0]])
    >>> h = torch.softmax(torch.tensor([0.0, 1.0]) / 2**0.5, dim=0) @ torch.tensor([[5.0, 7.0], [1.0, 0.0]])
    >>> plain = nn.functional.linear(model[0].up(h), model[0].down.weight, model[0].down.bias)
    >>> y = plain + 4 * h.sum().relu() * torch.tensor([1.0, 2.0])
    >>> torch.allclose(model[0](torch.tensor([[[1.0, 0.0]]]))[0, 0], y)
    True
    """

    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Bottleneck, "conv": Bottleneck, "module": Prefix}
    identity_at_init: ClassVar[bool] = False

    num_virtual_tokens: Count = 30
    reparameterize: Count | None = None
    init_std: NonNegative = 0.02
    attentions: Patterns | None = None

    def targets(self, model: nn.Module) -> list[Target]:
        """The attentions, and the feed-forward networks with their taps."""
        return [*attention_targets(model, self.attentions, type(self).__name__), *super().targets(model)]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """Prefixes and bottlenecks."""
        attentions, others = _parted(targets)
        made = prefixes(attentions, self.num_virtual_tokens, self.init_std, self.reparameterize, type(self).__name__)
        return [*made, *super().adapters(others)]

    def num_trainable(self, target: Target) -> int:
        """2 p d in an attention, 2 d r + r + d beside a feed-forward network."""
        if _is_attention(target):
            return num_prefix(target, self.num_virtual_tokens, self.reparameterize)
        return super().num_trainable(target)

    def total_trainable(self, targets: list[Target]) -> int:
        """The sum; with a small network, its table and first layer too: p D + h (D + 1)."""
        trunk = num_trunk(_parted(targets)[0], self.num_virtual_tokens, self.reparameterize)
        return super().total_trainable(targets) + trunk

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and with a small network, in one attention."""
        one = cls(num_virtual_tokens=2, reparameterize=5, attentions="blocks.1.attn", r=3, layers_to_transform=(0,))
        return cls(num_virtual_tokens=3, r=2), one


def _is_attention(target: Target) -> bool:
    return target.site.kind == "module" and widths_of(target.module) is not None


def _parted(targets: list[Target]) -> tuple[list[Target], list[Target]]:
    return [t for t in targets if _is_attention(t)], [t for t in targets if not _is_attention(t)]
