"""Side-Tuning: blend what a frozen model answers with a small network on the same input.

Paper:    Zhang et al., "Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", 2020,
          arXiv:1912.13503.
Formula:  y = a B(x) + (1 - a) S(x), a = sigmoid(alpha); or y = B(x) * S(x); or y = B(x) * m(x) + c(x) (FiLM)
Shapes:   B(x), S(x) features of one block, (B, N, C) or a map; alpha a scalar; S convolutions, 8x8 of stride 4, then
          3x3, the first of them of stride 2, with norm and ReLU, then a linear layer to C
Init:     alpha = 0, so a = 0.5; S as torch's own layers start
Merge:    impossible, two networks
Deviates from the paper: S starts at random, not distilled from B, and is normalised over all channels, not in groups;
          B and S are blended before the last norm of the model, in whose place the reference has one without
          parameters. On tokens, S acts on each alone. The weight decay of alpha, 0 in the reference code, is up to the
          optimizer.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.side import Exit, Kept, SideMethod, Stash
from lightning_peft.adapters.small_nets import InputNet, num_of_input_net
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetError, register
from lightning_peft.engine.limits import Count
from lightning_peft.parts.blocks import find_blocks
from lightning_peft.parts.taps import Tap, blocks_to_tap, taps_of


class Blend(Exit):
    """Blends the features of its block with those of a network on the input."""

    alpha: nn.Parameter

    def __init__(self, target: Tap, stash: Stash, method: "SideTuning", targets: list[Tap]) -> None:
        super().__init__(target, stash, method, targets)
        self.merge = method.merge
        if self.merge == "alpha":
            self.alpha = target.new_parameter()
        self.net = InputNet(target, targets[0], method.width, method.depth, method.d_out(target))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """alpha = 0; the network by the generator."""
        super().reset_parameters(layer, generator)
        if self.merge == "alpha":
            self.alpha.zero_()

    def side(self, y: Tensor, kept: Kept, layer: Layer) -> Tensor:
        """The blend."""
        s = self.net(kept.entered, y, self.first, self.causal, self.who)
        if self.merge == "alpha":
            return s + self.alpha.sigmoid().to(y.dtype) * (y - s)
        if self.merge == "product":
            return y * s
        scale, shift = s.chunk(2, dim=-1)
        return y * scale + shift


@register("sidetuning")
@dataclass(frozen=True, kw_only=True)
class SideTuning(SideMethod):
    """A small network on the input beside a frozen model; the output head is trained whole.

    Args:
        taps: where the two are blended: the last block by default, or the names of several modules, in the order of
            their calls, such as the stages of a net that answers with a pyramid; each has a network of its own.
        width: features inside of the side network.
        depth: its layers before the last.
        merge: how they are blended: ``"alpha"``, ``"product"`` or ``"film"``.
        entry: name of the layer whose input the side network gets (of an embedding, its output); the first by default.
        modules_to_save: modules trained whole, by default the output head as in the paper.

    Raises:
        TargetError: no blocks are found, or no head is known: name it in ``modules_to_save``.

    >>> from lightning_peft import inject
    >>> block = lambda: nn.Sequential(nn.Linear(3, 3))
    >>> net, x = nn.Sequential(nn.Linear(2, 3), nn.Sequential(block(), block())), torch.randn(1, 4, 2)
    >>> base = net(x)
    >>> side = inject(net, SideTuning(modules_to_save=()))[1][1].adapters["default"]
    >>> _ = side.net.out.weight.data.zero_(), side.net.out.bias.data.fill_(5.0)  # so that S(x) = 5
    >>> torch.allclose(net(x), 0.5 * base + 0.5 * 5.0)
    True
    >>> _ = side.alpha.data.fill_(2.0)  # sigmoid(2) = 0.8808
    >>> torch.allclose(net(x), 0.8808 * base + 0.1192 * 5.0, atol=1e-3)
    True
    """

    paper: ClassVar[str] = "arXiv:1912.13503"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Blend}
    identity_at_init: ClassVar[bool] = False

    width: Count = 64
    depth: Count = 4
    merge: Literal["alpha", "product", "film"] = "alpha"
    entry: str | None = None

    def targets(self, model: nn.Module) -> list[Target]:
        """The first layer, and the blocks that are changed; between them those that must not see the change."""
        who = type(self).__name__
        exits = blocks_to_tap(model, self.taps, who)
        if self.taps is None:
            return [*taps_of(model, exits[-1:], who, entry=self.entry)]
        try:
            blocks = find_blocks(model)
        except TargetError:
            blocks = []
        names = [n for n in blocks if blocks.index(exits[0]) <= blocks.index(n)] if {*exits} <= {*blocks} else exits
        return [*taps_of(model, names[: names.index(exits[-1]) + 1], who, exits=exits, entry=self.entry)]

    def d_out(self, target: Target) -> int:
        """Features of the side network at ``target``."""
        return 2 * target.d_out if self.merge == "film" else target.d_out

    def total_trainable(self, targets: list[Target]) -> int:
        """|S| at each exit, and its alpha."""
        taps = [t for t in targets if isinstance(t, Tap)]
        nets = [num_of_input_net(taps[0], self.width, self.depth, self.d_out(t)) for t in taps if t.role == "exit"]
        return sum(nets) + len(nets) * (self.merge == "alpha")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """The blend of the paper with a head, and another without."""
        return (
            cls(width=5, depth=2, modules_to_save="head"),
            cls(width=4, depth=1, merge="film", taps="blocks.1", modules_to_save=()),
        )
