"""Parallel adapters: a bottleneck beside the feed-forward network of each block, fed with the same input.

Paper:    He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, arXiv:2110.04366.
Formula:  y = FFN(x) + s (U f(D x + c) + e), before the residual add
Shapes:   x, y (..., d), D (r, d), c (r,), U (d, r), e (d,)
Init:     D ~ U(-1/sqrt(d), 1/sqrt(d)), U = 0, c = e = 0; y starts as the base
Merge:    not possible: f is not linear
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.bottleneck import Activation, Bottleneck, Linked, Scaling, Stash, linked, with_taps
from lightning_peft.engine import Adapter, Kind, Target, register
from lightning_peft.engine.limits import Count, Probability
from lightning_peft.parts.sublayers import Sublayer, SublayerMethod


@register("paralleladapter")
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(SublayerMethod):
    """One bottleneck in each block, in parallel with its feed-forward network.

    Args:
        r: width of the bottleneck; the paper takes 512 for summarisation and translation, and gains little for smaller
            tasks from more than 64.
        activation: f.
        scaling: s, or ``"learned"`` for a trained number for each adapter that starts at 1.
        dropout: probability of dropping a feature of the bottleneck, in training only.
        target_modules: patterns of linear layers, each of which gets a branch beside it, fed with its own input; by
            default the feed-forward networks of all blocks are found.
        train_norms: train every norm layer beside the adapters.
        blocks: path of the list of blocks, or patterns of several, where they are not found by themselves.
        exclude_modules: patterns of sub-layers that are left out, each named by the layer where its output leaves.
        layers_to_transform: indices of the blocks to adapt; all of them by default.
        modules_to_save: see `LoRA`.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: there are no blocks, or none with a feed-forward network; or a pattern matches nothing.

    >>> from torch import ones, tensor
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(2, 1))
    >>> y = base(ones(1, 2)).item()
    >>> a = inject(base, ParallelAdapter(r=1, target_modules="0"))[0].adapters["default"]
    >>> a.down.data, a.up.data, a.up_bias.data = tensor([[2.0, 1.0]]), tensor([[3.0]]), tensor([0.5])
    >>> round(base(ones(1, 2)).item() - y, 4)  # 4 * (3 * relu(2 + 1) + 0.5)
    38.0
    """

    paper: ClassVar[str] = "arXiv:2110.04366"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {k: Bottleneck for k in ("linear", "conv", "module")}
    layers: ClassVar[tuple[Kind, ...]] = ("linear",)
    mergeable: ClassVar[bool] = False

    r: Count = 64
    activation: Activation = "relu"
    scaling: Scaling = 4.0
    dropout: Probability = 0.0

    def targets(self, model: nn.Module) -> list[Target]:
        """The linear layers that are named; or each feed-forward network, behind taps at what its branch reads."""
        if not self.target_modules:
            return [target for sublayer in self.found(model) for target in (*self.taps(model, sublayer), sublayer.exit)]
        return self.named(model)

    def taps(self, model: nn.Module, sublayer: Sublayer) -> list[Linked]:
        """Where the input of the branch beside ``sublayer`` is found; nowhere if its one layer has it."""
        entry = sublayer.entry
        return [] if entry.name == sublayer.exit.name else [linked(entry, sublayer.exit.name, "entry", entry.d_in)]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """Taps, and the bottlenecks that they feed."""
        return with_taps(targets, self.bottleneck)

    def bottleneck(self, target: Target, stash: Stash | None) -> Bottleneck:
        """The branch beside ``target``, fed from ``stash``, or with the input of the target if there is none."""
        # of "module" it may be what sits on attentions
        cls: type[Bottleneck] = self.adapter_types["linear"]  # type: ignore[assignment]
        return cls(
            target,
            self.r,
            activation=self.activation,
            scaling=self.scaling,
            dropout=self.dropout,
            start="identity",
            source="input" if stash is None else "stash",
            stash=stash,
        )

    def num_trainable(self, target: Target) -> int:
        """2 d r + r + d, and one if the scaling is learnt; of a named layer, d_in r + r + d_out r + d_out."""
        if isinstance(target, Linked):
            return 0
        d_in = target.d_in if self.target_modules else target.d_out
        return (d_in + target.d_out) * self.r + self.r + target.d_out + (self.scaling == "learned")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and beside named layers, with a learnt scaling."""
        return cls(r=2), cls(r=3, target_modules=("attn.proj", "head"), activation="swish", scaling="learned")
