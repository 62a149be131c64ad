"""Houlsby adapters: a bottleneck behind the attention and behind the feed-forward network of each block.

Paper:    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, arXiv:1902.00751.
Formula:  h <- h + s (U f(D h + c) + e), h the output of a sub-layer before it is added to the residual stream
Shapes:   h (..., d), D (r, d), c (r,), U (d, r), e (d,)
Init:     D, U ~ N(0, 0.02^2), c = e = 0: the output at the start differs a little from the base; or, with
          init="identity", D ~ U(-1/sqrt(d), 1/sqrt(d)), U = 0: y starts as the base
Merge:    not possible: f is not linear
Deviates from the authors' code, which has f = GELU and a standard deviation of 0.001: both are as in the library of
          AdapterHub, whose defaults became customary. Attentions that look at another sequence get a bottleneck too,
          which that library leaves out.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.bottleneck import Activation, Bottleneck, Scaling, Start
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count, Probability
from lightning_peft.parts.sublayers import SublayerKind, SublayerMethod


@register("houlsbyadapter")
@dataclass(frozen=True, kw_only=True)
class HoulsbyAdapter(SublayerMethod):
    """Two bottlenecks in each block, in series with its sub-layers; norm layers train beside them.

    Args:
        r: width of the bottlenecks; the paper takes 8 to 256, by task.
        activation: f.
        scaling: s, or ``"learned"`` for a trained number for each adapter that starts at 1.
        dropout: probability of dropping a feature of the bottleneck, in training only.
        init: how the matrices start.
        target_modules: patterns of linear layers and convolutions behind which to put adapters, in any model; by
            default the sub-layers of all blocks are found.
        train_norms: train every norm layer, as in the paper; a second set of adapters beside this one cannot.
        blocks: see `ParallelAdapter`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: there are no blocks, or none with such sub-layers; or a pattern matches nothing.

    >>> from torch import ones, tensor
    >>> from lightning_peft import inject
    >>> base = inject(nn.Sequential(nn.Linear(2, 2)), HoulsbyAdapter(r=1, target_modules="0", activation="relu"))
    >>> a = base[0].adapters["default"]
    >>> base[0].weight.data, base[0].bias.data = tensor([[1.0, 0.0], [0.0, 2.0]]), tensor([0.0, 1.0])  # h = (1, 3)
    >>> a.down.data, a.down_bias.data = tensor([[2.0, 1.0]]), tensor([0.5])  # D h + c = 5.5
    >>> a.up.data, a.up_bias.data = tensor([[1.0], [-1.0]]), tensor([0.25, 0.0])
    >>> base(ones(1, 2)).tolist()
    [[6.75, -2.5]]
    """

    paper: ClassVar[str] = "arXiv:1902.00751"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {k: Bottleneck for k in ("linear", "conv", "module")}
    sublayers: ClassVar[tuple[SublayerKind, ...]] = ("attention", "feedforward")
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    r: Count = 64
    activation: Activation = "swish"
    scaling: Scaling = 1.0
    dropout: Probability = 0.0
    init: Start = "bert"
    train_norms: bool = True

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers that are named, or where the output of each sub-layer leaves."""
        return self.named(model) if self.target_modules else [sublayer.exit for sublayer in self.found(model)]

    def adapter(self, target: Target) -> Adapter:
        """A bottleneck in series."""
        return Bottleneck(
            target,
            self.r,
            activation=self.activation,
            scaling=self.scaling,
            dropout=self.dropout,
            start=self.init,
        )

    def num_trainable(self, target: Target) -> int:
        """2 d r + r + d, and one if the scaling is learnt."""
        return 2 * target.d_out * self.r + self.r + target.d_out + (self.scaling == "learned")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and behind named layers, with a learnt scaling."""
        named = cls(
            r=3, target_modules=("proj", "head"), activation="gelu", scaling="learned", init="identity",
            train_norms=False,
        )  # fmt: skip
        return cls(r=2), named
