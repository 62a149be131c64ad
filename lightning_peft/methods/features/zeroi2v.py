"""ZeroI2V: linear adapters around attention and feed-forward network, and heads that look at other frames.

Paper:    Li et al., "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video", 2024,
          arXiv:2310.01324.
Formula:  a(x) = x + s (U dropout(D x + c) + e), before and behind each attention and each feed-forward network;
          of keys and values, with frames: the first d / shift_div channels come from the frame before, as many that
          follow from the frame behind; a first or last frame keeps its own
Shapes:   x (..., d), D (r, d), c (r,), U (d, r), e (d,); the batch holds the frames of a clip one after the other
Init:     D ~ U(-1/sqrt(d), 1/sqrt(d)), U = 0, c = e = 0; y starts as the base (shifted, with frames)
Merge:    before W: W <- W + s W U D, b <- b + s W (U c + e); behind: W <- W + s U D W, b <- b + s (U (D b + c) + e);
          refused with frames, whose shift is no change of weights
Deviates: layers for queries, keys and values by themselves share one a, and so do two that begin a feed-forward
          network. No embedding of time is made; ``modules_to_save`` trains what else of the model the authors train.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.linear_bottleneck import LinearBottleneck, Place
from lightning_peft.engine import Adapter, Kind, Target, TargetError, register
from lightning_peft.engine.limits import Count, NonZero, Probability
from lightning_peft.parts.sublayers import Sublayer, SublayerKind, SublayerMethod, keys_and_values
from lightning_peft.parts.taps import looks_at_all


@register("zeroi2v")
@dataclass(frozen=True, kw_only=True)
class ZeroI2V(SublayerMethod):
    """Four linear maps in each block, which merging folds away; with ``frames``, an image model sees motion.

    Args:
        r: width of the bottlenecks; a quarter of the model's by default.
        scaling: s; 0.5 for Kinetics and 1 for Something-Something in the paper.
        dropout: probability of dropping a feature of the bottleneck; 0 where attention reads its weights itself.
        frames: images of a clip, which follow one another in the batch; by default images are by themselves.
        shift_div: one over the share of channels that look back, and of those that look ahead.
        target_modules: patterns of linear layers whose output alone gets a linear map, in any model; by default the
            sub-layers of all blocks are found.
        blocks: see `ParallelAdapter`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range; or, in a forward, a batch is no whole number of clips.
        TargetError: no such sub-layers are found, or their keys and values cannot be told; a pattern matches nothing.

    >>> from torch import ones, tensor
    >>> from lightning_peft import inject
    >>> base = inject(nn.Sequential(nn.Linear(2, 2)), ZeroI2V(r=1, target_modules="0", dropout=0.0))
    >>> base[0].weight.data, base[0].bias.data = tensor([[1.0, 0.0], [0.0, 2.0]]), tensor([0.0, 1.0])  # y = (1, 3)
    >>> a = base[0].adapters["default"]
    >>> a.down.data, a.down_bias.data = tensor([[2.0, 1.0]]), tensor([1.0])  # D y + c = 6
    >>> a.up.data, a.up_bias.data = tensor([[1.0], [-1.0]]), tensor([2.0, 0.0])
    >>> base(ones(1, 2)).tolist()  # (1 + 8 / 2, 3 - 6 / 2)
    [[5.0, 0.0]]
    """

    paper: ClassVar[str] = "arXiv:2310.01324"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": LinearBottleneck}
    sublayers: ClassVar[tuple[SublayerKind, ...]] = ("attention", "feedforward")
    layers: ClassVar[tuple[Kind, ...]] = ("linear",)

    r: Count | None = None
    scaling: NonZero = 0.5
    dropout: Probability = 0.1
    frames: Count | None = None
    shift_div: Count = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        for fact in ("identity_at_init", "mergeable"):
            object.__setattr__(self, fact, (self.frames or 1) == 1)

    def targets(self, model: nn.Module) -> list[Target]:
        """The named layers; or those that read the input of each sub-layer, and the one that makes its output."""
        if self.target_modules:
            return [self._at(target) for target in self.named(model)]
        found = self.found(model)
        attentions = [s.block for s in found if s.kind == "attention"]
        apart = [block for block in attentions if not looks_at_all(model.get_submodule(block))]
        if self.frames and apart:
            raise TargetError(
                f"ZeroI2V: {apart[0]!r} looks at windows or a map, whose batches are not frames. Set frames=None."
            )
        return [place for sublayer in found for place in self._around(sublayer)]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """One for each; those before the layers of one sub-layer share the matrices of the first."""
        made: dict[str, LinearBottleneck] = {}
        for target in targets:
            place: Place = target  # type: ignore[assignment]  # all of them are
            made[place.name] = LinearBottleneck(
                place,
                self.width(place),
                made.get(place.first),
                scaling=self.scaling,
                dropout=self.dropout,
                frames=self.frames,
                shift_div=self.shift_div,
            )
        return list(made.values())

    def width(self, place: Place) -> int:
        """r at ``place``."""
        return self.r or max(1, place.width // 4)

    def _around(self, sublayer: Sublayer) -> list[Target]:
        readers, end = sublayer.readers, sublayer.projection
        if end in readers or any(t.site.kind != "linear" for t in (*readers, end)):
            raise TargetError(
                f"ZeroI2V: {sublayer.exit.name!r} ends a sub-layer that is no stack of linear layers. Leave it out "
                "with exclude_modules, or name linear layers in target_modules."
            )
        before = [self._at(t, readers[0].name, True, self._shifted(t, sublayer)) for t in readers]
        if self.frames and sublayer.kind == "attention" and not any(place.shifted[1] for place in before):
            raise TargetError(
                f"ZeroI2V: which features of {readers[0].name!r} are keys and values cannot be told. Set frames=None, "
                "which leaves the shift over frames out."
            )
        return [*before, self._at(end)]

    def _shifted(self, target: Target, sublayer: Sublayer) -> tuple[int, tuple[int, ...]]:
        parts, shifted = keys_and_values(target, sublayer) if self.frames else (1, ())
        if shifted and target.d_out // parts % self.shift_div:
            raise TargetError(
                f"ZeroI2V: shift_div={self.shift_div} does not divide the {target.d_out // parts} features of keys "
                f"and values in {target.name!r}. Set it to the number of heads."
            )
        return parts, shifted

    def _at(
        self, t: Target, first: str = "", before: bool = False, shifted: tuple[int, tuple[int, ...]] = (1, ())
    ) -> Place:
        if t.site.read and self.dropout:
            raise TargetError(
                f"ZeroI2V: the weight of {t.name!r} is read without a call, where dropout={self.dropout} cannot act. "
                "Set dropout=0, or leave it out with exclude_modules."
            )
        return Place(t.name, t.module, t.site, t.owner, first=first or t.name, before=before, shifted=shifted)

    def num_trainable(self, target: Target) -> int:
        """2 d r + r + d; 0 where the matrices are those of another."""
        place: Place = target  # type: ignore[assignment]
        r = self.width(place)
        return 2 * place.width * r + r + place.width if place.first == place.name else 0

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all blocks; and behind named layers."""
        return cls(r=2, dropout=0.0), cls(target_modules=("attn.proj", "head"), scaling=1.0, dropout=0.0)
