"""Hierarchical Side-Tuning: a pyramid of small stages beside the model, fed by its blocks through meta tokens.

Paper:    Lin et al., "Hierarchical Side-Tuning for Vision Transformers", 2023, arXiv:2310.05393.
Formula:  a meta token e_i goes through block i with the tokens: [t_i; h_i] = Block_i([e_i; h_{i-1}]);
          v_i = bridge(h_i) at the size of the stage;  x <- x + CrossAttention(LN x; [LN bridge(t_i); mean v_i]);
          x <- x + v_i;  x <- x + FFN(LN x);  between stages x <- LN(conv x), by half;  y = U LN(x)
Shapes:   x (B, h, w, d_s), d_s of ``dims`` for stage s, the first at a quarter of the image; bridge (d_s, D);
          U (D, d_s)
Init:     e_i ~ U(-sqrt(3/D), sqrt(3/D)); the rest as torch's own layers do
Merge:    impossible, a second network
Deviates from the paper: y goes through U back to the model's own last norm and head, and tokens in front of the grid
          get its mean, which is the paper's pooling; the stem is normalised over channels, not over the batch, in whose
          place a batch norm stood before the head as well. Where a block takes no meta token (windows, maps, mixers, or
          ``detach_taps``), the class token stands for it, or the maximum of v_i where there is none.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.pyramid import MetaToken, Stage, num_of_stage
from lightning_peft.adapters.side import Quiet, SideMethod, Stash
from lightning_peft.engine import Adapter, Kind, Target, TargetError, check_range, register
from lightning_peft.engine.limits import Count
from lightning_peft.parts.blocks import stage_modules, stages_of
from lightning_peft.parts.layout import layers_of
from lightning_peft.parts.taps import Tap, blocks_to_tap, takes_any_number, taps_of


@register("hierarchicalsidetuning")
@dataclass(frozen=True, kw_only=True)
class HierarchicalSideTuning(SideMethod):
    """A side network in stages for images; layer norms of the blocks and the output head train with it.

    Args:
        dims: features of each stage; they share the blocks out evenly, or as the model's own stages do.
        num_heads: attention heads of each.
        mlp_ratio: inner features of a feed-forward net for each of its outer ones.
        detach_taps: run the blocks without gradients, and leave out meta tokens and layer norms: little memory.
        pyramid: every stage answers, not the last alone: for nets that answer with the features of their stages. One
            that is plain, as a ViT, has to be asked for those of the last blocks of the side stages.
        entry: name of the layer whose input the side network gets; the first by default.
        taps: see `LadderSideTuning`; so for ``causal``.
        modules_to_save: modules trained whole, by default the output head.

    Raises:
        AdapterError: ``num_heads`` do not divide ``dims``.
        TargetError: no blocks are found, too few, or of several widths for one stage; or the model is one of text.

    >>> import torch
    >>> from lightning_peft import inject
    >>> block = lambda: nn.Sequential(nn.Linear(3, 3))
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(block(), block()))
    >>> net = inject(net, HierarchicalSideTuning(dims=(4,), num_heads=(2,), modules_to_save=()))
    >>> stage = net[1][1].adapters["default"]
    >>> _ = stage.norm.weight.data.zero_(), stage.norm.bias.data.fill_(1.0)  # so that LN x = (1, 1, 1, 1)
    >>> _ = stage.up.weight.data.fill_(0.5), stage.up.bias.data.fill_(-1.0)
    >>> net(torch.randn(1, 8, 2))[0, 0]
    tensor([1., 1., 1.], grad_fn=<SelectBackward0>)
    """

    paper: ClassVar[str] = "arXiv:2310.05393"
    modalities: ClassVar = ("vision", "diffusion")
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Stage}
    tap_type: ClassVar[type[Quiet]] = MetaToken
    identity_at_init: ClassVar[bool] = False

    dims: tuple[int, ...] = (32, 48, 64, 72)
    num_heads: tuple[int, ...] = (2, 4, 8, 12)
    mlp_ratio: Count = 4
    detach_taps: bool = False
    pyramid: bool = False
    entry: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = zip(self.dims, self.num_heads, strict=False)
        fits = len(self.dims) == len(self.num_heads) and all(d >= h >= 1 and d % h == 0 for d, h in pairs)
        check_range(type(self).__name__, "num_heads", self.num_heads, fits, f"divisors of each of dims {self.dims}")

    def targets(self, model: nn.Module) -> list[Target]:
        """The first layer, the blocks, and where every stage answers, the modules of the stages."""
        who = type(self).__name__
        names = blocks_to_tap(model, self.taps, who)
        if isinstance(taps_of(model, names, who, entry=self.entry)[0].module, nn.Embedding):
            raise TargetError(
                f"{who}: {type(model).__name__} begins with an embedding of words, and this is for images. Choose "
                "another method for text, such as LadderSideTuning."
            )
        stages = stages_of(names)
        if self.pyramid and len(stages) == len(self.dims):
            exits = stage_modules(model, stages)
            names = [name for stage, whole in zip(stages, exits, strict=True) for name in (*stage, whole)]
        else:
            exits = [stage[-1] for stage in self.shared_out(names)]
        return [*taps_of(model, names, who, exits=exits, entry=self.entry)]

    def shared_out(self, names: list[str]) -> list[list[str]]:
        """The blocks of each stage."""
        stages, n = stages_of(names), len(self.dims)
        if len(names) < n:
            raise TargetError(
                f"{type(self).__name__}: {len(names)} blocks cannot feed {n} stages. Give fewer of dims and num_heads."
            )
        return (
            stages if len(stages) == n else [names[i * len(names) // n : (i + 1) * len(names) // n] for i in range(n)]
        )

    def blocks(self, targets: list[Tap]) -> list[list[Tap]]:
        """The blocks that feed each stage."""
        whole = {t.name for t in targets if any(o.name.startswith(t.name + ".") for o in targets)}
        taps = {t.name: t for t in targets if t.index >= 0 and t.name not in whole}
        return [[taps[name] for name in stage] for stage in self.shared_out([*taps])]

    def exit(self, target: Tap, stash: Stash, targets: list[Tap]) -> Adapter:  # noqa: D102
        return Stage(target, stash, self, targets, [t for t in targets if t.role == "exit"].index(target))

    def answers(self, stage: int) -> bool:
        """Whether the map of a stage goes back to the model."""
        return self.pyramid or stage == len(self.dims) - 1

    def takes_meta(self, target: Tap) -> bool:
        """Whether a token may be added: to blocks of tokens with an attention that looks at all of them, in no grid."""
        return not (self.detach_taps or target.role == "entry") and takes_any_number(target.module)

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """``modules_to_save``, and the layer norms of the blocks."""
        found = super().trained_in_place(model)
        for block in () if self.detach_taps else blocks_to_tap(model, self.taps, type(self).__name__):
            for name, layer, _ in layers_of(model.get_submodule(block)):
                if isinstance(layer, nn.LayerNorm):
                    found += [f"{block}.{name}.{key}" for key, _ in layer.named_parameters(recurse=False)]
        return found

    def total_trainable(self, targets: list[Target]) -> int:
        """Those of each stage, and a meta token of D in each block that takes one."""
        taps = [t for t in targets if isinstance(t, Tap)]
        exits, blocks = [t for t in taps if t.role == "exit"], self.blocks(taps)
        stages = [num_of_stage(self, taps[0], i, blocks[i], end) for i, end in enumerate(exits)]
        return sum(stages) + sum(b.d_out for stage in blocks for b in stage if self.takes_meta(b))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With meta tokens, and without gradients in the blocks."""
        return (
            cls(dims=(4, 6), num_heads=(2, 3), mlp_ratio=2, modules_to_save="head"),
            cls(dims=(4,), num_heads=(1,), mlp_ratio=1, detach_taps=True, modules_to_save=()),
        )
