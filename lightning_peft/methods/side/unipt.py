"""UniPT: a parallel network reads what all blocks answer, each by itself, and weighs them.

Paper:    Diao et al., "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory",
          2024, arXiv:2308.14316.
Formula:  z_i = LN_i(D_i h_i);  m_i = (l1(relu(z_L z_i^T)) + I) z_i;  c_i = w . (mean z_L * mean z_i);
          u = U relu(z_L + LN(P sum_{i<L} softmax(c)_i m_i));  y = h_L + u, or y = u without ``residual``
Shapes:   h_0 .. h_L (B, N, D_i), what the first block was given and what the blocks answer; z, m (B, N, d), d = D/r;
          D_i (d, D_i), w (d,), P (d, d), U (D, d); l1 divides rows of N by their sums
Init:     U = 0 with ``residual``, hence y starts as the base; the rest as torch's own layers do
Merge:    impossible, a second network
Deviates from the paper: the last block's answer stays, as in the reference code for CLIP (``residual=False`` is its
          form for transformers of their own). Masks hold for the interaction and for the means alike: each token
          takes the means over the tokens that it sees, which in language models are those before it. Maps are averaged
          to the size of the last, and their places are the tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.side import Exit, Kept, SideMethod, Stash, alike, check_widths, visible
from lightning_peft.adapters.small_nets import Affine, Norm
from lightning_peft.engine import Adapter, Kind, Layer, Target, register
from lightning_peft.engine.limits import Count
from lightning_peft.parts.taps import Tap


class Parallel(Exit):
    """The parallel network."""

    def __init__(self, target: Tap, stash: Stash, method: "UniPT", targets: list[Tap]) -> None:
        super().__init__(target, stash, method, targets)
        d, self.residual = method.width(target), method.residual
        widths = [targets[0].width_in, *(t.d_out for t in targets)]
        self.down = nn.ModuleList(Affine(target, width, d) for width in widths)
        self.norms = nn.ModuleList(Norm(target, d) for _ in widths)
        self.confidence = target.new_parameter(d)
        self.project, self.norm = Affine(target, d, d), Norm(target, d)
        self.up = Affine(target, d, target.d_out, zero=method.residual)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """w ~ N(0, 1/d); the rest by the generator."""
        super().reset_parameters(layer, generator)
        d = len(self.confidence)
        self.confidence.copy_(torch.randn(d, dtype=self.confidence.dtype, generator=generator) / d**0.5)

    def side(self, y: Tensor, kept: Kept, layer: Layer) -> Tensor:
        """The sum of all that the anchor z_L finds in the others."""
        seen = visible(layer, y, self.causal, self.who) if y.dim() == 3 else None
        share = None if seen is None else seen[:, 0].to(y.dtype) / seen[:, 0].sum(-1, keepdim=True).to(y.dtype)

        def z(i: int) -> Tensor:
            h = alike(self.tap(kept, i - 1, y), y, self)
            return self.norms[i](self.down[i](h.flatten(1, -2)))

        anchor = z(len(self.down) - 1)
        mean = anchor.mean(1, keepdim=True) if share is None else share @ anchor
        scores, found = [], []
        for i in range(len(self.down) - 1):
            other = z(i)
            near = anchor @ other.transpose(1, 2)
            near = F.relu(near if seen is None else near.masked_fill(~seen[:, 0], 0))
            found.append(near @ other / near.sum(-1, keepdim=True).clamp(min=1e-6) + other)
            average = other.mean(1, keepdim=True) if share is None else share @ other
            scores.append(mean * average @ self.confidence.to(y.dtype))
        weights = torch.stack(scores, dim=-1).softmax(-1)[..., None].unbind(-2)
        mixed = sum(weight * each for weight, each in zip(weights, found, strict=True))
        up = self.up(F.relu(anchor + self.norm(self.project(mixed)))).view(y.shape)
        return y + up if self.residual else up


@register("unipt")
@dataclass(frozen=True, kw_only=True)
class UniPT(SideMethod):
    """A network beside the model that reads the answers of its blocks in parallel; the output head is trained whole.

    Args:
        r: how many times narrower than the model the network is.
        residual: add to the last block's answer, in place of replacing it.
        taps: see `LadderSideTuning`; so for ``causal``.
        modules_to_save: modules trained whole, by default the output head.

    Raises:
        TargetError: no blocks are found, ``r`` leaves less than 2 features, or no head is known: name it in
            ``modules_to_save``.
        AdapterError: while running, a cache of earlier tokens is given, or the blocks answer in another form.

    >>> from lightning_peft import inject
    >>> block = lambda: nn.Sequential(nn.Linear(6, 6))
    >>> net, x = nn.Sequential(nn.Linear(2, 6), nn.Sequential(block(), block())), torch.randn(1, 4, 2)
    >>> base = net(x)
    >>> side = inject(net, UniPT(r=2, modules_to_save=()))[1][1].adapters["default"]
    >>> for norm in (*side.norms, side.norm):  # z = (1, 1, 1); in relu: (2, 2, 2)
    ...     _ = norm.weight.data.zero_(), norm.bias.data.fill_(1.0)
    >>> _ = side.up.weight.data.fill_(0.5)
    >>> torch.allclose(net(x), base + 3 * 2 * 0.5)
    True
    """

    paper: ClassVar[str] = "arXiv:2308.14316"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Parallel}
    attends: ClassVar[bool] = True

    r: Count = 4
    residual: bool = True

    def targets(self, model: nn.Module) -> list[Target]:
        """The blocks."""
        targets = super().targets(model)
        check_widths(targets[-1:], self)
        return targets

    def width(self, target: Target) -> int:
        """D / r."""
        return target.d_out // self.r

    def total_trainable(self, targets: list[Target]) -> int:
        """(D_i + 3) d of each h_i; w, P with its norm, U: d + d (d + 3) + D (d + 1)."""
        taps = [t for t in targets if isinstance(t, Tap)]
        d, D = self.width(taps[-1]), taps[-1].d_out
        widths = [taps[0].width_in, *(t.d_out for t in taps)]
        return sum((width + 3) * d for width in widths) + d + d * (d + 3) + D * (d + 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With a head, and without."""
        return cls(r=2, modules_to_save="head"), cls(r=3, modules_to_save=())
