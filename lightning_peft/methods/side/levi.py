"""LEVI: several views of a frozen model, each beside a small model from scratch, and their mean.

Paper:    Roh et al., "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views", 2024,
          arXiv:2402.04644.
Formula:  y = mean over taps l of A_l [h_l ; g(x)],  A_l z = W_2 relu(W_1 z + b_1) + b_2
Shapes:   h_l (B, N, D_l) answers of a few blocks, the last among them; g(x) (B, N, width), of a small network on the
          input; A_l from D_l + width over ``width`` to D features
Init:     as torch's own layers start; nothing of g comes from the model
Merge:    impossible, two networks
Deviates from the paper: its views are averaged as features, before the last norm and the head, where the paper averages
          predictions and adds up the losses of all views; with a linear head right behind, the two predict the same.
          Which sizes the paper's networks have is not known here. Its LoRA on the large model is left out.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, cat, nn
from torch.nn import functional as F

from lightning_peft.adapters.side import Exit, Kept, SideMethod, Stash, alike
from lightning_peft.adapters.small_nets import Affine, InputNet, num_of_input_net
from lightning_peft.engine import Adapter, Kind, Layer, Target, register
from lightning_peft.engine.limits import Count
from lightning_peft.parts.taps import Tap, blocks_to_tap, taps_of


class Views(Exit):
    """The small network, and an adapting layer for each view."""

    def __init__(self, target: Tap, stash: Stash, method: "LEVI", targets: list[Tap]) -> None:
        super().__init__(target, stash, method, targets)
        taps = [t for t in targets if t.index >= 0]
        self.net = InputNet(target, next(t for t in targets if t.enters), method.width, method.depth, method.width)
        self.down = nn.ModuleList(Affine(target, t.d_out + method.width, method.width) for t in taps)
        self.up = nn.ModuleList(Affine(target, method.width, target.d_out) for _ in taps)

    def side(self, y: Tensor, kept: Kept, layer: Layer) -> Tensor:
        """The mean of the views."""
        g = self.net(kept.entered, y, self.first, self.causal, self.who)
        views = [
            up(F.relu(down(cat([alike(self.tap(kept, i, y), y, self), g], dim=-1))))
            for i, (down, up) in enumerate(zip(self.down, self.up, strict=True))
        ]
        return sum(views[1:], views[0]) / len(views)


@register("levi")
@dataclass(frozen=True, kw_only=True)
class LEVI(SideMethod):
    """A small model beside a frozen one, and layers that adapt both together; the output head is trained whole.

    Args:
        num_taps: how many blocks are looked at, spread evenly, the last among them, unless ``taps`` names them.
        width: features inside and behind the small model, and inside of the adapting layers.
        depth: layers of the small model before its last.
        entry: name of the layer whose input the small model gets (of an embedding, its output); the first by default.
        taps: see `LadderSideTuning`; so for ``causal``.
        modules_to_save: modules trained whole, by default the output head.

    Raises:
        TargetError: no blocks are found, or no head is known: name it in ``modules_to_save``.

    >>> import torch
    >>> from lightning_peft import inject
    >>> block = lambda: nn.Sequential(nn.Linear(3, 3))
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(block(), block()))
    >>> views = inject(net, LEVI(modules_to_save=()))[1][1].adapters["default"]
    >>> for up, y in zip(views.up, (1.0, 5.0)):
    ...     _ = up.weight.data.zero_(), up.bias.data.fill_(y)
    >>> net(torch.randn(1, 1, 2)).tolist()
    [[[3.0, 3.0, 3.0]]]
    """

    paper: ClassVar[str] = "arXiv:2402.04644"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Views}
    identity_at_init: ClassVar[bool] = False

    num_taps: Count = 4
    width: Count = 64
    depth: Count = 4
    entry: str | None = None

    def targets(self, model: nn.Module) -> list[Target]:
        """The first layer, and the blocks that are looked at."""
        who = type(self).__name__
        blocks = blocks_to_tap(model, self.taps, who)
        n = len(blocks) if self.taps is not None else min(self.num_taps, len(blocks))
        chosen = [blocks[(i + 1) * len(blocks) // n - 1] for i in range(n)]
        return [*taps_of(model, chosen, who, entry=self.entry)]

    def total_trainable(self, targets: list[Target]) -> int:
        """|g| and, of width w, (D_l + w + 1) w + (w + 1) D of each view."""
        taps, w = [t for t in targets if isinstance(t, Tap)], self.width
        views = [(t.d_out + w + 1) * w + (w + 1) * taps[-1].d_out for t in taps if t.index >= 0]
        return num_of_input_net(next(t for t in taps if t.enters), w, self.depth, w) + sum(views)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """All blocks with a head, and the last without."""
        return cls(width=5, depth=2, modules_to_save="head"), cls(num_taps=1, width=4, depth=1, modules_to_save=())
