"""AdaptFormer: a bottleneck beside the feed-forward network of each block, fed with the residual stream.

Paper:    Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", 2022,
          arXiv:2205.13535.
Formula:  x <- x + FFN(norm(x)) + s (U dropout(f(D x + c)) + e)
Shapes:   x (..., d), D (r, d), c (r,), U (d, r), e (d,)
Init:     D ~ U(-1/sqrt(d), 1/sqrt(d)), U = 0, c = e = 0; y starts as the base
Merge:    not possible: f is not linear
Deviates: the branch reads what the last norm layer before the network was given, if the block begins with a norm layer
          and the network is given just what that last one answers; in all other blocks (which normalise behind the
          residual add, or modulate) it reads the input of the network.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.bottleneck import Linked, Scaling, linked
from lightning_peft.engine import register
from lightning_peft.engine.limits import Probability
from lightning_peft.engine.targets import module_target
from lightning_peft.methods.features.paralleladapter import ParallelAdapter
from lightning_peft.parts.sublayers import Sublayer


@register("adaptformer")
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(ParallelAdapter):
    """One small bottleneck in each block, beside the norm layer and the feed-forward network.

    Args:
        scaling: s, or ``"learned"`` for a trained number for each adapter that starts at 1.
        dropout: probability of dropping a feature of the bottleneck, in training only.
        r: see `ParallelAdapter`; so for the arguments that follow it, and for errors.

    >>> import torch
    >>> from lightning_peft import inject
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.up, self.down = nn.LayerNorm(2), nn.Linear(2, 3), nn.Linear(3, 2)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(self.norm(x)))
    >>> model, x = nn.Sequential(Block(), Block()), torch.tensor([[1.0, 3.0]])
    >>> y = model[0](x)
    >>> a = inject(model, AdaptFormer(r=1))[0].down.adapters["default"]
    >>> a.down.data, a.up.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0]])
    >>> [round(number, 4) for number in (model.eval()[0](x) - y)[0].tolist()]  # 0.1 * relu(1 + 3) * (1, 2)
    [0.4, 0.8]
    """

    paper: ClassVar[str] = "arXiv:2205.13535"

    scaling: Scaling = 0.1
    dropout: Probability = 0.1

    def taps(self, model: nn.Module, sublayer: Sublayer) -> list[Linked]:
        """At the block, at its norm layers, and at the first layer of the network."""
        entry = super().taps(model, sublayer)
        if not entry:
            return entry
        around = {sublayer.block: "block", **dict.fromkeys(sublayer.norms, "norm")}
        targets = [(module_target(model, name, sublayer.width), role) for name, role in around.items()]
        return [linked(t, sublayer.exit.name, role, sublayer.width) for t, role in targets] + entry

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks, and in one with a learnt scaling."""
        return cls(r=2, dropout=0.0), cls(r=3, dropout=0.0, layers_to_transform=(1,), scaling="learned")
