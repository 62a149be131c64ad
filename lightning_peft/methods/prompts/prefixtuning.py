"""Prefix tuning: trained keys and values in front of those of the tokens, in every attention.

Paper:    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv:2101.00190. Without
          the re-parameterisation it is P-tuning v2 (arXiv:2110.07602).
Formula:  head(q) = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]
Shapes:   P_k, P_v (p, n_kv_heads * d) in each attention, d features a head
Init:     P_k, P_v ~ N(0, init_std^2). Even at zero they take their share of each softmax, so the output at the start
          differs from the base. With ``reparameterize=h`` they are W tanh(T W_1^T + b_1)^T + b of a table T (p, D) ~
          N(0, 1), which all attentions share with W_1 (h, D); the linear layers start as ``nn.Linear``
Merge:    none: keys and values are no weights
Places:   ``place="attention"``: each attention puts its own P_k, P_v in front. They stand outside of the sequence:
          positions of the tokens do not move, and the cache holds the tokens alone. ``place="cache"``: the cache that a
          language model of transformers keeps begins with all P_k, P_v, one table (p, features of all layers), as if p
          tokens had been read before: positions count from p on, and windows and biases of positions see the prefix
          too. Both leave P_k as it is where keys are rotated
Deviates from HF PEFT: with ``place="cache"`` in nothing that a model answers; the other place is not known there. In a
          batch that is padded on the left, rotated queries are right only with the ``position_ids`` of each row, which
          ``generate`` gives. The small network runs in evaluation too, so what it makes is never stale.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import nn

from lightning_peft.adapters.cached_prefix import CachedPrefix
from lightning_peft.adapters.prefix import Prefix, num_prefix, num_trunk, prefixes
from lightning_peft.engine import Adapter, Kind, MethodWithHead, Target, register
from lightning_peft.engine.limits import Count, NonNegative, Patterns
from lightning_peft.parts.attention import attention_targets
from lightning_peft.parts.caches import CacheTarget, cache_target


@register("prefixtuning")
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(MethodWithHead):
    """Trained keys and values in front of those of the tokens, in every attention.

    Args:
        num_virtual_tokens: p, keys and values that each attention gets.
        reparameterize: inner features of the small network that makes them; None trains them directly.
        init_std: standard deviation of the start, where they are trained directly.
        target_modules: patterns of attentions; by default all but those that look at another sequence. In the cache: of
            the part that keeps it, where there are several.
        place: ``"attention"``, for attentions that call ``F.scaled_dot_product_attention``; or ``"cache"``, for
            language models of transformers (of an encoder and a decoder, the decoder), where it is what HF PEFT
            computes. In the cache there is no gradient checkpointing of transformers, and no static cache.
        modules_to_save: modules trained whole; a head that is new to the model belongs here (``"output-head"``).

    Raises:
        TargetError: there is no attention whose keys and values can be reached. Models of transformers need
            ``attn_implementation="sdpa"`` there. Or there is no cache, or p is not below the positions of the model.
        AdapterError: a call brings another cache than the prefix can stand in, or none of its layers uses it.

    >>> import torch
    >>> from torch import nn, tensor
    >>> from lightning_peft import inject
    >>> attention = nn.MultiheadAttention(2, 1, bias=False, batch_first=True)
    >>> for weight in (attention.in_proj_weight, attention.out_proj.weight):
    ...     weight.data = torch.eye(2).repeat(len(weight) // 2, 1)
    >>> model = inject(nn.Sequential(attention), PrefixTuning(num_virtual_tokens=1))
    >>> prefix = attention.adapters["default"]
    >>> prefix.keys.data, prefix.values.data = tensor([[0.0, 1.0]]), tensor([[5.0, 7.0]])
    >>> x = tensor([[[1.0, 0.0]]])
    >>> shares = torch.softmax(tensor([0.0, 1.0]) / 2**0.5, dim=0)
    >>> torch.allclose(attention(x, x, x)[0], shares @ tensor([[5.0, 7.0], [1.0, 0.0]]))
    True
    """

    paper: ClassVar[str] = "arXiv:2101.00190"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Prefix}
    acts_on: ClassVar = "blocks"
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    num_virtual_tokens: Count = 20
    reparameterize: Count | None = None
    init_std: NonNegative = 0.02
    target_modules: Patterns | None = None
    place: Literal["attention", "cache"] = "attention"

    def targets(self, model: nn.Module) -> list[Target]:
        """The attentions, or the part that keeps the cache."""
        if self.place == "cache":
            return [cache_target(model, self.num_virtual_tokens, type(self).__name__, self.target_modules)]
        return attention_targets(model, self.target_modules, type(self).__name__)

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """A prefix in each attention, or one in the cache."""
        p, std, hidden, who = self.num_virtual_tokens, self.init_std, self.reparameterize, type(self).__name__
        if self.place == "cache":
            return [CachedPrefix(target, p, std, hidden, who) for target in targets if isinstance(target, CacheTarget)]
        return prefixes(targets, p, std, hidden, who)

    def num_trainable(self, target: Target) -> int:
        """p features of all keys and values; with a small network, its last layer: (h + 1) times those features."""
        if isinstance(target, CacheTarget):
            p, hidden = self.num_virtual_tokens, self.reparameterize
            return (p if hidden is None else hidden + 1) * target.width
        return num_prefix(target, self.num_virtual_tokens, self.reparameterize)

    def total_trainable(self, targets: list[Target]) -> int:
        """The sum; with a small network, its table and first layer too: p D + h (D + 1)."""
        return super().total_trainable(targets) + num_trunk(targets, self.num_virtual_tokens, self.reparameterize)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Trained directly, and made by a small network; the nets of the tests keep no cache."""
        return cls(num_virtual_tokens=3), cls(num_virtual_tokens=2, reparameterize=5)
