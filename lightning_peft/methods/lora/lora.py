"""LoRA: add a trainable low-rank product to a frozen layer.

Paper:    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685;
          rank-stabilised scaling: Kalajdzievski, 2023, arXiv:2312.03732.
Formula:  y = W x + b + scaling * B (A dropout(x)),  scaling = alpha / r, or alpha / sqrt(r) if rank-stabilised
Shapes:   x (..., d_in), y (..., d_out), W (d_out, d_in), lora_A (r, d_in), lora_B (d_out, r);
          convolution: lora_A (r, c_in / groups, *kernel), lora_B (c_out, r); embedding: lora_A (r, vocabulary)
Init:     lora_A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), lora_B = 0 (embedding: A = 0, B ~ N(0, 1)); y starts as the base
Merge:    W <- W + scaling * B A
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.low_rank import LowRank, LowRankConv, LowRankEmbedding
from lightning_peft.engine import Adapter, Kind, Target, TargetedMethod, TargetError, matches, register
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.limits import Count, Positive, Probability


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(TargetedMethod):
    """Low-rank update of the layers chosen by ``target_modules``.

    Args:
        r: rank of the update; trainable numbers per layer: r * (d_in + d_out).
        alpha: numerator of ``scaling``; None makes it 1.
        dropout: probability of dropping an input feature of the update, in training only.
        use_rslora: ``scaling = alpha / sqrt(r)`` in place of ``alpha / r``, so that large ranks learn as fast.
        rank_pattern: pattern -> rank of the layers it selects, in place of ``r``; the first that matches counts.
        alpha_pattern: the same for ``alpha``.
        clip_rank: lower the rank of a layer that cannot use all of it, in place of raising.
        target_modules: ``"all-linear"`` (every linear layer but the output head), ``"all-layers"`` (every layer the
            method can adapt but the head), or names, last parts of names, regular expressions, or class names.
        exclude_modules: patterns of layers that are left out.
        layers_to_transform: indices of the blocks to adapt; all of them by default.
        modules_to_save: patterns of modules that are trained whole beside the adapters, or of single parameters such
            as ``"q_proj.bias"``; ``"output-head"`` finds the head by itself.

    Raises:
        AdapterError: ``r``, ``alpha`` or ``dropout`` is out of range.
        TargetError: a pattern matches nothing; the rank exceeds what a layer can use (min(d_in, d_out)); or
            ``dropout`` is asked for on a weight that is read without its layer being called.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> x, y = ones(1, 3), base(ones(1, 3))
    >>> lora = inject(base, LoRA(r=2, alpha=8.0))[0].adapters["default"]
    >>> _ = nn.init.ones_(lora.lora_B)
    >>> allclose(base(x), y + (8 / 2) * x @ lora.lora_A.T @ lora.lora_B.T)
    True
    >>> LoRA(r=0)
    Traceback (most recent call last):
        ...
    lightning_peft.engine.errors.AdapterError: LoRA: r must be an integer >= 1, got 0.
    """

    paper: ClassVar[str] = "arXiv:2106.09685"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {
        "linear": LowRank,
        "conv": LowRankConv,
        "embedding": LowRankEmbedding,
    }

    r: Count = 8
    alpha: Positive | None = 16.0
    dropout: Probability = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    clip_rank: bool = False

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers chosen by ``target_modules``; every pattern of rank and alpha must select some of them."""
        found = super().targets(model)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(matches(pattern, t.name) for t in found):
                which = "rank_pattern" if pattern in self.rank_pattern else "alpha_pattern"
                raise TargetError(
                    f"{type(self).__name__}: {which} {pattern!r} matched none of the {len(found)} layers to adapt."
                    f"{nearest(pattern, (t.name for t in found))} Leave it out, or name a layer of target_modules."
                )
        return found

    def rank(self, target: Target) -> int:
        """The rank of the update of ``target``."""
        r = next((r for pattern, r in self.rank_pattern.items() if matches(pattern, target.name)), self.r)
        return min(r, target.d_in, target.d_out) if self.clip_rank else r

    def scaling(self, target: Target) -> float:
        """The factor of the update of ``target``."""
        alpha = next((a for pattern, a in self.alpha_pattern.items() if matches(pattern, target.name)), self.alpha)
        return 1.0 if alpha is None else alpha / self.rank(target) ** (0.5 if self.use_rslora else 1)

    def adapter(self, target: Target) -> Adapter:
        """A low-rank product of the shape of ``target``."""
        who, r = type(self).__name__, self.rank(target)
        if r > min(target.d_in, target.d_out):
            raise TargetError(
                f"{who}: r={r} is more than {target.name!r} ({target.d_out} x {target.d_in}) can use. Lower r, give "
                "it its own in rank_pattern, or set clip_rank=True."
            )
        return self.adapter_types[target.site.kind](target, r, self.scaling(target), self.dropout)

    def num_trainable(self, target: Target) -> int:
        """r * (d_in + d_out)."""
        return self.rank(target) * (target.d_in + target.d_out)

    @classmethod
    def examples(cls) -> "tuple[Self, ...]":
        """Plain, and rank-stabilised with a rank of its own for one layer."""
        return cls(r=2), cls(r=3, alpha=1.0, use_rslora=True, rank_pattern={"v_proj": 1}, modules_to_save="head")
