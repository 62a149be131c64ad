"""Ladder Side-Tuning: a small transformer beside the model climbs along what its blocks answer.

Paper:    Sung et al., "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", 2022,
          arXiv:2206.06522.
Formula:  s <- D_0 h_0;  for each tapped block i:  s <- g_i s + (1 - g_i) D_i h_i,  g_i = sigmoid(theta_i / T),
          s <- SideBlock_i(s);  y = h_L + U LN(s), or y = U LN(s) without ``residual``
Shapes:   h_i (B, N, D) answers of the blocks, h_0 what the first was given; s (B, N, D/r); D_i (D/r, D), U (D, D/r);
          theta_i scalars; SideBlock_i a transformer block D/r wide that normalises first, with ReLU
Init:     theta_i = 0, so g_i = 0.5; U = 0 with ``residual``, hence y starts as the base; the rest as torch's layers do
Merge:    impossible, a second network
Deviates from the paper: the last block's answer stays, and the ladder adds to it, as the side blocks start at random
          and are not pruned from the model (``residual=False`` is the paper's sum). There is one kind of side block
          for all models. On maps it has a depthwise 3x3 convolution in the place of attention, and s changes its width
          and its size with the stages. Encoder-decoders: one of the two stacks is tapped (``taps``).
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.side import Exit, Kept, SideMethod, Stash, alike, check_widths, visible
from lightning_peft.adapters.small_nets import Affine, MixingBlock, Norm
from lightning_peft.engine import Adapter, Kind, Layer, Target, register
from lightning_peft.engine.limits import Count, Patterns, Positive
from lightning_peft.parts.taps import Tap


class Ladder(Exit):
    """The side transformer, from the first tap to the last."""

    def __init__(self, target: Tap, stash: Stash, method: "LadderSideTuning", targets: list[Tap]) -> None:
        super().__init__(target, stash, method, targets)
        self.temperature, self.residual = method.temperature, method.residual
        widths = [method.width(tap) for tap in targets]
        self.start = Affine(target, targets[0].width_in, widths[0])
        self.gates = target.new_parameter(len(targets))
        self.down = nn.ModuleList(Affine(target, t.d_out, d) for t, d in zip(targets, widths, strict=True))
        self.steps = nn.ModuleDict(
            {
                str(i): Affine(target, a, b)
                for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False), 1)
                if a != b
            }
        )
        self.blocks = nn.ModuleList(
            MixingBlock(target, d, method.heads(d), method.mlp_ratio, t.first)
            for t, d in zip(targets, widths, strict=True)
        )
        self.norm, self.up = Norm(target, widths[-1]), Affine(target, widths[-1], target.d_out, zero=method.residual)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Gates at zero; the rest by the generator."""
        super().reset_parameters(layer, generator)
        self.gates.zero_()

    def side(self, y: Tensor, kept: Kept, layer: Layer) -> Tensor:
        """The top of the ladder."""
        gates = (self.gates / self.temperature).sigmoid().to(y.dtype).unbind()
        s = self.start(self.tap(kept, -1, y))
        seen = visible(layer, y, self.causal, self.who) if y.dim() == 3 else None
        for i, (down, gate, block) in enumerate(zip(self.down, gates, self.blocks, strict=True)):
            u = down(self.tap(kept, i, y))
            s = self.steps[str(i)](s) if str(i) in self.steps else s
            s = alike(s, u, self)
            s = block(u + gate * (s - u), seen)
        up = self.up(self.norm(s))
        return y + up if self.residual else up


@register("laddersidetuning")
@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(SideMethod):
    """A transformer of width D/r beside the model, fed by the answers of its blocks.

    Args:
        r: how many times narrower than the model the side network is.
        taps: the blocks that feed it, by default all: the path of their list, or patterns of single blocks, in the
            order of their calls. The last is where the side network answers. Fewer blocks make a shorter ladder.
        causal: whether tokens look back alone, as in language models; by default as the attention in the blocks says
            of itself, or else whether they keep a cache. Where a model of your own does not say, this does.
        num_heads: attention heads in a side block, or the next smaller number that divides its width.
        mlp_ratio: inner features of a side block's feed-forward net for each of its outer ones.
        temperature: T of the gates; a small one lets them decide sharply.
        residual: add the ladder to the last block's answer, in place of replacing it.
        modules_to_save: modules trained whole; a head that is new to the model belongs here (``"output-head"``).

    Raises:
        TargetError: no blocks are found, or ``r`` leaves less than 2 features.
        AdapterError: while running, a cache of earlier tokens is given, or the blocks answer in another form.

    >>> from lightning_peft import inject
    >>> block = lambda: nn.Sequential(nn.Linear(6, 6))
    >>> net, x = nn.Sequential(nn.Linear(2, 6), nn.Sequential(block(), block())), torch.randn(1, 4, 2)
    >>> base = net(x)
    >>> ladder = inject(net, LadderSideTuning(r=2))[1][1].adapters["default"]
    >>> torch.equal(net(x), base)
    True
    >>> _ = ladder.norm.weight.data.zero_(), ladder.norm.bias.data.fill_(1.0)  # so that LN s = (1, 1, 1)
    >>> _ = ladder.up.weight.data.fill_(0.5)
    >>> torch.allclose(net(x), base + 3 * 0.5)
    True
    """

    paper: ClassVar[str] = "arXiv:2206.06522"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Ladder}
    attends: ClassVar[bool] = True

    r: Count = 8
    num_heads: Count = 8
    mlp_ratio: Count = 4
    temperature: Positive = 0.1
    residual: bool = True
    modules_to_save: Patterns = ()

    def targets(self, model: nn.Module) -> list[Target]:
        """The blocks, of which each is wide enough."""
        targets = super().targets(model)
        check_widths(targets, self)
        return targets

    def width(self, tap: Target) -> int:
        """D / r."""
        return tap.d_out // self.r

    def heads(self, d: int) -> int:
        """The greatest divisor of ``d`` that is not above ``num_heads``."""
        return max(n for n in range(1, self.num_heads + 1) if d % n == 0)

    def total_trainable(self, targets: list[Target]) -> int:
        """At each block a gate, D_i and, d = D/r wide, 4 d (d + 1) + 2 ratio d^2 + (ratio + 5) d; D_0, U, last norm."""
        blocks = [t for t in targets if isinstance(t, Tap)]
        widths, total = [self.width(t) for t in blocks], 0
        for block, d in zip(blocks, widths, strict=True):
            mix = 10 * d if block.first else 4 * d * (d + 1)
            total += 1 + (block.d_out + 1) * d + mix + 2 * self.mlp_ratio * d * d + (self.mlp_ratio + 5) * d
        steps = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False) if a != b)
        ends = (blocks[0].width_in + 1) * widths[0] + 2 * widths[-1] + (widths[-1] + 1) * blocks[-1].d_out
        return total + steps + ends

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """All blocks."""
        return (cls(r=2, num_heads=3), cls(r=3, taps="blocks", mlp_ratio=2, temperature=1.0))
