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
from lightning_peft.adapters.prefix import Prefix
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count
from lightning_peft.methods.features.paralleladapter import ParallelAdapter
from lightning_peft.methods.prompts.prefixtuning import PrefixTuning
from lightning_peft.parts.attention import attention_targets, widths_of


@register("mamadapter")
@dataclass(frozen=True, kw_only=True)
class MAMAdapter(ParallelAdapter):
    """`PrefixTuning` in the attentions and a `ParallelAdapter` beside the feed-forward networks.

    Args:
        num_virtual_tokens: p, keys and values that each attention gets.
        reparameterize: inner features of the small network that makes the prefixes; None trains them directly.
        attentions: patterns of attentions; by default all but those that look at another sequence.
        r: width of the bottleneck; the paper takes 512.
        target_modules: see `ParallelAdapter`; so for the arguments that follow it, and for errors.

    Raises:
        TargetError: there is no attention whose keys and values can be reached; see `PrefixTuning`.
    """

    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Bottleneck, "conv": Bottleneck, "module": Prefix}
    identity_at_init: ClassVar[bool] = False

    num_virtual_tokens: Count = 30
    reparameterize: Count | None = None
    attentions: str | tuple[str, ...] | None = None

    @property
    def prefixes(self) -> PrefixTuning:
        """The half that acts in attentions."""
        facts = {"num_virtual_tokens": self.num_virtual_tokens, "reparameterize": self.reparameterize}
        return PrefixTuning(target_modules=self.attentions, **facts)  # type: ignore[arg-type]  # the limits are the same

    def targets(self, model: nn.Module) -> list[Target]:
        """The attentions, and the feed-forward networks with their taps."""
        return [*attention_targets(model, self.attentions, type(self).__name__), *super().targets(model)]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """Prefixes and bottlenecks."""
        attentions, others = _parted(targets)
        return [*self.prefixes.adapters(attentions), *super().adapters(others)]

    def num_trainable(self, target: Target) -> int:
        """Of a prefix, or of a bottleneck."""
        return self.prefixes.num_trainable(target) if _is_attention(target) else super().num_trainable(target)

    def total_trainable(self, targets: list[Target]) -> int:
        """The sum of both halves."""
        attentions, others = _parted(targets)
        return self.prefixes.total_trainable(attentions) + super().total_trainable(others)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and with a small network, in one attention."""
        one = cls(num_virtual_tokens=2, reparameterize=5, attentions="blocks.1.attn", r=3, layers_to_transform=(0,))
        return cls(num_virtual_tokens=3, r=2), one


def _is_attention(target: Target) -> bool:
    return target.site.kind == "module" and widths_of(target.module) is not None


def _parted(targets: list[Target]) -> tuple[list[Target], list[Target]]:
    return [t for t in targets if _is_attention(t)], [t for t in targets if not _is_attention(t)]
